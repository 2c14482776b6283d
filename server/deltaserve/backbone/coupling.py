"""Couplings: an invertible block on the rows that enter the first layer, and its inverse before the logits."""

import torch

from deltaserve.deltas.adapters import Coupling, Net
from deltaserve_kernels import bottleneck
from deltaserve_kernels.activations import number_of
from deltaserve_kernels.bottleneck import BottleneckTable
from deltaserve_kernels.rowmap import RowMap


class CouplingTable:
    """Both nets of each slot's coupling; a second time for those that are undone, so that no others' rows are."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self._f, self._g, self._undone_f, self._undone_g = (BottleneckTable(slots, device) for _ in range(4))

    def put(self, slot: int, coupling: Coupling) -> None:
        pairs = [(self._f, coupling.f), (self._g, coupling.g)]
        if coupling.undone:
            pairs += [(self._undone_f, coupling.f), (self._undone_g, coupling.g)]
        for table, net in pairs:
            table.put(slot, *_columns(net))

    def discard(self, slot: int) -> None:
        for table in (self._f, self._g, self._undone_f, self._undone_g):
            table.discard(slot)

    def coupled(self, rows: torch.Tensor, rowmap: RowMap, factor: float = 1.0) -> torch.Tensor:
        """y1 = x1 + F(x2), y2 = x2 + G(y1) of rows / factor, times factor; `rows` itself where none is coupled.

        rows [rows, d], any float dtype. All is fp32, rounded once; rows of slots without a coupling are as they were.
        """
        if not self._f.touches(rowmap):
            return rows
        x1, x2 = _halves(rows.float() / factor)
        bottleneck.apply(x1, x2, rowmap, self._f)
        bottleneck.apply(x2, x1, rowmap, self._g)
        return _placed(rows, torch.cat((x1, x2), 1) * factor, rowmap, self._f)

    def uncoupled(self, rows: torch.Tensor, rowmap: RowMap) -> torch.Tensor:
        """x2 = y2 − G(y1), x1 = y1 − F(x2) for the slots whose coupling is undone; else as `coupled`."""
        if not self._undone_f.touches(rowmap):
            return rows
        y1, y2 = _halves(rows.float())
        y2 = y2 - _net(y1, rowmap, self._undone_g)
        y1 = y1 - _net(y2, rowmap, self._undone_f)
        return _placed(rows, torch.cat((y1, y2), 1), rowmap, self._undone_f)


def _columns(net: Net) -> tuple[tuple[torch.Tensor | None, ...], tuple[float, ...]]:
    return (net.down, net.up, net.down_bias, net.up_bias), (1.0, float(number_of(net.activation)))


def _halves(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    half = rows.shape[1] // 2
    return rows[:, :half].contiguous(), rows[:, half:].contiguous()


def _net(x: torch.Tensor, rowmap: RowMap, table: BottleneckTable) -> torch.Tensor:
    out = torch.zeros_like(x)
    bottleneck.apply(out, x, rowmap, table)
    return out


def _placed(rows: torch.Tensor, changed: torch.Tensor, rowmap: RowMap, table: BottleneckTable) -> torch.Tensor:
    grid = rowmap.grid([run for run, _ in table.entries(rowmap)])
    out = rows.clone()
    grid.put(out, changed[grid.rows].to(rows.dtype))
    return out
