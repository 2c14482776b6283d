"""A PEFT config's keys: what each may be, and which ones this release refuses by name."""

from collections.abc import Mapping
from typing import Any

from deltaserve.errors import InvalidArgument
from deltaserve.formats.options import (
    MOST_ENTRIES,
    MOST_RANK,
    Options,
    choice,
    flag,
    indices,
    integer,
    listed,
    names,
    not_served,
    number,
    numbers,
    ranks,
    seed,
    shown,
    wrong,
)

__all__ = [
    "COMMON",
    "INERT",
    "MOST_ENTRIES",
    "MOST_RANK",
    "TARGETED",
    "TRAINED",
    "Options",
    "choice",
    "flag",
    "indices",
    "integer",
    "listed",
    "names",
    "not_served",
    "number",
    "numbers",
    "ranks",
    "seed",
    "shown",
    "task_id",
    "wrong",
]

COMMON = frozenset({"peft_type", "task_type", "base_model_name_or_path", "modules_to_save"})
INERT = frozenset({"auto_mapping", "inference_mode", "peft_version", "revision", "runtime_config"})
"""These change nothing at inference. `auto_mapping` and `revision` name code and files; they are never followed."""

TARGETED = frozenset({"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"})
TRAINED = frozenset({"init_weights", "fan_in_fan_out"})
"""Inert keys of most tuners."""


def task_id(config: Mapping[str, Any], key: str | None, given: int | None) -> int | None:
    """Which of a checkpoint's tasks is meant, from 0; `key` says how many there are, None: its type has no tasks.

    Raises InvalidArgument for a task that is not there and where it must be said which, BadCheckpoint.
    """
    if key is None:
        if given is not None:
            raise InvalidArgument(
                f"task_id is {given}; a checkpoint of type {shown(config.get('peft_type'))} has no tasks to choose "
                "from, leave it out",
                field="task_id",
            )
        return None
    count = integer(config, key, 1)
    if given is None and count == 1:
        return 0
    if given is None or given >= count:
        found = "unset" if given is None else str(given)
        raise InvalidArgument(
            f"task_id is {found}; the checkpoint is for {count} task{'s' if count > 1 else ''}, each a delta of its "
            f"own: say which, from 0 to {count - 1}",
            reason="BAD_TASK_ID",
            field="task_id",
            metadata={"tasks": str(count)},
        )
    return given
