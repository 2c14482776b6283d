"""Affine: u = x ⊙ in_scale on the input side, y = y ⊙ scale + shift on the output side. IA³, BitFit."""

import torch

from deltaserve_kernels.rowmap import RowMap
from deltaserve_kernels.slots import SlotTable

_IN, _SCALE, _SHIFT = range(3)


class AffineTable(SlotTable):
    """Columns in_scale [in], scale [out], shift [out]; any of them may be empty."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        super().__init__(3, capacity, device)


def scale_input(x: torch.Tensor, rowmap: RowMap, table: AffineTable) -> torch.Tensor:
    """x ⊙ in_scale for rows whose slot has one; x itself where none has.

    x [rows, in], any float dtype; the product is fp32, rounded once to x's dtype. Bare rows are bit-identical.
    """
    if not table.touches(rowmap):
        return x
    out = x
    for run, entry in table.entries(rowmap):
        scale = entry.tensors[_IN]
        if scale is not None:
            out = x.clone() if out is x else out
            out[run.start : run.stop] = (x[run.start : run.stop].float() * scale.float()).to(x.dtype)
    return out


def scale_output(y: torch.Tensor, rowmap: RowMap, table: AffineTable) -> None:
    """y = y ⊙ scale + shift in place. y fp32 [rows, out]; bare rows are not touched."""
    if not table.touches(rowmap):
        return
    for run, entry in table.entries(rowmap):
        part, scale, shift = y[run.start : run.stop], entry.tensors[_SCALE], entry.tensors[_SHIFT]
        if scale is not None:
            part.mul_(scale.float())
        if shift is not None:
            part.add_(shift.float())
