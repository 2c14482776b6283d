"""Sparse: y += x Sᵀ for a matrix that is nearly all zeros. Diff pruning, SHiRA."""

import torch

from deltaserve_kernels.rowmap import RowMap
from deltaserve_kernels.slots import SlotTable

_INDEX, _VALUES = range(2)
_MOST_PRODUCTS = 1 << 22
"""Products that stand in memory at one time."""


class SparseTable(SlotTable):
    """Columns index int32 [2, n] (output, input) and values [n]. A place that occurs twice counts twice."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        super().__init__(2, capacity, device)


def apply(y: torch.Tensor, x: torch.Tensor, rowmap: RowMap, table: SparseTable) -> None:
    """y[:, o] += x[:, i] · v for each (o, i, v) of a row's slot, in place.

    y fp32 [rows, out]; x [rows, in], any float dtype; products and sums fp32. Bare rows are not touched.
    """
    if not table.touches(rowmap):
        return
    for run, entry in table.entries(rowmap):
        index, values = entry.tensors[_INDEX], entry.tensors[_VALUES]
        assert index is not None and values is not None
        outputs, inputs, numbers = index[0].long(), index[1].long(), values.float()
        step = max(1, _MOST_PRODUCTS // max(1, numbers.shape[0]))
        for start in range(run.start, run.stop, step):
            rows = slice(start, min(start + step, run.stop))
            y[rows].index_add_(1, outputs, x[rows].float()[:, inputs] * numbers)
