"""Statuses and their google.rpc details become exceptions, the same for calls and streams of both clients."""

import asyncio
import pickle
from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as Packed
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RequestInfo, RetryInfo
from google.rpc.status_pb2 import Status

import deltaserve_client
from deltaserve_client import errors

CLASSES = {
    "INVALID_ARGUMENT": "InvalidArgument", "NOT_FOUND": "NotFound", "ALREADY_EXISTS": "AlreadyExists",
    "FAILED_PRECONDITION": "FailedPrecondition", "RESOURCE_EXHAUSTED": "ResourceExhausted",
    "UNAVAILABLE": "Unavailable", "DEADLINE_EXCEEDED": "DeadlineExceeded", "CANCELLED": "Cancelled",
    "INTERNAL": "Internal", "DATA_LOSS": "DataLoss",
    "UNAUTHENTICATED": "Unauthenticated", "PERMISSION_DENIED": "PermissionDenied",
}  # fmt: skip
CALLS = ["generate", "stream"]


def failing(code: str, message: str, *details: Any, more: tuple[tuple[str, Any], ...] = ()) -> Any:
    """What a method does that ends with this status."""

    async def behave(_: Any, context: Any) -> None:
        packed = [Packed() for _ in details]
        for place, detail in zip(packed, details, strict=True):
            place.Pack(detail)
        status = Status(code=grpc.StatusCode[code].value[0], message=message, details=packed).SerializeToString()
        rich = (("grpc-status-details-bin", status),) if details else ()
        await context.abort(grpc.StatusCode[code], message, (*rich, *more))

    return behave


async def raised(ask: Any, method: str, **told: Any) -> deltaserve_client.DeltaserveError:
    with pytest.raises(deltaserve_client.DeltaserveError) as caught:
        await ask(method, "a", delta="d", **told)
    return caught.value


@pytest.fixture
def fails(server: Any) -> Any:
    def both(*args: Any, **told: Any) -> None:
        server.behaves["Generate"] = server.behaves["StreamGenerate"] = failing(*args, **told)

    return both


@pytest.mark.parametrize("method", CALLS)
async def test_every_status_has_its_class(ask: Any, fails: Any, method: str) -> None:
    assert {code: kind.__name__ for code, kind in errors.BY_CODE.items()} == CLASSES
    for code, name in CLASSES.items():
        fails(code, "no", ErrorInfo(reason="WHY", domain="deltaserve"))
        error = await raised(ask, method)
        assert type(error) is getattr(deltaserve_client, name)
        assert (error.code, error.reason, error.message, str(error)) == (code, "WHY", "no", "no")


@pytest.mark.parametrize("method", CALLS)
async def test_all_details_arrive(ask: Any, fails: Any, method: str) -> None:
    retry = RetryInfo()
    retry.retry_delay.FromMilliseconds(1500)
    fails(
        "INVALID_ARGUMENT",
        "inputs[1] has 600 tokens, 512 are possible",
        ErrorInfo(reason="TOO_LONG", domain="deltaserve", metadata={"tokens": "600", "limit": "512"}),
        RequestInfo(request_id="00c0ffee"),
        retry,
        BadRequest(field_violations=[{"field": "inputs[1]", "description": "600"}]),
    )
    error = await raised(ask, method)
    assert isinstance(error, deltaserve_client.InvalidArgument)
    assert error.message == "inputs[1] has 600 tokens, 512 are possible"
    assert (error.reason, error.field, error.retry_after) == ("TOO_LONG", "inputs[1]", 1.5)
    assert (error.request_id, error.metadata) == ("00c0ffee", {"tokens": "600", "limit": "512"})


@pytest.mark.parametrize("method", CALLS)
async def test_bare_statuses_and_broken_details(ask: Any, fails: Any, method: str) -> None:
    fails("NOT_FOUND", "gone", more=(("x-request-id", "from-trailers"),))
    error = await raised(ask, method)
    assert (error.reason, error.field, error.retry_after, error.metadata) == ("NOT_FOUND", None, None, {})
    assert error.request_id == "from-trailers"
    fails("NOT_FOUND", "gone", more=(("grpc-status-details-bin", b"\xff\xff"),))
    assert (await raised(ask, method)).message == "gone"
    broken = Packed(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff\xff")
    status = Status(code=5, message="gone", details=[broken]).SerializeToString()
    fails("NOT_FOUND", "gone", more=(("grpc-status-details-bin", status),))
    assert (await raised(ask, method)).reason == "NOT_FOUND"
    fails("UNIMPLEMENTED", "what?")
    error = await raised(ask, method)
    assert (type(error), error.code) == (deltaserve_client.DeltaserveError, "UNIMPLEMENTED")


@pytest.mark.parametrize("method", CALLS)
async def test_nobody_there(ask_nobody: Any, method: str) -> None:
    error = await raised(ask_nobody, method)
    assert isinstance(error, deltaserve_client.Unavailable)
    assert error.reason == "UNREACHABLE"
    assert "127.0.0.1:1" in error.message
    with pytest.raises(deltaserve_client.Unavailable):
        await ask_nobody("healthy")


@pytest.mark.parametrize("method", CALLS)
async def test_time_out_reaches_the_server(ask: Any, server: Any, method: str) -> None:
    async def forever(_: Any, context: Any) -> None:
        assert 0 < context.time_remaining() < 1
        await asyncio.sleep(60)

    server.behaves["Generate"] = server.behaves["StreamGenerate"] = forever
    error = await raised(ask, method, timeout=0.2)
    assert isinstance(error, deltaserve_client.DeadlineExceeded)
    await asyncio.wait_for(server.cancelled.wait(), 5)


def test_errors_survive_pickling() -> None:
    error = deltaserve_client.NotFound("gone", reason="DELTA_NOT_FOUND", request_id="7", metadata={"a": "b"})
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))
    assert repr(again) == "NotFound('gone', reason='DELTA_NOT_FOUND', request_id='7')"
