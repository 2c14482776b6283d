"""Classify: what the head that the delta brings says of inputs: labels of them or of their tokens, spans, choices."""

from collections.abc import Mapping, Sequence

from deltaserve.catalog.combination import Answering
from deltaserve.deltas.sites import Task
from deltaserve.engine.request import Finished, Job, Request
from deltaserve.errors import InvalidArgument
from deltaserve.service import choices, convert, questions
from deltaserve.service.call import Call
from deltaserve.service.inputs import Need, count
from deltaserve.service.served import Served
from deltaserve.service.target import target
from deltaserve.service.text import Encoding
from deltaserve_protos.v1 import inference_pb2 as pb

_FOR: Mapping[str, Task] = {"top_k": Task.QUESTION_ANSWERING, "max_answer_tokens": Task.QUESTION_ANSWERING}
"""Fields that only deltas for one task know."""


class Classifying:
    """Raises what `target`, `Reader.read` and the engine raise."""

    def __init__(self, served: Served) -> None:
        self._served = served

    async def whole(self, message: pb.ClassifyRequest, call: Call) -> pb.ClassifyResponse:
        served = self._served
        count(message)
        if message.scores_as not in pb.ScoresAs.values():
            raise InvalidArgument(f"scores_as has no value {int(message.scores_as)}", field="scores_as")
        async with target(message, Job.CLASSIFY, served, call) as version:
            assert version is not None
            card = version.card
            _check(message, version)
            encodings = await self._read(message, version)
            deadline = call.deadline(served.request_timeout)
            ended = iter(
                await served.finished(
                    [
                        Request(
                            id=f"{call.request_id}/{index}/{number}",
                            job=Job.CLASSIFY,
                            ids=encoding.ids,
                            delta=version.ref,
                            token_type_ids=encoding.token_type_ids if card.token_types else None,
                            deadline=deadline,
                        )
                        for index, own in enumerate(encodings)
                        for number, encoding in enumerate(own)
                    ]
                )
            )
            finished = [[next(ended) for _ in own] for own in encodings]
            used = sum(len(encoding.ids) for own in encodings for encoding in own)
            served.count(version, used)
        return pb.ClassifyResponse(
            results=await self._results(message, version, encodings, finished),
            labels=card.labels,
            scores_as=convert.scores_as(message.scores_as, card.problem_type),
            usage=pb.Usage(input_tokens=used),
            delta=version.label,
        )

    async def _read(self, message: pb.ClassifyRequest, version: Answering) -> list[list[Encoding]]:
        """For each input its only row, or one for each of its choices."""
        served, room = self._served, self._served.room(version)
        if version.card.task is not Task.MULTIPLE_CHOICE:
            return [[one] for one in await served.read(message, room, [Need()] * len(message.inputs))]
        served.check_number(choices.check(message))
        return await served.tokenizing.run(lambda: choices.read(served.reader, message, room))

    async def _results(
        self,
        message: pb.ClassifyRequest,
        version: Answering,
        encodings: Sequence[Sequence[Encoding]],
        finished: Sequence[Sequence[Finished]],
    ) -> Sequence[pb.Classification]:
        """One for each input. Spans are searched for in the tokenizer's thread: of a long text there are many."""
        card, text = version.card, self._served.text
        how = convert.scores_as(message.scores_as, card.problem_type)
        if card.task is Task.MULTIPLE_CHOICE:
            return [convert.choice([end.scores[0][0] for end in own], how) for own in finished]
        both = [(encoding, end) for (encoding,), (end,) in zip(encodings, finished, strict=True)]
        match card.task:
            case Task.TOKEN_CLASSIFICATION:
                return [convert.tokens(end.scores, encoding, how, card.labels, text) for encoding, end in both]
            case Task.QUESTION_ANSWERING:
                asked = questions.Asked.of(message)
                return await self._served.tokenizing.run(
                    lambda: [
                        questions.answered(asked, given, encoding, end.scores, text)
                        for given, (encoding, end) in zip(message.inputs, both, strict=True)
                    ]
                )
        return [convert.sequence(end.scores[0], how, card.labels, card.problem_type) for _, end in both]


def _check(message: pb.ClassifyRequest, version: Answering) -> None:
    """Raises InvalidArgument for what this delta's task does not know."""
    for field, task in _FOR.items():
        if message.HasField(field) and version.card.task is not task:
            raise InvalidArgument(
                f"{field} is for {task}; {version.label} is a delta for {version.card.task}", field=field
            )
    if version.card.task is Task.QUESTION_ANSWERING:
        questions.Asked.of(message)
