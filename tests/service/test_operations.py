"""What operators and their tools see: health, reflection, bytes that are no message, metrics, what the server says."""

import re
import time
import urllib.request
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from deltaserve.errors import FailedPrecondition
from deltaserve_protos.v1 import inference_pb2 as pb

ASK: dict[str, Any] = {"inputs": [pb.Input(ids=[5, 6])], "sampling": pb.Sampling(max_new_tokens=4, ignore_eos=True)}
SERVICES = ("deltaserve.v1.InferenceService", "deltaserve.v1.DeltaService")


def test_health(gpt2: Any) -> None:
    stub = health_pb2_grpc.HealthStub(gpt2.channel)
    for service in ("", *SERVICES):
        answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as unknown:
        stub.Check(health_pb2.HealthCheckRequest(service="other"), timeout=5)
    assert unknown.value.code() == grpc.StatusCode.NOT_FOUND


def test_reflection(gpt2: Any) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(gpt2.channel)
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    (answer,) = stub.ServerReflectionInfo(iter([asked]), timeout=5)
    assert {*SERVICES, "grpc.health.v1.Health"} <= {s.name for s in answer.list_services_response.service}


def test_a_taken_port_is_told_by_its_flag(gpt2: Any, start: Any, made: Any) -> None:
    """With SO_REUSEPORT two servers would share the port."""
    for flag, address in (("grpc_port", gpt2.running.address), ("metrics_port", gpt2.running.metrics)):
        with pytest.raises(FailedPrecondition, match="--" + flag.replace("_", "-")) as taken:
            start(made("gpt2").backbone, **{flag: int(address.rpartition(":")[2])})
        assert taken.value.reason == "PORT_TAKEN"


@pytest.mark.parametrize("method", ["Generate", "StreamGenerate", "Embed"])
def test_bytes_that_are_no_message(gpt2: Any, method: str) -> None:
    path = f"/deltaserve.v1.InferenceService/{method}"
    kind = gpt2.channel.unary_stream if method == "StreamGenerate" else gpt2.channel.unary_unary
    with pytest.raises(grpc.RpcError) as refused:
        list(kind(path)(b"\xff\xff\xff", timeout=5))
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "not a message of its type" in refused.value.details()
    assert "UNDECODABLE" in str(dict(refused.value.trailing_metadata())["grpc-status-details-bin"])


def test_a_message_that_is_too_large(called: Any) -> None:
    server = called("gpt2", max_message_bytes=2000)
    failure = server.fails("Generate", backbone=True, inputs=[pb.Input(text="a" * 3000)])
    assert failure.code == "RESOURCE_EXHAUSTED"
    assert server("Generate", backbone=True, **ASK).results


def test_every_answer_has_the_servers_own_request_id(gpt2: Any) -> None:
    ids = set()
    for _ in range(2):
        call = gpt2.inference.Embed.with_call(
            pb.EmbedRequest(backbone=True, inputs=ASK["inputs"]), metadata=(("x-request-id", "mine"),), timeout=5
        )[1]
        ids.add(dict(call.initial_metadata())["x-request-id"])
    assert len(ids) == 2 and "mine" not in ids


def test_what_the_server_says_of_itself(gpt2: Any, bert: Any, llama: Any) -> None:
    info = gpt2("GetServerInfo")
    assert (info.family, info.device, info.dtype) == ("gpt2", "cpu", "float32")
    assert info.backbone == str(gpt2.made.backbone) and info.has_tokenizer
    assert list(info.tasks) == ["classify", "embed", "generate", "score"] and "lora" in info.kinds
    assert list(bert("GetServerInfo").tasks) == ["classify", "embed"]
    assert not llama("GetServerInfo").has_tokenizer
    model = gpt2.made.model()
    assert info.parameters == sum(p.numel() for p in model.parameters())
    assert info.memory.backbone_bytes == 4 * info.parameters
    assert (info.limits.max_model_len, info.limits.max_inputs, info.limits.max_running) == (64, 64, 64)
    assert info.limits.max_message_bytes == 16 << 20 and info.limits.max_queued == 1024
    assert info.memory.kv_capacity_bytes <= 16 << 20 and info.memory.pool_capacity_bytes <= 16 << 20
    assert info.version and info.uptime > 0 and not info.steps


