"""Tiling: the rows of a RowMap, by slot, cut into tiles of a fixed height."""

import torch
import triton
import triton.language as tl

from deltaserve_kernels.rowmap import RowMap


def tiles(rowmap: RowMap, height: int) -> torch.Tensor:
    """int32 [tiles, 3]: each tile's slot (BARE: an empty one), where in `rowmap.order` it begins, and its rows.

    Made once for each height and forward.
    """
    found = rowmap.kept.get(("tiles", height))
    if found is None:
        found = rowmap.kept["tiles", height] = torch.tensor(_cut(rowmap, height), dtype=torch.int32).to(rowmap.device)
    return found


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


def _cut(rowmap: RowMap, height: int) -> list[tuple[int, int, int]]:
    counts: dict[int, int] = {}
    for run in rowmap.runs:
        counts[run.slot] = counts.get(run.slot, 0) + run.rows
    cut, at = [], 0
    for slot in sorted(counts):
        for first in range(0, counts[slot], height):
            cut.append((slot, at + first, min(height, counts[slot] - first)))
        at += counts[slot]
    return cut
