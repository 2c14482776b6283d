"""A delta with an invocation: which rows have its slot, and that the others are the bare backbone's."""

import dataclasses
import time
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve.backbone.families import Shape
from deltaserve.deltas.delta import Delta
from deltaserve.deltas.sites import Axis, Pooling
from deltaserve.engine.invocation import last_start
from deltaserve.engine.planner import Planner
from deltaserve.engine.request import DeltaRef, Job, Request, Sampling
from deltaserve.engine.scheduler import Batch, Chunk
from deltaserve.engine.sequence import Sequence
from deltaserve.pool.pool import Resident
from deltaserve_kernels.testing import error_ratio

EXACT = 1e-5

WANTED = (30, 7)
TEXT = (9, 30, 7, 61, 22, 30, 7, 5, 8)
"""The last occurrence of WANTED starts at 5."""


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=30), st.lists(st.integers(0, 2), min_size=1, max_size=6))
def test_last_start_is_the_last(ids: list[int], wanted: list[int]):
    size = len(wanted)
    found = [at for at in range(len(ids) - size + 1) if ids[at : at + size] == wanted]
    assert last_start(tuple(ids), tuple(wanted)) == (found[-1] if found else None)


def test_search_takes_linear_time():
    """A text and an invocation made to be compared in vain at every place."""
    started = time.perf_counter()
    assert last_start((5,) * 400_000, (6, *(5,) * 255)) is None
    assert last_start((5,) * 400_000, (*(5,) * 255, 6)) is None
    assert time.perf_counter() - started < 5.0, "256 comparisons at each place would take a minute"


def sequence(
    ids: tuple[int, ...], job: Job = Job.GENERATE, slot: int = 3, prompt: int = 0, **known: object
) -> Sequence:
    ref = DeltaRef(1, "d@1", ("alora",), prompt_length=prompt, invocation=WANTED)
    made = Sequence(Request("s", job, ids, ref, **known), lambda _: None, Shape.DECODER, 0.0)
    made.place, made.self_start = Resident(1, "d@1", slot, 0, 0, ("alora",)), 0
    return made


def slots(made: Sequence, first: int, count: int) -> list[int]:
    return [slot for slot, rows in made.slots(first, count) for _ in range(rows)]


def generating(ids: tuple[int, ...], **sampling: object) -> Sequence:
    return sequence(ids, sampling=Sampling(4, **sampling))


@pytest.mark.parametrize(
    ("ids", "first"),
    [
        (TEXT, 5),
        (TEXT[:6], 1),  # the last one is cut in two
        (WANTED, 0),
        ((4, 4, *WANTED), 2),
        ((4, 30, 4, 7), None),
        ((7, 30), None),
        ((30,), None),
    ],
)
def test_rows_from_the_last_occurrence_on_have_the_slot(ids: tuple[int, ...], first: int | None):
    bare = len(ids) if first is None else first
    made = generating(ids)
    assert slots(made, 0, len(ids)) == [-1] * bare + [3] * (len(ids) - bare)
    assert slots(made, len(ids) + 20, 1) == [-1 if first is None else 3], "an output row"


def test_invocation_in_a_continuation_counts_and_generated_ones_do_not():
    scored = sequence((4, 5, 30), Job.SCORE, continuation=(7, 9))
    assert slots(scored, 0, 4) == [-1, -1, 3, 3]
    at_its_end = sequence((4, *WANTED, 5), Job.SCORE, continuation=(8, *WANTED))
    assert slots(at_its_end, 0, 6) == [-1] * 5 + [3], "its last token is none of the rows"
    made = generating((4, 5, 6))
    made.output += WANTED
    assert slots(made, 0, 5) == [-1] * 5


def test_soft_prompt_rows_count():
    assert slots(sequence(TEXT, Job.EMBED, prompt=2, pooling=Pooling.MEAN), 0, 11) == [-1] * 7 + [3] * 4


