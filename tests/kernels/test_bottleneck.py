"""Bottlenecks and norms of adapters' own: all paths against the equation, in fp64."""

import pytest
import torch

from deltaserve_kernels import bottleneck, ownnorm
from deltaserve_kernels.activations import ACTIVATIONS, activated, name_of, number_of
from deltaserve_kernels.dispatch import forced
from deltaserve_kernels.rowmap import RowMap
from deltaserve_kernels.testing import error_ratio, poisoned

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (1, 4, 7, 16, 3)
FEW = (None, "relu", "gelu", "relu", "silu")


def table_of(
    inner: int, outer: int, dtype: torch.dtype, activations: tuple[str | None, ...] = FEW
) -> bottleneck.BottleneckTable:
    """Slot 1 has no biases, 2 no bias behind; 0 and 3 have a norm in front."""
    g = torch.Generator().manual_seed(inner + outer)
    make = lambda *shape: torch.randn(shape, generator=g).to(dtype)  # noqa: E731
    table = bottleneck.BottleneckTable(8, CPU)
    for slot, (width, name) in enumerate(zip(WIDTHS, activations, strict=True)):
        wide, tall = make(width, inner + 5), make(outer + 2, width)
        biases = (None if slot == 1 else make(width), None if slot in (1, 2) else make(outer))
        tensors, scalars = (wide[:, :inner], tall[:outer], *biases), (0.5 + slot, float(number_of(name)))
        if slot in (0, 3):
            tensors, scalars = (*tensors, make(inner), make(inner)), (*scalars, 1e-5 * 10**slot)
        table.put(slot, tensors, scalars)
    return table


def norm(x: torch.Tensor, entry) -> torch.Tensor:
    weight, bias = (t.double() for t in entry.tensors)
    return (x - x.mean()) / (x.var(correction=0) + entry.scalars[0]).sqrt() * weight + bias


def truth(y, u, each, table, gates=None):
    out = y.double()
    for row, slot in enumerate(each):
        if slot >= 0 and (entry := table.get(slot)) is not None:
            down, up, down_bias, up_bias = (0.0 if t is None else t.double() for t in entry.tensors)
            given = u[row].double()
            if slot in table.norms:
                given = norm(given, table.norms.get(slot))
            hidden = activated(down @ given + down_bias, name_of(int(entry.scalars[1])))
            z = entry.scalars[0] * (up @ hidden) + up_bias
            out[row] += z if gates is None else gates[row].double() * z
    return out


