"""What a lowering has put together so far: primitives by site, merged where they fold."""

import dataclasses
from collections.abc import Iterable

import torch

from deltaserve.deltas.adapters import Adapter, Bottleneck, Coupling, Tap
from deltaserve.deltas.bases import content_key
from deltaserve.deltas.primitives import Affine, Dense, Head, LowRank, SitePrimitive, SoftPrompt, tensors
from deltaserve.errors import BadCheckpoint


class Draft:
    """At most one primitive of each type stands at a site, but for adapters, which act in the order they came in.

    `task_id`: the task that it is for, if there are any.
    """

    def __init__(self, task_id: int | None = None) -> None:
        self.task_id = task_id
        self._at: dict[str, dict[type, SitePrimitive]] = {}
        self._adapters: dict[str, list[Adapter]] = {}
        self.kinds: list[str] = []
        self.prompt: SoftPrompt | None = None
        self.coupling: Coupling | None = None
        self.head: Head | None = None
        self.position_shift = 0
        self.bases: dict[str, torch.Tensor] = {}
        self.invocation: tuple[int, ...] = ()

    @property
    def at(self) -> dict[str, tuple[SitePrimitive, ...]]:
        sites = dict.fromkeys((*self._at, *self._adapters))
        return {site: (*self._at.get(site, {}).values(), *self._adapters.get(site, ())) for site in sites}

    def kind(self, name: str) -> None:
        """Notes a kind, once."""
        if name not in self.kinds:
            self.kinds.append(name)

    def base(self, tensor: torch.Tensor) -> torch.Tensor:
        """The one copy of a frozen tensor that other deltas may have too; views of it go into primitives."""
        return self.bases.setdefault(content_key(tensor), tensor.contiguous())

    def put(self, site: str, primitive: SitePrimitive) -> None:
        """Adds a primitive. Raises BadCheckpoint where one of its type is there already that is no adapter."""
        if isinstance(primitive, Adapter):
            self._adapters.setdefault(site, []).append(primitive)
            return
        here = self._at.setdefault(site, {})
        if type(primitive) in here:
            raise BadCheckpoint(f"two parts of the checkpoint act in the same way at {site!r}")
        here[type(primitive)] = primitive

    def product(self, site: str, a: torch.Tensor, b: torch.Tensor) -> None:
        """y += (x aᵀ) bᵀ, a [r, in] and b [out, r]: as a Dense where that is smaller."""
        smaller = a.numel() + b.numel() < b.shape[0] * a.shape[1]
        self.put(site, LowRank(a.contiguous(), b.contiguous(), 1.0) if smaller else Dense(b @ a))

    def shift(self, site: str, shift: torch.Tensor) -> None:
        """y += shift, [out] fp32; shifts at one site add up."""
        here = self._at.setdefault(site, {})
        before = here.get(Affine, Affine())
        assert isinstance(before, Affine)
        total = shift if before.shift is None else before.shift + shift
        here[Affine] = dataclasses.replace(before, shift=total)

    def nothing(self) -> bool:
        """Whether every number is such that the delta does nothing (a fresh LoRA, say)."""
        return (
            self.head is None
            and self.prompt is None
            and self.coupling is None
            and all(_idle(p) for found in self.at.values() for p in found)
        )


def _idle(primitive: SitePrimitive) -> bool:
    match primitive:
        case LowRank():
            return any(not bool(tensor.any()) for tensor in tensors(primitive))
        case Affine(in_scale, scale, shift):
            ones: Iterable[torch.Tensor] = (t for t in (in_scale, scale) if t is not None)
            return all(bool((t == 1).all()) for t in ones) and (shift is None or not bool(shift.any()))
        case Bottleneck(after=None, replaces=False, carry=Tap.OUTPUT, carry_scale=1.0):
            return not bool(primitive.up.any()) and (primitive.up_bias is None or not bool(primitive.up_bias.any()))
    return False
