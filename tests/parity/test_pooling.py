"""A classifier that reads the mean of a text's rows, as ModernBERT's does where its config says so, equals PEFT's."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from driven import Driven, written
from families import FAMILIES, SPECIAL, VOCABULARY
from methods import cases
from reference import answer

from deltaserve.deltas.sites import Pooling
from deltaserve.engine.request import Job, Request
from deltaserve_kernels.testing import error_ratio

EXACT = 1e-5
MOVED = 1e-2
NAME = "modernbert-mean"
CLASSIFIERS = ("SEQ_CLS", "TOKEN_CLS")
TEXTS = (1, 4, 9, 17)
"""Lengths; a local layer reaches three rows to either side."""


def mean() -> Any:
    config = FAMILIES["modernbert"].config()
    config.classifier_pooling = "mean"
    return config


def test_means_in_a_mixed_batch_equal_pefts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, NAME, replace(FAMILIES["modernbert"], name=NAME, config=mean))
    models = written(NAME, [case for case in cases(NAME) if case.task in CLASSIFIERS], tmp_path)
    driven = Driven(tmp_path)
    try:
        asked, requests = [], []
        for case in models:
            driven.lower(case.name)
            for number, length in enumerate(TEXTS):
                random = torch.Generator().manual_seed(length)
                ids = torch.randint(SPECIAL, VOCABULARY, (length,), generator=random).tolist()
                asked.append((case, ids))
                name = f"{case.name}{number}"
                requests.append(Request(name, Job.CLASSIFY, tuple(ids), driven.ref(case.name)))
        answers = driven.answers(requests)
    finally:
        driven.stop()
    poolings = {driven.deltas[case.name].pooling for case in models}
    assert poolings == {Pooling.POOLER_MEAN, Pooling.POOLER_TOKENS}
    for (case, ids), ours in zip(asked, answers, strict=True):
        assert error_ratio(ours[1], answer(case, models[case], ids)[1]) <= EXACT, case.name
        if case.task == "SEQ_CLS" and len(ids) > 1:
            with monkeypatch.context() as other:
                other.setattr(models[case].config, "classifier_pooling", "cls")
                first = answer(case, models[case], ids)[1]
            assert error_ratio(ours[1], first) >= MOVED, "the first row would do as well"
