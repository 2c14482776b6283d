"""LowRank as two kernels: shrink, h = x Aᵀ, and expand, y += scale · outer ⊙ (h Bᵀ). LoRA (arXiv 2106.09685).

Where some slot has an inner, a third stands between them and makes h D of h; see `deltaserve_kernels.lowrank`.

h is fp32, in `split` planes that expand sums as it reads them in a fixed order: a sum over few rows is spread over the
whole chip without atomics, without zeroing, and with the same bits every time. Ranks are each slot's own.
"""

import torch
import triton
import triton.language as tl

from deltaserve_kernels.gpu import demands
from deltaserve_kernels.gpu.activations import activated
from deltaserve_kernels.gpu.board import KINDS, Board, bits
from deltaserve_kernels.gpu.launch import TYPES, kinds, on_tensor_cores, precision
from deltaserve_kernels.gpu.numbers import numbers
from deltaserve_kernels.gpu.tiling import members, owner, tiles
from deltaserve_kernels.gpu.tuning import LOW_RANK, Tiles
from deltaserve_kernels.rowmap import RowMap
from deltaserve_kernels.slots import Entry, SlotTable

COLUMNS = 13
"""A's kind, A, B, rank, row strides of A and B, scale, outer, its kind, inner, its kind, its dimensions, B's kind."""
MOST_RANK = 1 << 14
"""Places in an inner [r, r] are int32."""


