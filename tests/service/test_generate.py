"""Generate and StreamGenerate against transformers and PEFT alone, and field by field."""

import math
from typing import Any

import pytest
import torch

from deltaserve_kernels.testing import error_ratio
from deltaserve_protos.v1 import inference_pb2 as pb

STOP, LENGTH = pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH


def text(*texts: str) -> list[pb.Input]:
    return [pb.Input(text=one) for one in texts]


def greedy(model: Any, ids: list[int], new: int) -> list[int]:
    out = model.generate(
        input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=False,
        max_new_tokens=new, pad_token_id=0,
    )  # fmt: skip
    return out[0, 1:].tolist() if model.config.is_encoder_decoder else out[0, len(ids) :].tolist()


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_greedy_tokens_are_those_of_transformers(family: str, request: pytest.FixtureRequest) -> None:
    server = request.getfixturevalue(family)
    tokenizer = server.app.served.backbone.tokenizer
    texts = ["the cat", "Ünïcödé", "a"]
    answer = server("Generate", backbone=True, inputs=text(*texts), sampling=pb.Sampling(max_new_tokens=12))
    model = server.made.model()
    for one, result in zip(texts, answer.results, strict=True):
        ids = tokenizer(one)["input_ids"]
        wanted = greedy(model, ids, 12)
        assert list(result.samples[0].ids) == wanted[: len(result.samples[0].ids)]
        assert len(result.samples[0].ids) == 12 or result.samples[0].ids[-1] == 1
        assert result.input_tokens == len(ids)
    assert answer.usage.input_tokens == sum(r.input_tokens for r in answer.results)
    assert answer.usage.output_tokens == sum(len(r.samples[0].ids) for r in answer.results)
    assert answer.delta == ""


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_a_delta_moves_the_output_and_is_named(family: str, request: pytest.FixtureRequest) -> None:
    server = request.getfixturevalue(family)
    asked = {"inputs": [pb.Input(ids=[20, 30, 40])], "sampling": pb.Sampling(max_new_tokens=10, ignore_eos=True)}
    bare = server("Generate", backbone=True, **asked)
    with_delta = server("Generate", deltas=["lora"], **asked)
    assert with_delta.delta == "lora@1"
    assert bare.results[0].samples[0].ids != with_delta.results[0].samples[0].ids
    assert with_delta == server("Generate", deltas=["lora@1"], **asked)


@pytest.mark.parametrize("deltas", [[], ["lora"], ["prompt"]])
@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_joined_is_the_whole(gpt2: Any, deltas: list[str], n: int) -> None:
    sampling = pb.Sampling(max_new_tokens=14, temperature=1.5, seed=3, n=n, logprobs=2, prompt_logprobs=1)
    asked = {"inputs": text("ab", "xyz"), "sampling": sampling, "deltas": deltas, "backbone": not deltas}
    whole = gpt2("Generate", **asked)
    pieces = gpt2("StreamGenerate", **asked)
    seen = set()
    for index, result in enumerate(whole.results):
        for number, sample in enumerate(result.samples):
            own = [p for p in pieces if (p.input_index, p.sample_index) == (index, number)]
            assert "".join(p.text for p in own) == sample.text
            assert [i for p in own for i in p.ids] == list(sample.ids)
            assert [q for p in own for q in p.logprobs] == list(sample.logprobs)
            assert [p.finish_reason for p in own] == [0] * (len(own) - 1) + [sample.finish_reason]
            assert [p.HasField("usage") for p in own] == [False] * (len(own) - 1) + [True]
            assert own[-1].usage.output_tokens == len(sample.ids)
            assert own[-1].usage.input_tokens == (result.input_tokens if number == 0 else 0)
            assert {p.delta for p in own} == {whole.delta}
            prompt = [q for p in own for q in p.prompt_logprobs]
            assert prompt == (list(result.prompt_logprobs) if number == 0 else [])
            assert not any(p.prompt_logprobs for p in own[1:])
            seen.add((index, number))
    assert {(p.input_index, p.sample_index) for p in pieces} == seen
    assert len(seen) == 2 * n


def test_text_is_the_tokenizers(gpt2: Any) -> None:
    """Characters of several bytes come whole or not at all, and the pieces are the whole text."""
    tokenizer = gpt2.app.served.backbone.tokenizer
    sampling = pb.Sampling(max_new_tokens=50, temperature=3, seed=1, n=8, ignore_eos=True)
    answer = gpt2("Generate", backbone=True, inputs=text("abc"), sampling=sampling)
    for sample in answer.results[0].samples:
        assert sample.text == tokenizer.decode(sample.ids, skip_special_tokens=True)
    assert any("\ufffd" in sample.text for sample in answer.results[0].samples)


