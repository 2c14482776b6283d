"""The client for asyncio."""

from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self, TypeVar, Unpack

import grpc

from deltaserve_client import options, requests
from deltaserve_client.connection import Connection
from deltaserve_client.errors import NotFound, request_id, told
from deltaserve_client.inputs import Continuations, Inputs
from deltaserve_client.results import (
    ClassifyResult,
    DeltaInfo,
    EmbedResult,
    GenerateResult,
    ScoreResult,
    ServerInfo,
    Unloaded,
)
from deltaserve_client.streams import AsyncStream

Result = TypeVar("Result")


class AsyncClient:
    """A connection to one server, for one event loop: the one that makes the first call.

    What `Client` says of addresses, time-outs, retries and exceptions holds here. A task that is cancelled cancels its
    call on the server.
    """

    def __init__(self, address: str | None = None, *, timeout: float | None = 600.0) -> None:
        self._connection = Connection.to(address, timeout)
        self._channel: grpc.aio.Channel | None = None
        self._closed = False
        self.deltas = AsyncDeltas(self)

    @property
    def address(self) -> str:
        return self._connection.address

    async def generate(self, inputs: Inputs, **told: Unpack[options.GenerateOptions]) -> GenerateResult:
        """Continues (decoder-only) or answers (encoder-decoder) each input. `.text` is the answer to a single one."""
        return await self._answer(requests.generate(inputs, told))

    def stream(self, inputs: Inputs, **told: Unpack[options.GenerateOptions]) -> AsyncStream:
        """The same as it is made: an async iterator of Piece. In `async with`, leaving cancels what still runs."""
        call = requests.stream(inputs, told)
        running = self._open().unary_stream(call.path, call.serialize, call.parse)(
            call.request, timeout=self._connection.seconds(call.timeout), metadata=call.metadata
        )
        return AsyncStream(call, running, self.address)

    async def classify(self, inputs: Inputs, **told: Unpack[options.ClassifyOptions]) -> ClassifyResult:
        """What the delta's head says: labels for each input or its tokens, spans that answer it, its best choice."""
        return await self._answer(requests.classify(inputs, told))

    async def embed(self, inputs: Inputs, **told: Unpack[options.EmbedOptions]) -> EmbedResult:
        """One vector for each input."""
        return await self._answer(requests.embed(inputs, told))

    async def score(
        self, inputs: Inputs, continuations: Continuations, **told: Unpack[options.ScoreOptions]
    ) -> ScoreResult:
        """Log-likelihood of the given continuations: one set for one input, a sequence of sets for several."""
        return await self._answer(requests.score(inputs, continuations, told))

    async def server_info(self, steps: bool = False, **told: Unpack[options.CallOptions]) -> ServerInfo:
        """What the server is and is doing; with `steps` also its last 1,000 forwards."""
        return await self._answer(requests.server_info(steps, told))

    async def healthy(self, service: str = "", *, timeout: float | None = 5.0) -> bool:
        """Whether the server says SERVING (grpc.health.v1), for itself or for one of its services.

        A service that it does not know is not healthy. Raises Unavailable where nobody answers.
        """
        try:
            return await self._answer(requests.health(service, timeout))
        except NotFound:
            return False

    async def aclose(self) -> None:
        """Cancels what is running and closes the connection."""
        self._closed = True
        if self._channel is not None:
            await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def _open(self) -> grpc.aio.Channel:
        if self._closed:
            raise RuntimeError("this client is closed")
        if self._channel is None:  # made here, where there is a running loop: the channel belongs to it
            self._channel = grpc.aio.insecure_channel(self.address, options=self._connection.options)
        return self._channel

    async def _answer(self, call: requests.Call[Result]) -> Result:
        running = self._open().unary_unary(call.path, call.serialize, call.parse)(
            call.request, timeout=self._connection.seconds(call.timeout), metadata=call.metadata
        )
        try:
            answer = await running
        except grpc.RpcError as error:
            raise told(error, self.address) from error
        return call.read(answer, request_id(await running.initial_metadata(), await running.trailing_metadata()))


class AsyncDeltas:
    """The deltas of a server: `client.deltas`."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def load(self, name: str, source: str, **told: Unpack[options.LoadOptions]) -> DeltaInfo:
        """Loads a checkpoint from below the server's --delta-root; returns when it is resident."""
        return await self._client._answer(requests.load(name, source, told))

    async def unload(self, name: str, **told: Unpack[options.UnloadOptions]) -> Unloaded:
        """Takes `name` (all versions) or `name@version` out of service; running requests finish."""
        return await self._client._answer(requests.unload(name, told))

    async def get(self, name: str, **told: Unpack[options.CallOptions]) -> DeltaInfo:
        """`name` (the version that new requests get) or `name@version`."""
        return await self._client._answer(requests.get(name, told))

    async def list(self, page_size: int | None = None, **told: Unpack[options.CallOptions]) -> AsyncIterator[DeltaInfo]:
        """All deltas, by name and version. Pages are fetched as they are needed; `timeout` is for each of them."""
        following = ""
        while True:
            page = await self._client._answer(requests.page(following, page_size, told))
            for delta in page.deltas:
                yield delta
            following = page.following
            if not following:
                return
