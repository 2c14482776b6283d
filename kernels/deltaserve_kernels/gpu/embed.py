"""Rows that enter the first layer in one gather, each from where it stands; and LoRA on what was looked up."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from deltaserve_kernels.gpu import demands, lowrank
from deltaserve_kernels.gpu.board import KINDS, Board
from deltaserve_kernels.gpu.numbers import numbers
from deltaserve_kernels.gpu.tuning import LOW_RANK
from deltaserve_kernels.rowmap import BARE, RowMap
from deltaserve_kernels.slots import Entry, SlotTable

COLUMNS = 4
"""Kind, rows, how many, ids int32 that they stand for (0: the row of an id stands at that id)."""
N, WARPS = 1024, 4
R = 32
"""Ranks that one program picks."""
Piece = tuple[int, int, int, int]
"""See `deltaserve_kernels.embed`."""


@triton.jit(do_not_specialize=["based"])
def gather(
    out, ids, slots, base, whole, own, out_stride, base_stride, width, based, factor,
    COLUMNS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One row and N of its numbers, times `factor`: from the slot's row for its id, else from the slot's embedding,
    else, where `based`, from the backbone's. Where none has it, it stays.
    """
    row, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * N + tl.arange(0, N)
    inside = n < width
    slot, at = tl.load(slots + row).to(tl.int64), tl.load(ids + row)
    found, kind = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
    id = at
    if slot >= 0:
        here = own + slot * COLUMNS
        index = tl.load(here + 3)
        if (tl.load(here) != 0) & (index != 0):
            low, high = tl.full((), 0, tl.int64), tl.load(here + 2)
            last = high - 1
            while low < high:
                middle = (low + high) // 2
                if tl.load(index.to(tl.pointer_type(tl.int32)) + middle) < id:
                    low = middle + 1
                else:
                    high = middle
            spot = tl.minimum(low, last)
            if tl.load(index.to(tl.pointer_type(tl.int32)) + spot) == id:
                found, kind, at = tl.load(here + 1), tl.load(here), spot
        here = whole + slot * COLUMNS
        if (found == 0) & (tl.load(here) != 0) & (tl.load(here + 3) == 0):
            found, kind = tl.load(here + 1), tl.load(here)
    put = out + row * out_stride + n
    if found != 0:
        told = numbers(found, kind, at * width + n, inside) * factor
        tl.store(put, told.to(out.dtype.element_ty), mask=inside)
    else:
        if based != 0:
            told = tl.load(base + id * base_stride + n, mask=inside, other=0.0).to(tl.float32) * factor
            tl.store(put, told.to(out.dtype.element_ty), mask=inside)


