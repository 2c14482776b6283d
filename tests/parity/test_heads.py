"""Heads of every task and width in one forward: choices, spans, tokens, sequences, and vectors without a head."""

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from driven import Driven, written
from families import FAMILIES, SPECIAL, VOCABULARY
from methods import HEADS, NO_HEAD, Case
from methods import cases as every
from reference import Answer, answer, backbone, drawn, inputs

from deltaserve.deltas.sites import Pooling, Task
from deltaserve.engine.request import Job, Request
from deltaserve.errors import BadCheckpoint
from deltaserve.formats.wanted import Wanted
from deltaserve_kernels.testing import error_ratio

EXACT = 1e-5
MOVED = 1e-2
CHOOSING: Mapping[str, Any] = {
    "lora": lambda family: peft.LoraConfig(
        r=4, target_modules=list(family.linears[:2]), modules_to_save=["classifier"]
    ),
    "lora-pooler": lambda family: peft.LoraConfig(r=3, target_modules=["dense"], modules_to_save=["classifier"]),
    "ia3": lambda family: peft.IA3Config(
        target_modules=list(family.ia3[0]), feedforward_modules=list(family.ia3[1]), modules_to_save=["classifier"]
    ),
    "oft": lambda family: peft.OFTConfig(
        oft_block_size=8, r=0, target_modules=list(family.linears[:2]), modules_to_save=["classifier"]
    ),
}
"""PEFT has no task_type for it, and no prompt without one."""
CHOICES = 4


def rows(seed: int) -> list[list[int]]:
    """The choices of one input, of several lengths."""
    random = torch.Generator().manual_seed(seed)
    return [
        torch.randint(SPECIAL, VOCABULARY, (int(n),), generator=random).tolist()
        for n in torch.randint(3, 15, (CHOICES,), generator=random)
    ]


class Choosing:
    """A delta for multiple choice that PEFT wrote; what PEFT says of choices, and the backbone with the same head."""

    def __init__(self, family: str, method: str, folder: Path) -> None:
        self.name = f"choosing-{method}"
        auto = transformers.AutoModelForMultipleChoice
        self._plain = auto.from_pretrained(folder / "backbone", attn_implementation="eager", dtype=torch.float32).eval()
        model = auto.from_pretrained(folder / "backbone", attn_implementation="eager", dtype=torch.float32)
        self._tuned: Any = peft.get_peft_model(model, CHOOSING[method](FAMILIES[family]))
        drawn(self._tuned, sum(map(ord, self.name)), trainable=True)
        self._tuned.eval().save_pretrained(folder / self.name)
        head = self._tuned.base_model.model.classifier.modules_to_save["default"]
        self._plain.classifier.load_state_dict(head.state_dict())

    def scores(self, rows: list[list[int]], tuned: bool = True) -> torch.Tensor:
        """[choices, 1], each row alone: nothing is padded."""
        model = self._tuned if tuned else self._plain
        with torch.no_grad():
            return torch.cat([model(input_ids=torch.tensor([[row]])).logits for row in rows])


@pytest.fixture
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_multiple_choice_among_all_other_heads(family: str, tmp_path: Path) -> None:
    tasks = (*HEADS, "FEATURE_EXTRACTION")
    cases = [case for case in every(family) if case.method in ("lora", "prefix", "prompt") and case.task in tasks]
    models = written(family, cases, tmp_path)
    choosing = [Choosing(family, method, tmp_path) for method in CHOOSING]
    driven = Driven(tmp_path)
    try:
        for case in cases:
            driven.lower(case.name)
        for one in choosing:
            driven.lower(one.name, Wanted(task=Task.MULTIPLE_CHOICE))
            assert driven.deltas[one.name].labels == () and driven.deltas[one.name].head is not None
        asked = {one: rows(n) for n, one in enumerate(choosing)}
        requests = [request(case, n, ids, driven) for case in cases for n, ids in enumerate(inputs(case))]
        requests += [
            Request(id=f"{one.name}/{n}", job=Job.CLASSIFY, ids=tuple(row), delta=driven.ref(one.name))
            for one, own in asked.items()
            for n, row in enumerate(own)
        ]
        ours = driven.answers(requests)
        steps = driven.engine.stats(steps=True).steps
        assert max(step.sequences for step in steps) == len(requests), "one forward held all of them"
        at = 0
        for case in cases:
            for ids in inputs(case):
                assert error_ratio(ours[at][1], answer(case, models[case], ids)[1]) <= EXACT, case.name
                at += 1
        for one, own in asked.items():
            theirs = one.scores(own)
            assert error_ratio(theirs, one.scores(own, tuned=False)) >= MOVED, one.name
            mine = torch.cat([scores for _, scores in ours[at : at + CHOICES]])
            assert mine.shape == theirs.shape == (CHOICES, 1)
            assert error_ratio(mine.T, theirs.T) <= EXACT, one.name
            at += CHOICES
            alone = driven.answers(requests[at - CHOICES : at - CHOICES + 1])[0][1]
            assert error_ratio(alone.T, theirs[:1].T) <= EXACT, one.name
        assert at == len(ours) and driven.checksum() == driven.before
    finally:
        driven.stop()


