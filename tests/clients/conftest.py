"""A server that speaks the contract and holds no model, to see what the client sends and how it takes the answers."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health

from deltaserve_client import AsyncClient, Client
from deltaserve_protos.v1 import deltas_pb2, deltas_pb2_grpc, inference_pb2, inference_pb2_grpc

REQUEST_ID = "00c0ffee"
SECONDS = 10
METHODS = ("Generate", "StreamGenerate", "Classify", "Embed", "Score")
METHODS += ("LoadDelta", "UnloadDelta", "GetDelta", "ListDeltas", "GetServerInfo")

Behaviour = Callable[[Any, Any], Awaitable[Any]]


@dataclass
class Server:
    """`behaves[method]` is what it does; `requests` and `metadata` are what it got, in order."""

    address: str = ""
    behaves: dict[str, Behaviour] = field(default_factory=dict)
    requests: list[Any] = field(default_factory=list)
    metadata: list[Mapping[str, str]] = field(default_factory=list)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    def answers(self, method: str, *messages: Any) -> None:
        """The method answers with this message, or streams these."""

        async def behave(_: Any, context: Any) -> Any:
            await context.send_initial_metadata((("x-request-id", REQUEST_ID),))
            if method != "StreamGenerate":
                return messages[0]
            for message in messages:
                await context.write(message)
            return None

        self.behaves[method] = behave

    def method(self, name: str) -> Behaviour:
        async def called(_: Any, request: Any, context: Any) -> Any:
            self.requests.append(request)
            self.metadata.append(dict(context.invocation_metadata()))
            try:
                return await self.behaves[name](request, context)
            except asyncio.CancelledError:
                self.cancelled.set()
                raise

        return called  # type: ignore[return-value]


@asynccontextmanager
async def serving(server: Server) -> AsyncIterator[None]:
    methods = {name: server.method(name) for name in METHODS}
    inference = type("Inference", (inference_pb2_grpc.InferenceServiceServicer,), methods)
    deltas = type("Deltas", (deltas_pb2_grpc.DeltaServiceServicer,), methods)
    running = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(inference(), running)
    deltas_pb2_grpc.add_DeltaServiceServicer_to_server(deltas(), running)
    probes = health.HealthServicer()
    await probes.set("", health_pb2.HealthCheckResponse.SERVING)
    await probes.set("leaving", health_pb2.HealthCheckResponse.NOT_SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(probes, running)
    server.address = f"127.0.0.1:{running.add_insecure_port('127.0.0.1:0')}"
    await running.start()
    try:
        yield
    finally:
        await asyncio.wait_for(running.stop(0), SECONDS)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    async with serving(server):
        yield server


class Asked:
    """One of the two clients, so that a test says once what holds for both."""

    def __init__(self, client: Client | AsyncClient) -> None:
        self.client = client
        self.blocks = isinstance(client, Client)

    async def __call__(self, method: str, *args: Any, **told: Any) -> Any:
        """The result of `client.<method>`; `deltas.load` and its like too. A stream or a list comes as a list."""
        target: Any = self.client
        for part in method.split("."):
            target = getattr(target, part)
        many = method in ("stream", "deltas.list")
        if self.blocks:
            return await self.blocking(lambda: list(target(*args, **told)) if many else target(*args, **told))
        async with asyncio.timeout(SECONDS):
            return [each async for each in target(*args, **told)] if many else await target(*args, **told)

    @staticmethod
    async def blocking(work: Callable[[], Any]) -> Any:
        async with asyncio.timeout(SECONDS):
            return await asyncio.to_thread(work)


@asynccontextmanager
async def asking(kind: str, address: str, timeout: float | None = SECONDS) -> AsyncIterator[Asked]:
    if kind == "sync":
        with Client(address, timeout=timeout) as client:
            yield Asked(client)
    else:
        async with AsyncClient(address, timeout=timeout) as client:
            yield Asked(client)


@pytest.fixture(params=["sync", "async"])
async def ask(request: pytest.FixtureRequest, server: Server) -> AsyncIterator[Asked]:
    async with asking(request.param, server.address) as asked:
        yield asked


@pytest.fixture(params=["sync", "async"])
async def ask_nobody(request: pytest.FixtureRequest) -> AsyncIterator[Asked]:
    """Port 1 of the loopback: nobody listens there."""
    async with asking(request.param, "127.0.0.1:1") as asked:
        yield asked


@pytest.fixture
def generated() -> inference_pb2.GenerateResponse:
    """A whole answer: every field of every message in it is set."""
    token = inference_pb2.TokenLogprob(id=7, token="ja", logprob=-0.5, rank=1)
    position = inference_pb2.PositionLogprobs(chosen=token, top=[token, token])
    sample = inference_pb2.Sample(
        text="ja", ids=[7, 1], finish_reason=inference_pb2.FINISH_REASON_STOP, stop="!", logprobs=[position]
    )
    generation = inference_pb2.Generation(samples=[sample], input_tokens=3, prompt_logprobs=[position])
    usage = inference_pb2.Usage(input_tokens=3, output_tokens=2)
    return inference_pb2.GenerateResponse(results=[generation], usage=usage, delta="acme/yes@2")


@pytest.fixture
def pieces() -> list[inference_pb2.StreamGenerateResponse]:
    usage = inference_pb2.Usage(input_tokens=3, output_tokens=2)
    return [
        inference_pb2.StreamGenerateResponse(text="j", ids=[5], delta="acme/yes@2"),
        inference_pb2.StreamGenerateResponse(
            text="a", ids=[6], finish_reason=inference_pb2.FINISH_REASON_LENGTH, usage=usage, delta="acme/yes@2"
        ),
    ]


@pytest.fixture
def delta() -> deltas_pb2.Delta:
    return deltas_pb2.Delta(
        name="acme/yes", version=2, state=deltas_pb2.DELTA_STATE_RESIDENT, kinds=["lora", "head"], sites=24,
        parameters=1000, file_bytes=4100, device_bytes=4096, tensors_matched=48, warnings=["odd"],
        content_hash="ab" * 32, task=deltas_pb2.TASK_SEQUENCE_CLASSIFICATION, labels=["no", "yes"],
        problem_type=deltas_pb2.PROBLEM_TYPE_SINGLE_LABEL_CLASSIFICATION, guessed=["labels"], source="yes-lora",
        format="peft", in_flight=1, base_model="bert", task_id=3, shared_bytes=8192,
    )  # fmt: skip
