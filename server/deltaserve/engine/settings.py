"""What the operator decides about the engine, and the limits that follow from it and from the backbone."""

from dataclasses import dataclass

from deltaserve.backbone.model import Backbone
from deltaserve.engine.request import Limits
from deltaserve.errors import InvalidArgument

_BATCH_TOKENS = 2048
_LONGEST_WHOLE = 8192


@dataclass(frozen=True)
class EngineSettings:
    """Budgets. None is decided from the backbone and the machine. Bytes and seconds."""

    pool_bytes: int
    kv_bytes: int | None = None
    max_model_len: int | None = None
    max_batch_tokens: int | None = None
    max_running: int = 64
    max_queued: int = 1024
    batch_wait: float = 0.0
    threads: int | None = None
    delta_dtype: str = "auto"


def limits(backbone: Backbone, settings: EngineSettings) -> Limits:
    """Raises InvalidArgument for a length that the backbone has no positions for."""
    positions = backbone.spec.max_positions
    length = settings.max_model_len or backbone.default_length
    if positions is not None and length > positions:
        raise InvalidArgument(
            f"--max-model-len {length}: this backbone has {positions} positions", field="max_model_len"
        )
    # What is not chunkable must fit one forward beside the rows that decode.
    least = min(length, _LONGEST_WHOLE) + 1 + settings.max_running
    rows = max(settings.max_batch_tokens or _BATCH_TOKENS, least)
    return Limits(length, rows, settings.max_running, settings.max_queued)
