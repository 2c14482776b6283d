"""Sparse: both paths against the equation in fp64, whatever the order of the places."""

import pytest
import torch

from deltaserve_kernels import sparse
from deltaserve_kernels.dispatch import Implementation, forced
from deltaserve_kernels.rowmap import RowMap
from deltaserve_kernels.testing import error_ratio, poisoned

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COUNTS = (40, 1, 0, 137, 5)


def table_of(inner: int, outer: int, dtype: torch.dtype, order: str) -> sparse.SparseTable:
    """Five slots: some places, one, none, places that occur twice, places of one output alone."""
    table = sparse.SparseTable(8, CPU)
    for slot, count in enumerate(COUNTS):
        flat = torch.randint(0, inner * outer, (count,))
        flat = torch.cat((flat, flat[:20])) if slot == 3 else flat % inner if slot == 4 else flat
        flat = flat.sort().values if order == "sorted" else flat
        index = torch.stack((flat // inner, flat % inner)).int()
        table.put(slot, (index.contiguous(), torch.randn(flat.shape[0]).to(dtype)))
    return table


def truth(y: torch.Tensor, x: torch.Tensor, each: list[int], table: sparse.SparseTable) -> torch.Tensor:
    out = y.double()
    for row, slot in enumerate(each):
        entry = table.get(slot)
        if entry is not None:
            (outputs, inputs), values = entry.tensors
            for o, i, v in zip(outputs.tolist(), inputs.tolist(), values.double().tolist(), strict=True):
                out[row, o] += x[row, i].double() * v
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ["sorted", "drawn"])
@pytest.mark.parametrize(("inner", "outer", "longest"), [(33, 17, 1), (1, 5, 3), (64, 96, 9)])
def test_every_row_gets_its_own(inner, outer, longest, dtype, order, spread, rows_of, implementation):
    rowmap, each = rows_of(spread, longest)
    table = table_of(inner, outer, dtype, order)
    x, y = torch.randn(rowmap.rows, inner).to(dtype), torch.randn(rowmap.rows, outer)
    ours = y.clone()
    with forced(implementation):
        sparse.apply(ours, x, rowmap, table)
    assert error_ratio(ours, truth(y, x, each, table)) <= 1e-5
    untouched = [slot < 0 or slot == 2 for slot in each]
    assert torch.equal(ours[untouched], y[untouched])


def test_poison_of_others_stays_out(implementation):
    table, rowmap = table_of(9, 7, torch.float32, "drawn"), RowMap.of([(0, 2), (6, 1), (3, 1), (-1, 1)], CPU)
    x, y = torch.randn(5, 9), torch.zeros(5, 7)
    for rows in (x, y):
        rows[[2, 4]] = poisoned(2, rows.shape[1])
    with forced(implementation):
        sparse.apply(y, x, rowmap, table)
    mine = [0, 1, 3]
    assert error_ratio(y[mine], truth(torch.zeros(3, 7), x[mine], [0, 0, 3], table)) <= 1e-5
    assert y[[2, 4]].isnan().all()


def test_what_is_kept_follows_changes():
    """Sorted places in fp32 are kept as they are: only where each output begins is new."""
    table, rowmap = table_of(9, 7, torch.float32, "sorted"), RowMap.of([(0, 1), (3, 2)], CPU)
    x, y = torch.randn(3, 9), torch.zeros(3, 7)
    with forced(Implementation.CPU):
        sparse.apply(y, x, rowmap, table)
        assert table.cached_bytes == 2 * 7 * 4
        table.drop(3)
        assert table.cached_bytes == 7 * 4
        table.drop(0)
        table.put(0, (torch.tensor([[2, 0], [1, 1]], dtype=torch.int32), torch.tensor([3.0, 1.0])))
        again = torch.zeros(3, 7)
        sparse.apply(again, x, rowmap, table)
        assert table.cached_bytes == 7 * 4 + 2 * 4 + 2 * 4
    assert torch.equal(again[0, [0, 2]], torch.stack((x[0, 1], 3 * x[0, 1]))) and again.count_nonzero() == 2
