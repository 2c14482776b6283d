"""Messages of the contract as results. Each function takes one message and, where the result has it, the request id."""

from collections.abc import Iterable
from dataclasses import dataclass

from deltaserve_client import results, words
from deltaserve_protos.v1 import deltas_pb2, inference_pb2


@dataclass(frozen=True)
class Page:
    """A part of the list of deltas; `following` is empty on the last one."""

    deltas: tuple[results.DeltaInfo, ...]
    following: str


def generated(answer: inference_pb2.GenerateResponse, request_id: str) -> results.GenerateResult:
    return results.GenerateResult(
        results=tuple(
            results.Generation(
                samples=tuple(_sample(sample) for sample in each.samples),
                input_tokens=each.input_tokens,
                prompt_logprobs=_positions(each.prompt_logprobs),
            )
            for each in answer.results
        ),
        usage=_usage(answer.usage),
        delta=answer.delta,
        request_id=request_id,
    )


def piece(answer: inference_pb2.StreamGenerateResponse, request_id: str) -> results.Piece:
    return results.Piece(
        input_index=answer.input_index,
        sample_index=answer.sample_index,
        text=answer.text,
        ids=tuple(answer.ids),
        logprobs=_positions(answer.logprobs),
        prompt_logprobs=_positions(answer.prompt_logprobs),
        finish_reason=words.FINISH_REASON.word(answer.finish_reason),
        stop=answer.stop if answer.HasField("stop") else None,
        usage=_usage(answer.usage) if answer.HasField("usage") else None,
        delta=answer.delta,
        request_id=request_id,
    )


def classified(answer: inference_pb2.ClassifyResponse, request_id: str) -> results.ClassifyResult:
    return results.ClassifyResult(
        results=tuple(_classification(each) for each in answer.results),
        labels=tuple(answer.labels),
        scores_as=words.SCORES_AS.word(answer.scores_as),
        usage=_usage(answer.usage),
        delta=answer.delta,
        request_id=request_id,
    )


def embedded(answer: inference_pb2.EmbedResponse, request_id: str) -> results.EmbedResult:
    return results.EmbedResult(
        results=tuple(results.Embedding(tuple(each.values)) for each in answer.results),
        pooling=words.POOLING.word(answer.pooling),
        usage=_usage(answer.usage),
        delta=answer.delta,
        request_id=request_id,
    )


def scored(answer: inference_pb2.ScoreResponse, request_id: str) -> results.ScoreResult:
    return results.ScoreResult(
        results=tuple(
            results.InputScores(
                tuple(results.Score(score.logprob, score.greedy, _positions(score.tokens)) for score in each.scores)
            )
            for each in answer.results
        ),
        usage=_usage(answer.usage),
        delta=answer.delta,
        request_id=request_id,
    )


def loaded(answer: deltas_pb2.LoadDeltaResponse, request_id: str) -> results.DeltaInfo:
    return _delta(answer.delta)


def got(answer: deltas_pb2.GetDeltaResponse, request_id: str) -> results.DeltaInfo:
    return _delta(answer.delta)


def unloaded(answer: deltas_pb2.UnloadDeltaResponse, request_id: str) -> results.Unloaded:
    return results.Unloaded(tuple(_delta(each) for each in answer.deltas), answer.freed_bytes, request_id)


def page(answer: deltas_pb2.ListDeltasResponse, request_id: str) -> Page:
    return Page(tuple(_delta(each) for each in answer.deltas), answer.next_page_token)


def server_info(answer: deltas_pb2.GetServerInfoResponse, request_id: str) -> results.ServerInfo:
    limits, memory = answer.limits, answer.memory
    return results.ServerInfo(
        version=answer.version,
        backbone=answer.backbone,
        family=answer.family,
        tasks=tuple(answer.tasks),
        kinds=tuple(answer.kinds),
        device=answer.device,
        dtype=answer.dtype,
        parameters=answer.parameters,
        has_tokenizer=answer.has_tokenizer,
        limits=results.Limits(
            max_model_len=limits.max_model_len,
            max_inputs=limits.max_inputs,
            max_batch_tokens=limits.max_batch_tokens,
            max_running=limits.max_running,
            max_queued=limits.max_queued,
            max_message_bytes=limits.max_message_bytes,
        ),
        memory=results.Memory(
            backbone_bytes=memory.backbone_bytes,
            kv_capacity_bytes=memory.kv_capacity_bytes,
            kv_used_bytes=memory.kv_used_bytes,
            pool_capacity_bytes=memory.pool_capacity_bytes,
            pool_used_bytes=memory.pool_used_bytes,
        ),
        steps=tuple(_step(each) for each in answer.steps),
        running=answer.running,
        waiting=answer.waiting,
        resident=answer.resident,
        combinations=answer.combinations,
        uptime=answer.uptime,
        request_id=request_id,
    )


