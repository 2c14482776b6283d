"""What every call sends, and that all of an answer arrives: for both clients."""

import dataclasses
from typing import Any

import pytest
from google.protobuf.message import Message

from deltaserve_client import Input
from deltaserve_protos.v1 import deltas_pb2, inference_pb2


def same(result: Any, message: Message) -> None:
    """Every field of `message` is in `result` under its own name, and nothing else but the request id."""
    for field in message.DESCRIPTOR.fields:
        assert hasattr(result, field.name), f"{type(result).__name__} lacks {field.name}"
        here, there = getattr(result, field.name), getattr(message, field.name)
        if field.is_repeated:
            assert len(here) == len(there) > 0, f"{field.name} is not set in the message, or lost"
        pairs = list(zip(here, there, strict=True)) if field.is_repeated else [(here, there)]
        for ours, theirs in pairs:
            if isinstance(theirs, Message):
                same(ours, theirs)
            elif field.enum_type:
                name = field.enum_type.values_by_number[theirs].name
                assert name.lower().endswith(f"_{ours}")
            else:
                assert ours == theirs
    assert {field.name for field in dataclasses.fields(result)} - set(message.DESCRIPTOR.fields_by_name) <= {
        "request_id"
    }


async def test_generate(ask: Any, server: Any, generated: inference_pb2.GenerateResponse) -> None:
    server.answers("Generate", generated)
    result = await ask("generate", "ja?", delta="acme/yes", max_new_tokens=4, temperature=0.5, truncate="end")
    same(result, generated)
    assert (result.text, result.texts, result.request_id) == ("ja", ("ja",), "00c0ffee")
    (sent,) = server.requests
    assert sent == inference_pb2.GenerateRequest(
        deltas=["acme/yes"],
        inputs=[inference_pb2.Input(text="ja?")],
        truncate=inference_pb2.TRUNCATE_END,
        sampling=inference_pb2.Sampling(max_new_tokens=4, temperature=0.5),
    )
    assert server.metadata[0]["x-deltaserve-delta"] == "acme/yes"


async def test_stream(ask: Any, server: Any, pieces: list[Any]) -> None:
    server.answers("StreamGenerate", *pieces)
    first, last = await ask("stream", ["ja?"], delta="acme/yes", stop="!", stop_ids=[3, 4])
    assert (first.text, first.ids, first.finish_reason, first.usage, first.delta) == (
        "j",
        (5,),
        None,
        None,
        "acme/yes@2",
    )
    assert (last.text, last.finish_reason, last.usage.output_tokens, last.request_id) == ("a", "length", 2, "00c0ffee")
    assert server.requests[0].sampling == inference_pb2.Sampling(stop=["!"], stop_ids=[3, 4])
    assert server.metadata[0]["x-deltaserve-delta"] == "acme/yes"


async def test_bare_backbone(ask: Any, server: Any, generated: inference_pb2.GenerateResponse) -> None:
    server.answers("Generate", generated)
    await ask("generate", [[1, 2], Input("a", text_pair="b"), "c"], backbone=True, add_special_tokens=False)
    (sent,) = server.requests
    assert sent.backbone
    assert not sent.deltas
    assert sent.HasField("add_special_tokens")
    assert [each.ids[:] or each.text for each in sent.inputs] == [[1, 2], "a", "c"]
    assert "x-deltaserve-delta" not in server.metadata[0]


async def test_classify_sequences(ask: Any, server: Any) -> None:
    answer = inference_pb2.ClassifyResponse(
        results=[{"sequence": {"label": "yes", "scores": [0.25, 0.75]}}], labels=["no", "yes"],
        scores_as=inference_pb2.SCORES_AS_SOFTMAX, usage={"input_tokens": 3}, delta="acme/yes@2",
    )  # fmt: skip
    server.answers("Classify", answer)
    result = await ask("classify", "fine", delta="acme/yes", scores_as="softmax")
    assert (result.label, result.results[0].scores, result.results[0].tokens) == ("yes", (0.25, 0.75), None)
    assert (result.labels, result.scores_as, result.delta) == (("no", "yes"), "softmax", "acme/yes@2")
    assert server.requests[0].scores_as == inference_pb2.SCORES_AS_SOFTMAX


