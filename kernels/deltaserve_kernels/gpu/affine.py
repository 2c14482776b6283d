"""Affine as one elementwise kernel: out = x ⊙ scale + shift, each row its own. IA³ (arXiv 2205.05638), BitFit."""

import torch
import triton
import triton.language as tl

from deltaserve_kernels.gpu.board import KINDS, Board
from deltaserve_kernels.gpu.numbers import numbers
from deltaserve_kernels.rowmap import RowMap
from deltaserve_kernels.slots import Entry, SlotTable

COLUMNS = 7
"""Whether there is something, then address and kind of in_scale, scale and shift."""
IN_SCALE, SCALE, SHIFT = 1, 3, 5
N = 1024
WARPS = 4


@triton.jit
def affine(
    x, out, slots, board, x_stride, out_stride, width,
    COLUMNS: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One row and N of its numbers. SCALE and SHIFT are columns of the board, 0 for none. `out` may be `x`."""
    row, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * N + tl.arange(0, N)
    inside = n < width
    given = tl.load(x + row * x_stride + n, mask=inside, other=0.0)
    total = given.to(tl.float32)
    slot = tl.load(slots + row)
    if slot >= 0:
        here = board + slot.to(tl.int64) * COLUMNS
        scale = tl.load(here + SCALE)
        if scale != 0:
            total *= numbers(scale, tl.load(here + SCALE + 1), n, inside)
        if SHIFT > 0:
            shift = tl.load(here + SHIFT)
            if shift != 0:
                total += numbers(shift, tl.load(here + SHIFT + 1), n, inside)
    tl.store(out + row * out_stride + n, total.to(out.dtype.element_ty), mask=inside)


def row(entry: Entry) -> tuple[int, ...]:
    """A slot's row of the board."""
    told = [1]
    for tensor in entry.tensors:
        told += [0, 0] if tensor is None else [tensor.data_ptr(), KINDS[tensor.dtype]]
    return tuple(told)


def scaled_input(x: torch.Tensor, rowmap: RowMap, table: SlotTable) -> torch.Tensor:
    """x ⊙ in_scale, fp32 rounded once to x's dtype; rows of slots that have none are bit-identical. x [rows, in]."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(x, out, rowmap, table, IN_SCALE, 0)
    return out


def scale_output(y: torch.Tensor, rowmap: RowMap, table: SlotTable) -> None:
    """y = y ⊙ scale + shift in place. y [rows, out], any float dtype."""
    _launch(y, y, rowmap, table, SCALE, SHIFT)


def _launch(x: torch.Tensor, out: torch.Tensor, rowmap: RowMap, table: SlotTable, scale: int, shift: int) -> None:
    board = Board.of(table, COLUMNS, row).rows()
    affine[(x.shape[0], triton.cdiv(x.shape[1], N))](
        x, out, rowmap.slots, board, x.stride(0), out.stride(0), x.shape[1],
        COLUMNS=COLUMNS, SCALE=scale, SHIFT=shift, N=N, num_warps=WARPS,
    )  # fmt: skip
