"""A module of the backbone at which deltas act. Its forward is changed in place, and only while some delta is there.

Nothing else about the module changes: its name, its weights, ties and type stay, and a backbone without resident
deltas runs transformers' own code.
"""

from collections.abc import Callable, Sequence

import torch

from deltaserve.deltas.primitives import Affine, Dense, LowRank, SitePrimitive
from deltaserve.deltas.sites import Axis, Site
from deltaserve.plan import Now
from deltaserve_kernels.affine import AffineTable, scale_input, scale_output
from deltaserve_kernels.dense import DenseTable
from deltaserve_kernels.dense import apply as apply_dense
from deltaserve_kernels.lowrank import LowRankTable
from deltaserve_kernels.lowrank import apply as apply_lowrank

Forward = Callable[[torch.Tensor], torch.Tensor]


class WrappedModule:
    """One linear, Conv1D or norm. y = W u + b, u = x ⊙ in_scale; LowRank and Dense added from u; y ⊙ scale + shift.

    x [..., in] holds the rows of `site.axis` in its leading dimensions. What acts is summed in fp32 and rounded once.
    """

    def __init__(self, site: Site, module: torch.nn.Module, now: Now, slots: int, device: torch.device) -> None:
        self.site = site
        self._module = module
        self._inner: Forward = module.forward
        self._now = now
        self._lowrank = LowRankTable(slots, device)
        self._affine = AffineTable(slots, device)
        self._dense = DenseTable(slots, device)
        self._tables = (self._lowrank, self._affine, self._dense)
        self._here: set[int] = set()

    def install(self, slot: int, primitives: Sequence[SitePrimitive]) -> None:
        """Publishes a slot's primitives, whose tensors are on the device. At most one of each type."""
        assert slot not in self._here
        for primitive in primitives:
            match primitive:
                case LowRank(a, b, scale):
                    assert slot not in self._lowrank
                    self._lowrank.put(slot, (a, b), (scale,))
                case Affine(in_scale, scale_, shift):
                    assert slot not in self._affine
                    self._affine.put(slot, (in_scale, scale_, shift))
                case Dense(weight, bias, replace):
                    assert slot not in self._dense
                    self._dense.put(slot, (weight, bias), (float(replace),))
                case _:
                    raise AssertionError(f"{type(primitive).__name__} cannot act at {self.site.name}")
        if not self._here:
            self._module.forward = self._forward
        self._here.add(slot)

    def remove(self, slot: int) -> None:
        """Takes a slot's primitives back; the last one gives the module its own forward back."""
        for table in self._tables:
            if slot in table:
                table.drop(slot)
        self._here.discard(slot)
        if not self._here:
            self._module.__dict__.pop("forward", None)

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        rowmap = self._now.rowmap(self.site.axis)
        if self.site.axis is Axis.MEMORY and rowmap.rows == 0:
            return x.new_zeros(*x.shape[:-1], self.site.out_features)
        if rowmap.bare or self._here.isdisjoint(rowmap.active):
            return self._inner(x)
        rows = x.reshape(-1, x.shape[-1])
        assert rows.shape[0] == rowmap.rows, f"{self.site.name}: {rows.shape[0]} rows, {rowmap.rows} planned"
        u = scale_input(rows, rowmap, self._affine)
        y = self._inner(u)
        dtype = y.dtype
        total = y.float()
        # A Dense that replaces overwrites: what is added comes after it.
        apply_dense(total, u, rowmap, self._dense)
        apply_lowrank(total, u, rowmap, self._lowrank)
        scale_output(total, rowmap, self._affine)
        return total.to(dtype).view(*x.shape[:-1], total.shape[-1])
