"""Heads: which a backbone serves for a task, and what their outputs are called."""

from collections.abc import Mapping
from typing import Any

from deltaserve.deltas.primitives import Head, HeadLayer
from deltaserve.deltas.sites import PROBLEM_TYPES, THROUGH_POOLER, BackboneSpec, HeadSpec, Pooling, Task
from deltaserve.errors import BadCheckpoint, FailedPrecondition, InvalidArgument
from deltaserve.formats.ledger import Ledger
from deltaserve.formats.wanted import Wanted

GUESSED = (Task.SEQUENCE_CLASSIFICATION, Task.TOKEN_CLASSIFICATION, Task.QUESTION_ANSWERING)
"""By their heads, in this order. One of multiple choice is also one of regression: it must be said."""
CLASSIFIES = (*GUESSED, Task.MULTIPLE_CHOICE)
OUTPUTS: Mapping[Task, int] = {Task.QUESTION_ANSWERING: 2, Task.MULTIPLE_CHOICE: 1}
"""How many a head has whose outputs are no labels."""


def readings(task: Task, backbone: BackboneSpec, prompted: bool) -> frozenset[Pooling]:
    """What a head for a task may read in this backbone: what its family's does, and what AdapterHub's does."""
    own = backbone.heads.get(task)
    found = set() if own is None else {own.read(prompted)}
    if task in (Task.TOKEN_CLASSIFICATION, Task.QUESTION_ANSWERING):
        return frozenset({*found, Pooling.TOKENS})
    if "generate" in backbone.tasks:
        return frozenset({*found, Pooling.LAST_REAL, Pooling.LAST})
    pooled = any(head.pooling in THROUGH_POOLER for head in backbone.heads.values())
    return frozenset({*found, Pooling.CLS, *([Pooling.POOLER] if pooled else [])})


def head_of(task: Task, backbone: BackboneSpec) -> HeadSpec:
    """The head of a task that has one. Raises FailedPrecondition where this backbone serves none for it."""
    head = backbone.heads.get(task)
    if head is None:
        able = ", ".join(sorted(t.value for t in backbone.heads)) or "no head at all"
        raise FailedPrecondition(
            f"the delta is for {task.value}, and this {backbone.family} backbone serves {able}",
            reason="TASK_NOT_SERVED",
            metadata={"task": task.value},
        )
    return head


def layers_of(ledger: Ledger, spec: HeadSpec, width: int) -> Head:
    """A head by its family's names, whose first layer reads rows of this width. Raises BadCheckpoint."""
    layers = []
    for path, activation in spec.layers:
        name = f"{spec.module}.{path}" if path else spec.module
        weight = f"{name}.weight"
        shape = ledger.shape(weight) if ledger.has(weight) else ()
        outputs = shape[0] if len(shape) == 2 else 1
        tensor = ledger.take(weight, (outputs, width))
        bias = ledger.take(f"{name}.bias", (outputs,)) if ledger.has(f"{name}.bias") else None
        layers.append(HeadLayer(tensor, bias, activation))
        width = outputs
    if spec.outputs not in (None, width):
        raise BadCheckpoint(
            f"the head {spec.module!r} has {width} outputs; for this task it has {spec.outputs}",
            metadata={"tensor": f"{spec.module}.weight", "outputs": str(width), "expected": str(spec.outputs)},
        )
    return Head(tuple(layers))


def outputs_of(
    made: Head | None, head: HeadSpec | None, wanted: Wanted, model: Mapping[str, Any]
) -> tuple[tuple[str, ...], str | None, tuple[str, ...]]:
    """Labels, problem type, and which of the two were guessed. Spans and choices have neither.

    `model` is transformers' config of the model that was trained, or an empty one. Raises InvalidArgument.
    """
    width = 0 if made is None else made.width
    if head is not None and head.outputs is not None:
        for field in ("labels", "problem_type"):
            if getattr(wanted, field):
                raise InvalidArgument(f"{field}: the outputs of the head {head.module!r} are no labels", field=field)
        return (), None, ()
    if wanted.labels and len(wanted.labels) != width:
        raise InvalidArgument(f"{len(wanted.labels)} labels for a head of {width} outputs", field="labels")
    if not width:
        if wanted.problem_type:
            raise InvalidArgument("problem_type is for deltas that have a head", field="problem_type")
        return (), None, ()
    guessed: list[str] = []
    labels = wanted.labels or _named(model, width)
    if not labels:
        labels = tuple(f"LABEL_{i}" for i in range(width))
        guessed.append("labels")
    problem = wanted.problem_type or model.get("problem_type")
    if problem not in PROBLEM_TYPES:
        problem = "regression" if width == 1 else "single_label_classification"
        guessed.append("problem_type")
    return labels, str(problem), tuple(guessed)


def _named(model: Mapping[str, Any], width: int) -> tuple[str, ...]:
    """Names from transformers' `id2label`, if it names exactly the head's outputs."""
    told = model.get("id2label")
    if not isinstance(told, dict) or len(told) != width:
        return ()
    names = tuple(name for i in range(width) if isinstance(name := told.get(str(i)), str))
    return names if len(names) == width else ()
