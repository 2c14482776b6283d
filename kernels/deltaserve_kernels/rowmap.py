"""RowMap: for one row axis of a forward, each row's slot and an order that sorts rows by slot."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch

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


class RowMap:
    """Built once per axis and forward; the tensors are made when a kernel first asks for them.

    `rows`: rows of the axis. `runs`: in row order, neighbours of one slot joined, bare rows left out. `active`: the
    distinct slots, sorted.
    """

    def __init__(self, rows: int, runs: tuple[Run, ...], device: torch.device) -> None:
        self.rows = rows
        self.runs = runs
        self.device = device
        self.active: tuple[int, ...] = tuple(sorted({run.slot for run in runs}))
        self.bare = not runs

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

    @cached_property
    def slots(self) -> torch.Tensor:
        """int32 [rows]; BARE for bare rows."""
        host = torch.full((self.rows,), BARE, dtype=torch.int32)
        for run in self.runs:
            host[run.start : run.stop] = run.slot
        return host.to(self.device)

    @cached_property
    def order(self) -> torch.Tensor:
        """int64 [rows that are not bare]: rows sorted by slot, those of one slot in row order."""
        ordered = sorted(self.runs, key=lambda run: (run.slot, run.start))
        pieces = [torch.arange(run.start, run.stop) for run in ordered]
        return (torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)).to(self.device)
