"""Block as one kernel: rows times a block-diagonal matrix. OFT (arXiv 2306.07280), RoAd (2409.00119)."""

import torch
import triton
import triton.language as tl

from deltaserve_kernels.gpu import demands
from deltaserve_kernels.gpu.board import KINDS, Board
from deltaserve_kernels.gpu.launch import TYPES, kinds, precision
from deltaserve_kernels.gpu.tiling import members, owner, tiles
from deltaserve_kernels.gpu.tuning import BLOCK
from deltaserve_kernels.rowmap import RowMap
from deltaserve_kernels.slots import Entry, SlotTable

COLUMNS = 4
"""Kind, blocks [n, b, b] or [m, b, b, s], b, s (1 where what a block turns stands together)."""


@triton.jit
def block(
    x, out, order, tiles, board, x_stride, out_stride, width,
    KIND: tl.constexpr, TYPE: tl.constexpr, COLUMNS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out[row, j] = Σ x[row, first of j's block + i] · R[block, i, j], for one tile's rows and N of the width.

    Where blocks are multiples of N, each program stays inside one, and the sum is a product of tiles.
    """
    tile, part = tl.program_id(0), tl.program_id(1)
    here, kind = owner(tiles, board, tile, COLUMNS)
    if kind != KIND:
        return
    blocks, b = tl.load(here + 1).to(tl.pointer_type(TYPE)), tl.load(here + 2).to(tl.int32)
    places, live = members(tiles, tile, M)
    rows = tl.load(order + places, mask=live, other=0)
    n = part * N + tl.arange(0, N)
    inside = n < width
    acc = tl.zeros((M, N), dtype=tl.float32)
    apart = tl.load(here + 3).to(tl.int32)
    if (M > 1) & (b % N == 0) & (apart == 1):
        begin = part * N // b * b
        matrix = blocks + begin.to(tl.int64) * b + (n - begin)
        for start in range(0, b, N):
            i = start + tl.arange(0, N)
            given = tl.load(x + rows[:, None] * x_stride + (begin + i)[None, :], mask=live[:, None], other=0.0)
            r = tl.load(matrix[None, :] + i[:, None] * b, mask=inside[None, :], other=0.0)
            if M > 1:
                acc = tl.dot(given.to(tl.float32), r.to(tl.float32), acc, input_precision=PRECISION)
    else:
        begins = n // (b * apart) * (b * apart)
        shift = n % apart
        matrix = blocks + begins.to(tl.int64) * b + (n - begins)
        for i in range(0, b):
            given = tl.load(
                x + rows[:, None] * x_stride + (begins + i * apart + shift)[None, :],
                mask=live[:, None] & inside[None, :], other=0.0,
            )  # fmt: skip
            r = tl.load(matrix + i * b * apart, mask=inside, other=0.0)
            acc += given.to(tl.float32) * r.to(tl.float32)[None, :]
    place = out + rows[:, None] * out_stride + n[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=live[:, None] & inside[None, :])


def row(slot: int, entry: Entry, width: int) -> tuple[int, ...]:
    """A slot's row of the board."""
    given = entry.tensors[0]
    b = 0 if given is None or given.ndim not in (3, 4) else given.shape[1]
    apart = 1 if given is None or given.ndim != 4 else given.shape[3]
    shape = (width // max(1, b * apart), b, b, apart)
    blocks = demands.tensor("blocks", slot, given, shape[: 3 + (given is not None and given.ndim == 4)])
    if blocks.shape[0] * b * apart != width:
        raise ValueError(f"blocks: of slot {slot}, shape {tuple(blocks.shape)}; rows are {width} wide")
    return (KINDS[blocks.dtype], blocks.data_ptr(), b, apart)


def launch(out: torch.Tensor, x: torch.Tensor, rowmap: RowMap, table: SlotTable) -> None:
    """Writes x · diag(R_1, ...), fp32 rounded once, to the rows of `out` that have blocks; `out` may be x.

    Raises ValueError, before anything is launched, where rows, a slot or what it has cannot be read so.
    """
    demands.rows(rowmap, table, out=out, x=x)
    if out.shape != x.shape:
        raise ValueError(f"out: shape {tuple(out.shape)}; x has {tuple(x.shape)}")
    x = x.clone() if out is x else x
    plan, board = BLOCK.choose(rowmap), Board.of(table, COLUMNS, row, x.shape[1]).rows()
    cut = tiles(rowmap, plan.m)
    for dtype in kinds(entry for _, entry in table.entries(rowmap)):
        block[(len(cut), triton.cdiv(x.shape[1], plan.n))](
            x, out, rowmap.order, cut, board, x.stride(0), out.stride(0), x.shape[1],
            KIND=KINDS[dtype], TYPE=TYPES[dtype], COLUMNS=COLUMNS, M=plan.m, N=plan.n, PRECISION=precision(dtype),
            num_warps=plan.warps,
        )  # fmt: skip
