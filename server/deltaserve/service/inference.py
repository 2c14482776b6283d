"""InferenceService: one method a job."""

from collections.abc import AsyncIterator

from deltaserve.service.call import Call
from deltaserve.service.classify import Classifying
from deltaserve.service.embed import Embedding
from deltaserve.service.generate import Generating
from deltaserve.service.score import Scoring
from deltaserve.service.served import Served
from deltaserve_protos.v1 import inference_pb2 as pb
from deltaserve_protos.v1 import inference_pb2_grpc


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Behind the interceptor, which makes a `Call` of the context and statuses of errors."""

    def __init__(self, served: Served) -> None:
        self._generating = Generating(served)
        self._classifying = Classifying(served)
        self._embedding = Embedding(served)
        self._scoring = Scoring(served)

    async def Generate(self, request: pb.GenerateRequest, context: Call) -> pb.GenerateResponse:
        return await self._generating.whole(request, context)

    def StreamGenerate(
        self, request: pb.StreamGenerateRequest, context: Call
    ) -> AsyncIterator[pb.StreamGenerateResponse]:
        return self._generating.stream(request, context)

    async def Classify(self, request: pb.ClassifyRequest, context: Call) -> pb.ClassifyResponse:
        return await self._classifying.whole(request, context)

    async def Embed(self, request: pb.EmbedRequest, context: Call) -> pb.EmbedResponse:
        return await self._embedding.whole(request, context)

    async def Score(self, request: pb.ScoreRequest, context: Call) -> pb.ScoreResponse:
        return await self._scoring.whole(request, context)
