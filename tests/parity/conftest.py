"""A real server process for each family, and PEFT's answers to compare with."""

import functools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from methods import cases, covering
from oracle import Oracle
from reference import Prepared, prepare
from versus import BESIDE, FEW, Versus


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Prepared]:
    """`prepared("t5")` has a part of the family's cases, `prepared("t5/all")` has all of them; each is made once."""

    @functools.cache
    def make(name: str) -> Prepared:
        family, _, part = name.partition("/")
        return prepare(family, (cases if part else covering)(family), tmp_path_factory.mktemp(family))

    return make


@pytest.fixture(scope="session")
def server(prepared: Callable[[str], Prepared]) -> Iterator[Callable[[str], str]]:
    """`server(name)` is the address of a real server process for `prepared(name)`, in float32."""
    running: dict[str, tuple[subprocess.Popen[bytes], str]] = {}

    def start(family: str) -> str:
        if family not in running:
            running[family] = launched(prepared(family).folder)
        return running[family][1]

    yield start
    for process, _ in running.values():
        process.send_signal(signal.SIGTERM)
    assert [process.wait(30) for process, _ in running.values()] == [0] * len(running)


def launched(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """`deltaserve serve` on free ports; returns when it says that it is ready."""
    words = ["serve", str(folder / "backbone"), "--delta-root", str(folder / "deltas"), "--dtype", "float32"]
    words += ["--device", "cpu", "--threads", "1", "--max-running", "256", "--max-batch-tokens", "4096"]
    words += ["--kv-bytes", "32MiB", "--pool-bytes", "32MiB"]
    words += ["--grpc-port", "0", "--metrics-port", "0", "--batch-wait-ms", "200", "--log-format", "json"]
    log = folder / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen([sys.executable, "-m", "deltaserve", *words], stdout=out, stderr=out)
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        events = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{") and line[-1] == "}"]
        address = next((event["grpc"] for event in events if event["event"] == "ready"), None)
        if address is not None:
            return process, address
        time.sleep(0.1)
    process.kill()
    raise AssertionError(f"the server was not ready in time:\n{log.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def versus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Versus]]:
    """`versus(library, family, names)` is an engine with these recorded cases in it, or with all; made once."""
    made: dict[tuple[str, str, tuple[str, ...] | None], Versus] = {}

    def make(library: str, family: str, names: tuple[str, ...] | None = None) -> Versus:
        key = library, family, names
        if key not in made:
            oracle = Oracle(library, family)
            chosen = [name for name in oracle.cases if names is None or name in names]
            made[key] = Versus(oracle, tmp_path_factory.mktemp(family), chosen, BESIDE if names is None else FEW)
        return made[key]

    yield make
    for each in made.values():
        each.stop()
