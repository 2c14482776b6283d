"""LoRA, IA³, DoRA, VeRA and MTL-LoRA as AdapterHub writes them, one or several: one change of each linear's output."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from deltaserve.deltas.adapters import Bottleneck, Gate, Tap
from deltaserve.deltas.primitives import Affine, LowRank
from deltaserve.deltas.sites import Site, SiteType, Weights
from deltaserve.errors import BadCheckpoint, FailedPrecondition
from deltaserve.formats import options
from deltaserve.formats.adapterhub.bottlenecks import gate
from deltaserve.formats.adapterhub.composition import Average, Block, Fuse, Stack
from deltaserve.formats.adapterhub.configs import Part
from deltaserve.formats.adapterhub.member import Member
from deltaserve.formats.draft import Draft
from deltaserve.formats.options import shown

_MATRICES = "qkv"


@dataclass(frozen=True, eq=False)
class Change:
    """y = base + scale · x Aᵀ Dᵀ Bᵀ, D = `inner` [r], [r, r] or None; B times `outer` [out]; or y = base ⊙ `by`.

    With a `gate` the change is times it instead of `scale`. `magnitude` [out]: all of y is times that over ‖W + B A‖,
    by the pair `normed` if there is one.
    `whole`: the linear makes queries, keys and values at once. `apart`: one gate for each of these [(A, B, Gate), ...].
    """

    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    scale: float = 1.0
    inner: torch.Tensor | None = None
    outer: torch.Tensor | None = None
    by: torch.Tensor | None = None
    gate: Gate | None = None
    magnitude: torch.Tensor | None = None
    normed: tuple[torch.Tensor, torch.Tensor] | None = None
    whole: bool = False
    apart: tuple[tuple[torch.Tensor, torch.Tensor, Gate], ...] = field(default=())

    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A [r, in] and B [out, r] fp32, without the scale."""
        assert self.a is not None and self.b is not None
        a, b = self.a.float(), self.b.float()
        if self.inner is not None:
            a = self.inner.float() @ a if self.inner.ndim == 2 else self.inner.float().unsqueeze(1) * a
        return a, b if self.outer is None else b * self.outer.float().unsqueeze(1)


def lower(members: Sequence[Member], block: Block, draft: Draft, weights: Weights) -> None:
    """What is at each linear. A part's tensors say where it is; where its config says so, they must be."""
    if not any(member.of("lora") for member in members):
        return
    for site in next(iter(members)).places.linears():
        changes = {m.name: change for m in members if (change := _change(m, site, draft)) is not None}
        if changes:
            _put(_composed(block, changes, site), site, draft, weights)


def _change(member: Member, site: Site, draft: Draft) -> Change | None:
    places = member.places
    at = f"{places.below(site.name)}.loras.{member.name}"
    layer, location = places.layer(site.name), places.location(site)
    assert layer is not None
    found = [part for part in member.of("lora") if part.acts(layer)]
    meant = [part for part in found if _means(part, location)]
    if not meant:
        # A name says where a part is, whatever the config calls that place.
        meant = found if member.tensors.below(at) else []
    part = member.part(meant, at)
    if part is None:
        return None
    merged = location == "selfattn.merged"
    if merged and site.out_features % len(_MATRICES):
        raise BadCheckpoint(f"{site.name!r} gives {site.out_features} numbers, which have no thirds")
    mode = options.choice(part.told, "composition_mode", ("add", "scale"))
    if mode == "scale":
        draft.kind("ia3")
        return _scaled(member, part, site, at, merged)
    return _merged(member, part, site, at, draft) if merged else _added(member, part, site, at, draft)


def _means(part: Part, location: str | None) -> bool:
    if location is None:
        return False
    what, _, matrix = location.partition(".")
    if not part.flag(f"{what}_lora"):
        return False
    if what != "selfattn":
        return True
    matrices = options.listed(part.told, "attn_matrices")
    return bool(set(matrices) & set(_MATRICES)) if matrix == "merged" else matrix in matrices


def _thirds(part: Part) -> list[int]:
    """Which of a merged linear's thirds a part is for, in their order."""
    matrices = options.listed(part.told, "attn_matrices")
    return [at for at, matrix in enumerate(_MATRICES) if matrix in matrices]


def _scaled(member: Member, part: Part, site: Site, at: str, merged: bool) -> Change:
    """IA³ (arXiv 2205.05638): y = base ⊙ (alpha · lora_B), the bias included."""
    if part.gated:
        raise options.not_served("use_gating", True, "a gate on a vector that outputs are multiplied by is not served")
    if part.told["r"] != 1:
        raise options.wrong("r", f"is {shown(part.told['r'])}; with composition_mode 'scale' it is 1")
    alpha = part.number("alpha")
    if not merged:
        return Change(by=alpha * member.tensors.number(f"{at}.lora_B", site.out_features, 1).flatten())
    third, here = site.out_features // 3, _thirds(part)
    given = member.tensors.number(f"{at}.lora_B", third * len(here), 1).flatten()
    by = torch.ones(site.out_features)
    for j, which in enumerate(here):
        by[which * third : (which + 1) * third] = given[j * third : (j + 1) * third]
    return Change(by=alpha * by, whole=True)


