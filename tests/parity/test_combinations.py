"""Several deltas on one request give what transformers' own model gives with each of them applied by hand, in order.

All combinations of a family, their members and the bare backbone are in one mixed batch.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import byadapter
import peft
import pytest
import torch
from byhand import ByHand, written
from driven import Driven, greedy
from families import FAMILIES, SPECIAL, VOCABULARY, Family
from methods import Case
from reference import backbone

from deltaserve.deltas.compose import Member, compose
from deltaserve.deltas.sites import Pooling
from deltaserve.engine.request import Job, Request
from deltaserve_kernels.testing import error_ratio

EXACT, MOVED = 1e-5, 1e-3
TOKENS = 6
Members = tuple[tuple[str, float], ...]


def _lora(**told: Any) -> Callable[[Family], Any]:
    chosen = {"r": 4, "lora_alpha": 6} | told
    return lambda f: peft.LoraConfig(target_modules=list(f.linears[:2]), **chosen)


MEMBERS: Mapping[str, Callable[[Family], Any]] = {
    "lora": _lora(),
    "lora-2": lambda f: peft.LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=list(f.linears)),
    "bitfit": _lora(bias="all", r=1),
    "dora": _lora(use_dora=True),
    "ia3": lambda f: peft.IA3Config(target_modules=list(f.ia3[0]), feedforward_modules=list(f.ia3[1])),
    "ia3-2": lambda f: peft.IA3Config(target_modules=list(f.linears), feedforward_modules=[]),
    "prefix": lambda f: peft.PrefixTuningConfig(num_virtual_tokens=4, **f.prefix),
    "prefix-2": lambda f: peft.PrefixTuningConfig(num_virtual_tokens=3, **f.prefix),
    "prompt": lambda f: peft.PromptTuningConfig(num_virtual_tokens=5),
    "prompt-2": lambda f: peft.PromptTuningConfig(num_virtual_tokens=2),
    "norms": lambda f: peft.LNTuningConfig(target_modules=f.norms),
    "oft": lambda f: peft.OFTConfig(target_modules=list(f.linears[:2]), oft_block_size=8, r=0),
    "oft-2": lambda f: peft.OFTConfig(target_modules=list(f.linears[:1]), oft_block_size=8, r=0),
}
NOT_IN: Mapping[str, tuple[str, ...]] = {"gpt2": ("oft", "oft-2"), "t5": ("bitfit",)}
"""PEFT cannot, or the family has no biases."""
HEADED = "lora-head"

COMBINATIONS: tuple[Members, ...] = (
    (("lora", 1.0), ("lora-2", 1.0)),
    (("lora", 0.5), ("lora-2", -0.75)),
    (("lora", 2.5),),
    (("lora", 1.0), ("ia3", 1.0)),
    (("ia3", 1.0), ("ia3-2", 1.0)),
    (("dora", 1.0), ("lora-2", 1.0)),
    (("bitfit", 1.0), ("ia3-2", 1.0)),
    (("ia3-2", 1.0), ("bitfit", 1.0)),
    (("bitfit", 0.5), ("dora", 1.0), ("lora-2", 1.0)),
    (("prefix", 1.0), ("lora", 1.0)),
    (("prefix", 1.0), ("prefix-2", 1.0)),
    (("prefix-2", 1.0), ("norms", 1.0), ("ia3", 1.0), ("lora-2", 1.0)),
    (("prompt", 1.0), ("lora", 1.0), ("ia3", 1.0)),
    (("prompt-2", 1.0), ("prompt", 1.0)),
    (("prompt", 1.0), ("prefix", 1.0), ("norms", 1.0)),
    (("oft", 1.0), ("lora-2", 1.0)),
    (("lora-2", 1.0), ("oft-2", 1.0), ("oft", 1.0), ("ia3-2", 1.0)),
    (("lora", 1.0), ("pfeiffer", 1.0), ("prefix", 1.0)),
    (("houlsby", 1.0), ("pfeiffer", 1.0)),
    (("pfeiffer", 1.0), ("parallel", 1.0), ("houlsby", 1.0)),
    (("parallel", 1.0), ("ia3", 1.0), ("lora-2", 1.0)),
    (("pfeiffer", -0.5), ("houlsby", 0.5), ("lora", 1.0)),
    (("prompt", 1.0), ("houlsby", 1.0), ("bitfit", 1.0)),
    (("pfeiffer", 1.0), ("norms", 1.0)),
    (("lora", 1.0), ("lora-2", -1.0), ("ia3", 1.0), ("norms", 1.0), ("prefix", 1.0), ("prompt", 1.0)),
)
WITH_HEAD: tuple[Members, ...] = (
    ((HEADED, 1.0), ("ia3", 1.0)),
    (("prompt", 1.0), ("lora-2", -0.5), (HEADED, 2.0)),
    (("prefix", 1.0), (HEADED, 1.0), ("norms", 1.0)),
    (("pfeiffer", 1.0), (HEADED, 1.0), ("houlsby", 1.0)),
)


def label(members: Members) -> str:
    return "+".join(name if weight == 1.0 else f"{weight:g}*{name}" for name, weight in members)


class Combined:
    """A family's checkpoints, its combinations on an engine, and its model with them by hand."""

    def __init__(self, family: str, folder: Path) -> None:
        self.family = FAMILIES[family]
        self.folder = folder
        self.case = Case(family, "combination", self.family.task)
        self.headed = Case(family, "combination", "SEQ_CLS")
        backbone(self.family, folder / "backbone")
        names = [name for name in MEMBERS if name not in NOT_IN.get(family, ())]
        for name in names:
            config = MEMBERS[name](self.family)
            config.task_type = self.case.task
            written(name, self.case, config, folder)
        for name in byadapter.CONFIGS:
            byadapter.written(name, family, 32, folder)
        names += byadapter.CONFIGS
        self.combinations = [each for each in COMBINATIONS if all(name in names for name, _ in each)]
        if family == "bert":
            written(HEADED, self.headed, _lora(task_type="SEQ_CLS")(self.family), folder)
            self.combinations += WITH_HEAD
        self.driven = Driven(folder)
        self._models: dict[Members, ByHand] = {}
        for name in dict.fromkeys(name for each in self.combinations for name, _ in each):
            self.driven.lower(name)
        for each in self.combinations:
            made = compose([Member(name, self.driven.deltas[name], weight) for name, weight in each])
            self.driven.publish(label(each), made)

    def request(self, name: str | None, number: int, members: Members) -> Request:
        random = torch.Generator().manual_seed(number)
        length = int(torch.randint(3, 12, (), generator=random))
        ids = tuple(torch.randint(SPECIAL, VOCABULARY, (length,), generator=random).tolist())
        known = {"id": f"{number} {name}", "ids": ids, "delta": self.driven.ref(name)}
        if self.task(members) == "SEQ_CLS":
            return Request(job=Job.CLASSIFY, **known)
        if self.family.task == "FEATURE_EXTRACTION":
            return Request(job=Job.EMBED, pooling=Pooling.MEAN, **known)
        return Request(job=Job.GENERATE, sampling=greedy(TOKENS), **known)

    def task(self, members: Members) -> str:
        return "SEQ_CLS" if any(name == HEADED for name, _ in members) else self.case.task

    def by_hand(self, members: Members) -> ByHand:
        if members not in self._models:
            case = self.headed if self.task(members) == "SEQ_CLS" else self.case
            self._models[members] = ByHand(case, self.folder, members)
        return self._models[members]


