"""Through the whole stack, over gRPC: what a delta gives is what PEFT alone gives, by itself and in a mixed batch."""

import asyncio
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from families import FAMILIES
from methods import HEADS, Case
from reference import NEW_TOKENS, Prepared, inputs

from deltaserve_client import AsyncClient, Client
from deltaserve_kernels.testing import error_ratio

NAMES = [*FAMILIES, *(pytest.param(f"{family}/all", marks=pytest.mark.long) for family in FAMILIES)]
TOLERANCE = 1e-5
MOVED = 1e-2
TOP = 20
ROUNDS = 5
SECONDS = 90

Ours = tuple[list[int], torch.Tensor, torch.Tensor | None]
"""Tokens, rows, and for log-probabilities the ids [n, TOP] that the rows' numbers belong to."""


def call(client: Any, case: Case, ids: list[list[int]], **who: Any) -> Any:
    """The request that asks for what `answer` of conftest gives."""
    if case.task in HEADS:
        return client.classify(ids, scores_as="raw", timeout=SECONDS, **who)
    if case.task == "FEATURE_EXTRACTION":
        return client.embed(ids, pooling="mean", normalize=False, timeout=SECONDS, **who)
    wanted = {"max_new_tokens": NEW_TOKENS, "ignore_eos": True, "logprobs": TOP}
    return client.generate(ids, timeout=SECONDS, **wanted, **who)


def read(case: Case, result: Any) -> list[Ours]:
    if case.task == "SEQ_CLS":
        return [([], torch.tensor([one.scores]), None) for one in result.results]
    if case.task == "TOKEN_CLS":
        return [([], torch.tensor([token.scores for token in one.tokens]), None) for one in result.results]
    if case.task == "QUESTION_ANS":
        return [([], torch.tensor([one.start_logits, one.end_logits]).T, None) for one in result.results]
    if case.task == "FEATURE_EXTRACTION":
        return [([], torch.tensor([one.values]), None) for one in result.results]
    samples = [one.samples[0] for one in result.results]
    return [
        (
            list(sample.ids),
            torch.tensor([[t.logprob for t in place.top] for place in sample.logprobs]),
            torch.tensor([[t.id for t in place.top] for place in sample.logprobs]),
        )
        for sample in samples
    ]


def differ(ours: Ours, reference: tuple[list[int], torch.Tensor]) -> float:
    """Error ratio; infinite where the greedy tokens differ."""
    tokens, rows, ids = ours
    if tokens != reference[0]:
        return float("inf")
    return error_ratio(rows, reference[1] if ids is None else reference[1].gather(1, ids))


class Mixed:
    """Everything that was asked of a family at one time, and the steps that answered it."""

    def __init__(self, prepared: Prepared, address: str) -> None:
        self.prepared = prepared
        self.answers: dict[Any, list[Ours]] = {}
        self.bare: list[Ours] = []
        self.steps: tuple[Any, ...] = ()
        asyncio.run(self._ask(address))

    @property
    def asked(self) -> int:
        """Sequences: two for each delta and for the bare backbone."""
        return 2 * (len(self.prepared.cases) + 1)

    @property
    def plain_case(self) -> Any:
        """A case whose task needs no head: what the bare backbone is asked."""
        return next(case for case in self.prepared.cases if case.task not in HEADS)

    async def _ask(self, address: str) -> None:
        async with AsyncClient(address) as client:
            known = {delta.name async for delta in client.deltas.list()}
            for case in self.prepared.cases:
                if case.name not in known:
                    await client.deltas.load(case.name, case.name, task_id=case.wanted.task_id, timeout=SECONDS)
            plain = self.plain_case
            # On a busy machine some may come after the batch has begun: then all are asked again.
            for _ in range(ROUNDS):
                before = (await client.server_info(steps=True)).steps
                results = await asyncio.gather(
                    *(call(client, case, inputs(case), delta=case.name) for case in self.prepared.cases),
                    call(client, plain, inputs(plain), backbone=True),
                )
                last = before[-1].index if before else 0
                self.steps = tuple(s for s in (await client.server_info(steps=True)).steps if s.index > last)
                if max(step.sequences for step in self.steps) == self.asked:
                    break
        for case, result in zip(self.prepared.cases, results, strict=False):
            assert result.delta == f"{case.name}@1"
            self.answers[case] = read(case, result)
        assert results[-1].delta == ""
        self.bare = read(plain, results[-1])


@pytest.fixture(scope="session")
def mixed(prepared: Any, server: Any) -> Callable[[str], Mixed]:
    made: dict[str, Mixed] = {}

    def do(name: str) -> Mixed:
        if name not in made:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made[name] = Mixed(prepared(name), server(name))
        return made[name]

    return do


def worst(found: Mapping[str, float]) -> str:
    return ", ".join(f"{name}: {ratio:.1e}" for name, ratio in sorted(found.items(), key=lambda item: -item[1]))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", NAMES)
def test_each_delta_moves_the_output(name: str, prepared: Any) -> None:
    made = prepared(name)
    moved = {
        case.name: min(
            error_ratio(ours[1], bare[1]) for ours, bare in zip(made.references[case], made.without[case], strict=True)
        )
        for case in made.cases
    }
    still = {name: ratio for name, ratio in moved.items() if ratio < MOVED}
    assert not still, worst(still)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", NAMES)
def test_mixed_batch_equals_peft_alone(name: str, mixed: Callable[[str], Mixed]) -> None:
    made = mixed(name)
    ratios = {case.name: max(map(differ, ours, made.prepared.references[case])) for case, ours in made.answers.items()}
    ratios["the backbone"] = max(map(differ, made.bare, made.prepared.without[made.plain_case]))
    off = {name: ratio for name, ratio in ratios.items() if not ratio <= TOLERANCE}
    assert not off, worst(off)


@pytest.mark.parametrize("name", NAMES)
def test_batch_was_mixed(name: str, mixed: Callable[[str], Mixed]) -> None:
    """One forward held at least 8 sequences, 5 deltas of 3 kinds, and rows of the bare backbone."""
    most = max(mixed(name).steps, key=lambda step: (len(step.deltas), step.sequences))
    assert most.sequences >= 8 and len(most.deltas) >= 5 and len(set(most.kinds)) >= 3
    assert most.sequences == mixed(name).asked, "those of the bare backbone are in it"
    assert len(most.deltas) == len(mixed(name).prepared.cases)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", NAMES)
def test_alone_equals_peft(name: str, mixed: Callable[[str], Mixed], server: Any) -> None:
    made = mixed(name).prepared
    ratios = {}
    with Client(server(name)) as client:
        for case in made.cases:
            ours = [read(case, call(client, case, [ids], delta=case.name))[0] for ids in inputs(case)[:1]]
            ratios[case.name] = differ(ours[0], made.references[case][0])
    off = {name: ratio for name, ratio in ratios.items() if not ratio <= TOLERANCE}
    assert not off, worst(off)
