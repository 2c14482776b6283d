"""Bottleneck adapters: at the ends of sublayers, in a row or beside, with the library's options, one or several."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deltaserve.deltas.adapters import Adapter, Bottleneck, Fusion, Gate, OwnNorm, Tap
from deltaserve.errors import BadCheckpoint, FailedPrecondition
from deltaserve.formats import options
from deltaserve.formats.adapterhub.composition import Average, Block, Fuse, Stack
from deltaserve.formats.adapterhub.configs import Part
from deltaserve.formats.adapterhub.fusing import Fusing
from deltaserve.formats.adapterhub.member import Member
from deltaserve.formats.adapterhub.network import Network, after, network
from deltaserve.formats.adapterhub.places import KEYS, Place
from deltaserve.formats.draft import Draft
from deltaserve.formats.options import shown


@dataclass(frozen=True, eq=False)
class Step:
    """One adapter at one place. x is what its network gets, q what is added to what the network gives.

    In a row (AdapterHub's pre-step): x = LN(h + r), h + r or h; q = h, h + r, x. Beside: x = r, no q, and h is added
    at the end. `closes`: the model's own residual, and norm behind it, follow.
    """

    network: Network
    parallel: bool
    x: Tap
    q: Tap | None
    norm: str | None
    gate: Gate | None
    after: OwnNorm | None
    inside: bool
    closes: bool


def lower(members: Sequence[Member], block: Block, fusings: Sequence[Fusing], draft: Draft) -> None:
    """What stands at each end of a sublayer, in the order in which it acts."""
    if not any(member.of(None) for member in members) and not fusings:
        return
    for member in members:
        _check_keys(member)
    for place in next(iter(members)).places.bottlenecks():
        steps = {member.name: step for member in members if (step := _step(member, place)) is not None}
        if not steps:
            continue
        made = _composed(block, steps, place, fusings)
        for adapter in made:
            draft.put(place.sublayer.last, adapter)
    _kinds(members, fusings, draft)


def _kinds(members: Sequence[Member], fusings: Sequence[Fusing], draft: Draft) -> None:
    if fusings:
        draft.kind("adapter-fusion")
    for member in members:
        for part in member.of(None):
            compact = part.flag("phm_layer")
            draft.kind("compacter" if compact else "parallel-adapter" if part.flag("is_parallel") else "adapter")


def _check_keys(member: Member) -> None:
    """A config that names a sublayer must find one. Raises FailedPrecondition."""
    keys = {place.key for place in member.places.bottlenecks()}
    for part in member.of(None):
        if not keys:
            raise FailedPrecondition(
                f"its layers of {member.places.spec.family} do not end in one sublayer after the other: bottleneck "
                "adapters are not served there",
                reason="KIND_NOT_SERVED",
            )
        if not any(part.flag(key) for key in KEYS.values()):
            raise BadCheckpoint(f"the config of {shown(member.name)} has its adapters at no sublayer")


def _step(member: Member, place: Place) -> Step | None:
    """The adapter that its config has here; takes its tensors."""
    layer = place.sublayer.layer
    found = [part for part in member.of(None) if part.flag(place.key) and part.acts(layer)]
    part = member.part(found, place.module)
    if part is None:
        return None
    hidden = member.places.spec.hidden_size
    at = f"{place.module}.adapters.{member.name}"
    parallel = part.flag("is_parallel")
    closes = _closes(part, place)
    x, q = _beside(place) if parallel else _in_a_row(part, place)
    return Step(
        network=network(member, part, at, layer, hidden),
        parallel=parallel,
        x=x,
        q=q,
        norm=place.norm if place.other and Tap.NORMED in (x, q) else None,
        gate=_gate(member, part, at, hidden),
        after=after(member.tensors, part, at, hidden),
        inside=part.flag("adapter_residual_before_ln") and not parallel,
        closes=closes,
    )


def _beside(place: Place) -> tuple[Tap, None]:
    if place.residual is None:
        raise _not_here(place, "is_parallel", True, "its interface names nothing that stands before the sublayer")
    return place.residual, None


def _in_a_row(part: Part, place: Place) -> tuple[Tap, Tap]:
    x = Tap.OUTPUT
    if part.flag("original_ln_before"):
        if place.residual is Tap.INPUT:
            raise _not_here(
                place, "original_ln_before", True,
                "the library adds what the sublayer got, behind its norm, to what it gives: no stream of this model",
            )  # fmt: skip
        if place.residual is not None:
            x = Tap.SUM if place.norm is None else Tap.NORMED
    told = part.told["residual_before_ln"]
    if told is True:
        return x, Tap.OUTPUT
    if told == "post_add":
        if x is not Tap.NORMED:
            raise _not_here(place, "residual_before_ln", told, "the library raises where no norm stands behind h + r")
        return x, Tap.SUM
    if told not in (False, None):
        raise options.wrong("residual_before_ln", f"is {shown(told)}; true, false or 'post_add' is expected")
    return x, x


def _closes(part: Part, place: Place) -> bool:
    closes = part.flag("original_ln_after")
    if not closes and place.hooked:
        raise _not_here(place, "original_ln_after", False, "the library cannot take the model's own residual away here")
    return closes


def _gate(member: Member, part: Part, at: str, hidden: int) -> Gate | None:
    if not part.gated:
        return None
    return gate(member, at, hidden)


def gate(member: Member, at: str, width: int, numbers: int = 1, own: str = ".gate") -> Gate:
    """A gate's tensors, below `at` and the word `own`."""
    weight = member.tensors.take(f"{at}{own}.weight", (numbers, width))
    return Gate(weight, member.tensors.take(f"{at}{own}.bias", (numbers,)))


def _not_here(place: Place, key: str, value: object, why: str) -> FailedPrecondition:
    return options.not_served(key, value, f"{why} ({place.module[:200]})")


def _composed(block: Block, steps: dict[str, Step], place: Place, fusings: Sequence[Fusing]) -> list[Adapter]:
    """The chain of a place: each acts on what the one before gave, and only the last one's end counts."""
    match block:
        case Stack(children):
            chain: list[Adapter] = []
            present = [child for child in children if any(name in steps for name in child.names())]
            for n, child in enumerate(present):
                last = n == len(present) - 1
                made, anew = _block(child, steps, place, fusings, last)
                # A parallel adapter at the end is added to the h of before them all.
                chain = [*(() if anew else chain), made]
            return chain
        case _:
            return [_block(block, steps, place, fusings, True)[0]]


def _block(
    block: Block, steps: dict[str, Step], place: Place, fusings: Sequence[Fusing], last: bool
) -> tuple[Adapter, bool]:
    """A block, and whether it starts anew from the site's own output."""
    names = [name for name in block.names() if name in steps]
    match block:
        case Fuse():
            return _fused(block, steps, place, fusings, last)
        case Average(weights=weights):
            chosen = [weights[at] for at, name in enumerate(block.names()) if name in steps]
            return _averaged([steps[name] for name in names], chosen, place, last)
        case _:
            step = steps[names[0]]
            return _alone(step, last), last and step.parallel


def _alone(step: Step, last: bool) -> Bottleneck:
    net = step.network
    return Bottleneck(
        net.down, net.up, net.down_bias, net.up_bias, net.activation,
        input=step.x,
        carry=(Tap.OUTPUT if last else None) if step.parallel else step.q,
        carry_inside=step.inside,
        before=net.before, after=step.after, gate=step.gate,
        replaces=last and not step.closes,
        norm=step.norm,
    )  # fmt: skip


def _averaged(steps: list[Step], weights: list[float], place: Place, last: bool) -> tuple[Adapter, bool]:
    """(1/N) Σ_k w_k (z_k + q): all on the first one's x and q, with the last one's end."""
    first, ending = steps[0], steps[-1]
    for step in steps:
        if step.after is not None or step.gate is not None:
            key = "ln_after" if step.after is not None else "use_gating"
            raise options.not_served(key, True, f"it is not served within an Average ({place.module[:200]})")
    if any(step.parallel for step in steps) and not all(step.parallel for step in steps):
        raise options.not_served("is_parallel", True, "an Average of adapters in a row and beside is not served")
    shares = [weight / len(steps) for weight in weights]
    total = sum(shares)
    q, by = (first.q, total) if not first.parallel else (Tap.OUTPUT if last else None, 1.0)
    nets = [step.network for step in steps]
    parts = [_times(net, share) for net, share in zip(nets, shares, strict=True)]
    replaces = last and not ending.closes
    anew = last and first.parallel
    if all(net.before is None and net.activation == nets[0].activation for net in nets):
        # Side by side they are one.
        downs = [_with_bias(net.down, net.down_bias) for net in parts]
        ups = [net.up_bias for net in parts if net.up_bias is not None]
        down = torch.cat([weight for weight, _ in downs])
        one = Bottleneck(
            down, torch.cat([net.up.float() for net in parts], 1), torch.cat([bias for _, bias in downs]),
            torch.stack([bias.float() for bias in ups]).sum(0) if ups else None, nets[0].activation,
            input=first.x, carry=q, carry_scale=by, replaces=replaces, norm=first.norm,
        )  # fmt: skip
        return one, anew
    # A query of zeros finds all alike: p = 1 / N.
    width = parts[0].up.shape[0]
    members = tuple(_member(_times(net, float(len(nets))), first.x) for net in parts)
    zeros = torch.zeros(width, width)
    fused = Fusion(
        members, query=zeros, query_tap=Tap.OUTPUT, carry=q, carry_scale=by, replaces=replaces, norm=first.norm
    )
    return fused, anew


def _with_bias(weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    return weight.float(), torch.zeros(weight.shape[0]) if bias is None else bias.float()


def _times(net: Network, by: float) -> Network:
    return dataclasses.replace(
        net, up=net.up.float() * by, up_bias=None if net.up_bias is None else net.up_bias.float() * by
    )


def _member(net: Network, x: Tap) -> Bottleneck:
    return Bottleneck(
        net.down, net.up, net.down_bias, net.up_bias, net.activation, input=x, carry=None, before=net.before
    )


def _fused(
    block: Fuse, steps: dict[str, Step], place: Place, fusings: Sequence[Fusing], last: bool
) -> tuple[Adapter, bool]:
    """AdapterFusion: the last member's x, q and end; of the others nothing but their networks."""
    names = block.names()
    fusing = next((one for one in fusings if one.members == names), None)
    if fusing is None:
        raise BadCheckpoint(f"the setup fuses {shown(list(names))}, and no folder has a fusion of these")
    missing = [name for name in names if name not in steps]
    if missing:
        raise BadCheckpoint(f"the fusion of {shown(list(names))} lacks {shown(missing[0])} at {place.module[:200]!r}")
    ending = steps[names[-1]]
    parts = fusing.at(place.module, ending.network.up.shape[0])
    carry: Tap | None = ending.q
    if ending.parallel:
        if fusing.residual_before and last:
            raise options.not_served("residual_before", True, "it is not served for adapters beside their sublayer")
        # The library adds r once more, and h where the chain ends.
        carry = Tap.SUM if last else ending.x
        if ending.x is not Tap.RESIDUAL and last:
            raise options.not_served("is_parallel", True, f"it is not served within a fusion on {place.module[:200]}")
    fused = Fusion(
        tuple(_member(steps[name].network, ending.x) for name in names),
        *parts,
        query_tap=Tap.OUTPUT if fusing.query_before_ln and not ending.parallel else ending.x,
        carry=carry,
        members_carry=fusing.residual_before,
        replaces=last and not ending.closes,
        norm=ending.norm,
    )
    return fused, last and ending.parallel
