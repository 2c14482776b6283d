"""DeltaService: loads, replacements and unloads while traffic runs; what must not be read; what a full pool says."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import peft
import pytest
import torch

from deltaserve_kernels.testing import error_ratio
from deltaserve_protos.v1 import deltas_pb2 as dp
from deltaserve_protos.v1 import inference_pb2 as pb

ASK: dict[str, Any] = {"inputs": [pb.Input(ids=[5, 6])], "sampling": pb.Sampling(max_new_tokens=8, ignore_eos=True)}
RESIDENT, DRAINING = dp.DELTA_STATE_RESIDENT, dp.DELTA_STATE_DRAINING


@pytest.fixture
def server(called: Callable[..., Any], llama: Any) -> Any:
    """Empty again after each test: whatever was loaded is unloaded, and nothing of it stays."""
    server = called("llama", pool_bytes=1 << 20)
    for number in range(1, 4):
        if not (server.root / f"v{number}").exists():
            server.made.delta(f"v{number}", 100 + number)
    yield server
    for delta in {d.name for d in server("ListDeltas").deltas}:
        server("UnloadDelta", name=delta, wait=True)
    assert eventually(lambda: server.idle() and server.app.engine.stats().pool_used_bytes == 0)
    assert not server("ListDeltas").deltas and server.app.engine.stats().resident == ()


@pytest.fixture
def one(request: pytest.FixtureRequest) -> str:
    """A name of the test's own: numbers of versions are never used twice."""
    return request.node.name.removeprefix("test_").replace("_", "-")[:60]


