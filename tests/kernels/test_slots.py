"""The table that kernels read, and who is in it; and which implementation runs."""

import threading

import pytest
import torch

from deltaserve_kernels.dispatch import Implementation, choose, forced, path
from deltaserve_kernels.gpu.board import Board, bits
from deltaserve_kernels.rowmap import RowMap
from deltaserve_kernels.slots import SlotTable
from deltaserve_kernels.testing import error_ratio, poisoned, popularity

CPU = torch.device("cpu")


def test_what_a_slot_has():
    table = SlotTable(2, 5, CPU)
    first, second = torch.ones(3), torch.ones(2)
    table.put(3, (first, None), (0.5,))
    table.put(0, (second, first))
    assert 3 in table and 1 not in table and len(table) == 2 and table.get(1) is None
    assert table.get(3).tensors[0] is first and table.get(3).scalars == (0.5,)
    generation = table.generation
    table.drop(3)
    assert 3 not in table and set(table.items()) == {0} and table.generation > generation


def test_a_board_follows_its_table_in_place():
    table = SlotTable(1, 5, CPU)
    board = Board(table, 3, lambda slot, entry: (1, slot, bits(entry.scalars[0])))
    rows = board.rows()
    assert not rows.any()
    table.put(3, (torch.ones(1),), (0.5,))
    table.put(0, (torch.ones(1),), (-2.0,))
    assert board.rows() is rows
    assert rows[[0, 3], :2].tolist() == [[1, 0], [1, 3]] and not rows[[1, 2, 4]].any()
    assert rows[[0, 3], 2].to(torch.int32).view(torch.float32).tolist() == [-2.0, 0.5]
    table.drop(3)
    table.drop(0)
    table.put(0, (torch.ones(1),), (4.0,))
    board.rows()
    assert not rows[3].any() and rows[0, 2].to(torch.int32).view(torch.float32).item() == 4.0


def test_entries_of_a_forward():
    table = SlotTable(1, 5, CPU)
    rowmap = RowMap.of([(1, 2), (2, 1), (-1, 3), (1, 1)], CPU)
    assert not table.touches(rowmap)
    table.put(4, (torch.ones(1),))
    assert not table.touches(rowmap) and table.entries(rowmap) == []
    table.put(1, (torch.ones(1),))
    assert table.touches(rowmap)
    assert [(run.slot, run.start, run.stop) for run, _ in table.entries(rowmap)] == [(1, 0, 2), (1, 6, 7)]


@pytest.mark.parametrize(
    ("slot", "tensors"),
    [(5, (torch.ones(1),)), (-1, (torch.ones(1),)), (0, (torch.ones(1), None)), (0, (torch.ones(4, 2).T,))],
)
def test_what_may_not_be_published(slot: int, tensors: tuple[torch.Tensor | None, ...]):
    with pytest.raises(AssertionError):
        SlotTable(1, 5, CPU).put(slot, tensors)


def test_a_column_may_be_declared_to_hold_views():
    class Views(SlotTable):
        strided = frozenset((0,))

    table, whole = Views(2, 5, CPU), torch.ones(4, 6)
    table.put(0, (whole[:, 1:4], whole[1:2]))
    assert [t.data_ptr() for t in table.get(0).tensors] == [whole.data_ptr() + 4, whole.data_ptr() + 24]
    for tensors in ((whole[:1], whole[:, 1:4]), (whole.T, whole[:1])):
        with pytest.raises(AssertionError):
            table.put(1, tensors)


def test_dispatch_can_be_overridden_in_one_thread():
    assert choose(CPU) is Implementation.CPU
    assert choose(torch.device("cuda")) is Implementation.TRITON
    elsewhere: list[Implementation] = []
    with forced(Implementation.REFERENCE):
        assert choose(CPU) is Implementation.REFERENCE
        thread = threading.Thread(target=lambda: elsewhere.append(choose(CPU)))
        thread.start()
        thread.join(10)
        with forced(Implementation.CPU):
            assert choose(CPU) is Implementation.CPU
        assert choose(CPU) is Implementation.REFERENCE
    assert choose(CPU) is Implementation.CPU and elsewhere == [Implementation.CPU]


def test_the_reference_runs_where_there_is_no_other_path():
    paths = {Implementation.REFERENCE: "reference", Implementation.CPU: "cpu"}
    assert path(paths, CPU) == "cpu" and path(paths, torch.device("cuda")) == "reference"
    assert path({**paths, Implementation.TRITON: "triton"}, torch.device("cuda")) == "triton"


def test_the_error_is_that_of_the_worst_row_and_sees_poison():
    reference = torch.ones(3, 4)
    ours = reference.clone()
    ours[1] *= 1.5
    assert error_ratio(ours, reference) == pytest.approx(0.5)
    assert error_ratio(poisoned(3, 4), reference) == float("inf")
    assert error_ratio(torch.empty(0, 4), torch.empty(0, 4)) == 0.0
    with pytest.raises(AssertionError):
        error_ratio(ours, reference[:2])


def test_popularities():
    assert popularity("identical", 4, 3) == [0, 0, 0, 0]
    assert popularity("distinct", 4, 3) == [0, 1, 2, 0]
    assert popularity("one_bare", 5, 3).count(-1) == 1
    assert popularity("zipf", 200, 5).count(0) > 2 * popularity("uniform", 200, 5).count(0) * 0.8
    assert popularity("uniform", 9, 5, seed=1) != popularity("uniform", 9, 5, seed=2)
