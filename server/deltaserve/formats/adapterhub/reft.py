"""ReFT (arXiv 2404.03592): a low-rank edit of what a layer gives, at the first and the last rows of a sequence."""

from collections.abc import Sequence

import torch

from deltaserve.deltas.adapters import Bottleneck, Positions, Reach, Tap
from deltaserve.deltas.sites import Sublayer
from deltaserve.errors import BadCheckpoint, FailedPrecondition
from deltaserve.formats import options
from deltaserve.formats.adapterhub.composition import Block, first
from deltaserve.formats.adapterhub.configs import Part, activation
from deltaserve.formats.adapterhub.member import Member
from deltaserve.formats.adapterhub.places import layer_of
from deltaserve.formats.draft import Draft
from deltaserve.formats.options import shown

MOST_POSITIONS = 1 << 16
_MIRRORED = {"relu": 1.0, "leaky_relu": 1.01, "gelu": 1.0, "gelu_tanh": 1.0, "quick_gelu": 1.0, "silu": 1.0}
"""f with f(x) − f(−x) = c x, and c: what passes a number unchanged beside f."""


def lower(members: Sequence[Member], block: Block, draft: Draft) -> None:
    """x′ = x + Rᵀ (f(W x + b) − R x), with R and W [r, d], after each layer. Of several adapters the library uses the
    first alone."""
    for member in members:
        for part in member.of("reft"):
            if member.name == first(block):
                _lower(member, part, draft)
            else:
                _leave_out(member)


def _leave_out(member: Member) -> None:
    for name in member.tensors.names():
        if f".refts.{member.name}." in name:
            member.tensors.drop(name)
    member.tensors.warn(f"the library runs no ReFT but the first adapter's: that of {shown(member.name)} is left out")


def _lower(member: Member, part: Part, draft: Draft) -> None:
    draft.kind("reft")
    spec = member.places.spec
    ahead, behind = (_count(part, key) for key in ("prefix_positions", "suffix_positions"))
    if not ahead + behind:
        raise options.wrong("prefix_positions", "and suffix_positions are 0: it edits nothing")
    if behind and "generate" in spec.tasks:
        raise options.not_served(
            "suffix_positions",
            behind,
            "the last tokens are others after each new one, which no cache of keys and values can follow; served are "
            "first positions alone, and both on encoders",
        )
    if not part.flag("orthogonality"):
        member.tensors.warn(
            "the library saves DiReFT and NoReFT alike, and runs both as NoReFT, and so does this server: "
            "trained as DiReFT, it does not do what it did in training"
        )
    layers = part.told["layers"]
    wanted = None if layers == "all" else set(options.indices(part.told, "layers") or ())
    if wanted is not None and not all(0 <= layer < member.places.layers for layer in wanted):
        raise BadCheckpoint(f"config key 'layers' is {shown(layers)}; this backbone has {member.places.layers} layers")
    ends = member.places.ends()
    if not ends:
        raise FailedPrecondition(
            f"where the layers of {spec.family} end is not known to this release: ReFT is not served there",
            reason="KIND_NOT_SERVED",
        )
    for sublayer in ends:
        if wanted is None or sublayer.layer in wanted:
            _layer(member, part, sublayer, (ahead, behind), draft)


def _count(part: Part, key: str) -> int:
    return 0 if part.told[key] == 0 else part.integer(key, MOST_POSITIONS)


def _layer(member: Member, part: Part, sublayer: Sublayer, counts: tuple[int, int], draft: Draft) -> None:
    places = member.places
    at = f"{places.below(layer_of(sublayer.last))}.reft_layer.refts.{member.name}.units"
    tied = part.flag("tied_weights")
    reaches = (Reach.BOTH,) if tied else (Reach.FIRST, Reach.LAST)
    for unit, reach in enumerate(reaches):
        made = _unit(member, part, f"{at}.{unit}", sublayer, Positions(*counts, reach))
        if reach is Reach.BOTH or counts[unit]:
            draft.put(sublayer.norm if sublayer.post else sublayer.sandwich or sublayer.last, made)


def _unit(member: Member, part: Part, at: str, sublayer: Sublayer, positions: Positions) -> Bottleneck:
    tensors, hidden, rank = member.tensors, member.places.spec.hidden_size, part.integer("r")
    source = tensors.number(f"{at}.learned_source.weight", rank, hidden)
    bias = tensors.number(f"{at}.learned_source.bias", rank)
    onto = _projection(member, part, f"{at}.projection", rank, hidden)
    f = activation(part.told)
    down, shift, up = source, bias, onto.T
    if part.flag("subtract_projection"):
        if f is None:
            down = source - onto
        elif f in _MIRRORED:
            # R x passes through f beside W x: f(R x) − f(−R x) = c R x.
            down = torch.cat((source, onto, -onto))
            shift = torch.cat((bias, torch.zeros(2 * rank)))
            up = torch.cat((onto.T, -onto.T / _MIRRORED[f], onto.T / _MIRRORED[f]), 1)
        else:
            why = f"with a projection that is taken away this release serves null and {', '.join(_MIRRORED)}"
            raise options.not_served("non_linearity", part.told["non_linearity"], why)
    return Bottleneck(
        down.contiguous(), up.contiguous(), shift, None, f,
        # Where no norm stands behind, the layer gives h + r, and what is added to h is added to that.
        input=Tap.OUTPUT if sublayer.post else Tap.SUM,
        carry=Tap.OUTPUT,
        positions=positions,
    )  # fmt: skip


def _projection(member: Member, part: Part, at: str, rank: int, hidden: int) -> torch.Tensor:
    """R [r, d] fp32. An orthogonal one is of Householder vectors (square: of an exponent) and a base."""
    if not part.flag("orthogonality"):
        return member.tensors.number(f"{at}.weight", rank, hidden)
    if rank > hidden:
        raise options.wrong("r", f"is {rank}; an orthogonal projection of {hidden} numbers has at most as many rows")
    inner = f"{at}.parametrizations.weight"
    x = member.tensors.number(f"{inner}.original", rank, hidden)
    base = member.tensors.number(f"{inner}.0.base", hidden, hidden)
    if rank == hidden:
        lower = x.tril()
        return base @ torch.matrix_exp(lower - lower.T)
    vectors = x.T.tril(-1)
    turned = torch.linalg.householder_product(vectors, 2 / (1 + vectors.square().sum(0)))
    onto: torch.Tensor = base @ (turned * x.T.diagonal().int())
    return onto.T