def _added(member: Member, part: Part, site: Site, at: str, draft: Draft) -> Change:
    tensors, rank = member.tensors, part.integer("r")
    inputs, outputs = site.in_features, site.out_features
    scale = part.number("alpha") / rank
    vera = type(part.told["vera_d"]) is float or type(part.told["vera_b"]) is float
    if part.architecture == "mtl_lora":
        draft.kind("mtl-lora")
        made = _of_tasks(member, part, site, at, rank)
    elif vera:
        draft.kind("vera")
        made = _shared(member, site, at, rank, draft)
    else:
        draft.kind("lora")
        made = Change(tensors.take(f"{at}.lora_A", (rank, inputs)), tensors.take(f"{at}.lora_B", (outputs, rank)))
    made = replace(made, scale=scale)
    if part.flag("use_dora"):
        if site.type is SiteType.CONV1D:
            raise options.not_served("use_dora", True, f"the library cannot take the norm at {site.name!r}, a Conv1D")
        draft.kind("dora")
        made = replace(made, magnitude=tensors.number(f"{at}.m.weight", outputs, 1).flatten())
    return replace(made, gate=gate(member, at, inputs), scale=1.0) if part.gated else made


def _shared(member: Member, site: Site, at: str, rank: int, draft: Draft) -> Change:
    """VeRA (arXiv 2310.11454): ΔW = V_B B V_D A; B and A are for all; V_B [out, out], V_D [r, r] mostly diagonal."""
    tensors, start = member.tensors, f"shared_parameters.{member.name}"
    a = draft.base(member.shared(f"{start}.lora_A", (rank, site.in_features)))
    b = member.shared(f"{start}.lora_B", (site.out_features, rank))
    inner = tensors.take(f"{at}.vera_D", (rank, rank))
    outer = tensors.take(f"{at}.vera_B", (site.out_features, site.out_features))
    slim = inner.diagonal().contiguous() if _diagonal(inner) else inner
    if _diagonal(outer):
        return Change(a, draft.base(b), inner=slim, outer=outer.diagonal().contiguous())
    return Change(a, outer.float() @ b, inner=slim)


def _diagonal(matrix: torch.Tensor) -> bool:
    return not bool((matrix - matrix.diagonal().diag()).any())


def _of_tasks(member: Member, part: Part, site: Site, at: str, rank: int) -> Change:
    """MTL-LoRA (arXiv 2410.09437): ΔW = Σ_i w_i B_i diag(λ) A, w = softmax(weights / sharpness)."""
    tensors, count = member.tensors, part.integer("n_up_projection", most=256)
    if part.told["task_specific_matrix_type"] != "singular_values":
        kind = part.told["task_specific_matrix_type"]
        raise options.not_served("task_specific_matrix_type", kind, "the library can make singular_values alone")
    sharpness = part.number("weights_sharpness")
    if sharpness == 0:
        raise options.wrong("weights_sharpness", "is 0, and weights are divided by it")
    a = tensors.take(f"{at}.lora_A", (rank, site.in_features))
    b = tensors.number(f"{at}.lora_B", count, site.out_features, rank)
    shares = (tensors.number(f"{at}.weights", count) / sharpness).softmax(0)
    inner = tensors.take(f"{at}.task_specific.values", (rank,))
    return Change(a, torch.einsum("i,ior->or", shares, b), inner=inner)


def _merged(member: Member, part: Part, site: Site, at: str, draft: Draft) -> Change:
    """LoRA at a linear that makes queries, keys and values at once: each third has an A and a B of its own."""
    vera = type(part.told["vera_d"]) is float or type(part.told["vera_b"]) is float
    for key, wrong in (("use_dora", part.flag("use_dora")), ("vera_d", vera)):
        if wrong:
            raise options.not_served(key, part.told[key], f"the library cannot do it at the merged {site.name!r}")
    if part.architecture == "mtl_lora":
        raise options.not_served("architecture", "mtl_lora", f"the library cannot do it at the merged {site.name!r}")
    draft.kind("lora")
    rank, here, third = part.integer("r"), _thirds(part), site.out_features // 3
    a = member.tensors.take(f"{at}.lora_A", (rank * len(here), site.in_features))
    b = member.tensors.take(f"{at}.lora_B", (third * len(here), rank))
    spread = torch.zeros(site.out_features, rank * len(here), dtype=b.dtype)
    for j, which in enumerate(here):
        spread[which * third : (which + 1) * third, j * rank : (j + 1) * rank] = b[j * third : (j + 1) * third]
    if not part.gated:
        return Change(a, spread, part.number("alpha") / rank, whole=True)
    gates = gate(member, at, site.in_features, len(here))
    assert gates.bias is not None
    apart = []
    for j in range(len(here)):
        one = slice(j * rank, (j + 1) * rank)
        own = Gate(gates.weight[j : j + 1].contiguous(), gates.bias[j : j + 1].contiguous())
        apart.append((a[one].contiguous(), spread[:, one].contiguous(), own))
    return Change(whole=True, apart=tuple(apart))


