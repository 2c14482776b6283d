"""Affine as one elementwise kernel: x = x ⊙ scale + shift, each row its own. IA³ (arXiv 2205.05638), BitFit."""

import torch
import triton
import triton.language as tl

from deltaserve_kernels.gpu import demands
from deltaserve_kernels.gpu.board import KINDS, Board
from deltaserve_kernels.gpu.numbers import numbers
from deltaserve_kernels.rowmap import RowMap
from deltaserve_kernels.slots import Entry, SlotTable

COLUMNS = 5
"""Whether there is something, then address and kind of scale (of a board of inputs, in_scale) and of shift."""
SCALE, SHIFT = 1, 3
N = 1024
WARPS = 4


@triton.jit
def affine(
    x, slots, board, stride, width,
    COLUMNS: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One row and N of its numbers, in place. SCALE and SHIFT are columns of the board, 0 for none."""
    row, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * N + tl.arange(0, N)
    slot = tl.load(slots + row)
    if slot < 0:
        return
    here = board + slot.to(tl.int64) * COLUMNS
    scale, shift = tl.load(here + SCALE), tl.load(here + SHIFT)
    if SHIFT == 0:
        shift = scale * 0
    if (scale == 0) & (shift == 0):
        return
    inside = n < width
    place = x + row * stride + n
    total = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    if scale != 0:
        total *= numbers(scale, tl.load(here + SCALE + 1), n, inside)
    if shift != 0:
        total += numbers(shift, tl.load(here + SHIFT + 1), n, inside)
    tl.store(place, total.to(x.dtype.element_ty), mask=inside)


def inputs(slot: int, entry: Entry, width: int) -> tuple[int, ...]:
    """A slot's row of the board of inputs."""
    return (1, *_vector("in_scale", slot, entry.tensors[0], width), 0, 0)


def outputs(slot: int, entry: Entry, width: int) -> tuple[int, ...]:
    """A slot's row of the board of outputs."""
    _, scale, shift = entry.tensors
    return (1, *_vector("scale", slot, scale, width), *_vector("shift", slot, shift, width))


def _vector(name: str, slot: int, given: torch.Tensor | None, width: int) -> tuple[int, int]:
    if given is None:
        return (0, 0)
    found = demands.tensor(name, slot, given, (width,))
    return (found.data_ptr(), KINDS[found.dtype])


def scale_input(out: torch.Tensor, rowmap: RowMap, table: SlotTable) -> None:
    """out = out ⊙ in_scale in place, fp32 rounded once. out [rows, in]; rows of slots without one stay as they are.

    Raises ValueError, before anything is launched, where rows, a slot or what it has cannot be read so.
    """
    demands.rows(rowmap, table, x=out)
    _launch(out, rowmap, Board.of(table, COLUMNS, inputs, out.shape[1]), 0)


def scale_output(y: torch.Tensor, rowmap: RowMap, table: SlotTable) -> None:
    """y = y ⊙ scale + shift in place. y [rows, out], any float dtype; raises as `scale_input`."""
    demands.rows(rowmap, table, y=y)
    _launch(y, rowmap, Board.of(table, COLUMNS, outputs, y.shape[1]), SHIFT)


def _launch(rows: torch.Tensor, rowmap: RowMap, board: Board, shift: int) -> None:
    affine[(rows.shape[0], triton.cdiv(rows.shape[1], N))](
        rows, rowmap.slots, board.rows(), rows.stride(0), rows.shape[1],
        COLUMNS=COLUMNS, SCALE=SCALE, SHIFT=shift, N=N, num_warps=WARPS,
    )  # fmt: skip
