"""`deltaserve serve` as a process: what it prints, how it ends, and that a user's mistake is no traceback."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from deltaserve.errors import DeltaserveError
from deltaserve_protos.v1 import inference_pb2 as pb
from deltaserve_protos.v1 import inference_pb2_grpc

ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("DELTASERVE_")} | {"OMP_NUM_THREADS": "1"}
SMALL = ("--kv-bytes", "16MiB", "--pool-bytes", "4MiB", "--dtype", "float32", "--device", "cpu")
PORTS = ("--grpc-port", "0", "--metrics-port", "0")


class Served:
    """A server process; `events` are the lines that it has written."""

    def __init__(self, *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "deltaserve", "serve", *words, *SMALL], stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
        )  # fmt: skip
        self.events: list[dict[str, Any]] = []
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.events.append(json.loads(line))
            if self.events[-1]["event"] == "ready":
                self._ready.set()

    def ready(self) -> dict[str, Any]:
        assert self._ready.wait(60), (self.events, self.process.poll())
        return next(event for event in self.events if event["event"] == "ready")

    def ended(self, seconds: float = 30) -> tuple[int, str]:
        code = self.process.wait(seconds)
        self._reader.join(5)
        assert self.process.stderr is not None
        return code, self.process.stderr.read()


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    started: list[Served] = []

    def begin(*words: str) -> Served:
        started.append(Served(*words))
        return started[-1]

    yield begin
    for each in started:
        each.process.kill()
        each.process.wait(10)
        for pipe in (each.process.stdout, each.process.stderr):
            assert pipe is not None
            pipe.close()


def streams(address: str, count: int, tokens: int) -> tuple[grpc.Channel, list[Any]]:
    channel = grpc.insecure_channel(address)
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    request = pb.StreamGenerateRequest(
        deltas=["lora"], inputs=[pb.Input(ids=[5])], sampling=pb.Sampling(max_new_tokens=tokens, ignore_eos=True)
    )
    begun = [stub.StreamGenerate(request, timeout=60)]
    next(begun[0])
    begun += [stub.StreamGenerate(request, timeout=60) for _ in range(count - 1)]
    return channel, begun


def test_a_life_under_load(serve: Callable[..., Served], llama: Any) -> None:
    """One JSON object a line; SIGTERM ends every stream with a result or UNAVAILABLE; exit code 0."""
    server = serve(str(llama.made.backbone), *PORTS, "--delta", f"lora={llama.root / 'lora'}", "--drain-seconds", "1",
                   "--served-name", "tiny", "--log-level", "debug")  # fmt: skip
    ready = server.ready()
    assert (ready["backbone"], ready["family"], ready["device"]) == ("tiny", "llama", "cpu")
    assert ready["deltas"] == ["lora@1"] and ready["dtype"] == "float32" and ready["parameters"] > 0
    assert ready["pool_bytes"] <= 4 << 20 and ready["kv_bytes"] <= 16 << 20 and ready["level"] == "info"
    assert ready["metrics"].startswith("127.0.0.1:") and ready["threads"] == 1
    channel, begun = streams(ready["grpc"], 4, 4000)
    _, waiting = streams(ready["grpc"], 40, 400)
    with channel:
        server.process.send_signal(signal.SIGTERM)
        ends = []
        for stream in begun + waiting:
            try:
                list(stream)
                ends.append("OK")
            except grpc.RpcError as error:
                ends.append(error.code().name)
        assert set(ends) <= {"OK", "UNAVAILABLE"} and "UNAVAILABLE" in ends and len(ends) == 44
    assert server.ended() == (0, "")
    assert {"call", "signal", "draining", "stopped"} <= {event["event"] for event in server.events}


def test_a_second_signal_ends_the_drain(serve: Callable[..., Served], llama: Any) -> None:
    server = serve(str(llama.made.backbone), *PORTS, "--delta", f"lora={llama.root / 'lora'}", "--drain-seconds", "60")
    channel, begun = streams(server.ready()["grpc"], 4, 4000)
    with channel:
        server.process.send_signal(signal.SIGINT)
        while not any(event["event"] == "draining" for event in server.events):
            time.sleep(0.01)
        server.process.send_signal(signal.SIGINT)
        code, said = server.ended(15)
        assert (code, said) == (0, "")
        for stream in begun:
            with pytest.raises(grpc.RpcError) as ended:
                list(stream)
            assert ended.value.code() == grpc.StatusCode.UNAVAILABLE


def test_mistakes_are_one_block(serve: Callable[..., Served], llama: Any) -> None:
    taken = llama.running.address.rpartition(":")[2]
    backbone = str(llama.made.backbone)
    mistakes = {
        (backbone, *PORTS, "--delta", "gone=nowhere"): (1, ["--delta gone=nowhere", "nowhere"]),
        (backbone, "--metrics-port", taken, "--grpc-port", "0"): (1, [f"127.0.0.1:{taken}", "--metrics-port"]),
        (backbone, "--grpc-port", taken, "--metrics-port", "0"): (1, [f"127.0.0.1:{taken}", "--grpc-port"]),
        (backbone, *PORTS, "--host", "0.0.0.0"): (2, ["--insecure"]),
    }
    servers = {words: serve(*words) for words in mistakes}
    for words, (code, said) in mistakes.items():
        ended, error = servers[words].ended(60)
        assert ended == code, (words, error)
        assert "Traceback" not in error and error.startswith("error: "), error
        assert all(part in " ".join(error.split()) for part in said), error


@pytest.mark.parametrize(
    ("told", "reason", "said"),
    [
        ({"delta": ("Bad=x",)}, "BAD_NAME", "a name is"),
        ({"delta": ("a=nowhere", "b=x")}, "BAD_CHECKPOINT", "--delta a=nowhere"),
        ({"max_model_len": 5000}, "BAD_REQUEST", "--max-model-len 5000: this backbone has 4096"),
        ({"device": "cuda:9"}, "NO_DEVICE", "--device cuda:9"),
    ],
    ids=str,
)
def test_what_cannot_start_says_why(start: Any, llama: Any, told: dict[str, Any], reason: str, said: str) -> None:
    with pytest.raises(DeltaserveError) as refused:
        start(llama.made.backbone, **told)
    assert refused.value.reason == reason and said in refused.value.message


def test_backbones_that_are_not_served(start: Any, tmp_path: Path) -> None:
    with pytest.raises(DeltaserveError) as refused:
        start(tmp_path / "missing")
    assert refused.value.reason == "BACKBONE_NOT_FOUND"
    (tmp_path / "config.json").write_text('{"model_type": "mamba", "architectures": ["MambaForCausalLM"]}')
    with pytest.raises(DeltaserveError) as refused:
        start(tmp_path)
    assert refused.value.reason == "BACKBONE_NOT_SERVED" and "gpt2" in refused.value.message