@triton.jit
def shrink(
    x, order, tiles, board, planes, x_stride, width, plane, ranks,
    KIND: tl.constexpr, TYPE: tl.constexpr, COLUMNS: tl.constexpr, M: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
    SPLIT: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """planes[s, place, r] = Σ x[row, k] · A[r, k] over the k of split s, for one tile's rows and R of its ranks."""
    tile, part, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    here, kind = owner(tiles, board, tile, COLUMNS)
    if kind != KIND:
        return
    rank = tl.load(here + 3).to(tl.int32)
    if part * R >= rank:
        return
    places, live = members(tiles, tile, M)
    rows = tl.load(order + places, mask=live, other=0)
    r = part * R + tl.arange(0, R)
    a = tl.load(here + 1).to(tl.pointer_type(TYPE)) + r.to(tl.int64) * tl.load(here + 4)
    acc = tl.zeros((M, R), dtype=tl.float32)
    for start in range(split * K, width, SPLIT * K):
        k = start + tl.arange(0, K)
        inside = k < width
        given = tl.load(x + rows[:, None] * x_stride + k[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        down = tl.load(a[:, None] + k[None, :], mask=(r < rank)[:, None] & inside[None, :], other=0.0)
        if M == 1:
            acc += tl.sum(given.to(tl.float32) * down.to(tl.float32), 1)[None, :]
        elif HALF:
            acc = tl.dot(given, tl.trans(down), acc)
        else:
            acc = tl.dot(given.to(tl.float32), tl.trans(down.to(tl.float32)), acc, input_precision=PRECISION)
    out = planes + split.to(tl.int64) * plane + places.to(tl.int64)[:, None] * ranks + r[None, :]
    tl.store(out, acc, mask=live[:, None] & (r < rank)[None, :])


@triton.jit
def turn(
    tiles, board, planes, turned, plane, ranks,
    COLUMNS: tl.constexpr, M: tl.constexpr, R: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """turned[place, r] = Σ h[place, j] · D[j, r], for the rows of one tile and R of its ranks."""
    tile, part = tl.program_id(0), tl.program_id(1)
    here, kind = owner(tiles, board, tile, COLUMNS)
    if kind == 0:
        return
    rank = tl.load(here + 3).to(tl.int32)
    if part * R >= rank:
        return
    places, live = members(tiles, tile, M)
    r = part * R + tl.arange(0, R)
    low = r < rank
    lines = planes + places.to(tl.int64) * ranks
    inner, inner_kind, dimensions = tl.load(here + 9), tl.load(here + 10), tl.load(here + 11)
    acc = tl.zeros((M, R), dtype=tl.float32)
    if dimensions == 2:
        for j in range(0, rank):
            h = tl.zeros((M,), dtype=tl.float32)
            for split in range(SPLIT):
                h += tl.load(lines + split * plane + j, mask=live, other=0.0)
            acc += h[:, None] * numbers(inner, inner_kind, r * rank + j, low)[None, :]
    else:
        for split in range(SPLIT):
            acc += tl.load(lines[:, None] + split * plane + r[None, :], mask=live[:, None] & low[None, :], other=0.0)
        if dimensions == 1:
            acc *= numbers(inner, inner_kind, r, low)[None, :]
    place = turned + places.to(tl.int64)[:, None] * ranks + r[None, :]
    tl.store(place, acc, mask=live[:, None] & low[None, :])


@triton.jit
def expand(
    y, order, tiles, board, planes, gates, y_stride, width, plane, ranks,
    KIND: tl.constexpr, TYPE: tl.constexpr, COLUMNS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, BOTTLENECK: tl.constexpr,
):  # fmt: skip
    """y[row, n] += scale · outer[n] · Σ h[place, r] · B[n, r], for the rows of one tile and N outputs.

    Of a BOTTLENECK (board by `bottleneck.row`): gate[row] · (scale · Σ f(h + down_bias)[r] · B[n, r] + up_bias[n]).
    """
    tile, part = tl.program_id(0), tl.program_id(1)
    here, kind = owner(tiles, board, tile, COLUMNS)
    if (kind == 0) | (tl.load(here + 12) != KIND):
        return
    rank = tl.load(here + 3).to(tl.int32)
    places, live = members(tiles, tile, M)
    rows = tl.load(order + places, mask=live, other=0)
    n = part * N + tl.arange(0, N)
    inside = n < width
    b = tl.load(here + 2).to(tl.pointer_type(TYPE)) + n.to(tl.int64) * tl.load(here + 5)
    outer = tl.load(here + 7)
    acc = tl.zeros((M, N), dtype=tl.float32)
    for start in range(0, rank, R):
        r = start + tl.arange(0, R)
        low = (r < rank)[None, :]
        h = tl.zeros((M, R), dtype=tl.float32)
        spot = planes + places.to(tl.int64)[:, None] * ranks + r[None, :]
        for split in range(SPLIT):
            h += tl.load(spot + split * plane, mask=live[:, None] & low, other=0.0)
        if BOTTLENECK:
            if tl.load(here + 9) != 0:
                h += numbers(tl.load(here + 9), tl.load(here + 10), r, r < rank)[None, :]
            h = activated(h, tl.load(here + 11))
        up = tl.load(b[:, None] + r[None, :], mask=inside[:, None] & low, other=0.0).to(tl.float32)
        if M == 1:
            acc += tl.sum(h * up, 1)[None, :]
        else:
            acc = tl.dot(h, tl.trans(up), acc, input_precision=PRECISION)
    acc *= tl.load(here + 6).to(tl.int32).to(tl.float32, bitcast=True)
    if outer != 0:
        told = numbers(outer, tl.load(here + 8), n, inside)[None, :]
        if BOTTLENECK:
            acc += told
        else:
            acc *= told
    if BOTTLENECK:
        acc *= tl.load(gates + rows, mask=live, other=0.0)[:, None]
    out = y + rows[:, None] * y_stride + n[None, :]
    seen = live[:, None] & inside[None, :]
    tl.store(out, (tl.load(out, mask=seen, other=0.0).to(tl.float32) + acc).to(y.dtype.element_ty), mask=seen)


def row(slot: int, entry: Entry, inputs: int, outputs: int, factor: float = 1.0) -> tuple[int, ...]:
    """A slot's row of the board, for rows of so many inputs and outputs; what is added is multiplied by `factor`."""
    a = demands.tensor("A", slot, entry.tensors[0], (None, inputs), strided=True)
    rank = a.shape[0]
    if rank > MOST_RANK:
        raise ValueError(f"A: of slot {slot}, rank {rank}; at most {MOST_RANK} is read")
    b = demands.tensor("B", slot, entry.tensors[1], (outputs, rank), strided=True)
    after, between = (0, 0), (0, 0, 0)
    if entry.tensors[3] is not None:
        outer = demands.tensor("outer", slot, entry.tensors[3], (outputs,))
        after = (outer.data_ptr(), KINDS[outer.dtype])
    if entry.tensors[2] is not None:
        inner = demands.tensor("inner", slot, entry.tensors[2], (rank,) * min(max(entry.tensors[2].ndim, 1), 2))
        between = (inner.data_ptr(), KINDS[inner.dtype], inner.ndim)
    places = (a.data_ptr(), b.data_ptr(), rank, a.stride(0), b.stride(0))
    return (KINDS[a.dtype], *places, bits(entry.scalars[0] * factor), *after, *between, KINDS[b.dtype])


def launch(y: torch.Tensor, x: torch.Tensor, rowmap: RowMap, table: SlotTable) -> None:
    """y += scale · outer ⊙ (x Aᵀ D Bᵀ) in place. y [rows, out], x [rows, in], of any float dtype.

    Raises ValueError, before anything is launched, where rows, a slot or what it has cannot be read so.
    """
    demands.rows(rowmap, table, y=y, x=x)
    board = Board.of(table, COLUMNS, row, x.shape[1], y.shape[1]).rows()
    entries = [entry for _, entry in table.entries(rowmap)]
    raise_up(y, rowmap, board, shrunk(x, rowmap, board, entries), LOW_RANK.choose(rowmap), entries)


def shrunk(x: torch.Tensor, rowmap: RowMap, board: torch.Tensor, entries: list[Entry]) -> torch.Tensor:
    """h = x Aᵀ, in planes fp32 [split, rows that are not bare, ranks]."""
    ranks = max(int(entry.tensors[0].shape[0]) for entry in entries if entry.tensors[0] is not None)
    plan = LOW_RANK.choose(rowmap)
    cut = tiles(rowmap, plan.m)
    planes = torch.empty(plan.split, len(rowmap.order), ranks, dtype=torch.float32, device=x.device)
    for dtype in kinds(entries):
        shrink[(len(cut), triton.cdiv(ranks, plan.r), plan.split)](
            x, rowmap.order, cut, board, planes, x.stride(0), x.shape[1], planes.stride(0), ranks,
            KIND=KINDS[dtype], TYPE=TYPES[dtype], COLUMNS=COLUMNS, M=plan.m, R=plan.r, K=plan.k, SPLIT=plan.split,
            HALF=on_tensor_cores(x.dtype, dtype), PRECISION=precision(dtype), num_warps=plan.warps,
        )  # fmt: skip
    return planes


def raise_up(
    y: torch.Tensor, rowmap: RowMap, board: torch.Tensor, planes: torch.Tensor, plan: Tiles, entries: list[Entry]
) -> None:
    """y += scale · outer ⊙ (h D Bᵀ) of h, in planes [split, rows that are not bare, ranks]."""
    if any(entry.tensors[2] is not None for entry in entries):
        cut, r, (split, _, ranks) = tiles(rowmap, plan.m), plan.r, planes.shape
        turned = torch.empty(1, len(rowmap.order), ranks, dtype=torch.float32, device=y.device)
        turn[(len(cut), triton.cdiv(ranks, r))](
            cut, board, planes, turned, planes.stride(0), ranks,
            COLUMNS=COLUMNS, M=plan.m, R=r, SPLIT=split, num_warps=plan.warps,
        )  # fmt: skip
        planes = turned
    expanded(y, rowmap, board, planes, plan, entries)


def expanded(
    y: torch.Tensor,
    rowmap: RowMap,
    board: torch.Tensor,
    planes: torch.Tensor,
    plan: Tiles,
    entries: list[Entry],
    gates: torch.Tensor | None = None,
) -> None:
    """y += scale · outer ⊙ (h Bᵀ); with gates fp32 [rows], what a bottleneck makes of h."""
    cut, (split, _, ranks) = tiles(rowmap, plan.m), planes.shape
    for dtype in kinds(entries, 1):
        expand[(len(cut), triton.cdiv(y.shape[1], plan.n))](
            y, rowmap.order, cut, board, planes, planes if gates is None else gates, y.stride(0), y.shape[1],
            planes.stride(0), ranks,
            KIND=KINDS[dtype], TYPE=TYPES[dtype], COLUMNS=COLUMNS, M=plan.m, N=plan.n, R=plan.r, SPLIT=split,
            PRECISION=precision(dtype), BOTTLENECK=gates is not None, num_warps=plan.warps,
        )  # fmt: skip
