"""A LayerNorm or RMSNorm at which deltas act, whatever the family's class for it computes."""

import copy

import torch

from deltaserve.backbone.wrap import Columns, WrappedModule
from deltaserve.deltas.primitives import Affine, SitePrimitive
from deltaserve.deltas.sites import Site
from deltaserve.plan import Now
from deltaserve_kernels.affine import AffineTable, scale_output
from deltaserve_kernels.rowmap import RowMap


class WrappedNorm(WrappedModule):
    """y = norm(x), then y ⊙ scale + shift; rows of a slot that replaces run the norm with weight and bias of their own.

    x [..., rows, width]; a norm of heads has several vectors a row, [1, rows, heads, width].
    """

    def __init__(self, site: Site, module: torch.nn.Module, now: Now, slots: int, device: torch.device) -> None:
        # The same code over other parameters: a family's order of casts is nowhere written a second time.
        self._twin = copy.copy(module)
        super().__init__(site, module, now)
        self._affine, self._own = AffineTable(slots, device), AffineTable(slots, device)
        self.tables = {"affine": self._affine, "own": self._own}

    def placed(self, primitive: SitePrimitive) -> tuple[str, Columns]:
        match primitive:
            case Affine(None, scale, shift, replace):
                return "own" if replace else "affine", ((None, scale, shift), ())
        return super().placed(primitive)

    def applied(self, x: torch.Tensor, rowmap: RowMap) -> torch.Tensor:
        if x.dim() == 4 and x.stride(1) < x.stride(2):
            # A norm of heads that is given [1, heads, rows, d] (Gemma3): memory has the rows outside all the same.
            return self.applied(x.transpose(1, 2), rowmap).transpose(1, 2)
        y = self.inner(x)
        rows = y.reshape(rowmap.rows, -1, y.shape[-1])
        given = x.reshape(rows.shape)
        if self._own.touches(rowmap):
            rows = rows.clone()
            for run, entry in self._own.entries(rowmap):
                rows[run.start : run.stop] = self._normed(given[run.start : run.stop], *entry.tensors[1:])
        if self._affine.touches(rowmap):
            assert rows.shape[1] == 1, f"{self.site.name} norms heads, which have no scale of their own"
            total = rows[:, 0].float()
            scale_output(total, rowmap, self._affine)
            rows = total.to(y.dtype)
        return rows.reshape(y.shape)

    def _normed(self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
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
