"""Blocks: both paths and both sides against the equation in fp64; bare rows bit-identical; stacks follow changes."""

import itertools

import pytest
import torch

from deltaserve_kernels import block
from deltaserve_kernels.dispatch import Implementation, forced
from deltaserve_kernels.rowmap import RowMap
from deltaserve_kernels.testing import error_ratio, poisoned

CPU = torch.device("cpu")
EXACT = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Sums; then one rounding on the input side."""
WIDTH = 48


def table_of(dtype: torch.dtype, widths: tuple[int, ...] = (4, 16, 4, 1, 48), apart: int = 1) -> block.BlockTable:
    """Five slots whose blocks differ in width; two of them in nothing but numbers."""
    table = block.BlockTable(8, CPU)
    for slot, width in enumerate(widths):
        shape = (WIDTH // width, width, width) if apart == 1 else (WIDTH // width // apart, width, width, apart)
        table.put(slot, (torch.randn(shape).to(dtype),))
    return table


def whole(blocks: torch.Tensor) -> torch.Tensor:
    """The matrix [WIDTH, WIDTH] that blocks are, number by number."""
    made = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    groups, width, _, apart = blocks.shape if blocks.ndim == 4 else (*blocks.shape, 1)
    for m, i, j, s in itertools.product(range(groups), range(width), range(width), range(apart)):
        number = blocks[m, i, j] if blocks.ndim == 3 else blocks[m, i, j, s]
        made[m * width * apart + i * apart + s, m * width * apart + j * apart + s] = number
    return made


def truth(x: torch.Tensor, each: list[int], table: block.BlockTable) -> torch.Tensor:
    out = x.double().clone()
    matrices = {slot: whole(table.get(slot).tensors[0]) for slot in set(each) if slot in table}
    for row, slot in enumerate(each):
        if slot in matrices:
            out[row] = x[row].double() @ matrices[slot]
    return out


@pytest.mark.parametrize("dtype", list(EXACT), ids=str)
@pytest.mark.parametrize("longest", [1, 3, 9])
def test_inputs_are_turned(dtype, longest, spread, rows_of, implementation, steps):
    rowmap, each = rows_of(spread, longest)
    table, x = table_of(dtype), torch.randn(rowmap.rows, WIDTH).to(dtype)
    before = x.clone()
    with forced(implementation):
        ours = block.turned(x, rowmap, table)
    assert ours.dtype is dtype and torch.equal(x, before)
    assert error_ratio(ours, truth(x, each, table)) <= steps * EXACT[dtype]
    bare = [slot < 0 for slot in each]
    assert torch.equal(ours[bare], x[bare])


@pytest.mark.parametrize("dtype", list(EXACT), ids=str)
@pytest.mark.parametrize("longest", [1, 3, 9])
@pytest.mark.parametrize(("widths", "apart"), [((4, 16, 4, 1, 48), 1), ((2, 2, 4, 2, 12), 4), ((2, 3, 2, 1, 6), 8)])
def test_outputs_are_turned_in_place(widths, apart, dtype, longest, spread, rows_of, implementation):
    """Blocks of what stands together, of what stands apart, and of what stands as far apart as there is room for."""
    rowmap, each = rows_of(spread, longest)
    table, y = table_of(dtype, widths, apart), torch.randn(rowmap.rows, WIDTH)
    ours = y.clone()
    with forced(implementation):
        block.turn(ours, rowmap, table)
    assert error_ratio(ours, truth(y, each, table)) <= 1e-5
    bare = [slot < 0 for slot in each]
    assert torch.equal(ours[bare], y[bare])


@pytest.mark.parametrize("width", [2, 8, 12, 24])
@pytest.mark.parametrize("slots", [(0, 1, 2), (2, -1, 0, 4), (1, 3, -1)])
@pytest.mark.parametrize("rows", [(1, 1, 1, 1), (2, 2, 2, 2), (1, 4, 2, 3), (1, 9, 2, 5)])
def test_short_runs_are_stacked_and_poison_stays_out(width, slots, rows, implementation):
    """Rows of others, and of a slot that has nothing here, hold NaN: they are neither read nor written."""
    table = table_of(torch.float32, (width,) * 5)
    table.drop(4)
    runs = list(zip(slots, rows, strict=False))
    each = [slot for slot, count in runs for _ in range(count)]
    x = torch.randn(len(each), WIDTH)
    mine = torch.tensor([slot in table for slot in each])
    x[~mine] = poisoned(int((~mine).sum()), WIDTH)
    with forced(implementation):
        ours = block.turned(x, RowMap.of(runs, CPU), table)
    assert ours[~mine].isnan().all()
    own = [slot for slot in each if slot in table]
    assert error_ratio(ours[mine], truth(x[mine], own, table)) <= 1e-5
    assert (table.cached_bytes > 0) is (
        implementation is Implementation.CPU and sum(s in table and n <= 4 for s, n in runs) > 1
    )


def test_stacks_are_bounded_and_follow_changes():
    table, x = table_of(torch.float32, (4,) * 5), torch.randn(2, WIDTH)
    rowmap = RowMap.of([(0, 1), (1, 1)], CPU)
    first = block.turned(x, rowmap, table)
    one = table.cached_bytes
    assert one == 2 * WIDTH * 4 * 4
    for slots in ((1, 2), (2, 3), (3, 4), (0, 2)):
        block.turned(x, RowMap.of([(slot, 1) for slot in slots], CPU), table)
    assert table.cached_bytes == 2 * one
    table.drop(0)
    table.put(0, (torch.eye(4).repeat(WIDTH // 4, 1, 1),))
    second = block.turned(x, rowmap, table)
    assert torch.equal(second[0], x[0]) and torch.equal(second[1], first[1]) and not torch.equal(first[0], x[0])


def test_nothing_is_copied_where_nothing_acts():
    x, table = poisoned(3, WIDTH), block.BlockTable(8, CPU)
    assert block.turned(x, RowMap.of([(0, 3)], CPU), table) is x
    block.turn(x, RowMap.of([(0, 3)], CPU), table)
    assert x.isnan().all()
