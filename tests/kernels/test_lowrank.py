"""Low rank: both paths against the equation, one row at a time and in fp64."""

import itertools

import pytest
import torch

from deltaserve_kernels import embed, lowrank
from deltaserve_kernels.dispatch import Implementation, forced
from deltaserve_kernels.rowmap import RowMap, Run
from deltaserve_kernels.slots import SlotTable
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


def truth(y: torch.Tensor, x: torch.Tensor, each: list[int], table: SlotTable) -> torch.Tensor:
    out = y.double()
    for row, slot in enumerate(each):
        entry = table.get(slot)
        if entry is not None:
            a, b, inner, outer = (1.0 if t is None else t.double() for t in entry.tensors)
            hidden = a @ x[row].double()
            hidden = inner @ hidden if entry.tensors[2] is not None and inner.ndim == 2 else inner * hidden
            out[row] += entry.scalars[0] * outer * (b @ hidden)
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
    # Of each bucket two sets of two slots, in fp32.
    assert held > 0 and table.cached_bytes <= 2 * 2 * 4 * (8 + 16) * (8 + 6)
    lowrank.apply(torch.zeros(2, 6), x, rowmap, table)
    table.drop(0)
    table.put(0, (torch.zeros(2, 8), torch.zeros(6, 2)), (1.0,))
    second = torch.zeros(2, 6)
    lowrank.apply(second, x, rowmap, table)
    assert not second[0].any() and torch.equal(second[1], first[1]) and first[0].any()


@pytest.mark.parametrize(("inner", "groups"), [(24, [[0, 1, 2, 3]]), (40_000, [[2, 3], [0, 1]])])
def test_ranks_stand_in_one_stack_where_zeros_cost_less_than_a_product(inner, groups):
    table = lowrank.LowRankTable(8, CPU)
    for slot, rank in enumerate((8, 8, 16, 12)):
        table.put(slot, (torch.randn(rank, inner), torch.randn(6, rank)), (1.0,))
    rowmap, x, ours = RowMap.of([(slot, 1) for slot in range(4)], CPU), torch.randn(4, inner), torch.zeros(4, 6)
    lowrank.apply(ours, x, rowmap, table)
    assert error_ratio(ours, truth(torch.zeros(4, 6), x, [0, 1, 2, 3], table)) <= 1e-5
    planned, sharing = lowrank.divided(table, rowmap)
    assert [list(group.slots) for group in planned.together] == groups and not planned.alone and not sharing


def test_slots_without_an_entry_here_are_left_alone():
    table, y = table_of(8, 6, torch.float32), torch.randn(4, 6)
    table.drop(2)
    ours = y.clone()
    lowrank.apply(ours, torch.randn(4, 8), RowMap.of([(2, 2), (7, 1), (-1, 1)], CPU), table)
    assert torch.equal(ours, y)


SHARED = (0, 1, 2)
"""Slots of `sharing_table` with one A and one B."""


def sharing_table(inner: int, outer: int, dtype: torch.dtype, rank: int = 5) -> lowrank.LowRankTable:
    """Slots 0 to 2 and, with a square inner, 5 and 6 share views of one A and one B.

    3 is a plain pair, 4 has scales and a pair of its own.
    """
    g = torch.Generator().manual_seed(inner * outer)
    make = lambda *shape: torch.randn(shape, generator=g).to(dtype)  # noqa: E731
    wide, tall = make(rank, inner + 7), make(outer + 3, rank)
    a, b = wide[:, :inner], tall[:outer]
    assert not a.is_contiguous() or rank == 1
    table = lowrank.LowRankTable(8, CPU)
    table.put(0, (a, b, make(rank), make(outer)), (1.0,))
    table.put(1, (a, b, None, make(outer)), (0.7,))
    table.put(2, (a, b, make(rank), None), (-1.3,))
    table.put(3, (make(3, inner), make(outer, 3), None, None), (0.5,))
    table.put(4, (make(2, inner), make(outer, 2), make(2), make(outer)), (2.0,))
    table.put(5, (a, b, make(rank, rank), None), (0.9,))
    table.put(6, (a, b, make(rank, rank), make(outer)), (-0.6,))
    return table


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("longest", [1, 3, 9])
@pytest.mark.parametrize(("inner", "outer"), [(33, 17), (1, 5), (64, 96)])
@pytest.mark.parametrize("first", [0, 2])
def test_rows_that_share_a_base(first, inner, outer, longest, dtype, spread, rows_of, implementation):
    """Slots 0 to 4, and 2 to 6."""
    rowmap, each = rows_of(spread, longest)
    rowmap = RowMap(rowmap.rows, tuple(Run(r.slot + first, r.start, r.stop) for r in rowmap.runs), CPU)
    each = [slot if slot < 0 else slot + first for slot in each]
    table = sharing_table(inner, outer, dtype)
    x, y = torch.randn(rowmap.rows, inner).to(dtype), torch.randn(rowmap.rows, outer)
    ours = y.clone()
    with forced(implementation):
        lowrank.apply(ours, x, rowmap, table)
    assert error_ratio(ours, truth(y, x, each, table)) <= 1e-5
    bare = [row for row, slot in enumerate(each) if slot < 0]
    assert torch.equal(ours[bare], y[bare])


