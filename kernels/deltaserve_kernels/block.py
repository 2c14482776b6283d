"""Block: rows times a block-diagonal matrix, before or after a linear. OFT, BOFT, RoAd."""

import torch

from deltaserve_kernels.rowmap import RowMap
from deltaserve_kernels.slots import SlotTable


class BlockTable(SlotTable):
    """One column: blocks [n, b, b] with n · b the width of the rows. n and b differ freely between slots."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        super().__init__(1, capacity, device)


def turned(x: torch.Tensor, rowmap: RowMap, table: BlockTable) -> torch.Tensor:
    """x′ = x · diag(R_1, ..., R_n) for rows whose slot has one; x itself where none has.

    x [rows, width], any float dtype; products and sums fp32, rounded once to x's dtype. Bare rows are bit-identical.
    """
    if not table.touches(rowmap):
        return x
    out = x.clone()
    for run, entry in table.entries(rowmap):
        out[run.start : run.stop] = _product(x[run.start : run.stop].float(), entry.tensors[0]).to(x.dtype)
    return out


def turn(y: torch.Tensor, rowmap: RowMap, table: BlockTable) -> None:
    """The same in place. y fp32 [rows, width]; bare rows are not touched."""
    if not table.touches(rowmap):
        return
    for run, entry in table.entries(rowmap):
        y[run.start : run.stop] = _product(y[run.start : run.stop], entry.tensors[0])


def _product(x: torch.Tensor, blocks: torch.Tensor | None) -> torch.Tensor:
    assert blocks is not None
    count, width, _ = blocks.shape
    parts = x.view(x.shape[0], count, width).transpose(0, 1)
    return torch.bmm(parts, blocks.float()).transpose(0, 1).reshape(x.shape)