@pytest.fixture(scope="module")
def combined(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Combined]]:
    made: list[Combined] = []

    @functools.cache
    def make(family: str) -> Combined:
        made.append(Combined(family, tmp_path_factory.mktemp(family)))
        return made[-1]

    yield make
    for each in made:
        each.driven.stop()


def differ(ours: tuple[list[int], torch.Tensor], reference: ByHand, ids: list[int]) -> float:
    """Error ratio; infinite where the reference would have chosen another token."""
    tokens, rows = ours
    if not tokens:
        return error_ratio(rows, reference.rows(ids))
    want = reference.logprobs(ids, tokens)
    return error_ratio(rows, want) if want.argmax(-1).tolist() == tokens else float("inf")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_a_mixed_batch_of_combinations_equals_members_applied_by_hand(family, combined):
    made = combined(family)
    alone: list[Members] = [((name, 1.0),) for name in made.driven.deltas if "+" not in name and "*" not in name]
    asked: list[Members] = [each for members in (*made.combinations, *alone, ()) for each in (members, members)]
    requests = [made.request(label(each) or None, number, each) for number, each in enumerate(asked)]
    answers = made.driven.answers(requests, [number % 5 for number in range(len(requests))])
    ratios: dict[str, float] = {}
    for members, request, ours in zip(asked, requests, answers, strict=True):
        ratio = differ(ours, made.by_hand(members), list(request.ids))
        ratios[label(members)] = max(ratio, ratios.get(label(members), 0.0))
    assert not {name: ratio for name, ratio in ratios.items() if not ratio <= EXACT}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_each_member_of_each_combination_moves_it(family, combined):
    made = combined(family)
    ids, tokens = [9, 30, 7, 61, 22], [5, 44, 12]

    def said(members: Members) -> torch.Tensor:
        model = made.by_hand(members)
        if made.family.task == "FEATURE_EXTRACTION":
            return model.rows(ids)
        return model.logprobs(ids, tokens)

    for members in made.combinations:
        whole = said(members)
        for left in range(len(members)):
            rest = members[:left] + members[left + 1 :]
            if made.task(rest) == made.task(members):
                assert error_ratio(said(rest), whole) > MOVED, (label(members), members[left])


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_combinations_of_one_at_a_time_equal_those_of_a_batch(family, combined):
    made = combined(family)
    for number, members in enumerate(made.combinations):
        request = made.request(label(members), number, members)
        (alone,) = made.driven.answers([request])
        assert differ(alone, made.by_hand(members), list(request.ids)) <= EXACT, label(members)
