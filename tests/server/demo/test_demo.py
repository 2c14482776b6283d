"""`deltaserve demo`: the whole of it, in processes of its own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from deltaserve.demo.launch import Server
from deltaserve.demo.results import Results
from deltaserve.demo.show import ASSETS
from deltaserve.errors import Unavailable

pytestmark = pytest.mark.timeout(150)
RESULTS = Results.read(ASSETS)


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deltaserve", "demo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment())


def environment() -> dict[str, str]:
    """As a user's: without what the tests themselves are run with."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.fixture(scope="module")
def told() -> dict:
    done = demo("--json")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(done.stdout)


def test_every_answer_is_right(told: dict) -> None:
    assert told["right"] is True
    wrong = [request for request in told["requests"] if request["answer"] != request["expected"]]
    assert wrong == []
    asked = {tuple(request["deltas"]) for request in told["requests"]}
    assert asked == {(), *((delta.name,) for delta in RESULTS.deltas), *(one.deltas for one in RESULTS.combinations)}


def test_one_forward_holds_all_kinds(told: dict) -> None:
    """At least one forward served most of the deltas, of eight kinds, together; and deltas made of several."""
    assert told["widest_forward"]["kinds"] >= 8
    assert told["widest_forward"]["deltas"] >= 18
    several = {"+".join(f"{name}@1" for name in one.deltas) for one in RESULTS.combinations}
    assert any(several <= set(step["deltas"]) for step in told["forwards"])
    tokens = sum(request["output_tokens"] for request in told["requests"])
    assert len(told["forwards"]) < tokens / 3


def test_forwards_are_those_of_the_batch_alone(told: dict) -> None:
    seen = {name.replace("@1", "") for step in told["forwards"] for name in step["deltas"]}
    several = {"+".join(one.deltas) for one in RESULTS.combinations}
    assert seen == {delta.name for delta in RESULTS.deltas} | several
    assert max(step["sequences"] for step in told["forwards"]) <= len(told["requests"])


def test_others_were_served_while_deltas_loaded(told: dict) -> None:
    traffic = told["traffic_while_loading"]
    assert traffic["answered"] > traffic["while_loading"] >= len(RESULTS.deltas)
    assert traffic["wrong"] == []


def test_memory_is_far_below_copies(told: dict) -> None:
    memory = told["memory"]
    assert memory["backbone_bytes"] >= 4 * RESULTS.backbone.parameters * 0.9
    assert memory["delta_bytes"] + memory["backbone_bytes"] < memory["full_copies_bytes"] / 3


def test_the_server_ended_in_order(told: dict) -> None:
    assert told["server_exit_status"] == 0
    assert told["seconds"] < 60


@pytest.mark.long
def test_what_people_read() -> None:
    done = demo()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    text = done.stdout
    order = ["One backbone", "hot-loaded", "expected", "forwards served", "Memory on", "demo --keep", "are right;"]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    for delta in RESULTS.deltas:
        assert delta.name in text
        assert delta.examples[0][1] in text


def test_a_server_that_does_not_start_shows_its_log(tmp_path: Path) -> None:
    server = Server(tmp_path / "nothing", tmp_path, 0)
    with pytest.raises(Unavailable, match=r"did not start; the end of its log:\n.*nothing"):
        server.start()
    assert server.stop() == 0  # nothing is left to stop


@pytest.mark.long
def test_keep_stays_until_it_is_interrupted() -> None:
    command = [sys.executable, "-u", "-m", "deltaserve", "demo", "--keep"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment(), start_new_session=True
    ) as kept:
        assert kept.stdout is not None
        lines: list[str] = []
        for line in kept.stdout:
            lines.append(line)
            if "deltas ls --address" in line:
                break
        address = lines[-1].split()[-1]
        command = [sys.executable, "-m", "deltaserve", "deltas", "ls", "--json", "--address", address]
        listed = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        assert len(json.loads(listed.stdout)) == len(RESULTS.deltas)
        kept.send_signal(signal.SIGINT)
        rest = kept.stdout.read()
        assert kept.wait(60) == 0, rest
        assert "the server ended cleanly" in rest
