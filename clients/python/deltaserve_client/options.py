"""The keywords of the calls. All may be left out; None is the same as left out. Defaults are the server's."""

from collections.abc import Sequence
from typing import Literal, TypeAlias, TypedDict

TruncateWord: TypeAlias = Literal["none", "start", "end"]
ScoresAsWord: TypeAlias = Literal["raw", "softmax", "sigmoid"]
PoolingWord: TypeAlias = Literal["mean", "cls", "last"]
TaskWord: TypeAlias = Literal[
    "generation",
    "sequence_classification",
    "token_classification",
    "embedding",
    "question_answering",
    "multiple_choice",
]
ProblemTypeWord: TypeAlias = Literal["regression", "single_label_classification", "multi_label_classification"]


class CallOptions(TypedDict, total=False):
    """`timeout`: seconds; None is the client's own."""

    timeout: float | None


class InferenceOptions(CallOptions, total=False):
    """`delta` names the delta that answers, or `deltas` several in order, or `backbone=True` asks the bare backbone.

    Several act as one: what they add is added at one time, what they multiply or append follows their order; the
    contract's InferenceService tells it all. `delta_weights`, one for each, multiply what a delta adds.
    `add_special_tokens` (server's default: true) is for text only. `truncate` says what happens to an input that is too
    long; by default it is an error.
    """

    delta: str | None
    deltas: Sequence[str] | None
    delta_weights: Sequence[float] | None
    backbone: bool | None
    add_special_tokens: bool | None
    truncate: TruncateWord | None


class SamplingOptions(TypedDict, total=False):
    """How the next token is chosen; ranges and defaults are those of the contract's message `Sampling`.

    `temperature` unset is greedy. `max_new_tokens` unset is 128, or the room left. `n` samples need a temperature.
    `logprobs` and `prompt_logprobs` are how many alternatives to report at each position, 0 for the chosen token alone.
    """

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None
    max_new_tokens: int | None
    min_new_tokens: int | None
    stop: str | Sequence[str] | None
    stop_ids: Sequence[int] | None
    ignore_eos: bool | None
    n: int | None
    logprobs: int | None
    prompt_logprobs: int | None


class GenerateOptions(InferenceOptions, SamplingOptions, total=False):
    """Of `generate` and `stream`."""


class ClassifyOptions(InferenceOptions, total=False):
    """`scores_as`: by default what fits the head.

    For question answering: `top_k` spans of each input (server's default: 1), each of `max_answer_tokens` at most (15).
    """

    scores_as: ScoresAsWord | None
    top_k: int | None
    max_answer_tokens: int | None


class EmbedOptions(InferenceOptions, total=False):
    """`pooling`: by default what fits the backbone. `normalize` (server's default: true) scales to length 1."""

    pooling: PoolingWord | None
    normalize: bool | None


class ScoreOptions(InferenceOptions, total=False):
    """`logprobs`: also that many alternatives at each position."""

    logprobs: int | None


class LoadOptions(CallOptions, total=False):
    """`task`, `labels`, `problem_type`: where the checkpoint does not say, or says it wrong.

    `replace` allows another content under a name in use. `task_id`, from 0: which task's delta to make of a checkpoint
    for several.
    """

    task: TaskWord | None
    labels: Sequence[str] | None
    problem_type: ProblemTypeWord | None
    replace: bool | None
    task_id: int | None


class UnloadOptions(CallOptions, total=False):
    """`wait`: answer when the memory is free, not when no new request can reach the delta."""

    wait: bool | None
