"""`deltaserve demo`: a server process on the embedded default, its deltas loaded under traffic, one mixed batch."""

import contextlib
import json as encoding
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from deltaserve.demo import screen
from deltaserve.demo.launch import Server
from deltaserve.demo.results import Results
from deltaserve.demo.scenario import Outcome, play
from deltaserve.errors import Unavailable
from deltaserve_client import Client, DeltaserveError

ASSETS = Path(__file__).parent / "assets"
_HEALTHY_SECONDS = 20.0


def run(*, json: bool, keep: bool, port: int) -> int:
    """Plays it, and returns 0 only where every answer was right and the server ended in order.

    With `json` standard output holds one JSON document and nothing else. With `keep` the server stays until Ctrl-C.
    Raises Unavailable where the server does not start, and what the client raises where a call fails; the end of the
    server's log is part of the message.
    """
    began = time.monotonic()
    results = Results.read(ASSETS)
    to = Console(quiet=True) if json else screen.console()
    screen.opening(to, results)
    server = Server(ASSETS / "backbone", ASSETS / "deltas", port)
    with _terminated(), server:
        try:
            outcome = _played(server, results, to)
        except DeltaserveError as error:
            raise Unavailable(f"{error.message}\nThe end of the server's log:\n{server.log()}") from error
        screen.told(to, outcome, results)
        screen.onwards(to, server.address, outcome, keep)
        shown = time.monotonic() - began
        if keep:
            _until_interrupted(server)
        address, ended = server.address, server.stop()
    screen.verdict(to, outcome, ended, shown)
    if json:
        print(encoding.dumps(_document(_Told(outcome, address, ended, shown)), ensure_ascii=False, indent=1))
    return 0 if outcome.right and ended == 0 else 1


def _played(server: Server, results: Results, to: Console) -> Outcome:
    with Client(server.address, timeout=60) as client:
        _healthy(client)
        screen.started(to, server.address, client.server_info())
        return play(client, results, lambda info: screen.loaded(to, info))


def _healthy(client: Client) -> None:
    end = time.monotonic() + _HEALTHY_SECONDS
    while not client.healthy():
        if time.monotonic() > end:
            raise Unavailable(f"the server at {client.address} is up but not healthy after {_HEALTHY_SECONDS:.0f} s")
        time.sleep(0.05)


def _until_interrupted(server: Server) -> None:
    with contextlib.suppress(KeyboardInterrupt):
        server.wait()


@contextlib.contextmanager
def _terminated() -> Iterator[None]:
    """SIGTERM ends the demo as Ctrl-C does, so that the server, in a process group of its own, does not outlive it."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass(frozen=True)
class _Told:
    outcome: Outcome
    address: str
    ended: int | None
    seconds: float


def _document(told: _Told) -> dict[str, Any]:
    outcome, info = told.outcome, told.outcome.info
    by_name = {delta.name: delta for delta in outcome.loaded}
    deltas = sum(delta.device_bytes for delta in outcome.loaded)
    return {
        "right": outcome.right,
        "address": told.address,
        "device": info.device,
        "dtype": info.dtype,
        "seconds": told.seconds,
        "server_exit_status": told.ended,
        "traffic_while_loading": {"load_seconds": outcome.load_seconds, **asdict(outcome.traffic)},
        "requests": [
            {
                "deltas": each.question.deltas,
                "kinds": list(dict.fromkeys(kind for name in each.question.deltas for kind in by_name[name].kinds)),
                "device_bytes": [by_name[name].device_bytes for name in each.question.deltas],
                "input": each.question.input,
                "answer": each.answer,
                "expected": each.question.expected,
                "right": each.right,
                "seconds": each.seconds,
                "output_tokens": each.output_tokens,
            }
            for each in outcome.answers
        ],
        "forwards": [asdict(step) for step in outcome.forwards],
        "widest_forward": {
            "sequences": outcome.widest.sequences,
            "deltas": len(outcome.widest.deltas),
            "kinds": len(outcome.widest.kinds),
        },
        "memory": {
            "backbone_bytes": info.memory.backbone_bytes,
            "delta_bytes": deltas,
            "full_copies_bytes": info.memory.backbone_bytes * len(outcome.loaded),
        },
    }
