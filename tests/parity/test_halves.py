"""bfloat16: what PEFT computes over a bfloat16 backbone, to the roundings of 8 bits.

Tokens are compared up to the first step whose two best lie closer than four times the error measured there: from then
on the texts may rightly differ. A tiny random model can be worse conditioned than trained ones: where PEFT's own
bfloat16 is further from its float32 than half the tolerance, that spread is what ours is measured by. Ours and PEFT's
round in different places, so that their difference is that of two such errors; twice the spread is allowed.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from driven import Driven, forced, greedy, written
from families import FAMILIES, SPECIAL, VOCABULARY
from methods import HEADS, Case, cases
from reference import NEW_TOKENS, Answer, answer, inputs, tuned

from deltaserve.deltas.sites import Pooling
from deltaserve.engine.request import Job, Request
from deltaserve_kernels.testing import error_ratio

TOLERANCE = 2e-2
SPREADS = 2.0
MARGINS = 4.0
TEXTS = (3, 5, 8, 11, 13, 17, 19, 23)

COVERING = ("lora-patterns", "lora-bias-all", "dora", "pissa", "ia3", "prefix", "prompt", "ln-tuning", "lora-tokens")
COVERING += ("fourierft", "oft", "road-2", "shira", "lora-saved-head", "lora-embedding")
SHORT = ("t5", "bert", "llama")


UNLIKE = ("supertuning-chosen-again", "lora-tied", "dora-tied")
"""PEFT finds the first one's places in the rounded weights, whose order is another. And when it widens a 16-bit
backbone's LoRA it parts what was tied: both are saved, with numbers of their own, and a server refuses that by name.
"""


def chosen(family: str, few: bool) -> list[Case]:
    wanted = [case for case in cases(family) if not few or case.method in COVERING]
    return [case for case in wanted if case.method not in UNLIKE]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., tuple[Driven, Mapping[Case, Any]]]]:
    """`opened("t5", cases)`: an engine in bfloat16 with their deltas, and PEFT's models in bfloat16."""
    started: list[Driven] = []

    def open_(family: str, found: list[Case]) -> tuple[Driven, Mapping[Case, Any]]:
        models = written(family, found, tmp_path, torch.bfloat16)
        driven = Driven(tmp_path, "bfloat16")
        started.append(driven)
        for case in found:
            driven.lower(case.name, case.wanted)
        return driven, models

    yield open_
    for driven in started:
        driven.stop()


def texts(case: Case) -> list[list[int]]:
    """More of them for heads: a row of three scores may nearly vanish, so all of a delta's count as one."""
    if case.task not in HEADS:
        return inputs(case)
    random = torch.Generator().manual_seed(sum(map(ord, case.name)))
    return [torch.randint(SPECIAL, VOCABULARY, (n,), generator=random).tolist() for n in TEXTS]


def asked(case: Case, number: int, ids: list[int], driven: Driven) -> Request:
    known = {"id": f"{case.name}{number}", "ids": tuple(ids), "delta": driven.ref(case.name)}
    if case.task in HEADS:
        return Request(job=Job.CLASSIFY, **known)
    if case.task == "FEATURE_EXTRACTION":
        return Request(job=Job.EMBED, pooling=Pooling.MEAN, **known)
    return Request(job=Job.GENERATE, sampling=greedy(NEW_TOKENS), **known)


def compared(ours: Answer, reference: Answer) -> int:
    """How many rows have a common past. Fails where tokens differ that a rounding cannot have swapped."""
    for step, (mine, theirs) in enumerate(zip(ours[0], reference[0], strict=True)):
        best = reference[1][step].topk(2).values
        error = (ours[1][step] - reference[1][step]).abs().max()
        if best[0] - best[1] < MARGINS * error:
            return step + 1
        assert mine == theirs, f"step {step}: {mine}, not {theirs}"
    return len(reference[1])


def ratios(case: Case, ours: list[Answer], references: list[Answer], exact: Any) -> tuple[float, float]:
    """Error ratio of ours to PEFT's, and of PEFT's to float32's."""
    rows = []
    for ids, mine, theirs in zip(texts(case), ours, references, strict=True):
        count = compared(mine, theirs)
        wide = forced(case, exact, ids, theirs[0])
        rows.append((mine[1][:count], theirs[1][:count], theirs[1], wide))
    mine, theirs, whole, wide = (torch.cat(parts) for parts in zip(*rows, strict=True))
    if case.task in HEADS:
        mine, theirs, whole, wide = (part.flatten() for part in (mine, theirs, whole, wide))
    return error_ratio(mine, theirs), error_ratio(whole, wide)


def check(family: str, found: list[Case], opened: Any) -> None:
    driven, models = opened(family, found)
    requests = {case: [asked(case, n, ids, driven) for n, ids in enumerate(texts(case))] for case in found}
    together = iter(driven.answers([one for some in requests.values() for one in some]))
    off, strict = [], 0
    for case, some in requests.items():
        ours = [next(together) for _ in some]
        references = [answer(case, models[case], ids) for ids in texts(case)]
        error, spread = ratios(case, ours, references, tuned(case, driven.folder / "backbone"))
        strict += error <= TOLERANCE
        if not error <= max(TOLERANCE, SPREADS * spread):
            off.append(f"{case.name}: {error:.1e}, PEFT's own spread {spread:.1e}")
    assert not off, "; ".join(off)
    assert strict >= 0.6 * len(found), "the tolerance that knows no spread holds for most"
    assert driven.checksum() == driven.before


@pytest.mark.parametrize("family", SHORT)
def test_half_precision_equals_pefts(family: str, opened: Any) -> None:
    check(family, chosen(family, few=True), opened)


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_delta_in_half_precision(family: str, opened: Any) -> None:
    check(family, chosen(family, few=False), opened)
