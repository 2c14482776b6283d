"""The engine's events for one call, on the event loop."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Protocol

from deltaserve.engine.request import Emit, Event, Failed, Finished, Request
from deltaserve.errors import DeltaserveError, Unavailable


class Accepting(Protocol):
    """What takes requests and lets go of them: the engine."""

    def submit(self, requests: Sequence[Request], emit: Emit) -> None: ...
    def cancel(self, request_ids: Iterable[str]) -> None: ...


class Answers:
    """Submits requests on entry; on exit, however it comes, cancels those that have not ended.

    The queue is as long as the requests' outputs at most. Raises what `submit` raises.
    """

    def __init__(self, engine: Accepting, requests: Sequence[Request]) -> None:
        self._engine = engine
        self._requests = requests
        self._open = {request.id for request in requests}
        self._queue: asyncio.Queue[Sequence[Event]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    async def __aenter__(self) -> "Answers":
        self._engine.submit(self._requests, self._emit)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open:
            self._engine.cancel(tuple(self._open))
            self._open.clear()

    def leave(self, request_id: str) -> None:
        """This request's further events are not wanted; it is cancelled if it still runs."""
        if request_id in self._open:
            self._open.discard(request_id)
            self._engine.cancel((request_id,))

    async def batches(self) -> AsyncIterator[list[Event]]:
        """Events of one step at a time, until every request has ended. Raises the error of the first that failed."""
        while self._open:
            batch: list[Event] = []
            for event in await self._queue.get():
                if event.request_id not in self._open:
                    continue
                if isinstance(event, Failed):
                    self._open.discard(event.request_id)
                    raise _fresh(event.error)
                if isinstance(event, Finished):
                    self._open.discard(event.request_id)
                batch.append(event)
            if batch:
                yield batch

    async def finished(self) -> Mapping[str, Finished]:
        """The last events of all requests, by id. Raises the error of the first that failed."""
        ended: dict[str, Finished] = {}
        async for batch in self.batches():
            ended.update((event.request_id, event) for event in batch if isinstance(event, Finished))
        return ended

    def _emit(self, events: Sequence[Event]) -> None:
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, events)
        except RuntimeError as error:
            raise Unavailable("the event loop is closed; nobody waits for these events") from error


def _fresh(error: DeltaserveError) -> DeltaserveError:
    """A copy: one error object may end many requests, and each raise would add to its traceback."""
    return type(error)(
        error.message, reason=error.reason, field=error.field, metadata=error.metadata, retry_after=error.retry_after
    )
