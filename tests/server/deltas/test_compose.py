"""Several deltas as one: the effect of the composed parts is that of the members', by the equations."""

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve.deltas.adapters import Bottleneck
from deltaserve.deltas.bases import content_key
from deltaserve.deltas.compose import Member, compose, identity
from deltaserve.deltas.delta import Delta, Provenance
from deltaserve.deltas.primitives import (
    Affine,
    Block,
    Dense,
    Head,
    HeadLayer,
    LowRank,
    Prefix,
    Rows,
    SitePrimitive,
    SoftPrompt,
    Sparse,
)
from deltaserve.deltas.sites import Pooling, Task
from deltaserve_kernels.testing import error_ratio

IN, OUT = 12, 8


def delta(*parts: SitePrimitive, site: str = "s", kinds: Sequence[str] = ("k",), hash: str = "h", **told) -> Delta:
    return Delta(tuple(kinds), {site: parts} if parts else {}, told.pop("task", Task.GENERATION),
                 Provenance("test", hash, 10, 2), **told)  # fmt: skip


def composed(*deltas: Delta, weights: Sequence[float] | None = None) -> Delta:
    weights = weights or [1.0] * len(deltas)
    return compose([Member(f"d{i}@1", each, w) for i, (each, w) in enumerate(zip(deltas, weights, strict=True))])


class Drawn:
    """Random parts."""

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.random)

    def lowrank(self, rank: int, kind: str = "plain", dtype: torch.dtype = torch.float32) -> LowRank:
        inner = {"plain": None, "diagonal": self.normal(rank), "matrix": self.normal(rank, rank)}[kind]
        outer = None if kind == "plain" else self.normal(OUT)
        a, b = self.normal(rank, IN).to(dtype), self.normal(OUT, rank).to(dtype)
        return LowRank(a, b, float(self.normal(1)), inner, outer)

    def sparse(self, count: int) -> Sparse:
        index = torch.stack([torch.randint(0, n, (count,), generator=self.random) for n in (OUT, IN)]).int()
        return Sparse(index, self.normal(count))

    def dense(self, replace: bool = False, bias: bool = True) -> Dense:
        return Dense(self.normal(OUT, IN), self.normal(OUT) if bias else None, replace)

    def affine(self, *fields: str) -> Affine:
        return Affine(**{name: self.normal(IN if name == "in_scale" else OUT) for name in fields})


def linear(parts: Sequence[SitePrimitive], u: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A site's output in float64, by the equations of `primitives`. Each part alone at its step."""
    u, double = u.double(), lambda t: t.double()
    of = {type(part).__name__ + str(getattr(part, "outputs", "")): part for part in parts}
    assert len(of) == len(parts), "one part a step"
    turn, affine, dense = of.get("BlockFalse"), of.get("Affine", Affine()), of.get("Dense")
    u = u if turn is None else u @ torch.block_diag(*double(turn.blocks))
    u = u if affine.in_scale is None else u * affine.in_scale
    y = u @ w.double().T + b
    if dense is not None:
        added = u @ double(dense.weight).T + (0 if dense.bias is None else dense.bias)
        y = added if dense.replace else y + added
    if (low := of.get("LowRank")) is not None:
        h = u @ double(low.a).T
        h = h if low.inner is None else h * low.inner if low.inner.ndim == 1 else h @ double(low.inner).T
        y = y + low.scale * (1 if low.outer is None else low.outer) * (h @ double(low.b).T)
    if (sparse := of.get("Sparse")) is not None:
        whole = torch.zeros(OUT, IN, dtype=torch.float64)
        whole.index_put_((sparse.index[0].long(), sparse.index[1].long()), double(sparse.values), accumulate=True)
        y = y + u @ whole.T
    turn = of.get("BlockTrue")
    y = y if turn is None else y @ torch.block_diag(*double(turn.blocks))
    y = y if affine.scale is None else y * affine.scale
    return y if affine.shift is None else y + affine.shift


def setting(seed: int) -> tuple[Drawn, torch.Tensor, torch.Tensor, torch.Tensor]:
    drawn = Drawn(seed)
    return drawn, drawn.normal(5, IN), drawn.normal(OUT, IN), drawn.normal(OUT)


KINDS = ("plain", "diagonal", "matrix")
RANKS = st.lists(st.tuples(st.integers(1, 5), st.sampled_from(KINDS)), min_size=0, max_size=1)
ADDED = st.fixed_dictionaries(
    {"low": RANKS, "sparse": st.integers(0, 6), "dense": st.booleans(), "bias": st.booleans()}
)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 1 << 20), st.lists(ADDED, min_size=1, max_size=4), st.booleans())
def test_what_members_add_is_the_sum_of_what_each_adds_alone(seed, chosen, weighted):
    drawn, x, w, b = setting(seed)
    members = []
    for each in chosen:
        parts: list[SitePrimitive] = [drawn.lowrank(*low) for low in each["low"]]
        parts += [drawn.sparse(each["sparse"])] if each["sparse"] else []
        parts += [drawn.dense(bias=each["bias"])] if each["dense"] else []
        parts += [drawn.affine("shift")] if each["bias"] else []
        members.append(delta(*parts))
    weights = [float(drawn.normal(1)) if weighted else 1.0 for _ in members]
    bare = linear((), x, w, b)
    want = bare + sum(
        weight * (linear(m.at.get("s", ()), x, w, b) - bare) for m, weight in zip(members, weights, strict=True)
    )
    got = linear(composed(*members, weights=weights).at.get("s", ()), x, w, b)
    assert error_ratio(got, want) < 1e-6


