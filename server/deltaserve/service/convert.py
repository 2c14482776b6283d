"""From our types to the contract's messages. Pure: no engine, no waiting."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from deltaserve.catalog.version import State, Version
from deltaserve.deltas.sites import Pooling, Task
from deltaserve.engine import request as engine
from deltaserve.service.samples import Piece
from deltaserve.service.text import Encoding, Text
from deltaserve_protos.v1 import deltas_pb2, inference_pb2

_STATES = {
    State.LOADING: deltas_pb2.DELTA_STATE_LOADING,
    State.RESIDENT: deltas_pb2.DELTA_STATE_RESIDENT,
    State.EVICTED: deltas_pb2.DELTA_STATE_EVICTED,
    State.DRAINING: deltas_pb2.DELTA_STATE_DRAINING,
}
_TASKS = {
    None: deltas_pb2.TASK_UNSPECIFIED,
    Task.GENERATION: deltas_pb2.TASK_GENERATION,
    Task.SEQUENCE_CLASSIFICATION: deltas_pb2.TASK_SEQUENCE_CLASSIFICATION,
    Task.TOKEN_CLASSIFICATION: deltas_pb2.TASK_TOKEN_CLASSIFICATION,
    Task.EMBEDDING: deltas_pb2.TASK_EMBEDDING,
    Task.QUESTION_ANSWERING: deltas_pb2.TASK_QUESTION_ANSWERING,
    Task.MULTIPLE_CHOICE: deltas_pb2.TASK_MULTIPLE_CHOICE,
}
_PROBLEMS = {
    None: deltas_pb2.PROBLEM_TYPE_UNSPECIFIED,
    "regression": deltas_pb2.PROBLEM_TYPE_REGRESSION,
    "single_label_classification": deltas_pb2.PROBLEM_TYPE_SINGLE_LABEL_CLASSIFICATION,
    "multi_label_classification": deltas_pb2.PROBLEM_TYPE_MULTI_LABEL_CLASSIFICATION,
}
_REASONS = {
    engine.FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    engine.FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
}
_POOLINGS = {
    Pooling.MEAN: inference_pb2.POOLING_MEAN,
    Pooling.CLS: inference_pb2.POOLING_CLS,
    Pooling.LAST: inference_pb2.POOLING_LAST,
}
_SCORES_AS = {
    "regression": inference_pb2.SCORES_AS_RAW,
    "multi_label_classification": inference_pb2.SCORES_AS_SIGMOID,
}

TASK_OF = {message: task for task, message in _TASKS.items()}
PROBLEM_OF = {message: problem for problem, message in _PROBLEMS.items()}
POOLING_OF = {message: pooling for pooling, message in _POOLINGS.items()}


def delta(version: Version, resident: Collection[int], in_flight: int) -> deltas_pb2.Delta:
    """`resident`: keys that are in device memory."""
    card = version.card
    state = version.now(resident)
    return deltas_pb2.Delta(
        name=version.name,
        version=version.number,
        state=_STATES[state],
        kinds=card.kinds,
        sites=card.sites,
        parameters=card.parameters,
        file_bytes=card.file_bytes,
        device_bytes=version.device_bytes,
        tensors_matched=card.tensors_matched,
        warnings=card.warnings,
        content_hash=version.content_hash,
        task=_TASKS[card.task],
        labels=card.labels,
        problem_type=_PROBLEMS[card.problem_type],
        guessed=card.guessed,
        source=version.source.shown,
        format=card.format,
        in_flight=in_flight,
        base_model=card.base_model,
        task_id=card.task_id,
        shared_bytes=version.shared_bytes,
    )


def step(record: engine.StepRecord) -> deltas_pb2.Step:
    return deltas_pb2.Step(
        index=record.index,
        started=record.started,
        duration=record.duration,
        rows=record.rows,
        sequences=record.sequences,
        slots=record.slots,
        deltas=record.deltas,
        kinds=record.kinds,
        phase=record.phase,
    )


def finish_reason(reason: engine.FinishReason | None) -> inference_pb2.FinishReason:
    return inference_pb2.FINISH_REASON_UNSPECIFIED if reason is None else _REASONS[reason]


def pooling(kind: Pooling) -> inference_pb2.Pooling:
    return _POOLINGS[kind]


def positions(given: Iterable[engine.PositionLogprobs], text: Text) -> list[inference_pb2.PositionLogprobs]:
    def token(one: engine.TokenLogprob) -> inference_pb2.TokenLogprob:
        return inference_pb2.TokenLogprob(id=one.id, token=text.token(one.id), logprob=one.logprob, rank=one.rank)

    return [inference_pb2.PositionLogprobs(chosen=token(one.chosen), top=[token(t) for t in one.top]) for one in given]


def joined(pieces: Sequence[Piece], text: Text) -> inference_pb2.Sample:
    """A whole sample from its pieces."""
    last = pieces[-1]
    return inference_pb2.Sample(
        text="".join(piece.text for piece in pieces),
        ids=[token for piece in pieces for token in piece.ids],
        finish_reason=finish_reason(last.reason),
        stop=last.stop,
        logprobs=positions((one for piece in pieces for one in piece.logprobs), text),
    )


def scores_as(asked: inference_pb2.ScoresAs, problem_type: str | None) -> inference_pb2.ScoresAs:
    """What was asked for, else by the head."""
    return asked or _SCORES_AS.get(problem_type or "", inference_pb2.SCORES_AS_SOFTMAX)


def transformed(raw: Sequence[float], how: inference_pb2.ScoresAs) -> list[float]:
    """A head's outputs as RAW, SOFTMAX or SIGMOID."""
    return _TRANSFORMS[how](raw)


