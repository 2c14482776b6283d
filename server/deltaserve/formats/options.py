"""A config's keys: what each may be, and which ones a type of delta knows. Everything in it is untrusted."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deltaserve.errors import BadCheckpoint, FailedPrecondition

MOST_RANK = 1 << 14
MOST_ENTRIES = 10_000


@dataclass(frozen=True)
class Options:
    """The keys of one type: those that are read, those that change nothing, and what to say of those refused."""

    used: frozenset[str]
    inert: frozenset[str] = frozenset()
    refused: Mapping[str, str] = field(default_factory=dict)

    def check(self, config: Mapping[str, Any], common: frozenset[str] = frozenset()) -> None:
        """`common`: keys that every type may have. Raises FailedPrecondition for one that is set and not served."""
        known = self.used | self.inert | common
        for key, value in config.items():
            if key in known or value in (None, False, "", [], {}):
                continue
            why = self.refused.get(key, "this release does not know it, and it may change what the delta computes")
            raise not_served(key, value, why)


def integer(config: Mapping[str, Any], key: str, default: int | None = None, most: int = MOST_RANK) -> int:
    """A whole number from 1 to `most`. Raises BadCheckpoint."""
    return _integer(config.get(key, default), key, most)


def number(config: Mapping[str, Any], key: str, default: float) -> float:
    """A finite number. Raises BadCheckpoint."""
    return _number(config.get(key, default), key)


def flag(config: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """true or false. Raises BadCheckpoint."""
    value = config.get(key, default)
    if not isinstance(value, bool | None):
        raise BadCheckpoint(f"config key {key!r} is {shown(value)}; true or false is expected")
    return bool(value)


def seed(config: Mapping[str, Any], key: str, default: int) -> int:
    """What a generator starts from: a whole number from 0. Raises BadCheckpoint."""
    value = config.get(key, default)
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise BadCheckpoint(f"config key {key!r} is {shown(value)}; a whole number from 0 is expected")
    return value


def not_served(key: str, value: Any, why: str) -> FailedPrecondition:
    """The error for an option that is understood and not served."""
    return FailedPrecondition(
        f"config key {key!r} is {shown(value)}: {why}", reason="OPTION_NOT_SERVED", metadata={"key": key}
    )


def wrong(key: str, what: str) -> BadCheckpoint:
    """The error for a value that the library itself would not load."""
    return BadCheckpoint(f"config key {key!r} {what}", metadata={"key": key})


def choice(config: Mapping[str, Any], key: str, among: tuple[str, ...]) -> str:
    """One of some words, the first by default. Raises BadCheckpoint."""
    value = config.get(key, among[0])
    if value not in among:
        raise BadCheckpoint(f"config key {key!r} is {shown(value)}; expected is one of {', '.join(among)}")
    assert isinstance(value, str)
    return value


def names(config: Mapping[str, Any], key: str) -> str | tuple[str, ...] | None:
    """A pattern, a list of names, or None. Raises BadCheckpoint."""
    value = config.get(key)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and len(value) <= MOST_ENTRIES and all(isinstance(v, str) for v in value):
        return tuple(value)
    raise BadCheckpoint(f"config key {key!r} is {shown(value)}; a string or a list of strings is expected")


def listed(config: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """A list of names, empty by default; a single name counts as a list. Raises BadCheckpoint."""
    value = names(config, key)
    return (value,) if isinstance(value, str) else value or ()


def indices(config: Mapping[str, Any], key: str) -> tuple[int, ...] | None:
    """A number or a list of numbers; None where it is missing or empty. Raises BadCheckpoint."""
    value = config.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        value = [value]
    if value is None or value == []:
        return None
    if isinstance(value, list) and len(value) <= MOST_ENTRIES and all(type(v) is int for v in value):
        return tuple(value)
    raise BadCheckpoint(f"config key {key!r} is {shown(value)}; a whole number or a list of them is expected")


def ranks(config: Mapping[str, Any], key: str, most: int = MOST_RANK) -> dict[str, int]:
    """Whole numbers from 1 by pattern. Raises BadCheckpoint."""
    return {pattern: _integer(value, f"{key}[{pattern!r}]", most) for pattern, value in _table(config, key).items()}


def numbers(config: Mapping[str, Any], key: str) -> dict[str, float]:
    """Numbers by pattern. Raises BadCheckpoint."""
    return {pattern: _number(value, f"{key}[{pattern!r}]") for pattern, value in _table(config, key).items()}


def _table(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict) or len(value) > MOST_ENTRIES:
        raise BadCheckpoint(f"config key {key!r} is {shown(value)}; an object is expected")
    return value


def _integer(value: Any, key: str, most: int) -> int:
    if type(value) is not int or not 1 <= value <= most:
        raise BadCheckpoint(f"config key {key!r} is {shown(value)}; a whole number from 1 to {most} is expected")
    return value


def _number(value: Any, key: str) -> float:
    # A whole number may be larger than any float, and of that isfinite makes an error of its own.
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
        raise BadCheckpoint(f"config key {key!r} is {shown(value)}; a number is expected")
    return float(value)


def shown(value: Any) -> str:
    """A value from a checkpoint in a message, not too long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"