def test_low_ranks_of_one_scale_keep_their_dtype_and_their_bits():
    drawn = Drawn(3)
    one, two = (dataclasses.replace(drawn.lowrank(r, dtype=torch.bfloat16), scale=2.0) for r in (2, 3))
    (made,) = composed(delta(one), delta(two)).at["s"]
    assert isinstance(made, LowRank) and made.scale == 2.0
    assert made.a.dtype == made.b.dtype == torch.bfloat16 and made.a.shape == (5, IN)
    assert torch.equal(made.b, torch.cat([one.b, two.b], 1))


def test_factors_and_biases_act_in_order():
    drawn, x, w, b = setting(5)
    first, then = drawn.affine("in_scale", "scale", "shift"), drawn.affine("in_scale", "scale", "shift")
    u = x.double() * first.in_scale * then.in_scale
    want = ((u @ w.double().T + b) * first.scale + first.shift) * then.scale + then.shift
    assert error_ratio(linear(composed(delta(first), delta(then)).at["s"], x, w, b), want) < 1e-6
    want = ((u @ w.double().T + b) * then.scale + then.shift) * first.scale + first.shift
    assert error_ratio(linear(composed(delta(then), delta(first)).at["s"], x, w, b), want) < 1e-6


def test_a_factor_multiplies_the_low_rank_of_another_whatever_the_order():
    drawn, x, w, b = setting(6)
    scale, low = drawn.affine("scale"), drawn.lowrank(3)
    want = linear((low,), x, w, b) * scale.scale
    for members in ((delta(scale), delta(low)), (delta(low), delta(scale))):
        assert error_ratio(linear(composed(*members).at["s"], x, w, b), want) < 1e-12


