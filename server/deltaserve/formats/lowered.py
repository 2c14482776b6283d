"""What every library's lowering ends in: its draft as a delta."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from deltaserve.deltas.delta import Delta, Provenance
from deltaserve.deltas.sites import HeadSpec, Task
from deltaserve.formats.draft import Draft
from deltaserve.formats.heads import outputs_of
from deltaserve.formats.kinds import ordered
from deltaserve.formats.numbers import check_numbers
from deltaserve.formats.wanted import Wanted


def delta_of(
    draft: Draft,
    task: Task,
    head: HeadSpec | None,
    wanted: Wanted,
    model: Mapping[str, Any],
    provenance: Provenance,
    *,
    token_types: bool = True,
) -> Delta:
    """The delta of a whole draft for a task, whose head is `head` if it has one.

    `model` is as in `outputs_of`. To `provenance` come what was guessed of the head's outputs, and a warning where the
    delta does nothing. Raises BadCheckpoint where numbers are not finite, InvalidArgument for labels that do not fit.
    """
    check_numbers(draft)
    fresh = ("all its numbers are those of a fresh start: it changes nothing",) if draft.nothing() else ()
    labels, problem, assumed = outputs_of(draft.head, head, wanted, model)
    return Delta(
        kinds=ordered(draft.kinds),
        at=draft.at,
        task=task,
        provenance=dataclasses.replace(
            provenance, warnings=provenance.warnings + fresh, guessed=provenance.guessed + assumed
        ),
        prompt=draft.prompt,
        position_shift=draft.position_shift,
        head=draft.head,
        pooling=None if head is None else head.read(draft.prompt is not None),
        labels=labels,
        problem_type=problem,
        invocation=draft.invocation,
        task_id=draft.task_id,
        token_types=token_types,
        coupling=draft.coupling,
        bases=draft.bases,
    )
