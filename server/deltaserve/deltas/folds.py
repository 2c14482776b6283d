"""How primitives of one kind at one site become one: what several deltas do there, as one delta does it.

The order of a site's steps is fixed (see `primitives`), whichever member brought them; what is folded here is one step.
With members 1 … n in the order in which a request names them:

    Block       x′ = x R_1 ⋯ R_n, and so on the output side
    Affine      in_scale = Π s_k; y ↦ (⋯(y ⊙ scale_1 + shift_1)⋯) ⊙ scale_n + shift_n
    LowRank     y += Σ_k scale_k · outer_k ⊙ (u A_kᵀ D_k B_kᵀ): ranks stand side by side
    Dense       y += u (Σ ΔW_k)ᵀ + Σ Δb_k; one member may replace W, and the others are added to what it brings
    Sparse      y += Σ u S_kᵀ
    Rows        all of them, where no two are for one id
    Prefix      attention reads K_1, …, K_n, then the tokens
    adapters    in turn, each on what the one before gave

Sums and products are fp32; parts that only one member has keep their dtype and their bytes.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from itertools import pairwise
from typing import TypeAlias, TypeVar

import torch

from deltaserve.deltas.adapters import Bottleneck, Fusion
from deltaserve.deltas.primitives import Affine, Block, Dense, LowRank, Prefix, Rows, SitePrimitive, Sparse
from deltaserve.errors import FailedPrecondition

P = TypeVar("P")

Named: TypeAlias = Sequence[tuple[str, P]]
"""Parts with their members' labels, in the request's order."""


def folded(site: str, parts: "Named[SitePrimitive]") -> tuple[SitePrimitive, ...]:
    """What all members do at a site. Raises FailedPrecondition that names two of them and the site."""
    steps: dict[str, list[tuple[str, SitePrimitive]]] = {}
    for label, part in parts:
        steps.setdefault(_step(part), []).append((label, part))
    done: list[SitePrimitive] = []
    for step, same in steps.items():
        if len(same) == 1:
            done.append(same[0][1])
        elif step not in _FOLDS:
            raise clash(f"at {site}", same, f"both have a {step} there, and two of those do not become one")
        else:
            done.extend(_FOLDS[step](site, same))
    return tuple(done)


def clash(where: str, parts: "Named[object]", why: str) -> FailedPrecondition:
    """The first two of `parts` do not go together `where`, because of `why`."""
    first, second = parts[0][0], parts[1][0]
    return FailedPrecondition(
        f"{first} and {second} cannot answer one request: {where} {why}; name one of the two",
        reason="DELTAS_DO_NOT_COMBINE",
        field="deltas",
        metadata={"first": first, "second": second, "where": where},
    )


def _step(part: SitePrimitive) -> str:
    """The step of a site that a primitive belongs to."""
    match part:
        case Block(outputs=outputs):
            return "Block of outputs" if outputs else "Block of inputs"
        case Affine(replace=True):
            return "replacement of the norm"
        case Bottleneck() | Fusion():
            return "adapter"
    return type(part).__name__


def _low_ranks(site: str, parts: Named[LowRank]) -> tuple[LowRank, ...]:
    every = [part for _, part in parts]
    first = every[0]
    a = torch.cat([part.a for part in every])
    if all(part.scale == first.scale and part.inner is None and part.outer is None for part in every):
        return (LowRank(a, torch.cat([part.b for part in every], 1), first.scale),)
    return (LowRank(a, torch.cat([_whole_b(part) for part in every], 1), 1.0),)


def _whole_b(part: LowRank) -> torch.Tensor:
    """fp32 scale · diag(outer) B Dᵀ, [out, r]."""
    b = part.b.float()
    if part.inner is not None:
        inner = part.inner.float()
        b = b * inner if inner.ndim == 1 else b @ inner
    if part.outer is not None:
        b = b * part.outer.float().unsqueeze(1)
    return b * part.scale


def _affines(site: str, parts: Named[Affine]) -> tuple[Affine, ...]:
    return (reduce(_after, (part for _, part in parts)),)


def _after(first: Affine, then: Affine) -> Affine:
    """(y ⊙ scale + shift) ⊙ scale′ + shift′."""
    shift = first.shift if first.shift is None or then.scale is None else first.shift.float() * then.scale.float()
    return Affine(_times(first.in_scale, then.in_scale), _times(first.scale, then.scale), _plus(shift, then.shift))


def _norms(site: str, parts: Named[Affine]) -> tuple[Affine, ...]:
    """One member may bring the norm's weight and another its bias."""
    made = {}
    for name in ("scale", "shift"):
        brings = [(label, getattr(part, name)) for label, part in parts if getattr(part, name) is not None]
        if len(brings) > 1:
            what = "weight" if name == "scale" else "bias"
            raise clash(f"at {site}", brings, f"both replace the norm's {what}")
        made[name] = brings[0][1] if brings else None
    return (Affine(scale=made["scale"], shift=made["shift"], replace=True),)


