"""However a call ends, what it held is given back: cancels, deadlines, a server that leaves, an engine that dies."""

import asyncio
import random
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deltaserve_protos.v1 import inference_pb2 as pb

CANCELLED, UNAVAILABLE = grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE


def asked(delta: str = "lora", tokens: int = 3000, **fields: Any) -> pb.StreamGenerateRequest:
    return pb.StreamGenerateRequest(
        deltas=[delta] if delta else [],
        backbone=not delta,
        inputs=[pb.Input(ids=[5, 6, 7])],
        sampling=pb.Sampling(max_new_tokens=tokens, ignore_eos=True),
        **fields,
    )


def eventually(true: Callable[[], bool], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


def test_200_cancelled_streams_leave_nothing_behind(llama: Any) -> None:
    """Some are cancelled while they wait, some in their prefill, some while they decode."""
    dice = random.Random(1)
    assert eventually(llama.idle)
    streams = []
    for index in range(200):
        stream = llama.inference.StreamGenerate(asked(dice.choice(["lora", ""])), timeout=60)
        streams.append(stream)
        if index % 3 == 0 and index < 30:  # later ones wait their turn
            next(stream)
        if index % 2 and dice.random() < 0.7:
            streams.pop(dice.randrange(len(streams))).cancel()
    busy = llama("GetServerInfo")
    assert busy.running > 0 and busy.memory.kv_used_bytes > 0
    for stream in streams:
        stream.cancel()

    def empty() -> bool:
        now = llama("GetServerInfo")
        return (now.running, now.waiting, now.memory.kv_used_bytes) == (0, 0, 0)

    assert eventually(empty)
    stats = llama.app.engine.stats()
    assert (stats.pins, stats.waiting_for_load, stats.kv_used_tokens) == (0, 0, 0)
    assert {d.in_flight for d in llama("ListDeltas").deltas} == {0}
    answer = llama("Generate", deltas=["lora"], inputs=[pb.Input(ids=[5])], sampling=pb.Sampling(max_new_tokens=3))
    assert len(answer.results[0].samples[0].ids) <= 3


def test_cancelled_unary_calls_leave_nothing_behind(llama: Any) -> None:
    request = pb.GenerateRequest(
        deltas=["lora"], inputs=[pb.Input(ids=[5])] * 8, sampling=pb.Sampling(max_new_tokens=3000, ignore_eos=True)
    )
    calls = [llama.inference.Generate.future(request, timeout=60) for _ in range(6)]
    assert eventually(lambda: llama.app.engine.stats().running > 0)
    for call in calls:
        call.cancel()
    assert eventually(llama.idle)
    assert eventually(lambda: llama("GetDelta", name="lora").delta.in_flight == 0)


def test_a_deadline_ends_a_stream_and_frees_it(llama: Any) -> None:
    stream = llama.inference.StreamGenerate(asked(tokens=4000), timeout=0.4)
    with pytest.raises(grpc.RpcError) as late:
        list(stream)
    assert late.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert eventually(llama.idle)


def test_callers_without_a_deadline_get_the_servers(called: Any, llama: Any) -> None:
    server = called("llama", request_timeout=0.4)
    stream = server.inference.StreamGenerate(asked("", 4000))
    next(stream)
    with pytest.raises(grpc.RpcError) as late:
        list(stream)
    assert late.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert "the deadline passed after" in late.value.details()
    assert eventually(server.idle)


def test_a_server_that_leaves_lets_what_runs_finish(start: Any, made: Any, llama: Any) -> None:
    running = start(made("llama").backbone, delta=(f"lora={llama.root / 'lora'}",))
    with grpc.insecure_channel(running.address) as channel:
        stub, health = _stubs(channel)
        streams = [stub.StreamGenerate(asked(tokens=60), timeout=60) for _ in range(20)]
        for stream in streams:
            next(stream)
        assert _health(health) == "SERVING"
        leaving = asyncio.run_coroutine_threadsafe(running.app.stop(30), running.loop)
        assert [sum(len(p.ids) for p in stream) for stream in streams] == [59] * 20
        leaving.result(30)


def test_a_server_that_leaves_ends_what_does_not_finish(start: Any, made: Any, llama: Any) -> None:
    running = start(made("llama").backbone, delta=(f"lora={llama.root / 'lora'}",), max_running=8)
    with grpc.insecure_channel(running.address) as channel:
        stub, health = _stubs(channel)
        streams = [stub.StreamGenerate(asked(tokens=4000), timeout=60)]
        next(streams[0])
        streams += [stub.StreamGenerate(asked(tokens=4000), timeout=60) for _ in range(29)]
        watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=60)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        leaving = asyncio.run_coroutine_threadsafe(running.app.stop(0.5), running.loop)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.RpcError) as refused:  # at once, not after the drain
            list(stub.StreamGenerate(asked(tokens=1), timeout=5))
        assert refused.value.code() == UNAVAILABLE
        for stream in streams:
            with pytest.raises(grpc.RpcError) as ended:
                list(stream)
            assert ended.value.code() == UNAVAILABLE
            assert "shutting down" in ended.value.details()
        leaving.result(30)
    stats = running.app.engine.stats()
    assert (stats.running, stats.waiting, stats.pins, stats.kv_used_tokens) == (0, 0, 0, 0)


def test_an_engine_that_dies_ends_the_server_with_its_cause(start: Any, made: Any, llama: Any) -> None:
    """Whoever waits gets an answer, and `ended` raises what killed the engine."""
    running = start(made("llama").backbone)
    ended = asyncio.run_coroutine_threadsafe(running.app.ended(), running.loop)
    with grpc.insecure_channel(running.address) as channel:
        stub, _ = _stubs(channel)
        stream = stub.StreamGenerate(asked("", 4000), timeout=60)
        next(stream)
        running.app.engine._post(lambda: 1 / 0)
        with pytest.raises(grpc.RpcError) as failed:
            list(stream)
        assert failed.value.code() == grpc.StatusCode.INTERNAL
        with pytest.raises(ZeroDivisionError):
            ended.result(20)
        with pytest.raises(grpc.RpcError) as refused:
            list(stub.StreamGenerate(asked("", 1), timeout=5))
        assert refused.value.code() in (UNAVAILABLE, grpc.StatusCode.INTERNAL)
    running.stop()


def _stubs(channel: grpc.Channel) -> tuple[Any, Any]:
    from deltaserve_protos.v1 import inference_pb2_grpc

    return inference_pb2_grpc.InferenceServiceStub(channel), health_pb2_grpc.HealthStub(channel)


def _health(stub: Any) -> str:
    status = stub.Check(health_pb2.HealthCheckRequest(), timeout=5).status
    return health_pb2.HealthCheckResponse.ServingStatus.Name(status)
