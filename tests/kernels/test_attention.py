"""Packed attention: both paths against the equation in fp64, one query, one head and one key at a time."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.t5.modeling_t5 import T5Attention

from deltaserve_kernels.attention import PrefixTable, RelativeBias, Sequence, Sequences, attend
from deltaserve_kernels.attention.bias import bucket
from deltaserve_kernels.dispatch import Implementation, forced
from deltaserve_kernels.testing import POPULARITIES, error_ratio, poisoned, popularity

CPU = torch.device("cpu")
EXACT = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""fp32: sums. 16 bits: inputs are exact, the output and (CPU) the probabilities are rounded to 8 and 11 bits."""


@dataclass(frozen=True)
class Case:
    heads: int = 4
    kv_heads: int = 2
    width: int = 8
    causal: bool = True
    biased: bool = False
    window: int | None = None
    softcap: float | None = None
    prefixes: bool = False
    dtype: torch.dtype = torch.float32


def prefixes_of(case: Case) -> PrefixTable:
    """Slots 0 to 3 of different lengths and T5 numbers; slot 4 has none here; slot 3's layer has no bias."""
    table = PrefixTable(8, CPU)
    for slot, (length, pre, tok, biased) in enumerate([(1, -1, 0, 1), (5, -5, 0, 1), (3, 0, 3, 1), (2, 0, 0, 0)]):
        keys, values = (torch.randn(length, case.kv_heads, case.width).to(case.dtype) for _ in range(2))
        table.put(slot, (keys, values), (float(pre), float(tok), float(biased)))
    return table


def truth(q, keys, values, position: int, slot: int, case: Case, prefix: PrefixTable, bias: RelativeBias | None):
    """One sequence: q [queries, heads, d], its own keys and values [keys, kv_heads, d], all fp64."""
    entry = prefix.get(slot) if slot >= 0 else None
    n, (pre, tok, biased) = 0, (0.0, 0.0, 1.0)
    if entry is not None:
        k, v = (t.double() for t in entry.tensors)
        n, (pre, tok, biased) = k.shape[0], entry.scalars
        keys, values = torch.cat((k, keys)), torch.cat((v, values))
    out = torch.zeros_like(q)
    for row in range(q.shape[0]):
        i = position + row
        # The prefix stands before token 0: a window may have left it behind.
        seen = [p for p in range(n) if case.window is None or p > n + i - case.window]
        for j in range(keys.shape[0] - n):
            near = case.window is None or (i - j if case.causal else abs(i - j)) < case.window
            if near and (j <= i or not case.causal):
                seen.append(n + j)
        places = [p + pre if p < n else p - n + tok for p in seen]
        for head in range(case.heads):
            kv = head // (case.heads // case.kv_heads)
            scores = keys[seen, kv] @ q[row, head] * 0.3
            if case.softcap is not None:
                scores = case.softcap * torch.tanh(scores / case.softcap)
            if bias is not None and biased:
                distances = torch.tensor([int(p) - i for p in places])
                at = T5Attention._relative_position_bucket(distances, bias.bidirectional, 8, bias.max_distance)
                scores = scores + bias.table.double()[at, head]
            out[row, head] = scores.softmax(0) @ values[seen, kv]
    return out


def bias_of(case: Case) -> RelativeBias | None:
    return RelativeBias(torch.randn(8, case.heads) * 2, not case.causal, 16) if case.biased else None


def compare(case: Case, implementation: Implementation, spread: str = "uniform", cached: bool = False) -> None:
    """Eleven requests; with `cached` in two forwards, the second of one to three queries each, extents not in order."""
    torch.manual_seed(7)
    slots = popularity(spread, 11, 5)
    lengths = [1 + (i * 7) % 13 for i in range(11)]
    prefix, bias = prefixes_of(case) if case.prefixes else PrefixTable(8, CPU), bias_of(case)
    q, k, v = (
        [torch.randn(n, heads, case.width).to(case.dtype) for n in lengths]
        for heads in (case.heads, case.kv_heads, case.kv_heads)
    )
    # A sequence's first rows go in one forward, the rest in a second; uncached, all go in the first.
    cut = [n if not cached else max(0, n - 1 - i % 3) for i, n in enumerate(lengths)]
    order = [(i * 4) % 11 for i in range(11)]
    starts = dict.fromkeys(range(11), 0)
    at = 3
    for i in order:
        starts[i] = at
        at += lengths[i] + 2
    shape = (at, case.kv_heads, case.width)
    cache = (poisoned(*shape, dtype=case.dtype), poisoned(*shape, dtype=case.dtype)) if cached else None
    ours = [[] for _ in lengths]
    for low, high in ((dict.fromkeys(range(11), 0), cut), (cut, lengths)):
        items, write, at, here = [], [], 0, [i for i in range(11) if high[i] > low[i]]
        for i in here:
            count = high[i] - low[i]
            first, keys = (starts[i], high[i]) if cached else (at, count)
            items.append(Sequence(at, count, low[i], first, keys, slots[i], cached))
            write += range(starts[i] + low[i], starts[i] + high[i])
            at += count
        if not here:
            continue
        rows = [torch.cat([t[i][low[i] : high[i]] for i in here]) for t in (q, k, v)]
        sequences = Sequences(tuple(items), case.causal, torch.tensor(write) if cached else None)
        known = {"scale": 0.3, "bias": bias, "window": case.window, "softcap": case.softcap}
        with forced(implementation):
            out = attend(*rows, sequences, cache=cache, prefix=prefix, **known)
        assert out.dtype is case.dtype and out.shape == rows[0].shape
        for i, item in zip(here, items, strict=True):
            ours[i].append(out[item.query_start : item.query_start + item.queries])
    for i, n in enumerate(lengths):
        expected = truth(q[i].double(), k[i].double(), v[i].double(), 0, slots[i], case, prefix, bias)
        mine = torch.cat(ours[i])
        assert error_ratio(mine.reshape(n, -1), expected.reshape(n, -1)) <= EXACT[case.dtype], f"request {i}"


