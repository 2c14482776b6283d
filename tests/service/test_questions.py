"""Question answering: the head's outputs are PEFT's, and the spans those that they speak for."""

import math
from typing import Any

import pytest
import torch

from deltaserve_kernels.testing import error_ratio
from deltaserve_protos.v1 import deltas_pb2 as dp
from deltaserve_protos.v1 import inference_pb2 as pb

EXACT = 1e-5
ASKED = pb.Input(text="was the film good", text_pair="the food was not very good, the film is a bad film")
OTHER = pb.Input(text="is a food bad", text_pair="very bad")


def logits(server: Any, given: pb.Input) -> torch.Tensor:
    """PEFT's own [2, tokens]."""
    model = server.made.tuned("where", "AutoModelForQuestionAnswering")
    tokenizer = server.app.served.backbone.tokenizer
    with torch.no_grad():
        told = model(**tokenizer(given.text, given.text_pair or None, return_tensors="pt"))
    return torch.stack((told.start_logits[0], told.end_logits[0]))


def likeliest(rows: torch.Tensor, context: list[bool], longest: int, count: int) -> list[tuple[float, int, int]]:
    """(score, start, end), as transformers 4's pipeline finds them: [CLS], the first token, shares in the softmax."""
    kept = torch.tensor(context)
    kept[0] = True
    starts, ends = (torch.where(kept, row.double(), -1e4).softmax(0) for row in rows)
    products = torch.outer(starts, ends).triu().tril(longest - 1)
    kept[0] = False
    products = products * kept.unsqueeze(0) * kept.unsqueeze(1)
    scores, places = products.flatten().topk(count)
    return [(float(s), int(p) // len(context), int(p) % len(context)) for s, p in zip(scores, places, strict=True)]


def test_a_question_is_answered_from_its_context(bert: Any) -> None:
    answer = bert("Classify", deltas=["where"], inputs=[ASKED, OTHER], top_k=5, max_answer_tokens=3)
    assert answer.scores_as == pb.SCORES_AS_SOFTMAX and not answer.labels and answer.delta == "where@1"
    tokenizer = bert.app.served.backbone.tokenizer
    for given, result in zip([ASKED, OTHER], answer.results, strict=True):
        ours, wanted = result.spans, logits(bert, given)
        rows = torch.tensor([list(ours.start_logits), list(ours.end_logits)])
        assert error_ratio(rows, wanted) < EXACT
        context = [source == 1 for source in tokenizer(given.text, given.text_pair).sequence_ids()]
        theirs = likeliest(wanted, context, 3, len(ours.spans))
        assert [(one.start_token, one.end_token) for one in ours.spans] == [(i, j) for _, i, j in theirs]
        for one, (score, _, _) in zip(ours.spans, theirs, strict=True):
            assert math.isclose(one.score, score, rel_tol=1e-4)
            assert one.segment == 1 and one.text == given.text_pair[one.start : one.end]
            assert one.text.split()[0] in given.text_pair and one.end > one.start
    assert [len(result.spans.spans) for result in answer.results] == [5, 3]  # two tokens are three spans


def test_what_is_left_out(bert: Any) -> None:
    """One span, of 15 tokens at most."""
    (one,) = bert("Classify", deltas=["where"], inputs=[ASKED]).results
    (all_,) = bert("Classify", deltas=["where"], inputs=[ASKED], top_k=64, max_answer_tokens=15).results
    assert list(one.spans.spans) == [all_.spans.spans[0]]
    tokens = len(one.spans.start_logits)
    context = [place >= 6 for place in range(tokens - 1)] + [False]
    assert all_.spans.spans[0].start_token == likeliest(logits(bert, ASKED), context, 15, 1)[0][1]
    (long,) = bert("Classify", deltas=["where"], inputs=[ASKED], top_k=64, max_answer_tokens=512).results
    assert max(s.end_token - s.start_token for s in all_.spans.spans) <= 14
    assert long.spans.start_logits == one.spans.start_logits


def test_raw_scores_are_sums(bert: Any) -> None:
    answer = bert("Classify", deltas=["where"], inputs=[ASKED], top_k=4, scores_as=pb.SCORES_AS_RAW)
    assert answer.scores_as == pb.SCORES_AS_RAW
    told = answer.results[0].spans
    for one in told.spans:
        wanted = told.start_logits[one.start_token] + told.end_logits[one.end_token]
        assert math.isclose(one.score, wanted, rel_tol=1e-5)
    assert [one.score for one in told.spans] == sorted((one.score for one in told.spans), reverse=True)
    likely = bert("Classify", deltas=["where"], inputs=[ASKED], top_k=4).results[0].spans
    assert [one.start_token for one in likely.spans] == [one.start_token for one in told.spans]


def test_ids_have_no_places(bert: Any) -> None:
    given = pb.Input(ids=[1, 8, 6, 2, 9, 7, 2], token_type_ids=[0, 0, 0, 0, 1, 1, 1])
    (result,) = bert("Classify", deltas=["where"], inputs=[given], top_k=64).results
    assert {one.start_token for one in result.spans.spans} == {4, 5, 6}
    assert not any(one.HasField("start") or one.HasField("segment") for one in result.spans.spans)
    assert {one.text for one in result.spans.spans} >= {"a", "food", "a food"}
    (whole,) = bert("Classify", deltas=["where"], inputs=[pb.Input(ids=[8, 6, 9])], top_k=64).results
    assert len(whole.spans.spans) == 6


def test_without_a_context_the_text_is_one(bert: Any) -> None:
    (result,) = bert("Classify", deltas=["where"], inputs=[pb.Input(text="bad film")], top_k=64).results
    found = {(one.start_token, one.end_token): (one.text, one.segment) for one in result.spans.spans}
    assert found == {(1, 1): ("bad", 0), (1, 2): ("bad film", 0), (2, 2): ("film", 0)}


def test_a_context_without_tokens_has_no_answer(bert: Any) -> None:
    (result,) = bert("Classify", deltas=["where"], inputs=[pb.Input(text="bad film", text_pair="")]).results
    assert not result.spans.spans and len(result.spans.start_logits) == 4


def test_a_decoder_answers_too(gpt2: Any) -> None:
    gpt2.made.delta("where", 8, gpt2.made.lora(task_type="QUESTION_ANS"), "AutoModelForQuestionAnswering")
    assert gpt2.load("where").task == dp.TASK_QUESTION_ANSWERING
    answer = gpt2("Classify", deltas=["where"], inputs=[pb.Input(text="ab", text_pair="cdé")], top_k=64)
    (result,) = answer.results
    model = gpt2.made.tuned("where", "AutoModelForQuestionAnswering")
    ids = gpt2.app.served.backbone.tokenizer("ab", "cdé")["input_ids"]
    with torch.no_grad():
        told = model(input_ids=torch.tensor([ids]))
    assert error_ratio(torch.tensor(list(result.spans.start_logits)), told.start_logits[0]) < EXACT
    assert error_ratio(torch.tensor(list(result.spans.end_logits)), told.end_logits[0]) < EXACT
    assert {one.segment for one in result.spans.spans} == {1} and len(result.spans.spans) == 10
    whole = next(one for one in result.spans.spans if (one.start_token, one.end_token) == (2, 5))
    assert whole.text == "cdé"
    # It has no classification token: what a span may be of shares all of the probability.
    starts, ends = (
        torch.tensor(list(row))[2:].softmax(0) for row in (result.spans.start_logits, result.spans.end_logits)
    )
    assert math.isclose(whole.score, float(starts[0] * ends[-1]), rel_tol=1e-4)


@pytest.mark.parametrize("truncate", [pb.TRUNCATE_START, pb.TRUNCATE_END])
def test_a_long_context_is_cut(bert: Any, truncate: Any) -> None:
    given = pb.Input(text="is the film good", text_pair="very " * 80 + "bad")
    (result,) = bert("Classify", deltas=["where"], inputs=[given], truncate=truncate, top_k=64).results
    assert len(result.spans.start_logits) == 64
    assert all(one.text == given.text_pair[one.start : one.end] for one in result.spans.spans)


def test_what_is_told_of_it(bert: Any) -> None:
    delta = bert("GetDelta", name="where").delta
    assert delta.task == dp.TASK_QUESTION_ANSWERING and "head" in delta.kinds
    assert not delta.labels and not delta.problem_type and not delta.guessed


def test_segments_count_where_they_were_trained(bert: Any) -> None:
    """PEFT's model for this task keeps them from the backbone; without a task_type it has no such model."""
    config = bert.made.lora(task_type=None, modules_to_save=["qa_outputs"])
    bert.made.delta("segments", 6, config, "AutoModelForQuestionAnswering")
    bert.load("segments", task=dp.TASK_QUESTION_ANSWERING)
    for name, count in (("segments", True), ("where", False)):
        flat, real = (
            bert("Classify", deltas=[name], inputs=[pb.Input(ids=[1, 8, 2, 9, 2], token_type_ids=types)]).results[0]
            for types in ([0] * 5, [0, 0, 0, 1, 1])
        )
        assert (flat.spans.start_logits != real.spans.start_logits) == count
    model = bert.made.tuned("segments", "AutoModelForQuestionAnswering")
    with torch.no_grad():
        told = model(input_ids=torch.tensor([[1, 8, 2, 9, 2]]), token_type_ids=torch.tensor([[0, 0, 0, 1, 1]]))
    given = pb.Input(ids=[1, 8, 2, 9, 2], token_type_ids=[0, 0, 0, 1, 1])
    (ours,) = bert("Classify", deltas=["segments"], inputs=[given]).results
    assert error_ratio(torch.tensor(list(ours.spans.end_logits)), told.end_logits[0]) < EXACT
    bert("UnloadDelta", name="segments")
    assert bert.load("segments").guessed[0] == "task"  # qa_outputs is nothing else
