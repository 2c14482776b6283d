"""Attention's kernel against the reference, where it cuts: long contexts, many rows, foreign memory, bad input."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve_kernels.attention import PrefixTable, RelativeBias, Sequence, Sequences, attend
from deltaserve_kernels.attention.cost import cost
from deltaserve_kernels.attention.paths import Attention
from deltaserve_kernels.cost import Cost
from deltaserve_kernels.dispatch import Implementation, forced
from deltaserve_kernels.testing import error_ratio, poisoned

CPU = torch.device("cpu")
EXACT = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Both round the result to 16 bits; the kernel rounds probabilities too."""
HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """`sizes`: of each request, the tokens before and its queries. Their slots are 0, 1, 3, none and 2,
    which has no prefix here."""

    sizes: tuple[tuple[int, int], ...]
    heads: int = 4
    kv_heads: int = 2
    width: int = 16
    causal: bool = True
    cached: bool = True
    biased: bool = False
    window: int | None = None
    softcap: float | None = None
    dtype: torch.dtype = torch.float32
    kept: torch.dtype = torch.float32
    """The prefixes' dtype."""


@dataclass(frozen=True, eq=False)
class Scene:
    """One call. Cache rows of no request are NaN."""

    rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    sequences: Sequences
    cache: tuple[torch.Tensor, torch.Tensor] | None
    prefix: PrefixTable
    known: dict[str, object]

    def by(self, implementation: Implementation) -> torch.Tensor:
        fresh = Sequences(self.sequences.items, self.sequences.causal)
        with forced(implementation):
            return attend(*self.rows, fresh, cache=self.cache, prefix=self.prefix, **self.known)


def scene_of(case: Case) -> Scene:
    torch.manual_seed(5)
    prefix = PrefixTable(4, CPU)
    for slot, (length, pre, tok, biased) in {0: (1, -1, 0, 1), 1: (19, 0, 19, 1), 3: (3, -3, 0, 0)}.items():
        pair = (torch.randn(length, case.kv_heads, case.width).to(case.kept) for _ in range(2))
        prefix.put(slot, tuple(pair), (float(pre), float(tok), float(biased)))
    items, at, tokens = [], 0, 3
    for number, (before, queries) in enumerate(case.sizes):
        first = tokens if case.cached else at
        position = before if case.cached else 0
        slot = (0, 1, 3, -1, 2)[number % 5]
        items.append(Sequence(at, queries, position, first, position + queries, slot, case.cached))
        at, tokens = at + queries, tokens + before + queries + 2
    shapes = ((case.heads, at), (case.kv_heads, at), (case.kv_heads, at))
    rows = tuple(torch.randn(count, heads, case.width).to(case.dtype) for heads, count in shapes)
    cache = None
    if case.cached:
        cache = tuple(poisoned(tokens, case.kv_heads, case.width, dtype=case.dtype) for _ in range(2))
        for item in items:
            for side in cache:
                side[item.key_start : item.key_start + item.keys].normal_()
    bias = RelativeBias(torch.randn(8, case.heads) * 2, not case.causal, 40) if case.biased else None
    known = {"scale": 0.3, "bias": bias, "window": case.window, "softcap": case.softcap}
    return Scene(rows, Sequences(tuple(items), case.causal), cache, prefix, known)


def agree(case: Case) -> None:
    scene = scene_of(case)
    ours, right = scene.by(Implementation.TRITON), scene.by(Implementation.REFERENCE)
    assert ours.dtype is case.dtype
    assert error_ratio(ours.flatten(1), right.flatten(1)) <= EXACT[case.dtype]


LONG = Case(((1100, 1), (599, 3), (4, 1), (511, 1), (512, 1)))
"""Read in parts of 512 keys: three, two, one, one and two."""
MANY = Case(((0, 70), (30, 40), (50, 1)), width=24, dtype=torch.float16, kept=torch.float16)
"""Rows in halves are cut into tiles of 64: of 140, 80 and 2 rows, three, two and one."""


