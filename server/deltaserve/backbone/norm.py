"""A LayerNorm or RMSNorm at which deltas act, whatever the family's class for it computes."""

import copy

import torch

from deltaserve.backbone.adapters import Chain
from deltaserve.backbone.ending import View
from deltaserve.backbone.wrap import Columns, WrappedModule
from deltaserve.deltas.primitives import Affine, SitePrimitive
from deltaserve.deltas.sites import Site
from deltaserve.plan import Now
from deltaserve_kernels.affine import AffineTable, scale_output
from deltaserve_kernels.rowmap import RowMap


class WrappedNorm(WrappedModule):
    """y = norm(x), then y ⊙ scale + shift; rows of a slot that replaces run the norm with weight and bias of their own.

    Rows that an adapter in front made to stand for the norm's come in y's place; then the adapters that stand here.
    x [..., rows, width]; a norm of heads has several vectors a row, [1, rows, heads, width].
    """

    def __init__(self, site: Site, module: torch.nn.Module, now: Now, slots: int, device: torch.device) -> None:
        # The same code over other parameters: a family's order of casts is nowhere written a second time.
        self._twin = copy.copy(module)
        super().__init__(site, module, now)
        self._affine, self._own = AffineTable(slots, device), AffineTable(slots, device)
        self.adapters: Chain = Chain(slots, device)
        self._expecting: set[int] = set()
        self.tables = {"affine": self._affine, "own": self._own}

    def placed(self, primitive: SitePrimitive) -> tuple[str, Columns]:
        match primitive:
            case Affine(None, scale, shift, replace):
                return "own" if replace else "affine", ((None, scale, shift), ())
        return super().placed(primitive)

    def expect(self, slot: int) -> None:
        """From now on rows in `Now.instead` may stand for what the norm gives this slot."""
        self._expecting.add(slot)
        self._here.add(slot)
        self._follow()

    def forget(self, slot: int) -> None:
        if slot in self._expecting:
            self._expecting.discard(slot)
            self._here.discard(slot)
        super().forget(slot)

    def applied(self, x: torch.Tensor, rowmap: RowMap) -> torch.Tensor:
        if x.dim() == 4 and x.stride(1) < x.stride(2):
            # A norm of heads that is given [1, heads, rows, d] (Gemma3): memory has the rows outside all the same.
            return self.applied(x.transpose(1, 2), rowmap).transpose(1, 2)
        y = self.normed(x, rowmap)
        instead = self._now.instead.pop(self.site.name, ())
        adapted = self.adapters.touches(rowmap)
        if not instead and not adapted:
            return y
        total = y.reshape(rowmap.rows, -1).float()
        assert total.shape[1] == self.site.out_features, f"{self.site.name} norms heads, which no adapter can edit"
        for grid, rows in instead:
            grid.put(total, rows)
        if adapted:
            self.adapters.apply(
                View(self._now, self.site.axis, x.reshape(total.shape), total, y.dtype, self.adapters.ending)
            )
        return total.to(y.dtype).view(y.shape)

    def edits(self, rowmap: RowMap) -> bool:
        """Whether adapters that stand here act on any of these rows."""
        return self.adapters.touches(rowmap)

    def normed(self, x: torch.Tensor, rowmap: RowMap) -> torch.Tensor:
        """What the norm gives, with all that acts at it but adapters and what they put here."""
        y = self.inner(x)
        rows = y.reshape(rowmap.rows, -1, y.shape[-1])
        given = x.reshape(rows.shape)
        if self._own.touches(rowmap):
            rows = rows.clone()
            for run, entry in self._own.entries(rowmap):
                rows[run.start : run.stop] = self._by(given[run.start : run.stop], *entry.tensors[1:])
        if self._affine.touches(rowmap):
            assert rows.shape[1] == 1, f"{self.site.name} norms heads, which have no scale of their own"
            total = rows[:, 0].float()
            scale_output(total, rowmap, self._affine)
            rows = total.to(y.dtype)
        return rows.reshape(y.shape)

    def _by(self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
        """The module's own forward with these parameters; None keeps the backbone's."""
        parameters = dict(self.module._parameters)
        for name, own in (("weight", weight), ("bias", bias)):
            before = parameters.get(name)
            if own is not None and before is not None:
                parameters[name] = torch.nn.Parameter(own.to(before.dtype), requires_grad=False)
        self._twin._parameters = parameters
        normed = self._twin.forward(x)
        assert isinstance(normed, torch.Tensor)
        return normed