def eventually(true: Callable[[], bool], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


def stream(server: Any, delta: str, tokens: int = 3000) -> Any:
    """A long generation that has begun."""
    call = server.inference.StreamGenerate(
        pb.StreamGenerateRequest(
            deltas=[delta], inputs=ASK["inputs"], sampling=pb.Sampling(max_new_tokens=tokens, ignore_eos=True)
        ),
        timeout=60,
    )
    next(call)
    return call


def ids(server: Any, delta: str) -> list[int]:
    return list(server("Generate", deltas=[delta], **ASK).results[0].samples[0].ids)


def test_what_is_told_of_a_delta(server: Any, one: str) -> None:
    delta = server.load(f"acme/{one}", "v1")
    assert (delta.name, delta.version, delta.state) == (f"acme/{one}", 1, RESIDENT)
    assert list(delta.kinds) == ["lora"] and delta.format == "peft" and delta.source == "v1"
    assert delta.sites == 4 and delta.tensors_matched == 8  # two targets in two layers, A and B each
    file = server.root / "v1" / "adapter_model.safetensors"
    assert delta.file_bytes == file.stat().st_size and delta.device_bytes >= 4 * delta.parameters > 0
    assert len(delta.content_hash) == 64 and delta.task == dp.TASK_GENERATION
    assert delta.base_model == str(server.made.backbone)
    assert server("GetDelta", name=f"acme/{one}").delta == server("GetDelta", name=f"acme/{one}@1").delta == delta
    info = server("GetServerInfo")
    assert info.resident == 1 and info.memory.pool_used_bytes == delta.device_bytes


def test_what_deltas_share_is_told_once(server: Any, one: str) -> None:
    for number in range(2):
        config = peft.VeraConfig(r=64, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        server.made.delta(f"vera{number}", 60 + number, config)
    first, second = (server.load(f"{one}-{number}", f"vera{number}") for number in range(2))
    assert first.shared_bytes == second.shared_bytes > first.device_bytes == second.device_bytes > 0
    used = server("GetServerInfo").memory.pool_used_bytes
    assert used == first.device_bytes + second.device_bytes + first.shared_bytes
    assert server("UnloadDelta", name=first.name, wait=True).freed_bytes < first.shared_bytes
    assert eventually(lambda: server("GetServerInfo").memory.pool_used_bytes == used - first.device_bytes)


def test_labels_and_what_was_guessed(bert: Any) -> None:
    bert.made.delta("unnamed", 9, bert.made.lora(task_type="SEQ_CLS"), "AutoModelForSequenceClassification",
                    num_labels=3)  # fmt: skip
    guessed = bert.load("unnamed")
    assert list(guessed.labels) == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert {"labels", "problem_type"} <= set(guessed.guessed)
    assert guessed.problem_type == dp.PROBLEM_TYPE_SINGLE_LABEL_CLASSIFICATION
    told = bert.load("named", "unnamed", labels=["x", "y", "z"], task=dp.TASK_SEQUENCE_CLASSIFICATION,
                     problem_type=dp.PROBLEM_TYPE_MULTI_LABEL_CLASSIFICATION)  # fmt: skip
    assert list(told.labels) == ["x", "y", "z"] and not told.guessed
    wrong = bert.fails("LoadDelta", name="wrong", source="unnamed", labels=["x", "y"])
    assert (wrong.code, wrong.field) == ("INVALID_ARGUMENT", "labels")
    assert "2" in wrong.message and "3" in wrong.message
    assert bert.fails("GetDelta", name="wrong").code == "NOT_FOUND"


def test_each_task_of_a_checkpoint_is_a_delta(server: Any, one: str) -> None:
    config = peft.PolyConfig(
        r=4, n_tasks=3, n_skills=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_weights=False
    )
    server.made.delta("poly", 8, config)
    failure = server.fails("LoadDelta", name=one, source="poly")
    assert (failure.code, failure.reason, failure.field) == ("INVALID_ARGUMENT", "BAD_TASK_ID", "task_id")
    assert "from 0 to 2" in failure.message and "BadRequest" in failure.details
    assert server.fails("LoadDelta", name=one, source="poly", task_id=3).field == "task_id"
    assert server.fails("LoadDelta", name=one, source="v1", task_id=0).field == "task_id"
    loaded = [server.load(f"{one}-{task}", "poly", task_id=task) for task in range(3)]
    assert [delta.task_id for delta in loaded] == [0, 1, 2] and len({delta.content_hash for delta in loaded}) == 1
    assert not server.load(one, "v1").HasField("task_id")
    model = server.made.tuned("poly")
    asked = {"input_ids": torch.tensor([[5, 6]]), "output_hidden_states": True}
    with torch.no_grad():
        theirs = [model(**asked, task_ids=torch.tensor([task])).hidden_states[-1][0, -1] for task in range(3)]
    for task, vector in enumerate(theirs):
        (ours,) = server("Embed", deltas=[f"{one}-{task}"], inputs=ASK["inputs"], normalize=False).results
        assert error_ratio(torch.tensor(list(ours.values)), vector) < 1e-5
    assert all(error_ratio(theirs[task], theirs[task - 1]) > 1e-2 for task in range(3))


def test_another_task_id_is_other_content(server: Any, one: str) -> None:
    config = peft.PolyConfig(r=2, n_tasks=2, n_skills=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    server.made.delta("poly-two", 9, config)
    first = server.load(one, "poly-two", task_id=1)
    assert server.load(one, "poly-two", task_id=1) == first
    for other in ({}, {"task_id": 0}):
        failure = server.fails("LoadDelta", name=one, source="poly-two", **other)
        assert (failure.code, failure.reason) == ("ALREADY_EXISTS", "DELTA_EXISTS") and "task id" in failure.message
    second = server.load(one, "poly-two", task_id=0, replace=True)
    assert (second.version, second.task_id) == (2, 0)


def test_the_same_again_is_ok_at_once(server: Any, one: str) -> None:
    first = server.load(one, "v1")
    shutil.copytree(server.root / "v1", server.root / "copy", dirs_exist_ok=True)
    assert server.load(one, "v1") == server.load(one, "copy") == first
    assert server.load(one, "v1", replace=True) == first  # nothing to replace


def test_other_content_needs_replace(server: Any, one: str) -> None:
    server.load(one, "v1")
    before = ids(server, one)
    failure = server.fails("LoadDelta", name=one, source="v2")
    assert (failure.code, failure.reason) == ("ALREADY_EXISTS", "DELTA_EXISTS")
    assert "`replace`" in failure.message and ids(server, f"{one}@1") == before
    second = server.load(one, "v2", replace=True)
    assert second.version == 2 and ids(server, one) == ids(server, f"{one}@2") != before
    assert server.fails("Generate", deltas=[f"{one}@1"], **ASK).code == "NOT_FOUND"
    server("UnloadDelta", name=one, wait=True)
    assert server.load(one, "v1").version == 3  # a number is never used twice


def test_a_failed_load_leaves_nothing_and_no_number(server: Any, one: str) -> None:
    broken = server.root / "broken"
    shutil.copytree(server.root / "v1", broken, dirs_exist_ok=True)
    (broken / "adapter_model.safetensors").write_bytes(b"no tensors at all")
    for _ in range(2):
        failure = server.fails("LoadDelta", name=one, source="broken")
        assert (failure.code, failure.reason) == ("FAILED_PRECONDITION", "BAD_CHECKPOINT")
    assert not server("ListDeltas").deltas and server.app.engine.stats().pool_used_bytes == 0
    assert server.load(one, "v1").version == 1
    assert server.fails("LoadDelta", name=one, source="broken", replace=True).code == "FAILED_PRECONDITION"
    assert server("GetDelta", name=one).delta.version == 1 and ids(server, one)


def test_replacing_while_running(server: Any, one: str) -> None:
    server.load(one, "v1")
    alone = list(stream(server, one, 400))
    running = stream(server, one, 400)
    old = server.app.catalog.current(one).key
    server.load(one, "v2", replace=True)
    listed = {d.version: d for d in server("ListDeltas").deltas}
    assert set(listed) <= {1, 2} and listed[2].state == RESIDENT
    if 1 in listed:  # it may have ended by now
        assert listed[1].state == DRAINING and listed[1].in_flight == 1
    rest = list(running)
    assert [i for piece in rest for i in piece.ids] == [i for piece in alone for i in piece.ids]
    assert {piece.delta for piece in rest} == {f"{one}@1"}
    assert eventually(lambda: old not in server.app.engine.stats().resident)
    assert eventually(lambda: [d.version for d in server("ListDeltas").deltas] == [2])


def test_unload_lets_running_ones_finish(server: Any, one: str) -> None:
    size = server.load(one, "v1").device_bytes
    running = stream(server, one, 1500)
    answer = server("UnloadDelta", name=one)
    assert [(d.version, d.state) for d in answer.deltas] == [(1, DRAINING)] and answer.freed_bytes == 0
    assert server.fails("Generate", deltas=[one], **ASK).code == "NOT_FOUND"
    assert server("GetDelta", name=one).delta.in_flight == 1
    waiting = server.deltas.UnloadDelta.future(dp.UnloadDeltaRequest(name=one, wait=True), timeout=60)
    assert sum(len(piece.ids) for piece in running) == 1499
    assert waiting.result().freed_bytes == size
    assert server.fails("GetDelta", name=one).code == "NOT_FOUND"


def test_who_stops_waiting_for_an_unload_does_not_stop_it(server: Any, one: str) -> None:
    server.load(one, "v1")
    running = stream(server, one, 4000)
    with pytest.raises(grpc.RpcError) as late:
        server("UnloadDelta", name=one, wait=True, timeout=0.3)
    assert late.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    running.cancel()
    assert eventually(lambda: not server("ListDeltas").deltas)
    assert server.app.engine.failure.done() is False and server.load(one, "v2").version == 2


def test_a_cancelled_load_goes_on(server: Any, one: str) -> None:
    server.made.delta("wide", 5, server.made.lora(r=32))
    call = server.deltas.LoadDelta.future(dp.LoadDeltaRequest(name="wide", source="wide"), timeout=60)
    assert eventually(lambda: bool(server.app._loading._tasks) or call.done())
    call.cancel()
    assert eventually(lambda: any(d.name == "wide" for d in server("ListDeltas").deltas))
    assert eventually(lambda: server("GetDelta", name="wide").delta.state == RESIDENT) and ids(server, "wide")


def test_loads_of_one_name_follow_each_other(server: Any, one: str) -> None:
    same = [server.deltas.LoadDelta.future(dp.LoadDeltaRequest(name=one, source="v1"), timeout=60) for _ in range(8)]
    assert {call.result().delta.version for call in same} == {1}
    turns = [
        server.deltas.LoadDelta.future(dp.LoadDeltaRequest(name=one, source=f"v{1 + i % 3}", replace=True), timeout=60)
        for i in range(9)
    ]
    versions = [call.result().delta.version for call in turns]
    last = max(versions)
    assert eventually(lambda: [(d.name, d.version) for d in server("ListDeltas").deltas] == [(one, last)])
    assert len(server.app.engine.stats().resident) == 1


def test_a_full_pool_of_deltas_in_use(called: Any, server: Any, one: str) -> None:
    small = called("llama", pool_bytes=6_000)
    size = small.load(one, "v1").device_bytes
    assert size < 6_000 < 2 * size
    running = stream(small, one, 4000)
    failure = small.fails("LoadDelta", name="two", source="v2")
    assert (failure.code, failure.reason) == ("RESOURCE_EXHAUSTED", "POOL_FULL")
    assert "RetryInfo" in failure.details and [d.name for d in small("ListDeltas").deltas] == [one]
    running.cancel()
    assert eventually(small.idle)
    small.load("two", "v2")  # nobody uses the first one any more: it makes room
    states = {d.name: d.state for d in small("ListDeltas").deltas}
    assert states == {one: dp.DELTA_STATE_EVICTED, "two": RESIDENT}
    assert ids(small, one) == _alone(server, "v1")  # and is read again when it is asked for
    assert small.load("two", "v2").state == RESIDENT
    small.made.delta("huge", 6, small.made.lora(r=32))
    failure = small.fails("LoadDelta", name="huge", source="huge")
    assert (failure.code, failure.reason) == ("FAILED_PRECONDITION", "DELTA_TOO_LARGE")
    file = small.root / "v1" / "adapter_config.json"
    content = file.read_bytes()
    try:
        file.write_bytes(content + b"\n")
        failure = small.fails("Generate", deltas=[one], **ASK)
        assert (failure.code, failure.reason) == ("DATA_LOSS", "CONTENT_CHANGED")
    finally:
        file.write_bytes(content)


def _alone(server: Any, source: str) -> list[int]:
    server.load("alone", source)
    return ids(server, "alone")


def test_pages(server: Any, one: str) -> None:
    names = [f"p{i:02}" for i in range(7)]
    for name in reversed(names):
        server.load(name, "v1")
    for size, pages in ((3, [3, 3, 1]), (7, [7]), (1, [1] * 7), (1000, [7])):
        found, token, sizes = [], "", []
        while True:
            page = server("ListDeltas", page_size=size, page_token=token)
            found += [d.name for d in page.deltas]
            sizes.append(len(page.deltas))
            token = page.next_page_token
            if not token:
                break
        assert found == names and sizes == pages
    first = server("ListDeltas", page_size=3)
    server("UnloadDelta", name="p02", wait=True)  # the one that the token names
    assert [d.name for d in server("ListDeltas", page_token=first.next_page_token).deltas] == names[3:]


def test_nothing_is_read_outside_the_root(server: Any, one: str, tmp_path: Path) -> None:
    shutil.copytree(server.root / "v1", tmp_path / "outside")
    (server.root / "link").symlink_to(tmp_path / "outside")
    shutil.copytree(server.root / "v1", server.root / "halfway", dirs_exist_ok=True)
    (server.root / "halfway" / "adapter_model.safetensors").unlink()
    (server.root / "halfway" / "adapter_model.safetensors").symlink_to(
        tmp_path / "outside" / "adapter_model.safetensors"
    )
    (server.root / "within").symlink_to(server.root / "v1")
    try:
        for source in ("link", "halfway", "link/.", "./link"):
            failure = server.fails("LoadDelta", name=one, source=source)
            assert (failure.code, failure.reason, failure.field) == ("INVALID_ARGUMENT", "BAD_SOURCE", "source")
            assert "symlink" in failure.message and str(tmp_path) not in failure.message
        assert server.load(one, "within").source == "v1"
    finally:
        for name in ("link", "within"):
            (server.root / name).unlink()


def test_pickle_is_refused_by_the_flag_that_allows_it(server: Any, one: str, called: Any) -> None:
    from safetensors.torch import load_file

    folder = server.root / "pickled"
    shutil.copytree(server.root / "v1", folder, dirs_exist_ok=True)
    (folder / "adapter_model.safetensors").unlink()
    torch.save(load_file(server.root / "v1" / "adapter_model.safetensors"), folder / "adapter_model.bin")
    failure = server.fails("LoadDelta", name=one, source="pickled")
    assert failure.code == "FAILED_PRECONDITION" and "--allow-pickle-archives" in failure.message
    allowed = called("llama", allow_pickle_archives=True)
    allowed.load(one, "pickled")
    assert ids(allowed, one) == _alone(server, "v1")


def test_without_a_root_nothing_is_loaded_later(called: Any, llama: Any) -> None:
    server = called("llama", delta_root=None, delta=(f"lora={llama.root / 'lora'}",))
    failure = server.fails("LoadDelta", name="a", source="lora")
    assert (failure.code, failure.reason) == ("FAILED_PRECONDITION", "NO_DELTA_ROOT")
    assert "--delta-root" in failure.message
    assert [d.name for d in server("ListDeltas").deltas] == ["lora"] and ids(server, "lora") == ids(llama, "lora")


def test_a_backbone_that_differs_is_a_warning_and_wrong_shapes_an_error(server: Any, one: str, gpt2: Any) -> None:
    shutil.copytree(gpt2.root / "lora", server.root / "gpt2s", dirs_exist_ok=True)
    failure = server.fails("LoadDelta", name=one, source="gpt2s")
    assert (failure.code, failure.reason) == ("FAILED_PRECONDITION", "BAD_CHECKPOINT")
    config = peft.LoraConfig.from_pretrained(server.root / "v1")
    config.base_model_name_or_path = "someone/else"
    shutil.copytree(server.root / "v1", server.root / "elsewhere", dirs_exist_ok=True)
    config.save_pretrained(server.root / "elsewhere")
    delta = server.load(one, "elsewhere")
    assert delta.base_model == "someone/else" and any("someone/else" in warning for warning in delta.warnings)
