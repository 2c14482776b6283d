"""AdapterFusion: each row attends over what its slot's member adapters make of it (arXiv 2005.00247).

    s_k = (t Queryᵀ + query_bias) · (u_k Keyᵀ);   p = softmax(s);   y += (Σ_k p_k u_k) Valueᵀ

The key's bias adds the same to every s_k, so p does not know it. Values come after the sum, a product a row instead of
one a member; with `folded` the key's goes into the query's and costs nothing.
"""

import torch

from deltaserve_kernels import dense
from deltaserve_kernels.dispatch import Implementation, path
from deltaserve_kernels.rowmap import Grid, RowMap, Run
from deltaserve_kernels.slots import SlotTable

MEMBERS = 32
"""The most that a slot may have."""


class FusionTable(SlotTable):
    """Columns query [d, d], query_bias [d], key [d, d], value [d, d], any of them None; scalar members.

    None is identity, and zeros for the bias, which needs a query.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        super().__init__(4, capacity, device)
        self.query, self.key, self.value = (dense.DenseTable(capacity, device) for _ in range(3))

    def put(self, slot: int, tensors: tuple[torch.Tensor | None, ...], scalars: tuple[float, ...] = ()) -> None:
        query, bias, key, value = tensors
        assert 1 <= scalars[0] <= MEMBERS and (query is not None or bias is None)
        super().put(slot, tensors, scalars)
        products = ((self.query, query, bias, 1.0), (self.key, key, None, 1.0), (self.value, value, None, 0.0))
        for table, weight, with_bias, replace in products:
            table.discard(slot)
            if weight is not None:
                table.put(slot, (weight, with_bias), (replace,))

    def drop(self, slot: int) -> None:
        super().drop(slot)
        for table in (self.query, self.key, self.value):
            table.discard(slot)


def folded(
    query: torch.Tensor | None, query_bias: torch.Tensor | None, key: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """A query and its bias that need no key: Keyᵀ Query and Keyᵀ query_bias, fp32. At load: it costs d³."""
    if key is None:
        return query, query_bias
    turned = key.float().T
    product = turned if query is None else turned @ query.float()
    return product.contiguous(), None if query_bias is None else turned @ query_bias.float()


def apply(y: torch.Tensor, t: torch.Tensor, members: torch.Tensor, rowmap: RowMap, table: FusionTable) -> None:
    """y += (Σ_k p_k u_k) Valueᵀ in place.

    y fp32 [rows, d]; t [rows, d], any float dtype, may be y itself; members fp32 [rows, most, d]: u_k of each row, of
    which those beyond its slot's `members` may hold anything. All is fp32. Bare rows, and those of slots without an
    entry, are not touched.
    """
    if not table.touches(rowmap):
        return
    most = max(int(entry.scalars[0]) for _, entry in table.entries(rowmap))
    assert members.shape[1] >= most and members.is_contiguous()
    asked, keys = t, members
    if table.query.touches(rowmap):
        asked = t.to(torch.float32, copy=True)
        dense.apply(asked, t, rowmap, table.query)
    if table.key.touches(rowmap):
        keys = members.clone()
        flat = members.flatten(0, 1)
        dense.apply(keys.view_as(flat), flat, rowmap.repeated(members.shape[1]), table.key)
    c = torch.empty_like(y)
    path(_PATHS, y.device)(y, c, asked.float(), keys, members, rowmap, table)
    dense.apply(y, c, rowmap, table.value)


def reference(
    y: torch.Tensor,
    c: torch.Tensor,
    asked: torch.Tensor,
    keys: torch.Tensor,
    members: torch.Tensor,
    rowmap: RowMap,
    table: FusionTable,
) -> None:
    """Σ_k p_k u_k: written to c for slots that have a value, added to y for others."""
    for run, entry in table.entries(rowmap):
        count = int(entry.scalars[0])
        k, u = (rows[run.start : run.stop, :count] for rows in (keys, members))
        p = torch.einsum("rd,rkd->rk", asked[run.start : run.stop], k).softmax(1)
        made = torch.einsum("rk,rkd->rd", p, u)
        if entry.tensors[3] is None:
            y[run.start : run.stop] += made
        else:
            c[run.start : run.stop] = made


def cpu(
    y: torch.Tensor,
    c: torch.Tensor,
    asked: torch.Tensor,
    keys: torch.Tensor,
    members: torch.Tensor,
    rowmap: RowMap,
    table: FusionTable,
) -> None:
    """Slots of as many members together, and what they give in one place."""
    for count, valued, grid in table.planned("", rowmap, lambda: _divided(table, rowmap)):
        made = _attended(asked[grid.rows], keys[grid.rows], members[grid.rows], count)
        (grid.put if valued else grid.add)(c if valued else y, made)


def _divided(table: FusionTable, rowmap: RowMap) -> list[tuple[int, bool, Grid]]:
    alike: dict[tuple[int, bool], list[Run]] = {}
    for run, entry in table.entries(rowmap):
        alike.setdefault((int(entry.scalars[0]), entry.tensors[3] is not None), []).append(run)
    return [(count, valued, rowmap.grid(runs)) for (count, valued), runs in alike.items()]


def _attended(asked: torch.Tensor, keys: torch.Tensor, members: torch.Tensor, count: int) -> torch.Tensor:
    p = torch.bmm(keys[:, :count], asked.unsqueeze(2)).softmax(1)
    return torch.bmm(p.transpose(1, 2), members[:, :count]).squeeze(1)


def triton(
    y: torch.Tensor,
    c: torch.Tensor,
    asked: torch.Tensor,
    keys: torch.Tensor,
    members: torch.Tensor,
    rowmap: RowMap,
    table: FusionTable,
) -> None:
    from deltaserve_kernels.gpu import fusion

    fusion.launch(y, c, asked, keys, members, rowmap, table, MEMBERS)


_PATHS = {Implementation.REFERENCE: reference, Implementation.CPU: cpu, Implementation.TRITON: triton}