async def test_classify_tokens(ask: Any, server: Any) -> None:
    placed = {"id": 5, "token": "Bonn", "start": 0, "end": 4, "segment": 0, "label": "LOC", "scores": [1.0]}
    special = {"id": 1, "token": "[SEP]", "label": "O", "scores": [0.0]}
    server.answers("Classify", inference_pb2.ClassifyResponse(results=[{"tokens": {"tokens": [placed, special]}}]))
    ((bonn, sep),) = [each.tokens for each in (await ask("classify", ["Bonn"], delta="ner")).results]
    assert (bonn.id, bonn.token, bonn.label, bonn.scores, bonn.start, bonn.end, bonn.segment) == (
        5, "Bonn", "LOC", (1.0,), 0, 4, 0,
    )  # fmt: skip
    assert (sep.start, sep.end, sep.segment) == (None, None, None)


async def test_classify_spans(ask: Any, server: Any) -> None:
    placed = {"start_token": 5, "end_token": 6, "start": 3, "end": 9, "segment": 1, "text": "a film", "score": 0.5}
    found = {"spans": [placed, {"start_token": 7, "end_token": 7, "text": "b"}], "start_logits": [0.5, -1]}
    answer = inference_pb2.ClassifyResponse(results=[{"spans": {**found, "end_logits": [0.25, 2]}}])
    server.answers("Classify", answer)
    result = await ask("classify", Input("what?", "a film"), delta="where", top_k=2, max_answer_tokens=7)
    (told,) = result.results
    same(told.spans[0], answer.results[0].spans.spans[0])
    assert (told.spans[1].start, told.spans[1].end, told.spans[1].segment) == (None, None, None)
    assert (told.start_logits, told.end_logits, told.tokens, told.label) == ((0.5, -1), (0.25, 2), None, "")
    assert result.answer == "a film"
    assert (server.requests[0].top_k, server.requests[0].max_answer_tokens) == (2, 7)
    server.answers("Classify", inference_pb2.ClassifyResponse(results=[{"spans": {}}]))
    assert (await ask("classify", "what?", delta="where")).answer is None


async def test_classify_choices(ask: Any, server: Any) -> None:
    answer = inference_pb2.ClassifyResponse(results=[{"choice": {"index": 1, "scores": [0.25, 0.75]}}])
    server.answers("Classify", answer)
    result = await ask("classify", Input("he", choices=["runs", "is red"]), delta="swag")
    (told,) = result.results
    assert (result.choice, told.choice, told.scores, told.label, told.spans) == (1, 1, (0.25, 0.75), "", None)
    (sent,) = server.requests[0].inputs
    assert sent == inference_pb2.Input(text="he", choices=[{"text": "runs"}, {"text": "is red"}])
    await ask("classify", Input(choices=[[1, 2], Input(ids=[3], token_type_ids=[1])]), delta="swag")
    (sent,) = server.requests[1].inputs
    assert sent == inference_pb2.Input(choices=[{"ids": [1, 2]}, {"ids": [3], "token_type_ids": [1]}])


async def test_embed(ask: Any, server: Any) -> None:
    answer = inference_pb2.EmbedResponse(
        results=[{"values": [0.5, -1]}], pooling=inference_pb2.POOLING_CLS, usage={"input_tokens": 3}, delta="e@1"
    )
    server.answers("Embed", answer)
    result = await ask("embed", "fine", delta="e", pooling="cls", normalize=False)
    same(result, answer)
    assert result.vector == (0.5, -1.0)
    (sent,) = server.requests
    assert (sent.pooling, sent.normalize, sent.HasField("normalize")) == (inference_pb2.POOLING_CLS, False, True)


async def test_score(ask: Any, server: Any, generated: inference_pb2.GenerateResponse) -> None:
    position = generated.results[0].prompt_logprobs[0]
    scores = [{"logprob": -1.5, "greedy": True, "tokens": [position]}, {"logprob": -2, "tokens": [position]}]
    answer = inference_pb2.ScoreResponse(results=[{"scores": scores}], usage={"output_tokens": 2}, delta="e@1")
    server.answers("Score", answer)
    result = await ask("score", "two and two", ["four", [7, 8]], delta="e", logprobs=2)
    same(result, answer)
    assert result.logprobs == (-1.5, -2.0)
    (sent,) = server.requests
    assert [each.text or list(each.ids) for each in sent.continuations[0].continuations] == ["four", [7, 8]]
    assert sent.logprobs == 2


