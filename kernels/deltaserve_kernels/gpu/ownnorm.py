"""OwnNorm: each row normalised by its own slot's LayerNorm, in place."""

import torch
import triton
import triton.language as tl

from deltaserve_kernels.gpu import demands
from deltaserve_kernels.gpu.board import KINDS, Board, bits
from deltaserve_kernels.gpu.numbers import numbers
from deltaserve_kernels.rowmap import RowMap
from deltaserve_kernels.slots import Entry, SlotTable

COLUMNS = 6
"""Whether there is something, address and kind of weight and of bias, eps."""
N = 1024
WARPS = 4


@triton.jit
def norm(y, slots, board, stride, width, COLUMNS: tl.constexpr, N: tl.constexpr):
    """One row: its mean, then the mean of squares about that, then y = (y − mean) / √(var + eps) ⊙ weight + bias."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    if slot < 0:
        return
    here = board + slot.to(tl.int64) * COLUMNS
    if tl.load(here) == 0:
        return
    line, n = y + row * stride, tl.arange(0, N)
    acc = tl.zeros((N,), dtype=tl.float32)
    for start in range(0, width, N):
        acc += tl.load(line + start + n, mask=start + n < width, other=0.0)
    mean = tl.sum(acc, 0) / width
    acc = tl.zeros((N,), dtype=tl.float32)
    for start in range(0, width, N):
        inside = start + n < width
        apart = tl.where(inside, tl.load(line + start + n, mask=inside, other=0.0) - mean, 0.0)
        acc += apart * apart
    eps = tl.load(here + 5).to(tl.int32).to(tl.float32, bitcast=True)
    factor = 1.0 / tl.sqrt(tl.sum(acc, 0) / width + eps)
    weight, weight_kind, bias, bias_kind = (
        tl.load(here + 1), tl.load(here + 2), tl.load(here + 3), tl.load(here + 4),
    )  # fmt: skip
    for start in range(0, width, N):
        place = start + n
        inside = place < width
        unit = (tl.load(line + place, mask=inside, other=0.0) - mean) * factor
        told = unit * numbers(weight, weight_kind, place, inside) + numbers(bias, bias_kind, place, inside)
        tl.store(line + place, told, mask=inside)


def row(slot: int, entry: Entry, width: int) -> tuple[int, ...]:
    """A slot's row of the board."""
    weight, bias = (
        demands.tensor(name, slot, tensor, (width,))
        for name, tensor in zip(("weight", "bias"), entry.tensors, strict=True)
    )
    return (1, weight.data_ptr(), KINDS[weight.dtype], bias.data_ptr(), KINDS[bias.dtype], bits(entry.scalars[0]))


def launch(y: torch.Tensor, rowmap: RowMap, table: SlotTable) -> None:
    """y = norm(y) in place, of rows that have one. y fp32 [rows, d].

    Raises ValueError, before anything is launched, where rows, a slot or what it has cannot be read so.
    """
    demands.rows(rowmap, table, y=y)
    board = Board.of(table, COLUMNS, row, y.shape[1]).rows()
    norm[(y.shape[0],)](y, rowmap.slots, board, y.stride(0), y.shape[1], COLUMNS=COLUMNS, N=N, num_warps=WARPS)
