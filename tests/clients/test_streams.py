"""Streams: closing one cancels it on the server, whoever closes it, and a broken one says so."""

import asyncio
from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as Packed
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from deltaserve_client import AsyncClient, Client, Unavailable

SECONDS = 10


@pytest.fixture
def endless(server: Any, pieces: list[Any]) -> Any:
    async def behave(_: Any, context: Any) -> None:
        while True:
            await context.write(pieces[0])
            await asyncio.sleep(0.01)

    server.behaves["StreamGenerate"] = behave
    return server


@pytest.fixture
def silent(server: Any) -> Any:
    async def behave(_: Any, context: Any) -> None:
        await context.send_initial_metadata(())
        await asyncio.sleep(60)

    server.behaves["StreamGenerate"] = behave
    return server


async def test_leaving_with_cancels_sync(endless: Any) -> None:
    def read() -> None:
        with Client(endless.address) as client:
            with client.stream("a", delta="d") as stream:
                assert next(stream).text == "j"
                assert next(stream).text == "j"
            assert list(stream) == []
            stream.close()

    await asyncio.wait_for(asyncio.to_thread(read), SECONDS)
    await asyncio.wait_for(endless.cancelled.wait(), SECONDS)


async def test_leaving_with_cancels_async(endless: Any) -> None:
    async with asyncio.timeout(SECONDS), AsyncClient(endless.address) as client:
        async with client.stream("a", delta="d") as stream:
            assert (await anext(stream)).text == "j"
            assert (await anext(stream)).text == "j"
        assert [piece async for piece in stream] == []
        await stream.aclose()
        await endless.cancelled.wait()


async def test_closing_from_elsewhere_ends_the_iteration_sync(silent: Any) -> None:
    with Client(silent.address) as client:
        stream = client.stream("a", delta="d")
        reading = asyncio.create_task(asyncio.to_thread(list, stream))
        await asyncio.sleep(0.2)
        await asyncio.to_thread(stream.close)
        assert await asyncio.wait_for(reading, SECONDS) == []
    await asyncio.wait_for(silent.cancelled.wait(), SECONDS)


async def test_closing_from_elsewhere_ends_the_iteration_async(silent: Any) -> None:
    async with asyncio.timeout(SECONDS), AsyncClient(silent.address) as client:
        stream = client.stream("a", delta="d")

        async def read() -> list[Any]:
            return [piece async for piece in stream]

        reading = asyncio.create_task(read())
        await asyncio.sleep(0.2)
        await stream.aclose()
        assert await reading == []
        await silent.cancelled.wait()


async def test_a_cancelled_task_cancels_its_call(silent: Any) -> None:
    silent.behaves["Generate"] = silent.behaves["StreamGenerate"]
    async with asyncio.timeout(SECONDS), AsyncClient(silent.address) as client:

        async def read() -> None:
            async for _ in client.stream("a", delta="d"):
                pass

        for work in (read(), client.generate("a", delta="d")):
            silent.cancelled.clear()
            task = asyncio.create_task(work)
            await asyncio.sleep(0.2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await silent.cancelled.wait()


async def test_a_stream_that_breaks_is_not_begun_again(ask: Any, server: Any, pieces: list[Any]) -> None:
    async def behave(_: Any, context: Any) -> None:
        await context.write(pieces[0])
        info = Packed()
        info.Pack(ErrorInfo(reason="DRAINING", domain="deltaserve"))
        status = Status(code=14, message="draining", details=[info]).SerializeToString()
        await context.abort(grpc.StatusCode.UNAVAILABLE, "draining", (("grpc-status-details-bin", status),))

    server.behaves["StreamGenerate"] = behave
    texts: list[str] = []

    def read() -> None:
        texts.extend(piece.text for piece in ask.client.stream("a", delta="d"))

    async def aread() -> None:
        async for piece in ask.client.stream("a", delta="d"):
            texts.append(piece.text)

    with pytest.raises(Unavailable) as caught:
        await asyncio.wait_for(asyncio.to_thread(read) if ask.blocks else aread(), SECONDS)
    assert (texts, caught.value.reason, len(server.requests)) == (["j"], "DRAINING", 1)
