"""The example that a reader sees first."""

import asyncio
from typing import Any

import pytest

from deltaserve_protos.v1 import deltas_pb2, inference_pb2

EXAMPLE = """
from deltaserve_client import Client

with Client() as client:
    print(client.deltas.load("acme/sst2", "sst2-lora").kinds)
    print(client.classify("a gripping film", delta="acme/sst2").label)
    print(client.generate("translate: hello", delta="acme/de", max_new_tokens=16).text)
    with client.stream("translate: hello", delta="acme/de") as pieces:
        print(*(piece.text for piece in pieces))
"""


async def test_example(
    server: Any,
    generated: Any,
    pieces: list[Any],
    delta: deltas_pb2.Delta,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.answers("LoadDelta", deltas_pb2.LoadDeltaResponse(delta=delta))
    server.answers("Classify", inference_pb2.ClassifyResponse(results=[{"sequence": {"label": "positive"}}]))
    server.answers("Generate", generated)
    server.answers("StreamGenerate", *pieces)
    monkeypatch.setenv("DELTASERVE_ADDRESS", server.address)
    await asyncio.wait_for(asyncio.to_thread(exec, compile(EXAMPLE, "example", "exec"), {}), 20)
    assert capsys.readouterr().out == "('lora', 'head')\npositive\nja\nj a\n"