def _usage(usage: inference_pb2.Usage) -> results.Usage:
    return results.Usage(usage.input_tokens, usage.output_tokens)


def _token(token: inference_pb2.TokenLogprob) -> results.TokenLogprob:
    return results.TokenLogprob(token.id, token.token, token.logprob, token.rank)


def _positions(positions: Iterable[inference_pb2.PositionLogprobs]) -> tuple[results.PositionLogprobs, ...]:
    return tuple(
        results.PositionLogprobs(_token(each.chosen), tuple(_token(token) for token in each.top)) for each in positions
    )


def _sample(sample: inference_pb2.Sample) -> results.Sample:
    return results.Sample(
        text=sample.text,
        ids=tuple(sample.ids),
        finish_reason=words.FINISH_REASON.word(sample.finish_reason),
        stop=sample.stop if sample.HasField("stop") else None,
        logprobs=_positions(sample.logprobs),
    )


def _classification(answer: inference_pb2.Classification) -> results.Classification:
    kind = answer.WhichOneof("result")
    if kind == "tokens":
        return results.Classification("", (), tuple(_token_label(token) for token in answer.tokens.tokens))
    if kind == "spans":
        told = answer.spans
        spans = tuple(_span(span) for span in told.spans)
        return results.Classification("", (), None, spans, tuple(told.start_logits), tuple(told.end_logits))
    if kind == "choice":
        return results.Classification("", tuple(answer.choice.scores), None, choice=answer.choice.index)
    return results.Classification(answer.sequence.label, tuple(answer.sequence.scores), None)


def _token_label(token: inference_pb2.TokenClassification.Token) -> results.TokenLabel:
    return results.TokenLabel(
        id=token.id,
        token=token.token,
        label=token.label,
        scores=tuple(token.scores),
        start=token.start if token.HasField("start") else None,
        end=token.end if token.HasField("end") else None,
        segment=token.segment if token.HasField("segment") else None,
    )


def _span(span: inference_pb2.QuestionAnswering.Span) -> results.Span:
    return results.Span(
        start_token=span.start_token,
        end_token=span.end_token,
        start=span.start if span.HasField("start") else None,
        end=span.end if span.HasField("end") else None,
        segment=span.segment if span.HasField("segment") else None,
        text=span.text,
        score=span.score,
    )


def _delta(delta: deltas_pb2.Delta) -> results.DeltaInfo:
    return results.DeltaInfo(
        name=delta.name,
        version=delta.version,
        state=words.DELTA_STATE.word(delta.state),
        kinds=tuple(delta.kinds),
        sites=delta.sites,
        parameters=delta.parameters,
        file_bytes=delta.file_bytes,
        device_bytes=delta.device_bytes,
        tensors_matched=delta.tensors_matched,
        warnings=tuple(delta.warnings),
        content_hash=delta.content_hash,
        task=words.TASK.word(delta.task),
        labels=tuple(delta.labels),
        problem_type=words.PROBLEM_TYPE.word(delta.problem_type),
        guessed=tuple(delta.guessed),
        source=delta.source,
        format=delta.format,
        in_flight=delta.in_flight,
        base_model=delta.base_model,
        task_id=delta.task_id if delta.HasField("task_id") else None,
        shared_bytes=delta.shared_bytes,
    )


def _step(step: deltas_pb2.Step) -> results.Step:
    return results.Step(
        index=step.index,
        started=step.started,
        duration=step.duration,
        rows=step.rows,
        sequences=step.sequences,
        slots=tuple(step.slots),
        deltas=tuple(step.deltas),
        kinds=tuple(step.kinds),
        phase=step.phase,
    )
