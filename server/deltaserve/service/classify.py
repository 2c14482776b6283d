"""Classify: labels for inputs or for their tokens, by the head that the delta brings."""

from deltaserve.deltas.sites import Task
from deltaserve.engine.request import Job, Request
from deltaserve.errors import InvalidArgument
from deltaserve.service import convert
from deltaserve.service.call import Call
from deltaserve.service.inputs import Need, count
from deltaserve.service.served import Served
from deltaserve.service.target import target
from deltaserve_protos.v1 import inference_pb2 as pb


class Classifying:
    """Raises what `target`, `Reader.read` and the engine raise."""

    def __init__(self, served: Served) -> None:
        self._served = served

    async def whole(self, message: pb.ClassifyRequest, call: Call) -> pb.ClassifyResponse:
        served = self._served
        inputs = count(message)
        if message.scores_as not in pb.ScoresAs.values():
            raise InvalidArgument(f"scores_as has no value {int(message.scores_as)}", field="scores_as")
        with target(message, Job.CLASSIFY, served.backbone.spec, served.catalog, call) as version:
            assert version is not None
            card = version.card
            encodings = await served.read(message, served.room(version), [Need()] * inputs)
            deadline = call.deadline(served.request_timeout)
            finished = await served.finished(
                [
                    Request(
                        id=f"{call.request_id}/{index}",
                        job=Job.CLASSIFY,
                        ids=encoding.ids,
                        delta=version.ref,
                        token_type_ids=encoding.token_type_ids,
                        deadline=deadline,
                    )
                    for index, encoding in enumerate(encodings)
                ]
            )
            used = sum(len(encoding.ids) for encoding in encodings)
            served.count(version, used)
        how = convert.scores_as(message.scores_as, card.problem_type)
        if card.task is Task.TOKEN_CLASSIFICATION:
            results = [
                convert.tokens(end.scores, encoding, how, card.labels, served.text)
                for end, encoding in zip(finished, encodings, strict=True)
            ]
        else:
            results = [convert.sequence(end.scores[0], how, card.labels, card.problem_type) for end in finished]
        return pb.ClassifyResponse(
            results=results,
            labels=card.labels,
            scores_as=how,
            usage=pb.Usage(input_tokens=used),
            delta=version.label,
        )
