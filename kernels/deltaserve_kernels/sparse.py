"""Sparse: y += x Sᵀ for a matrix that is nearly all zeros. Diff pruning, SHiRA."""

import torch

from deltaserve_kernels.dispatch import Implementation, path
from deltaserve_kernels.rowmap import RowMap
from deltaserve_kernels.slots import Entry, SlotTable

_INDEX, _VALUES = range(2)
_MOST_PRODUCTS = 1 << 22
"""Products that stand in memory at one time."""

Bags = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Inputs int32 [n] sorted by output, the place int32 [out] where each output's begin, fp32 values [n]."""


class SparseTable(SlotTable):
    """Columns index int32 [2, n] (output, input) and values [n]. A place that occurs twice counts twice."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        super().__init__(2, capacity, device)
        self._bags: dict[int, tuple[Entry, Bags]] = {}

    @property
    def cached_bytes(self) -> int:
        """Bytes of what is kept beside the entries: offsets, and copies of those that were not sorted or not fp32."""
        own = {t.data_ptr() for entry, _ in self._bags.values() for t in entry.tensors if t is not None}
        own |= {entry.tensors[_INDEX][1].data_ptr() for entry, _ in self._bags.values()}  # type: ignore[index]
        kept = [tensor for _, bags in self._bags.values() for tensor in bags]
        return sum(t.numel() * t.element_size() for t in kept if t.data_ptr() not in own)

    def drop(self, slot: int) -> None:
        super().drop(slot)
        self._bags.pop(slot, None)

    def bags(self, slot: int, entry: Entry, outputs: int) -> Bags:
        """A slot's places by output; sorted on first use, and kept until the slot is dropped."""
        found = self._bags.get(slot)
        if found is None or found[0] is not entry:
            found = self._bags[slot] = (entry, _sorted(entry, outputs))
        return found[1]


def apply(y: torch.Tensor, x: torch.Tensor, rowmap: RowMap, table: SparseTable) -> None:
    """y[:, o] += x[:, i] · v for each (o, i, v) of a row's slot, in place.

    y fp32 [rows, out]; x [rows, in], any float dtype; products and sums fp32. Bare rows are not touched.
    """
    if not table.touches(rowmap):
        return
    path(_PATHS, y.device)(y, x, rowmap, table)


def reference(y: torch.Tensor, x: torch.Tensor, rowmap: RowMap, table: SparseTable) -> None:
    for run, entry in table.entries(rowmap):
        index, values = _columns(entry)
        outputs, inputs, numbers = index[0].long(), index[1].long(), values.float()
        step = max(1, _MOST_PRODUCTS // max(1, numbers.shape[0]))
        for start in range(run.start, run.stop, step):
            rows = slice(start, min(start + step, run.stop))
            y[rows].index_add_(1, outputs, x[rows].float()[:, inputs] * numbers)


def cpu(y: torch.Tensor, x: torch.Tensor, rowmap: RowMap, table: SparseTable) -> None:
    """An output is a bag of inputs with weights; what is summed are columns of x, all rows of a run at once."""
    for run, entry in table.entries(rowmap):
        inputs, offsets, values = table.bags(run.slot, entry, y.shape[1])
        if not inputs.shape[0]:
            continue
        part = x[run.start : run.stop].float()
        # The strides of one transposed row are not those that torch has a fast path for.
        columns = part.reshape(-1, 1) if run.rows == 1 else part.T.contiguous()
        added = torch.nn.functional.embedding_bag(inputs, columns, offsets, mode="sum", per_sample_weights=values)
        y[run.start : run.stop] += added.T


def _columns(entry: Entry) -> tuple[torch.Tensor, torch.Tensor]:
    index, values = entry.tensors[_INDEX], entry.tensors[_VALUES]
    assert index is not None and values is not None
    return index, values


def _sorted(entry: Entry, outputs: int) -> Bags:
    index, values = _columns(entry)
    places, inputs, numbers = index[0].long(), index[1], values.float()
    if bool((places[1:] < places[:-1]).any()):
        order = places.argsort(stable=True)
        inputs, numbers = inputs[order], numbers[order]
    counts = torch.bincount(places, minlength=outputs)
    return inputs, (counts.cumsum(0) - counts).int(), numbers


def triton(y: torch.Tensor, x: torch.Tensor, rowmap: RowMap, table: SparseTable) -> None:
    from deltaserve_kernels.gpu import sparse

    sparse.launch(y, x, rowmap, table)


_PATHS = {Implementation.REFERENCE: reference, Implementation.CPU: cpu, Implementation.TRITON: triton}
