from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Truncate(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRUNCATE_UNSPECIFIED: _ClassVar[Truncate]
    TRUNCATE_NONE: _ClassVar[Truncate]
    TRUNCATE_START: _ClassVar[Truncate]
    TRUNCATE_END: _ClassVar[Truncate]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]

class ScoresAs(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SCORES_AS_UNSPECIFIED: _ClassVar[ScoresAs]
    SCORES_AS_RAW: _ClassVar[ScoresAs]
    SCORES_AS_SOFTMAX: _ClassVar[ScoresAs]
    SCORES_AS_SIGMOID: _ClassVar[ScoresAs]

class Pooling(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    POOLING_UNSPECIFIED: _ClassVar[Pooling]
    POOLING_MEAN: _ClassVar[Pooling]
    POOLING_CLS: _ClassVar[Pooling]
    POOLING_LAST: _ClassVar[Pooling]
TRUNCATE_UNSPECIFIED: Truncate
TRUNCATE_NONE: Truncate
TRUNCATE_START: Truncate
TRUNCATE_END: Truncate
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
SCORES_AS_UNSPECIFIED: ScoresAs
SCORES_AS_RAW: ScoresAs
SCORES_AS_SOFTMAX: ScoresAs
SCORES_AS_SIGMOID: ScoresAs
POOLING_UNSPECIFIED: Pooling
POOLING_MEAN: Pooling
POOLING_CLS: Pooling
POOLING_LAST: Pooling

class Choice(_message.Message):
    __slots__ = ("text", "ids", "token_type_ids")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_TYPE_IDS_FIELD_NUMBER: _ClassVar[int]
    text: str
    ids: _containers.RepeatedScalarFieldContainer[int]
    token_type_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, text: _Optional[str] = ..., ids: _Optional[_Iterable[int]] = ..., token_type_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Input(_message.Message):
    __slots__ = ("text", "text_pair", "ids", "token_type_ids", "choices")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TEXT_PAIR_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_TYPE_IDS_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    text: str
    text_pair: str
    ids: _containers.RepeatedScalarFieldContainer[int]
    token_type_ids: _containers.RepeatedScalarFieldContainer[int]
    choices: _containers.RepeatedCompositeFieldContainer[Choice]
    def __init__(self, text: _Optional[str] = ..., text_pair: _Optional[str] = ..., ids: _Optional[_Iterable[int]] = ..., token_type_ids: _Optional[_Iterable[int]] = ..., choices: _Optional[_Iterable[_Union[Choice, _Mapping]]] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("input_tokens", "output_tokens")
    INPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    input_tokens: int
    output_tokens: int
    def __init__(self, input_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ...) -> None: ...

class TokenLogprob(_message.Message):
    __slots__ = ("id", "token", "logprob", "rank")
    ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    id: int
    token: str
    logprob: float
    rank: int
    def __init__(self, id: _Optional[int] = ..., token: _Optional[str] = ..., logprob: _Optional[float] = ..., rank: _Optional[int] = ...) -> None: ...

class PositionLogprobs(_message.Message):
    __slots__ = ("chosen", "top")
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    chosen: TokenLogprob
    top: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    def __init__(self, chosen: _Optional[_Union[TokenLogprob, _Mapping]] = ..., top: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "max_new_tokens", "min_new_tokens", "stop", "stop_ids", "ignore_eos", "n", "logprobs", "prompt_logprobs")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    STOP_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    max_new_tokens: int
    min_new_tokens: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    stop_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    n: int
    logprobs: int
    prompt_logprobs: int
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., seed: _Optional[int] = ..., max_new_tokens: _Optional[int] = ..., min_new_tokens: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., stop_ids: _Optional[_Iterable[int]] = ..., ignore_eos: bool = ..., n: _Optional[int] = ..., logprobs: _Optional[int] = ..., prompt_logprobs: _Optional[int] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("deltas", "backbone", "inputs", "add_special_tokens", "truncate", "sampling", "delta_weights")
    DELTAS_FIELD_NUMBER: _ClassVar[int]
    BACKBONE_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    ADD_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATE_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    DELTA_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    deltas: _containers.RepeatedScalarFieldContainer[str]
    backbone: bool
    inputs: _containers.RepeatedCompositeFieldContainer[Input]
    add_special_tokens: bool
    truncate: Truncate
    sampling: Sampling
    delta_weights: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, deltas: _Optional[_Iterable[str]] = ..., backbone: bool = ..., inputs: _Optional[_Iterable[_Union[Input, _Mapping]]] = ..., add_special_tokens: bool = ..., truncate: _Optional[_Union[Truncate, str]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., delta_weights: _Optional[_Iterable[float]] = ...) -> None: ...

class Sample(_message.Message):
    __slots__ = ("text", "ids", "finish_reason", "stop", "logprobs")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    text: str
    ids: _containers.RepeatedScalarFieldContainer[int]
    finish_reason: FinishReason
    stop: str
    logprobs: _containers.RepeatedCompositeFieldContainer[PositionLogprobs]
    def __init__(self, text: _Optional[str] = ..., ids: _Optional[_Iterable[int]] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., stop: _Optional[str] = ..., logprobs: _Optional[_Iterable[_Union[PositionLogprobs, _Mapping]]] = ...) -> None: ...

class Generation(_message.Message):
    __slots__ = ("samples", "input_tokens", "prompt_logprobs")
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    INPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    samples: _containers.RepeatedCompositeFieldContainer[Sample]
    input_tokens: int
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[PositionLogprobs]
    def __init__(self, samples: _Optional[_Iterable[_Union[Sample, _Mapping]]] = ..., input_tokens: _Optional[int] = ..., prompt_logprobs: _Optional[_Iterable[_Union[PositionLogprobs, _Mapping]]] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("results", "usage", "delta")
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[Generation]
    usage: Usage
    delta: str
    def __init__(self, results: _Optional[_Iterable[_Union[Generation, _Mapping]]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., delta: _Optional[str] = ...) -> None: ...

class StreamGenerateRequest(_message.Message):
    __slots__ = ("deltas", "backbone", "inputs", "add_special_tokens", "truncate", "sampling", "delta_weights")
    DELTAS_FIELD_NUMBER: _ClassVar[int]
    BACKBONE_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    ADD_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATE_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    DELTA_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    deltas: _containers.RepeatedScalarFieldContainer[str]
    backbone: bool
    inputs: _containers.RepeatedCompositeFieldContainer[Input]
    add_special_tokens: bool
    truncate: Truncate
    sampling: Sampling
    delta_weights: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, deltas: _Optional[_Iterable[str]] = ..., backbone: bool = ..., inputs: _Optional[_Iterable[_Union[Input, _Mapping]]] = ..., add_special_tokens: bool = ..., truncate: _Optional[_Union[Truncate, str]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., delta_weights: _Optional[_Iterable[float]] = ...) -> None: ...

class StreamGenerateResponse(_message.Message):
    __slots__ = ("input_index", "sample_index", "text", "ids", "logprobs", "prompt_logprobs", "finish_reason", "stop", "usage", "delta")
    INPUT_INDEX_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_INDEX_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    input_index: int
    sample_index: int
    text: str
    ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[PositionLogprobs]
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[PositionLogprobs]
    finish_reason: FinishReason
    stop: str
    usage: Usage
    delta: str
    def __init__(self, input_index: _Optional[int] = ..., sample_index: _Optional[int] = ..., text: _Optional[str] = ..., ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[PositionLogprobs, _Mapping]]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[PositionLogprobs, _Mapping]]] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., stop: _Optional[str] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., delta: _Optional[str] = ...) -> None: ...

class ClassifyRequest(_message.Message):
    __slots__ = ("deltas", "backbone", "inputs", "add_special_tokens", "truncate", "scores_as", "top_k", "max_answer_tokens", "delta_weights")
    DELTAS_FIELD_NUMBER: _ClassVar[int]
    BACKBONE_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    ADD_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATE_FIELD_NUMBER: _ClassVar[int]
    SCORES_AS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MAX_ANSWER_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DELTA_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    deltas: _containers.RepeatedScalarFieldContainer[str]
    backbone: bool
    inputs: _containers.RepeatedCompositeFieldContainer[Input]
    add_special_tokens: bool
    truncate: Truncate
    scores_as: ScoresAs
    top_k: int
    max_answer_tokens: int
    delta_weights: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, deltas: _Optional[_Iterable[str]] = ..., backbone: bool = ..., inputs: _Optional[_Iterable[_Union[Input, _Mapping]]] = ..., add_special_tokens: bool = ..., truncate: _Optional[_Union[Truncate, str]] = ..., scores_as: _Optional[_Union[ScoresAs, str]] = ..., top_k: _Optional[int] = ..., max_answer_tokens: _Optional[int] = ..., delta_weights: _Optional[_Iterable[float]] = ...) -> None: ...

class SequenceClassification(_message.Message):
    __slots__ = ("label", "scores")
    LABEL_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    label: str
    scores: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, label: _Optional[str] = ..., scores: _Optional[_Iterable[float]] = ...) -> None: ...