def bare_are_poisoned(each: list[int], *rows: torch.Tensor) -> None:
    for tensor in rows:
        bare = torch.tensor([slot < 0 for slot in each])
        tensor[bare] = poisoned(*tensor[bare].shape, dtype=tensor.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("longest", [1, 7])
@pytest.mark.parametrize(("inner", "outer"), [(33, 17), (2, 5), (64, 80)])
def test_every_row_gets_its_own(inner, outer, longest, dtype, spread, rows_of, implementation):
    rowmap, each = rows_of(spread, longest)
    table = table_of(inner, outer, dtype)
    u, y = torch.randn(rowmap.rows, inner).to(dtype), torch.randn(rowmap.rows, outer)
    expected, ours = truth(y, u, each, table), y.clone()
    bare_are_poisoned(each, u)
    with forced(implementation):
        bottleneck.apply(ours, u, rowmap, table)
    assert error_ratio(ours, expected) <= 1e-5
    bare = [slot < 0 for slot in each]
    assert torch.equal(ours[bare], y[bare])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("longest", [1, 9])
def test_rows_in_place_behind_gates(longest, dtype, spread, rows_of, implementation):
    """u is y itself, in fp32 with weights of any dtype; a number for each row."""
    rowmap, each = rows_of(spread, longest)
    table, y, gates = table_of(40, 40, dtype), torch.randn(rowmap.rows, 40), torch.rand(rowmap.rows)
    ours, before, expected = y.clone(), y.clone(), truth(y, y, each, table, gates)
    bare_are_poisoned(each, gates)
    with forced(implementation):
        bottleneck.apply(ours, ours, rowmap, table, gates)
    assert error_ratio(ours, expected) <= 1e-5
    assert torch.equal(ours[[slot < 0 for slot in each]], before[[slot < 0 for slot in each]])


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("name", [None, *ACTIVATIONS])
def test_activations(name, size, implementation):
    """Of small numbers too: what is added is as exact as its own size."""
    table, rowmap = bottleneck.BottleneckTable(2, CPU), RowMap.of([(0, 2), (1, 1)], CPU)
    for slot in range(2):
        table.put(slot, (torch.randn(12, 20) * size / 4, torch.randn(9, 12), None, None), (1.0, float(number_of(name))))
    u, y = torch.randn(3, 20), torch.zeros(3, 9)
    expected = truth(y, u, [0, 0, 1], table)
    with forced(implementation):
        bottleneck.apply(y, u, rowmap, table)
    assert error_ratio(y, expected) <= 1e-5


@pytest.mark.parametrize("slots", [(0, 1, 2), (4, 0, 2, 1), (2, -1, 3, 1), (1, 3, 1)])
@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("activations", [FEW, ("gelu",) * 5], ids=["several", "one"])
def test_stacked_rows_of_distinct_deltas(slots, rows, activations, implementation):
    each = [slot for slot in slots for _ in range(rows)]
    rowmap = RowMap.of([(slot, rows) for slot in slots], CPU)
    table = table_of(40, 24, torch.float32, activations)
    u, y = torch.randn(len(each), 40), torch.randn(len(each), 24)
    ours = y.clone()
    with forced(implementation):
        bottleneck.apply(ours, u, rowmap, table)
    assert error_ratio(ours, truth(y, u, each, table)) <= 1e-5


def test_stacks_are_bounded_and_follow_changes():
    table, rowmap = table_of(8, 6, torch.float32, ("relu",) * 5), RowMap.of([(1, 1), (2, 1)], CPU)
    u, first, second = torch.randn(2, 8), torch.zeros(2, 6), torch.zeros(2, 6)
    bottleneck.apply(first, u, rowmap, table)
    assert table.cached_bytes > 0
    for slots in ((1, 2), (2, 4), (4, 1), (0, 4), (2, 1)):
        bottleneck.apply(torch.zeros(2, 6), u, RowMap.of([(s, 1) for s in slots], CPU), table)
    assert table.cached_bytes <= 2 * 2 * (8 * 7 + 7 * 6 + 7 + 6) * 4
    table.drop(1)
    table.put(1, (torch.ones(2, 8), torch.zeros(6, 2), None, torch.ones(6)), (1.0, 0.0))
    bottleneck.apply(second, u, rowmap, table)
    assert torch.equal(second[0], torch.ones(6)) and error_ratio(second[1:], first[1:]) <= 1e-6 and first[0].any()


def test_a_norm_leaves_with_its_slot():
    table = table_of(8, 6, torch.float32)
    assert 0 in table.norms and 1 not in table.norms
    table.put(0, (torch.ones(2, 8), torch.ones(6, 2), None, None), (1.0, 0.0))
    assert 0 not in table.norms
    table.drop(3)
    assert 3 not in table and 3 not in table.norms


@pytest.mark.parametrize("longest", [1, 7])
@pytest.mark.parametrize("width", [33, 1100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_of_their_own(dtype, width, longest, spread, rows_of, implementation):
    rowmap, each = rows_of(spread, longest)
    table = ownnorm.NormTable(8, CPU)
    for slot in (0, 1, 2, 4):
        table.put(slot, (torch.randn(width).to(dtype), torch.randn(width).to(dtype)), (1e-6 * 10**slot,))
    x = (torch.randn(rowmap.rows, width) * 3 + 5).to(dtype)
    y, expected = x.float().clone(), x.double()
    before = y.clone()
    for row, slot in enumerate(each):
        if slot in table:
            expected[row] = norm(x[row].double(), table.get(slot))
    with forced(implementation):
        ownnorm.apply(y, rowmap, table)
        copied = ownnorm.normed(x, rowmap, table)
    assert error_ratio(y, expected) <= 1e-5
    assert torch.equal(copied, y) and copied.dtype is torch.float32
    others = [slot not in table for slot in each]
    assert torch.equal(y[others], before[others])


def test_where_no_row_has_one_nothing_is_read_or_written():
    table, y = table_of(8, 6, torch.float32), poisoned(3, 6)
    x = torch.randn(3, 8)
    rowmap = RowMap.of([(7, 2), (-1, 1)], CPU)
    bottleneck.apply(y, x, rowmap, table)
    assert y.isnan().all() and ownnorm.normed(x, rowmap, table.norms) is x
