"""A delta times a number: what it adds, so many times. Negative takes away (task arithmetic, arXiv 2212.04089)."""

import dataclasses

from deltaserve.deltas.adapters import Bottleneck, Tap
from deltaserve.deltas.delta import Delta
from deltaserve.deltas.primitives import Affine, Dense, LowRank, SitePrimitive, Sparse
from deltaserve.errors import FailedPrecondition


def weighed(label: str, delta: Delta, weight: float) -> Delta:
    """The delta with everything that it adds multiplied by `weight`; its head stays as it is.

    LowRank, Sparse and Dense, biases, and adapters whose result is z + h. Raises FailedPrecondition where there is
    anything else, which is no sum: a factor, a replacement, keys, rows of a prompt.
    """
    if weight == 1.0:
        return delta
    for part, what in ((delta.prompt, "a soft prompt"), (delta.coupling, "an invertible block")):
        if part is not None:
            raise _meaningless(label, weight, f"{what}, which")
    at = {name: tuple(_part(label, name, part, weight) for part in parts) for name, parts in delta.at.items()}
    return dataclasses.replace(delta, at=at)


def _part(label: str, site: str, part: SitePrimitive, weight: float) -> SitePrimitive:
    match part:
        case LowRank(scale=scale):
            return dataclasses.replace(part, scale=scale * weight)
        case Dense(matrix, bias, False):
            return Dense(matrix.float() * weight, None if bias is None else bias.float() * weight)
        case Sparse(index, values):
            return Sparse(index, values.float() * weight)
        case Affine(None, None, shift, False) if shift is not None:
            return Affine(shift=shift.float() * weight)
        case Bottleneck(after=None, carry=Tap.OUTPUT, carry_scale=1.0, replaces=False):
            bias = None if part.up_bias is None else part.up_bias.float() * weight
            return dataclasses.replace(part, scale=part.scale * weight, up_bias=bias)
    raise _meaningless(label, weight, f"{type(part).__name__} at {site}, which")


def _meaningless(label: str, weight: float, what: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"weight {weight:g} of {label}: it has {what} is not added to anything, so that a weight means nothing; leave "
        "the weight out",
        reason="WEIGHT_MEANS_NOTHING",
        field="delta_weights",
        metadata={"delta": label, "weight": f"{weight:g}"},
    )