def sequence(
    raw: Sequence[float], how: inference_pb2.ScoresAs, labels: Sequence[str], problem_type: str | None
) -> inference_pb2.Classification:
    label = "" if problem_type == "regression" else _best(raw, labels)
    return inference_pb2.Classification(
        sequence=inference_pb2.SequenceClassification(label=label, scores=transformed(raw, how))
    )


def tokens(
    rows: Sequence[Sequence[float]],
    encoding: Encoding,
    how: inference_pb2.ScoresAs,
    labels: Sequence[str],
    text: Text,
) -> inference_pb2.Classification:
    assert len(rows) == len(encoding.ids)
    spans = encoding.spans or (None,) * len(rows)
    return inference_pb2.Classification(
        tokens=inference_pb2.TokenClassification(
            tokens=[
                inference_pb2.TokenClassification.Token(
                    id=token,
                    token=text.token(token),
                    start=None if span is None else span.start,
                    end=None if span is None else span.end,
                    segment=None if span is None else span.segment,
                    label=_best(raw, labels),
                    scores=transformed(raw, how),
                )
                for token, raw, span in zip(encoding.ids, rows, spans, strict=True)
            ]
        )
    )


def choice(raw: Sequence[float], how: inference_pb2.ScoresAs) -> inference_pb2.Classification:
    """`raw`: one score for each choice of an input."""
    best = max(range(len(raw)), key=raw.__getitem__)
    return inference_pb2.Classification(choice=inference_pb2.MultipleChoice(index=best, scores=transformed(raw, how)))


def vector(values: Sequence[float], normalize: bool) -> inference_pb2.Embedding:
    length = math.sqrt(math.fsum(v * v for v in values)) if normalize else 1.0
    return inference_pb2.Embedding(values=[v / (length or 1.0) for v in values])


def continuation(found: Sequence[engine.PositionLogprobs], text: Text) -> inference_pb2.ContinuationScore:
    return inference_pb2.ContinuationScore(
        logprob=math.fsum(one.chosen.logprob for one in found),
        greedy=all(one.chosen.rank == 1 for one in found),
        tokens=positions(found, text),
    )


def _best(raw: Sequence[float], labels: Sequence[str]) -> str:
    return labels[max(range(len(raw)), key=raw.__getitem__)]


def _softmax(raw: Sequence[float]) -> list[float]:
    highest = max(raw)
    powers = [math.exp(v - highest) for v in raw]
    total = math.fsum(powers)
    return [p / total for p in powers]


def _sigmoid(raw: Sequence[float]) -> list[float]:
    return [1 / (1 + math.exp(-v)) if v >= 0 else math.exp(v) / (1 + math.exp(v)) for v in raw]


_TRANSFORMS: Mapping[inference_pb2.ScoresAs, Callable[[Sequence[float]], list[float]]] = {
    inference_pb2.SCORES_AS_RAW: list,
    inference_pb2.SCORES_AS_SOFTMAX: _softmax,
    inference_pb2.SCORES_AS_SIGMOID: _sigmoid,
}