class TokenClassification(_message.Message):
    __slots__ = ("tokens",)
    class Token(_message.Message):
        __slots__ = ("id", "token", "start", "end", "label", "scores", "segment")
        ID_FIELD_NUMBER: _ClassVar[int]
        TOKEN_FIELD_NUMBER: _ClassVar[int]
        START_FIELD_NUMBER: _ClassVar[int]
        END_FIELD_NUMBER: _ClassVar[int]
        LABEL_FIELD_NUMBER: _ClassVar[int]
        SCORES_FIELD_NUMBER: _ClassVar[int]
        SEGMENT_FIELD_NUMBER: _ClassVar[int]
        id: int
        token: str
        start: int
        end: int
        label: str
        scores: _containers.RepeatedScalarFieldContainer[float]
        segment: int
        def __init__(self, id: _Optional[int] = ..., token: _Optional[str] = ..., start: _Optional[int] = ..., end: _Optional[int] = ..., label: _Optional[str] = ..., scores: _Optional[_Iterable[float]] = ..., segment: _Optional[int] = ...) -> None: ...
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedCompositeFieldContainer[TokenClassification.Token]
    def __init__(self, tokens: _Optional[_Iterable[_Union[TokenClassification.Token, _Mapping]]] = ...) -> None: ...

class QuestionAnswering(_message.Message):
    __slots__ = ("spans", "start_logits", "end_logits")
    class Span(_message.Message):
        __slots__ = ("start_token", "end_token", "start", "end", "segment", "text", "score")
        START_TOKEN_FIELD_NUMBER: _ClassVar[int]
        END_TOKEN_FIELD_NUMBER: _ClassVar[int]
        START_FIELD_NUMBER: _ClassVar[int]
        END_FIELD_NUMBER: _ClassVar[int]
        SEGMENT_FIELD_NUMBER: _ClassVar[int]
        TEXT_FIELD_NUMBER: _ClassVar[int]
        SCORE_FIELD_NUMBER: _ClassVar[int]
        start_token: int
        end_token: int
        start: int
        end: int
        segment: int
        text: str
        score: float
        def __init__(self, start_token: _Optional[int] = ..., end_token: _Optional[int] = ..., start: _Optional[int] = ..., end: _Optional[int] = ..., segment: _Optional[int] = ..., text: _Optional[str] = ..., score: _Optional[float] = ...) -> None: ...
    SPANS_FIELD_NUMBER: _ClassVar[int]
    START_LOGITS_FIELD_NUMBER: _ClassVar[int]
    END_LOGITS_FIELD_NUMBER: _ClassVar[int]
    spans: _containers.RepeatedCompositeFieldContainer[QuestionAnswering.Span]
    start_logits: _containers.RepeatedScalarFieldContainer[float]
    end_logits: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, spans: _Optional[_Iterable[_Union[QuestionAnswering.Span, _Mapping]]] = ..., start_logits: _Optional[_Iterable[float]] = ..., end_logits: _Optional[_Iterable[float]] = ...) -> None: ...

