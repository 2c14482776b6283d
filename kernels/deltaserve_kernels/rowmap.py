"""RowMap: for one row axis of a forward, each row's slot and an order that sorts rows by slot."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from deltaserve_kernels.staging import Staging

BARE = -1
"""The slot of rows that have no delta, and of padding."""


@dataclass(frozen=True)
class Run:
    """Rows [start, stop) that stand together and have one slot, which is never BARE."""

    slot: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, eq=False)
class Grid:
    """The rows of some runs as [runs, depth]; a run of fewer rows has its last one several times.

    `rows`: where they stand, a slice where that is one. `each` int64 [rows]: the number of a row's run. `padded` int64
    [runs · depth] and `back` int64 [rows], None where all runs are equally long: the rows to take, and where each of
    them is then. `starts`, `lengths`: of the pieces of `rows` that stand together.
    """

    runs: int
    depth: int
    rows: slice | torch.Tensor
    each: torch.Tensor
    padded: torch.Tensor | None
    back: torch.Tensor | None
    starts: tuple[int, ...]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, runs: Sequence[Run], device: torch.device) -> "Grid":
        """Of at least one run, in row order."""
        depth = max(run.rows for run in runs)
        numbers = [row for run in runs for row in range(run.start, run.stop)]
        together = numbers[-1] - numbers[0] + 1 == len(numbers)
        rows = slice(numbers[0], numbers[-1] + 1) if together else torch.tensor(numbers, device=device)
        each = torch.tensor([number for number, run in enumerate(runs) for _ in range(run.rows)], device=device)
        pieces: list[tuple[int, int]] = []
        for run in runs:
            if pieces and sum(pieces[-1]) == run.start:
                pieces[-1] = (pieces[-1][0], pieces[-1][1] + run.rows)
            else:
                pieces.append((run.start, run.rows))
        starts, lengths = zip(*pieces, strict=True)
        if all(run.rows == depth for run in runs):
            return cls(len(runs), depth, rows, each, None, None, starts, lengths)
        padded = [min(run.start + at, run.stop - 1) for run in runs for at in range(depth)]
        back = [number * depth + at for number, run in enumerate(runs) for at in range(run.rows)]
        taken, back_to = torch.tensor(padded, device=device), torch.tensor(back, device=device)
        return cls(len(runs), depth, rows, each, taken, back_to, starts, lengths)

    def taken(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows of the axis, width] -> [runs, depth, width]."""
        found = x[self.rows] if self.padded is None else x.index_select(0, self.padded)
        return found.view(self.runs, self.depth, -1)

    def pieces(self, x: torch.Tensor) -> Iterator[tuple[torch.Tensor, slice]]:
        """Views of x, a piece of rows that stand together at a time, and where in `rows` they are."""
        at = 0
        for start, length in zip(self.starts, self.lengths, strict=True):
            yield x[start : start + length], slice(at, at + length)
            at += length

    def put(self, out: torch.Tensor, values: torch.Tensor) -> None:
        """out[rows] = values [rows, width], a piece at a time: an indexed write wakes all threads for a few rows."""
        for part, rows in self.pieces(out):
            part.copy_(values[rows])

    def add(self, out: torch.Tensor, values: torch.Tensor) -> None:
        """out[rows] += values [rows, width], as `put`."""
        for part, rows in self.pieces(out):
            part.add_(values[rows])

    def given(self, y: torch.Tensor) -> torch.Tensor:
        """y [runs, depth, width] -> [rows, width], as they stand in `rows`."""
        flat = y.reshape(self.runs * self.depth, -1)
        return flat if self.back is None else flat.index_select(0, self.back)


