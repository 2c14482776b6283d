"""adapter_setup.json: how the adapters of a setup act together, as a small tree of names."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deltaserve.errors import BadCheckpoint, FailedPrecondition, InvalidArgument
from deltaserve.formats import options
from deltaserve.formats.options import shown

MOST_CHILDREN = 32
REFUSED: Mapping[str, str] = {
    "Parallel": "each of its adapters has an answer of its own; load them as deltas and ask each",
    "BatchSplit": "it says which requests of one batch go to which adapter; here each request names its delta",
    "Split": "it cuts a text at a fixed number of tokens, and fits texts of that one length alone",
}
"""Blocks that cannot be one delta, and why."""


@dataclass(frozen=True)
class One:
    name: str

    def names(self) -> tuple[str, ...]:
        return (self.name,)


@dataclass(frozen=True)
class Fuse:
    children: tuple[One, ...]

    def names(self) -> tuple[str, ...]:
        return tuple(child.name for child in self.children)


@dataclass(frozen=True)
class Average:
    """`weights` as the library uses them, one for each child: it divides those of a file by their sum, `total`."""

    children: tuple[One, ...]
    weights: tuple[float, ...]
    total: float = 1.0

    def names(self) -> tuple[str, ...]:
        return tuple(child.name for child in self.children)


@dataclass(frozen=True)
class Stack:
    children: "tuple[One | Fuse | Average, ...]"

    def names(self) -> tuple[str, ...]:
        return tuple(name for child in self.children for name in child.names())


Block = One | Fuse | Average | Stack


def first(block: Block) -> str:
    """The adapter that what cannot be composed is taken from."""
    return block.names()[0]


def parse(setup: Any, task_id: int | None) -> tuple[Block, int | None]:
    """The tree, and which of its tasks was chosen. Raises BadCheckpoint, FailedPrecondition, InvalidArgument."""
    kind, children, _ = _read(setup)
    tasks = None
    if kind == "MultiTask":
        tasks = _chosen(len(children), task_id)
        kind, children = "Stack", [children[tasks]]
    elif task_id is not None:
        raise InvalidArgument(
            f"task_id is {task_id}; the setup has no tasks to choose from, leave it out", field="task_id"
        )
    if kind == "Stack":
        return Stack(tuple(_inner(child) for child in children)), tasks
    return _inner(setup), tasks


def _read(setup: Any) -> tuple[str, list[Any], Mapping[str, Any]]:
    if not isinstance(setup, dict):
        raise BadCheckpoint(f"config key 'adapter_setup' holds {shown(setup)}; a type and children are expected")
    kind, children, told = setup.get("type"), setup.get("children"), setup.get("kwargs") or {}
    if isinstance(kind, str) and kind in REFUSED:
        raise FailedPrecondition(
            f"adapter_setup.json has a {kind} block: {REFUSED[kind]}", reason="KIND_NOT_SERVED", metadata={"type": kind}
        )
    if kind not in ("single", "Stack", "Fuse", "Average", "MultiTask"):
        raise FailedPrecondition(
            f"adapter_setup.json has a block of type {shown(kind)}; served are Stack, Fuse, Average, MultiTask",
            reason="KIND_NOT_SERVED",
            metadata={"type": shown(kind)},
        )
    if not isinstance(children, list) or not 1 <= len(children) <= MOST_CHILDREN or not isinstance(told, dict):
        raise BadCheckpoint(f"a {kind} block has children {shown(children)}; 1 to {MOST_CHILDREN} are expected")
    return kind, children, told


def _inner(setup: Any) -> One | Fuse | Average:
    kind, children, told = _read(setup)
    match kind:
        case "single":
            if len(children) != 1 or not isinstance(children[0], str):
                raise BadCheckpoint(f"a block of type 'single' has children {shown(children)}; one name is expected")
            return One(children[0])
        case "Fuse":
            return Fuse(_names(kind, children))
        case "Average":
            return Average(_names(kind, children), *_weights(told, len(children)))
        case _:
            raise FailedPrecondition(
                f"adapter_setup.json has a {kind} block inside another block; this release serves it at the top alone",
                reason="OPTION_NOT_SERVED",
                metadata={"type": kind},
            )


def _names(kind: str, children: list[Any]) -> tuple[One, ...]:
    found = [_inner(child) for child in children]
    made = tuple(child for child in found if isinstance(child, One))
    if len(made) < len(found):
        raise FailedPrecondition(
            f"adapter_setup.json has blocks in a {kind} block; this release serves adapters alone there",
            reason="OPTION_NOT_SERVED",
            metadata={"type": kind},
        )
    if len({child.name for child in made}) < len(made):
        raise BadCheckpoint(f"a {kind} block names an adapter twice")
    return made


def _weights(told: Mapping[str, Any], count: int) -> tuple[tuple[float, ...], float]:
    given = told.get("weights")
    if not isinstance(given, list) or len(given) != count:
        raise BadCheckpoint(f"an Average of {count} has weights {shown(given)}; {count} numbers are expected")
    weights = [options.number({"weights": value}, "weights", 0.0) for value in given]
    total = sum(weights)
    if not total or not math.isfinite(total):
        raise BadCheckpoint(f"an Average has weights {shown(given)}, and divides them by their sum, {total:g}")
    return tuple(weight / total for weight in weights), total


def _chosen(count: int, task_id: int | None) -> int:
    if task_id is None and count == 1:
        return 0
    if task_id is None or not 0 <= task_id < count:
        found = "unset" if task_id is None else str(task_id)
        raise InvalidArgument(
            f"task_id is {found}; the setup is for {count} tasks, each a delta of its own: say which, from 0 to "
            f"{count - 1}",
            reason="BAD_TASK_ID",
            field="task_id",
            metadata={"tasks": str(count)},
        )
    return task_id
