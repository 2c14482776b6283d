"""Around every RPC, of all four kinds: a request id, the metrics, one log line, and errors that became statuses."""

import asyncio
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError

from deltaserve.errors import DeltaserveError, Internal, InvalidArgument
from deltaserve.metrics import Metrics
from deltaserve.service import status
from deltaserve.service.call import Call

log = structlog.get_logger("deltaserve.service")

Behaviour = Callable[[Any, Any], Any]

TASKS = {
    "/deltaserve.v1.InferenceService/Generate": "generate",
    "/deltaserve.v1.InferenceService/StreamGenerate": "generate",
    "/deltaserve.v1.InferenceService/Classify": "classify",
    "/deltaserve.v1.InferenceService/Embed": "embed",
    "/deltaserve.v1.InferenceService/Score": "score",
}
"""What the metrics call a method; any other is `control`."""

_VERSIONS = re.compile(r"@[0-9]+")

OURS = "/deltaserve."
"""What all our methods begin with."""

REJECTED = frozenset({grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE})

_MAKE = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}
_FIELD = {
    (False, False): "unary_unary",
    (False, True): "unary_stream",
    (True, False): "stream_unary",
    (True, True): "stream_stream",
}


@dataclass(frozen=True)
class _Undecodable:
    """Stands for a request whose bytes are no message of its type."""

    why: str


class Interceptor(grpc.aio.ServerInterceptor):
    """`metrics` may only be called from the event loop, which is where this runs."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._open = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def idle(self, seconds: float) -> None:
        """Returns when no call of our services runs, or after `seconds`."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None
        kind = (bool(handler.request_streaming), bool(handler.response_streaming))
        inner: Behaviour = getattr(handler, _FIELD[kind])
        around = self._streamed if kind[1] else self._single
        method = str(handler_call_details.method)

        async def behave(request: Any, context: Any) -> Any:
            call = _call(method, context)
            checked = _each(request) if kind[0] else request
            with self._counted(method):
                return await self._guarded(call, lambda: around(inner, checked, call))

        return _MAKE[kind](
            behave,
            request_deserializer=_forgiving(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )

    @contextmanager
    def _counted(self, method: str) -> Iterator[None]:
        ours = method.startswith(OURS)
        self._open += ours
        if self._open:
            self._idle.clear()
        try:
            yield
        finally:
            self._open -= ours
            if not self._open:
                self._idle.set()

    @staticmethod
    async def _single(inner: Behaviour, request: Any, call: Call) -> Any:
        return await inner(_decoded(request), call)

    @staticmethod
    async def _streamed(inner: Behaviour, request: Any, call: Call) -> None:
        """Both styles: an async generator, and a coroutine that writes by itself."""
        answers = inner(_decoded(request), call)
        if not hasattr(answers, "__aiter__"):
            await answers
            return
        async with aclosing(answers):
            async for answer in answers:
                await call.context.write(answer)

    async def _guarded(self, call: Call, work: Callable[[], Awaitable[Any]]) -> Any:
        code = grpc.StatusCode.OK
        error: DeltaserveError | None = None
        try:
            await call.context.send_initial_metadata((("x-request-id", call.request_id),))
            return await work()
        except asyncio.CancelledError:
            code = grpc.StatusCode.DEADLINE_EXCEEDED if call.expired else grpc.StatusCode.CANCELLED
            raise
        except grpc.aio.AbortError:
            code = _coded(call.context.code())
            raise
        except grpc.aio.InternalError:
            # What gRPC raises where a caller left while an answer was being written; nobody is there to be told.
            code = grpc.StatusCode.DEADLINE_EXCEEDED if call.expired else grpc.StatusCode.CANCELLED
            return None
        except Exception as caught:
            error = self._told(call, caught)
            code = status.code(error)
            await call.context.abort(code, status.shown(error), status.details(error, call.request_id))
        finally:
            self._ended(call, code, error)

    def _told(self, call: Call, caught: Exception) -> DeltaserveError:
        """The error that the caller gets to see; what is our bug is logged whole and told as little as possible."""
        if isinstance(caught, DeltaserveError) and not isinstance(caught, Internal):
            return caught
        log.error("internal error", request_id=call.request_id, method=call.method, exc_info=caught)
        return status.unexpected(call.request_id)

    def _ended(self, call: Call, code: grpc.StatusCode, error: DeltaserveError | None) -> None:
        seconds = time.monotonic() - call.started
        self._metrics.request(call.task, code.name, _VERSIONS.sub("", call.delta), seconds)
        if code in REJECTED:
            self._metrics.rejection(error.reason if error else code.name)
        write = log.debug if code is grpc.StatusCode.OK else log.info
        told = {"error": error.message} if error else {}
        client = {"client_request_id": call.client_request_id} if call.client_request_id else {}
        write(
            "call",
            method=call.method,
            code=code.name,
            seconds=round(seconds, 4),
            delta=call.delta,
            request_id=call.request_id,
            **client,
            **told,
        )


def _call(method: str, context: Any) -> Call:
    call = Call(context, uuid.uuid4().hex, method, "", TASKS.get(method, "control"))
    call.client_request_id = call.metadata().get("x-request-id", "")[:128]
    return call


def _coded(code: Any) -> grpc.StatusCode:
    """grpc.aio keeps a code as its number or as its name, by version."""
    if isinstance(code, grpc.StatusCode):
        return code
    return next((known for known in grpc.StatusCode if known.value[0] == code), grpc.StatusCode.UNKNOWN)


def _forgiving(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """grpc.aio answers UNKNOWN, with the name of an exception, where a deserializer raises: so it must not."""
    if deserialize is None:
        return None

    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError as error:
            return _Undecodable(str(error))

    return read


def _decoded(request: Any) -> Any:
    if isinstance(request, _Undecodable):
        raise InvalidArgument(f"the request's bytes are not a message of its type: {request.why}", reason="UNDECODABLE")
    return request


async def _each(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _decoded(request)
