"""Affine: input and output side against the equation; bare rows bit-identical."""

import pytest
import torch

from deltaserve_kernels import affine
from deltaserve_kernels.dispatch import Implementation, forced
from deltaserve_kernels.rowmap import RowMap
from deltaserve_kernels.testing import error_ratio, poisoned

CPU = torch.device("cpu")
EPSILON = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""One rounding: half a unit in the last place, and a little for the norm over a row."""


def table_of(inner: int, outer: int, dtype: torch.dtype) -> affine.AffineTable:
    """Five slots: all three parts, each alone, and none."""
    table = affine.AffineTable(8, CPU)
    for slot, has in enumerate([(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)]):
        widths = (inner, outer, outer)
        table.put(slot, tuple(torch.randn(w).to(dtype) if h else None for w, h in zip(widths, has, strict=True)))
    return table


@pytest.mark.parametrize("dtype", list(EPSILON), ids=str)
@pytest.mark.parametrize("longest", [1, 4, 9])
@pytest.mark.parametrize("width", [1, 33, 128])
def test_inputs_are_scaled(width, longest, dtype, spread, rows_of, implementation, steps):
    rowmap, each = rows_of(spread, longest)
    table = table_of(width, 5, dtype)
    x = torch.randn(rowmap.rows, width).to(dtype)
    before = x.clone()
    with forced(implementation):
        ours = affine.scale_input(x, rowmap, table)
    assert torch.equal(x, before) and ours.dtype is dtype
    for row, slot in enumerate(each):
        scale = None if slot < 0 else table.get(slot).tensors[0]
        if scale is None:
            assert torch.equal(ours[row], x[row])
        else:
            expected = x[row].double() * scale.double()
            assert error_ratio(ours[row : row + 1], expected.unsqueeze(0)) <= steps * EPSILON[dtype]


@pytest.mark.parametrize("dtype", list(EPSILON), ids=str)
@pytest.mark.parametrize("longest", [1, 4, 9])
def test_outputs_are_scaled_and_shifted(longest, dtype, spread, rows_of, implementation):
    rowmap, each = rows_of(spread, longest)
    table = table_of(3, 33, dtype)
    y = torch.randn(rowmap.rows, 33)
    ours = y.clone()
    with forced(implementation):
        affine.scale_output(ours, rowmap, table)
    for row, slot in enumerate(each):
        _, scale, shift = (None,) * 3 if slot < 0 else table.get(slot).tensors
        expected = y[row].double()
        expected = expected if scale is None else expected * scale.double()
        expected = expected if shift is None else expected + shift.double()
        assert error_ratio(ours[row : row + 1], expected.unsqueeze(0)) <= 1e-6
        if scale is None and shift is None:
            assert torch.equal(ours[row], y[row])


def test_nothing_is_copied_where_nothing_acts():
    x, table = torch.randn(3, 4), affine.AffineTable(8, CPU)
    rowmap = RowMap.of([(0, 2), (-1, 1)], CPU)
    assert affine.scale_input(x, rowmap, table) is x
    table.put(0, (None, torch.ones(4), None))
    table.put(1, (torch.ones(4), None, None))
    assert affine.scale_input(x, rowmap, table) is x


def test_poison_of_others_stays_out(implementation):
    """Rows between those that are scaled, and of a slot that has nothing on this side, are neither read nor written."""
    table, rowmap = table_of(6, 9, torch.float32), RowMap.of([(0, 1), (4, 1), (2, 3), (-1, 1), (3, 2)], CPU)
    y, others = torch.randn(8, 9), [1, 5]
    y[others] = poisoned(2, 9)
    ours = y.clone()
    with forced(implementation):
        affine.scale_output(ours, rowmap, table)
    assert ours[others].isnan().all() and ours[[0, 2, 3, 4, 6, 7]].isfinite().all()
    x = torch.randn(8, 6)
    x[2:] = poisoned(6, 6)
    with forced(implementation):
        assert affine.scale_input(x, rowmap, table)[2:].isnan().all()


def test_stacks_are_bounded_and_follow_changes():
    table, y = table_of(6, 9, torch.float32), torch.ones(2, 9)

    def scaled(*slots: int) -> torch.Tensor:
        ours = y.clone()
        with forced(Implementation.CPU):
            affine.scale_output(ours, RowMap.of([(slot, 1) for slot in slots], CPU), table)
        return ours

    first = scaled(0, 2)
    for slots in ((2, 3), (3, 0), (0, 2)):
        scaled(*slots)
    assert 0 < table.cached_bytes <= 2 * 2 * (6 + 9 + 9) * 4
    table.drop(0)
    table.put(0, (None, torch.zeros(9), None))
    second = scaled(0, 2)
    assert first[0].all() and not second[0].any() and torch.equal(second[1], first[1])
