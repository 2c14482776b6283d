"""Cut: the queries of a forward's sequences in tiles of a fixed height, and the keys of short sequences in parts.

A row of a tile is one query at one head of a group. Made once for each forward, and read by all of its layers.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import triton

from deltaserve_kernels.attention.sequences import Sequence, Sequences
from deltaserve_kernels.gpu.reads import ATTENTION, PART, Reads
from deltaserve_kernels.staging import Staging

COLUMNS = 8
"""Query start, queries (0: an empty tile), position, key start, keys, slot, first row, place of its partial sums.

The place is -1 where one program reads all keys; else rows of the tile begin there, those of one part together.
"""


@dataclass(frozen=True)
class Heads:
    """Query heads, KV heads and their width."""

    queries: int
    keys: int
    width: int

    @property
    def group(self) -> int:
        return self.queries // self.keys


@dataclass(frozen=True)
class Key:
    """What a forward's layers with the same cut have in common."""

    heads: Heads
    fp32: bool
    biased: bool


@dataclass(eq=False)
class Cut:
    """For sequences whose keys are in the cache, or for those whose keys are this forward's own.

    `tiles` int32 [tiles, COLUMNS] on the device; `split`: those of them whose keys are read in parts, None if there are
    none. `parts`: of the longest. `rows`: of the highest split tile. `places`: rows of partial sums.
    `last_query`, `last_key`, `last_slot`: what a launch may not be short of.
    """

    cached: bool
    parts: int
    rows: int
    places: int
    last_query: int
    last_key: int
    last_slot: int
    tiles: torch.Tensor = field(init=False)
    split: torch.Tensor | None = None

    def check(self, queries: int, keys: int, slots: int) -> None:
        """Raises ValueError where there are fewer query rows, key rows or slots than its sequences name."""
        for what, last, there in (
            ("queries", self.last_query, queries),
            ("keys", self.last_key, keys),
            ("a slot", self.last_slot + 1, slots),
        ):
            if last > there:
                raise ValueError(f"sequences: one has {what} up to {last}, and there are {there}")


@dataclass(frozen=True, eq=False)
class Cuts:
    """`queries` of all sequences; `reads` says how they are cut."""

    queries: int
    reads: Reads
    all: tuple[Cut, ...]


def of(sequences: Sequences, heads: Heads, fp32: bool, biased: bool, device: torch.device) -> Cuts:
    """For `heads` of rows in `fp32` or halves, `biased` or not. Raises ValueError where a sequence is not possible."""
    key = Key(heads, fp32, biased)
    if key not in sequences.kept:
        staging = Staging(device)
        stage(sequences, key, staging)
        staging.ship()
    found = sequences.kept[key]
    assert isinstance(found, Cuts)
    return found


def stage(sequences: Sequences, key: object, staging: Staging) -> None:
    """Cuts ahead, so that the tiles go to the device with everything else: `key` is of `sequences.kept` of an earlier
    forward. Raises as `of`.
    """
    if isinstance(key, Key):
        items = sequences.items
        rows = sum(item.queries for item in items) * key.heads.group
        reads = ATTENTION.choose(rows / max(1, len(items)), key.heads.width, key.fp32, key.biased)
        sequences.kept[key] = _cuts(items, key.heads.group, reads, staging)


def _cuts(items: tuple[Sequence, ...], group: int, reads: Reads, staging: Staging) -> Cuts:
    for number, item in enumerate(items):
        if min(item.query_start, item.queries, item.position, item.key_start, item.keys, item.slot + 1) < 0:
            raise ValueError(f"sequences: number {number} has a negative range or slot: {item}")
    kinds = ((cached, [item for item in items if item.queries and item.cached == cached]) for cached in (False, True))
    cuts = tuple(_cut(cached, found, group, reads, staging) for cached, found in kinds if found)
    return Cuts(sum(item.queries for item in items), reads, cuts)


def _cut(cached: bool, items: list[Sequence], group: int, reads: Reads, staging: Staging) -> Cut:
    tiles, split = [], []
    parts, tallest, places = 1, 0, 0
    for item in items:
        rows, several = item.queries * group, triton.cdiv(item.keys, PART)
        known = (item.query_start, item.queries, item.position, item.key_start, item.keys, item.slot)
        if several > 1 and rows <= reads.m:
            split.append((*known, 0, places))
            tiles.append(split[-1])
            parts, tallest, places = max(parts, several), max(tallest, rows), places + several * rows
        else:
            tiles += [(*known, first, -1) for first in range(0, rows, reads.m)]
    made = Cut(
        cached,
        parts,
        tallest,
        places,
        last_query=max(item.query_start + item.queries for item in items),
        last_key=max(item.key_start + item.keys for item in items),
        last_slot=max(item.slot for item in items),
    )
    staging.put(_numbers(tiles), torch.int32, lambda tensor: setattr(made, "tiles", tensor))
    if split:
        staging.put(_numbers(split), torch.int32, lambda tensor: setattr(made, "split", tensor))
    return made


def _numbers(rows: Iterable[tuple[int, ...]]) -> torch.Tensor:
    return torch.tensor(list(rows), dtype=torch.int32)
