"""What an operator says of a converted delta, by the rules that hold when a checkpoint is lowered."""

import dataclasses

from deltaserve.deltas.delta import Delta
from deltaserve.deltas.sites import BackboneSpec, Task
from deltaserve.errors import BadCheckpoint, InvalidArgument
from deltaserve.formats.heads import CLASSIFIES, OUTPUTS, head_of
from deltaserve.formats.wanted import Wanted


def as_wanted(delta: Delta, wanted: Wanted, backbone: BackboneSpec) -> Delta:
    """The delta for another task, with other labels. Raises BadCheckpoint, FailedPrecondition, InvalidArgument."""
    if wanted.task is not None and wanted.task is not delta.task:
        delta = _for_task(delta, wanted.task, backbone)
    if wanted.task_id not in (None, delta.task_id):
        its = "has no tasks to choose from" if delta.task_id is None else f"was made for task {delta.task_id}"
        raise InvalidArgument(f"task_id is {wanted.task_id}; this converted delta {its}, leave it out", field="task_id")
    width = labelled(delta)
    if delta.head is not None and not width:
        for field in ("labels", "problem_type"):
            if getattr(wanted, field):
                raise InvalidArgument(f"{field}: the outputs of this head are no labels", field=field)
    if wanted.labels and len(wanted.labels) != width:
        raise InvalidArgument(f"{len(wanted.labels)} labels for a head of {width} outputs", field="labels")
    if wanted.problem_type and delta.head is None:
        raise InvalidArgument("problem_type is for deltas that have a head", field="problem_type")
    told = {"task": wanted.task, "labels": wanted.labels, "problem_type": wanted.problem_type}
    guessed = tuple(word for word in delta.provenance.guessed if not told.get(word))
    return dataclasses.replace(
        delta,
        labels=wanted.labels or delta.labels,
        problem_type=wanted.problem_type or delta.problem_type,
        provenance=dataclasses.replace(delta.provenance, guessed=guessed),
    )


def labelled(delta: Delta) -> int:
    """How many labels it has: one for each output of its head, none where these are spans or choices."""
    if delta.head is None or delta.task in OUTPUTS:
        return 0
    return delta.head.width


def _for_task(delta: Delta, task: Task, backbone: BackboneSpec) -> Delta:
    """A head goes with tasks whose head has the same name and layers here; other tasks leave it out."""
    if task not in CLASSIFIES:
        return dataclasses.replace(delta, task=task) if delta.head is None else _without_head(delta, task, backbone)
    spec = head_of(task, backbone)
    mine = backbone.heads.get(delta.task) if _usual(delta, backbone) else None
    if mine is None or (mine.module, mine.layers) != (spec.module, spec.layers):
        raise BadCheckpoint(
            f"the delta is for {task.value}, and it holds no head {spec.module!r} for that; load it with the task that "
            "it was made for"
        )
    return dataclasses.replace(delta, task=task, pooling=spec.read(delta.prompt is not None))


def _usual(delta: Delta, backbone: BackboneSpec) -> bool:
    """Whether its head is built as that of its family's class for the task, and reads what that does."""
    spec = backbone.heads.get(delta.task)
    if delta.head is None or spec is None or delta.pooling is not spec.read(delta.prompt is not None):
        return False
    return tuple(layer.activation for layer in delta.head.layers) == tuple(activation for _, activation in spec.layers)


def _without_head(delta: Delta, task: Task, backbone: BackboneSpec) -> Delta:
    usual = backbone.heads[delta.task].module if _usual(delta, backbone) else f"for {delta.task.value}"
    warning = f"the head {usual!r} is left out: the task is {task.value}"
    made, kinds = delta.provenance, tuple(kind for kind in delta.kinds if kind != "head")
    if not kinds or not (delta.at or delta.prompt or delta.coupling):
        raise BadCheckpoint(f"it is nothing but a head, and the task {task.value} has none")
    return dataclasses.replace(
        delta,
        task=task,
        head=None,
        pooling=None,
        labels=(),
        problem_type=None,
        kinds=kinds,
        provenance=dataclasses.replace(
            made,
            warnings=(*made.warnings, warning),
            guessed=tuple(word for word in made.guessed if word == "task"),
        ),
    )