def test_seeds_repeat_whatever_the_batch(gpt2: Any) -> None:
    sampling = pb.Sampling(max_new_tokens=12, temperature=1.2, seed=11, n=2)
    alone = gpt2("Generate", backbone=True, inputs=text("ab"), sampling=sampling).results[0]
    both = gpt2("Generate", backbone=True, inputs=text("ab", "ab"), sampling=sampling).results
    assert both[0] == alone
    samples = [tuple(s.ids) for result in both for s in result.samples]
    assert len(set(samples)) == 4  # each sample of each input draws from a stream of its own
    streams = [gpt2.inference.StreamGenerate(
        pb.StreamGenerateRequest(backbone=True, inputs=text("crowd"), sampling=pb.Sampling(temperature=1)), timeout=60
    ) for _ in range(6)]  # fmt: skip
    crowded = gpt2("Generate", deltas=["lora"], inputs=text("ab"), sampling=sampling).results[0]
    for stream in streams:
        list(stream)
    assert crowded == gpt2("Generate", deltas=["lora"], inputs=text("ab"), sampling=sampling).results[0]
    other = gpt2("Generate", backbone=True, inputs=text("ab"), sampling=pb.Sampling(
        max_new_tokens=12, temperature=1.2, seed=12, n=2
    ))  # fmt: skip
    assert other.results[0] != alone


def test_logprobs_are_those_of_transformers(gpt2: Any) -> None:
    ids = [50, 60, 70, 80]
    answer = gpt2(
        "Generate",
        backbone=True,
        inputs=[pb.Input(ids=ids)],
        sampling=pb.Sampling(max_new_tokens=5, logprobs=3, prompt_logprobs=2, ignore_eos=True, temperature=0),
    ).results[0]
    sample = answer.samples[0]
    every = torch.tensor([ids + list(sample.ids)])
    with torch.no_grad():
        wanted = torch.log_softmax(gpt2.made.model()(every).logits[0], -1)
    found = list(answer.prompt_logprobs) + list(sample.logprobs)
    assert len(answer.prompt_logprobs) == 3 and len(sample.logprobs) == 5
    for row, position in enumerate(found):
        token = int(every[0, row + 1])
        assert position.chosen.id == token
        assert position.chosen.rank == 1 + int((wanted[row] > wanted[row, token]).sum())
        assert error_ratio(torch.tensor([position.chosen.logprob]), wanted[row, token].reshape(1)) < 1e-4
        top = torch.topk(wanted[row], len(position.top))
        assert [one.id for one in position.top] == top.indices.tolist()
        assert [one.rank for one in position.top] == list(range(1, len(position.top) + 1))
        assert error_ratio(torch.tensor([one.logprob for one in position.top]), top.values) < 1e-4
    assert {len(p.top) for p in answer.prompt_logprobs} == {2} and {len(p.top) for p in sample.logprobs} == {3}


def test_no_logprobs_unless_asked(gpt2: Any) -> None:
    answer = gpt2("Generate", backbone=True, inputs=text("ab"), sampling=pb.Sampling(max_new_tokens=2)).results[0]
    assert not answer.prompt_logprobs and not answer.samples[0].logprobs
    none = gpt2("Generate", backbone=True, inputs=text("ab"), sampling=pb.Sampling(max_new_tokens=2, logprobs=0))
    assert [len(p.top) for p in none.results[0].samples[0].logprobs] == [0, 0]


def long(server: Any, **sampling: Any) -> pb.Sample:
    given = {"max_new_tokens": 30, "temperature": 0.9, "seed": 5, "ignore_eos": True} | sampling
    return server("Generate", backbone=True, inputs=text("ab"), sampling=pb.Sampling(**given)).results[0].samples[0]


@pytest.mark.parametrize("width", [1, 2, 3])
def test_a_stop_string_ends_before_itself(gpt2: Any, width: int) -> None:
    """The stop string lies across tokens: each is one byte."""
    whole = long(gpt2)
    at = next(i for i in range(6, 24) if "\ufffd" not in whole.text[i : i + width])
    string = whole.text[at : at + width]
    at = whole.text.index(string)
    stopped = long(gpt2, stop=["never there", string])
    assert stopped.text == whole.text[:at]
    assert (stopped.finish_reason, stopped.stop) == (STOP, string)
    assert list(stopped.ids) == list(whole.ids[: len(stopped.ids)]) and len(stopped.ids) < len(whole.ids)
    pieces = gpt2("StreamGenerate", backbone=True, inputs=text("ab"), sampling=pb.Sampling(
        max_new_tokens=30, temperature=0.9, seed=5, ignore_eos=True, stop=[string]
    ))  # fmt: skip
    assert "".join(p.text for p in pieces) == stopped.text and pieces[-1].stop == string
    late = long(gpt2, stop=[string], min_new_tokens=29)
    assert len(late.ids) >= 29


