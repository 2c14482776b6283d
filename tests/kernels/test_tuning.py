"""Tiles by rows and by chip: what is read, what is chosen, and what is tried."""

from dataclasses import replace

import pytest
import torch

from deltaserve_kernels import lowrank
from deltaserve_kernels.dispatch import Implementation, forced
from deltaserve_kernels.gpu.tuning import (
    ACTIVATED,
    DEFAULT,
    LOW_RANK,
    TABLES,
    Regime,
    Table,
    Tiles,
    architecture,
    read,
    written,
)
from deltaserve_kernels.rowmap import RowMap
from deltaserve_kernels.testing import error_ratio

CPU = torch.device("cpu")
SMALL, LARGE = Tiles(1, 2, 3, 4, 5, 6), Tiles(16, 2, 3, 4, 5, 6)


def test_what_is_written_is_read():
    tables = {"a": Table((Regime(2, SMALL), Regime(float("inf"), LARGE)), {"sm_99": (Regime(float("inf"), SMALL),)})}
    assert read(written(tables)) == tables
    assert read(written(TABLES)) == TABLES


def test_tables_cover_every_number_of_rows():
    for table in TABLES.values():
        for chip in (DEFAULT, *table.tuned):
            regimes = table.of(chip)
            ends = [regime.most for regime in regimes]
            assert ends == sorted(ends) and ends[-1] == float("inf")
            assert [r.tiles.m for r in regimes] == [r.tiles.m for r in table.regimes], "regimes are told by height"


def test_what_a_bottleneck_expands_was_shrunk_so():
    for chip in (DEFAULT, *LOW_RANK.tuned, *ACTIVATED.tuned):
        for one, other in zip(LOW_RANK.of(chip), ACTIVATED.of(chip), strict=True):
            assert (one.most, one.tiles.m, one.tiles.split) == (other.most, other.tiles.m, other.tiles.split)


def test_a_chip_s_own_tiles_are_those_of_its_name_alone():
    table = Table((Regime(float("inf"), SMALL),), {"sm_99": (Regime(float("inf"), LARGE),)})
    assert table.of("sm_99")[0].tiles is LARGE and table.of("sm_80")[0].tiles is SMALL
    assert table.all("sm_99") == (LARGE,) and table.all("sm_80") == (SMALL,) and table.all() == (SMALL, LARGE)
    assert architecture(CPU) == DEFAULT and table.choose(RowMap.of([(0, 1)], CPU)) is SMALL


@pytest.mark.parametrize(("runs", "m"), [([(0, 1), (1, 2)], 1), ([(0, 9), (1, 1)], 16), ([(0, 99)], 64), ([], 1)])
def test_rows_for_each_slot_choose(runs, m):
    assert LOW_RANK.choose(RowMap.of([*runs, (-1, 400)], CPU)).m == m


def test_tiles_that_are_tried_are_taken_and_right():
    rowmap, table = RowMap.of([(0, 1), (1, 1), (-1, 1)], CPU), lowrank.LowRankTable(2, CPU)
    for slot in (0, 1):
        table.put(slot, (torch.randn(5, 40), torch.randn(24, 5)), (0.5,))
    x, y = torch.randn(3, 40), torch.randn(3, 24)
    right = y.clone()
    with forced(Implementation.REFERENCE):
        lowrank.apply(right, x, rowmap, table)
    other = replace(LOW_RANK.regimes[0].tiles, split=2, k=16, n=16)
    with LOW_RANK.trying(0, other):
        assert LOW_RANK.choose(rowmap) == other
        with LOW_RANK.trying(1, SMALL):
            assert LOW_RANK.choose(rowmap) != other, "the last one that is tried stands alone"
        ours = y.clone()
        with forced(Implementation.TRITON):
            lowrank.apply(ours, x, rowmap, table)
    assert LOW_RANK.choose(rowmap) is LOW_RANK.regimes[0].tiles
    assert error_ratio(ours, right) <= 1e-5
