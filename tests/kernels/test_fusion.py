"""AdapterFusion: all paths against the equation as it is published, in fp64."""

import pytest
import torch

from deltaserve_kernels import fusion
from deltaserve_kernels.dispatch import forced
from deltaserve_kernels.rowmap import RowMap
from deltaserve_kernels.testing import error_ratio, poisoned

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COUNTS = (2, 3, 1, 4, 3)
HAVE = ("query bias key value", "query", "bias query value", "key", "query bias key")
"""What slots 0 to 4 have."""


def parts_of(width: int, dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    """Rows' products have a size of about 1, so that no member takes all of the softmax."""
    g = torch.Generator().manual_seed(width)
    shapes = {"query": (width, width), "bias": (width,), "key": (width, width), "value": (width, width)}
    scale = {"query": width**-0.5, "bias": 1.0, "key": width**-1.0, "value": width**-0.5}
    return [{n: (torch.randn(shapes[n], generator=g) * scale[n]).to(dtype) for n in names.split()} for names in HAVE]


def table_of(parts: list[dict[str, torch.Tensor]]) -> fusion.FusionTable:
    table = fusion.FusionTable(8, CPU)
    for slot, have in enumerate(parts):
        table.put(slot, tuple(have.get(name) for name in ("query", "bias", "key", "value")), (float(COUNTS[slot]),))
    return table


def truth(y, t, members, each, parts):
    """p = softmax((Wq t + bq) · (Wk u + bk)), Σ p Wv u: with a key's bias, of any size."""
    out = y.double()
    for row, slot in enumerate(each):
        if slot < 0:
            continue
        have, u = {n: p.double() for n, p in parts[slot].items()}, members[row, : COUNTS[slot]].double()
        q = t[row].double() @ have["query"].T if "query" in have else t[row].double()
        keys = (u @ have["key"].T if "key" in have else u) + torch.linspace(-1, 1, u.shape[1], dtype=torch.float64)
        p = (keys @ (q + have.get("bias", 0.0))).softmax(0)
        out[row] += p @ (u @ have["value"].T if "value" in have else u)
    return out


def given(rowmap: RowMap, each: list[int], width: int, dtype: torch.dtype):
    """t, members and y; members beyond a slot's are NaN, and all of bare rows."""
    t, y = torch.randn(rowmap.rows, width).to(dtype) / 2, torch.randn(rowmap.rows, width)
    members = poisoned(rowmap.rows, max(COUNTS), width)
    for row, slot in enumerate(each):
        if slot >= 0:
            members[row, : COUNTS[slot]] = torch.randn(COUNTS[slot], width) / width**0.25
        else:
            t[row] = float("nan")
    return t, members, y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("longest", [1, 5])
@pytest.mark.parametrize("width", [5, 40])
def test_every_row_attends_over_its_own(width, longest, dtype, spread, rows_of, implementation):
    rowmap, each = rows_of(spread, longest)
    parts = parts_of(width, dtype)
    t, members, y = given(rowmap, each, width, dtype)
    ours, untouched = y.clone(), members.clone()
    with forced(implementation):
        fusion.apply(ours, t, members, rowmap, table_of(parts))
    assert error_ratio(ours, truth(y, t, members, each, parts)) <= 1e-5
    assert torch.equal(ours[[s < 0 for s in each]], y[[s < 0 for s in each]])
    assert torch.equal(members.nan_to_num(7.0), untouched.nan_to_num(7.0))


def test_rows_ask_for_themselves_in_place(spread, rows_of, implementation):
    rowmap, each = rows_of(spread, 3)
    parts = parts_of(40, torch.float32)
    _, members, y = given(rowmap, each, 40, torch.float32)
    ours = y.clone()
    with forced(implementation):
        fusion.apply(ours, ours, members, rowmap, table_of(parts))
    assert error_ratio(ours, truth(y, y, members, each, parts)) <= 1e-5


@pytest.mark.parametrize("large", [200.0, -200.0])
def test_scores_of_any_size(large, implementation):
    """No exponential overflows, and one that takes all takes all."""
    table, rowmap = fusion.FusionTable(1, CPU), RowMap.of([(0, 1)], CPU)
    table.put(0, (None, None, None, None), (2.0,))
    members, y = torch.tensor([[[large, 1.0], [-large, 3.0]]]), torch.zeros(1, 2)
    with forced(implementation):
        fusion.apply(y, torch.tensor([[1.0, 0.0]]), members, rowmap, table)
    assert y[0].tolist() == [abs(large), 1.0 if large > 0 else 3.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slot", range(len(HAVE)))
def test_a_key_folds_into_the_query(slot, dtype):
    """At load, so that a forward need not know it."""
    have = parts_of(48, dtype)[slot]
    query, bias = fusion.folded(have.get("query"), have.get("bias"), have.get("key"))
    t, members, y = given(RowMap.of([(slot, 5)], CPU), [slot] * 5, 48, torch.float32)
    table = fusion.FusionTable(8, CPU)
    table.put(slot, (query, bias, None, have.get("value")), (float(COUNTS[slot]),))
    ours = y.clone()
    fusion.apply(ours, t, members, RowMap.of([(slot, 5)], CPU), table)
    assert error_ratio(ours, truth(y, t, members, [slot] * 5, parts_of(48, dtype))) <= 1e-5


def test_what_a_slot_had_leaves_with_it():
    table, y = table_of(parts_of(8, torch.float32)), poisoned(2, 8)
    for slot in range(len(HAVE)):
        table.put(slot, (None, None, None, None), (1.0,))
        assert not any(slot in each for each in (table.query, table.key, table.value))
        table.drop(slot)
    fusion.apply(y, torch.randn(2, 8), poisoned(2, 1, 8), RowMap.of([(0, 2)], CPU), table)
    assert y.isnan().all()
    for count in (0, fusion.MEMBERS + 1):
        with pytest.raises(AssertionError):
            table.put(0, (None, None, None, None), (float(count),))
