"""Who answers a request: the deltas that it names, or the bare backbone on purpose; and whether they can."""

import math
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from deltaserve.catalog.combination import Answering, Part, Parts
from deltaserve.catalog.reference import Reference, parse
from deltaserve.deltas.sites import BackboneSpec, Task
from deltaserve.engine.request import Job
from deltaserve.errors import FailedPrecondition, InvalidArgument
from deltaserve.service.call import Call
from deltaserve.service.served import Served

METHODS: Mapping[Job, str] = {
    Job.GENERATE: "Generate",
    Job.CLASSIFY: "Classify",
    Job.EMBED: "Embed",
    Job.SCORE: "Score",
}
_CLASSIFIED = frozenset(
    {Task.SEQUENCE_CLASSIFICATION, Task.TOKEN_CLASSIFICATION, Task.QUESTION_ANSWERING, Task.MULTIPLE_CHOICE}
)
_ANY = frozenset(Task)
TASKS: Mapping[Job, frozenset[Task]] = {
    Job.GENERATE: frozenset({Task.GENERATION}),
    Job.CLASSIFY: _CLASSIFIED,
    Job.EMBED: _ANY,
    Job.SCORE: frozenset({Task.GENERATION}),
}
"""Tasks of the deltas that can do a job."""


MOST_DELTAS = 8
"""Deltas of one request."""


class Naming(Protocol):
    @property
    def deltas(self) -> Sequence[str]: ...
    @property
    def delta_weights(self) -> Sequence[float]: ...
    @property
    def backbone(self) -> bool: ...


@dataclass(frozen=True)
class Named:
    """One of a request's deltas."""

    reference: Reference
    weight: float = 1.0


def named(naming: Naming) -> tuple[Named, ...]:
    """In their order; none for the bare backbone. Raises InvalidArgument."""
    deltas, weights = naming.deltas, naming.delta_weights
    if naming.backbone:
        if deltas:
            raise InvalidArgument(
                f"`backbone` is true and deltas has {deltas[0][:200]!r}; set one of the two", field="backbone"
            )
        deltas = ()
    elif not deltas:
        raise InvalidArgument(
            "no delta is named; name one in deltas, or set `backbone` to true to be answered by the bare backbone",
            reason="NO_DELTA",
            field="deltas",
        )
    if len(deltas) > MOST_DELTAS:
        raise InvalidArgument(f"{len(deltas)} deltas are named; {MOST_DELTAS} at most", field="deltas")
    if weights and len(weights) != len(deltas):
        raise InvalidArgument(
            f"{len(weights)} weights for {len(deltas)} deltas; each delta has one, or none has", field="delta_weights"
        )
    for index, weight in enumerate(weights):
        if not math.isfinite(weight) or not weight:
            raise InvalidArgument(
                f"the weight of {deltas[index][:200]!r} is {weight:g}; it must be finite and not 0",
                field=f"delta_weights[{index}]",
            )
    references = [parse(delta, f"deltas[{index}]") for index, delta in enumerate(deltas)]
    return tuple(Named(*each) for each in zip(references, weights or [1.0] * len(deltas), strict=True))


@asynccontextmanager
async def target(naming: Naming, job: Job, served: Served, call: Call) -> AsyncIterator[Answering | None]:
    """Who answers, leased until the end of the block; None for the bare backbone.

    Raises InvalidArgument for how it is named, NotFound, FailedPrecondition for what it cannot do, and what `combined`
    raises.
    """
    spec = served.backbone.spec
    chosen = named(naming)
    _check_backbone(job, spec)
    if not chosen:
        if job is Job.CLASSIFY:
            raise FailedPrecondition(
                "Classify: the bare backbone has no head; name a delta that brings one",
                reason="NO_HEAD",
                field="deltas",
            )
        yield None
        return
    async with AsyncExitStack() as leases:
        parts = tuple(Part(leases.enter_context(served.catalog.lease(each.reference)), each.weight) for each in chosen)
        _check_distinct(parts)
        answering: Answering = parts[0].version
        call.delta = "+".join(part.label for part in parts)
        if len(parts) > 1 or parts[0].weight != 1.0:
            answering = await leases.enter_async_context(served.combining.combined(parts))
        _check_delta(job, answering, spec)
        yield answering


def _check_distinct(parts: Parts) -> None:
    seen: set[int] = set()
    for index, part in enumerate(parts):
        if part.version.key in seen:
            raise InvalidArgument(
                f"{part.version.label} is named twice; name it once, with a weight of 2 in delta_weights",
                field=f"deltas[{index}]",
            )
        seen.add(part.version.key)


def _check_backbone(job: Job, spec: BackboneSpec) -> None:
    if job not in spec.tasks:
        raise FailedPrecondition(
            f"{METHODS[job]}: a backbone of family {spec.family} does not do that; it serves {_told(spec.tasks)}",
            reason="WRONG_TASK",
            metadata={"family": spec.family, "serves": ",".join(sorted(spec.tasks))},
        )


def _check_delta(job: Job, answering: Answering, spec: BackboneSpec) -> None:
    task = answering.card.task
    if task not in TASKS[job]:
        able = [other for other, tasks in TASKS.items() if other in spec.tasks and task in tasks]
        raise FailedPrecondition(
            f"{METHODS[job]}: {answering.label} is a delta for {task}; it serves {_told(able)}",
            reason="WRONG_TASK",
            field="deltas[0]",
            metadata={"delta": answering.label, "task": str(task)},
        )
    if job is Job.CLASSIFY and not answering.card.head_width:
        raise FailedPrecondition(
            f"Classify: {answering.label} brings no head; save it with its head among modules_to_save",
            reason="NO_HEAD",
            field="deltas[0]",
            metadata={"delta": answering.label},
        )


def _told(jobs: frozenset[str] | list[Job]) -> str:
    return ", ".join(method for job, method in METHODS.items() if job in jobs) or "nothing"
