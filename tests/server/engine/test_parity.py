"""What a request gets is what transformers gives for that request alone, whoever else is in the batch."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from deltaserve.deltas.sites import Pooling
from deltaserve.engine.request import FinishReason, Job, Request, Sampling
from deltaserve_kernels.testing import error_ratio

EXACT = 1e-5
GENERATING = ("t5", "t5-gated", "gpt2", "llama", "llama-tied")
LENGTHS = (5, 1, 17, 9, 30, 2, 13)
Plain = Callable[..., PreTrainedModel]


def ids_of(length: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(1000 * length + seed)
    return tuple(torch.randint(3, 101, (length,), generator=generator).tolist())


def encoder_decoder(name: str) -> bool:
    return name.startswith("t5")


def greedy(model: PreTrainedModel, ids: tuple[int, ...], count: int) -> list[int]:
    made = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=0)[0].tolist()
    return made[1:] if model.config.is_encoder_decoder else made[len(ids) :]


def log_softmax(model: PreTrainedModel, ids: tuple[int, ...], continuation: tuple[int, ...]) -> torch.Tensor:
    """[continuation, vocabulary] of the plain forward."""
    if model.config.is_encoder_decoder:
        given = torch.tensor([[model.config.decoder_start_token_id, *continuation[:-1]]])
        logits = model(input_ids=torch.tensor([ids]), decoder_input_ids=given).logits[0]
    else:
        logits = model(torch.tensor([ids + continuation[:-1]])).logits[0, len(ids) - 1 :]
    return torch.log_softmax(logits.float(), -1)


def generate(request_id: str, ids: tuple[int, ...], count: int, **sampling: object) -> Request:
    wanted = Sampling(max_new_tokens=count, **sampling)  # type: ignore[arg-type]
    return Request(request_id, Job.GENERATE, ids, sampling=wanted)


@pytest.mark.parametrize("name", GENERATING)
def test_greedy_tokens_are_those_of_generate_however_requests_join(name, drive, plain: Plain):
    driver, model = drive(name, max_running=5), plain(name)
    requests = [
        generate(f"r{i}", ids_of(n, i), 32, end_ids=frozenset((model.generation_config.eos_token_id,)))
        for i, n in enumerate(LENGTHS)
    ]
    for i, request in enumerate(requests[2:]):
        driver.join(1 + 7 * i, [request])
    driver.submit(*requests[:2])
    ended = driver.results(*(r.id for r in requests))
    for request, end in zip(requests, ended, strict=True):
        expected = greedy(model, request.ids, 32)
        assert driver.output(request.id) == expected
        assert end.reason is (FinishReason.LENGTH if len(expected) == 32 else FinishReason.STOP)
    driver.idle()
    steps = driver.engine.stats(steps=True).steps
    assert any(step.phase == "mixed" for step in steps) and max(step.sequences for step in steps) > 3


@pytest.mark.parametrize("name", GENERATING)
def test_scores_are_log_softmax_of_the_plain_forward(name, drive, plain: Plain):
    driver, model = drive(name), plain(name)
    requests = [
        Request(f"s{i}", Job.SCORE, ids_of(n, i), continuation=ids_of(1 + 3 * i, 50 + i), score_logprobs=101)
        for i, n in enumerate(LENGTHS[:5])
    ]
    for request, end in zip(requests, driver.finished(*requests), strict=True):
        expected = log_softmax(model, request.ids, request.continuation)
        ours = torch.empty_like(expected)
        for row, position in enumerate(end.positions):
            for found in position.top:
                ours[row, found.id] = found.logprob
            assert position.chosen.id == request.continuation[row]
            assert position.chosen.logprob == pytest.approx(float(expected[row, position.chosen.id]), abs=1e-4)
            assert position.chosen.rank == 1 + int((ours[row] > position.chosen.logprob).sum())
            assert [t.rank for t in position.top] == list(range(1, 102))
        assert error_ratio(ours, expected) <= EXACT
    driver.idle()


@pytest.mark.parametrize(
    "name", ["t5", "t5-gated", "bert", "modernbert", "modernbert-mean", "gpt2", "llama", "llama-tied"]
)
def test_embeddings_are_pooled_hidden_rows(name, drive, plain: Plain):
    driver, model = drive(name), plain(name)
    pool = {Pooling.MEAN: lambda h: h.mean(0), Pooling.CLS: lambda h: h[0], Pooling.LAST: lambda h: h[-1]}
    requests = [
        Request(f"{pooling}{i}", Job.EMBED, ids_of(n, i), pooling=pooling)
        for i, n in enumerate(LENGTHS)
        for pooling in pool
    ]
    stack = model.get_encoder() if encoder_decoder(name) else model.base_model
    for request, end in zip(requests, driver.finished(*requests), strict=True):
        hidden = stack(torch.tensor([request.ids])).last_hidden_state[0]
        expected = pool[request.pooling](hidden)
        assert error_ratio(torch.tensor(end.vector), expected) <= EXACT
    driver.idle()


def test_token_types_reach_bert(drive, plain: Plain):
    driver, model = drive("bert"), plain("bert")
    ids, types = ids_of(11, 0), (0,) * 6 + (1,) * 5
    given = [
        Request("typed", Job.EMBED, ids, token_type_ids=types, pooling=Pooling.LAST),
        Request("untyped", Job.EMBED, ids, pooling=Pooling.LAST),
    ]
    typed, untyped = (torch.tensor(end.vector) for end in driver.finished(*given))
    expected = model(torch.tensor([ids]), token_type_ids=torch.tensor([types])).last_hidden_state[0, -1]
    assert error_ratio(typed, expected) <= EXACT < error_ratio(untyped, expected)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_long_prompts_are_prefilled_in_chunks(name, drive, plain: Plain):
    driver, model = drive(name, max_batch_tokens=1, max_running=3, max_model_len=60), plain(name)
    requests = [generate(f"r{i}", ids_of(n, i), 12, prompt_logprobs=3) for i, n in enumerate((40, 37, 44, 6, 41))]
    driver.finished(*requests)
    steps = driver.engine.stats(steps=True).steps
    assert max(step.rows for step in steps) <= driver.engine.limits.max_batch_tokens == 64
    assert sum(step.rows for step in steps if step.phase != "decode") > 64
    for request in requests:
        assert driver.output(request.id) == greedy(model, request.ids, 12)
        told = [event.prompt_logprobs for event in driver.tokens[request.id] if event.prompt_logprobs]
        assert len(told) == 1, "prompt log-probabilities come at once"
        expected = log_softmax(model, request.ids[:1], request.ids[1:])
        assert [p.chosen.id for p in told[0]] == list(request.ids[1:])
        ours = torch.tensor([p.chosen.logprob for p in told[0]])
        assert error_ratio(ours, expected.gather(1, torch.tensor(request.ids[1:]).unsqueeze(1)).squeeze(1)) <= EXACT
        assert all(len(p.top) == 3 for p in told[0])
    driver.idle()


def test_jobs_of_all_kinds_share_one_forward(drive, plain: Plain):
    driver, model = drive("t5", run=False), plain("t5")
    requests = [
        generate("g", ids_of(9, 0), 8, logprobs=4),
        Request("s", Job.SCORE, ids_of(6, 1), continuation=ids_of(5, 2)),
        Request("e", Job.EMBED, ids_of(7, 3), pooling=Pooling.MEAN),
    ]
    driver.submit(*requests)
    driver.engine.start()
    generated, scored, embedded = driver.results("g", "s", "e")
    assert driver.engine.stats(steps=True).steps[0].sequences == 3
    expected = greedy(model, requests[0].ids, 8)
    assert driver.output("g") == expected and generated.reason
    rows = log_softmax(model, requests[0].ids, tuple(expected))
    for row, event in zip(rows, driver.tokens["g"], strict=True):
        (position,) = event.logprobs
        assert position.chosen.rank == 1 and [t.id for t in position.top] == row.topk(4).indices.tolist()
        assert position.chosen.logprob == pytest.approx(float(row.max()), abs=1e-4)
    rows = log_softmax(model, requests[1].ids, requests[1].continuation)
    own = rows.gather(1, torch.tensor(requests[1].continuation).unsqueeze(1)).squeeze(1)
    assert error_ratio(torch.tensor([p.chosen.logprob for p in scored.positions]), own) <= EXACT
    hidden = model.get_encoder()(torch.tensor([requests[2].ids])).last_hidden_state[0]
    assert error_ratio(torch.tensor(embedded.vector), hidden.mean(0)) <= EXACT


@pytest.mark.parametrize("name", ["t5-gated", "bert", "modernbert", "gpt2", "llama"])
def test_bfloat16(name, drive, plain: Plain):
    """No further from fp32 than transformers in bf16 is, but for chance: 1.5 times."""
    driver, model, exact = drive(name, "bfloat16"), plain(name, "bfloat16"), plain(name)
    requests = [Request(f"e{i}", Job.EMBED, ids_of(n, i), pooling=Pooling.LAST) for i, n in enumerate(LENGTHS)]
    ours, theirs, truth = [], [], []
    for request, end in zip(requests, driver.finished(*requests), strict=True):
        ours.append(torch.tensor(end.vector))
        for found, into in ((model, theirs), (exact, truth)):
            stack = found.get_encoder() if encoder_decoder(name) else found.base_model
            into.append(stack(torch.tensor([request.ids])).last_hidden_state[0, -1].float())
    assert error_ratio(torch.stack(ours), torch.stack(truth)) <= 1.5 * error_ratio(
        torch.stack(theirs), torch.stack(truth)
    )
    if Job.GENERATE in driver.backbone.spec.tasks:
        driver.finished(generate("g", ids_of(9, 0), 8))
        assert len(driver.output("g")) == 8