def _blocks(site: str, parts: Named[Block]) -> tuple[Block, ...]:
    for other in parts[1:]:
        if other[1].blocks.shape != parts[0][1].blocks.shape:
            shapes = f"{list(parts[0][1].blocks.shape)} and {list(other[1].blocks.shape)}"
            why = f"they turn blocks of unlike shapes, {shapes}, whose product is in no such blocks"
            raise clash(f"at {site}", [parts[0], other], why)
    spaced = [part.blocks.float() if part.blocks.ndim == 4 else part.blocks.float().unsqueeze(-1) for _, part in parts]
    product = reduce(lambda one, then: torch.einsum("mijs,mjks->miks", one, then), spaced)
    return (Block(product.reshape(parts[0][1].blocks.shape).contiguous(), parts[0][1].outputs),)


def _denses(site: str, parts: Named[Dense]) -> tuple[Dense, ...]:
    whole = [each for each in parts if each[1].replace]
    if len(whole) > 1:
        raise clash(f"at {site}", whole, "both replace the whole weight")
    weight = reduce(torch.add, (part.weight.float() for _, part in parts))
    return (Dense(weight, reduce(_plus, (part.bias for _, part in parts)), bool(whole)),)


def _sparses(site: str, parts: Named[Sparse]) -> tuple[Sparse, ...]:
    index = torch.cat([part.index for _, part in parts], 1)
    order = index[0].argsort(stable=True)
    return (Sparse(index[:, order].contiguous(), torch.cat([part.values for _, part in parts])[order]),)


def _rows(site: str, parts: Named[Rows]) -> tuple[Rows, ...]:
    for number, (label, part) in enumerate(parts):
        for other, before in parts[:number]:
            both = part.index[torch.isin(part.index, before.index)]
            if both.numel():
                why = f"both replace the row of token {int(both[0])}"
                raise clash(f"at {site}", [(other, before), (label, part)], why)
    index, order = torch.cat([part.index for _, part in parts]).sort()
    return (Rows(index, torch.cat([part.values for _, part in parts])[order]),)


def _prefixes(site: str, parts: Named[Prefix]) -> tuple[Prefix, ...]:
    """Positions of prefix rows and tokens move by the rows of all members, where each moves them by its own."""
    for other in parts[1:]:
        first, then = parts[0][1], other[1]
        m, n = first.keys.shape[0], then.keys.shape[0]
        if first.biased is not then.biased or first.pre * n != then.pre * m or first.tok * n != then.tok * m:
            why = "their libraries count the relative positions of prefixes and tokens by other rules"
            raise clash(f"at {site}", [parts[0], other], why)
    for each in parts:
        if each[1].gate is not None:
            beside = next(other for other in parts if other is not each)
            raise clash(f"at {site}", [each, beside], f"a gate of {each[0]} would multiply the prefix of both")
    every = [part for _, part in parts]
    return (
        Prefix(
            torch.cat([part.keys for part in every]),
            torch.cat([part.values for part in every]),
            sum(part.pre for part in every),
            sum(part.tok for part in every),
            every[0].biased,
        ),
    )


def _adapters(site: str, parts: Named[Bottleneck | Fusion]) -> tuple[Bottleneck | Fusion, ...]:
    for each, then in pairwise(parts):
        if each[1].replaces and each[0] != then[0]:
            why = f"the adapter of {each[0]} takes the place of the whole stream, and nothing can follow it"
            raise clash(f"at {site}", [each, then], why)
    return tuple(part for _, part in parts)


def _times(one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one.float() * other.float()


def _plus(one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one.float() + other.float()


_FOLDS: Mapping[str, Callable[..., tuple[SitePrimitive, ...]]] = {
    "LowRank": _low_ranks,
    "Affine": _affines,
    "replacement of the norm": _norms,
    "Block of inputs": _blocks,
    "Block of outputs": _blocks,
    "Dense": _denses,
    "Sparse": _sparses,
    "Rows": _rows,
    "Prefix": _prefixes,
    "adapter": _adapters,
}
