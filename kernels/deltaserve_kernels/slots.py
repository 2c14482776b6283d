"""SlotTable: for one primitive at one site, each slot's tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from deltaserve_kernels.rowmap import RowMap, Run

Made = TypeVar("Made")

_PLANS = 2
"""Forwards of unlike rows that follow each other: a decode step, and one with a prefill in it."""


@dataclass(frozen=True, eq=False)
class Entry:
    """What a slot has here: tensors in the table's column order, None where a column is empty; and its scalars."""

    tensors: tuple[torch.Tensor | None, ...]
    scalars: tuple[float, ...]


class SlotTable:
    """`generation` counts changes, so that what is derived from entries knows when it is stale; `kept` is where kernels
    keep that. Written between forwards, by the thread that launches them.
    """

    strided: frozenset[int] = frozenset()
    """Columns whose tensors may be views: of unit stride in the last dimension, of any in those before it."""

    def __init__(self, columns: int, capacity: int, device: torch.device) -> None:
        self._columns = columns
        self.capacity = capacity
        self.device = device
        self._entries: dict[int, Entry] = {}
        self.generation = 0
        self.kept: dict[str, object] = {}
        self._plans: dict[str, dict[tuple[int, ...], object]] = {}
        self._planned = -1

    def __contains__(self, slot: int) -> bool:
        return slot in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, slot: int, tensors: tuple[torch.Tensor | None, ...], scalars: tuple[float, ...] = ()) -> None:
        """Publishes a slot's tensors; they must stay alive and where they are until `drop`."""
        assert 0 <= slot < self.capacity and len(tensors) == self._columns
        for column, tensor in enumerate(tensors):
            assert tensor is None or tensor.device == self.device
            assert tensor is None or tensor.is_contiguous() or (column in self.strided and tensor.stride(-1) == 1)
        self._entries[slot] = Entry(tensors, scalars)
        self.generation += 1

    def drop(self, slot: int) -> None:
        """Takes a slot's tensors back."""
        del self._entries[slot]
        self.generation += 1

    def discard(self, slot: int) -> None:
        """`drop`, where there is something."""
        if slot in self:
            self.drop(slot)

    def get(self, slot: int) -> Entry | None:
        return self._entries.get(slot)

    def items(self) -> Mapping[int, Entry]:
        """What every slot has here."""
        return self._entries

    def touches(self, rowmap: RowMap) -> bool:
        """Whether any active slot has something here."""
        return bool(self._entries) and not self._entries.keys().isdisjoint(rowmap.active)

    def planned(self, what: str, rowmap: RowMap, make: Callable[[], Made]) -> Made:
        """`make()`: which rows meet which entries, and how. Kept for later forwards of the same runs until a change."""
        if self._planned != self.generation:
            self._plans.clear()
            self._planned = self.generation
        plans = self._plans.setdefault(what, {})
        found = plans.get(rowmap.key)
        if found is None:
            if len(plans) >= _PLANS:
                plans.pop(next(iter(plans)))
            found = plans[rowmap.key] = make()
        return found  # type: ignore[return-value]

    def entries(self, rowmap: RowMap) -> list[tuple[Run, Entry]]:
        """The runs whose slot has something here, in row order."""
        found = self._entries
        return [(run, found[run.slot]) for run in rowmap.runs if run.slot in found]
