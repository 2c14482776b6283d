"""IA³ (arXiv 2205.05638) as PEFT writes it."""

from deltaserve.deltas.primitives import Affine
from deltaserve.deltas.sites import Weights
from deltaserve.formats.draft import Draft
from deltaserve.formats.peft import options
from deltaserve.formats.peft.checkpoint import Checkpoint
from deltaserve.formats.peft.targets import Target, each

OPTIONS = options.Options(
    used=frozenset({"target_modules", "exclude_modules", "feedforward_modules"}),
    inert=frozenset({"fan_in_fan_out", "init_ia3_weights"}),
)


def lower(checkpoint: Checkpoint, draft: Draft, weights: Weights) -> None:
    """y = l ⊙ (x Wᵀ + b), the bias included; at feed-forward modules y = (x ⊙ l) Wᵀ + b."""
    forward = options.names(checkpoint.config, "feedforward_modules") or ()

    def one(target: Target, _: Weights) -> None:
        if _feeds_forward(forward, target):
            part = Affine(in_scale=target.take("ia3_l", 1, target.inputs).flatten())
        else:
            part = Affine(scale=target.take("ia3_l", target.outputs, 1).flatten())
        draft.put(target.name, part)

    each("ia3", one)(checkpoint, draft, weights)


def _feeds_forward(wanted: str | tuple[str, ...], target: Target) -> bool:
    """PEFT asks whether the name ends with an entry, and does not ask for a dot before it."""
    if isinstance(wanted, str):
        return target.patterns.full(wanted, target.own, "feedforward_modules") is not None
    return target.own.endswith(wanted)
