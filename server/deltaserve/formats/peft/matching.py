"""Which modules a PEFT config targets, by the rules of peft.tuners.tuners_utils.check_target_module_exists.

Patterns come from a checkpoint: they are short, and matched against literal module names with bounded time.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import regex

from deltaserve.errors import BadCheckpoint
from deltaserve.formats.peft import options

LONGEST_PATTERN = 2000
SECONDS = 2.0
"""For all the patterns of one checkpoint."""


class Patterns:
    """Regular expressions of one checkpoint, under one budget of time."""

    def __init__(self) -> None:
        self._end = time.monotonic() + SECONDS
        self._known: dict[str, Any] = {}

    def full(self, pattern: str, text: str, key: str) -> Any:
        """The match of the whole text, or None. Raises BadCheckpoint for a pattern that is wrong or too slow."""
        try:
            compiled = self._known.get(pattern)
            if compiled is None:
                if len(pattern) > LONGEST_PATTERN:
                    raise BadCheckpoint(f"config key {key!r} holds a pattern of {len(pattern)} characters")
                compiled = self._known[pattern] = regex.compile(pattern)
            return compiled.fullmatch(text, timeout=max(self._end - time.monotonic(), 0.001))
        except regex.error as error:
            raise BadCheckpoint(f"config key {key!r}: {pattern[:80]!r} is not a pattern: {error}") from error
        except TimeoutError as error:
            raise BadCheckpoint(f"config key {key!r}: {pattern[:80]!r} takes too long to match") from error

    def first(self, table: Mapping[str, Any], name: str, key: str) -> Any:
        """The value of the first pattern that matches the end of a module's name, or None."""
        for pattern, value in table.items():
            if self.full(rf"(.*\.)?({pattern})", name, key):
                return value
        return None


@dataclass(frozen=True)
class Matched:
    """`modules` in the order in which they stand in the model; `idle`: entries of the list that matched nothing."""

    modules: tuple[str, ...]
    idle: tuple[str, ...]


def targeted(config: Mapping[str, Any], modules: Sequence[str], patterns: Patterns) -> Matched:
    """The modules that `target_modules` means. Raises BadCheckpoint where there is none."""
    wanted = options.names(config, "target_modules")
    if not wanted:
        raise BadCheckpoint("config key 'target_modules' is empty; PEFT saves it with the names that were found")
    excluded = options.names(config, "exclude_modules")
    saved = options.listed(config, "modules_to_save")
    layers = options.indices(config, "layers_to_transform")
    prefixes = options.listed(config, "layers_pattern")
    used: set[str] = set()
    found = []
    for module in modules:
        entries = _entries(wanted, module, patterns, "target_modules")
        if not entries or (excluded and _entries(excluded, module, patterns, "exclude_modules")):
            continue
        if any(patterns.full(rf"(.*\.)?{name}(\..*)?", module, "modules_to_save") for name in saved):
            continue
        if layers is not None and not isinstance(wanted, str) and _layer(module, prefixes, patterns) not in layers:
            continue
        used.update(entries)
        found.append(module)
    idle = () if isinstance(wanted, str) else tuple(sorted(set(wanted) - used))
    if not found:
        raise BadCheckpoint(
            f"target_modules {_shown(wanted)} matches no module of this backbone; was the delta made for another one?",
            metadata={"target_modules": _shown(wanted)},
        )
    return Matched(tuple(found), idle)


def _entries(wanted: str | tuple[str, ...], module: str, patterns: Patterns, key: str) -> tuple[str, ...]:
    if isinstance(wanted, str):
        return (wanted,) if patterns.full(wanted, module, key) else ()
    return tuple(name for name in wanted if module == name or module.endswith("." + name))


def _layer(module: str, prefixes: Sequence[str], patterns: Patterns) -> int | None:
    """The number of the layer that a module is in: the first number, or the first behind one of `prefixes`."""
    for prefix in prefixes:
        match = patterns.full(rf"(?:|.*?\.){prefix}\.(?P<index>\d+)\..*", module, "layers_pattern")
        if match:
            return int(match["index"])
    if prefixes:
        return None
    match = patterns.full(r".*?\.[^.]*\.(?P<index>\d+)\..*", module, "layers_to_transform")
    return int(match["index"]) if match else None


def _shown(wanted: str | tuple[str, ...]) -> str:
    text = repr(wanted if isinstance(wanted, str) else sorted(wanted))
    return text if len(text) <= 200 else text[:199] + "…"