class MultipleChoice(_message.Message):
    __slots__ = ("index", "scores")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    index: int
    scores: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, index: _Optional[int] = ..., scores: _Optional[_Iterable[float]] = ...) -> None: ...

class Classification(_message.Message):
    __slots__ = ("sequence", "tokens", "spans", "choice")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    sequence: SequenceClassification
    tokens: TokenClassification
    spans: QuestionAnswering
    choice: MultipleChoice
    def __init__(self, sequence: _Optional[_Union[SequenceClassification, _Mapping]] = ..., tokens: _Optional[_Union[TokenClassification, _Mapping]] = ..., spans: _Optional[_Union[QuestionAnswering, _Mapping]] = ..., choice: _Optional[_Union[MultipleChoice, _Mapping]] = ...) -> None: ...

class ClassifyResponse(_message.Message):
    __slots__ = ("results", "labels", "scores_as", "usage", "delta")
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    SCORES_AS_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[Classification]
    labels: _containers.RepeatedScalarFieldContainer[str]
    scores_as: ScoresAs
    usage: Usage
    delta: str
    def __init__(self, results: _Optional[_Iterable[_Union[Classification, _Mapping]]] = ..., labels: _Optional[_Iterable[str]] = ..., scores_as: _Optional[_Union[ScoresAs, str]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., delta: _Optional[str] = ...) -> None: ...

class EmbedRequest(_message.Message):
    __slots__ = ("deltas", "backbone", "inputs", "add_special_tokens", "truncate", "pooling", "normalize", "delta_weights")
    DELTAS_FIELD_NUMBER: _ClassVar[int]
    BACKBONE_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    ADD_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATE_FIELD_NUMBER: _ClassVar[int]
    POOLING_FIELD_NUMBER: _ClassVar[int]
    NORMALIZE_FIELD_NUMBER: _ClassVar[int]
    DELTA_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    deltas: _containers.RepeatedScalarFieldContainer[str]
    backbone: bool
    inputs: _containers.RepeatedCompositeFieldContainer[Input]
    add_special_tokens: bool
    truncate: Truncate
    pooling: Pooling
    normalize: bool
    delta_weights: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, deltas: _Optional[_Iterable[str]] = ..., backbone: bool = ..., inputs: _Optional[_Iterable[_Union[Input, _Mapping]]] = ..., add_special_tokens: bool = ..., truncate: _Optional[_Union[Truncate, str]] = ..., pooling: _Optional[_Union[Pooling, str]] = ..., normalize: bool = ..., delta_weights: _Optional[_Iterable[float]] = ...) -> None: ...

