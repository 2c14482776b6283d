"""Looked-up rows: whole embeddings, rows for some ids, and all of it in one gather, against one row at a time."""

import pytest
import torch

from deltaserve_kernels import embed, rows
from deltaserve_kernels.dispatch import Implementation, forced
from deltaserve_kernels.gpu import embed as gpu
from deltaserve_kernels.rowmap import RowMap
from deltaserve_kernels.testing import poisoned

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VOCABULARY = 23
HALF_STEP = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def tables(width: int, dtype: torch.dtype) -> tuple[embed.EmbeddingTable, rows.RowsTable]:
    """Slots 0 and 1 have rows for some ids, 1 and 2 an embedding of their own, 3 a single row, 4 nothing."""
    whole, own = embed.EmbeddingTable(8, CPU), rows.RowsTable(8, CPU)
    for slot in (1, 2):
        whole.put(slot, (torch.randn(VOCABULARY, width).to(dtype),))
    for slot, index in {0: [0, 4, 5, VOCABULARY - 1], 1: [3, 7, 8, 9, 21], 3: [6]}.items():
        own.put(slot, (torch.tensor(index, dtype=torch.int32), torch.randn(len(index), width).to(dtype)))
    return whole, own


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("longest", [1, 9])
@pytest.mark.parametrize(("width", "factor"), [(1, 1.0), (33, 5.5), (1030, 1.0)])
def test_every_row_looks_up_its_own(width, factor, longest, dtype, spread, rows_of, implementation):
    rowmap, each = rows_of(spread, longest)
    whole, own = tables(width, dtype)
    ids = torch.randint(0, VOCABULARY, (rowmap.rows,))
    y = torch.randn(rowmap.rows, width).to(dtype)
    ours = y.clone()
    with forced(implementation):
        embed.look_up(ours, ids, rowmap, whole, factor)
        rows.replace_rows(ours, ids, rowmap, own, factor)
    for row, slot in enumerate(each):
        index, values = (None, None) if own.get(slot) is None else own.get(slot).tensors
        hits = [] if index is None else (index == ids[row]).nonzero().flatten().tolist()
        if hits:
            expected = values[hits[0]].double() * factor
        elif whole.get(slot) is not None:
            expected = whole.get(slot).tensors[0][ids[row]].double() * factor
        else:
            assert torch.equal(ours[row], y[row])
            continue
        # The interpreter cuts bfloat16 where GPUs round.
        assert torch.allclose(ours[row].double(), expected, rtol=2 * HALF_STEP[dtype] + 1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_gather_for_all(dtype, spread, rows_of):
    rowmap, _ = rows_of(spread, 4)
    whole, own = tables(40, dtype)
    weight, ids = torch.randn(VOCABULARY, 40).to(dtype), torch.randint(0, VOCABULARY, (rowmap.rows,))
    right = weight[ids]
    with forced(Implementation.REFERENCE):
        embed.look_up(right, ids, rowmap, whole)
        rows.replace_rows(right, ids, rowmap, own)
    assert torch.equal(gpu.rows_of(ids, rowmap, weight, whole, own), right)
    with forced(Implementation.REFERENCE):
        assert torch.equal(embed.rows_of(ids, rowmap, weight, whole, own), right)
    bare = RowMap.of([(-1, rowmap.rows)], CPU)
    empty = embed.EmbeddingTable(8, CPU), rows.RowsTable(8, CPU)
    assert torch.equal(gpu.rows_of(ids, bare, weight, *empty), weight[ids])


def test_what_cannot_be_read_is_refused():
    whole, own = tables(8, torch.float32)
    rowmap, ids, y = RowMap.of([(1, 2), (-1, 1)], CPU), torch.zeros(3, dtype=torch.int64), torch.ones(3, 8)
    weight = torch.ones(VOCABULARY, 8)
    cases = {
        "ids: shape": lambda: embed.look_up(y, ids[:2], rowmap, whole),
        "ids: .*torch.int32": lambda: rows.replace_rows(y, ids.int(), rowmap, own),
        "y: dtype": lambda: embed.look_up(y.double(), ids, rowmap, whole),
        "embedding: of slot 1, shape": lambda: embed.look_up(torch.ones(3, 9), ids, rowmap, whole),
        "values: of slot 0, shape": lambda: rows.replace_rows(torch.ones(3, 9), ids, rowmap, own),
        "embedding: of slot 1, 23 rows": lambda: gpu.rows_of(ids, rowmap, torch.ones(30, 8), whole, own),
        "weight: ": lambda: gpu.rows_of(ids, rowmap, weight.T.contiguous().T, whole, own),
    }
    with forced(Implementation.TRITON):
        for said, call in cases.items():
            with pytest.raises(ValueError, match=f"^{said}"):
                call()
        prompts = embed.PromptTable(4, CPU)
        prompts.put(1, (torch.ones(5, 8),))
        for piece in ((0, 0, 0, 1), (1, 2, 0, 2), (1, 0, 4, 2), (1, 0, -1, 1)):
            with pytest.raises(ValueError, match=r"^pieces: "):
                embed.prompt_rows(y, prompts, [piece])
    assert bool((y == 1).all())


def test_poison_of_others_stays_out(implementation):
    whole, own = tables(6, torch.float32)
    rowmap, ids = RowMap.of([(2, 1), (4, 1), (-1, 1), (3, 2)], CPU), torch.tensor([1, 1, 1, 6, 5])
    y = poisoned(5, 6)
    with forced(implementation):
        embed.look_up(y, ids, rowmap, whole)
        rows.replace_rows(y, ids, rowmap, own)
    assert y.isnan().all(1).tolist() == [False, True, True, False, True]
