"""Bottleneck: y += gate · (scale · f(n(u) Downᵀ + down_bias) Upᵀ + up_bias) for each row's own. Adapters.

Houlsby (arXiv 1902.00751), Pfeiffer (2005.00247), parallel (2110.04366), Compacter (2106.04647) with its products made.
"""

from collections.abc import Sequence

import torch

from deltaserve_kernels import ownnorm
from deltaserve_kernels.activations import activated, name_of
from deltaserve_kernels.dispatch import Implementation, path
from deltaserve_kernels.rowmap import RowMap
from deltaserve_kernels.slots import Entry, SlotTable
from deltaserve_kernels.stacks import Group, Stack, Stacks, bucket, grouped

_Alike = tuple[int, float]
"""A bucket of widths, and an activation's number."""


class BottleneckTable(SlotTable):
    """Columns down [b, d], up [out, b], down_bias [b], up_bias [out], biases None for zeros; scalars scale and f.

    f is a number of `activations.number_of`. `scale` does not cover up_bias. Widths b differ freely between slots. n is
    what `norms` has for a slot, put there beside; identity where it has nothing.
    """

    strided = frozenset((0, 1))

    def __init__(self, capacity: int, device: torch.device) -> None:
        super().__init__(4, capacity, device)
        self.norms = ownnorm.NormTable(capacity, device)
        self._stacks = Stacks(_stacked)

    def put(self, slot: int, tensors: tuple[torch.Tensor | None, ...], scalars: tuple[float, ...] = ()) -> None:
        """See `SlotTable.put`. weight and bias [d] of a norm in front may follow, and its eps then follows f."""
        super().put(slot, tensors[:4], scalars[:2])
        self.norms.discard(slot)
        if any(tensor is not None for tensor in tensors[4:]):
            self.norms.put(slot, tensors[4:], scalars[2:])

    def drop(self, slot: int) -> None:
        super().drop(slot)
        self.norms.discard(slot)

    @property
    def cached_bytes(self) -> int:
        """Bytes of the stacked copies."""
        return self._stacks.nbytes + self.norms.cached_bytes

    def stack(self, group: Group) -> Stack:
        """fp32 Downᵀ [slots, d, b], down_bias [slots, 1, b], scale · Upᵀ [slots, b, out], up_bias [slots, 1, out].

        Widths are padded with zeros to the largest; a bias is None where no slot has it.
        """
        return self._stacks.of(group, self.generation)


def apply(
    y: torch.Tensor,
    u: torch.Tensor,
    rowmap: RowMap,
    table: BottleneckTable,
    gates: torch.Tensor | None = None,
) -> None:
    """y += gate · (scale · f(n(u) Downᵀ + down_bias) Upᵀ + up_bias) in place.

    y fp32 [rows, out]; u [rows, d], any float dtype, may be y itself; gates fp32 [rows], a number for each row, None
    for ones. All is fp32, nothing is rounded on the way. Bare rows, and those of slots without an entry, are not
    touched, and what u and gates have there does not matter.
    """
    if not table.touches(rowmap):
        return
    path(_PATHS, y.device)(y, ownnorm.normed(u, rowmap, table.norms), rowmap, table, gates)


def reference(
    y: torch.Tensor, u: torch.Tensor, rowmap: RowMap, table: BottleneckTable, gates: torch.Tensor | None
) -> None:
    for run, entry in table.entries(rowmap):
        down, up, down_bias, up_bias = (None if t is None else t.float() for t in entry.tensors)
        assert down is not None and up is not None
        hidden = torch.nn.functional.linear(u[run.start : run.stop].float(), down, down_bias)
        z = entry.scalars[0] * (activated(hidden, _activation(entry)) @ up.T)
        if up_bias is not None:
            z = z + up_bias
        y[run.start : run.stop] += z if gates is None else gates[run.start : run.stop, None] * z


def cpu(y: torch.Tensor, u: torch.Tensor, rowmap: RowMap, table: BottleneckTable, gates: torch.Tensor | None) -> None:
    """Short runs of widths in one bucket, with one activation, as two batched products over stacked weights."""
    groups = table.planned("", rowmap, lambda: grouped(table.entries(rowmap), rowmap, _alike))
    for group in groups.together:
        grid, (down, down_bias, up, up_bias) = group.grid, table.stack(group)
        assert down is not None and up is not None
        hidden = activated(_product(grid.taken(u).float(), down, down_bias), _activation(group.found[0][1]))
        added = grid.given(_product(hidden, up, up_bias))
        grid.add(y, added if gates is None else added.mul_(gates[grid.rows].unsqueeze(1)))
    for run, entry in groups.alone:
        down, up, down_bias, up_bias = (None if t is None else t.float() for t in entry.tensors)
        assert down is not None and up is not None
        part = y[run.start : run.stop]
        hidden = torch.nn.functional.linear(u[run.start : run.stop].float(), down, down_bias)
        hidden = activated(hidden, _activation(entry))
        gate = None if gates is None else gates[run.start : run.stop, None]
        part.addmm_(hidden if gate is None else hidden.mul_(gate), up.T, alpha=entry.scalars[0])
        if up_bias is not None:
            part.add_(up_bias if gate is None else gate * up_bias)


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.bmm(x, weight) if bias is None else torch.baddbmm(bias, x, weight)


def _activation(entry: Entry) -> str | None:
    return name_of(int(entry.scalars[1]))


def _alike(entry: Entry) -> _Alike:
    down = entry.tensors[0]
    assert down is not None
    return bucket(int(down.shape[0])), entry.scalars[1]


def _stacked(entries: Sequence[Entry]) -> Stack:
    columns = list(zip(*(entry.tensors for entry in entries), strict=True))
    downs, ups = ([t for t in column if t is not None] for column in columns[:2])
    count, width = len(entries), max(down.shape[0] for down in downs)
    down = torch.zeros(count, downs[0].shape[1], width)
    up = torch.zeros(count, width, ups[0].shape[0])
    for i, entry in enumerate(entries):
        down[i, :, : downs[i].shape[0]] = downs[i].T
        up[i, : ups[i].shape[1]] = ups[i].float().T * entry.scalars[0]
    return down, _vectors(columns[2], width), up, _vectors(columns[3], up.shape[2])


def _vectors(tensors: Sequence[torch.Tensor | None], width: int) -> torch.Tensor | None:
    """fp32 [slots, 1, width], zeros where there is nothing; None where no slot has one."""
    if all(tensor is None for tensor in tensors):
        return None
    out = torch.zeros(len(tensors), 1, width)
    for row, tensor in zip(out, tensors, strict=True):
        if tensor is not None:
            row[0, : tensor.shape[0]] = tensor
    return out


def triton(
    y: torch.Tensor, u: torch.Tensor, rowmap: RowMap, table: BottleneckTable, gates: torch.Tensor | None
) -> None:
    from deltaserve_kernels.gpu import bottleneck

    bottleneck.launch(y, u, rowmap, table, gates)


_PATHS = {Implementation.REFERENCE: reference, Implementation.CPU: cpu, Implementation.TRITON: triton}