CUTS = {
    "parts": LONG,
    "parts, window": replace(LONG, window=700),
    "parts, short window, bias": replace(LONG, window=9, biased=True, dtype=torch.float16),
    "parts, soft-cap, one KV head": replace(LONG, softcap=2.0, kv_heads=1, dtype=torch.float16),
    "parts, both ways, bias": replace(LONG, causal=False, biased=True, dtype=torch.bfloat16),
    "tiles": MANY,
    "tiles, window, soft-cap": replace(MANY, window=21, softcap=1.5),
    "tiles, both ways, bias": replace(MANY, causal=False, biased=True, cached=False),
    "tiles, each head its own": replace(MANY, kv_heads=4, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("name", list(CUTS))
def test_parts_and_tiles_come_to_the_reference(name):
    agree(CUTS[name])


@settings(max_examples=25, deadline=None)
@given(
    case=st.builds(
        Case,
        sizes=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 6)), min_size=1, max_size=4).map(tuple),
        heads=st.sampled_from([2, 6]),
        kv_heads=st.sampled_from([1, 2]),
        width=st.sampled_from([1, 7, 8, 40]),
        causal=st.booleans(),
        cached=st.booleans(),
        biased=st.booleans(),
        window=st.sampled_from([None, 1, 5, 20]),
        softcap=st.sampled_from([None, 0.5, 30.0]),
        dtype=st.sampled_from([torch.float32, *HALVES]),
        kept=st.sampled_from([torch.float32, *HALVES]),
    )
)
def test_flags_in_combination(case: Case):
    agree(case)


