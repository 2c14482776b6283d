"""Tiling: the rows of a RowMap, by slot, cut into tiles of a fixed height."""

import torch
import triton
import triton.language as tl

from deltaserve_kernels.rowmap import RowMap


def tiles(rowmap: RowMap, height: int) -> torch.Tensor:
    """See `RowMap.tiles`; a slot that is BARE is that of an empty one."""
    return rowmap.tiles(height)


@triton.jit
def owner(tiles, board, tile, COLUMNS: tl.constexpr):
    """Of one tile: its slot's row of the board, and the kind in it, NOTHING where the tile is empty."""
    slot = tl.load(tiles + tile * 3).to(tl.int64)
    here = board + tl.maximum(slot, 0) * COLUMNS
    return here, tl.where(slot < 0, 0, tl.load(here))


@triton.jit
def members(tiles, tile, M: tl.constexpr):
    """Of one tile of M rows: their places in the order, and which of them are meant."""
    first, count = tl.load(tiles + tile * 3 + 1), tl.load(tiles + tile * 3 + 2)
    m = tl.arange(0, M)
    return first + m, m < count
