"""LowRank: y += scale · (x Aᵀ) Bᵀ for each row's own A and B. LoRA and all else of low rank."""

import torch

from deltaserve_kernels.dispatch import Implementation, choose
from deltaserve_kernels.rowmap import RowMap, Run
from deltaserve_kernels.slots import Entry, SlotTable

_STACKS = 2
_STACKED_ROWS = 4
"""Up to this many rows a run, one batched product over stacked weights beats a loop over runs."""


class LowRankTable(SlotTable):
    """Columns A [r, in] and B [out, r], scalar scale. Ranks differ freely between slots."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        super().__init__(2, capacity, device)
        self._stacks: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        self._stacked_at = -1

    @property
    def cached_bytes(self) -> int:
        """Bytes of the stacked copies."""
        return sum(t.numel() * t.element_size() for stack in self._stacks.values() for t in stack)

    def stack(self, slots: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32 Aᵀ [slots, in, r] and scale · Bᵀ [slots, r, out], ranks padded with zeros to the largest."""
        if self._stacked_at != self.generation:
            self._stacks.clear()
            self._stacked_at = self.generation
        found = self._stacks.get(slots)
        if found is None:
            if len(self._stacks) >= _STACKS:
                self._stacks.pop(next(iter(self._stacks)))
            found = self._stacks[slots] = _stacked([self._entries[s] for s in slots])
        return found


def apply(y: torch.Tensor, x: torch.Tensor, rowmap: RowMap, table: LowRankTable) -> None:
    """y += scale · (x Aᵀ) Bᵀ in place.

    y fp32 [rows, out]; x [rows, in], any float dtype. Products and sums are fp32. Bare rows are not touched.
    """
    if not table.touches(rowmap):
        return
    _PATHS[choose(y.device)](y, x, rowmap, table)


def reference(y: torch.Tensor, x: torch.Tensor, rowmap: RowMap, table: LowRankTable) -> None:
    for run, entry in table.entries(rowmap):
        a, b = _weights(entry)
        y[run.start : run.stop] += entry.scalars[0] * (x[run.start : run.stop].float() @ a.T) @ b.T


def cpu(y: torch.Tensor, x: torch.Tensor, rowmap: RowMap, table: LowRankTable) -> None:
    entries = table.entries(rowmap)
    rows = entries[0][0].rows
    if len(entries) > 1 and rows <= _STACKED_ROWS and all(run.rows == rows for run, _ in entries):
        _batched(y, x, [run for run, _ in entries], rows, table)
        return
    for run, entry in entries:
        a, b = _weights(entry)
        part = y[run.start : run.stop]
        part.addmm_(x[run.start : run.stop].float() @ a.T, b.T, alpha=entry.scalars[0])


def _batched(y: torch.Tensor, x: torch.Tensor, runs: list[Run], rows: int, table: LowRankTable) -> None:
    down, up = table.stack(tuple(run.slot for run in runs))
    together = runs[-1].stop - runs[0].start == rows * len(runs)
    if together:
        where: slice | torch.Tensor = slice(runs[0].start, runs[-1].stop)
    else:
        where = torch.cat([torch.arange(run.start, run.stop) for run in runs])
    added = torch.bmm(torch.bmm(x[where].float().view(len(runs), rows, -1), down), up).flatten(0, 1)
    if isinstance(where, slice):
        y[where] += added
    else:
        y.index_add_(0, where, added)


def _weights(entry: Entry) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = entry.tensors
    assert a is not None and b is not None
    return a.float(), b.float()


def _stacked(entries: list[Entry]) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = [_weights(entry) for entry in entries]
    rank = max(a.shape[0] for a, _ in pairs)
    down = torch.zeros(len(pairs), pairs[0][0].shape[1], rank)
    up = torch.zeros(len(pairs), rank, pairs[0][1].shape[0])
    for i, ((a, b), entry) in enumerate(zip(pairs, entries, strict=True)):
        down[i, :, : a.shape[0]] = a.T
        up[i, : a.shape[0]] = b.T * entry.scalars[0]
    return down, up


_PATHS = {Implementation.REFERENCE: reference, Implementation.CPU: cpu}
