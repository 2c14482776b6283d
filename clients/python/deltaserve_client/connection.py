"""How both clients connect: where to, how long, what is tried again."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

DEFAULT_ADDRESS = "127.0.0.1:9000"
ADDRESS_VARIABLE = "DELTASERVE_ADDRESS"

_TRIED_AGAIN = (
    {"service": "deltaserve.v1.InferenceService"},
    {"service": "deltaserve.v1.DeltaService", "method": "LoadDelta"},
    {"service": "deltaserve.v1.DeltaService", "method": "GetDelta"},
    {"service": "deltaserve.v1.DeltaService", "method": "ListDeltas"},
    {"service": "deltaserve.v1.DeltaService", "method": "GetServerInfo"},
)
"""What may run twice: all but UnloadDelta, whose second run would not find what the first one took out."""

_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": list(_TRIED_AGAIN),
            "retryPolicy": {
                "maxAttempts": 3,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 3,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
    "retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1},
}


@dataclass(frozen=True)
class Connection:
    """`address` is host:port; `timeout` is in seconds, None for none. UNAVAILABLE is tried three times.

    gRPC tries again as long as nothing of an answer has come, so a stream is never begun twice.
    """

    address: str
    timeout: float | None

    @classmethod
    def to(cls, address: str | None, timeout: float | None) -> "Connection":
        """`address` None is $DELTASERVE_ADDRESS, else 127.0.0.1:9000."""
        return cls(address or os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS, timeout)

    @property
    def options(self) -> Sequence[tuple[str, str | int]]:
        return (
            ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
        )

    def seconds(self, asked: float | None) -> float | None:
        return self.timeout if asked is None else asked
