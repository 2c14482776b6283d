"""Errors as gRPC statuses with google.rpc details."""

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RequestInfo, RetryInfo
from google.rpc.status_pb2 import Status

from deltaserve.errors import DeltaserveError, Internal

DOMAIN = "deltaserve"
DETAILS_KEY = "grpc-status-details-bin"
LONGEST = 2000
"""Characters of a message; it travels in a header, and clients refuse long ones."""

_RETRY_AFTER = {"RESOURCE_EXHAUSTED": 1.0, "UNAVAILABLE": 2.0}
"""Seconds, where the error itself says nothing."""


def code(error: DeltaserveError) -> grpc.StatusCode:
    return grpc.StatusCode[error.status]


def details(error: DeltaserveError, request_id: str) -> tuple[tuple[str, bytes], ...]:
    """Trailing metadata for an error: ErrorInfo, RequestInfo, and RetryInfo or BadRequest where they apply."""
    parts: list[Message] = [
        ErrorInfo(reason=error.reason, domain=DOMAIN, metadata={k: v[:LONGEST] for k, v in error.metadata.items()}),
        RequestInfo(request_id=request_id),
    ]
    retry = error.retry_after if error.retry_after is not None else _RETRY_AFTER.get(error.status)
    if retry is not None:
        parts.append(RetryInfo(retry_delay=Duration(seconds=int(retry), nanos=int(retry % 1 * 1e9))))
    if error.status == "INVALID_ARGUMENT" and error.field:
        violation = BadRequest.FieldViolation(field=error.field, description=shown(error), reason=error.reason)
        parts.append(BadRequest(field_violations=[violation]))
    status = Status(code=code(error).value[0], message=shown(error), details=[_packed(part) for part in parts])
    return ((DETAILS_KEY, status.SerializeToString()),)


def shown(error: DeltaserveError) -> str:
    return error.message if len(error.message) <= LONGEST else error.message[: LONGEST - 1] + "…"


def unexpected(request_id: str) -> Internal:
    """What a caller gets to see of a bug."""
    return Internal(f"internal error, request id {request_id}; the server's log has the rest")


def _packed(part: Message) -> Any:
    packed = Any()
    packed.Pack(part)
    return packed
