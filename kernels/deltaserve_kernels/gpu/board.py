"""Board: what a kernel knows of each slot at one site, one row of int64 a slot on the device."""

import struct
from collections.abc import Callable, Mapping, Sequence

import torch

from deltaserve_kernels.slots import Entry, SlotTable

NOTHING = 0
"""In column 0: the slot has nothing here. A kind is never 0."""

KINDS: Mapping[torch.dtype, int] = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
"""Column 0 of every board, the dtype of a slot's weights: one launch serves one dtype, and most batches have one."""


def bits(number: float) -> int:
    """A float32 as an integer, so that a row holds scalars too; a kernel casts it back."""
    return int(struct.unpack("<i", struct.pack("<f", number))[0])


class Board:
    """Follows a SlotTable. `row` says what a kernel wants to know of an entry, the kind first.

    It raises ValueError for an entry that the kernel could not read. Memory stays where it is for ever: rows are
    overwritten in place, between forwards.
    """

    def __init__(self, table: SlotTable, columns: int, row: Callable[[int, Entry], Sequence[int]]) -> None:
        self._table = table
        self._row = row
        self._columns = columns
        self._shown: dict[int, Entry] = {}
        self._generation = -1
        self._rows: torch.Tensor | None = None

    @classmethod
    def of(cls, table: SlotTable, columns: int, row: Callable[..., Sequence[int]], *told: float) -> "Board":
        """The table's board for rows of these widths (`told`, which `row` gets too); made when a kernel first asks."""
        name = f"{row.__module__}.{row.__name__} {told}"
        found = table.kept.get(name)
        if found is None:
            found = table.kept[name] = cls(table, columns, lambda slot, entry: row(slot, entry, *told))
        assert isinstance(found, cls)
        return found

    def rows(self) -> torch.Tensor:
        """int64 [capacity, columns], up to date."""
        if self._rows is None:
            self._rows = torch.zeros(self._table.capacity, self._columns, dtype=torch.int64, device=self._table.device)
        if self._generation != self._table.generation:
            self._follow(self._rows)
            self._generation = self._table.generation
        return self._rows

    def _follow(self, rows: torch.Tensor) -> None:
        now = self._table.items()
        for slot in self._shown.keys() - now.keys():
            rows[slot] = NOTHING
        for slot, entry in now.items():
            if self._shown.get(slot) is not entry:
                rows[slot] = torch.tensor(self._row(slot, entry), dtype=torch.int64)
        self._shown = dict(now)
