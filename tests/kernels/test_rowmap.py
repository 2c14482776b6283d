"""Row maps: slots, order and runs tell the same story."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve_kernels.rowmap import BARE, RowMap, Run

CPU = torch.device("cpu")


def test_neighbours_of_one_slot_are_joined_and_bare_rows_left_out():
    rowmap = RowMap.of([(2, 3), (2, 1), (BARE, 2), (2, 0), (2, 4), (0, 1)], CPU)
    assert rowmap.runs == (Run(2, 0, 4), Run(2, 6, 10), Run(0, 10, 11))
    assert (rowmap.rows, rowmap.active, rowmap.bare, rowmap.runs[1].rows) == (11, (0, 2), False, 4)
    assert rowmap.slots.tolist() == [2, 2, 2, 2, -1, -1, 2, 2, 2, 2, 0] and rowmap.slots.dtype is torch.int32
    assert rowmap.order.tolist() == [10, 0, 1, 2, 3, 6, 7, 8, 9] and rowmap.order.dtype is torch.int64


def test_no_rows_and_bare_rows():
    for runs, rows in (([], 0), ([(BARE, 3)], 3), ([(4, 0)], 0)):
        rowmap = RowMap.of(runs, CPU)
        assert rowmap.bare and rowmap.rows == rows and rowmap.active == () and rowmap.order.numel() == 0
        assert rowmap.slots.tolist() == [BARE] * rows


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(-1, 4), st.integers(0, 5)), max_size=20))
def test_order_is_a_stable_sort_by_slot(runs: list[tuple[int, int]]):
    rowmap = RowMap.of(runs, CPU)
    each = [slot for slot, count in runs for _ in range(count)]
    assert rowmap.slots.tolist() == each and rowmap.rows == len(each)
    assert rowmap.order.tolist() == sorted((i for i, s in enumerate(each) if s != BARE), key=lambda i: (each[i], i))
    assert rowmap.active == tuple(sorted(set(each) - {BARE}))
    covered = [(row, run.slot) for run in rowmap.runs for row in range(run.start, run.stop)]
    assert covered == [(i, s) for i, s in enumerate(each) if s != BARE]
    assert all(a.stop < b.start or a.slot != b.slot for a, b in zip(rowmap.runs, rowmap.runs[1:], strict=False))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(-1, 4), st.integers(0, 5)), max_size=12), st.integers(0, 4))
def test_a_grid_takes_rows_and_gives_them_back(runs: list[tuple[int, int]], left_out: int):
    rowmap = RowMap.of(runs, CPU)
    chosen = [run for run in rowmap.runs if run.slot != left_out]
    if not chosen:
        return
    grid, x = rowmap.grid(chosen), torch.arange(rowmap.rows * 3.0).view(rowmap.rows, 3)
    taken = grid.taken(x)
    assert taken.shape == (len(chosen), max(run.rows for run in chosen), 3)
    for run, rows in zip(chosen, taken, strict=True):
        assert torch.equal(rows[: run.rows], x[run.start : run.stop])
        assert (rows[run.rows :] == x[run.stop - 1]).all()
    assert torch.equal(grid.given(taken), x[grid.rows])
    assert grid.each.tolist() == [number for number, run in enumerate(chosen) for _ in range(run.rows)]
    assert rowmap.grid(chosen) is grid
