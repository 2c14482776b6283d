"""Who answers a request: the one delta that it names, or the bare backbone on purpose; and whether it can."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

from deltaserve.catalog.catalog import Catalog
from deltaserve.catalog.reference import Reference, parse
from deltaserve.catalog.version import Version
from deltaserve.deltas.sites import BackboneSpec, Task
from deltaserve.engine.request import Job
from deltaserve.errors import FailedPrecondition, InvalidArgument
from deltaserve.service.call import Call

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


class Naming(Protocol):
    @property
    def deltas(self) -> Sequence[str]: ...
    @property
    def backbone(self) -> bool: ...


def named(naming: Naming) -> Reference | None:
    """None for the bare backbone. Raises InvalidArgument."""
    deltas = naming.deltas
    if naming.backbone:
        if deltas:
            raise InvalidArgument(
                f"`backbone` is true and deltas has {deltas[0][:200]!r}; set one of the two", field="backbone"
            )
        return None
    if not deltas:
        raise InvalidArgument(
            "no delta is named; name one in deltas, or set `backbone` to true to be answered by the bare backbone",
            reason="NO_DELTA",
            field="deltas",
        )
    if len(deltas) > 1:
        raise InvalidArgument(f"{len(deltas)} deltas are named; this release takes exactly one", field="deltas")
    return parse(deltas[0], "deltas[0]")


@contextmanager
def target(naming: Naming, job: Job, spec: BackboneSpec, catalog: Catalog, call: Call) -> Iterator[Version | None]:
    """The version that answers, leased until the end of the block; None for the bare backbone.

    Raises InvalidArgument for how it is named, NotFound, and FailedPrecondition for what it cannot do.
    """
    reference = named(naming)
    _check_backbone(job, spec)
    if reference is None:
        if job is Job.CLASSIFY:
            raise FailedPrecondition(
                "Classify: the bare backbone has no head; name a delta that brings one",
                reason="NO_HEAD",
                field="deltas",
            )
        yield None
        return
    with catalog.lease(reference) as version:
        call.delta = version.label
        _check_delta(job, version, spec)
        yield version


def _check_backbone(job: Job, spec: BackboneSpec) -> None:
    if job not in spec.tasks:
        raise FailedPrecondition(
            f"{METHODS[job]}: a backbone of family {spec.family} does not do that; it serves {_told(spec.tasks)}",
            reason="WRONG_TASK",
            metadata={"family": spec.family, "serves": ",".join(sorted(spec.tasks))},
        )


def _check_delta(job: Job, version: Version, spec: BackboneSpec) -> None:
    task = version.card.task
    if task not in TASKS[job]:
        able = [other for other, tasks in TASKS.items() if other in spec.tasks and task in tasks]
        raise FailedPrecondition(
            f"{METHODS[job]}: {version.label} is a delta for {task}; it serves {_told(able)}",
            reason="WRONG_TASK",
            field="deltas[0]",
            metadata={"delta": version.label, "task": str(task)},
        )
    if job is Job.CLASSIFY and not version.card.head_width:
        raise FailedPrecondition(
            f"Classify: {version.label} brings no head; save it with its head among modules_to_save",
            reason="NO_HEAD",
            field="deltas[0]",
            metadata={"delta": version.label},
        )


def _told(jobs: frozenset[str] | list[Job]) -> str:
    return ", ".join(method for job, method in METHODS.items() if job in jobs) or "nothing"