CASES = {
    "causal": Case(),
    "whole": Case(causal=False),
    "each its own": Case(kv_heads=4),
    "one kv head": Case(kv_heads=1, width=5),
    "window": Case(window=3),
    "window whole": Case(window=4, causal=False),
    "window of one whole": Case(window=1, causal=False),
    "window wider than the text whole": Case(window=13, causal=False),
    "softcap window whole": Case(softcap=1.5, window=3, causal=False),
    "softcap": Case(softcap=1.5),
    "softcap window": Case(softcap=1.5, window=2, kv_heads=2),
    "prefix": Case(prefixes=True),
    "prefix grouped window": Case(prefixes=True, kv_heads=2, window=3),
    "prefix whole": Case(prefixes=True, causal=False),
    "prefix window whole": Case(prefixes=True, causal=False, kv_heads=2, window=3),
    "bias": Case(biased=True),
    "bias whole": Case(biased=True, causal=False),
    "bias prefix": Case(biased=True, prefixes=True),
    "bias window whole": Case(biased=True, window=3, causal=False),
    "bias prefix whole": Case(biased=True, prefixes=True, causal=False),
}


@pytest.mark.parametrize("name", list(CASES))
def test_every_request_attends_to_its_own(name, implementation):
    compare(CASES[name], implementation)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.causal])
def test_keys_of_forwards_before(name, implementation):
    compare(CASES[name], implementation, cached=True)


@pytest.mark.parametrize("spread", POPULARITIES)
def test_popularities(spread, implementation):
    compare(CASES["bias prefix"], implementation, spread, cached=True)
    compare(CASES["prefix grouped window"], implementation, spread)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["causal", "each its own", "prefix grouped window", "bias prefix"])
def test_sixteen_bits(name, dtype, implementation):
    compare(Case(**vars(CASES[name]) | {"dtype": dtype}), implementation, cached=True)


def test_cross_attention_reads_keys_written_before(implementation):
    """Memory rows of two requests are written by one forward and read by the next, which writes none."""
    case = Case(causal=False, prefixes=True, kv_heads=4)
    torch.manual_seed(3)
    prefix, k, v = prefixes_of(case), torch.randn(9, 4, 8), torch.randn(9, 4, 8)
    cache = poisoned(20, 4, 8), poisoned(20, 4, 8)
    write = torch.tensor([10, 11, 12, 13, 14, 2, 3, 4, 5])
    for queries in (2, 1):
        q = torch.randn(2 * queries, 4, 8)
        items = (Sequence(0, queries, 0, 10, 5, 1, True), Sequence(queries, queries, 0, 2, 4, -1, True))
        new = (k, v, write) if queries == 2 else (k[:0], v[:0], None)
        with forced(implementation):
            out = attend(q, new[0], new[1], Sequences(items, False, new[2]), cache=cache, prefix=prefix, scale=0.3)
        for item, rows in zip(items, (slice(0, 5), slice(5, 9)), strict=True):
            mine = slice(item.query_start, item.query_start + queries)
            expected = truth(q[mine].double(), k[rows].double(), v[rows].double(), 0, item.slot, case, prefix, None)
            assert error_ratio(out[mine].flatten(1), expected.flatten(1)) <= 1e-5


def test_rows_of_no_sequence_are_zero(implementation):
    q = torch.randn(4, 2, 8)
    items = (Sequence(1, 2, 0, 1, 2, -1, False),)
    with forced(implementation):
        out = attend(q, q, q, Sequences(items, True), cache=None, prefix=PrefixTable(1, CPU), scale=1.0)
    assert not out[[0, 3]].any() and out[[1, 2]].any()


@settings(max_examples=100, deadline=None)
@given(
    bidirectional=st.booleans(),
    buckets=st.sampled_from([4, 8, 32]),
    furthest=st.sampled_from([16, 20, 128]),
    start=st.integers(-300, 300),
)
def test_buckets_are_those_of_transformers(bidirectional: bool, buckets: int, furthest: int, start: int):
    distances = torch.arange(start, start + 40)
    theirs = T5Attention._relative_position_bucket(distances, bidirectional, buckets, furthest)
    ours = bucket(distances, bidirectional, buckets, furthest)
    assert torch.equal(ours, theirs) and ours.dtype is torch.int64
    bias = RelativeBias(torch.randn(buckets, 3), bidirectional, furthest)
    near = distances.clamp(-bias.furthest, bias.furthest) + bias.furthest
    if bool((ours >= 0).all()):
        assert torch.equal(bias.curve[:, near], bias.table[ours].T)


def test_layers_of_one_forward_share_their_buckets(implementation):
    case = CASES["bias prefix"]
    torch.manual_seed(0)
    rows, keys = torch.randn(6, 4, 8), torch.randn(6, 2, 8)
    sequences = Sequences((Sequence(0, 6, 0, 0, 6, 1, False),), True)
    first, second = bias_of(case), bias_of(case)
    known = {"cache": None, "prefix": prefixes_of(case), "scale": 0.3}
    with forced(implementation):
        a = attend(rows, keys, keys, sequences, bias=first, **known)
        b = attend(rows, keys, keys, sequences, bias=second, **known)
        fresh = attend(rows, keys, keys, Sequences(sequences.items, True), bias=second, **known)
    assert torch.equal(b, fresh) and not torch.equal(a, b)
