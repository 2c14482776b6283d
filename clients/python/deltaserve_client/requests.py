"""Arguments as calls: what both clients send, made once. Nothing here does any I/O."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from google.protobuf.message import Message
from google.protobuf.wrappers_pb2 import Int32Value, StringValue

from deltaserve_client import answers, inputs, options, results, words
from deltaserve_protos.v1 import deltas_pb2, inference_pb2

Result = TypeVar("Result")

AFFINITY_KEY = "x-deltaserve-delta"
"""Names the delta in the metadata too: proxies hash it, so that one delta's requests find one server."""

_INFERENCE = f"/{inference_pb2.DESCRIPTOR.services_by_name['InferenceService'].full_name}"
_DELTAS = f"/{deltas_pb2.DESCRIPTOR.services_by_name['DeltaService'].full_name}"
_SERVING = 1


@dataclass(frozen=True)
class Call(Generic[Result]):
    """One RPC. `read` makes the result from an answer (of a stream: from each) and the request id."""

    path: str
    request: Message
    parse: Callable[[bytes], Any]
    read: Callable[[Any, str], Result]
    metadata: tuple[tuple[str, str], ...]
    timeout: float | None

    @staticmethod
    def serialize(request: Message) -> bytes:
        return request.SerializeToString()


def generate(given: inputs.Inputs, told: options.GenerateOptions) -> Call[results.GenerateResult]:
    request = _sampled(inference_pb2.GenerateRequest(), given, told)
    return _inference("Generate", request, inference_pb2.GenerateResponse, answers.generated, told)


def stream(given: inputs.Inputs, told: options.GenerateOptions) -> Call[results.Piece]:
    request = _sampled(inference_pb2.StreamGenerateRequest(), given, told)
    return _inference("StreamGenerate", request, inference_pb2.StreamGenerateResponse, answers.piece, told)


def classify(given: inputs.Inputs, told: options.ClassifyOptions) -> Call[results.ClassifyResult]:
    _known(told, options.ClassifyOptions)
    request = _filled(inference_pb2.ClassifyRequest(), given, told)
    _put_word(request, "scores_as", words.SCORES_AS, told.get("scores_as"))
    _put(request, "top_k", told.get("top_k"))
    _put(request, "max_answer_tokens", told.get("max_answer_tokens"))
    return _inference("Classify", request, inference_pb2.ClassifyResponse, answers.classified, told)


def embed(given: inputs.Inputs, told: options.EmbedOptions) -> Call[results.EmbedResult]:
    _known(told, options.EmbedOptions)
    request = _filled(inference_pb2.EmbedRequest(), given, told)
    _put_word(request, "pooling", words.POOLING, told.get("pooling"))
    _put(request, "normalize", told.get("normalize"))
    return _inference("Embed", request, inference_pb2.EmbedResponse, answers.embedded, told)


def score(
    given: inputs.Inputs, continuations: inputs.Continuations, told: options.ScoreOptions
) -> Call[results.ScoreResult]:
    _known(told, options.ScoreOptions)
    request = _filled(inference_pb2.ScoreRequest(), given, told)
    request.continuations.extend(inputs.wire_continuations(given, continuations))
    _put(request, "logprobs", told.get("logprobs"))
    return _inference("Score", request, inference_pb2.ScoreResponse, answers.scored, told)


def load(name: str, source: str, told: options.LoadOptions) -> Call[results.DeltaInfo]:
    _known(told, options.LoadOptions)
    request = deltas_pb2.LoadDeltaRequest(name=name, source=source)
    _put_word(request, "task", words.TASK, told.get("task"))
    _put_word(request, "problem_type", words.PROBLEM_TYPE, told.get("problem_type"))
    _put(request, "labels", told.get("labels"))
    _put(request, "replace", told.get("replace"))
    _put(request, "task_id", told.get("task_id"))
    return _control("LoadDelta", request, deltas_pb2.LoadDeltaResponse, answers.loaded, told)


def unload(name: str, told: options.UnloadOptions) -> Call[results.Unloaded]:
    _known(told, options.UnloadOptions)
    request = deltas_pb2.UnloadDeltaRequest(name=name)
    _put(request, "wait", told.get("wait"))
    return _control("UnloadDelta", request, deltas_pb2.UnloadDeltaResponse, answers.unloaded, told)


