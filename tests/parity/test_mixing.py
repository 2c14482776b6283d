"""Whatever is in the batch, a request gets what it gets alone: random deltas, jobs, lengths, orders and arrivals."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from driven import Driven, greedy, written
from families import FAMILIES, SPECIAL, VOCABULARY
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from methods import Case, cases
from reference import Answer

from deltaserve.deltas.delta import Delta, Provenance, mapped
from deltaserve.deltas.primitives import LowRank
from deltaserve.deltas.sites import BackboneSpec, Pooling, SiteType, Task
from deltaserve.engine.request import Job, Request
from deltaserve_kernels.testing import error_ratio

EXACT = 1e-5
RANKS = (1, 2, 3, 8, 13, 16)
ARRIVALS = (0, 0, 0, 0, 1, 2, 3, 5, 8, 12)
"""In steps since the batch began; many together, so that encoders are mixed too."""
SHORT = ("llama", "bert", "t5")
COVERING = ("lora-patterns", "dora-bias", "pissa", "vera", "ia3", "prefix", "prompt", "p-tuning", "oft", "road-2")
COVERING += ("shira", "ln-tuning", "lora-tokens", "lora-embedding", "loha", "lora-bias-all", "lora-saved-head")
COVERING += ("tinylora", "psoft", "alora")

POOLINGS = (Pooling.MEAN, Pooling.CLS, Pooling.LAST)


@dataclass(frozen=True)
class Ask:
    """One request, without its place in the batch. `words` draws its ids."""

    delta: str | None
    job: Job
    length: int
    words: int
    new: int
    pooling: Pooling

    def request(self, driven: Driven, number: int) -> Request:
        random = torch.Generator().manual_seed(self.words)
        ids = tuple(torch.randint(SPECIAL, VOCABULARY, (self.length,), generator=random).tolist())
        if self.delta is not None and self.words % 4:
            half = self.length // 2
            ids = ids[:half] + driven.deltas[self.delta].invocation + ids[half:]
        known = {"id": f"r{number}", "job": self.job, "ids": ids, "delta": driven.ref(self.delta)}
        match self.job:
            case Job.GENERATE:
                return Request(**known, sampling=greedy(self.new))
            case Job.SCORE:
                return Request(**known, continuation=ids[: self.new] or ids, score_logprobs=VOCABULARY)
            case Job.EMBED:
                return Request(**known, pooling=self.pooling)
        return Request(**known)


def low_rank(spec: BackboneSpec, rank: int) -> Delta:
    """LoRA of one rank at every other linear."""
    random = torch.Generator().manual_seed(rank)
    linears = [site for site in spec.sites.values() if site.type in (SiteType.LINEAR, SiteType.CONV1D)]
    at = {
        site.name: (
            LowRank(
                torch.randn(rank, site.in_features, generator=random) * site.in_features**-0.5,
                torch.randn(site.out_features, rank, generator=random) * rank**-0.5,
                0.5,
            ),
        )
        for site in linears[rank % 2 :: 2]
    }
    task = Task.GENERATION if "generate" in spec.tasks else Task.EMBEDDING
    return Delta(("lora",), at, task, Provenance("test", f"rank{rank}", 0, 0))


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[[str, list[Case]], Driven]]:
    """Where a delta has bases, there is one more that shares them."""
    started: list[Driven] = []

    def open_(family: str, found: list[Case]) -> Driven:
        written(family, found, tmp_path)
        driven = Driven(tmp_path)
        started.append(driven)
        for case in found:
            driven.lower(case.name, case.wanted)
            delta = driven.deltas[case.name]
            if delta.bases:
                driven.publish(f"{case.name}-again", mapped(delta, lambda t: t / 2, delta.bases))
        for rank in RANKS:
            driven.publish(f"rank-{rank}", low_rank(driven.backbone.spec, rank))
        return driven

    yield open_
    for driven in started:
        driven.stop()


def jobs(driven: Driven, delta: str | None) -> list[Job]:
    """What a delta can be asked for, or the bare backbone."""
    if delta is not None and driven.deltas[delta].head is not None:
        return [Job.CLASSIFY]
    return [job for job in (Job.GENERATE, Job.SCORE, Job.EMBED) if job.value in driven.backbone.spec.tasks]


def asks(driven: Driven) -> st.SearchStrategy[tuple[Ask, int]]:
    """Requests and the step at which they arrive; many name no delta."""

    def one(delta: str | None) -> st.SearchStrategy[Ask]:
        return st.builds(
            Ask, st.just(delta), st.sampled_from(jobs(driven, delta)), length=st.integers(1, 23),
            words=st.integers(0, 7), new=st.integers(1, 10), pooling=st.sampled_from(POOLINGS),
        )  # fmt: skip

    names = st.sampled_from([None, *driven.deltas])
    return st.tuples(names.flatmap(one), st.sampled_from(ARRIVALS))


def differs(ours: Answer, alone: Answer) -> bool:
    return ours[0] != alone[0] or not error_ratio(ours[1], alone[1]) <= EXACT


def check(driven: Driven, examples: int) -> None:
    known: dict[Ask, Answer] = {}

    def alone(ask: Ask) -> Answer:
        if ask not in known:
            known[ask] = driven.answers([ask.request(driven, 0)])[0]
        return known[ask]

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        phases=[Phase.generate],  # to shrink a batch takes minutes, and names no other delta
    )  # fmt: skip
    @given(st.lists(asks(driven), min_size=6, max_size=20))
    def together(drawn: list[tuple[Ask, int]]) -> None:
        expected = [alone(ask) for ask, _ in drawn]
        requests = [ask.request(driven, number) for number, (ask, _) in enumerate(drawn)]
        ours = driven.answers(requests, [arrival for _, arrival in drawn])
        wrong = [ask for (ask, _), mine, its in zip(drawn, ours, expected, strict=True) if differs(mine, its)]
        assert not wrong

    together()
    steps = driven.engine.stats(steps=True).steps
    assert max(len(step.kinds) for step in steps) >= 5, "nothing was mixed"
    assert driven.checksum() == driven.before


@pytest.mark.parametrize("family", SHORT)
def test_mixed_as_alone(family: str, opened: Callable[[str, list[Case]], Driven]) -> None:
    check(opened(family, [case for case in cases(family) if case.method in COVERING]), 10)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_delta_mixed_as_alone(family: str, opened: Callable[[str, list[Case]], Driven]) -> None:
    check(opened(family, cases(family)), 60)
