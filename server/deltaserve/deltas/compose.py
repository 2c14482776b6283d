"""Several deltas as one: what a request gets that names more than one of them.

At each site the steps have the order of `primitives`, whichever member brought them, and at each step all members act,
as `folds` says: what is added is added at one time, from one input, W u + Σ Δ_k u; factors, blocks and adapters act in
the order in which the members are named. So IA³'s factors multiply a LoRA's part too, and a LoRA changes what the
adapter behind it reads. Soft prompts stand in the members' order, and so do prefixes.

Members may come from different libraries. At most one has a head, which is the combination's; so is its task.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deltaserve.deltas.adapters import Coupling
from deltaserve.deltas.bases import Bases, Owners
from deltaserve.deltas.delta import Delta, Provenance, mapped
from deltaserve.deltas.folds import Named, clash, folded
from deltaserve.deltas.primitives import Prefix, SitePrimitive, SoftPrompt, tensors
from deltaserve.deltas.sites import Pooling, Task
from deltaserve.deltas.weights import weighed

FORMAT = "combination"


@dataclass(frozen=True, eq=False)
class Member:
    """One of the deltas of a combination; `label` names it in errors."""

    label: str
    delta: Delta
    weight: float = 1.0


def compose(members: Sequence[Member]) -> Delta:
    """The one delta that does what all members do. New tensors only where two of them meet.

    Raises FailedPrecondition that names two members and where they do not go together, or a member whose weight means
    nothing.
    """
    assert members
    shared = _shared(members)
    weighted = [(each.label, weighed(each.label, shared[i], each.weight)) for i, each in enumerate(members)]
    if len(members) > 1:
        _check_invocations(weighted)
        _check_biases(weighted)
    leading = _leading(weighted)
    sites = dict.fromkeys(name for _, delta in weighted for name in delta.at)
    at = {
        name: folded(name, [(label, part) for label, delta in weighted for part in delta.at.get(name, ())])
        for name in sites
    }
    prompt = _prompt(weighted)
    return Delta(
        kinds=tuple(dict.fromkeys(kind for _, delta in weighted for kind in delta.kinds)),
        at=at,
        task=leading.task,
        provenance=_provenance(members),
        prompt=prompt,
        position_shift=sum(delta.position_shift for _, delta in weighted),
        head=leading.head,
        pooling=_pooling(leading, prompt),
        labels=leading.labels,
        problem_type=leading.problem_type,
        invocation=leading.invocation,
        task_id=leading.task_id if len(members) == 1 else None,
        token_types=leading.token_types,
        coupling=_coupling(weighted),
        bases=_used(at, {key: base for _, delta in weighted for key, base in delta.bases.items()}),
    )


def identity(members: Sequence[tuple[str, float]]) -> str:
    """SHA-256 of the members' content hashes and weights, in order."""
    told = "\n".join(f"{content} {weight!r}" for content, weight in members)
    return hashlib.sha256(told.encode()).hexdigest()


def _shared(members: Sequence[Member]) -> list[Delta]:
    """The members' deltas, with one copy of each base that several of them have."""
    known: dict[str, torch.Tensor] = {}
    deltas = []
    for member in members:
        known = {**member.delta.bases, **known}
        own = {key: known[key] for key in member.delta.bases}
        deltas.append(mapped(member.delta, lambda tensor: tensor, own) if own else member.delta)
    return deltas


def _used(at: dict[str, tuple[SitePrimitive, ...]], bases: Bases) -> Bases:
    """Those of the bases that a tensor is still a view of."""
    owners = Owners(bases)
    found = {owners.base_of(tensor) for parts in at.values() for part in parts for tensor in tensors(part)}
    return {key: base for key, base in bases.items() if key in found}


def _check_invocations(members: Named[Delta]) -> None:
    for each in members:
        if each[1].invocation:
            other = next(other for other in members if other is not each)
            why = f"{each[0]} acts from its invocation tokens on, and a row of a request has one set of deltas"
            raise clash("as a whole", [each, other], why)


def _check_biases(members: Named[Delta]) -> None:
    """T5: where one member's prefix takes the relative bias from a layer, no other member's prefix may count on it."""
    silent = [(each, site) for each in members for site in each[1].at if _prefix(each[1], site, biased=False)]
    for each, site in silent:
        for other in members:
            elsewhere = any(isinstance(part, Prefix) for parts in other[1].at.values() for part in parts)
            if elsewhere and site not in other[1].at:
                why = f"the prefix of {each[0]} takes the relative bias from this layer, that of {other[0]} keeps it"
                raise clash(f"at {site}", [each, other], why)


def _prefix(delta: Delta, site: str, biased: bool) -> bool:
    return any(isinstance(part, Prefix) and part.biased is biased for part in delta.at[site])


def _leading(members: Named[Delta]) -> Delta:
    """The member with the head, whose task the combination is for; without a head all are for one task."""
    headed = [each for each in members if each[1].head is not None]
    if len(headed) > 1:
        raise clash("as a whole", headed, "both bring a head, and a request has one answer")
    if headed:
        return headed[0][1]
    # A delta for embeddings is for no task: it is any task's.
    tasks = [each for each in members if each[1].task is not Task.EMBEDDING] or list(members)
    for other in tasks[1:]:
        if other[1].task is not tasks[0][1].task:
            why = f"one is for {tasks[0][1].task}, the other for {other[1].task}, and neither brings a head"
            raise clash("as a whole", [tasks[0], other], why)
    return tasks[0][1]


def _pooling(leading: Delta, prompt: SoftPrompt | None) -> Pooling | None:
    """Given embeddings instead of ids, transformers' decoder classifiers cannot see padding."""
    put_before = prompt is not None and prompt.place is None
    return Pooling.LAST if put_before and leading.pooling is Pooling.LAST_REAL else leading.pooling


def _prompt(members: Named[Delta]) -> SoftPrompt | None:
    prompts = [(label, delta.prompt) for label, delta in members if delta.prompt is not None]
    if len(prompts) < 2:
        return prompts[0][1] if prompts else None
    for other in prompts[1:]:
        if other[1].place != prompts[0][1].place:
            places = f"{_place(prompts[0][1])} and {_place(other[1])}"
            raise clash("in the input", [prompts[0], other], f"their soft prompts stand {places}")
    return SoftPrompt(torch.cat([prompt.rows for _, prompt in prompts]), prompts[0][1].place)


def _place(prompt: SoftPrompt) -> str:
    place = prompt.place
    return "before the token embeddings" if place is None else f"behind row {place} of what the embeddings give"


def _coupling(members: Named[Delta]) -> Coupling | None:
    couplings = [(label, delta.coupling) for label, delta in members if delta.coupling is not None]
    if len(couplings) > 1:
        raise clash("at the embeddings", couplings, "both have an invertible block")
    return couplings[0][1] if couplings else None


def _provenance(members: Sequence[Member]) -> Provenance:
    made = [each.delta.provenance for each in members]
    return Provenance(
        FORMAT,
        identity([(one.content_hash, each.weight) for one, each in zip(made, members, strict=True)]),
        sum(one.file_bytes for one in made),
        sum(one.tensors_matched for one in made),
        warnings=tuple(f"{each.label}: {told}" for each in members for told in each.delta.provenance.warnings),
    )
