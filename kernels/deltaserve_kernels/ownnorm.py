"""OwnNorm: y = (y − mean) / √(var + eps) ⊙ weight + bias over each row's numbers: adapters' own LayerNorms."""

from collections.abc import Sequence

import torch

from deltaserve_kernels.dispatch import Implementation, path
from deltaserve_kernels.rowmap import RowMap
from deltaserve_kernels.slots import Entry, SlotTable
from deltaserve_kernels.stacks import Group, Stack, Stacks, by_row


class NormTable(SlotTable):
    """Columns weight [d] and bias [d]; scalar eps."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        super().__init__(2, capacity, device)
        self._stacks = Stacks(_stacked)

    @property
    def cached_bytes(self) -> int:
        """Bytes of the stacked copies."""
        return self._stacks.nbytes

    def stack(self, group: Group) -> tuple[torch.Tensor, ...]:
        """fp32 weight, bias [entries, d] and eps [entries, 1]."""
        stack = self._stacks.of(group, self.generation)
        return tuple(tensor for tensor in stack if tensor is not None)


def apply(y: torch.Tensor, rowmap: RowMap, table: NormTable) -> None:
    """y = norm(y) in place. y fp32 [rows, d]; rows of slots without a norm, and bare ones, are not touched."""
    if table.touches(rowmap):
        path(_PATHS, y.device)(y, rowmap, table)


def normed(x: torch.Tensor, rowmap: RowMap, table: NormTable) -> torch.Tensor:
    """The same of x [rows, d], any float dtype: fp32, never rounded; x itself where no row has a norm."""
    if not table.touches(rowmap):
        return x
    y = x.to(torch.float32, copy=True)
    path(_PATHS, y.device)(y, rowmap, table)
    return y


def reference(y: torch.Tensor, rowmap: RowMap, table: NormTable) -> None:
    for run, entry in table.entries(rowmap):
        _one(y[run.start : run.stop], entry)


def cpu(y: torch.Tensor, rowmap: RowMap, table: NormTable) -> None:
    """Short runs in one go, each row by its own row of the stack."""
    groups = table.planned("", rowmap, lambda: by_row(table.entries(rowmap), rowmap))
    for group in groups.together:
        weight, bias, eps = table.stack(group)
        for part, rows in group.grid.pieces(y):
            variance, mean = torch.var_mean(part, 1, correction=0, keepdim=True)
            part.sub_(mean).mul_(variance.add_(eps[rows]).rsqrt_()).mul_(weight[rows]).add_(bias[rows])
    for run, entry in groups.alone:
        _one(y[run.start : run.stop], entry)


def _one(part: torch.Tensor, entry: Entry) -> None:
    weight, bias = entry.tensors
    assert weight is not None and bias is not None
    part.copy_(torch.nn.functional.layer_norm(part, part.shape[1:], weight.float(), bias.float(), entry.scalars[0]))


def _stacked(entries: Sequence[Entry]) -> Stack:
    columns = zip(*(entry.tensors for entry in entries), strict=True)
    eps = torch.tensor([[entry.scalars[0]] for entry in entries])
    return (*(torch.stack([t.float() for t in column if t is not None]) for column in columns), eps)


def triton(y: torch.Tensor, rowmap: RowMap, table: NormTable) -> None:
    from deltaserve_kernels.gpu import ownnorm

    ownnorm.launch(y, rowmap, table)


_PATHS = {Implementation.REFERENCE: reference, Implementation.CPU: cpu, Implementation.TRITON: triton}