@triton.jit
def pick(
    ids, order, slots, board, planes, ranks, COLUMNS: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """planes[place, r] = A[r, ids[row]] of one row that is not bare, and R of its ranks."""
    place, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(order + place)
    slot = tl.load(slots + row).to(tl.int64)
    if slot < 0:
        return
    here = board + slot * COLUMNS
    kind = tl.load(here)
    if kind == 0:
        return
    r = part * R + tl.arange(0, R)
    low = r < tl.load(here + 3)
    h = numbers(tl.load(here + 1), kind, r.to(tl.int64) * tl.load(here + 4) + tl.load(ids + row), low)
    tl.store(planes + place * ranks + r, h, mask=low)


def embeddings(slot: int, entry: Entry, vocabulary: int, width: int) -> tuple[int, ...]:
    """A slot's row of the board: a whole embedding, of no fewer rows than the backbone's where that is known."""
    own = demands.tensor("embedding", slot, entry.tensors[0], (None, width))
    if own.shape[0] < vocabulary:
        raise ValueError(f"embedding: of slot {slot}, {own.shape[0]} rows; ids go up to {vocabulary - 1}")
    return (KINDS[own.dtype], own.data_ptr(), own.shape[0], 0)


def replaced(slot: int, entry: Entry, width: int) -> tuple[int, ...]:
    """The same of Rows."""
    index = demands.tensor("index", slot, entry.tensors[0], (None,), dtypes=(torch.int32,))
    values = demands.tensor("values", slot, entry.tensors[1], (index.shape[0], width))
    return (KINDS[values.dtype], values.data_ptr(), index.shape[0], index.data_ptr())


def prompted(slot: int, entry: Entry, width: int) -> tuple[int, ...]:
    """The same of soft prompts."""
    rows = demands.tensor("prompt", slot, entry.tensors[0], (None, width))
    return (KINDS[rows.dtype], rows.data_ptr(), rows.shape[0], 0)


def look_up(y: torch.Tensor, ids: torch.Tensor, rowmap: RowMap, table: SlotTable, factor: float) -> None:
    """y[row] = factor · E[ids[row]] where the slot has an embedding. y [rows, width] of a float dtype; ids int64.

    Raises ValueError, before anything is launched, where rows, ids, a slot or what it has cannot be read so. Ids have
    to be below the rows of every embedding.
    """
    _demand(y, ids, rowmap, table)
    board = Board.of(table, COLUMNS, embeddings, 0, y.shape[1]).rows()
    _gather(y, ids, rowmap.slots, factor, (board, board))


def replace_rows(y: torch.Tensor, ids: torch.Tensor, rowmap: RowMap, table: SlotTable, factor: float) -> None:
    """y[row] = factor · values[k] where ids[row] = index[k] of the slot; raises as `look_up`."""
    _demand(y, ids, rowmap, table)
    board = Board.of(table, COLUMNS, replaced, y.shape[1]).rows()
    _gather(y, ids, rowmap.slots, factor, (board, board))


def rows_of(ids: torch.Tensor, rowmap: RowMap, weight: torch.Tensor, whole: SlotTable, own: SlotTable) -> torch.Tensor:
    """Looked up in `weight` [vocabulary, width] or in what slots have instead: one launch, [rows, width].

    Raises as `look_up`.
    """
    demands.tensor("weight", BARE, weight, (None, None))
    y = torch.empty(rowmap.rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
    for table in (whole, own):
        _demand(y, ids, rowmap, table)
    boards = (
        Board.of(whole, COLUMNS, embeddings, weight.shape[0], weight.shape[1]).rows(),
        Board.of(own, COLUMNS, replaced, weight.shape[1]).rows(),
    )
    _gather(y, ids, rowmap.slots, 1.0, boards, base=weight)
    return y


def prompt_rows(y: torch.Tensor, table: SlotTable, pieces: Sequence[Piece]) -> None:
    """Writes soft-prompt rows to their places in y [rows, width]; one launch for all, over the rows between them too.

    Raises ValueError, before it, where a piece names rows or a slot that are not there.
    """
    slots, places = torch.full((y.shape[0],), BARE, dtype=torch.int32), torch.zeros(y.shape[0], dtype=torch.int64)
    for slot, row, offset, count in pieces:
        entry = table.get(slot)
        if entry is None or entry.tensors[0] is None:
            raise ValueError(f"pieces: slot {slot} has no soft prompt")
        there = entry.tensors[0].shape[0]
        if min(row, offset, count) < 0 or row + count > y.shape[0] or offset + count > there:
            raise ValueError(
                f"pieces: {count} rows from {offset} on of slot {slot}, which has {there}, at row {row} of {y.shape[0]}"
            )
        slots[row : row + count] = slot
        places[row : row + count] = torch.arange(offset, offset + count)
    demands.rows(RowMap(y.shape[0], (), y.device), table, y=y)
    board = Board.of(table, COLUMNS, prompted, y.shape[1]).rows()
    _gather(y, places.to(y.device), slots.to(y.device), 1.0, (board, board))


def add_low_rank(y: torch.Tensor, ids: torch.Tensor, rowmap: RowMap, table: SlotTable, factor: float) -> None:
    """y[row] += factor · scale · outer ⊙ (A[:, ids[row]]ᵀ D Bᵀ) in place; raises as `look_up`.

    Ids have to be below the columns of every A.
    """
    _demand(y, ids, rowmap, table)
    entries = [entry for _, entry in table.entries(rowmap)]
    columns = {int(entry.tensors[0].shape[1]) for entry in table.items().values() if entry.tensors[0] is not None}
    if len(columns) > 1:
        raise ValueError(f"A: of {sorted(columns)} columns; one embedding has one vocabulary")
    board = Board.of(table, lowrank.COLUMNS, lowrank.row, columns.pop(), y.shape[1], factor).rows()
    ranks = max(int(entry.tensors[0].shape[0]) for entry in entries if entry.tensors[0] is not None)
    planes = torch.empty(1, len(rowmap.order), ranks, dtype=torch.float32, device=y.device)
    pick[(len(rowmap.order), triton.cdiv(ranks, R))](
        ids, rowmap.order, rowmap.slots, board, planes, ranks, COLUMNS=lowrank.COLUMNS, R=R, num_warps=1,
    )  # fmt: skip
    lowrank.raise_up(y, rowmap, board, planes, LOW_RANK.choose(rowmap), entries)


def _demand(y: torch.Tensor, ids: torch.Tensor, rowmap: RowMap, table: SlotTable) -> None:
    demands.rows(rowmap, table, y=y)
    if ids.shape != (rowmap.rows,) or ids.dtype != torch.int64 or not ids.is_contiguous():
        raise ValueError(f"ids: shape {tuple(ids.shape)}, {ids.dtype}; read are int64 [{rowmap.rows}], contiguous")


def _gather(
    y: torch.Tensor,
    ids: torch.Tensor,
    slots: torch.Tensor,
    factor: float,
    boards: tuple[torch.Tensor, torch.Tensor],
    base: torch.Tensor | None = None,
) -> None:
    gather[(y.shape[0], triton.cdiv(y.shape[1], N))](
        y, ids, slots, y if base is None else base, *boards,
        y.stride(0), y.stride(0) if base is None else base.stride(0), y.shape[1], int(base is not None), factor,
        COLUMNS=COLUMNS, N=N, num_warps=WARPS,
    )  # fmt: skip
