"""Rows: rows of an embedding, or outputs of a vocabulary linear, that are others for some slots. Trainable tokens."""

import torch

from deltaserve_kernels.dispatch import Implementation, path
from deltaserve_kernels.rowmap import RowMap
from deltaserve_kernels.slots import SlotTable

_INDEX, _VALUES = range(2)


class RowsTable(SlotTable):
    """Columns index int32 [n], sorted and distinct, and values [n, width]."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        super().__init__(2, capacity, device)


def replace_rows(y: torch.Tensor, ids: torch.Tensor, rowmap: RowMap, table: RowsTable, scale: float = 1.0) -> None:
    """At an embedding: y[row] = scale · values[k] where ids[row] = index[k], in place.

    y [rows, width], any float dtype; ids int64 [rows]. Bare rows and other ids are not touched.
    """
    if table.touches(rowmap):
        path(_ROWS, y.device)(y, ids, rowmap, table, scale)


def reference_rows(y: torch.Tensor, ids: torch.Tensor, rowmap: RowMap, table: RowsTable, scale: float) -> None:
    for run, entry in table.entries(rowmap):
        index, values = entry.tensors[_INDEX], entry.tensors[_VALUES]
        assert index is not None and values is not None
        own = ids[run.start : run.stop]
        place = torch.searchsorted(index.long(), own).clamp_max(index.shape[0] - 1)
        hit = index.long()[place] == own
        found = values[place].float() * scale
        part = y[run.start : run.stop]
        part.copy_(torch.where(hit.unsqueeze(1), found.to(y.dtype), part))


def replace_outputs(y: torch.Tensor, x: torch.Tensor, rowmap: RowMap, table: RowsTable) -> None:
    """At a vocabulary linear: y[:, index] = x valuesᵀ, in place. y fp32 [rows, vocabulary]; x [rows, in]."""
    if not table.touches(rowmap):
        return
    path(_OUTPUTS, y.device)(y, x, rowmap, table)


def reference(y: torch.Tensor, x: torch.Tensor, rowmap: RowMap, table: RowsTable) -> None:
    for run, entry in table.entries(rowmap):
        index, values = entry.tensors[_INDEX], entry.tensors[_VALUES]
        assert index is not None and values is not None
        y[run.start : run.stop, index.long()] = x[run.start : run.stop].float() @ values.float().T


def triton(y: torch.Tensor, x: torch.Tensor, rowmap: RowMap, table: RowsTable) -> None:
    from deltaserve_kernels.gpu import dense

    dense.replace_outputs(y, x, rowmap, table)


def triton_rows(y: torch.Tensor, ids: torch.Tensor, rowmap: RowMap, table: RowsTable, scale: float) -> None:
    from deltaserve_kernels.gpu import embed

    embed.replace_rows(y, ids, rowmap, table, scale)


_ROWS = {Implementation.REFERENCE: reference_rows, Implementation.TRITON: triton_rows}
_OUTPUTS = {Implementation.REFERENCE: reference, Implementation.TRITON: triton}
