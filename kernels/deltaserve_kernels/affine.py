"""Affine: u = x ⊙ in_scale on the input side, y = y ⊙ scale + shift on the output side. IA³, BitFit."""

from collections.abc import Sequence

import torch

from deltaserve_kernels.dispatch import Implementation, path
from deltaserve_kernels.rowmap import RowMap
from deltaserve_kernels.slots import Entry, SlotTable
from deltaserve_kernels.stacks import Found, Stack, Stacks, by_row

_IN, _SCALE, _SHIFT = range(3)


class AffineTable(SlotTable):
    """Columns in_scale [in], scale [out], shift [out]; any of them may be empty."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        super().__init__(3, capacity, device)
        self.stacks = Stacks(_stacked)

    @property
    def cached_bytes(self) -> int:
        """Bytes of the stacked copies."""
        return self.stacks.nbytes


def scale_input(x: torch.Tensor, rowmap: RowMap, table: AffineTable) -> torch.Tensor:
    """x ⊙ in_scale for rows whose slot has one; x itself where none has.

    x [rows, in], any float dtype; the product is fp32, rounded once to x's dtype. Bare rows are bit-identical.
    """
    if not table.touches(rowmap):
        return x
    found = [each for each in table.entries(rowmap) if each[1].tensors[_IN] is not None]
    if not found:
        return x
    out = x.clone()
    path(_INPUTS, x.device)(out, found, rowmap, table)
    return out


def scale_output(y: torch.Tensor, rowmap: RowMap, table: AffineTable) -> None:
    """y = y ⊙ scale + shift in place. y fp32 [rows, out]; bare rows are not touched."""
    if not table.touches(rowmap):
        return
    found = [each for each in table.entries(rowmap) if any(t is not None for t in each[1].tensors[_SCALE:])]
    if found:
        path(_OUTPUTS, y.device)(y, found, rowmap, table)


def reference_input(out: torch.Tensor, found: Found, rowmap: RowMap, table: AffineTable) -> None:
    for run, entry in found:
        scale = entry.tensors[_IN]
        assert scale is not None
        part = out[run.start : run.stop]
        part.copy_(part.float() * scale.float())


def reference_output(y: torch.Tensor, found: Found, rowmap: RowMap, table: AffineTable) -> None:
    for run, entry in found:
        part, scale, shift = y[run.start : run.stop], entry.tensors[_SCALE], entry.tensors[_SHIFT]
        if scale is not None:
            part.mul_(scale.float())
        if shift is not None:
            part.add_(shift.float())


def cpu_input(out: torch.Tensor, found: Found, rowmap: RowMap, table: AffineTable) -> None:
    """Short runs in one go, each row by its own row of the stack."""
    groups = table.planned("in", rowmap, lambda: by_row(found, rowmap))
    for group in groups.together:
        scale = table.stacks.of(group, table.generation)[_IN]
        assert scale is not None
        for part, rows in group.grid.pieces(out):
            part.mul_(scale[rows])
    reference_input(out, groups.alone, rowmap, table)


def cpu_output(y: torch.Tensor, found: Found, rowmap: RowMap, table: AffineTable) -> None:
    groups = table.planned("out", rowmap, lambda: by_row(found, rowmap))
    for group in groups.together:
        _, scale, shift = table.stacks.of(group, table.generation)
        for part, rows in group.grid.pieces(y):
            if scale is not None:
                part.mul_(scale[rows])
            if shift is not None:
                part.add_(shift[rows])
    reference_output(y, groups.alone, rowmap, table)


def _stacked(entries: Sequence[Entry]) -> Stack:
    """fp32 [slots, width] of each column: ones and zeros where a slot has nothing, None where none has."""
    return tuple(_column([entry.tensors[column] for entry in entries], column) for column in range(3))


def _column(tensors: Sequence[torch.Tensor | None], column: int) -> torch.Tensor | None:
    first = next((tensor for tensor in tensors if tensor is not None), None)
    if first is None:
        return None
    nothing = torch.full(first.shape, float(column != _SHIFT), device=first.device)
    return torch.stack([nothing if tensor is None else tensor.float() for tensor in tensors])


def triton_input(out: torch.Tensor, found: Found, rowmap: RowMap, table: AffineTable) -> None:
    from deltaserve_kernels.gpu import affine

    affine.scale_input(out, rowmap, table)


def triton_output(y: torch.Tensor, found: Found, rowmap: RowMap, table: AffineTable) -> None:
    from deltaserve_kernels.gpu import affine

    affine.scale_output(y, rowmap, table)


_INPUTS = {
    Implementation.REFERENCE: reference_input,
    Implementation.CPU: cpu_input,
    Implementation.TRITON: triton_input,
}
_OUTPUTS = {
    Implementation.REFERENCE: reference_output,
    Implementation.CPU: cpu_output,
    Implementation.TRITON: triton_output,
}
