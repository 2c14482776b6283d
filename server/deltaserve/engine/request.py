"""What the service gives the engine, and what it gets back. No torch here.

A call with many inputs and samples becomes one `Request` for each; every one of them ends in exactly one `Finished` or
`Failed`, whatever happens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from deltaserve.deltas.sites import Pooling
from deltaserve.errors import DeltaserveError


class Job(StrEnum):
    GENERATE = "generate"
    CLASSIFY = "classify"
    EMBED = "embed"
    SCORE = "score"


class FinishReason(StrEnum):
    STOP = "stop"  # an end token or a stop id
    LENGTH = "length"  # max_new_tokens


@dataclass(frozen=True)
class DeltaRef:
    """An immutable version of a delta, as the engine needs to know it before its bytes are there.

    `key` is unique for ever; `label` is `name@version`; `prompt_length`, `prompt_place`, `position_shift`, `invocation`
    and `whole` are the delta's.
    """

    key: int
    label: str
    kinds: tuple[str, ...]
    prompt_length: int = 0
    position_shift: int = 0
    invocation: tuple[int, ...] = ()
    prompt_place: int | None = None
    whole: bool = False


@dataclass(frozen=True)
class Sampling:
    """All defaults resolved. `temperature` 0 is greedy. `end_ids` are the end tokens that count (none with ignore_eos).

    `logprobs` and `prompt_logprobs`: alternatives to report at each position, None for nothing at all.
    `seed` already differs between the samples of one input; None draws one.
    """

    max_new_tokens: int
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    end_ids: frozenset[int] = frozenset()
    stop_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True)
class Request:
    """One sequence of work. `ids` are the input's tokens, special tokens included, soft-prompt rows not.

    GENERATE needs `sampling`; SCORE needs `continuation` (at least one token) and `score_logprobs`; EMBED needs
    `pooling`; CLASSIFY needs a delta with a head. `deadline` is on time.monotonic()'s clock.
    """

    id: str
    job: Job
    ids: tuple[int, ...]
    delta: DeltaRef | None = None
    token_type_ids: tuple[int, ...] | None = None
    sampling: Sampling | None = None
    continuation: tuple[int, ...] = ()
    score_logprobs: int = 0
    pooling: Pooling | None = None
    deadline: float | None = None


@dataclass(frozen=True)
class TokenLogprob:
    id: int
    logprob: float
    rank: int


@dataclass(frozen=True)
class PositionLogprobs:
    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Tokens:
    """Output tokens of one step. `logprobs` is as long as `ids` if asked for. `prompt_logprobs` comes at most once."""

    request_id: str
    ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...] = ()
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The last event of a request that worked.

    GENERATE: `reason`. CLASSIFY: `scores`, raw, one row for a sequence or one for each input token. EMBED: `vector`,
    neither normalised nor rounded. SCORE: `positions`, one for each token of the continuation.
    """

    request_id: str
    reason: FinishReason | None = None
    scores: tuple[tuple[float, ...], ...] = ()
    vector: tuple[float, ...] = ()
    positions: tuple[PositionLogprobs, ...] = ()


@dataclass(frozen=True)
class Failed:
    """The last event of a request that did not: refused, expired, cancelled, or its delta could not be loaded."""

    request_id: str
    error: DeltaserveError


Event = Tokens | Finished | Failed
Emit = Callable[[Sequence[Event]], None]
"""Called on the engine's thread, once a step at most; must not block."""


@dataclass(frozen=True)
class StepRecord:
    """One forward. `slots`, `deltas` (labels) and `kinds` are those that acted; `started` is time.time()'s."""

    index: int
    started: float
    duration: float
    rows: int
    sequences: int
    slots: tuple[int, ...]
    deltas: tuple[str, ...]
    kinds: tuple[str, ...]
    phase: str  # prefill, decode, mixed, encode
    output_tokens: int = 0


@dataclass(frozen=True)
class Limits:
    """Bounds of the engine; `max_model_len` counts input and output together (decoder-only), or each (T5)."""

    max_model_len: int
    max_batch_tokens: int
    max_running: int
    max_queued: int


@dataclass(frozen=True)
class EngineStats:
    """Counters at one moment; what `GetServerInfo` and the metrics show, and what tests assert to be back at zero."""

    running: int
    waiting: int
    waiting_for_load: int
    kv_capacity_tokens: int
    kv_used_tokens: int
    kv_capacity_bytes: int
    kv_used_bytes: int
    pool_capacity_bytes: int
    pool_used_bytes: int
    resident: tuple[int, ...] = ()
    pins: int = 0
    steps: tuple[StepRecord, ...] = field(default=(), repr=False)
