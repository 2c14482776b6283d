"""What the calls return. Everything is frozen; sequences are tuples, numbers are Python's own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

Each = TypeVar("Each")


def _only(results: Sequence[Each]) -> Each:
    if len(results) != 1:
        raise ValueError(f"there are {len(results)} results: take them from `results`")
    return results[0]


@dataclass(frozen=True)
class Usage:
    """Tokens of all inputs, and those generated or scored over all samples."""

    input_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class TokenLogprob:
    """A token, the natural logarithm of its probability, and its rank (1: most likely)."""

    id: int
    token: str
    logprob: float
    rank: int


@dataclass(frozen=True)
class PositionLogprobs:
    """The token that stands at a position, and the most likely ones there."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class Sample:
    """`finish_reason` is `stop` or `length`; `stop` is the stop string that ended it, if one did."""

    text: str
    ids: tuple[int, ...]
    finish_reason: str | None
    stop: str | None
    logprobs: tuple[PositionLogprobs, ...]


@dataclass(frozen=True)
class Generation:
    """What one input got: `n` samples."""

    samples: tuple[Sample, ...]
    input_tokens: int
    prompt_logprobs: tuple[PositionLogprobs, ...]

    @property
    def text(self) -> str:
        """The first sample's."""
        return self.samples[0].text


@dataclass(frozen=True)
class GenerateResult:
    """`results`: one for each input, in order. `delta`: `name@version` that answered; empty for the bare backbone."""

    results: tuple[Generation, ...]
    usage: Usage
    delta: str
    request_id: str

    @property
    def text(self) -> str:
        """The text for the only input. Raises ValueError where there were more."""
        return _only(self.results).text

    @property
    def texts(self) -> tuple[str, ...]:
        """The first sample's text of each input."""
        return tuple(result.text for result in self.results)


@dataclass(frozen=True)
class Piece:
    """A part of one sample, as it is made. The pieces' texts of one sample joined are `Sample.text`.

    `finish_reason` and `usage` come with the last piece of each sample, `prompt_logprobs` with the first of each input.
    """

    input_index: int
    sample_index: int
    text: str
    ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...]
    prompt_logprobs: tuple[PositionLogprobs, ...]
    finish_reason: str | None
    stop: str | None
    usage: Usage | None
    delta: str
    request_id: str


@dataclass(frozen=True)
class TokenLabel:
    """One token and its label. `start` and `end` count characters of the text that `segment` names (0 or 1).

    The three are None for special tokens and for inputs given as ids.
    """

    id: int
    token: str
    label: str
    scores: tuple[float, ...]
    start: int | None
    end: int | None
    segment: int | None


@dataclass(frozen=True)
class Span:
    """A piece of an input, from its token `start_token` to `end_token`, with the last one.

    `start` and `end` count characters of the text that `segment` names (0 or 1); None for inputs given as ids.
    """

    start_token: int
    end_token: int
    start: int | None
    end: int | None
    segment: int | None
    text: str
    score: float


@dataclass(frozen=True)
class Classification:
    """Of the whole input: `label` (empty for regression) and `scores`. Of each token: `tokens`, else it is None.

    To a question: `spans`, best first, else it is None; and the head's outputs for each token as they are. Of choices:
    the index of the best one is `choice`, else it is None, and `scores` are in their order.
    """

    label: str
    scores: tuple[float, ...]
    tokens: tuple[TokenLabel, ...] | None
    spans: tuple[Span, ...] | None = None
    start_logits: tuple[float, ...] = ()
    end_logits: tuple[float, ...] = ()
    choice: int | None = None


@dataclass(frozen=True)
class ClassifyResult:
    """`labels` gives the order of all scores; `scores_as` is `raw`, `softmax` or `sigmoid`."""

    results: tuple[Classification, ...]
    labels: tuple[str, ...]
    scores_as: str | None
    usage: Usage
    delta: str
    request_id: str

    @property
    def label(self) -> str:
        """The label of the only input. Raises ValueError where there were more."""
        return _only(self.results).label

    @property
    def answer(self) -> str | None:
        """The best span's text for the only input, None where none is. Raises ValueError where there were more."""
        spans = _only(self.results).spans
        return spans[0].text if spans else None

    @property
    def choice(self) -> int | None:
        """The index of the best of the only input's choices. Raises ValueError where there were more inputs."""
        return _only(self.results).choice