async def test_deltas(ask: Any, server: Any, delta: deltas_pb2.Delta) -> None:
    server.answers("LoadDelta", deltas_pb2.LoadDeltaResponse(delta=delta))
    server.answers("GetDelta", deltas_pb2.GetDeltaResponse(delta=delta))
    server.answers("UnloadDelta", deltas_pb2.UnloadDeltaResponse(deltas=[delta], freed_bytes=4096))
    loaded = await ask(
        "deltas.load", "acme/yes", "yes-lora", task="sequence_classification", labels=["no", "yes"],
        problem_type="single_label_classification", replace=True, task_id=0,
    )  # fmt: skip
    same(loaded, delta)
    assert (loaded.reference, loaded.task_id, loaded.shared_bytes) == ("acme/yes@2", 3, 8192)
    same(await ask("deltas.get", "acme/yes"), delta)
    gone = await ask("deltas.unload", "acme/yes@2", wait=True)
    assert (gone.deltas, gone.freed_bytes) == ((loaded,), 4096)
    assert server.requests == [
        deltas_pb2.LoadDeltaRequest(
            name="acme/yes", source="yes-lora", task=deltas_pb2.TASK_SEQUENCE_CLASSIFICATION, labels=["no", "yes"],
            problem_type=deltas_pb2.PROBLEM_TYPE_SINGLE_LABEL_CLASSIFICATION, replace=True, task_id=0,
        ),
        deltas_pb2.GetDeltaRequest(name="acme/yes"),
        deltas_pb2.UnloadDeltaRequest(name="acme/yes@2", wait=True),
    ]  # fmt: skip


async def test_list_follows_the_pages(ask: Any, server: Any) -> None:
    async def page(request: deltas_pb2.ListDeltasRequest, _: Any) -> deltas_pb2.ListDeltasResponse:
        at = int(request.page_token or 0)
        names = [f"d{number}" for number in range(at, min(at + request.page_size, 5))]
        following = str(at + len(names)) if at + len(names) < 5 else ""
        return deltas_pb2.ListDeltasResponse(deltas=[{"name": name} for name in names], next_page_token=following)

    server.behaves["ListDeltas"] = page
    assert [each.name for each in await ask("deltas.list", page_size=2)] == ["d0", "d1", "d2", "d3", "d4"]
    assert [each.page_token for each in server.requests] == ["", "2", "4"]


async def test_server_info(ask: Any, server: Any) -> None:
    step = deltas_pb2.Step(
        index=4, started=1.5, duration=0.5, rows=9, sequences=3, slots=[0, 2], deltas=["a@1", "b@2"], kinds=["lora"],
        phase="decode",
    )  # fmt: skip
    limits = deltas_pb2.Limits(
        max_model_len=1, max_inputs=2, max_batch_tokens=3, max_running=4, max_queued=5, max_message_bytes=6
    )
    memory = deltas_pb2.Memory(
        backbone_bytes=1, kv_capacity_bytes=2, kv_used_bytes=3, pool_capacity_bytes=4, pool_used_bytes=5
    )
    answer = deltas_pb2.GetServerInfoResponse(
        version="0.1.0", backbone="b", family="t5", tasks=["generate"], kinds=["lora"], device="cpu", dtype="float32",
        parameters=9, has_tokenizer=True, limits=limits, memory=memory, steps=[step], running=1, waiting=2, resident=3,
        uptime=4.5,
    )  # fmt: skip
    server.answers("GetServerInfo", answer)
    same(await ask("server_info", steps=True), answer)
    assert server.requests[0].steps


async def test_health(ask: Any) -> None:
    assert await ask("healthy")
    assert not await ask("healthy", "leaving")
    assert not await ask("healthy", "unheard of")


@pytest.mark.parametrize("size", [0, 2])
async def test_text_is_for_a_single_input(ask: Any, server: Any, size: int) -> None:
    server.answers("Generate", inference_pb2.GenerateResponse(results=[{}] * size))
    result = await ask("generate", ["a", "b"], delta="d")
    with pytest.raises(ValueError, match=f"{size} results"):
        _ = result.text


async def test_values_of_a_newer_server(ask: Any, server: Any) -> None:
    server.answers("Embed", inference_pb2.EmbedResponse(pooling=99))
    assert (await ask("embed", "a", delta="d")).pooling == "99"


async def test_large_answers_arrive(ask: Any, server: Any) -> None:
    values = [0.5] * (2 << 20)  # 8 MiB; gRPC's own limit is 4
    server.answers("Embed", inference_pb2.EmbedResponse(results=[{"values": values}]))
    assert len((await ask("embed", "a", delta="d")).vector) == len(values)


async def test_closed_client_says_so(ask: Any) -> None:
    if ask.blocks:
        ask.client.close()
    else:
        await ask.client.aclose()
    with pytest.raises(RuntimeError, match="closed"):
        await ask("generate", "a", delta="d")
