"""The network of a bottleneck adapter: down, activation, up. Compacter's is expanded from its Kronecker factors.

Compacter (arXiv 2106.04647): a linear layer's matrix is H = Σ_i kron(C_i, W_i), [in, out]: y = x H + b. The rule C
[n, n, n] and W [n, in / n, out / n] may each be a product of two, and each may be one for all of an adapter's layers.
"""

from dataclasses import dataclass

import torch

from deltaserve.deltas.adapters import OwnNorm
from deltaserve.errors import BadCheckpoint
from deltaserve.formats import options
from deltaserve.formats.adapterhub.configs import Part, activation
from deltaserve.formats.adapterhub.member import Below, Member
from deltaserve.formats.kronecker import expanded, joined

MOST_WIDER = 8
"""How many times wider than a row an expanded Compacter's inside may be."""
_MOST_WIDTH = 1 << 24


@dataclass(frozen=True, eq=False)
class Network:
    """f(n(x) Downᵀ + down_bias) Upᵀ + up_bias, the adapter's scale in Up and its bias: times one number or a vector."""

    down: torch.Tensor
    up: torch.Tensor
    down_bias: torch.Tensor | None
    up_bias: torch.Tensor | None
    activation: str | None
    before: OwnNorm | None


def width_of(part: Part, layer: int, hidden: int) -> int:
    """Inner width: int(hidden // reduction_factor), at least 1. Raises BadCheckpoint."""
    told = part.told["reduction_factor"]
    if isinstance(told, dict):
        told = told.get(str(layer), told.get("default"))
    factor = options.number({"reduction_factor": told}, "reduction_factor", 0.0)
    if factor <= 0 or hidden / factor > _MOST_WIDTH:
        raise options.wrong("reduction_factor", f"is {options.shown(told)}, of {hidden}: that is no width")
    return max(1, int(hidden // factor))


def network(member: Member, part: Part, at: str, layer: int, hidden: int) -> Network:
    """Takes the tensors below `at` that end a row of `hidden` numbers."""
    tensors, width = member.tensors, width_of(part, layer, hidden)
    before = None
    if part.flag("ln_before"):
        before = _norm(tensors, f"{at}.adapter_down.0", hidden)
        again = _norm(tensors, f"{at}.adapter_norm_before", hidden)
        if not torch.equal(before.weight, again.weight) or not torch.equal(before.bias, again.bias):
            raise BadCheckpoint(f"tensors {at}.adapter_down.0 and {at}.adapter_norm_before are one norm, and differ")
    down_at, up_at = f"{at}.adapter_down.{0 if before is None else 1}", f"{at}.adapter_up"
    if part.flag("phm_layer"):
        if width > MOST_WIDER * hidden:
            raise options.wrong(
                "reduction_factor", f"widens {hidden} numbers to {width}; expanded are {MOST_WIDER} times"
            )
        down, down_bias = _expanded(member, part, down_at, "down", hidden, width)
        up, up_bias = _expanded(member, part, up_at, "up", width, hidden)
    else:
        down, down_bias = tensors.take(f"{down_at}.weight", (width, hidden)), tensors.take(f"{down_at}.bias", (width,))
        up, up_bias = tensors.take(f"{up_at}.weight", (hidden, width)), tensors.take(f"{up_at}.bias", (hidden,))
    by = _scale(tensors, part, at, hidden)
    if by is not None:
        up = up.float() * by.unsqueeze(1)
        up_bias = None if up_bias is None else up_bias.float() * by
    return Network(down, up, down_bias, up_bias, activation(part.told), before)


def after(tensors: Below, part: Part, at: str, hidden: int) -> OwnNorm | None:
    """The adapter's own norm behind its network."""
    return _norm(tensors, f"{at}.adapter_norm_after", hidden) if part.flag("ln_after") else None


def _norm(tensors: Below, at: str, hidden: int) -> OwnNorm:
    return OwnNorm(tensors.take(f"{at}.weight", (hidden,)), tensors.take(f"{at}.bias", (hidden,)))


def _scale(tensors: Below, part: Part, at: str, hidden: int) -> torch.Tensor | None:
    """[hidden] or [1], fp32; None: 1."""
    told = part.told["scaling"]
    if told == "learned":
        return tensors.number(f"{at}.scaling", 1)
    if told == "channel":
        return tensors.number(f"{at}.scaling", hidden)
    if type(told) is not float:  # the library takes no whole number
        raise options.wrong("scaling", f"is {options.shown(told)}; a float, 'learned' or 'channel' is expected")
    by = options.number(part.told, "scaling", 1.0)
    return None if by == 1 else torch.tensor([by])


def _expanded(
    member: Member, part: Part, at: str, position: str, inputs: int, outputs: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight [outputs, inputs] and bias of one layer."""
    tensors, count = member.tensors, part.integer("phm_dim")
    if inputs % count or outputs % count:
        raise options.wrong("phm_dim", f"is {count}, which does not divide {inputs} and {outputs}")
    rank = part.integer("phm_rank")
    shared = f"shared_parameters.{member.name}"
    rule_at = shared if part.flag("shared_phm_rule") else at
    weight_at, word = (shared, f"W_{position}") if part.flag("shared_W_phm") else (at, "W")
    rule = _factors(
        member, part.flag("factorized_phm_rule"), rule_at, "phm_rule", (count, count, count), 1, rule_at == shared
    )
    shape = (count, inputs // count, outputs // count)
    weight = _factors(member, part.flag("factorized_phm_W"), weight_at, word, shape, rank, weight_at == shared)
    bias = tensors.take(f"{at}.b", (outputs,)) if part.flag("phm_bias") else None
    return expanded(rule, weight), bias


def _factors(
    member: Member, factored: bool, at: str, word: str, shape: tuple[int, int, int], rank: int, shared: bool
) -> torch.Tensor:
    """[n, rows, columns], or the product of left [n, rows, rank] and right [n, rank, columns]."""
    count, rows, columns = shape
    if not factored:
        return _one(member, f"{at}.{word}", shape, shared)
    left = _one(member, f"{at}.{word}_left", (count, rows, rank), shared)
    return joined(left, _one(member, f"{at}.{word}_right", (count, rank, columns), shared))


def _one(member: Member, name: str, shape: tuple[int, ...], shared: bool) -> torch.Tensor:
    return member.shared(name, shape) if shared else member.tensors.number(name, *shape)