def get(name: str, told: options.CallOptions) -> Call[results.DeltaInfo]:
    _known(told, options.CallOptions)
    request = deltas_pb2.GetDeltaRequest(name=name)
    return _control("GetDelta", request, deltas_pb2.GetDeltaResponse, answers.got, told)


def page(token: str, size: int | None, told: options.CallOptions) -> Call[answers.Page]:
    _known(told, options.CallOptions)
    request = deltas_pb2.ListDeltasRequest(page_token=token)
    _put(request, "page_size", size)
    return _control("ListDeltas", request, deltas_pb2.ListDeltasResponse, answers.page, told)


def server_info(steps: bool, told: options.CallOptions) -> Call[results.ServerInfo]:
    _known(told, options.CallOptions)
    request = deltas_pb2.GetServerInfoRequest(steps=steps)
    return _control("GetServerInfo", request, deltas_pb2.GetServerInfoResponse, answers.server_info, told)


def health(service: str, timeout: float | None) -> Call[bool]:
    """grpc.health.v1 without its generated code, which the base install does not have.

    A HealthCheckRequest is a string in field 1 and its answer an enum in field 1: on the wire they are a StringValue
    and an Int32Value.
    """
    request = StringValue(value=service)
    return Call(
        "/grpc.health.v1.Health/Check", request, Int32Value.FromString, lambda a, _: a.value == _SERVING, (), timeout
    )


def _inference(
    method: str, request: Message, answer: type[Message], read: Callable[[Any, str], Result], told: Mapping[str, Any]
) -> Call[Result]:
    names = ",".join(request.deltas)  # type: ignore[attr-defined]
    # What is no header value is no delta's name either: the server says so better than gRPC would.
    metadata = ((AFFINITY_KEY, names),) if names and names.isascii() and names.isprintable() else ()
    return Call(f"{_INFERENCE}/{method}", request, answer.FromString, read, metadata, told.get("timeout"))


def _control(
    method: str, request: Message, answer: type[Message], read: Callable[[Any, str], Result], told: Mapping[str, Any]
) -> Call[Result]:
    return Call(f"{_DELTAS}/{method}", request, answer.FromString, read, (), told.get("timeout"))


Request = TypeVar("Request", bound=Message)


def _sampled(request: Request, given: inputs.Inputs, told: options.GenerateOptions) -> Request:
    _known(told, options.GenerateOptions)
    sampling = inference_pb2.Sampling()
    for name in options.SamplingOptions.__annotations__:
        _put(sampling, name, told.get(name))
    request.sampling.CopyFrom(sampling)  # type: ignore[attr-defined]
    return _filled(request, given, told)


def _filled(request: Request, given: inputs.Inputs, told: options.InferenceOptions) -> Request:
    delta, deltas = told.get("delta"), told.get("deltas")
    if delta is not None and deltas is not None:
        raise ValueError("give either delta or deltas")
    if isinstance(deltas, str):
        raise TypeError("deltas is a sequence of names; one name goes in delta")
    _put(request, "deltas", deltas if delta is None else [delta])
    _put(request, "delta_weights", told.get("delta_weights"))
    _put(request, "backbone", told.get("backbone"))
    _put(request, "inputs", inputs.wire(given))
    _put(request, "add_special_tokens", told.get("add_special_tokens"))
    _put_word(request, "truncate", words.TRUNCATE, told.get("truncate"))
    return request


def _put(message: Message, field: str, value: object) -> None:
    """Sets a field, None left out. Raises TypeError or ValueError that name it."""
    if value is None:
        return
    try:
        if not message.DESCRIPTOR.fields_by_name[field].is_repeated:
            setattr(message, field, value)
        else:
            getattr(message, field).extend([value] if isinstance(value, str) else value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{field}: {error}") from None


def _put_word(message: Message, field: str, known: words.Words, word: str | None) -> None:
    if word is not None:
        setattr(message, field, known.number(field, word))


def _known(told: Mapping[str, Any], allowed: type) -> None:
    """Raises TypeError for keywords that are not in the TypedDict `allowed`."""
    for name in told:
        if name not in cast(Any, allowed).__annotations__:
            raise TypeError(f"unexpected keyword argument {name!r}")
