"""Embed and Score, against transformers and PEFT alone."""

import math
from typing import Any

import pytest
import torch

from deltaserve_kernels.testing import error_ratio
from deltaserve_protos.v1 import inference_pb2 as pb

MEAN, CLS, LAST = pb.POOLING_MEAN, pb.POOLING_CLS, pb.POOLING_LAST
IDS = ([5, 6, 7, 8, 9], [4, 10])
INPUTS = [pb.Input(ids=ids) for ids in IDS]
POOLED = {MEAN: lambda rows: rows.mean(0), CLS: lambda rows: rows[0], LAST: lambda rows: rows[-1]}


def hidden(server: Any, ids: list[int]) -> torch.Tensor:
    model = server.made.model()
    inner = model.encoder if model.config.is_encoder_decoder else getattr(model, model.base_model_prefix, model)
    with torch.no_grad():
        return inner(input_ids=torch.tensor([ids])).last_hidden_state[0]


@pytest.mark.parametrize("asked", [pb.POOLING_UNSPECIFIED, MEAN, CLS, LAST])
@pytest.mark.parametrize(("family", "default"), [("bert", CLS), ("t5", MEAN), ("gpt2", LAST), ("llama", LAST)])
def test_vectors_are_those_of_transformers(
    family: str, default: Any, asked: Any, request: pytest.FixtureRequest
) -> None:
    server = request.getfixturevalue(family)
    answer = server("Embed", backbone=True, inputs=INPUTS, pooling=asked, normalize=False)
    assert answer.pooling == (asked or default)
    assert answer.usage.input_tokens == 7 and answer.delta == ""
    for ids, result in zip(IDS, answer.results, strict=True):
        assert error_ratio(torch.tensor(list(result.values)), POOLED[answer.pooling](hidden(server, ids))) < 1e-5
    unit = server("Embed", backbone=True, inputs=INPUTS, pooling=asked)
    for plain, scaled in zip(answer.results, unit.results, strict=True):
        vector = torch.tensor(list(plain.values))
        assert error_ratio(torch.tensor(list(scaled.values)), vector / vector.norm()) < 1e-5


def test_any_delta_embeds(bert: Any, gpt2: Any) -> None:
    for server, delta in ((bert, "plain"), (bert, "mood"), (gpt2, "lora"), (gpt2, "prompt")):
        own = server("Embed", deltas=[delta], inputs=INPUTS[:1]).results[0].values
        bare = server("Embed", backbone=True, inputs=INPUTS[:1]).results[0].values
        assert error_ratio(torch.tensor(list(own)), torch.tensor(list(bare))) > 1e-2


CONTINUATIONS = [[[11, 12], [13]], [[14, 15, 16], [11], [17, 18]]]


def ask(server: Any, **fields: Any) -> Any:
    given = [
        pb.ScoreRequest.Continuations(continuations=[pb.Continuation(ids=ids) for ids in own]) for own in CONTINUATIONS
    ]
    return server("Score", inputs=INPUTS, continuations=given, **fields)


def reference(model: Any, ids: list[int], continuation: list[int]) -> torch.Tensor:
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            logits = model(input_ids=torch.tensor([ids]), labels=torch.tensor([continuation])).logits[0]
        else:
            logits = model(input_ids=torch.tensor([ids + continuation])).logits[0][len(ids) - 1 : -1]
    return torch.log_softmax(logits, -1)


@pytest.mark.parametrize("family", ["gpt2", "t5", "llama"])
@pytest.mark.parametrize("deltas", [[], ["lora"]])
def test_scores_are_those_of_the_library(family: str, deltas: list[str], request: pytest.FixtureRequest) -> None:
    server = request.getfixturevalue(family)
    model = server.made.tuned("lora") if deltas else server.made.model()
    answer = ask(server, deltas=deltas, backbone=not deltas, logprobs=2)
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (7, 9)
    for ids, own, result in zip(IDS, CONTINUATIONS, answer.results, strict=True):
        for continuation, score in zip(own, result.scores, strict=True):
            rows = reference(model, ids, continuation)
            wanted = rows[torch.arange(len(continuation)), torch.tensor(continuation)]
            assert error_ratio(torch.tensor([t.chosen.logprob for t in score.tokens]), wanted) < 1e-4
            assert math.isclose(score.logprob, float(wanted.sum()), rel_tol=1e-4)
            assert score.greedy == (rows.argmax(-1).tolist() == continuation)
            for token, row in zip(score.tokens, rows, strict=True):
                assert [t.id for t in token.top] == torch.topk(row, 2).indices.tolist()


def test_greedy_continuations_say_so(gpt2: Any) -> None:
    made = gpt2(
        "Generate", deltas=["lora"], inputs=INPUTS[:1], sampling=pb.Sampling(max_new_tokens=4, ignore_eos=True)
    ).results[0].samples[0].ids  # fmt: skip
    given = pb.ScoreRequest.Continuations(
        continuations=[pb.Continuation(ids=made), pb.Continuation(ids=[*made[:-1], (made[-1] + 1) % 200])]
    )
    (result,) = gpt2("Score", deltas=["lora"], inputs=INPUTS[:1], continuations=[given]).results
    assert [score.greedy for score in result.scores] == [True, False]
    assert not any(token.top for score in result.scores for token in score.tokens)


def test_texts_continue_without_special_tokens(t5: Any) -> None:
    given = pb.ScoreRequest.Continuations(continuations=[pb.Continuation(text="no")])
    (result,) = t5("Score", backbone=True, inputs=[pb.Input(text="ab")], continuations=[given]).results
    assert [t.chosen.token for t in result.scores[0].tokens] == ["n", "o"]


def test_an_input_is_cut_for_its_longest_continuation(gpt2: Any) -> None:
    ids = list(range(3, 3 + 80))
    given = pb.ScoreRequest.Continuations(continuations=[pb.Continuation(ids=[5]), pb.Continuation(ids=[6] * 20)])
    asked = {"backbone": True, "continuations": [given]}
    cut = gpt2("Score", inputs=[pb.Input(ids=ids)], truncate=pb.TRUNCATE_START, **asked)
    assert cut.usage.input_tokens == 44
    assert cut.results == gpt2("Score", inputs=[pb.Input(ids=ids[-44:])], **asked).results
    failure = gpt2.fails("Score", inputs=[pb.Input(ids=ids)], **asked)
    assert failure.reason == "INPUT_TOO_LONG" and "a continuation of 20" in failure.message
