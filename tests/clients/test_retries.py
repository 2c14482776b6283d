"""UNAVAILABLE is tried again, three times in all, while nothing of an answer has come; nothing else is."""

from typing import Any

import grpc
import pytest

from deltaserve_client import FailedPrecondition, Unavailable
from deltaserve_protos.v1 import deltas_pb2, inference_pb2

ANSWERS = {
    "generate": ("Generate", inference_pb2.GenerateResponse(delta="d@1")),
    "stream": ("StreamGenerate", inference_pb2.StreamGenerateResponse(delta="d@1")),
    "deltas.load": ("LoadDelta", deltas_pb2.LoadDeltaResponse()),
    "deltas.unload": ("UnloadDelta", deltas_pb2.UnloadDeltaResponse()),
}


def arguments(method: str) -> tuple[tuple[str, ...], dict[str, str]]:
    return {"deltas.load": (("d", "folder"), {}), "deltas.unload": (("d",), {})}.get(method, (("a",), {"delta": "d"}))


def fail_first(server: Any, method: str, times: int, code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> None:
    name, answer = ANSWERS[method]
    server.answers(name, answer)
    works = server.behaves[name]

    async def behave(request: Any, context: Any) -> Any:
        if len(server.requests) <= times:
            await context.abort(code, "not now")
        return await works(request, context)

    server.behaves[name] = behave


@pytest.mark.parametrize("method", ["generate", "stream", "deltas.load"])
async def test_unavailable_twice(ask: Any, server: Any, method: str) -> None:
    fail_first(server, method, 2)
    args, told = arguments(method)
    assert await ask(method, *args, **told)
    assert len(server.requests) == 3
    assert all(request == server.requests[0] for request in server.requests)


@pytest.mark.parametrize("method", ["generate", "stream"])
async def test_unavailable_for_good(ask: Any, server: Any, method: str) -> None:
    fail_first(server, method, 9)
    with pytest.raises(Unavailable):
        await ask(method, "a", delta="d")
    assert len(server.requests) == 3


async def test_unload_is_not_run_twice(ask: Any, server: Any) -> None:
    fail_first(server, "deltas.unload", 9)
    with pytest.raises(Unavailable):
        await ask("deltas.unload", "d")
    assert len(server.requests) == 1


async def test_other_statuses_are_final(ask: Any, server: Any) -> None:
    fail_first(server, "generate", 9, grpc.StatusCode.FAILED_PRECONDITION)
    with pytest.raises(FailedPrecondition):
        await ask("generate", "a", delta="d")
    assert len(server.requests) == 1
