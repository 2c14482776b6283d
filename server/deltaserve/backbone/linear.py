"""A linear or Conv1D at which deltas act: the fixed order of all that can happen there."""

import torch

from deltaserve.backbone.adapters import Chain
from deltaserve.backbone.ending import View
from deltaserve.backbone.wrap import Columns, WrappedModule
from deltaserve.deltas.primitives import Affine, Block, Dense, LowRank, Rows, SitePrimitive, Sparse
from deltaserve.deltas.sites import Site
from deltaserve.plan import Now
from deltaserve_kernels import affine, block, dense, lowrank, rows, sparse
from deltaserve_kernels.rowmap import RowMap


class WrappedLinear(WrappedModule):
    """See `deltas.primitives` for the order.

    x [..., in] holds the rows of `site.axis` in its leading dimensions. What acts is summed in fp32 and rounded once.
    """

    def __init__(self, site: Site, module: torch.nn.Module, now: Now, slots: int, device: torch.device) -> None:
        super().__init__(site, module, now)
        self.adapters: Chain = Chain(slots, device)
        self._turn_in, self._turn_out = block.BlockTable(slots, device), block.BlockTable(slots, device)
        self._affine = affine.AffineTable(slots, device)
        self._dense = dense.DenseTable(slots, device)
        self._lowrank = lowrank.LowRankTable(slots, device)
        self._sparse = sparse.SparseTable(slots, device)
        self._rows = rows.RowsTable(slots, device)
        self.tables = {
            "block_in": self._turn_in,
            "block_out": self._turn_out,
            "affine": self._affine,
            "dense": self._dense,
            "lowrank": self._lowrank,
            "sparse": self._sparse,
            "rows": self._rows,
        }

    def placed(self, primitive: SitePrimitive) -> tuple[str, Columns]:
        match primitive:
            case LowRank(a, b, scale, inner, outer):
                return "lowrank", ((a, b, inner, outer), (scale,))
            case Affine(in_scale, scale_, shift, False):
                return "affine", ((in_scale, scale_, shift), ())
            case Dense(weight, bias, replace):
                return "dense", ((weight, bias), (float(replace),))
            case Block(blocks, outputs):
                return "block_out" if outputs else "block_in", ((blocks,), ())
            case Sparse(index, values):
                return "sparse", ((index, values), ())
            case Rows(index, values):
                return "rows", ((index, values), ())
        return super().placed(primitive)

    def applied(self, x: torch.Tensor, rowmap: RowMap) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        assert flat.shape[0] == rowmap.rows, f"{self.site.name}: {flat.shape[0]} rows, {rowmap.rows} planned"
        u = affine.scale_input(block.turned(flat, rowmap, self._turn_in), rowmap, self._affine)
        y = self.inner(u)
        total = y.float()
        # A Dense that replaces overwrites: what is added comes after it.
        dense.apply(total, u, rowmap, self._dense)
        lowrank.apply(total, u, rowmap, self._lowrank)
        sparse.apply(total, u, rowmap, self._sparse)
        rows.replace_outputs(total, u, rowmap, self._rows)
        block.turn(total, rowmap, self._turn_out)
        affine.scale_output(total, rowmap, self._affine)
        if self.adapters.touches(rowmap):
            self.adapters.apply(View(self._now, self.site.axis, flat, total, y.dtype, self.adapters.ending))
        return total.to(y.dtype).view(*x.shape[:-1], total.shape[-1])
