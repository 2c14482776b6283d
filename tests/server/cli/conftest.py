"""A server that speaks the contract and holds no model, and the command line run against it."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as Packed
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RequestInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from deltaserve.cli.program import run
from deltaserve_protos.v1 import deltas_pb2, deltas_pb2_grpc, inference_pb2, inference_pb2_grpc


@dataclass
class Server:
    """`answers` has a message for each method, a list of them for a stream, or an abort; `requests` is what it got."""

    address: str = ""
    answers: dict[str, Any] = field(default_factory=dict)
    requests: list[Any] = field(default_factory=list)

    def fails(self, method: str, code: str, message: str, *details: Message) -> None:
        self.answers[method] = (grpc.StatusCode[code], message, details)

    def method(self, name: str) -> Callable[[Any, Any, grpc.ServicerContext], Any]:
        def called(_: Any, request: Any, context: grpc.ServicerContext) -> Any:
            self.requests.append(request)
            answer = self.answers[name]
            if isinstance(answer, tuple):
                _abort(context, *answer)
            return iter(answer) if isinstance(answer, list) else answer

        return called


def _abort(context: grpc.ServicerContext, code: grpc.StatusCode, message: str, details: tuple[Message, ...]) -> None:
    packed = [Packed() for _ in details]
    for place, detail in zip(packed, details, strict=True):
        place.Pack(detail)
    status = Status(code=code.value[0], message=message, details=packed)
    context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
    context.abort(code, message)


@pytest.fixture(autouse=True)
def no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one of whoever runs the tests is not asked."""
    monkeypatch.delenv("DELTASERVE_ADDRESS", raising=False)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """DELTASERVE_ADDRESS leads to it."""
    server = Server()
    inference = type("Inference", (inference_pb2_grpc.InferenceServiceServicer,), {
        name: server.method(name) for name in ("Generate", "StreamGenerate", "Classify", "Embed", "Score")
    })  # fmt: skip
    deltas = type("Deltas", (deltas_pb2_grpc.DeltaServiceServicer,), {
        name: server.method(name) for name in ("LoadDelta", "UnloadDelta", "GetDelta", "ListDeltas", "GetServerInfo")
    })  # fmt: skip
    running = grpc.server(ThreadPoolExecutor(4))
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(inference(), running)
    deltas_pb2_grpc.add_DeltaServiceServicer_to_server(deltas(), running)
    probes = health.HealthServicer()
    probes.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(probes, running)
    server.address = f"127.0.0.1:{running.add_insecure_port('127.0.0.1:0')}"
    server.probes = probes  # type: ignore[attr-defined]
    running.start()
    monkeypatch.setenv("DELTASERVE_ADDRESS", server.address)
    yield server
    assert running.stop(0).wait(10)


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """`command("generate", "a")` is `deltaserve generate a` in a pipe."""

    def do(*arguments: str) -> Done:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run(arguments)
        said = capsys.readouterr()
        return Done(int(ended.value.code or 0), said.out, said.err)

    return do


@pytest.fixture
def delta() -> deltas_pb2.Delta:
    return deltas_pb2.Delta(
        name="acme/yes", version=2, state=deltas_pb2.DELTA_STATE_RESIDENT, kinds=["lora", "head"], sites=24,
        parameters=1_500_000, device_bytes=3 << 20, warnings=["made for [bold]another[/bold] backbone"],
        task=deltas_pb2.TASK_SEQUENCE_CLASSIFICATION, labels=["no", "yes"], guessed=["labels"], source="yes-lora",
        format="peft", task_id=3,
    )  # fmt: skip


@pytest.fixture
def unknown_delta() -> tuple[Message, ...]:
    return (
        ErrorInfo(reason="DELTA_NOT_FOUND", domain="deltaserve"),
        RequestInfo(request_id="00c0ffee"),
        RetryInfo(retry_delay={"seconds": 2}),
        BadRequest(field_violations=[{"field": "deltas[0]"}]),
    )


@pytest.fixture
def generated() -> inference_pb2.GenerateResponse:
    token = {"chosen": {"id": 7, "token": "ja", "logprob": float("-inf"), "rank": 1}}
    samples = [{"text": "[bold]ja[/bold]", "ids": [7], "finish_reason": "FINISH_REASON_STOP", "logprobs": [token]}]
    return inference_pb2.GenerateResponse(results=[{"samples": samples}], delta="acme/yes@2")