class Embedding(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, values: _Optional[_Iterable[float]] = ...) -> None: ...

class EmbedResponse(_message.Message):
    __slots__ = ("results", "pooling", "usage", "delta")
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    POOLING_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[Embedding]
    pooling: Pooling
    usage: Usage
    delta: str
    def __init__(self, results: _Optional[_Iterable[_Union[Embedding, _Mapping]]] = ..., pooling: _Optional[_Union[Pooling, str]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., delta: _Optional[str] = ...) -> None: ...

class Continuation(_message.Message):
    __slots__ = ("text", "ids")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    text: str
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, text: _Optional[str] = ..., ids: _Optional[_Iterable[int]] = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("deltas", "backbone", "inputs", "add_special_tokens", "truncate", "continuations", "logprobs", "delta_weights")
    class Continuations(_message.Message):
        __slots__ = ("continuations",)
        CONTINUATIONS_FIELD_NUMBER: _ClassVar[int]
        continuations: _containers.RepeatedCompositeFieldContainer[Continuation]
        def __init__(self, continuations: _Optional[_Iterable[_Union[Continuation, _Mapping]]] = ...) -> None: ...
    DELTAS_FIELD_NUMBER: _ClassVar[int]
    BACKBONE_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    ADD_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATE_FIELD_NUMBER: _ClassVar[int]
    CONTINUATIONS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    DELTA_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    deltas: _containers.RepeatedScalarFieldContainer[str]
    backbone: bool
    inputs: _containers.RepeatedCompositeFieldContainer[Input]
    add_special_tokens: bool
    truncate: Truncate
    continuations: _containers.RepeatedCompositeFieldContainer[ScoreRequest.Continuations]
    logprobs: int
    delta_weights: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, deltas: _Optional[_Iterable[str]] = ..., backbone: bool = ..., inputs: _Optional[_Iterable[_Union[Input, _Mapping]]] = ..., add_special_tokens: bool = ..., truncate: _Optional[_Union[Truncate, str]] = ..., continuations: _Optional[_Iterable[_Union[ScoreRequest.Continuations, _Mapping]]] = ..., logprobs: _Optional[int] = ..., delta_weights: _Optional[_Iterable[float]] = ...) -> None: ...

class ContinuationScore(_message.Message):
    __slots__ = ("logprob", "greedy", "tokens")
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    GREEDY_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    logprob: float
    greedy: bool
    tokens: _containers.RepeatedCompositeFieldContainer[PositionLogprobs]
    def __init__(self, logprob: _Optional[float] = ..., greedy: bool = ..., tokens: _Optional[_Iterable[_Union[PositionLogprobs, _Mapping]]] = ...) -> None: ...

class InputScores(_message.Message):
    __slots__ = ("scores",)
    SCORES_FIELD_NUMBER: _ClassVar[int]
    scores: _containers.RepeatedCompositeFieldContainer[ContinuationScore]
    def __init__(self, scores: _Optional[_Iterable[_Union[ContinuationScore, _Mapping]]] = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("results", "usage", "delta")
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[InputScores]
    usage: Usage
    delta: str
    def __init__(self, results: _Optional[_Iterable[_Union[InputScores, _Mapping]]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., delta: _Optional[str] = ...) -> None: ...
