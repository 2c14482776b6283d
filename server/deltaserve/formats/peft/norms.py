"""LayerNorm tuning (arXiv 2312.11420), and BEFT's biases."""

from deltaserve.deltas.primitives import Affine
from deltaserve.deltas.sites import SiteType, Weights
from deltaserve.formats.draft import Draft
from deltaserve.formats.peft import options
from deltaserve.formats.peft.checkpoint import Checkpoint
from deltaserve.formats.peft.options import TARGETED, TRAINED
from deltaserve.formats.peft.targets import Target, each

LN_TUNING_OPTIONS = options.Options(used=TARGETED)
BEFT_OPTIONS = options.Options(used=TARGETED, inert=TRAINED)


def ln_tuning(checkpoint: Checkpoint, draft: Draft, weights: Weights) -> None:
    """A norm's weight and bias are the delta's own."""

    def one(target: Target, _: Weights) -> None:
        weight = target.take("ln_tuning_layers.weight", target.outputs)
        bias = target.take("ln_tuning_layers.bias", target.outputs) if target.site.bias is not None else None
        draft.put(target.name, Affine(scale=weight, shift=bias, replace=True))

    each("ln-tuning", one, types=(SiteType.NORM,))(checkpoint, draft, weights)


def beft(checkpoint: Checkpoint, draft: Draft, weights: Weights) -> None:
    """y += bias, whether or not the backbone has one there. arXiv 2509.15974."""

    def one(target: Target, _: Weights) -> None:
        draft.shift(target.name, target.number("beft_bias", 1, target.outputs).flatten())

    each("beft", one)(checkpoint, draft, weights)
