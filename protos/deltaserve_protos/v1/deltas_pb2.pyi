from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Task(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TASK_UNSPECIFIED: _ClassVar[Task]
    TASK_GENERATION: _ClassVar[Task]
    TASK_SEQUENCE_CLASSIFICATION: _ClassVar[Task]
    TASK_TOKEN_CLASSIFICATION: _ClassVar[Task]
    TASK_EMBEDDING: _ClassVar[Task]
    TASK_QUESTION_ANSWERING: _ClassVar[Task]
    TASK_MULTIPLE_CHOICE: _ClassVar[Task]

class ProblemType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PROBLEM_TYPE_UNSPECIFIED: _ClassVar[ProblemType]
    PROBLEM_TYPE_REGRESSION: _ClassVar[ProblemType]
    PROBLEM_TYPE_SINGLE_LABEL_CLASSIFICATION: _ClassVar[ProblemType]
    PROBLEM_TYPE_MULTI_LABEL_CLASSIFICATION: _ClassVar[ProblemType]

class DeltaState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DELTA_STATE_UNSPECIFIED: _ClassVar[DeltaState]
    DELTA_STATE_LOADING: _ClassVar[DeltaState]
    DELTA_STATE_RESIDENT: _ClassVar[DeltaState]
    DELTA_STATE_EVICTED: _ClassVar[DeltaState]
    DELTA_STATE_DRAINING: _ClassVar[DeltaState]
TASK_UNSPECIFIED: Task
TASK_GENERATION: Task
TASK_SEQUENCE_CLASSIFICATION: Task
TASK_TOKEN_CLASSIFICATION: Task
TASK_EMBEDDING: Task
TASK_QUESTION_ANSWERING: Task
TASK_MULTIPLE_CHOICE: Task
PROBLEM_TYPE_UNSPECIFIED: ProblemType
PROBLEM_TYPE_REGRESSION: ProblemType
PROBLEM_TYPE_SINGLE_LABEL_CLASSIFICATION: ProblemType
PROBLEM_TYPE_MULTI_LABEL_CLASSIFICATION: ProblemType
DELTA_STATE_UNSPECIFIED: DeltaState
DELTA_STATE_LOADING: DeltaState
DELTA_STATE_RESIDENT: DeltaState
DELTA_STATE_EVICTED: DeltaState
DELTA_STATE_DRAINING: DeltaState

class Delta(_message.Message):
    __slots__ = ("name", "version", "state", "kinds", "sites", "parameters", "file_bytes", "device_bytes", "tensors_matched", "warnings", "content_hash", "task", "labels", "problem_type", "guessed", "source", "format", "in_flight", "base_model", "task_id", "shared_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    KINDS_FIELD_NUMBER: _ClassVar[int]
    SITES_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    FILE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TENSORS_MATCHED_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    CONTENT_HASH_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_TYPE_FIELD_NUMBER: _ClassVar[int]
    GUESSED_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    SHARED_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    state: DeltaState
    kinds: _containers.RepeatedScalarFieldContainer[str]
    sites: int
    parameters: int
    file_bytes: int
    device_bytes: int
    tensors_matched: int
    warnings: _containers.RepeatedScalarFieldContainer[str]
    content_hash: str
    task: Task
    labels: _containers.RepeatedScalarFieldContainer[str]
    problem_type: ProblemType
    guessed: _containers.RepeatedScalarFieldContainer[str]
    source: str
    format: str
    in_flight: int
    base_model: str
    task_id: int
    shared_bytes: int
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ..., state: _Optional[_Union[DeltaState, str]] = ..., kinds: _Optional[_Iterable[str]] = ..., sites: _Optional[int] = ..., parameters: _Optional[int] = ..., file_bytes: _Optional[int] = ..., device_bytes: _Optional[int] = ..., tensors_matched: _Optional[int] = ..., warnings: _Optional[_Iterable[str]] = ..., content_hash: _Optional[str] = ..., task: _Optional[_Union[Task, str]] = ..., labels: _Optional[_Iterable[str]] = ..., problem_type: _Optional[_Union[ProblemType, str]] = ..., guessed: _Optional[_Iterable[str]] = ..., source: _Optional[str] = ..., format: _Optional[str] = ..., in_flight: _Optional[int] = ..., base_model: _Optional[str] = ..., task_id: _Optional[int] = ..., shared_bytes: _Optional[int] = ...) -> None: ...

class LoadDeltaRequest(_message.Message):
    __slots__ = ("name", "source", "task", "labels", "problem_type", "replace", "task_id")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_TYPE_FIELD_NUMBER: _ClassVar[int]
    REPLACE_FIELD_NUMBER: _ClassVar[int]
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    name: str
    source: str
    task: Task
    labels: _containers.RepeatedScalarFieldContainer[str]
    problem_type: ProblemType
    replace: bool
    task_id: int
    def __init__(self, name: _Optional[str] = ..., source: _Optional[str] = ..., task: _Optional[_Union[Task, str]] = ..., labels: _Optional[_Iterable[str]] = ..., problem_type: _Optional[_Union[ProblemType, str]] = ..., replace: bool = ..., task_id: _Optional[int] = ...) -> None: ...

class LoadDeltaResponse(_message.Message):
    __slots__ = ("delta",)
    DELTA_FIELD_NUMBER: _ClassVar[int]
    delta: Delta
    def __init__(self, delta: _Optional[_Union[Delta, _Mapping]] = ...) -> None: ...

class UnloadDeltaRequest(_message.Message):
    __slots__ = ("name", "wait")
    NAME_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    name: str
    wait: bool
    def __init__(self, name: _Optional[str] = ..., wait: bool = ...) -> None: ...

class UnloadDeltaResponse(_message.Message):
    __slots__ = ("deltas", "freed_bytes")
    DELTAS_FIELD_NUMBER: _ClassVar[int]
    FREED_BYTES_FIELD_NUMBER: _ClassVar[int]
    deltas: _containers.RepeatedCompositeFieldContainer[Delta]
    freed_bytes: int
    def __init__(self, deltas: _Optional[_Iterable[_Union[Delta, _Mapping]]] = ..., freed_bytes: _Optional[int] = ...) -> None: ...

class GetDeltaRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class GetDeltaResponse(_message.Message):
    __slots__ = ("delta",)
    DELTA_FIELD_NUMBER: _ClassVar[int]
    delta: Delta
    def __init__(self, delta: _Optional[_Union[Delta, _Mapping]] = ...) -> None: ...

class ListDeltasRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListDeltasResponse(_message.Message):
    __slots__ = ("deltas", "next_page_token")
    DELTAS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    deltas: _containers.RepeatedCompositeFieldContainer[Delta]
    next_page_token: str
    def __init__(self, deltas: _Optional[_Iterable[_Union[Delta, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class GetServerInfoRequest(_message.Message):
    __slots__ = ("steps",)
    STEPS_FIELD_NUMBER: _ClassVar[int]
    steps: bool
    def __init__(self, steps: bool = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_model_len", "max_inputs", "max_batch_tokens", "max_running", "max_queued", "max_message_bytes")
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    MAX_INPUTS_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_RUNNING_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUED_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    max_model_len: int
    max_inputs: int
    max_batch_tokens: int
    max_running: int
    max_queued: int
    max_message_bytes: int
    def __init__(self, max_model_len: _Optional[int] = ..., max_inputs: _Optional[int] = ..., max_batch_tokens: _Optional[int] = ..., max_running: _Optional[int] = ..., max_queued: _Optional[int] = ..., max_message_bytes: _Optional[int] = ...) -> None: ...

class Memory(_message.Message):
    __slots__ = ("backbone_bytes", "kv_capacity_bytes", "kv_used_bytes", "pool_capacity_bytes", "pool_used_bytes")
    BACKBONE_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    POOL_CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    POOL_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    backbone_bytes: int
    kv_capacity_bytes: int
    kv_used_bytes: int
    pool_capacity_bytes: int
    pool_used_bytes: int
    def __init__(self, backbone_bytes: _Optional[int] = ..., kv_capacity_bytes: _Optional[int] = ..., kv_used_bytes: _Optional[int] = ..., pool_capacity_bytes: _Optional[int] = ..., pool_used_bytes: _Optional[int] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("index", "started", "duration", "rows", "sequences", "slots", "deltas", "kinds", "phase")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    DURATION_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    DELTAS_FIELD_NUMBER: _ClassVar[int]
    KINDS_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    index: int
    started: float
    duration: float
    rows: int
    sequences: int
    slots: _containers.RepeatedScalarFieldContainer[int]
    deltas: _containers.RepeatedScalarFieldContainer[str]
    kinds: _containers.RepeatedScalarFieldContainer[str]
    phase: str
    def __init__(self, index: _Optional[int] = ..., started: _Optional[float] = ..., duration: _Optional[float] = ..., rows: _Optional[int] = ..., sequences: _Optional[int] = ..., slots: _Optional[_Iterable[int]] = ..., deltas: _Optional[_Iterable[str]] = ..., kinds: _Optional[_Iterable[str]] = ..., phase: _Optional[str] = ...) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("version", "backbone", "family", "tasks", "kinds", "device", "dtype", "parameters", "has_tokenizer", "limits", "memory", "steps", "running", "waiting", "resident", "uptime", "combinations")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BACKBONE_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    KINDS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    HAS_TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_FIELD_NUMBER: _ClassVar[int]
    UPTIME_FIELD_NUMBER: _ClassVar[int]
    COMBINATIONS_FIELD_NUMBER: _ClassVar[int]
    version: str
    backbone: str
    family: str
    tasks: _containers.RepeatedScalarFieldContainer[str]
    kinds: _containers.RepeatedScalarFieldContainer[str]
    device: str
    dtype: str
    parameters: int
    has_tokenizer: bool
    limits: Limits
    memory: Memory
    steps: _containers.RepeatedCompositeFieldContainer[Step]
    running: int
    waiting: int
    resident: int
    uptime: float
    combinations: int
    def __init__(self, version: _Optional[str] = ..., backbone: _Optional[str] = ..., family: _Optional[str] = ..., tasks: _Optional[_Iterable[str]] = ..., kinds: _Optional[_Iterable[str]] = ..., device: _Optional[str] = ..., dtype: _Optional[str] = ..., parameters: _Optional[int] = ..., has_tokenizer: bool = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., memory: _Optional[_Union[Memory, _Mapping]] = ..., steps: _Optional[_Iterable[_Union[Step, _Mapping]]] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., resident: _Optional[int] = ..., uptime: _Optional[float] = ..., combinations: _Optional[int] = ...) -> None: ...
