"""A generation while it is made: iterators of pieces that can be closed, which cancels it on the server."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from types import TracebackType
from typing import Any, Self, cast

import grpc

from deltaserve_client.errors import request_id, told
from deltaserve_client.requests import Call
from deltaserve_client.results import Piece


class Stream(Iterator[Piece]):
    """Pieces as they come; raises DeltaserveError where the call fails.

    Leaving `with`, or `close`, cancels what is still running; a closed stream has no more pieces.
    """

    def __init__(self, call: Call[Piece], running: Any, address: str) -> None:
        self._call = call
        self._running = running
        self._address = address
        self._closed = False

    def __next__(self) -> Piece:
        if self._closed:
            raise StopIteration
        try:
            answer = next(self._running)
            return self._call.read(answer, request_id(self._running.initial_metadata()))
        except grpc.RpcError as error:
            if self._closed:  # by another thread
                raise StopIteration from None
            raise told(error, self._address) from error

    def close(self) -> None:
        """May be called from another thread, and more than once."""
        self._closed = True
        self._running.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncStream(AsyncIterator[Piece]):
    """Pieces as they come; raises DeltaserveError where the call fails.

    Leaving `async with`, or `aclose`, cancels what is still running; a closed stream has no more pieces.
    """

    def __init__(self, call: Call[Piece], running: Any, address: str) -> None:
        self._call = call
        self._running = running
        self._answers = cast("AsyncGenerator[Any, None]", aiter(running))
        self._address = address
        self._reading = False
        self._closed = False

    async def __anext__(self) -> Piece:
        if self._closed:
            raise StopAsyncIteration
        self._reading = True
        try:
            answer = await anext(self._answers)
            return self._call.read(answer, request_id(await self._running.initial_metadata()))
        except grpc.RpcError as error:
            if self._closed:  # by another task
                raise StopAsyncIteration from None
            raise told(error, self._address) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._closed and task is not None and not task.cancelling():
                raise StopAsyncIteration from None
            raise
        finally:
            self._reading = False

    async def aclose(self) -> None:
        """May be called from another task, and more than once."""
        self._closed = True
        self._running.cancel()
        if not self._reading:
            await self._answers.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()