def test_stop_ids_end_after_themselves(gpt2: Any) -> None:
    whole = long(gpt2)
    token = whole.ids[7]
    first = list(whole.ids).index(token)
    stopped = long(gpt2, stop_ids=[token])
    assert list(stopped.ids) == list(whole.ids[: first + 1])
    assert stopped.finish_reason == STOP and not stopped.HasField("stop")


def test_max_new_tokens_is_by_default_what_there_is_room_for(gpt2: Any, llama: Any) -> None:
    endless = pb.Sampling(ignore_eos=True)
    (short,) = gpt2("Generate", backbone=True, inputs=[pb.Input(ids=[5] * 10)], sampling=endless).results
    assert len(short.samples[0].ids) == 64 - 10 and short.samples[0].finish_reason == LENGTH
    (prompted,) = gpt2("Generate", deltas=["prompt"], inputs=[pb.Input(ids=[5] * 10)], sampling=endless).results
    assert len(prompted.samples[0].ids) == 64 - 10 - 6
    assert prompted.input_tokens == 10  # the prompt's rows are nobody's tokens
    (roomy,) = llama("Generate", backbone=True, inputs=[pb.Input(ids=[5] * 10)], sampling=endless).results
    assert len(roomy.samples[0].ids) == 128
    assert roomy.samples[0].text == ""  # no tokenizer


def test_truncation_leaves_tokens_out_where_it_was_told_to(gpt2: Any) -> None:
    ids = list(range(3, 3 + 90))
    few = pb.Sampling(max_new_tokens=4, ignore_eos=True)

    def first(given: list[int], truncate: Any = pb.TRUNCATE_NONE) -> pb.Generation:
        return gpt2("Generate", backbone=True, inputs=[pb.Input(ids=given)], sampling=few, truncate=truncate).results[0]

    assert first(ids, pb.TRUNCATE_START) == first(ids[-60:])
    assert first(ids, pb.TRUNCATE_END) == first(ids[:60])
    failure = gpt2.fails("Generate", backbone=True, inputs=[pb.Input(ids=ids)], sampling=few)
    assert failure.reason == "INPUT_TOO_LONG"
    info = failure.details["ErrorInfo"].metadata
    assert (info["tokens"], info["fit"], info["limit"]) == ("90", "60", "64")
    assert "90 tokens" in failure.message and "60" in failure.message


def test_text_that_cannot_fit_is_not_even_tokenised(gpt2: Any) -> None:
    most = 128 * 64
    asked = {"backbone": True, "truncate": pb.TRUNCATE_END, "sampling": pb.Sampling(max_new_tokens=1)}
    assert gpt2("Generate", inputs=text("a" * most), **asked).results[0].samples
    failure = gpt2.fails("Generate", inputs=text("a" * (most + 1)), **asked)
    assert failure.code == "INVALID_ARGUMENT" and failure.reason == "INPUT_TOO_LONG"
    assert f"{most + 1} characters" in failure.message and str(most) in failure.message


def test_special_tokens_can_be_left_out(t5: Any) -> None:
    few = pb.Sampling(max_new_tokens=1)
    asked = {"backbone": True, "inputs": text("abc"), "sampling": few}
    assert t5("Generate", **asked).results[0].input_tokens == 4
    assert t5("Generate", add_special_tokens=False, **asked).results[0].input_tokens == 3


def test_embedding_and_score_share_the_engine_with_it(gpt2: Any) -> None:
    """Deltas and jobs of all kinds at one time; each gets what it gets alone."""
    asked = {"inputs": text("abc"), "sampling": pb.Sampling(max_new_tokens=20, ignore_eos=True)}
    alone = {name: gpt2("Generate", deltas=[name], **asked) for name in ("lora", "prompt")}
    vector = gpt2("Embed", deltas=["mood"], inputs=text("abc"))
    futures = [
        (name, gpt2.inference.Generate.future(pb.GenerateRequest(deltas=[name], **asked), timeout=60))
        for name in ("lora", "prompt") * 4
    ]
    embeds = [
        gpt2.inference.Embed.future(pb.EmbedRequest(deltas=["mood"], inputs=text("abc")), timeout=60) for _ in range(4)
    ]
    for name, future in futures:
        assert future.result() == alone[name]
    for future in embeds:
        found = torch.tensor(list(future.result().results[0].values))
        assert error_ratio(found, torch.tensor(list(vector.results[0].values))) < 1e-5
    assert math.isclose(sum(v * v for v in vector.results[0].values), 1, rel_tol=1e-4)
