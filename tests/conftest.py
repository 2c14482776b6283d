"""What has to be settled before any test imports torch, Triton or transformers."""

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HAS_GPU = os.environ.get("CUDA_VISIBLE_DEVICES") != "" and any(
    Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
)

if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before any import of one
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models gain nothing, and barriers stall beside other work


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not HAS_GPU:
        pytest.skip("needs a GPU")


@dataclass(frozen=True)
class Running:
    """A server of this process: `address` and `metrics` are host:port, `app` is the server itself, on `loop`."""

    app: Any
    address: str
    metrics: str
    loop: asyncio.AbstractEventLoop

    def stop(self, drain_seconds: float = 0.0) -> None:
        asyncio.run_coroutine_threadsafe(self.app.stop(drain_seconds), self.loop).result(60)


@pytest.fixture(scope="session")
def loop_thread() -> Iterator[asyncio.AbstractEventLoop]:
    """The loop that all servers of this process run on, in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="servers", daemon=True)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


@pytest.fixture(scope="session")
def start(loop_thread: asyncio.AbstractEventLoop) -> Callable[..., Running]:
    """`start(folder, **settings)` is a new server, which the caller stops. Raises what starting it raises."""

    import structlog

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))  # errors; calls are many

    def run(folder: Path | str, **settings: Any) -> Running:
        from deltaserve.app.server import App
        from deltaserve.config import Settings

        small = {"grpc_port": 0, "metrics_port": 0, "kv_bytes": 16 << 20, "pool_bytes": 16 << 20, "threads": 1}
        app = App(Settings(backbone=str(folder), **{"dtype": "float32", "device": "cpu"} | small | settings))

        async def begin() -> Any:
            try:
                return await app.start()
            except BaseException:
                await app.stop(0)
                raise

        ready = asyncio.run_coroutine_threadsafe(begin(), loop_thread).result(60)
        return Running(app, ready.grpc, ready.metrics, loop_thread)

    return run


@pytest.fixture(scope="session")
def serving(start: Callable[..., Running]) -> Iterator[Callable[..., str]]:
    """`serving(folder, **settings)` is the address of a server with these settings, one for the whole session."""
    running: dict[str, Running] = {}

    def address(folder: Path | str, **settings: Any) -> str:
        key = repr((str(folder), sorted(settings.items())))
        if key not in running:
            running[key] = start(folder, **settings)
        return running[key].address

    yield address
    for each in running.values():
        each.stop()