class RowMap:
    """Built once per axis and forward; the tensors are made when a kernel first asks for them.

    `rows`: rows of the axis. `runs`: in row order, neighbours of one slot joined, bare rows left out. `active`: the
    distinct slots, sorted. `kept`: what kernels derive from it, so that every layer of a forward finds it made. `key`:
    equal for maps whose runs are, whatever forward they were made for.
    """

    def __init__(self, rows: int, runs: tuple[Run, ...], device: torch.device) -> None:
        self.rows = rows
        self.runs = runs
        self.device = device
        self.active: tuple[int, ...] = tuple(sorted({run.slot for run in runs}))
        self.bare = not runs
        self.key = tuple([number for run in runs for number in (run.slot, run.start, run.stop)])
        self._grids: dict[tuple[int, ...], Grid] = {}
        self.kept: dict[tuple[str, int], torch.Tensor] = {}
        self._repeated: dict[int, RowMap] = {}

    @classmethod
    def of(cls, runs: Iterable[tuple[int, int]], device: torch.device) -> "RowMap":
        """From (slot, count) in row order; a count may be 0."""
        joined: list[Run] = []
        at = 0
        for slot, count in runs:
            if count and slot != BARE:
                if joined and joined[-1].slot == slot and joined[-1].stop == at:
                    joined[-1] = Run(slot, joined[-1].start, at + count)
                else:
                    joined.append(Run(slot, at, at + count))
            at += count
        return cls(at, tuple(joined), device)

    def grid(self, runs: Sequence[Run]) -> Grid:
        """Of some of `runs`; all layers of a forward ask for the same few."""
        key = tuple([run.start for run in runs])
        found = self._grids.get(key)
        if found is None:
            found = self._grids[key] = Grid.of(runs, self.device)
        return found

    def repeated(self, times: int) -> "RowMap":
        """Of an axis that has each row so many times, one after the other."""
        found = self._repeated.get(times)
        if found is None:
            runs = tuple(Run(run.slot, run.start * times, run.stop * times) for run in self.runs)
            found = self._repeated[times] = RowMap(self.rows * times, runs, self.device)
        return found

    @cached_property
    def slots(self) -> torch.Tensor:
        """int32 [rows]; BARE for bare rows."""
        return self._slots().to(self.device)

    @cached_property
    def order(self) -> torch.Tensor:
        """int64 [rows that are not bare]: rows sorted by slot, those of one slot in row order."""
        return self._order().to(self.device)

    def tiles(self, height: int) -> torch.Tensor:
        """int32 [tiles, 3], of `order` cut: a tile's slot, where in the order it begins, its rows, `height` at most.

        Made once for each height.
        """
        found = self.kept.get(("tiles", height))
        if found is None:
            found = self.kept["tiles", height] = self._tiles(height).to(self.device)
        return found

    @property
    def asked(self) -> frozenset[int]:
        """Heights of the tiles that kernels asked for; 0 stands for `slots` and `order`."""
        whole = {0} if "slots" in self.__dict__ or "order" in self.__dict__ else set()
        return frozenset(whole | {height for name, height in self.kept if name == "tiles"})

    def stage(self, staging: Staging, asked: Iterable[int]) -> None:
        """Makes what kernels will ask for ahead, so that it goes to the device with everything else; see `asked`."""
        if not self.runs:
            return
        for height in asked:
            if height:
                self._kept_from(staging, height)
            else:
                staging.put(self._slots(), torch.int32, lambda tensor: self.__dict__.update(slots=tensor))
                staging.put(self._order(), torch.int64, lambda tensor: self.__dict__.update(order=tensor))

    def _kept_from(self, staging: Staging, height: int) -> None:
        staging.put(self._tiles(height), torch.int32, lambda tensor: self.kept.update({("tiles", height): tensor}))

    def _slots(self) -> torch.Tensor:
        host = torch.full((self.rows,), BARE, dtype=torch.int32)
        for run in self.runs:
            host[run.start : run.stop] = run.slot
        return host

    def _order(self) -> torch.Tensor:
        ordered = sorted(self.runs, key=lambda run: (run.slot, run.start))
        pieces = [torch.arange(run.start, run.stop) for run in ordered]
        return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)

    def _tiles(self, height: int) -> torch.Tensor:
        counts: dict[int, int] = {}
        for run in self.runs:
            counts[run.slot] = counts.get(run.slot, 0) + run.rows
        cut, at = [], 0
        for slot in sorted(counts):
            for first in range(0, counts[slot], height):
                cut.append((slot, at + first, min(height, counts[slot] - first)))
            at += counts[slot]
        return torch.tensor(cut, dtype=torch.int32).reshape(-1, 3)
