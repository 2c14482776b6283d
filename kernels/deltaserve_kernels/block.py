"""Block: rows times a block-diagonal matrix, before or after a linear. OFT, BOFT, RoAd."""

from collections.abc import Callable, Sequence

import torch

from deltaserve_kernels.dispatch import Implementation, path
from deltaserve_kernels.rowmap import RowMap
from deltaserve_kernels.slots import Entry, SlotTable
from deltaserve_kernels.stacks import Found, Stacks, parted

_SMALL = 8
"""Width of blocks up to which sums over whole rows beat many small products."""


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

    def stack(self, found: Found, shape: torch.Size) -> torch.Tensor:
        """See `_stacked`; of these runs' slots, whose blocks are all of one shape."""
        (blocks,) = self.stacks.of(found, self.generation, shape)
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
    """Short runs whose blocks are alike in one batched product."""
    short, long = parted(table.entries(rowmap))
    alike: dict[torch.Size, Found] = {}
    for each in short:
        alike.setdefault(_blocks(each[1]).shape, []).append(each)
    for shape, found in alike.items():
        grid = rowmap.grid([run for run, _ in found])
        grid.put(out, grid.given(_way(shape)(grid.taken(x).float(), table.stack(found, shape))).to(out.dtype))
    for run, entry in long:
        part = x[run.start : run.stop].float().unsqueeze(0)
        out[run.start : run.stop] = _way(_blocks(entry).shape)(part, _stacked([entry]))[0].to(out.dtype)


def _way(shape: torch.Size) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Of x fp32 [slots, depth, width] and `_stacked` blocks of this shape to x′."""
    if len(shape) == 4:
        return _apart
    return _together if shape[-1] > _SMALL else _small


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
    slots, _, width, _, count = blocks.shape
    parts = x.view(slots, x.shape[1], count, width).transpose(2, 3).reshape(x.shape)
    return _apart(parts, blocks).view(slots, x.shape[1], width, count).transpose(2, 3).reshape(x.shape)


def _product(x: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """x fp32 [rows, width]."""
    spaced = blocks if blocks.ndim == 4 else blocks.unsqueeze(-1)
    parts = x.view(x.shape[0], spaced.shape[0], spaced.shape[1], spaced.shape[3])
    return torch.einsum("rmis,mijs->rmjs", parts, spaced.float()).reshape(x.shape)


def _blocks(entry: Entry) -> torch.Tensor:
    (blocks,) = entry.tensors
    assert blocks is not None
    return blocks


def _stacked(entries: Sequence[Entry]) -> torch.Tensor:
    """fp32 [slots, n, b, b], small ones as [slots, 1, b, b, n]; and [slots, m, b, b, s]. Of blocks of one shape."""
    each = [_blocks(entry).float() for entry in entries]
    blocks = torch.stack(each) if len(each) > 1 else each[0].unsqueeze(0)
    small = blocks.ndim == 4 and blocks.shape[-1] <= _SMALL
    return blocks.permute(0, 2, 3, 1).unsqueeze(1).contiguous() if small else blocks


def triton(out: torch.Tensor, x: torch.Tensor, rowmap: RowMap, table: BlockTable) -> None:
    from deltaserve_kernels.gpu import block

    block.launch(out, x, rowmap, table)


_PATHS = {Implementation.REFERENCE: reference, Implementation.CPU: cpu, Implementation.TRITON: triton}