@pytest.mark.parametrize("outputs", [False, True])
def test_blocks_turn_in_order(outputs):
    drawn, x, w, b = setting(7)
    one, two = (
        Block(drawn.normal(4, (OUT if outputs else IN) // 4, (OUT if outputs else IN) // 4), outputs) for _ in "ab"
    )
    turned = [torch.block_diag(*part.blocks.double()) for part in (one, two)]
    if outputs:
        want = (x.double() @ w.double().T + b) @ turned[0] @ turned[1]
    else:
        want = x.double() @ turned[0] @ turned[1] @ w.double().T + b
    assert error_ratio(linear(composed(delta(one), delta(two)).at["s"], x, w, b), want) < 1e-6


def test_spaced_blocks_turn_in_order():
    drawn = Drawn(8)
    one, two = (Block(drawn.normal(2, 2, 2, 3), True) for _ in "ab")
    (made,) = composed(delta(one), delta(two)).at["s"]
    assert made.blocks.shape == (2, 2, 2, 3)
    x = drawn.normal(4, 12)

    def turn(x: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        return torch.einsum("rmis,mijs->rmjs", x.view(-1, 2, 2, 3), blocks).reshape(x.shape)

    assert error_ratio(turn(x, made.blocks), turn(turn(x, one.blocks), two.blocks)) < 1e-6


def test_one_may_replace_the_weight_and_others_add_to_it():
    drawn, x, w, b = setting(9)
    whole, low, added = drawn.dense(replace=True), drawn.lowrank(2), drawn.dense(bias=False)
    want = linear((whole,), x, w, b) + x.double() @ added.weight.double().T
    want = want + (linear((low,), x, w, b) - linear((), x, w, b))
    assert error_ratio(linear(composed(delta(low), delta(added), delta(whole)).at["s"], x, w, b), want) < 1e-6


def test_rows_of_different_tokens_stand_together_in_order():
    drawn = Drawn(10)
    one, two = Rows(torch.tensor([2, 9]).int(), drawn.normal(2, 4)), Rows(torch.tensor([5]).int(), drawn.normal(1, 4))
    (made,) = composed(delta(one), delta(two)).at["s"]
    assert made.index.tolist() == [2, 5, 9] and made.index.dtype == torch.int32
    assert torch.equal(made.values, torch.stack([one.values[0], two.values[0], one.values[1]]))


def test_a_norm_takes_weight_and_bias_from_two_members_and_factors_from_a_third():
    drawn = Drawn(11)
    weight = Affine(scale=drawn.normal(4), replace=True)
    bias = Affine(shift=drawn.normal(4), replace=True)
    factor = Affine(scale=drawn.normal(4))
    made = composed(delta(weight), delta(factor), delta(bias)).at["s"]
    own = next(part for part in made if part.replace)
    assert own.scale is weight.scale and own.shift is bias.shift and factor in made and len(made) == 2


def test_prefixes_and_prompts_stand_in_order():
    drawn = Drawn(12)
    one, two = (Prefix(drawn.normal(n, 2, 4), drawn.normal(n, 2, 4), pre=-n) for n in (3, 2))
    prompts = [SoftPrompt(drawn.normal(n, 6)) for n in (2, 4)]
    made = composed(
        *(
            delta(part, prompt=prompt, position_shift=part.keys.shape[0])
            for part, prompt in zip((one, two), prompts, strict=True)
        )
    )
    (prefix,) = made.at["s"]
    assert torch.equal(prefix.keys, torch.cat([one.keys, two.keys])) and prefix.pre == -5 and made.position_shift == 5
    assert torch.equal(prefix.values, torch.cat([one.values, two.values]))
    assert torch.equal(made.prompt.rows, torch.cat([each.rows for each in prompts])) and made.prompt_length == 6


def adapter(drawn: Drawn, **told) -> Bottleneck:
    return Bottleneck(drawn.normal(2, OUT), drawn.normal(OUT, 2), drawn.normal(2), drawn.normal(OUT), **told)


def test_adapters_of_a_site_stand_in_a_chain():
    drawn = Drawn(13)
    one, two, three = (adapter(drawn) for _ in "abc")
    assert composed(delta(one), delta(two, three)).at["s"] == (one, two, three)
    last = adapter(drawn, replaces=True)
    assert composed(delta(one), delta(last)).at["s"] == (one, last)


def test_a_weight_multiplies_what_an_adapter_adds():
    drawn = Drawn(14)
    part = adapter(drawn, scale=2.0)
    (made,) = composed(delta(part), weights=[-0.5]).at["s"]
    assert made.scale == -1.0 and torch.equal(made.up_bias, -0.5 * part.up_bias) and made.up is part.up


def test_sites_where_nothing_meets_keep_their_very_parts():
    drawn = Drawn(15)
    low, scale = drawn.lowrank(2), drawn.affine("scale")
    made = composed(delta(low, site="a"), delta(scale, site="b"))
    assert made.at["a"] == (low,) and made.at["b"] == (scale,)


def test_bases_are_there_once_and_only_where_something_looks_at_them():
    base = torch.arange(48.0).view(4, 12)
    both = {content_key(base): base}
    copies = [base.clone() for _ in range(3)]

    def vera(copy: torch.Tensor, site: str) -> Delta:
        part = LowRank(copy[:2], torch.ones(OUT, 2), 1.0, torch.ones(2), torch.ones(OUT))
        return delta(part, site=site, bases={key: copy for key in both})

    made = composed(vera(copies[0], "a"), vera(copies[1], "b"))
    assert made.bases.keys() == both.keys() and made.shared_bytes == base.numel() * 4
    assert {made.owners.base_of(part.a) for parts in made.at.values() for part in parts} == set(both)
    folded = composed(vera(copies[0], "a"), delta(Drawn(1).lowrank(2), site="a"))
    assert not folded.bases, "what was a view of it is a copy now"


def test_what_is_known_of_a_combination():
    head = Head((HeadLayer(torch.ones(2, 4)),))
    told = {"head": head, "pooling": Pooling.LAST_REAL, "labels": ("no", "yes"), "token_types": False}
    told |= {"problem_type": "single_label_classification", "task": Task.SEQUENCE_CLASSIFICATION}
    one = delta(kinds=("lora", "head"), hash="x", **told)
    two = delta(kinds=("prompt-tuning", "lora"), hash="y", prompt=SoftPrompt(torch.ones(3, 4)))
    made = composed(two, one)
    assert made.kinds == ("prompt-tuning", "lora", "head") and made.head is head
    assert (made.task, made.labels, made.token_types) == (Task.SEQUENCE_CLASSIFICATION, ("no", "yes"), False)
    assert made.pooling is Pooling.LAST, "behind a prompt transformers' classifiers cannot see padding"
    assert composed(one).pooling is Pooling.LAST_REAL
    assert made.provenance.content_hash == identity([("y", 1.0), ("x", 1.0)]) != identity([("x", 1.0), ("y", 1.0)])
    assert (made.provenance.file_bytes, made.provenance.tensors_matched) == (20, 4)


def test_a_delta_for_embeddings_is_for_any_task():
    assert composed(delta(task=Task.EMBEDDING), delta()).task is Task.GENERATION
    assert composed(delta(task=Task.EMBEDDING), delta(task=Task.EMBEDDING)).task is Task.EMBEDDING


def test_every_field_of_a_delta_is_thought_of():
    """Who adds one to Delta says in `compose` what it is of a combination."""
    assert {field.name for field in dataclasses.fields(Delta)} == {
        "kinds", "at", "task", "provenance", "prompt", "position_shift", "head", "pooling", "labels", "problem_type",
        "invocation", "task_id", "token_types", "coupling", "bases",
    }  # fmt: skip
