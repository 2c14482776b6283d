"""The client that blocks."""

from collections.abc import Iterator
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
from deltaserve_client.streams import Stream

Result = TypeVar("Result")


class Client:
    """A connection to one server; threads may share it. `AsyncClient` has the same methods.

    `address` is host:port, by default $DELTASERVE_ADDRESS, else 127.0.0.1:9000; nothing is sent before the first call.
    `timeout` (seconds, None for none) is that of calls which bring none. UNAVAILABLE is tried three times, as long as
    nothing of the answer has come. Every call raises DeltaserveError (`deltaserve_client.errors` has the tree),
    TypeError or ValueError for arguments that cannot be sent, and RuntimeError once the client is closed.
    """

    def __init__(self, address: str | None = None, *, timeout: float | None = 600.0) -> None:
        self._connection = Connection.to(address, timeout)
        self._channel = grpc.insecure_channel(self.address, options=self._connection.options)
        self._closed = False
        self.deltas = Deltas(self)

    @property
    def address(self) -> str:
        return self._connection.address

    def generate(self, inputs: Inputs, **told: Unpack[options.GenerateOptions]) -> GenerateResult:
        """Continues (decoder-only) or answers (encoder-decoder) each input. `.text` is the answer to a single one."""
        return self._answer(requests.generate(inputs, told))

    def stream(self, inputs: Inputs, **told: Unpack[options.GenerateOptions]) -> Stream:
        """The same as it is made: an iterator of Piece. In `with`, leaving cancels what is still running."""
        call = requests.stream(inputs, told)
        running = self._open().unary_stream(call.path, call.serialize, call.parse)(
            call.request, timeout=self._connection.seconds(call.timeout), metadata=call.metadata
        )
        return Stream(call, running, self.address)

    def classify(self, inputs: Inputs, **told: Unpack[options.ClassifyOptions]) -> ClassifyResult:
        """What the delta's head says: labels for each input or its tokens, spans that answer it, its best choice."""
        return self._answer(requests.classify(inputs, told))

    def embed(self, inputs: Inputs, **told: Unpack[options.EmbedOptions]) -> EmbedResult:
        """One vector for each input."""
        return self._answer(requests.embed(inputs, told))

    def score(self, inputs: Inputs, continuations: Continuations, **told: Unpack[options.ScoreOptions]) -> ScoreResult:
        """Log-likelihood of the given continuations: one set for one input, a sequence of sets for several."""
        return self._answer(requests.score(inputs, continuations, told))

    def server_info(self, steps: bool = False, **told: Unpack[options.CallOptions]) -> ServerInfo:
        """What the server is and is doing; with `steps` also its last 1,000 forwards."""
        return self._answer(requests.server_info(steps, told))

    def healthy(self, service: str = "", *, timeout: float | None = 5.0) -> bool:
        """Whether the server says SERVING (grpc.health.v1), for itself or for one of its services.

        A service that it does not know is not healthy. Raises Unavailable where nobody answers.
        """
        try:
            return self._answer(requests.health(service, timeout))
        except NotFound:
            return False

    def close(self) -> None:
        """Cancels what is running and closes the connection."""
        self._closed = True
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> grpc.Channel:
        if self._closed:
            raise RuntimeError("this client is closed")
        return self._channel

    def _answer(self, call: requests.Call[Result]) -> Result:
        method = self._open().unary_unary(call.path, call.serialize, call.parse)
        try:
            answer, done = method.with_call(
                call.request, timeout=self._connection.seconds(call.timeout), metadata=call.metadata
            )
        except grpc.RpcError as error:
            raise told(error, self.address) from error
        return call.read(answer, request_id(done.initial_metadata(), done.trailing_metadata()))


class Deltas:
    """The deltas of a server: `client.deltas`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def load(self, name: str, source: str, **told: Unpack[options.LoadOptions]) -> DeltaInfo:
        """Loads a checkpoint from below the server's --delta-root; returns when it is resident."""
        return self._client._answer(requests.load(name, source, told))

    def unload(self, name: str, **told: Unpack[options.UnloadOptions]) -> Unloaded:
        """Takes `name` (all versions) or `name@version` out of service; running requests finish."""
        return self._client._answer(requests.unload(name, told))

    def get(self, name: str, **told: Unpack[options.CallOptions]) -> DeltaInfo:
        """`name` (the version that new requests get) or `name@version`."""
        return self._client._answer(requests.get(name, told))

    def list(self, page_size: int | None = None, **told: Unpack[options.CallOptions]) -> Iterator[DeltaInfo]:
        """All deltas, by name and version. Pages are fetched as they are needed; `timeout` is for each of them."""
        following = ""
        while True:
            page = self._client._answer(requests.page(following, page_size, told))
            yield from page.deltas
            following = page.following
            if not following:
                return
