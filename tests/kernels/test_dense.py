"""Dense and heads against the equation; embeddings with soft prompts in their places."""

import pytest
import torch

from deltaserve_kernels import dense, embed
from deltaserve_kernels.dispatch import forced
from deltaserve_kernels.rowmap import RowMap
from deltaserve_kernels.testing import error_ratio, poisoned

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("inner", "outer"), [(33, 17), (1, 7), (48, 96)])
def test_weights_are_added_or_replace(inner, outer, dtype, spread, rows_of, implementation):
    rowmap, each = rows_of(spread, 5)
    table = dense.DenseTable(8, CPU)
    for slot in range(5):
        bias = torch.randn(outer).to(dtype) if slot % 2 else None
        table.put(slot, (torch.randn(outer, inner).to(dtype), bias), (float(slot >= 3),))
    x, y = torch.randn(rowmap.rows, inner).to(dtype), torch.randn(rowmap.rows, outer)
    ours = y.clone()
    replaced = [slot >= 3 for slot in each]
    ours[replaced] = poisoned(sum(replaced), outer)  # what is replaced may hold anything
    with forced(implementation):
        dense.apply(ours, x, rowmap, table)
    expected = y.double()
    for row, slot in enumerate(each):
        if slot >= 0:
            weight, bias = table.get(slot).tensors
            product = weight.double() @ x[row].double() + (0 if bias is None else bias.double())
            expected[row] = product if slot >= 3 else expected[row] + product
    assert error_ratio(ours, expected) <= 1e-5
    bare = [slot < 0 for slot in each]
    assert torch.equal(ours[bare], y[bare])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_of_different_widths_and_depths(dtype, spread, rows_of, implementation):
    rowmap, each = rows_of(spread, 3)
    if -1 in each:
        with pytest.raises(AssertionError, match="without a head"):
            dense.heads(torch.randn(rowmap.rows, 9), rowmap, {key: [] for key in range(5)})
        return
    g = torch.Generator().manual_seed(1)
    make = lambda *shape: torch.randn(shape, generator=g).to(dtype)  # noqa: E731
    acts = {"tanh": torch.tanh, "relu": torch.relu, "gelu": torch.nn.functional.gelu, None: lambda t: t}
    layers = {
        slot: [(make(9, 9), make(9), act)] * (slot % 2)
        + [(make(1 + slot, 9), None if slot == 2 else make(1 + slot), None)]
        for slot, act in enumerate(("tanh", "tanh", "relu", "gelu", None))
    }
    x = torch.randn(rowmap.rows, 9).to(dtype)
    with forced(implementation):
        ours = dense.heads(x, rowmap, layers)
    assert len(ours) == rowmap.rows
    for row, slot in enumerate(each):
        h = x[row].double()
        for weight, bias, act in layers[slot]:
            h = acts[act](weight.double() @ h + (0 if bias is None else bias.double()))
        assert ours[row].dtype is torch.float32 and ours[row].shape == (1 + slot,)
        assert error_ratio(ours[row].unsqueeze(0), h.unsqueeze(0)) <= 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prompt_rows_take_their_places(dtype, implementation):
    table = embed.PromptTable(4, CPU)
    prompts = {0: torch.randn(5, 7), 2: torch.randn(3, 7).to(dtype)}
    for slot, rows in prompts.items():
        table.put(slot, (rows,))
    embeddings = torch.randn(12, 7).to(dtype)
    before = embeddings.clone()
    embeddings[[0, 1, 2, 6, 7, 8]] = poisoned(6, 7, dtype=dtype)
    with forced(implementation):
        embed.prompt_rows(embeddings, table, [(0, 0, 2, 3), (2, 6, 0, 3)])
    # The interpreter cuts bfloat16 where GPUs round.
    assert torch.allclose(embeddings[0:3].float(), prompts[0][2:5], rtol=2**-7 if dtype is torch.bfloat16 else 2**-10)
    assert torch.equal(embeddings[6:9], prompts[2])
    assert torch.equal(embeddings[[3, 4, 5, 9, 10, 11]], before[[3, 4, 5, 9, 10, 11]])
    with forced(implementation), pytest.raises((AssertionError, ValueError), match="slot 1"):
        embed.prompt_rows(embeddings, table, [(1, 0, 0, 1)])


def test_a_table_that_is_not_touched_costs_no_write():
    y = poisoned(2, 3)
    dense.apply(y, torch.randn(2, 3), RowMap.of([(0, 2)], CPU), dense.DenseTable(4, CPU))
    assert y.isnan().all()
