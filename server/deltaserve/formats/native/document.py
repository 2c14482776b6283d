"""delta.json, key by key: what it must hold, and what of it needs no tensor and no backbone to be checked."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deltaserve.deltas.delta import Provenance
from deltaserve.deltas.sites import PROBLEM_TYPES, Pooling, Task
from deltaserve.errors import BadCheckpoint
from deltaserve.formats.kinds import KINDS
from deltaserve.formats.native.record import KEY, VERSION, Record, fields, flag, integer, listed, shown, text
from deltaserve.formats.peft.invocation import LONGEST

KEYS = (
    *(KEY, "backbone", "family", "kinds", "task", "labels", "problem_type", "pooling", "position_shift"),
    *("invocation", "task_id", "token_types", "made_from", "weights", "bases", "prompt", "coupling", "head", "at"),
)
_MADE_FROM = ("format", "content_hash", "file_bytes", "tensors_matched", "base_model", "warnings", "guessed")
_LONGEST = 10_000
_MOST_BYTES = 1 << 60


@dataclass(frozen=True)
class Document:
    """`weights` has, by site, SHA-256 of the `weight` and `bias` that its numbers hold for; `bases` names tensors.

    `head`, `prompt`, `coupling` and `at` are records still.
    """

    backbone: str
    family: str
    kinds: tuple[str, ...]
    task: Task
    labels: tuple[str, ...]
    problem_type: str | None
    pooling: Pooling | None
    position_shift: int
    invocation: tuple[int, ...]
    task_id: int | None
    token_types: bool
    made_from: Provenance
    weights: Mapping[str, Mapping[str, str]]
    bases: tuple[str, ...]
    prompt: object
    coupling: object
    head: tuple[object, ...] | None
    at: Mapping[str, tuple[object, ...]]


def read(config: Mapping[str, Any]) -> Document:
    """Raises BadCheckpoint with the key at fault: missing, unknown, or not what it should be."""
    version = config.get(KEY)
    if type(version) is not int or version != VERSION:
        raise BadCheckpoint(
            f"config key {KEY!r} is {shown(version)}; this release reads version {VERSION}: convert it again",
            metadata={"key": KEY},
        )
    _keys(config, KEYS, "the config")
    head = config["head"]
    return Document(
        backbone=text(config["backbone"], "config key 'backbone'"),
        family=text(config["family"], "config key 'family'"),
        kinds=_kinds(config["kinds"]),
        task=Task(_word(config["task"], "config key 'task'", tuple(Task))),
        labels=listed(config["labels"], "config key 'labels'", lambda value, place: text(value, place, 256)),
        problem_type=_word(config["problem_type"], "config key 'problem_type'", (*PROBLEM_TYPES, None)),
        pooling=None
        if config["pooling"] is None
        else Pooling(_word(config["pooling"], "config key 'pooling'", tuple(Pooling))),
        position_shift=integer(config["position_shift"], "config key 'position_shift'"),
        invocation=listed(config["invocation"], "config key 'invocation'", integer, LONGEST),
        task_id=None if config["task_id"] is None else _task_id(config["task_id"]),
        token_types=flag(config["token_types"], "config key 'token_types'"),
        made_from=_made_from(config["made_from"]),
        weights={
            site: _hashes(told, f"config key 'weights', site {shown(site)}")
            for site, told in fields(config["weights"], "config key 'weights'").items()
        },
        bases=listed(config["bases"], "config key 'bases'", text),
        prompt=config["prompt"],
        coupling=config["coupling"],
        head=None if head is None else listed(head, "config key 'head'", lambda value, _: value),
        at={
            site: listed(told, f"config key 'at', site {shown(site)}", lambda value, _: value)
            for site, told in fields(config["at"], "config key 'at'").items()
        },
    )


def _keys(told: Mapping[str, Any], known: tuple[str, ...], place: str) -> None:
    for key in told:
        if key not in known:
            raise BadCheckpoint(f"{place} has a key {shown(key)}, which this release does not know")
    for key in known:
        if key not in told:
            raise BadCheckpoint(f"{place} has no key {key!r}", metadata={"key": key})


def _task_id(value: object) -> int:
    found = integer(value, "config key 'task_id'")
    if found < 0:
        raise BadCheckpoint(f"config key 'task_id' is {found}; a whole number from 0 is expected")
    return found


def _kinds(value: object) -> tuple[str, ...]:
    kinds = listed(value, "config key 'kinds'", lambda each, place: str(_word(each, place, KINDS)))
    if not kinds or len(set(kinds)) < len(kinds):
        raise BadCheckpoint(f"config key 'kinds' is {shown(value)}; one kind or several different ones are expected")
    return kinds


def _word(value: object, place: str, among: tuple[str | None, ...]) -> Any:
    if not isinstance(value, str | None) or value not in among:
        words = ", ".join(str(word) for word in among if word is not None)
        raise BadCheckpoint(f"{place} is {shown(value)}; expected is one of {words}")
    return value


def _made_from(value: object) -> Provenance:
    place = "config key 'made_from'"
    told: Record = fields(value, place)
    _keys(told, _MADE_FROM, place)

    def words(key: str) -> tuple[str, ...]:
        return listed(told[key], f"{place}, {key!r}", lambda each, here: text(each, here, _LONGEST))

    return Provenance(
        format=text(told["format"], f"{place}, 'format'"),
        content_hash=text(told["content_hash"], f"{place}, 'content_hash'"),
        file_bytes=integer(told["file_bytes"], f"{place}, 'file_bytes'", _MOST_BYTES),
        tensors_matched=integer(told["tensors_matched"], f"{place}, 'tensors_matched'", _MOST_BYTES),
        base_model=text(told["base_model"], f"{place}, 'base_model'"),
        warnings=words("warnings"),
        guessed=words("guessed"),
    )


def _hashes(value: object, place: str) -> Mapping[str, str]:
    told = fields(value, place)
    if not told or not told.keys() <= {"weight", "bias"}:
        raise BadCheckpoint(f"{place} is {shown(value)}; the SHA-256 of a weight, of a bias or of both is expected")
    return {part: text(found, f"{place}, {part!r}", 64) for part, found in told.items()}