@pytest.mark.parametrize("width", [8, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_nothing_is_read_that_is_another_s(width, dtype):
    """For each request alone all else is NaN: other rows and prefixes, and what lies around every buffer."""
    scene = scene_of(Case(((0, 3), (9, 2), (20, 1), (2, 2)), width=width, dtype=dtype, kept=dtype, cached=False))
    right = scene.by(Implementation.REFERENCE)
    for item in scene.sequences.items:
        mine = slice(item.query_start, item.query_start + item.queries)
        rows = []
        for given_rows in scene.rows:
            count, heads, d = given_rows.shape
            around = poisoned(count + 2, heads + 1, d + 8, dtype=dtype)
            part = around[1:-1, :heads, 3 : 3 + d]
            part[mine] = given_rows[mine]
            rows.append(part)
        prefix = PrefixTable(4, CPU)
        for slot, entry in scene.prefix.items().items():
            guarded = []
            for t in entry.tensors:
                around = poisoned(t.shape[0] + 2, *t.shape[1:], dtype=dtype)
                if slot == item.slot:
                    around[1:-1] = t
                guarded.append(around[1:-1])
            prefix.put(slot, tuple(guarded), entry.scalars)
        alone = replace(scene, rows=tuple(rows), prefix=prefix, sequences=Sequences((item,), True))
        ours = alone.by(Implementation.TRITON)
        assert error_ratio(ours[mine].flatten(1), right[mine].flatten(1)) <= EXACT[dtype]
        others = torch.ones(len(ours), dtype=torch.bool)
        others[mine] = False
        assert not ours[others].any()


def test_keys_that_a_window_left_behind_are_not_read():
    scene = scene_of(Case(((30, 2), (1, 1)), window=6))
    right = scene.by(Implementation.REFERENCE)
    first = scene.sequences.items[0]
    for side in scene.cache:
        side[first.key_start : first.key_start + 30 - 6 + 1] = float("nan")
    assert torch.equal(scene.by(Implementation.TRITON), scene.by(Implementation.TRITON))
    assert error_ratio(scene.by(Implementation.TRITON).flatten(1), right.flatten(1)) <= 1e-5


def test_a_request_s_result_does_not_depend_on_who_else_is_there():
    together = scene_of(LONG)
    whole = together.by(Implementation.TRITON)
    for item in together.sequences.items:
        alone = replace(together, sequences=Sequences((item,), True)).by(Implementation.TRITON)
        mine = slice(item.query_start, item.query_start + item.queries)
        assert torch.equal(alone[mine], whole[mine])


def test_keys_of_the_cache_and_of_this_forward_in_one_call():
    scene = scene_of(Case(((6, 2), (0, 3), (4, 1))))
    items = tuple(replace(s, cached=False, key_start=s.query_start, keys=s.queries, position=0) if n == 1 else s
                  for n, s in enumerate(scene.sequences.items))  # fmt: skip
    mixed = replace(scene, sequences=Sequences(items, True))
    ours, right = mixed.by(Implementation.TRITON), mixed.by(Implementation.REFERENCE)
    assert error_ratio(ours.flatten(1), right.flatten(1)) <= 1e-5


@pytest.mark.parametrize("kept", [torch.float32, torch.float16], ids=str)
def test_a_slot_s_next_prefix_is_read_in_its_place(kept):
    scene = scene_of(Case(((3, 1), (5, 2)), kept=kept))
    first = scene.by(Implementation.TRITON)
    scene.prefix.drop(1)
    bare = scene.by(Implementation.TRITON)
    scene.prefix.put(1, tuple(torch.randn(2, 2, 16).to(kept) for _ in range(2)), (0.0, 0.0, 1.0))
    second = scene.by(Implementation.TRITON)
    assert torch.equal(first[:1], second[:1])
    for a, b in ((first, bare), (bare, second), (first, second)):
        assert not torch.equal(a[1:], b[1:])
    assert error_ratio(second.flatten(1), scene.by(Implementation.REFERENCE).flatten(1)) <= 1e-5


def test_without_keys_of_its_own_a_request_reads_its_prefix():
    """As rows do whose memory is empty: zero where there is no prefix either."""
    scene = scene_of(Case(((0, 2), (0, 1)), cached=False, causal=False))
    items = (replace(scene.sequences.items[0], keys=0, slot=1), replace(scene.sequences.items[1], keys=0, slot=-1))
    empty = replace(scene, sequences=Sequences(items, False))
    ours, right = empty.by(Implementation.TRITON), empty.by(Implementation.REFERENCE)
    assert error_ratio(ours[:2].flatten(1), right[:2].flatten(1)) <= 1e-5
    assert not ours[2].any() and ours[:2].any()


WRONG = {
    "query: strides": lambda s: replace(s, rows=(s.rows[0].repeat_interleave(2, 2)[:, :, ::2], *s.rows[1:])),
    "cache's keys: strides": lambda s: replace(
        s, cache=(s.cache[0].transpose(1, 2).contiguous().transpose(1, 2), s.cache[1])
    ),
    "key: dtype": lambda s: replace(s, rows=(s.rows[0], s.rows[1].half(), s.rows[2])),
    "cache's values: dtype": lambda s: replace(s, cache=(s.cache[0], s.cache[1].bfloat16())),
    "query: dtype": lambda s: replace(s, rows=tuple(t.double() for t in s.rows)),
    "value: shape": lambda s: replace(s, rows=(*s.rows[:2], s.rows[2][:-1])),
    "cache's values: shape": lambda s: replace(s, cache=(s.cache[0], s.cache[1][:, :1])),
    "query: Heads": lambda s: replace(s, rows=(s.rows[0][:, :3], *s.rows[1:])),
    "bias: its table": lambda s: replace(s, known={**s.known, "bias": RelativeBias(torch.randn(8, 3), False, 40)}),
    "prefix: keys": lambda s: replace(s, prefix=prefix_of_other_heads()),
    "sequences: one has a slot": lambda s: with_first(s, slot=4),
    "sequences: one has queries": lambda s: with_first(s, queries=99),
    "sequences: one has keys": lambda s: with_first(s, key_start=1000),
    "sequences: number 0": lambda s: with_first(s, slot=-2),
}


def with_first(scene: Scene, **changed: int) -> Scene:
    first, *rest = scene.sequences.items
    return replace(scene, sequences=Sequences((replace(first, **changed), *rest), True))


def prefix_of_other_heads() -> PrefixTable:
    table = PrefixTable(4, CPU)
    table.put(0, (torch.randn(3, 4, 16), torch.randn(3, 4, 16)), (0.0, 0.0, 1.0))
    return table


@pytest.mark.parametrize("name", list(WRONG))
def test_bad_input_is_refused_by_name(name):
    scene = scene_of(Case(((2, 2), (0, 1))))
    with pytest.raises(ValueError, match=f"^{name}"):
        WRONG[name](scene).by(Implementation.TRITON)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)), min_size=1, max_size=3),
    causal=st.booleans(),
    window=st.sampled_from([None, 1, 4, 9]),
)
def test_costs_are_what_masks_let_through(sizes, causal, window):
    items = tuple(Sequence(9 * n, q, before, 20 * n, before + q, n - 1, True) for n, (before, q) in enumerate(sizes))
    sequences, prefixes = Sequences(items, causal), {0: 3, 1: 7}
    attention = Attention(sequences, PrefixTable(1, CPU), 1.0, None, window, None)
    pairs, keys = 0, 0
    for item in items:
        prefix = prefixes.get(item.slot, 0)
        hidden = attention.hidden(item, prefix, CPU)
        seen = torch.ones(item.queries, prefix + item.keys) if hidden is None else ~hidden
        pairs, keys = pairs + int(seen.sum()), keys + int(seen.any(0).sum())
    found = cost(sequences, heads=6, kv_heads=2, width=8, size=2, prefixes=prefixes, window=window)
    rows = sum(item.queries for item in items) * 6 * 8 * 2
    assert found == Cost(read=rows + keys * 2 * 2 * 8 * 2, written=rows, flops=4 * 6 * 8 * pairs)
