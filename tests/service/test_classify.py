"""Classify, against PEFT alone, and how scores are told."""

import math
from typing import Any

import pytest
import torch

from deltaserve_kernels.testing import error_ratio
from deltaserve_protos.v1 import inference_pb2 as pb

RAW, SOFTMAX, SIGMOID = pb.SCORES_AS_RAW, pb.SCORES_AS_SOFTMAX, pb.SCORES_AS_SIGMOID
SENTENCES = [pb.Input(text="the film was good"), pb.Input(text="bad food", text_pair="not a film")]


def scores(server: Any, delta: str, how: Any = pb.SCORES_AS_UNSPECIFIED) -> Any:
    return server("Classify", deltas=[delta], inputs=SENTENCES, scores_as=how)


def reference(server: Any, delta: str, auto: str, labels: int) -> list[torch.Tensor]:
    """PEFT's own scores for each of the sentences alone."""
    model = server.made.tuned(delta, auto, num_labels=labels)
    tokenizer = server.app.served.backbone.tokenizer
    with torch.no_grad():
        return [model(**tokenizer(one.text, one.text_pair or None, return_tensors="pt")).logits[0] for one in SENTENCES]


def test_scores_are_pefts(bert: Any) -> None:
    answer = scores(bert, "mood", RAW)
    wanted = reference(bert, "mood", "AutoModelForSequenceClassification", 3)
    for result, row in zip(answer.results, wanted, strict=True):
        assert error_ratio(torch.tensor(list(result.sequence.scores)), row) < 1e-5
        assert result.sequence.label == ["bad", "so-so", "good"][int(row.argmax())]
    assert list(answer.labels) == ["bad", "so-so", "good"]
    assert answer.delta == "mood@1" and answer.usage.input_tokens == 6 + 8


@pytest.mark.parametrize(
    ("delta", "asked", "told"),
    [
        ("mood", pb.SCORES_AS_UNSPECIFIED, SOFTMAX), ("stars", pb.SCORES_AS_UNSPECIFIED, RAW),
        ("topics", pb.SCORES_AS_UNSPECIFIED, SIGMOID), ("tags", pb.SCORES_AS_UNSPECIFIED, SOFTMAX),
        ("mood", SIGMOID, SIGMOID), ("topics", SOFTMAX, SOFTMAX), ("stars", SIGMOID, SIGMOID), ("mood", RAW, RAW),
    ],
)  # fmt: skip
def test_scores_as(bert: Any, delta: str, asked: Any, told: Any) -> None:
    answer, raw = scores(bert, delta, asked), scores(bert, delta, RAW)
    assert answer.scores_as == told

    def rows(result: pb.Classification) -> list[list[float]]:
        if result.HasField("sequence"):
            return [list(result.sequence.scores)]
        return [list(token.scores) for token in result.tokens.tokens]

    for one, other in zip(answer.results, raw.results, strict=True):
        for row, plain in zip(rows(one), rows(other), strict=True):
            logits = torch.tensor(plain)
            wanted = {RAW: logits, SOFTMAX: logits.softmax(0), SIGMOID: logits.sigmoid()}[told]
            assert error_ratio(torch.tensor(row), wanted) < 1e-5


def test_a_regression_has_no_label(bert: Any) -> None:
    answer = scores(bert, "stars")
    assert [len(result.sequence.scores) for result in answer.results] == [1, 1]
    assert {result.sequence.label for result in answer.results} == {""}


def test_tokens_know_where_they_stand(bert: Any) -> None:
    answer = scores(bert, "tags", RAW)
    wanted = reference(bert, "tags", "AutoModelForTokenClassification", 2)
    for given, result, rows in zip(SENTENCES, answer.results, wanted, strict=True):
        tokens = result.tokens.tokens
        assert error_ratio(torch.tensor([list(t.scores) for t in tokens]), rows) < 1e-5
        for token, row in zip(tokens, rows, strict=True):
            assert token.label == answer.labels[int(row.argmax())]
            special = token.token in ("[CLS]", "[SEP]")
            assert token.HasField("start") == token.HasField("end") == token.HasField("segment") == (not special)
            if not special:
                segment = given.text_pair if token.segment else given.text
                assert segment[token.start : token.end] == token.token
    assert [t.segment for t in answer.results[1].tokens.tokens] == [0, 0, 0, 0, 1, 1, 1, 0]


def test_ids_have_no_places(bert: Any) -> None:
    ids = pb.Input(ids=[1, 8, 6, 2], token_type_ids=[0, 0, 1, 1])
    (result,) = bert("Classify", deltas=["tags"], inputs=[ids]).results
    assert [t.id for t in result.tokens.tokens] == [1, 8, 6, 2]
    assert [t.token for t in result.tokens.tokens] == ["[CLS]", "the", "film", "[SEP]"]
    assert not any(t.HasField("start") or t.HasField("segment") for t in result.tokens.tokens)
    (other,) = bert("Classify", deltas=["tags"], inputs=[pb.Input(ids=[1, 8, 6, 2])]).results
    assert other != result  # segments count


def test_a_decoder_classifies_too(gpt2: Any) -> None:
    (answer,) = gpt2("Classify", deltas=["mood"], inputs=[pb.Input(text="abc")]).results
    assert math.isclose(sum(answer.sequence.scores), 1, rel_tol=1e-5)
    assert answer.sequence.label in {"LABEL_0", "LABEL_1", "LABEL_2"}


def test_long_inputs_lose_their_middle_tokens_not_their_special_ones(bert: Any) -> None:
    long = pb.Input(text="good " * 80)
    failure = bert.fails("Classify", deltas=["mood"], inputs=[long])
    assert failure.reason == "INPUT_TOO_LONG" and "82 tokens" in failure.message and "64" in failure.message
    answer = bert("Classify", deltas=["tags"], inputs=[long], truncate=pb.TRUNCATE_END).results[0]
    ids = [t.id for t in answer.tokens.tokens]
    assert len(ids) == 64 and ids[0] == 1 and ids[-1] == 2
