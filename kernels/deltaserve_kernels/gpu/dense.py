"""Dense as one grouped product: y[:, column] (+)= x Wᵀ + b, each tile of rows with its own slot's W.

Rows of outputs (trainable tokens at a vocabulary linear) are the same with some columns only.
"""

import torch
import triton
import triton.language as tl

from deltaserve_kernels.gpu import demands
from deltaserve_kernels.gpu.board import KINDS, Board
from deltaserve_kernels.gpu.launch import TYPES, kinds, on_tensor_cores, precision
from deltaserve_kernels.gpu.numbers import numbers
from deltaserve_kernels.gpu.tiling import members, owner, tiles
from deltaserve_kernels.gpu.tuning import DENSE
from deltaserve_kernels.rowmap import RowMap
from deltaserve_kernels.slots import Entry, SlotTable

COLUMNS = 7
"""Kind, W, outputs, bias, the bias's kind, whether it replaces, columns (0: all, in order)."""


@triton.jit
def dense(
    y, x, order, tiles, board, y_stride, x_stride, width,
    KIND: tl.constexpr, TYPE: tl.constexpr, COLUMNS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    HALF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The rows of one tile and N outputs, over all inputs."""
    tile, part = tl.program_id(0), tl.program_id(1)
    here, kind = owner(tiles, board, tile, COLUMNS)
    if kind != KIND:
        return
    outputs = tl.load(here + 2)
    if part * N >= outputs:
        return
    places, live = members(tiles, tile, M)
    rows = tl.load(order + places, mask=live, other=0)
    n = part * N + tl.arange(0, N)
    inside = n < outputs
    weight = tl.load(here + 1).to(tl.pointer_type(TYPE)) + n.to(tl.int64) * width
    acc = tl.zeros((M, N), dtype=tl.float32)
    for start in range(0, width, K):
        k = start + tl.arange(0, K)
        low = k < width
        given = tl.load(x + rows[:, None] * x_stride + k[None, :], mask=live[:, None] & low[None, :], other=0.0)
        w = tl.load(weight[:, None] + k[None, :], mask=inside[:, None] & low[None, :], other=0.0)
        if M == 1:
            acc += tl.sum(given.to(tl.float32) * w.to(tl.float32), 1)[None, :]
        elif HALF:
            acc = tl.dot(given, tl.trans(w), acc)
        else:
            acc = tl.dot(given.to(tl.float32), tl.trans(w.to(tl.float32)), acc, input_precision=PRECISION)
    bias, columns = tl.load(here + 3), tl.load(here + 6)
    if bias != 0:
        acc += numbers(bias, tl.load(here + 4), n, inside)[None, :]
    place = n.to(tl.int64)
    if columns != 0:
        place = tl.load(columns.to(tl.pointer_type(tl.int32)) + n, mask=inside, other=0).to(tl.int64)
    out = y + rows[:, None] * y_stride + place[None, :]
    seen = live[:, None] & inside[None, :]
    if tl.load(here + 5) == 0:
        acc += tl.load(out, mask=seen, other=0.0).to(tl.float32)
    tl.store(out, acc.to(y.dtype.element_ty), mask=seen)


def weights(slot: int, entry: Entry, inputs: int, width: int) -> tuple[int, ...]:
    """A slot's row of the board: columns weight [out, in] and bias, scalar replace."""
    weight = demands.tensor("weight", slot, entry.tensors[0], (width, inputs))
    told = (0, 0)
    if entry.tensors[1] is not None:
        bias = demands.tensor("bias", slot, entry.tensors[1], (width,))
        told = (bias.data_ptr(), KINDS[bias.dtype])
    return (KINDS[weight.dtype], weight.data_ptr(), weight.shape[0], *told, int(entry.scalars[0]), 0)


def outputs(slot: int, entry: Entry, inputs: int, width: int) -> tuple[int, ...]:
    """The same of Rows: columns index [n], below the width, and values [n, in], which replace."""
    index = demands.tensor("index", slot, entry.tensors[0], (None,), dtypes=(torch.int32,))
    values = demands.tensor("values", slot, entry.tensors[1], (index.shape[0], inputs))
    if index.shape[0] > width:
        raise ValueError(f"index: of slot {slot}, {index.shape[0]} places; rows are {width} wide")
    return (KINDS[values.dtype], values.data_ptr(), values.shape[0], 0, 0, 1, index.data_ptr())


def apply(y: torch.Tensor, x: torch.Tensor, rowmap: RowMap, table: SlotTable) -> None:
    """y += x Wᵀ + b, or y = x Wᵀ + b, in place. y [rows, out], x [rows, in], of any float dtype.

    Raises ValueError, before anything is launched, where rows, a slot or what it has cannot be read so.
    """
    demands.rows(rowmap, table, y=y, x=x)
    board = Board.of(table, COLUMNS, weights, x.shape[1], y.shape[1])
    entries = [entry for _, entry in table.entries(rowmap)]
    _launch(y, x, rowmap, board, kinds(entries), y.shape[1])


def replace_outputs(y: torch.Tensor, x: torch.Tensor, rowmap: RowMap, table: SlotTable) -> None:
    """y[:, index] = x valuesᵀ in place. y [rows, vocabulary], x [rows, in], of any float dtype; raises as `apply`."""
    demands.rows(rowmap, table, y=y, x=x)
    board = Board.of(table, COLUMNS, outputs, x.shape[1], y.shape[1])
    entries = [entry for _, entry in table.entries(rowmap)]
    most = max(int(entry.tensors[1].shape[0]) for entry in entries if entry.tensors[1] is not None)
    _launch(y, x, rowmap, board, kinds(entries, 1), most)


def _launch(
    y: torch.Tensor, x: torch.Tensor, rowmap: RowMap, board: Board, dtypes: list[torch.dtype], most: int
) -> None:
    plan = DENSE.choose(rowmap)
    told, cut = board.rows(), tiles(rowmap, plan.m)
    for dtype in dtypes:
        dense[(len(cut), triton.cdiv(most, plan.n))](
            y, x, rowmap.order, cut, told, y.stride(0), x.stride(0), x.shape[1],
            KIND=KINDS[dtype], TYPE=TYPES[dtype], COLUMNS=COLUMNS, M=plan.m, N=plan.n, K=plan.k,
            HALF=on_tensor_cores(x.dtype, dtype), PRECISION=precision(dtype), num_warps=plan.warps,
        )  # fmt: skip
