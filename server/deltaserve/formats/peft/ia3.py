"""IA³ (arXiv 2205.05638) as PEFT writes it."""

from deltaserve.deltas.primitives import Affine
from deltaserve.deltas.sites import Weights
from deltaserve.formats.peft import options
from deltaserve.formats.peft.checkpoint import Checkpoint
from deltaserve.formats.peft.draft import Draft
from deltaserve.formats.peft.matching import Patterns, targeted

OPTIONS = options.Options(
    used=frozenset({"target_modules", "exclude_modules", "feedforward_modules"}),
    inert=frozenset({"fan_in_fan_out", "init_ia3_weights"}),
)


def lower(checkpoint: Checkpoint, draft: Draft, weights: Weights) -> None:
    """y = l ⊙ (x Wᵀ + b), the bias included; at feed-forward modules y = (x ⊙ l) Wᵀ + b."""
    del weights
    draft.kind("ia3")
    config, patterns = checkpoint.config, Patterns()
    forward = options.names(config, "feedforward_modules") or ()
    matched = targeted(config, checkpoint.modules, patterns)
    checkpoint.warnings.extend(f"target_modules entry {entry!r} matches no module here" for entry in matched.idle)
    for own in matched.modules:
        module = checkpoint.name(own)
        if checkpoint.may_lack(module):
            continue
        site = checkpoint.linear(module, "IA³")
        name = f"{module}.ia3_l"
        if _feeds_forward(forward, own, patterns):
            draft.put(module, Affine(in_scale=checkpoint.take(name, (1, site.in_features)).flatten()))
        else:
            draft.put(module, Affine(scale=checkpoint.take(name, (site.out_features, 1)).flatten()))


def _feeds_forward(wanted: str | tuple[str, ...], module: str, patterns: Patterns) -> bool:
    """PEFT asks whether the name ends with an entry, and does not ask for a dot before it."""
    if isinstance(wanted, str):
        return patterns.full(wanted, module, "feedforward_modules") is not None
    return module.endswith(wanted)
