"""Score: how likely given continuations of each input are."""

from collections.abc import Sequence

from deltaserve.engine.request import Job, Request
from deltaserve.errors import InvalidArgument
from deltaserve.service import convert
from deltaserve.service.call import Call
from deltaserve.service.inputs import MOST_CONTINUATIONS, Need, Room, check_outputs, count
from deltaserve.service.served import Served
from deltaserve.service.target import target
from deltaserve.service.text import Encoding
from deltaserve_protos.v1 import inference_pb2 as pb

_MOST_LOGPROBS = 20

Tokens = tuple[int, ...]


class Scoring:
    """Raises what `target`, `Reader` and the engine raise."""

    def __init__(self, served: Served) -> None:
        self._served = served

    async def whole(self, message: pb.ScoreRequest, call: Call) -> pb.ScoreResponse:
        served = self._served
        count(message)
        _check(message)
        async with target(message, Job.SCORE, served, call) as version:
            served.check_number(sum(len(given.continuations) for given in message.continuations))
            room = served.room(version)
            encodings, asked = await served.tokenizing.run(lambda: self._read(message, room))
            deadline = call.deadline(served.request_timeout)
            finished = await served.finished(
                [
                    Request(
                        id=f"{call.request_id}/{index}/{number}",
                        job=Job.SCORE,
                        ids=encoding.ids,
                        delta=None if version is None else version.ref,
                        token_type_ids=encoding.token_type_ids,
                        continuation=continuation,
                        score_logprobs=message.logprobs,
                        deadline=deadline,
                    )
                    for index, (encoding, own) in enumerate(zip(encodings, asked, strict=True))
                    for number, continuation in enumerate(own)
                ]
            )
            read = sum(len(encoding.ids) for encoding in encodings)
            scored = sum(len(continuation) for own in asked for continuation in own)
            served.count(version, read, scored)
        ends = iter(finished)
        return pb.ScoreResponse(
            results=[
                pb.InputScores(scores=[convert.continuation(next(ends).positions, served.text) for _ in own])
                for own in asked
            ],
            usage=pb.Usage(input_tokens=read, output_tokens=scored),
            delta="" if version is None else version.label,
        )

    def _read(self, message: pb.ScoreRequest, room: Room) -> tuple[list[Encoding], Sequence[Sequence[Tokens]]]:
        """Inputs and the continuations of each; an input may be cut to leave room for its longest continuation."""
        reader = self._served.reader
        asked, needs = [], []
        for index, given in enumerate(message.continuations):
            field = f"continuations[{index}].continuations"
            own = [reader.continuation(one, f"{field}[{i}]") for i, one in enumerate(given.continuations)]
            need = Need(max(map(len, own)), "a continuation of")
            check_outputs(room, need, field)
            asked.append(own)
            needs.append(need)
        return reader.read(message, room, needs), asked


def _check(message: pb.ScoreRequest) -> None:
    if len(message.continuations) != len(message.inputs):
        raise InvalidArgument(
            f"{len(message.continuations)} sets of continuations for {len(message.inputs)} inputs; each input has one",
            field="continuations",
        )
    for index, given in enumerate(message.continuations):
        if not 1 <= len(given.continuations) <= MOST_CONTINUATIONS:
            raise InvalidArgument(
                f"input {index} has {len(given.continuations)} continuations; it must have 1 to {MOST_CONTINUATIONS}",
                field=f"continuations[{index}].continuations",
            )
    if message.logprobs > _MOST_LOGPROBS:
        raise InvalidArgument(
            f"logprobs is {message.logprobs}; it must be from 0 to {_MOST_LOGPROBS}", field="logprobs"
        )
