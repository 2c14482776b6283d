"""A delta on the host: named primitives at sites of one backbone, and what is known about them."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch

from deltaserve.deltas.adapters import Bottleneck, Coupling
from deltaserve.deltas.bases import Bases, Owners, same_view
from deltaserve.deltas.primitives import Head, Prefix, SitePrimitive, SoftPrompt, tensors
from deltaserve.deltas.sites import Pooling, Task

T = TypeVar("T")


@dataclass(frozen=True)
class Provenance:
    """Where a delta's bytes came from and how they were read. `origin`: of the checkpoint that was converted to it."""

    format: str
    content_hash: str
    file_bytes: int
    tensors_matched: int
    base_model: str = ""
    warnings: tuple[str, ...] = ()
    guessed: tuple[str, ...] = ()
    origin: "Provenance | None" = None


@dataclass(frozen=True, eq=False)
class Delta:
    """An immutable set of primitives, valid for one backbone.

    `at[site name]` lists the primitives there. `position_shift` is added to the positions of real tokens (a prefix in
    families with absolute or rotary positions). `pooling` is what the head reads. `labels` is as long as the head is
    wide, and empty where its outputs are no labels (spans, choices). `problem_type` is `regression`,
    `single_label_classification` or `multi_label_classification`. With an `invocation` it acts from the start of the
    last occurrence of these tokens on, and nowhere where they do not occur. `task_id` is which of its checkpoint's
    tasks it is for, None where the method knows no tasks. `token_types`: whether its head's task is told the segments
    of a pair. `coupling`: what acts on every embedded row of the input.

    `bases` are frozen tensors that other deltas may have too, by `content_key`. A primitive's tensor whose memory lies
    in one of them is a view of it, has unit stride in its last dimension, and is stored and counted with the base.
    """

    kinds: tuple[str, ...]
    at: Mapping[str, tuple[SitePrimitive, ...]]
    task: Task
    provenance: Provenance
    prompt: SoftPrompt | None = None
    position_shift: int = 0
    head: Head | None = None
    pooling: Pooling | None = None
    labels: tuple[str, ...] = ()
    problem_type: str | None = None
    invocation: tuple[int, ...] = ()
    task_id: int | None = None
    token_types: bool = True
    coupling: Coupling | None = None
    bases: Bases = field(default_factory=dict)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor of its own, in the order in which the pool lays them out; no base and no view of one."""
        for primitives in self.at.values():
            for primitive in primitives:
                yield from (t for t in tensors(primitive) if self.owners.base_of(t) is None)
        for part in (self.prompt, self.head, self.coupling):
            if part is not None:
                yield from tensors(part)

    @cached_property
    def owners(self) -> Owners:
        """Whether a tensor is a view of a base, and of which."""
        return Owners(self.bases)

    @property
    def parameters(self) -> int:
        return sum(t.numel() for t in self.tensors())

    @property
    def nbytes(self) -> int:
        """Bytes of its own tensors, without alignment."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    @property
    def shared_bytes(self) -> int:
        """Bytes of its bases, without alignment."""
        return sum(t.numel() * t.element_size() for t in self.bases.values())

    @property
    def prompt_length(self) -> int:
        return 0 if self.prompt is None else int(self.prompt.rows.shape[0])

    @property
    def prompt_place(self) -> int | None:
        return None if self.prompt is None else self.prompt.place

    @property
    def gated(self) -> bool:
        """Whether something is weighed by what all rows of a sequence come to."""
        parts = (part for found in self.at.values() for part in found)
        return any(isinstance(part, Bottleneck | Prefix) and part.gate is not None for part in parts)

    @property
    def whole(self) -> bool:
        """Whether it needs all rows of a sequence in one forward: no cache of keys and values reproduces it."""
        return self.gated or any(_edits_last(part) for found in self.at.values() for part in found)


def _edits_last(part: SitePrimitive) -> bool:
    return isinstance(part, Bottleneck) and part.positions is not None and part.positions.last > 0


def mapped(delta: Delta, fn: Callable[[torch.Tensor], torch.Tensor], bases: Bases | None = None) -> Delta:
    """The same delta with `fn` applied to each tensor, in the order of `Delta.tensors`.

    `bases`: copies of its bases to use instead of them; left out, they too are what `fn` makes of them, and come first.
    """
    copies = {key: fn(base) for key, base in delta.bases.items()} if bases is None else bases

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        key = delta.owners.base_of(tensor)
        return fn(tensor) if key is None else same_view(tensor, delta.bases[key], copies[key])

    def one(part: T) -> T:
        """A copy of a dataclass; whatever stands in its fields, and in those of their fields, in turn."""
        changed = {f.name: each(getattr(part, f.name)) for f in dataclasses.fields(part)}  # type: ignore[arg-type]
        return dataclasses.replace(part, **changed)  # type: ignore[type-var]

    def each(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return moved(value)
        if isinstance(value, tuple):
            return tuple(each(entry) for entry in value)
        return one(value) if dataclasses.is_dataclass(value) else value

    at = {name: each(primitives) for name, primitives in delta.at.items()}
    parts = {"prompt": each(delta.prompt), "head": each(delta.head), "coupling": each(delta.coupling)}
    return dataclasses.replace(delta, at=at, bases=copies, **parts)
