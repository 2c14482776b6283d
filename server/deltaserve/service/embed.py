"""Embed: one vector for each input."""

from collections.abc import Mapping

from deltaserve.backbone.families import Shape
from deltaserve.deltas.sites import Pooling
from deltaserve.engine.request import Job, Request
from deltaserve.errors import InvalidArgument
from deltaserve.service import convert
from deltaserve.service.call import Call
from deltaserve.service.inputs import Need, count
from deltaserve.service.served import Served
from deltaserve.service.target import target
from deltaserve_protos.v1 import inference_pb2 as pb

_DEFAULT: Mapping[Shape, Pooling] = {
    Shape.ENCODER: Pooling.CLS,
    Shape.ENCODER_DECODER: Pooling.MEAN,
    Shape.DECODER: Pooling.LAST,
}


class Embedding:
    """Raises what `target`, `Reader.read` and the engine raise."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._default = _DEFAULT[served.backbone.family.shape]

    async def whole(self, message: pb.EmbedRequest, call: Call) -> pb.EmbedResponse:
        served = self._served
        inputs = count(message)
        pooling = self._default if not message.pooling else convert.POOLING_OF.get(message.pooling)
        if pooling is None:
            raise InvalidArgument(f"pooling has no value {int(message.pooling)}", field="pooling")
        async with target(message, Job.EMBED, served, call) as version:
            encodings = await served.read(message, served.room(version), [Need()] * inputs)
            deadline = call.deadline(served.request_timeout)
            finished = await served.finished(
                [
                    Request(
                        id=f"{call.request_id}/{index}",
                        job=Job.EMBED,
                        ids=encoding.ids,
                        delta=None if version is None else version.ref,
                        token_type_ids=encoding.token_type_ids,
                        pooling=pooling,
                        deadline=deadline,
                    )
                    for index, encoding in enumerate(encodings)
                ]
            )
            used = sum(len(encoding.ids) for encoding in encodings)
            served.count(version, used)
        normalize = message.normalize if message.HasField("normalize") else True
        return pb.EmbedResponse(
            results=[convert.vector(end.vector, normalize) for end in finished],
            pooling=convert.pooling(pooling),
            usage=pb.Usage(input_tokens=used),
            delta="" if version is None else version.label,
        )
