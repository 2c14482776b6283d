"""One RPC while it runs."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Call:
    """What handlers get as their context. `task` and `delta` are for the metrics and the log; a handler sets them.

    Everything else is asked of gRPC's own context.
    """

    context: Any
    request_id: str
    method: str
    client_request_id: str
    task: str
    delta: str = ""
    started: float = field(default_factory=time.monotonic)

    def deadline(self, otherwise: float) -> float:
        """On time.monotonic()'s clock; `otherwise` is seconds, for a caller who brought none."""
        remaining = self.context.time_remaining()
        return time.monotonic() + (otherwise if remaining is None else max(float(remaining), 0.0))

    @property
    def expired(self) -> bool:
        remaining = self.context.time_remaining()
        return remaining is not None and remaining <= 0

    def metadata(self) -> Mapping[str, str]:
        return {key: value for key, value in self.context.invocation_metadata() or () if isinstance(value, str)}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.context, name)
