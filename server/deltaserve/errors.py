"""What can go wrong for a caller, as types; `service` turns them into gRPC statuses.

DeltaserveError
├── InvalidArgument      the request is wrong, whatever the server's state
├── NotFound             no such delta (or not visible to the caller)
├── AlreadyExists        the name is taken by another content
├── FailedPrecondition   the request is right, but this server, delta or checkpoint cannot serve it
│   └── BadCheckpoint    a checkpoint that cannot be lowered; says which tensor or key, and what was expected
├── ResourceExhausted    a limit that others use up now; try again later
├── Unavailable          starting or draining; try elsewhere
├── DeadlineExceeded     the request's deadline passed before its result
├── Cancelled            the caller went away
├── DataLoss             bytes that were there are gone or changed
└── Internal             our bug
"""

from collections.abc import Mapping


class DeltaserveError(Exception):
    """An error that a caller gets to see.

    `message` says what happened, to what, expected against found, and what to do. `reason` is a stable UPPER_SNAKE
    word for programs. `field` names the request's field that is at fault. `metadata` holds the numbers of the message.
    """

    status = "UNKNOWN"
    reason = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        field: str | None = None,
        metadata: Mapping[str, str] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or type(self).reason
        self.field = field
        self.metadata = dict(metadata or {})
        self.retry_after = retry_after


class InvalidArgument(DeltaserveError):
    status, reason = "INVALID_ARGUMENT", "BAD_REQUEST"


class NotFound(DeltaserveError):
    status, reason = "NOT_FOUND", "DELTA_NOT_FOUND"


class AlreadyExists(DeltaserveError):
    status, reason = "ALREADY_EXISTS", "DELTA_EXISTS"


class FailedPrecondition(DeltaserveError):
    status, reason = "FAILED_PRECONDITION", "NOT_SERVED_HERE"


class BadCheckpoint(FailedPrecondition):
    reason = "BAD_CHECKPOINT"


class ResourceExhausted(DeltaserveError):
    status, reason = "RESOURCE_EXHAUSTED", "OVERLOADED"


class Unavailable(DeltaserveError):
    status, reason = "UNAVAILABLE", "DRAINING"


class DeadlineExceeded(DeltaserveError):
    status, reason = "DEADLINE_EXCEEDED", "DEADLINE"


class Cancelled(DeltaserveError):
    status, reason = "CANCELLED", "CANCELLED"


class DataLoss(DeltaserveError):
    status, reason = "DATA_LOSS", "CONTENT_CHANGED"


class Internal(DeltaserveError):
    status, reason = "INTERNAL", "BUG"
