"""An embedding at which deltas act: rows of their own for some ids, or a change of all that is looked up."""

import torch

from deltaserve.backbone.wrap import Columns, WrappedModule
from deltaserve.deltas.primitives import Affine, Block, Dense, LowRank, Rows, SitePrimitive
from deltaserve.deltas.sites import Site
from deltaserve.plan import Now
from deltaserve_kernels import affine, block, embed, rows
from deltaserve_kernels.rowmap import RowMap


class WrappedEmbedding(WrappedModule):
    """E[ids] with E′ for E where a slot brings its own; plus s · A[:, ids]ᵀ Bᵀ; then Block; then ⊙ scale; then Rows.

    Where the family's embedding multiplies what it looked up (Gemma), all of it is multiplied. ids int64 [..., rows].
    """

    def __init__(self, site: Site, module: torch.nn.Module, now: Now, slots: int, device: torch.device) -> None:
        super().__init__(site, module, now)
        self._whole = embed.EmbeddingTable(slots, device)
        self._lowrank = embed.LookupTable(slots, device)
        self._turn = block.BlockTable(slots, device)
        self._affine = affine.AffineTable(slots, device)
        self._rows = rows.RowsTable(slots, device)
        self._plain = type(module) is torch.nn.Embedding and site.factor == 1.0
        self.tables = {
            "whole": self._whole,
            "lowrank": self._lowrank,
            "block_out": self._turn,
            "affine": self._affine,
            "rows": self._rows,
        }

    @property
    def _scale(self) -> float:
        return self.site.factor

    def placed(self, primitive: SitePrimitive) -> tuple[str, Columns]:
        match primitive:
            case Dense(weight, None, True):
                return "whole", ((weight,), ())
            case LowRank(a, b, scale, inner, outer):
                return "lowrank", ((a, b, inner, outer), (scale,))
            case Block(blocks, True):
                return "block_out", ((blocks,), ())
            case Affine(None, scale, None, False):
                return "affine", ((None, scale, None), ())
            case Rows(index, values):
                return "rows", ((index, values), ())
        return super().placed(primitive)

    def applied(self, x: torch.Tensor, rowmap: RowMap) -> torch.Tensor:
        ids = x.reshape(-1)
        assert ids.shape[0] == rowmap.rows, f"{self.site.name}: {ids.shape[0]} ids, {rowmap.rows} planned"
        if self._plain and not any(table.touches(rowmap) for table in (self._lowrank, self._turn, self._affine)):
            weight = self.module.weight
            assert isinstance(weight, torch.Tensor)
            return embed.rows_of(ids, rowmap, weight, self._whole, self._rows).view(*x.shape, -1)
        found = self.inner(x)
        y = found.reshape(-1, found.shape[-1]).clone()
        embed.look_up(y, ids, rowmap, self._whole, self._scale)
        embed.add_low_rank(y, ids, rowmap, self._lowrank, self._scale)
        if self._turn.touches(rowmap) or self._affine.touches(rowmap):
            total = y.float()
            block.turn(total, rowmap, self._turn)
            affine.scale_output(total, rowmap, self._affine)
            y = total.to(y.dtype)
        rows.replace_rows(y, ids, rowmap, self._rows, self._scale)
        return y.view(found.shape)
