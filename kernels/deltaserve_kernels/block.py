"""Block: rows times a block-diagonal matrix, before or after a linear. OFT, BOFT, RoAd."""

from collections.abc import Sequence

import torch

from deltaserve_kernels.dispatch import Implementation, choose
from deltaserve_kernels.rowmap import RowMap
from deltaserve_kernels.slots import Entry, SlotTable
from deltaserve_kernels.stacks import Found, Stacks, parted

_SMALL = 8
"""Width of blocks up to which sums over whole rows beat many small products."""


class BlockTable(SlotTable):
    """One column: blocks [n, b, b] with n · b the width of the rows. n and b differ freely between slots."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        super().__init__(1, capacity, device)
        self.stacks: dict[int, Stacks] = {}

    @property
    def cached_bytes(self) -> int:
        """Bytes of the stacked copies."""
        return sum(stacks.nbytes for stacks in self.stacks.values())

    def stack(self, found: Found, width: int) -> torch.Tensor:
        """fp32 blocks of these runs' slots, all of one width: [slots, n, b, b], small ones [slots, b, b, n]."""
        stacks = self.stacks.get(width)
        if stacks is None:
            stacks = self.stacks[width] = Stacks(lambda entries: (_stacked(entries),))
        (blocks,) = stacks.of(found, self.generation)
        assert blocks is not None
        return blocks


def turned(x: torch.Tensor, rowmap: RowMap, table: BlockTable) -> torch.Tensor:
    """x′ = x · diag(R_1, ..., R_n) for rows whose slot has one; x itself where none has.

    x [rows, width], any float dtype; products and sums fp32, rounded once to x's dtype. Bare rows are bit-identical.
    """
    if not table.touches(rowmap):
        return x
    out = x.clone()
    _PATHS[choose(x.device)](out, x, rowmap, table)
    return out


def turn(y: torch.Tensor, rowmap: RowMap, table: BlockTable) -> None:
    """The same in place. y fp32 [rows, width]; bare rows are not touched."""
    if not table.touches(rowmap):
        return
    _PATHS[choose(y.device)](y, y, rowmap, table)


def reference(out: torch.Tensor, x: torch.Tensor, rowmap: RowMap, table: BlockTable) -> None:
    """Writes x′ to the rows of `out`, which may be x."""
    for run, entry in table.entries(rowmap):
        out[run.start : run.stop] = _product(x[run.start : run.stop].float(), _blocks(entry)).to(out.dtype)


def cpu(out: torch.Tensor, x: torch.Tensor, rowmap: RowMap, table: BlockTable) -> None:
    """Short runs whose blocks are alike in one batched product."""
    short, long = parted(table.entries(rowmap))
    alike: dict[int, Found] = {}
    for each in short:
        alike.setdefault(_blocks(each[1]).shape[-1], []).append(each)
    for width, found in alike.items():
        grid = rowmap.grid([run for run, _ in found])
        multiply = _small if width <= _SMALL else _batched
        out[grid.rows] = grid.given(multiply(grid.taken(x).float(), table.stack(found, width))).to(out.dtype)
    for run, entry in long:
        part, blocks = x[run.start : run.stop].float(), _blocks(entry)
        if blocks.shape[-1] <= _SMALL:
            turned = _small(part.unsqueeze(0), _stacked([entry])).view(part.shape)
        else:
            turned = _product(part, blocks)
        out[run.start : run.stop] = turned.to(out.dtype)


def _product(x: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """x fp32 [rows, width], blocks [n, b, b]."""
    count, width, _ = blocks.shape
    parts = x.view(x.shape[0], count, width).transpose(0, 1)
    return torch.bmm(parts, blocks.float()).transpose(0, 1).reshape(x.shape)


def _batched(x: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """x fp32 [slots, depth, width], blocks [slots, n, b, b]."""
    slots, count, width, _ = blocks.shape
    parts = x.view(slots, -1, count, width).transpose(1, 2).reshape(slots * count, -1, width)
    turned = torch.bmm(parts, blocks.view(slots * count, width, width))
    return turned.view(slots, count, -1, width).transpose(1, 2).reshape(x.shape)


def _small(x: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """x fp32 [slots, depth, width], blocks [slots, b, b, n]: column i of all blocks at once."""
    slots, width, _, count = blocks.shape
    parts = x.view(slots, -1, count, width).transpose(2, 3).contiguous()
    total = parts[:, :, :1] * blocks[:, None, 0]
    for i in range(1, width):
        total.addcmul_(parts[:, :, i : i + 1], blocks[:, None, i])
    return total.transpose(2, 3).reshape(x.shape)


def _blocks(entry: Entry) -> torch.Tensor:
    (blocks,) = entry.tensors
    assert blocks is not None
    return blocks


def _stacked(entries: Sequence[Entry]) -> torch.Tensor:
    blocks = torch.stack([_blocks(entry).float() for entry in entries])
    return blocks.permute(0, 2, 3, 1).contiguous() if blocks.shape[-1] <= _SMALL else blocks


_PATHS = {Implementation.REFERENCE: reference, Implementation.CPU: cpu}
