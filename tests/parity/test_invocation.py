"""Activated LoRA: whatever the place of the invocation and the job, each request gets what PEFT alone gives."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from driven import Driven, forced, greedy, written
from families import FAMILIES, VOCABULARY
from methods import INVOCATION, Case
from reference import NEW_TOKENS, Answer, answer, bare

from deltaserve.deltas.sites import Pooling
from deltaserve.engine.request import Job, Request, Sampling
from deltaserve_kernels.testing import error_ratio

EXACT, MOVED = 1e-5, 1e-2
LONG = tuple(11 + 5 * i % 70 for i in range(23))
HELD = {
    "start": (*INVOCATION, 9, 61, 22),
    "middle": (9, 61, *INVOCATION, 22, 8),
    "end": (9, 61, 22, *INVOCATION),
    "twice": (9, *INVOCATION, 61, *INVOCATION, 5, 8),
    "cut": (9, *INVOCATION, 61, 22, INVOCATION[0]),
    "alone": INVOCATION,
    "long": (*LONG, *INVOCATION, *LONG),
}
ABSENT = {"absent": (9, 61, 22, 8), "turned": (9, *INVOCATION[::-1], 22), "one": INVOCATION[:1], "late": LONG}
TEXTS = HELD | ABSENT
CONTINUATIONS = {"plain": (5, 44, 12), "invokes": (44, *INVOCATION, 12), "one": (8,)}
FULL = ("gpt2", "llama")
NAMES = [
    *FULL,
    *(
        pytest.param(family, marks=pytest.mark.long)
        for family, row in FAMILIES.items()
        if row.task == "CAUSAL_LM" and family not in FULL
    ),
]
CHUNKED = {"max_batch_tokens": 5}
Opened = tuple[Driven, Case, Any]
"""The engine, a case, and PEFT's model of it."""


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., Opened]]:
    started: list[Driven] = []

    def open_(family: str, method: str = "alora", **settings: Any) -> Opened:
        case, other = (Case(family, chosen, "CAUSAL_LM") for chosen in (method, "lora-all-linear"))
        models = written(family, [case, other], tmp_path)
        driven = Driven(tmp_path, **settings)
        started.append(driven)
        for each in (case, other):
            driven.lower(each.name)
        return driven, case, models[case]

    yield open_
    for driven in started:
        driven.stop()


def methods(family: str) -> tuple[str, ...]:
    """PEFT cannot run it at OPT's fc2."""
    return ("alora",) if family == "opt" else ("alora", "alora-lm-head")


def same(ours: Answer, reference: Answer) -> bool:
    return ours[0] == reference[0] and error_ratio(ours[1], reference[1]) <= EXACT


def beside(driven: Driven, count: int) -> list[Request]:
    """Requests of another delta and of the backbone, among which the others stand."""
    known = ({"delta": driven.ref("lora-all-linear.causal-lm")}, {})
    return [
        Request(f"b{i}", Job.GENERATE, LONG[: 3 + 2 * i], sampling=greedy(NEW_TOKENS), **known[i % 2])
        for i in range(count)
    ]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("family", NAMES)
def test_generate_whole_and_in_chunks(family: str, opened: Callable[..., Opened]) -> None:
    without: dict[str, Answer] = {}
    for method in methods(family):
        driven, case, model = opened(family, method)
        plain = bare(family, driven.folder / "backbone")
        without = without or {name: answer(case, plain, list(ids)) for name, ids in TEXTS.items()}
        references = {name: answer(case, model, list(ids)) for name, ids in TEXTS.items()}
        moved = {name for name in TEXTS if error_ratio(references[name][1], without[name][1]) >= MOVED}
        assert moved == set(HELD), method
        for one in (driven, opened(family, method, **CHUNKED)[0]):
            asked = [
                Request(name, Job.GENERATE, ids, one.ref(case.name), sampling=greedy(NEW_TOKENS))
                for name, ids in TEXTS.items()
            ]
            ours = one.answers([*beside(one, 4), *asked], [0, 1, 2, 3, *range(len(asked))])[4:]
            for name, mine in zip(TEXTS, ours, strict=True):
                assert same(mine, references[name]), f"{method} {name}"


@pytest.mark.parametrize("family", NAMES)
def test_score_is_the_forward_of_input_and_continuation(family: str, opened: Callable[..., Opened]) -> None:
    for method in methods(family):
        driven, case, model = opened(family, method)
        pairs = [(ids, given) for ids in TEXTS.values() for given in CONTINUATIONS.values()]
        asked = [
            Request(f"s{i}", Job.SCORE, ids, driven.ref(case.name), continuation=given, score_logprobs=VOCABULARY)
            for i, (ids, given) in enumerate(pairs)
        ]
        for (ids, given), mine in zip(pairs, driven.answers([*asked, *beside(driven, 2)])[:-2], strict=True):
            reference = forced(case, model, list(ids), list(given))
            assert error_ratio(mine[1], reference) <= EXACT, f"{method} {ids} {given}"


def test_invocation_that_ends_a_continuation(opened: Callable[..., Opened]) -> None:
    """Its last token is no row of ours, and PEFT's forward of the whole has seen it."""
    driven, case, model = opened("llama", "alora-lm-head")
    ids, given = (9, *INVOCATION, 61), (22, *INVOCATION)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*ids, *given]])).logits[0, len(ids) - 1 : -1]
    request = Request("s", Job.SCORE, ids, driven.ref(case.name), continuation=given, score_logprobs=VOCABULARY)
    assert error_ratio(driven.answers([request])[0][1], torch.log_softmax(logits, -1)) <= EXACT


@pytest.mark.parametrize("family", NAMES)
def test_prompt_logprobs_and_vectors(family: str, opened: Callable[..., Opened]) -> None:
    driven, case, model = opened(family, methods(family)[-1])
    ref = driven.ref(case.name)
    for name, ids in TEXTS.items():
        with torch.no_grad():
            out = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        rows = out.hidden_states[-1][0]
        for pooling, expected in ((Pooling.MEAN, rows.mean(0)), (Pooling.CLS, rows[0]), (Pooling.LAST, rows[-1])):
            mine = driven.answers([Request(name, Job.EMBED, ids, ref, pooling=pooling)])[0][1]
            assert error_ratio(mine, expected.unsqueeze(0)) <= EXACT, f"{name} {pooling}"
        sampling = Sampling(max_new_tokens=1, prompt_logprobs=VOCABULARY, logprobs=VOCABULARY)
        mine = driven.answers([Request(name, Job.GENERATE, ids, ref, sampling=sampling)])[0][1]
        assert error_ratio(mine, torch.log_softmax(out.logits[0], -1)) <= EXACT, name
