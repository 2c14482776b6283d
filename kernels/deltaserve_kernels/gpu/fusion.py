"""AdapterFusion's middle as one kernel: p = softmax_k(q · key_k), c = Σ_k p_k u_k, each row its own.

The products before and behind are `gpu.dense`'s, each slot with its own weight.
"""

import torch
import triton
import triton.language as tl

from deltaserve_kernels.gpu import demands
from deltaserve_kernels.gpu.board import Board
from deltaserve_kernels.rowmap import RowMap
from deltaserve_kernels.slots import Entry, SlotTable

COLUMNS = 2
"""Members, and whether a product with values follows."""
N = 512
WARPS = 4


@triton.jit
def attend(
    y, c, asked, keys, members, slots, board, y_stride, asked_stride, width, most,
    COLUMNS: tl.constexpr, MEMBERS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One row. It is added to y where no product follows, and written to c where one does."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    if slot < 0:
        return
    here = board + slot.to(tl.int64) * COLUMNS
    count = tl.load(here).to(tl.int32)
    if count == 0:
        return
    n, k = tl.arange(0, N), tl.arange(0, MEMBERS)
    first = row * most * width
    scores = tl.full((MEMBERS,), float("-inf"), dtype=tl.float32)
    for member in range(0, count):
        line = keys + first + member * width
        acc = tl.zeros((N,), dtype=tl.float32)
        for start in range(0, width, N):
            inside = start + n < width
            q = tl.load(asked + row * asked_stride + start + n, mask=inside, other=0.0)
            acc += q * tl.load(line + start + n, mask=inside, other=0.0)
        scores = tl.where(k == member, tl.sum(acc, 0), scores)
    p = tl.exp(scores - tl.max(scores, 0))
    p = p / tl.sum(p, 0)
    follows = tl.load(here + 1)
    for start in range(0, width, N):
        inside = start + n < width
        acc = tl.zeros((N,), dtype=tl.float32)
        for member in range(0, count):
            share = tl.sum(tl.where(k == member, p, 0.0), 0)
            acc += share * tl.load(members + first + member * width + start + n, mask=inside, other=0.0)
        if follows != 0:
            tl.store(c + row * width + start + n, acc, mask=inside)
        else:
            out = y + row * y_stride + start + n
            tl.store(out, tl.load(out, mask=inside, other=0.0) + acc, mask=inside)


def row(_: int, entry: Entry) -> tuple[int, ...]:
    """A slot's row of the board."""
    return int(entry.scalars[0]), int(entry.tensors[3] is not None)


def launch(
    y: torch.Tensor,
    c: torch.Tensor,
    asked: torch.Tensor,
    keys: torch.Tensor,
    members: torch.Tensor,
    rowmap: RowMap,
    table: SlotTable,
    most: int,
) -> None:
    """See `deltaserve_kernels.fusion`; all fp32. `most`: members that a slot may have, a power of two.

    Raises ValueError, before anything is launched, where rows or a slot cannot be read so.
    """
    demands.rows(rowmap, table, y=y, c=c, asked=asked)
    shape = (y.shape[0], members.shape[1], y.shape[1])
    for name, rows in (("keys", keys), ("members", members)):
        if rows.shape != shape or rows.dtype != torch.float32 or not rows.is_contiguous():
            raise ValueError(f"{name}: {rows.dtype} {tuple(rows.shape)}; read is float32 {shape}, contiguous")
    board = Board.of(table, COLUMNS, row).rows()
    attend[(y.shape[0],)](
        y, c, asked, keys, members, rowmap.slots, board, y.stride(0), asked.stride(0), y.shape[1], members.shape[1],
        COLUMNS=COLUMNS, MEMBERS=most, N=N, num_warps=WARPS,
    )  # fmt: skip
