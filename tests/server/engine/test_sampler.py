"""Sampling against transformers' own processors, and against nothing but the seed."""

import collections
import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from deltaserve.backbone.families import Shape
from deltaserve.engine import sampler
from deltaserve.engine.request import Job, Request, Sampling
from deltaserve.engine.sequence import Sequence
from deltaserve_kernels.testing import error_ratio

VOCABULARY = 53


def sequence(sampling: Sampling, output: list[int] = [], ids: tuple[int, ...] = (4, 9, 9), **known: object) -> Sequence:  # noqa: B006
    made = Sequence(
        Request("r", Job.GENERATE, ids, sampling=sampling), lambda _: None, known.pop("shape", Shape.DECODER), 0.0
    )
    made.output = list(output)
    made.counts = dict(collections.Counter(output))
    return made


def logits(rows: int, seed: int = 0, size: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * size


def warped(row: torch.Tensor, s: Sampling) -> torch.Tensor:
    """transformers' probabilities for one row."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(s.temperature)])
    if s.top_k:
        warpers.append(TopKLogitsWarper(s.top_k))
    if s.top_p < 1:
        warpers.append(TopPLogitsWarper(s.top_p))
    if s.min_p:
        warpers.append(MinPLogitsWarper(s.min_p))
    return warpers(None, row.unsqueeze(0))[0].softmax(-1)


SETTINGS = [
    Sampling(9, temperature=1.0),
    Sampling(9, temperature=0.4),
    Sampling(9, temperature=2.5, top_k=5),
    Sampling(9, temperature=1.3, top_p=0.6),
    Sampling(9, temperature=1.3, top_p=0.01),
    Sampling(9, temperature=1.0, min_p=0.2),
    Sampling(9, temperature=1.7, top_k=20, top_p=0.9, min_p=0.05),
    Sampling(9, temperature=1.0, top_k=1),
    Sampling(9, temperature=1.0, top_k=10_000, min_p=1.0),
]


@pytest.mark.parametrize("setting", range(len(SETTINGS)))
def test_draws_follow_the_probabilities_of_transformers(setting: int):
    """Over 4,000 seeds, within five standard deviations and three draws; what the filters take out never comes."""
    row, many = logits(1, setting)[0], 4_000
    expected = warped(row, SETTINGS[setting])
    places = [sequence(dataclasses.replace(SETTINGS[setting], seed=seed)) for seed in range(many)]
    drawn = sampler.choose(row.expand(many, -1), places)
    share = torch.bincount(torch.tensor(drawn), minlength=VOCABULARY) / many
    assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / many).sqrt() + 3 / many).all()
    assert set(drawn) <= set(expected.nonzero().squeeze(1).tolist())


@pytest.mark.parametrize("size", [0.01, 1.0, 4.0], ids=["flat", "wide", "peaked"])
@pytest.mark.parametrize("known", [{"top_p": 0.95}, {"min_p": 0.3}, {"top_k": 1500}, {"top_k": 40, "top_p": 0.8}, {}])
def test_a_large_vocabulary(known: dict, size: float):
    """Whether what stays fits the head that is looked at first or not: the same tokens as transformers keeps."""
    row = torch.randn(5000, generator=torch.Generator().manual_seed(1)) * size
    base = Sampling(9, temperature=1.0, **known)
    expected = warped(row, base)
    drawn = sampler.choose(row.expand(400, -1), [sequence(dataclasses.replace(base, seed=seed)) for seed in range(400)])
    assert (expected[drawn] > 0).all()
    # Drawn from `expected`, the sum of its values at the draws is near its mean: five standard deviations.
    mean = (expected**2).sum()
    spread = ((expected**3).sum() - mean**2).clamp_min(0).sqrt()
    assert abs(expected[drawn].mean() - mean) <= 5 * spread / 20 + 1e-7


def test_scores_that_equal_the_last_of_top_k_stay():
    row = torch.tensor([[0.0, 3.0, 1.0, 1.0, 1.0, -2.0]])
    s = Sampling(9, temperature=1.0, top_k=2)
    drawn = {sampler.choose(row, [sequence(dataclasses.replace(s, seed=i))])[0] for i in range(200)}
    assert drawn == {1, 2, 3, 4} == set(warped(row[0], s).nonzero().squeeze(1).tolist())


def test_a_seed_decides_alone_whatever_is_in_the_batch():
    rows = logits(6)
    seeded = Sampling(9, temperature=1.5, seed=1234)
    others = [
        Sampling(9),
        Sampling(9, temperature=3.0),
        *SETTINGS[2:4],
        Sampling(9, temperature=0.7, presence_penalty=1.0),
    ]
    alone = sampler.choose(rows[:1], [sequence(seeded, [3])])
    for place in range(6):
        order = [i for i in range(1, 6)]
        order.insert(place, 0)
        settings = [seeded if i == 0 else others[i - 1] for i in order]
        made = sampler.choose(rows[order], [sequence(s, [3]) for s in settings])
        assert made[place] == alone[0]


def test_positions_and_seeds_differ_and_repeat():
    row, s = torch.zeros(1, VOCABULARY), Sampling(99, temperature=1.0, seed=7)
    first = [sampler.choose(row, [sequence(s, [1] * n)])[0] for n in range(40)]
    assert first == [sampler.choose(row, [sequence(s, [1] * n)])[0] for n in range(40)]
    other = [sampler.choose(row, [sequence(Sampling(99, temperature=1.0, seed=8), [1] * n)])[0] for n in range(40)]
    assert first != other and len(set(first)) > 15


def test_without_a_seed_draws_differ():
    row, s = torch.zeros(1, VOCABULARY), Sampling(99, temperature=1.0)
    assert len({sampler.choose(row, [sequence(s)])[0] for _ in range(60)}) > 15


def test_greedy_rows_beside_drawn_ones():
    rows = logits(4)
    settings = [Sampling(9), Sampling(9, temperature=5.0), Sampling(9), Sampling(9, temperature=0.01)]
    made = sampler.choose(rows, [sequence(s) for s in settings])
    greedy = rows.argmax(-1).tolist()
    assert [made[i] for i in (0, 2, 3)] == [greedy[i] for i in (0, 2, 3)]


@pytest.mark.parametrize("penalty", [0.5, 1.7])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float):
    rows, outputs = logits(3, 5), [[7, 7, 30], [], [4]]
    places = [sequence(Sampling(9, repetition_penalty=penalty), output) for output in outputs]
    ours = sampler._penalised(rows.clone(), places, [p.request.sampling for p in places])
    for row, place, mine in zip(rows, places, ours, strict=True):
        seen = torch.tensor([[*place.request.ids, *place.output]])
        theirs = RepetitionPenaltyLogitsProcessor(penalty)(seen, row.unsqueeze(0).clone())[0]
        assert error_ratio(mine.unsqueeze(0), theirs.unsqueeze(0)) <= 1e-6


def test_an_encoder_decoder_is_penalised_for_its_output_only():
    rows = logits(1, 5)
    place = sequence(Sampling(9, repetition_penalty=2.0), [7], shape=Shape.ENCODER_DECODER)
    changed = sampler._penalised(rows.clone(), [place], [place.request.sampling]) != rows
    assert changed.nonzero()[:, 1].tolist() == [7]


def test_presence_and_frequency_penalties():
    rows = logits(2, 6)
    places = [
        sequence(Sampling(9, presence_penalty=0.5, frequency_penalty=0.25), [7, 7, 7, 30]),
        sequence(Sampling(9, frequency_penalty=-1.0), [2]),
    ]
    ours = sampler._penalised(rows.clone(), places, [p.request.sampling for p in places])
    expected = rows.clone()
    expected[0, 7] -= 0.5 + 3 * 0.25
    expected[0, 30] -= 0.5 + 0.25
    expected[1, 2] += 1.0
    assert torch.allclose(ours, expected, atol=1e-6)


def test_end_tokens_wait_for_the_minimum_length_even_those_outside_of_the_vocabulary():
    rows = logits(2)
    best = int(rows[0].argmax())
    rows[1] = rows[0]
    s = Sampling(9, min_new_tokens=2, end_ids=frozenset({best, 50_256}))
    first, second = sampler.choose(rows, [sequence(s, [1]), sequence(s, [1, 2])])
    assert first == int(rows[0].topk(2).indices[1]) and second == best
    assert sampler.choose(rows[:1], [sequence(Sampling(9, min_new_tokens=5))]) == [best]


def test_logprobs_are_those_of_the_unchanged_logits():
    rows = logits(3)
    expected = rows.log_softmax(-1)
    for row, told in enumerate(sampler.logprobs(rows, [5, 6, 7], 4)):
        assert told.chosen.id == 5 + row
        assert told.chosen.logprob == pytest.approx(float(expected[row, 5 + row]), abs=1e-5)
        assert told.chosen.rank == int((expected[row] > expected[row, 5 + row]).sum()) + 1
        assert [t.id for t in told.top] == rows[row].topk(4).indices.tolist()
        assert [t.rank for t in told.top] == [1, 2, 3, 4]
        assert math.isclose(told.top[0].logprob, float(expected[row].max()), abs_tol=1e-5)
    assert sampler.logprobs(rows[:1], [5], 0)[0].top == ()
    assert len(sampler.logprobs(rows[:1], [5], 10_000)[0].top) == VOCABULARY


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_logits(dtype: torch.dtype):
    rows = logits(2).to(dtype)
    seeded = [sequence(Sampling(9, temperature=1.0, seed=3)) for _ in range(2)]
    assert sampler.choose(rows, seeded) == sampler.choose(rows.float(), seeded)


def test_a_seed_gives_the_same_text_alone_and_in_a_crowd(drive: Callable[..., object]):
    driver = drive("llama", max_running=6)
    known = {"temperature": 1.2, "top_p": 0.95}
    one = Request("alone", Job.GENERATE, (9, 8, 7), sampling=Sampling(24, seed=99, **known))
    driver.finished(one)
    crowd = [Request(f"r{i}", Job.GENERATE, (5 + i,) * (i + 1), sampling=Sampling(24, **known)) for i in range(5)]
    driver.submit(*crowd[:3])
    driver.submit(Request("among", Job.GENERATE, one.ids, sampling=one.sampling))
    driver.submit(*crowd[3:])
    driver.results("among", *(r.id for r in crowd))
    assert driver.output("among") == driver.output("alone")
