"""Generate and StreamGenerate: the same work, told at the end or as it goes."""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

from deltaserve.catalog.combination import Answering
from deltaserve.engine.request import Finished, Job, Request, Tokens
from deltaserve.service import convert
from deltaserve.service.answers import Answers
from deltaserve.service.call import Call
from deltaserve.service.detokenizer import Detokenizer, StopStrings
from deltaserve.service.inputs import Need, Room, check_outputs, count
from deltaserve.service.samples import Growing, Piece
from deltaserve.service.sampling import DEFAULT_NEW_TOKENS, Wish, wish
from deltaserve.service.served import Served
from deltaserve.service.target import target
from deltaserve.service.text import Encoding
from deltaserve_protos.v1 import inference_pb2 as pb

_CONTEXT = 8
"""Tokens of the input that a tokenizer is shown before a continuation's first token."""


@dataclass(eq=False)
class _Sample:
    """`told`: when its last tokens came, on time.monotonic()'s clock; 0 before the first."""

    input_index: int
    sample_index: int
    input_tokens: int
    request: Request
    growing: Growing
    told: float = 0.0

    @property
    def usage(self) -> pb.Usage:
        counted = self.input_tokens if self.sample_index == 0 else 0
        return pb.Usage(input_tokens=counted, output_tokens=self.growing.count)


@dataclass(frozen=True, eq=False)
class _Run:
    """One call's samples, by input and sample, while the engine works on them."""

    version: Answering | None
    samples: Sequence[_Sample]
    answers: Answers

    @property
    def delta(self) -> str:
        return "" if self.version is None else self.version.label


class Generating:
    """Raises what `target`, `wish`, `Reader.read` and the engine raise."""

    def __init__(self, served: Served) -> None:
        self._served = served

    async def whole(self, message: pb.GenerateRequest, call: Call) -> pb.GenerateResponse:
        text = self._served.text
        async with self._running(message, call) as run, aclosing(self._pieces(run, call)) as steps:
            pieces: dict[str, list[Piece]] = {sample.request.id: [] for sample in run.samples}
            async for sample, piece in steps:
                pieces[sample.request.id].append(piece)
        results = [pb.Generation() for _ in message.inputs]
        usage = pb.Usage()
        for sample in run.samples:
            result, made = results[sample.input_index], pieces[sample.request.id]
            result.samples.append(convert.joined(made, text))
            usage.MergeFrom(
                pb.Usage(
                    input_tokens=usage.input_tokens + sample.usage.input_tokens,
                    output_tokens=usage.output_tokens + sample.usage.output_tokens,
                )
            )
            if sample.sample_index == 0:
                result.input_tokens = sample.input_tokens
                prompt = [one for piece in made for one in piece.prompt_logprobs]
                result.prompt_logprobs.extend(convert.positions(prompt, text))
        return pb.GenerateResponse(results=results, usage=usage, delta=run.delta)

    async def stream(self, message: pb.StreamGenerateRequest, call: Call) -> AsyncIterator[pb.StreamGenerateResponse]:
        text = self._served.text
        async with self._running(message, call) as run, aclosing(self._pieces(run, call)) as steps:
            async for sample, piece in steps:
                yield pb.StreamGenerateResponse(
                    input_index=sample.input_index,
                    sample_index=sample.sample_index,
                    text=piece.text,
                    ids=piece.ids,
                    logprobs=convert.positions(piece.logprobs, text),
                    prompt_logprobs=convert.positions(piece.prompt_logprobs, text),
                    finish_reason=convert.finish_reason(piece.reason),
                    stop=piece.stop,
                    usage=sample.usage if piece.reason is not None else None,
                    delta=run.delta,
                )

    @asynccontextmanager
    async def _running(self, message: pb.GenerateRequest | pb.StreamGenerateRequest, call: Call) -> AsyncIterator[_Run]:
        """Everything is checked before anything is queued; on exit nothing of it runs any more."""
        served, spec = self._served, self._served.backbone.spec
        inputs = count(message)
        async with target(message, Job.GENERATE, served, call) as version:
            wished = wish(
                message.sampling,
                eos_ids=served.backbone.defaults.eos_ids,
                vocab_size=spec.vocab_size,
                decoder_only=not spec.encoder_decoder,
            )
            if wished.stop:
                served.text.require("sampling.stop")
            served.check_number(inputs * wished.n)
            room = served.room(version)
            need = Need(wished.max_new_tokens, "max_new_tokens", DEFAULT_NEW_TOKENS)
            check_outputs(room, need, "sampling.max_new_tokens")
            encodings = await served.read(message, room, [need] * inputs)
            samples = self._samples(encodings, wished, room, version, call)
            async with Answers(served.engine, [sample.request for sample in samples]) as answers:
                try:
                    yield _Run(version, samples, answers)
                finally:
                    read = sum(len(encoding.ids) for encoding in encodings)
                    served.count(version, read, sum(sample.growing.count for sample in samples))

    def _samples(
        self, encodings: Sequence[Encoding], wished: Wish, room: Room, version: Answering | None, call: Call
    ) -> list[_Sample]:
        served = self._served
        deadline = call.deadline(served.request_timeout)
        continues = not served.backbone.spec.encoder_decoder
        samples = []
        for index, encoding in enumerate(encodings):
            left = room.left(len(encoding.ids))
            context = served.text.visible(encoding.ids, _CONTEXT) if continues else ()
            for number in range(wished.n):
                sampling = wished.for_sample(left, index, number)
                request = Request(
                    id=f"{call.request_id}/{index}/{number}",
                    job=Job.GENERATE,
                    ids=encoding.ids,
                    delta=None if version is None else version.ref,
                    token_type_ids=encoding.token_type_ids,
                    sampling=sampling,
                    deadline=deadline,
                )
                growing = Growing(Detokenizer(served.text, context), StopStrings(wished.stop), sampling.min_new_tokens)
                samples.append(_Sample(index, number, len(encoding.ids), request, growing))
        return samples

    async def _pieces(self, run: _Run, call: Call) -> AsyncGenerator[tuple[_Sample, Piece]]:
        """What each step added to each sample, in order per sample, until all have ended."""
        samples = {sample.request.id: sample for sample in run.samples}
        async for batch in run.answers.batches():
            made: dict[str, Piece] = {}
            for event in batch:
                growing = samples[event.request_id].growing
                if growing.ended:
                    continue
                piece = made.setdefault(event.request_id, Piece())
                if isinstance(event, Tokens):
                    growing.add(event, piece)
                else:
                    assert isinstance(event, Finished) and event.reason is not None
                    growing.end(piece, event.reason)
                if growing.ended:
                    run.answers.leave(event.request_id)
            now = time.monotonic()
            for request_id, piece in made.items():
                if not piece.empty:
                    self._timed(samples[request_id], len(piece.ids), now, call)
                    yield samples[request_id], piece

    def _timed(self, sample: _Sample, tokens: int, now: float, call: Call) -> None:
        metrics = self._served.metrics
        if not tokens:
            return
        if sample.told:
            metrics.next_tokens(tokens, now - sample.told)
        else:
            metrics.first_token(call.task, now - call.started)
        sample.told = now