def _composed(block: Block, changes: dict[str, Change], site: Site) -> Change:
    match block:
        case Stack(children):
            present = [child for child in children if any(name in changes for name in child.names())]
            made = [_composed(child, changes, site) for child in present]
            return made[0] if len(made) == 1 else _product(made, site)
        case Fuse():
            raise FailedPrecondition(
                f"the setup fuses LoRA at {site.name!r}; the library fuses bottleneck adapters alone",
                reason="KIND_NOT_SERVED",
                metadata={"type": "Fuse"},
            )
        case Average(weights=weights):
            names = block.names()
            found = [(weights[at], changes[name]) for at, name in enumerate(names) if name in changes]
            return _mean([change for _, change in found], [weight / len(found) for weight, _ in found], site)
        case _:
            return changes[block.names()[0]]


def _alike(changes: list[Change], word: str, site: Site) -> bool:
    """Whether all multiply outputs; else all add to them. Raises FailedPrecondition for what has no order."""
    for change in changes:
        what = "a merged linear" if change.whole else "a gate" if change.gate is not None else None
        if what is not None:
            raise FailedPrecondition(
                f"{word} of LoRA at {site.name!r} has {what}: the library or this release cannot do that",
                reason="OPTION_NOT_SERVED",
                metadata={"type": word},
            )
    multiply = {change.by is not None for change in changes}
    if len(multiply) > 1:
        raise FailedPrecondition(
            f"{word} of LoRA and IA3 at {site.name!r} is not served",
            reason="OPTION_NOT_SERVED",
            metadata={"type": word},
        )
    return multiply.pop()


def _product(changes: list[Change], site: Site) -> Change:
    """What the library makes of a Stack: base + s_b B_b A_b (s_a B_a A_a x), the last one's magnitude."""
    by = changes[0].by
    if _alike(changes, "Stack", site):
        for change in changes[1:]:
            assert by is not None and change.by is not None
            by = by * change.by
        return Change(by=by)
    if site.in_features != site.out_features:
        raise BadCheckpoint(
            f"the setup stacks LoRA at {site.name!r}, from {site.in_features} numbers to {site.out_features}: what the "
            "first gives does not fit the second, and the library cannot run it"
        )
    a, b = changes[0].pair()
    scale = changes[0].scale
    for change in changes[1:]:
        next_a, next_b = change.pair()
        b, scale = next_b @ (next_a @ b), scale * change.scale
    return _ended(Change(a, b, scale), changes[-1])


def _mean(changes: list[Change], shares: list[float], site: Site) -> Change:
    """base + (1/N) Σ w_k s_k B_k A_k x; `shares` are w_k / N."""
    if _alike(changes, "Average", site):
        vectors = [change.by * share for change, share in zip(changes, shares, strict=True) if change.by is not None]
        return Change(by=torch.stack(vectors).sum(0))
    pairs = [change.pair() for change in changes]
    a = torch.cat([a for a, _ in pairs])
    b = torch.cat([b * (s * c.scale) for (_, b), c, s in zip(pairs, changes, shares, strict=True)], 1)
    return _ended(Change(a, b), changes[-1])


def _ended(change: Change, last: Change) -> Change:
    """The last of several decides whether there is a magnitude, and its own pair makes the norm."""
    if last.magnitude is None:
        return change
    return replace(change, magnitude=last.magnitude, normed=last.pair())


def _put(change: Change, site: Site, draft: Draft, weights: Weights) -> None:
    if change.by is not None:
        draft.put(site.name, Affine(scale=change.by))
        return
    for a, b, own in change.apart:
        draft.put(site.name, Bottleneck(a, b, input=Tap.OWN, carry=Tap.OUTPUT, gate=own))
    if change.apart:
        return
    assert change.a is not None and change.b is not None
    gain = None
    if change.magnitude is not None:
        a, b = change.normed or change.pair()
        gain = change.magnitude / (weights(site.name) + b @ a).norm(dim=1)
        draft.put(site.name, Affine(scale=gain))
    if change.gate is None:
        draft.put(site.name, LowRank(change.a, change.b, change.scale, change.inner, change.outer))
        return
    a, b = change.pair()
    if gain is not None:  # it comes after what the gain was for
        b = b * gain.unsqueeze(1)
    draft.put(site.name, Bottleneck(a, b, input=Tap.OWN, carry=Tap.OUTPUT, gate=change.gate))
