"""LoRA's `ensure_weight_tying`: what has the input embedding's weight is tuned as the embedding is.

The checkpoint holds the change once for each of these modules, and its config does not say which ones they were. PEFT
finds that out again when it reads the checkpoint, and so do we.
"""

from collections.abc import Iterable

import torch

from deltaserve.deltas.primitives import Dense
from deltaserve.deltas.sites import SiteType
from deltaserve.errors import BadCheckpoint
from deltaserve.formats.draft import Draft
from deltaserve.formats.peft import options
from deltaserve.formats.peft.checkpoint import Checkpoint
from deltaserve.formats.peft.matching import Patterns
from deltaserve.formats.peft.targets import Target

_NAMES = ("embed_tokens", "lm_head")
"""PEFT notices that an embedding is meant by these names alone, so not by GPT-2's `wte` or T5's `shared`."""

_KEEPING = (True, False, None, "gaussian", "eva")
"""Values of init_lora_weights that leave the two changes the same numbers; others start each module by itself."""


class Tie:
    """`names`: the input embedding and all that follows it, if `target_modules` means one of them; canonical."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.names = _tuned(checkpoint)
        self._checkpoint = checkpoint
        self._rank = 0
        self._pair: tuple[torch.Tensor, torch.Tensor] | None = None
        self._brought: set[bool] = set()

    def first(self, found: Iterable[Target]) -> list[Target]:
        """The same targets, the embedding before what follows it."""
        return sorted(found, key=lambda target: not self._leads(target))

    def rank(self, target: Target, r: int) -> int:
        """How many rows A has: the embedding's where A is the embedding's."""
        if self._leads(target):
            self._rank = r
        return self._rank if self._follows(target) else r

    def check(self, target: Target, a: torch.Tensor, b: torch.Tensor) -> None:
        """PEFT gives a vocabulary's linear the embedding's Bᵀ for A and Aᵀ for B. Raises BadCheckpoint."""
        if self._leads(target):
            self._pair = a, b
        if not self._follows(target):
            return
        assert self._pair is not None
        if not torch.equal(a, self._pair[1].T) or not torch.equal(b, self._pair[0].T):
            raise BadCheckpoint(
                f"config key 'ensure_weight_tying' is true, and the LoRA of {target.own!r} is not that of "
                f"{self._checkpoint.own(self.names[0])!r}: which of the two PEFT uses depends on the device",
                metadata={"module": target.name},
            )

    def bring(self, target: Target, own: torch.Tensor | None) -> None:
        """A weight that is saved below a target; None where it is the backbone's. Raises BadCheckpoint."""
        if own is not None:
            replace(target, own)
        if group(target):
            self._brought.add(own is None)
            if len(self._brought) > 1:
                raise _apart(target)

    def _leads(self, target: Target) -> bool:
        return target.name in self.names[:1]

    def _follows(self, target: Target) -> bool:
        linear = target.name in self.names[1:] and target.site.type is SiteType.LINEAR
        return linear and self._checkpoint.config.get("init_lora_weights") in _KEEPING


def _tuned(checkpoint: Checkpoint) -> tuple[str, ...]:
    backbone, config = checkpoint.backbone, checkpoint.config
    followers = tuple(name for name in backbone.tied if not checkpoint.may_lack(name))
    if not options.flag(config, "ensure_weight_tying") or not followers:
        return ()
    wanted = options.names(config, "target_modules")
    if isinstance(wanted, str):
        patterns = Patterns()
        meant = any(patterns.full(wanted, name, "target_modules") for name in _NAMES)
    else:
        meant = _named(wanted or ())
    if meant and not _named(options.listed(config, "modules_to_save")):
        return (backbone.input_embedding, *followers)
    for name in followers:
        if any(checkpoint.has(f"{name}.{part}") for part in ("lora_A.weight", "lora_embedding_A")):
            raise options.not_served(
                "ensure_weight_tying",
                True,
                f"PEFT itself loses what follows the embedding, {name!r}, when it reads this checkpoint: it looks for "
                f"{' or '.join(_NAMES)} in target_modules; name them by a pattern, and it does not",
            )
    return ()


def group(target: Target) -> tuple[str, ...]:
    """All modules that have one weight with this one; empty where none has."""
    backbone = target.checkpoint.backbone
    names = (backbone.input_embedding, *backbone.tied)
    return names if backbone.tied and target.name in names else ()


def replace(target: Target, weight: torch.Tensor) -> None:
    """A weight of the delta's own, at all that is tied: PEFT reads it into the place that they share."""
    target.draft.kind("selective-module")
    weight = target.draft.base(weight) if group(target) else weight  # a base is stored once for all of them
    for name in group(target) or (target.name,):
        before = _held(target.draft, name)
        if before is None:
            site = target.checkpoint.backbone.sites[name]
            target.draft.put(name, Dense(weight, site.bias, replace=True))
        elif not torch.equal(before, weight):
            raise _apart(target)
    target.checkpoint.warn(
        f"{target.name}.base_layer.weight differs from the backbone's: this delta has its own {weight.numel()}"
    )


def _apart(target: Target) -> BadCheckpoint:
    return BadCheckpoint(
        f"{target.own!r} brings another weight than what is tied to it, and they have one",
        metadata={"module": target.name},
    )


def replaced(target: Target) -> torch.Tensor | None:
    """The weight of the delta's own that stands at a module, fp32, if there is one."""
    found = _held(target.draft, target.name)
    return None if found is None else found.float()


def _held(draft: Draft, name: str) -> torch.Tensor | None:
    return next((part.weight for part in draft.at.get(name, ()) if isinstance(part, Dense) and part.replace), None)


def saved(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What follows an input embedding that `modules_to_save` brings whole; canonical names."""
    backbone, config = checkpoint.backbone, checkpoint.config
    names = options.listed(config, "modules_to_save")
    if not options.flag(config, "ensure_weight_tying") or not names:
        return ()
    own = checkpoint.own(backbone.input_embedding)
    if not _named(names) and not own.endswith(names):
        return ()
    # PEFT looks for the same two names; without them it still reads the tensors that are there.
    return tuple(name for name in backbone.tied if checkpoint.has(f"{name}.weight"))


def _named(names: tuple[str, ...]) -> bool:
    return any(name.rpartition(".")[2] in _NAMES for name in names)