@pytest.mark.parametrize(
    "slots", [*itertools.permutations((0, 1, 3, -1)), (0, 4, 1, 0, 2), (2, 0), (1,), (5, 6), (5, 0, 6, 3, 5)]
)
@pytest.mark.parametrize("rows", [(1, 1, 1, 1, 1), (2, 2, 2, 2, 2), (3, 1, 6, 2, 4)], ids=str)
def test_sharing_beside_others_in_any_order(slots, rows, implementation):
    counts = rows[: len(slots)]
    rowmap = RowMap.of(zip(slots, counts, strict=True), CPU)
    each = [slot for slot, count in zip(slots, counts, strict=True) for _ in range(count)]
    table = sharing_table(40, 24, torch.float32)
    x, y = torch.randn(len(each), 40), torch.randn(len(each), 24)
    ours = y.clone()
    with forced(implementation):
        lowrank.apply(ours, x, rowmap, table)
    assert error_ratio(ours, truth(y, x, each, table)) <= 1e-5
    assert torch.equal(ours[[s < 0 for s in each]], y[[s < 0 for s in each]])


def test_slots_that_share_are_one_group_without_copies_of_the_base():
    table, rank = sharing_table(64, 96, torch.float32, rank=32), 32
    alone, sharing = table.split(RowMap.of([(slot, 1) for slot in (4, 1, 3, 6, 0, 2, 5)], CPU))
    assert [run.slot for run, _ in alone] == [3]
    assert [[run.slot for run, _ in found] for found in sharing] == [[4], [1, 0, 2], [6, 5]]
    lowrank.apply(torch.zeros(3, 96), torch.randn(3, 64), RowMap.of([(slot, 1) for slot in SHARED], CPU), table)
    assert table.cached_bytes == len(SHARED) * (rank + 96) * 4


def test_scales_are_bounded_and_follow_changes():
    table, rowmap, x = sharing_table(8, 6, torch.float32), RowMap.of([(0, 1), (1, 2)], CPU), torch.randn(3, 8)
    first, second = torch.zeros(3, 6), torch.zeros(3, 6)
    lowrank.apply(first, x, rowmap, table)
    for slots in itertools.permutations(SHARED):
        lowrank.apply(torch.zeros(3, 6), x, RowMap.of([(slot, 1) for slot in slots], CPU), table)
    assert 0 < table.cached_bytes <= 2 * 3 * (5 + 6) * 4
    a, b, inner, outer = table.get(1).tensors
    table.drop(1)
    table.put(1, (a, b, inner, outer * 2), (0.7,))
    lowrank.apply(second, x, rowmap, table)
    assert torch.equal(second[0], first[0]) and error_ratio(second[1:], 2 * first[1:]) <= 1e-6
    table.drop(1)
    table.put(1, (a, b, None, None), (0.7,))
    alone, sharing = table.split(rowmap)
    assert [run.slot for run, _ in alone] == [1] and [run.slot for found in sharing for run, _ in found] == [0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_looked_up_rows_are_scaled_too(dtype, implementation):
    g = torch.Generator().manual_seed(3)
    make = lambda *shape: torch.randn(shape, generator=g).to(dtype)  # noqa: E731
    table, wide = embed.LookupTable(8, CPU), make(4, 30)
    table.put(0, (wide[:, :20], make(6, 4), make(4), make(6)), (0.5,))
    table.put(1, (wide[:, :20], make(6, 4), None, None), (1.0,))
    table.put(2, (wide[:, :20], make(6, 4), make(4, 4), None), (1.0,))
    rowmap, ids, y = (
        RowMap.of([(0, 3), (-1, 1), (1, 1), (2, 1)], CPU),
        torch.tensor([19, 0, 7, 3, 3, 19]),
        torch.randn(6, 6),
    )
    ours = y.clone()
    with forced(implementation):
        embed.add_low_rank(ours, ids, rowmap, table, factor=3.0)
    rows = torch.nn.functional.one_hot(ids, 20)
    expected = y + 3.0 * (truth(torch.zeros(6, 6), rows, [0, 0, 0, -1, 1, 2], table))
    assert error_ratio(ours, expected) <= 1e-5 and torch.equal(ours[3], y[3])


def test_a_and_b_of_two_dtypes(implementation):
    """AdaLoRA's A is scaled when it is lowered, in fp32; B stays as it was."""
    table = lowrank.LowRankTable(8, CPU)
    for slot, (one, other) in enumerate(((torch.float32, torch.float16), (torch.float16, torch.float32))):
        table.put(slot, (torch.randn(5, 33).to(one), torch.randn(17, 5).to(other)), (0.5,))
    each = [0, 0, 1, -1, 1]
    rowmap = RowMap.of([(slot, 1) for slot in each], CPU)
    x, y = torch.randn(5, 33), torch.randn(5, 17)
    ours = y.clone()
    with forced(implementation):
        lowrank.apply(ours, x, rowmap, table)
    assert error_ratio(ours, truth(y, x, each, table)) <= 1e-5