def test_steps_tell_which_deltas_shared_a_forward(called: Any, gpt2: Any) -> None:
    server = called("gpt2", batch_wait_ms=300)
    for name in ("lora", "prompt"):
        server.load(name)
    calls = [
        server.inference.Generate.future(pb.GenerateRequest(**who, **ASK), timeout=60)
        for who in ({"deltas": ["lora"]}, {"deltas": ["prompt"]}, {"backbone": True})
    ]
    for call in calls:
        call.result()
    steps = server("GetServerInfo", steps=True).steps
    assert [step.index for step in steps] == list(range(1, len(steps) + 1))
    mixed = [step for step in steps if step.sequences == 3]
    assert mixed and mixed[0].phase == "prefill" and mixed[0].rows == 3 * 2 + 6
    for step in mixed:
        assert sorted(step.deltas) == ["lora@1", "prompt@1"] and len(set(step.slots)) == 2
        assert list(step.kinds) == ["lora", "prompt-tuning"] and step.duration > 0
        assert abs(step.started - time.time()) < 60
    assert {step.phase for step in mixed[1:]} == {"decode"}


def _scrape(server: Any) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    with urllib.request.urlopen(f"http://{server.running.metrics}/metrics", timeout=5) as page:
        text = page.read().decode()
    families = list(text_string_to_metric_families(text))
    for family in families:
        assert family.documentation and re.fullmatch("deltaserve_[a-z_]+", family.name)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


NAMES = {
    "requests_total", "request_duration_seconds_count", "time_to_first_token_seconds_count",
    "time_per_output_token_seconds_count", "input_tokens_total", "output_tokens_total", "rejections_total",
    "step_duration_seconds_count", "batch_rows_count", "batch_deltas_count", "batch_kinds_count", "requests_running",
    "requests_waiting", "kv_cache_usage_ratio", "pool_bytes", "pool_capacity_bytes", "deltas_resident",
    "combinations_resident",
    "delta_loads_total", "delta_load_duration_seconds_count", "build_info", "config_info",
}  # fmt: skip


def test_metrics_count_what_happened(called: Callable[..., Any], gpt2: Any) -> None:
    server = called("gpt2", max_queued=4)
    server.load("lora")
    server.load("mood")
    server.fails("LoadDelta", name="x", source="nowhere")
    server("Generate", deltas=["lora"], **ASK)
    server("StreamGenerate", deltas=["lora"], **ASK | {"inputs": ASK["inputs"] * 2})
    server("Classify", deltas=["mood"], inputs=ASK["inputs"])
    server("Score", backbone=True, inputs=ASK["inputs"],
           continuations=[{"continuations": [pb.Continuation(ids=[5, 6, 7])]}])  # fmt: skip
    server.fails("Generate", deltas=["unknown"], **ASK)
    found = _scrape(server)
    assert {name.removeprefix("deltaserve_") for name, _ in found} >= NAMES - {"rejections_total"}

    def value(name: str, **labels: str) -> float:
        return found[(f"deltaserve_{name}", tuple(sorted(labels.items())))]

    assert value("requests_total", task="generate", code="OK", delta="lora") == 2
    assert value("requests_total", task="classify", code="OK", delta="mood") == 1
    assert value("requests_total", task="score", code="OK", delta="") == 1
    assert value("requests_total", task="generate", code="NOT_FOUND", delta="") == 1
    assert value("input_tokens_total", delta="lora") == 2 + 4
    assert value("output_tokens_total", delta="lora") == 4 + 8
    assert value("output_tokens_total", delta="") == 3
    assert value("time_to_first_token_seconds_count", task="generate") == 3
    assert value("time_per_output_token_seconds_count") == 3 * 3
    assert value("delta_loads_total", **{"from": "disk", "outcome": "ok"}) == 2
    assert value("delta_loads_total", **{"from": "disk", "outcome": "FAILED_PRECONDITION"}) == 1
    assert value("deltas_resident", tier="device", kind="lora") == 2
    assert value("pool_bytes", tier="device") == server("GetServerInfo").memory.pool_used_bytes
    steps = server("GetServerInfo", steps=True).steps
    assert value("batch_rows_sum") == sum(step.rows for step in steps)
    assert sum(v for (name, _), v in found.items() if name == "deltaserve_step_duration_seconds_count") == len(steps)


def test_refusals_are_counted_by_reason(called: Callable[..., Any], llama: Any) -> None:
    server = called("llama", max_queued=1, max_running=1)
    long = pb.StreamGenerateRequest(
        backbone=True, inputs=ASK["inputs"], sampling=pb.Sampling(max_new_tokens=4000, ignore_eos=True)
    )
    streams = [server.inference.StreamGenerate(long, timeout=60)]
    next(streams[0])
    streams.append(server.inference.StreamGenerate(long, timeout=60))
    while server("GetServerInfo").waiting == 0:
        time.sleep(0.01)
    assert server.fails("Embed", backbone=True, inputs=ASK["inputs"]).reason == "QUEUE_FULL"
    assert _scrape(server)[("deltaserve_rejections_total", (("reason", "queue_full"),))] == 1
    for stream in streams:
        stream.cancel()
