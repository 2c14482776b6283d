"""What a call can raise. Each status of gRPC that the server uses is a class; the details say the rest.

DeltaserveError
├── InvalidArgument      the request is wrong, whatever the server's state; `field` names the part
├── NotFound             no such delta
├── AlreadyExists        the name is taken by another content
├── FailedPrecondition   the request is right, but this server, delta or checkpoint cannot serve it
├── ResourceExhausted    a limit is reached; `retry_after` says when to come back
├── Unavailable          starting, draining, or nobody answers at that address (reason UNREACHABLE)
├── DeadlineExceeded     no result within the time-out
├── Cancelled            the server gave the call up
├── DataLoss             bytes that were there are gone or changed
├── Unauthenticated      no key, or not a valid one
├── PermissionDenied     the key may not do this
└── Internal             the server's bug; `request_id` finds it in the server's log
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RequestInfo, RetryInfo
from google.rpc.status_pb2 import Status

DETAILS_KEY = "grpc-status-details-bin"
REQUEST_ID_KEY = "x-request-id"
UNREACHABLE = "UNREACHABLE"
"""The reason where nobody answered, or something that is no deltaserve did."""

Metadata = Iterable[tuple[str, str | bytes]]
Detail = TypeVar("Detail", bound=Message)


class DeltaserveError(Exception):
    """A call that failed. Where the status has no class of its own, this one is raised.

    `code` is the status (`NOT_FOUND`), `reason` a stable UPPER_SNAKE word for programs (`DELTA_NOT_FOUND`; the code
    where the server gave none), `message` says what happened and what to do, `field` names the request's field that is
    at fault, `retry_after` is in seconds, `request_id` is the server's name for the call, `metadata` holds the
    message's numbers.
    """

    code = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        reason: str | None = None,
        field: str | None = None,
        retry_after: float | None = None,
        request_id: str = "",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.reason = reason or self.code
        self.field = field
        self.retry_after = retry_after
        self.request_id = request_id
        self.metadata = dict(metadata or {})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.message!r}, reason={self.reason!r}, request_id={self.request_id!r})"


class InvalidArgument(DeltaserveError):
    code = "INVALID_ARGUMENT"


class NotFound(DeltaserveError):
    code = "NOT_FOUND"


class AlreadyExists(DeltaserveError):
    code = "ALREADY_EXISTS"


class FailedPrecondition(DeltaserveError):
    code = "FAILED_PRECONDITION"


class ResourceExhausted(DeltaserveError):
    code = "RESOURCE_EXHAUSTED"


class Unavailable(DeltaserveError):
    code = "UNAVAILABLE"


class DeadlineExceeded(DeltaserveError):
    code = "DEADLINE_EXCEEDED"


class Cancelled(DeltaserveError):
    code = "CANCELLED"


class DataLoss(DeltaserveError):
    code = "DATA_LOSS"


class Unauthenticated(DeltaserveError):
    code = "UNAUTHENTICATED"


class PermissionDenied(DeltaserveError):
    code = "PERMISSION_DENIED"


class Internal(DeltaserveError):
    code = "INTERNAL"


BY_CODE: Mapping[str, type[DeltaserveError]] = {kind.code: kind for kind in DeltaserveError.__subclasses__()}


def request_id(*metadata: Metadata | None) -> str:
    """The server's name for a call, from its initial and trailing metadata; empty where there is none."""
    found = (value for part in metadata for key, value in part or () if key == REQUEST_ID_KEY)
    return next((value for value in found if isinstance(value, str)), "")


def told(error: Any, address: str) -> DeltaserveError:
    """The exception for the grpc.RpcError that a call to `address` raised; such errors are also grpc.Calls."""
    code, message = error.code().name, error.details() or ""
    trailing = list(error.trailing_metadata() or ())
    details = _Details.of(trailing)
    info = details.first(ErrorInfo)
    if code == "UNAVAILABLE" and info is None:
        why = message.rpartition("last error: ")[2].removeprefix("UNKNOWN: ")
        return Unavailable(f"no answer from {address}: {why}", reason=UNREACHABLE)
    violations = details.first(BadRequest)
    retry = details.first(RetryInfo)
    named = details.first(RequestInfo)
    return BY_CODE.get(code, DeltaserveError)(
        message,
        code=code,
        reason=info.reason if info else None,
        field=violations.field_violations[0].field if violations and violations.field_violations else None,
        retry_after=retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9 if retry else None,
        request_id=named.request_id if named else request_id(error.initial_metadata(), trailing),
        metadata=info.metadata if info else None,
    )


@dataclass(frozen=True)
class _Details:
    """The google.rpc details of a status; none where it has none, or bytes that cannot be read."""

    status: Status

    @classmethod
    def of(cls, trailing: Metadata) -> "_Details":
        sent = next((value for key, value in trailing if key == DETAILS_KEY), b"")
        try:
            return cls(Status.FromString(sent if isinstance(sent, bytes) else sent.encode()))
        except DecodeError:
            return cls(Status())

    def first(self, kind: type[Detail]) -> Detail | None:
        """None too where its bytes cannot be read: the status and its message are told all the same."""
        detail = kind()
        packed = next((each for each in self.status.details if each.Is(kind.DESCRIPTOR)), None)
        try:
            return detail if packed is not None and packed.Unpack(detail) else None
        except DecodeError:
            return None
