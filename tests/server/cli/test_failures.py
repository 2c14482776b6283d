"""Errors are one block on stderr, without a traceback, and exit codes tell them apart."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deltaserve.cli.failure import failure


def test_unknown_delta(command: Any, server: Any, unknown_delta: Any) -> None:
    server.fails("Generate", "NOT_FOUND", "no delta [bold]'acme/sst3'[/bold]; is it acme/sst2?", *unknown_delta)
    done = command("generate", "a", "-d", "acme/sst3")
    assert (done.code, done.out) == (1, "")
    first, *rest = done.err.splitlines()
    assert first == "error: no delta [bold]'acme/sst3'[/bold]; is it acme/sst2?"
    told = {name: " ".join(value) for name, *value in (line.split() for line in rest)}
    assert told["field"] == "deltas[0]"
    assert told["hint"].startswith("`deltaserve deltas ls` shows")
    assert told["reason"] == "DELTA_NOT_FOUND (NOT_FOUND)"
    assert told["request"] == "00c0ffee"
    assert "2 s" in done.err


def test_a_stream_that_fails(command: Any, server: Any, unknown_delta: Any) -> None:
    server.fails("StreamGenerate", "NOT_FOUND", "no such delta", *unknown_delta)
    done = command("generate", "a", "-d", "d", "--stream")
    assert done.code == 1
    assert done.err.startswith("error: no such delta\n")


@pytest.mark.parametrize(
    "words", [["generate", "a", "-d", "d"], ["generate", "a", "-d", "d", "--stream"], ["deltas", "ls"], ["info"]]
)
def test_nobody_there(command: Any, words: list[str]) -> None:
    done = command(*words, "--address", "127.0.0.1:1")
    assert done.code == 3
    assert done.err.startswith("error: no answer from 127.0.0.1:1: ")
    assert "deltaserve serve BACKBONE" in done.err
    assert "UNREACHABLE" in done.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["generate"], "INPUT"),
        (["generate", "a", "--top-k", "-1"], "--top-k"),
        (["generate", "a", "--truncate", "middle"], "--truncate"),
        (["generate", "a", "--beams", "4"], "--beams"),
        (["generate", "-", "-"], "read once"),
        (["generate", "\udcff", "-d", "d"], "UTF-8"),
        (["classify", "one", "--ids"], "token ids"),
        (["classify", "a", "--pair", "b", "--pair", "c"], "--pair"),
        (["score", "a"], "--continuation"),
        (["deltas", "load", "name"], "SOURCE"),
        (["serve"], "BACKBONE"),
        (["serve", "b", "--grpc-port", "many"], "--grpc-port"),
        (["nonsense"], "nonsense"),
    ],
)
def test_wrong_usage(command: Any, words: list[str], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    done = command(*words)
    assert done.code == 2
    assert told in done.err


def test_wrong_settings(command: Any) -> None:
    done = command("serve", "b", "--host", "0.0.0.0")
    assert done.code == 2
    assert "--insecure" in done.err
    assert "BAD_CONFIGURATION" in done.err


def test_a_server_that_breaks(command: Any, server: Any) -> None:
    server.answers["Classify"] = None  # no message: the server cannot serialize it
    done = command("classify", "a", "-d", "d")
    assert done.code == 1
    assert "INTERNAL" in done.err
    assert "the server's log" in done.err


def test_our_own_bugs_keep_their_traceback() -> None:
    assert failure(ZeroDivisionError("ours")) is None


def test_the_real_thing_has_no_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deltaserve", "embed", "a", "-d", "d", "-a", "127.0.0.1:1"],
        cwd=tmp_path, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
