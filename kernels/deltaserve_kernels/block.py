"""Block: rows times a block-diagonal matrix, before or after a linear. OFT, BOFT, RoAd."""

from collections.abc import Sequence

import torch

from deltaserve_kernels.dispatch import Implementation, path
from deltaserve_kernels.rowmap import RowMap
from deltaserve_kernels.slots import Entry, SlotTable
from deltaserve_kernels.stacks import Group, Stacks, grouped

_SMALL = 8
"""Width of blocks up to which sums over whole rows beat many small products."""
_FEW = 1 << 16
"""Products that may stand in memory at one time: more are slower than other ways."""


class BlockTable(SlotTable):
    """One column: blocks [n, b, b] with n · b the width of the rows, or [m, b, b, s] with m · b · s, which turn what
    stands s apart. They differ freely between slots.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        super().__init__(1, capacity, device)
        self.stacks = Stacks(lambda entries: (_stacked(entries),))

    @property
    def cached_bytes(self) -> int:
        """Bytes of the stacked copies."""
        return self.stacks.nbytes

    def stack(self, group: Group) -> torch.Tensor:
        """See `_stacked`; of a group's slots, whose blocks are all of one shape. That of one slot is not kept."""
        if len(group.slots) == 1:
            return _stacked([group.found[0][1]])
        (blocks,) = self.stacks.of(group, self.generation)
        assert blocks is not None
        return blocks


def turned(x: torch.Tensor, rowmap: RowMap, table: BlockTable) -> torch.Tensor:
    """x′ = x · diag(R_1, ..., R_n) for rows whose slot has one; x itself where none has.

    x [rows, width], any float dtype; products and sums fp32, rounded once to x's dtype. Bare rows are bit-identical.
    """
    if not table.touches(rowmap):
        return x
    out = x.clone()
    path(_PATHS, x.device)(out, x, rowmap, table)
    return out


def turn(y: torch.Tensor, rowmap: RowMap, table: BlockTable) -> None:
    """The same in place. y fp32 [rows, width]; bare rows are not touched."""
    if not table.touches(rowmap):
        return
    path(_PATHS, y.device)(y, y, rowmap, table)


def reference(out: torch.Tensor, x: torch.Tensor, rowmap: RowMap, table: BlockTable) -> None:
    """Writes x′ to the rows of `out`, which may be x."""
    for run, entry in table.entries(rowmap):
        out[run.start : run.stop] = _product(x[run.start : run.stop].float(), _blocks(entry)).to(out.dtype)


def cpu(out: torch.Tensor, x: torch.Tensor, rowmap: RowMap, table: BlockTable) -> None:
    """Short runs whose blocks are alike in one go; a single run is enough for that."""
    groups = table.planned("", rowmap, lambda: grouped(table.entries(rowmap), rowmap, _shape, least=1))
    for group in groups.together:
        grid = group.grid
        grid.put(out, grid.given(_turned(grid.taken(x).float(), table.stack(group))))
    for run, entry in groups.alone:
        part = x[run.start : run.stop].float().unsqueeze(0)
        out[run.start : run.stop] = _turned(part, _stacked([entry]))[0].to(out.dtype)


def _turned(x: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Of x fp32 [slots, depth, width] and blocks [slots, n, b, b] or [slots, m, b, b, s] to x′."""
    if x.numel() * blocks.shape[3] <= _FEW:
        return _summed(x, blocks)
    if blocks.ndim == 5:
        return _apart(x, blocks)
    return _together(x, blocks) if blocks.shape[3] > _SMALL else _small(x, blocks)


def _summed(x: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Each number times its row of its block, all in memory at one time."""
    slots, groups, width, _, *apart = blocks.shape
    parts = x.view(slots, -1, groups, width, 1, *apart)
    return (parts * blocks.unsqueeze(1)).sum(3).view(x.shape)


def _together(x: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    slots, count, width, _ = blocks.shape
    parts = x.view(slots, -1, count, width).transpose(1, 2).reshape(slots * count, -1, width)
    turned = torch.bmm(parts, blocks.view(slots * count, width, width))
    return turned.view(slots, count, -1, width).transpose(1, 2).reshape(x.shape)


def _apart(x: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Column i of all blocks at one time."""
    slots, groups, width, _, apart = blocks.shape
    parts = x.view(slots, x.shape[1], groups, width, apart)
    total = parts[:, :, :, :1] * blocks[:, None, :, 0]
    for i in range(1, width):
        total.addcmul_(parts[:, :, :, i : i + 1], blocks[:, None, :, i])
    return total.view(x.shape)


def _small(x: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """As if what stands together stood apart."""
    slots, count, width, _ = blocks.shape
    spaced = blocks.permute(0, 2, 3, 1).unsqueeze(1).contiguous()
    parts = x.view(slots, x.shape[1], count, width).transpose(2, 3).reshape(x.shape)
    return _apart(parts, spaced).view(slots, x.shape[1], width, count).transpose(2, 3).reshape(x.shape)


def _product(x: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """x fp32 [rows, width]."""
    spaced = blocks if blocks.ndim == 4 else blocks.unsqueeze(-1)
    parts = x.view(x.shape[0], spaced.shape[0], spaced.shape[1], spaced.shape[3])
    return torch.einsum("rmis,mijs->rmjs", parts, spaced.float()).reshape(x.shape)


def _blocks(entry: Entry) -> torch.Tensor:
    (blocks,) = entry.tensors
    assert blocks is not None
    return blocks


def _shape(entry: Entry) -> torch.Size:
    return _blocks(entry).shape


def _stacked(entries: Sequence[Entry]) -> torch.Tensor:
    """fp32 [slots, ...] of blocks of one shape."""
    each = [_blocks(entry).float() for entry in entries]
    return torch.stack(each) if len(each) > 1 else each[0].unsqueeze(0)


def triton(out: torch.Tensor, x: torch.Tensor, rowmap: RowMap, table: BlockTable) -> None:
    from deltaserve_kernels.gpu import block

    block.launch(out, x, rowmap, table)


_PATHS = {Implementation.REFERENCE: reference, Implementation.CPU: cpu, Implementation.TRITON: triton}