def request(case: Case, number: int, ids: list[int], driven: Driven) -> Request:
    known = {"id": f"{case.name}/{number}", "ids": tuple(ids), "delta": driven.ref(case.name)}
    if case.task in HEADS:
        return Request(job=Job.CLASSIFY, **known)
    return Request(job=Job.EMBED, pooling=Pooling.MEAN, **known)


@pytest.mark.usefixtures("quiet")
def test_spans_of_modernbert(tmp_path: Path) -> None:
    """Its class calls the head `classifier`: PEFT saves it if it is told to, and says nothing if it is not."""
    backbone(FAMILIES["modernbert"], tmp_path / "backbone")
    driven, text = Driven(tmp_path), [9, 30, 7, 61, 22]
    try:
        for saved in (["classifier"], None):
            auto = transformers.AutoModelForQuestionAnswering
            model = auto.from_pretrained(tmp_path / "backbone", dtype=torch.float32, attn_implementation="eager")
            config = peft.LoraConfig(r=4, target_modules=["Wqkv"], task_type="QUESTION_ANS", modules_to_save=saved)
            tuned: Any = peft.get_peft_model(model, config)
            drawn(tuned, 3, trainable=True)
            tuned.eval().save_pretrained(tmp_path / "where")
            if saved is None:
                with pytest.raises(BadCheckpoint, match="no tensors of its head 'classifier'"):
                    driven.lower("where")
                continue
            driven.lower("where")
            with torch.no_grad():
                told = tuned(input_ids=torch.tensor([text]))
            ((_, mine),) = driven.answers(
                [Request(id="where", job=Job.CLASSIFY, ids=tuple(text), delta=driven.ref("where"))]
            )
            assert error_ratio(mine.T, torch.stack((told.start_logits[0], told.end_logits[0]))) <= EXACT
    finally:
        driven.stop()


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "opt"])
def test_spans_of_decoders_by_what_their_class_calls_the_base_model(family: str, tmp_path: Path) -> None:
    """Of some `transformer` and not `model`: in names of tensors, and in a pattern that names it."""
    assert family not in NO_HEAD["QUESTION_ANS"]
    cases = [Case(family, method, "QUESTION_ANS") for method in ("lora", "ln-tuning", "lora-saved-embedding", "prompt")]
    models = written(family, cases, tmp_path)
    own = next(name for name, _ in models[cases[0]].base_model.model.named_modules() if "layers.1." in name).split(".")[
        0
    ]
    assert own == {"opt": "model", "mistral": "model"}.get(family, "transformer")
    driven = Driven(tmp_path)
    try:
        for case in cases:
            driven.lower(case.name)
            told = driven.deltas[case.name].provenance.warnings
            assert any("random numbers" in one for one in told) == (own == "transformer")
        wanted: dict[str, Answer] = {}
        requests = []
        for case in cases:
            for n, ids in enumerate(inputs(case)):
                requests.append(request(case, n, ids, driven))
                wanted[requests[-1].id] = answer(case, models[case], ids)
        for one, (_, mine) in zip(requests, driven.answers(requests), strict=True):
            assert error_ratio(mine, wanted[one.id][1]) <= EXACT, one.id
        _named_by_pattern(family, own, tmp_path, driven)
    finally:
        driven.stop()


def _named_by_pattern(family: str, own: str, folder: Path, driven: Driven) -> None:
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(folder / "backbone", dtype=torch.float32)
    middle = "decoder." if family == "opt" else ""
    pattern = rf"{own}\.{middle}layers\.1\.self_attn\.q_proj"
    tuned: Any = peft.get_peft_model(model, peft.LoraConfig(target_modules=pattern, task_type="QUESTION_ANS"))
    tuned.save_pretrained(folder / "pattern")
    driven.lower("pattern")
    assert set(driven.deltas["pattern"].at) == {f"model.{middle}layers.1.self_attn.q_proj"}