def test_row_maps_of_tokens_and_sampled_rows(drive: Callable):
    """A decoding sequence, one that never activates, chunks before, across and after the invocation, and a score."""
    planner = Planner(drive("llama", run=False).backbone)
    decoding, never = generating(TEXT), generating((4, 5, 6, 8))
    for each in (decoding, never):
        each.output.append(11)
    chunks = [Chunk(generating(TEXT, prompt_logprobs=0), first, 3) for first in (0, 3, 6)]
    unsampled = Chunk(generating(TEXT), 0, 9)
    scored = sequence((4, 5, 30), Job.SCORE, continuation=(7, 9, 8))
    embedded = sequence(TEXT, Job.EMBED, pooling=Pooling.LAST)
    prefill = (*chunks, unsampled, Chunk(scored, 0, 5), Chunk(embedded, 0, 9))
    plan = planner.layout(Batch((decoding, never), prefill)).plan
    text = [-1] * 5 + [3] * 4
    assert plan.maps[Axis.TOKENS].slots.tolist() == [3, -1, *text, *text, -1, -1, 3, 3, 3, *text]
    assert plan.maps[Axis.SAMPLED].slots.tolist() == [3, -1, *text, 3, 3, 3, 3]
    assert plan.maps[Axis.SAMPLED].rows == plan.sampled.shape[0]
    on_their_axis = plan.maps[Axis.TOKENS].slots[plan.sampled]
    assert plan.maps[Axis.SAMPLED].slots.equal(on_their_axis), "a sampled row has the slot it has among the tokens"


def activated(make_delta: Callable[..., Delta], driver, seed: int, wanted: tuple[int, ...] = WANTED) -> Delta:
    return dataclasses.replace(make_delta("lowrank", driver.backbone.spec, seed=seed), invocation=wanted)


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-tied"])
@pytest.mark.parametrize("rows", [4, 64], ids=["chunked", "whole"])
def test_rows_before_the_invocation_are_the_bare_backbones(
    name: str, rows: int, drive: Callable, make_delta: Callable[..., Delta]
):
    """Prompt log-probabilities before it are equal, those after it are not, in a batch with others of the kind."""
    driver = drive(name, max_batch_tokens=rows)
    for key in (0, 1):
        driver.publish(key, activated(make_delta, driver, key))
    sampling = Sampling(max_new_tokens=6, prompt_logprobs=0)
    ref = [None, driver.ref(0), driver.ref(1)]
    asked = [Request(f"{i}", Job.GENERATE, TEXT, ref[i], sampling=sampling) for i in range(3)]
    asked += [Request(f"{3 + i}", Job.GENERATE, TEXT[3:7][::-1], ref[i], sampling=sampling) for i in range(3)]
    driver.finished(*asked)

    def told(i: int) -> torch.Tensor:
        found = [place.chosen.logprob for event in driver.tokens[f"{i}"] for place in event.prompt_logprobs]
        return torch.tensor(found)

    assert told(0).shape == (len(TEXT) - 1,)
    for i in (1, 2):
        assert error_ratio(told(i)[:5], told(0)[:5]) <= EXACT
        assert bool(((told(i) - told(0))[5:].abs() > 1e-3).all())
    assert error_ratio(told(1)[5:], told(2)[5:]) >= 1e-2
    for i in (4, 5):
        assert error_ratio(told(i), told(3)) <= EXACT
        assert driver.output(f"{i}") == driver.output("3")
    driver.idle()


def test_what_is_generated_never_activates(drive: Callable, make_delta: Callable[..., Delta]):
    driver = drive("llama")
    sampling = Sampling(max_new_tokens=8)
    driver.finished(Request("bare", Job.GENERATE, (4, 5, 6), sampling=sampling))
    made = driver.output("bare")
    driver.publish(0, activated(make_delta, driver, 0, wanted=tuple(made[:2])))
    driver.finished(Request("same", Job.GENERATE, (4, 5, 6), driver.ref(0), sampling=sampling))
    assert driver.output("same") == made
    driver.finished(Request("given", Job.GENERATE, (4, 5, 6, *made[:2]), driver.ref(0), sampling=sampling))
    assert driver.output("given")[:6] != made[2:]
    driver.idle()
