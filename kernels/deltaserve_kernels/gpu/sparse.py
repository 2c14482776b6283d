"""Sparse as one kernel: y += x Sᵀ, an output at a time summing the few inputs that it has. SHiRA (arXiv 2406.13175)."""

import torch
import triton
import triton.language as tl

from deltaserve_kernels.gpu import demands
from deltaserve_kernels.gpu.board import Board
from deltaserve_kernels.gpu.tiling import members, owner, tiles
from deltaserve_kernels.rowmap import RowMap
from deltaserve_kernels.slots import Entry
from deltaserve_kernels.sparse import SparseTable

COLUMNS = 5
"""Whether there is something, inputs int32 [n] by output, where each output's begin int32 [out], values fp32 [n], n."""
M, N, WARPS = 4, 128, 4


@triton.jit
def sparse(
    y, x, order, tiles, board, y_stride, x_stride, width,
    COLUMNS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """y[row, n] += Σ x[row, inputs[i]] · values[i] over n's i, for the rows of one tile and N outputs."""
    tile, part = tl.program_id(0), tl.program_id(1)
    here, kind = owner(tiles, board, tile, COLUMNS)
    if kind == 0:
        return
    places, live = members(tiles, tile, M)
    rows = tl.load(order + places, mask=live, other=0)
    inputs = tl.load(here + 1).to(tl.pointer_type(tl.int32))
    begins = tl.load(here + 2).to(tl.pointer_type(tl.int32))
    values = tl.load(here + 3).to(tl.pointer_type(tl.float32))
    whole = tl.load(here + 4).to(tl.int32)
    n = part * N + tl.arange(0, N)
    inside = n < width
    begin = tl.load(begins + n, mask=inside, other=0)
    end = tl.load(begins + n + 1, mask=n + 1 < width, other=whole)
    most = tl.max(tl.where(inside, end - begin, 0), 0)
    acc = tl.zeros((M, N), dtype=tl.float32)
    for i in range(0, most):
        some = inside & (begin + i < end)
        k = tl.load(inputs + begin + i, mask=some, other=0)
        value = tl.load(values + begin + i, mask=some, other=0.0)
        given = tl.load(
            x + rows[:, None] * x_stride + k[None, :], mask=live[:, None] & some[None, :], other=0.0
        ).to(tl.float32)  # fmt: skip
        acc += given * value[None, :]
    out = y + rows[:, None] * y_stride + n[None, :]
    seen = live[:, None] & inside[None, :]
    tl.store(out, (tl.load(out, mask=seen, other=0.0).to(tl.float32) + acc).to(y.dtype.element_ty), mask=seen)


def launch(y: torch.Tensor, x: torch.Tensor, rowmap: RowMap, table: SparseTable) -> None:
    """y += x Sᵀ in place. y [rows, out], x [rows, in], of any float dtype; places are within both.

    Raises ValueError, before anything is launched, where rows, a slot or what it has cannot be read so.
    """

    def row(slot: int, entry: Entry, outputs: int) -> tuple[int, ...]:
        index = demands.tensor("index", slot, entry.tensors[0], (2, None), dtypes=(torch.int32,))
        demands.tensor("values", slot, entry.tensors[1], (index.shape[1],))
        inputs, begins, values = table.bags(slot, entry, outputs)
        return (1, inputs.data_ptr(), begins.data_ptr(), values.data_ptr(), inputs.shape[0])

    demands.rows(rowmap, table, y=y, x=x)
    board = Board.of(table, COLUMNS, row, y.shape[1]).rows()
    cut = tiles(rowmap, M)
    sparse[(len(cut), triton.cdiv(y.shape[1], N))](
        y, x, rowmap.order, cut, board, y.stride(0), x.stride(0), y.shape[1],
        COLUMNS=COLUMNS, M=M, N=N, num_warps=WARPS,
    )  # fmt: skip
