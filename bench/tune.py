"""Tiles for one chip: from those that a kernel takes now, whatever change of one number makes it faster is kept."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

import deltaserve_kernels.gpu
from bench.floors import seconds
from bench.primitives import FULL, TINY, Primitive, Work, primitives
from deltaserve_kernels.dispatch import Implementation, forced
from deltaserve_kernels.gpu.tuning import DEFAULT, FILE, TABLES, Table, Tiles, architecture, written

__all__ = ["PACKAGED", "architecture", "tuned", "written"]

PACKAGED = Path(deltaserve_kernels.gpu.__file__).parent / FILE
INTERPRETED = "interpreted"
"""The name of what is found without a chip."""
_FASTER = 0.98
"""Of the time that the best one took: less is no difference."""
_CHOICES: Mapping[str, tuple[int, ...]] = {
    "n": (32, 64, 128, 256),
    "r": (16, 32, 64),
    "k": (32, 64, 128, 256),
    "split": (1, 2, 4, 8, 16),
    "warps": (2, 4, 8),
}
_TURNS: Mapping[str, tuple[str, ...]] = {
    "low rank": ("split", "k", "n", "r", "warps"),
    "dense": ("n", "k", "warps"),
    "block": ("n", "warps"),
}
"""What each kernel reads of its tiles. The height stays: regimes are told apart by it."""
_FOLLOWS = "activated"
"""Reads what `low rank` has shrunk, in as many parts."""
_REGIMES = (Work("a row each", 32, 1, 32), Work("some rows each", 8, 16, 8), Work("many rows each", 4, 256, 4))
_TINY = (Work("a row each", 3, 1, 3), Work("some rows each", 2, 5, 2), Work("many rows each", 1, 70, 1))


def tuned(device: torch.device, end: float, *, tiny: bool, say: Callable[[str], None]) -> Mapping[str, Table]:
    """All tables, with what was found for this chip until `end` on the monotonic clock; other chips' stay.

    Times alone are looked at: whether results are right is `python -m bench gpu`'s to say.
    """
    chip = architecture(device)
    named = INTERPRETED if chip == DEFAULT else chip
    found = {}
    for name, table in TABLES.items():
        regimes = list(table.of(chip))
        if name == _FOLLOWS:
            found[name] = table
            continue
        for number, regime in enumerate(regimes):
            work = (_TINY if tiny else _REGIMES)[number if len(regimes) == 3 else (0, 2)[number]]
            best = _best(name, table, number, regime.tiles, work, device, end, tiny=tiny, say=say)
            regimes[number] = replace(regime, tiles=best)
        found[name] = replace(table, tuned={**table.tuned, named: tuple(regimes)})
    shrunk = found["low rank"].tuned[named]
    follows = TABLES[_FOLLOWS]
    own = tuple(
        replace(regime, tiles=replace(regime.tiles, split=other.tiles.split))
        for regime, other in zip(follows.of(chip), shrunk, strict=True)
    )
    found[_FOLLOWS] = replace(follows, tuned={**follows.tuned, named: own})
    return found


def _best(
    name: str, table: Table, number: int, now: Tiles, work: Work, device: torch.device, end: float, *,
    tiny: bool, say: Callable[[str], None],
) -> Tiles:  # fmt: skip
    size, dtype = (TINY, torch.float32) if tiny else (FULL, torch.bfloat16)
    one = next(each for each in primitives(work, size, device, dtype) if each.name.startswith(name))
    rounds = 1 if tiny else 15
    fastest = _time(one, table, number, now, device, rounds)
    assert fastest is not None, f"{name}: {now}, which it takes now, does not run here"
    before, tried, going = fastest, {now}, True
    while going and time.monotonic() < end:
        going = False
        for other in _neighbours(name, now, tiny=tiny):
            if other in tried or time.monotonic() >= end:
                continue
            tried.add(other)
            took = _time(one, table, number, other, device, rounds)
            if took is not None and took < _FASTER * fastest:
                now, fastest, going = other, took, not tiny
    say(f"{name}, {work.name}: {len(tried)} tried, {before * 1e6:.1f} µs → {fastest * 1e6:.1f} µs, {now}")
    return now


def _neighbours(name: str, tiles: Tiles, *, tiny: bool) -> Iterator[Tiles]:
    """One number differs; of each the values beside its own."""
    for what in _TURNS[name][: 1 if tiny else None]:
        values = _CHOICES[what]
        at = min(range(len(values)), key=lambda place: abs(values[place] - getattr(tiles, what)))
        for place in (at - 1, at, at + 1):
            if 0 <= place < len(values) and values[place] != getattr(tiles, what):
                yield replace(tiles, **{what: values[place]})


def _time(one: Primitive, table: Table, number: int, tiles: Tiles, device: torch.device, rounds: int) -> float | None:
    """None where the chip has not what it takes."""
    with forced(Implementation.TRITON), table.trying(number, tiles):
        try:
            return median(seconds(one, device, rounds))
        except (OutOfResources, CompilationError):
            return None
