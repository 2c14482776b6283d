"""Dense: y += x Wᵀ + b, or y = x Wᵀ + b instead of the backbone's product; and heads, whose widths differ by slot."""

from collections.abc import Mapping, Sequence

import torch

from deltaserve_kernels.activations import activated
from deltaserve_kernels.dispatch import Implementation, path
from deltaserve_kernels.rowmap import RowMap
from deltaserve_kernels.slots import SlotTable

Layer = tuple[torch.Tensor, torch.Tensor | None, str | None]
"""Weight [out, in], bias [out] or None, activation (see `activations`) or None."""


class DenseTable(SlotTable):
    """Columns weight [out, in] and bias [out] (may be empty); scalar replace, 0 or 1."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        super().__init__(2, capacity, device)


def apply(y: torch.Tensor, x: torch.Tensor, rowmap: RowMap, table: DenseTable) -> None:
    """y += x Wᵀ + b in place; rows of a slot that replaces are overwritten instead.

    y fp32 [rows, out]; x [rows, in], any float dtype; products fp32. Bare rows are not touched.
    """
    if not table.touches(rowmap):
        return
    path(_PATHS, y.device)(y, x, rowmap, table)


def reference(y: torch.Tensor, x: torch.Tensor, rowmap: RowMap, table: DenseTable) -> None:
    for run, entry in table.entries(rowmap):
        weight, bias = entry.tensors
        assert weight is not None
        product = torch.nn.functional.linear(
            x[run.start : run.stop].float(), weight.float(), None if bias is None else bias.float()
        )
        if entry.scalars[0]:
            y[run.start : run.stop] = product
        else:
            y[run.start : run.stop] += product


def cpu(y: torch.Tensor, x: torch.Tensor, rowmap: RowMap, table: DenseTable) -> None:
    """Products go where they are wanted: what a slot costs is reading its weight, and nothing stands beside it."""
    for run, entry in table.entries(rowmap):
        weight, bias = entry.tensors
        assert weight is not None
        part = y[run.start : run.stop]
        # With beta 0 what was there is not read.
        part.addmm_(x[run.start : run.stop].float(), weight.float().T, beta=0 if entry.scalars[0] else 1)
        if bias is not None:
            part.add_(bias.float())


def heads(x: torch.Tensor, rowmap: RowMap, layers: Mapping[int, Sequence[Layer]]) -> list[torch.Tensor]:
    """Each row through its slot's layers: h = act(h Wᵀ + b). x [rows, hidden]; every row has a slot in `layers`.

    Returns a row's outputs as fp32 [width of its head], in row order.
    """
    bare = rowmap.rows - sum(run.rows for run in rowmap.runs)
    assert not bare and all(run.slot in layers for run in rowmap.runs), "a row without a head"
    return path(_HEADS, x.device)(x, rowmap, layers)


def reference_heads(x: torch.Tensor, rowmap: RowMap, layers: Mapping[int, Sequence[Layer]]) -> list[torch.Tensor]:
    out: list[torch.Tensor] = []
    for run in rowmap.runs:
        hidden = x[run.start : run.stop].float()
        for weight, bias, activation in layers[run.slot]:
            hidden = torch.nn.functional.linear(hidden, weight.float(), None if bias is None else bias.float())
            hidden = activated(hidden, activation)
        out.extend(hidden.unbind(0))
    return out


def triton(y: torch.Tensor, x: torch.Tensor, rowmap: RowMap, table: DenseTable) -> None:
    from deltaserve_kernels.gpu import dense

    dense.apply(y, x, rowmap, table)


def triton_heads(x: torch.Tensor, rowmap: RowMap, layers: Mapping[int, Sequence[Layer]]) -> list[torch.Tensor]:
    from deltaserve_kernels.gpu import heads as gpu

    return gpu.heads(x, rowmap, layers)


_HEADS = {Implementation.REFERENCE: reference_heads, Implementation.TRITON: triton_heads}
_PATHS = {Implementation.REFERENCE: reference, Implementation.CPU: cpu, Implementation.TRITON: triton}