@dataclass(frozen=True)
class Embedding:
    values: tuple[float, ...]


@dataclass(frozen=True)
class EmbedResult:
    """`pooling` is what was done: `mean`, `cls` or `last`."""

    results: tuple[Embedding, ...]
    pooling: str | None
    usage: Usage
    delta: str
    request_id: str

    @property
    def vector(self) -> tuple[float, ...]:
        """The vector of the only input. Raises ValueError where there were more."""
        return _only(self.results).values


@dataclass(frozen=True)
class Score:
    """How likely a continuation is: the sum of its tokens' natural logarithms; `greedy`: the backbone would say it."""

    logprob: float
    greedy: bool
    tokens: tuple[PositionLogprobs, ...]


@dataclass(frozen=True)
class InputScores:
    """One for each continuation of this input, in order."""

    scores: tuple[Score, ...]


@dataclass(frozen=True)
class ScoreResult:
    results: tuple[InputScores, ...]
    usage: Usage
    delta: str
    request_id: str

    @property
    def logprobs(self) -> tuple[float, ...]:
        """Of the only input's continuations, in order. Raises ValueError where there were more inputs."""
        return tuple(score.logprob for score in _only(self.results).scores)


@dataclass(frozen=True)
class DeltaInfo:
    """A delta as the server knows it. `state`: `loading`, `resident`, `evicted` or `draining`.

    `guessed` names what neither the call nor the checkpoint said: `labels`, `problem_type`, `task`. `task_id`: which of
    its checkpoint's tasks it is for, None where its method knows no tasks. `device_bytes` are its own, `shared_bytes`
    those of frozen parts that other deltas may have too.
    """

    name: str
    version: int
    state: str | None
    kinds: tuple[str, ...]
    sites: int
    parameters: int
    file_bytes: int
    device_bytes: int
    tensors_matched: int
    warnings: tuple[str, ...]
    content_hash: str
    task: str | None
    labels: tuple[str, ...]
    problem_type: str | None
    guessed: tuple[str, ...]
    source: str
    format: str
    in_flight: int
    base_model: str
    task_id: int | None
    shared_bytes: int

    @property
    def reference(self) -> str:
        """`name@version`."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class Unloaded:
    """The versions that were taken out, and the device bytes given back by now."""

    deltas: tuple[DeltaInfo, ...]
    freed_bytes: int
    request_id: str


@dataclass(frozen=True)
class Limits:
    """Of one request and of the server, in tokens, inputs, rows, sequences and bytes."""

    max_model_len: int
    max_inputs: int
    max_batch_tokens: int
    max_running: int
    max_queued: int
    max_message_bytes: int


@dataclass(frozen=True)
class Memory:
    """Device memory, in bytes."""

    backbone_bytes: int
    kv_capacity_bytes: int
    kv_used_bytes: int
    pool_capacity_bytes: int
    pool_used_bytes: int


@dataclass(frozen=True)
class Step:
    """One forward of the engine. `started` is in seconds since 1970, `duration` in seconds.

    `deltas` are `name@version` in the order of `slots`; `phase` is `prefill`, `decode`, `mixed` or `encode`.
    """

    index: int
    started: float
    duration: float
    rows: int
    sequences: int
    slots: tuple[int, ...]
    deltas: tuple[str, ...]
    kinds: tuple[str, ...]
    phase: str


@dataclass(frozen=True)
class ServerInfo:
    """What a server is, what it can do and what it is doing. `steps`: oldest first, empty unless asked for.

    `combinations`: those of the `resident` deltas that are made of several, for requests that name several.
    """

    version: str
    backbone: str
    family: str
    tasks: tuple[str, ...]
    kinds: tuple[str, ...]
    device: str
    dtype: str
    parameters: int
    has_tokenizer: bool
    limits: Limits
    memory: Memory
    steps: tuple[Step, ...]
    running: int
    waiting: int
    resident: int
    combinations: int
    uptime: float
    request_id: str
