"""Low rank: both paths against the equation, one row at a time and in fp64."""

import pytest
import torch

from deltaserve_kernels import lowrank
from deltaserve_kernels.dispatch import Implementation, forced
from deltaserve_kernels.rowmap import RowMap
from deltaserve_kernels.testing import error_ratio

CPU = torch.device("cpu")
RANKS = (1, 4, 7, 16, 3)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def table_of(inner: int, outer: int, dtype: torch.dtype) -> lowrank.LowRankTable:
    g = torch.Generator().manual_seed(inner + outer)
    table = lowrank.LowRankTable(8, CPU)
    for slot, rank in enumerate(RANKS):
        a, b = (torch.randn(shape, generator=g).to(dtype) for shape in ((rank, inner), (outer, rank)))
        table.put(slot, (a, b), (0.5 + slot,))
    return table


def truth(y: torch.Tensor, x: torch.Tensor, each: list[int], table: lowrank.LowRankTable) -> torch.Tensor:
    out = y.double()
    for row, slot in enumerate(each):
        entry = table.get(slot)
        if entry is not None:
            a, b = (t.double() for t in entry.tensors)
            out[row] += entry.scalars[0] * (b @ (a @ x[row].double()))
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("longest", [1, 3, 9])
@pytest.mark.parametrize(("inner", "outer"), [(33, 17), (1, 5), (64, 96)])
def test_every_row_gets_its_own(inner, outer, longest, dtype, spread, rows_of, implementation):
    rowmap, each = rows_of(spread, longest)
    table = table_of(inner, outer, dtype)
    x, y = torch.randn(rowmap.rows, inner).to(dtype), torch.randn(rowmap.rows, outer)
    ours = y.clone()
    with forced(implementation):
        lowrank.apply(ours, x, rowmap, table)
    assert error_ratio(ours, truth(y, x, each, table)) <= 1e-5
    bare = [row for row, slot in enumerate(each) if slot < 0]
    assert torch.equal(ours[bare], y[bare])


@pytest.mark.parametrize("slots", [(0, 1, 2), (4, 0, 2, 1), (2, -1, 3, 1)])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_stacked_rows_of_distinct_deltas(slots, rows, implementation):
    """Equal short runs, together or with bare rows between them: the batched product."""
    each = [slot for slot in slots for _ in range(rows)]
    rowmap = RowMap.of([(slot, rows) for slot in slots], CPU)
    table = table_of(40, 24, torch.float32)
    x, y = torch.randn(len(each), 40), torch.randn(len(each), 24)
    ours = y.clone()
    with forced(implementation):
        lowrank.apply(ours, x, rowmap, table)
    assert error_ratio(ours, truth(y, x, each, table)) <= 1e-5
    assert torch.equal(ours[[s < 0 for s in each]], y[[s < 0 for s in each]])
    assert (table.cached_bytes > 0) is (implementation is Implementation.CPU)


def test_the_same_slot_in_two_runs_of_one_forward():
    rowmap = RowMap.of([(1, 1), (3, 1), (1, 1)], CPU)
    table, x, y = table_of(8, 6, torch.float32), torch.randn(3, 8), torch.zeros(3, 6)
    ours = y.clone()
    lowrank.apply(ours, x, rowmap, table)
    assert error_ratio(ours, truth(y, x, [1, 3, 1], table)) <= 1e-5


def test_stacks_are_bounded_and_follow_changes():
    table, rowmap = table_of(8, 6, torch.float32), RowMap.of([(0, 1), (1, 1)], CPU)
    x = torch.randn(2, 8)
    first = torch.zeros(2, 6)
    lowrank.apply(first, x, rowmap, table)
    held = table.cached_bytes
    for slots in ((1, 2), (2, 3), (3, 4), (0, 2)):
        lowrank.apply(torch.zeros(2, 6), x, RowMap.of([(s, 1) for s in slots], CPU), table)
    assert table.cached_bytes <= 2 * 4 * 2 * 16 * (8 + 6) and held > 0
    lowrank.apply(torch.zeros(2, 6), x, rowmap, table)
    table.drop(0)
    table.put(0, (torch.zeros(2, 8), torch.zeros(6, 2)), (1.0,))
    second = torch.zeros(2, 6)
    lowrank.apply(second, x, rowmap, table)
    assert not second[0].any() and torch.equal(second[1], first[1]) and first[0].any()


def test_slots_without_an_entry_here_are_left_alone():
    table, y = table_of(8, 6, torch.float32), torch.randn(4, 6)
    table.drop(2)
    ours = y.clone()
    lowrank.apply(ours, torch.randn(4, 8), RowMap.of([(2, 2), (7, 1), (-1, 1)], CPU), table)
    assert torch.equal(ours, y)
