"""Deltas come, go and come again beside running requests."""

import dataclasses
import threading
from collections.abc import Callable

import pytest

from deltaserve.deltas.delta import Delta
from deltaserve.engine.request import DeltaRef, Failed, Job, Request, Sampling
from deltaserve.errors import (
    FailedPrecondition,
    Internal,
    NotFound,
    ResourceExhausted,
)

PATIENCE = 60.0
MakeDelta = Callable[..., Delta]


def generate(name: str, count: int, length: int = 5, **known: object) -> Request:
    sampling = Sampling(count, **known.pop("sampling", {}))  # type: ignore[arg-type]
    return Request(name, Job.GENERATE, tuple(range(5, 5 + length)), sampling=sampling, **known)  # type: ignore[arg-type]


def error_of(driver, name: str) -> Exception:
    (end,) = driver.wait(name)
    assert isinstance(end, Failed), end
    return end.error


def test_an_evicted_delta_is_fetched_again(drive, make_delta: MakeDelta):
    driver = drive("llama", pool_bytes=60_000)
    spec = driver.backbone.spec
    deltas = {key: make_delta("lowrank", spec, seed=key) for key in range(6)}
    for key, delta in deltas.items():
        driver.publish(key, delta)
    stats = driver.engine.stats()
    assert 1 <= len(stats.resident) < 6 and stats.resident[-1] == 5 and stats.pool_used_bytes <= 60_000
    assert driver.fetched == []
    outputs = {}
    for turn in range(2):
        for key in deltas:
            driver.finished(generate(f"{turn}-{key}", 8, delta=driver.ref(key)))
            outputs[turn, key] = driver.output(f"{turn}-{key}")
    assert set(driver.fetched) == set(deltas)
    assert [outputs[0, k] for k in deltas] == [outputs[1, k] for k in deltas]
    assert len({tuple(outputs[0, k]) for k in deltas}) > 3
    driver.idle()


def test_requests_for_more_deltas_than_fit_take_turns(drive, make_delta: MakeDelta):
    driver = drive("llama", pool_bytes=60_000)
    for key in range(6):
        driver.publish(key, make_delta("lowrank", driver.backbone.spec, seed=key))
    requests = [generate(f"r{i}", 6, delta=driver.ref(i % 6)) for i in range(24)]
    driver.finished(*requests)
    by_key = [{tuple(driver.output(r.id)) for r in requests[key::6]} for key in range(6)]
    assert all(len(outputs) == 1 for outputs in by_key)
    driver.idle()


def test_a_pool_full_of_deltas_in_use_refuses_an_operator(drive, make_delta: MakeDelta):
    driver = drive("llama", pool_bytes=20_000)
    small = make_delta("prefix", driver.backbone.spec)
    for key in range(20_000 // driver.publish(0, small) + 1):
        if len(driver.engine.stats().resident) == key + 1:
            driver.publish(key + 1, small)
    keys = driver.engine.stats().resident
    driver.submit(*(generate(f"r{key}", 80, delta=driver.ref(key)) for key in keys))
    driver.until(lambda: driver.engine.stats().pins == len(keys))
    with pytest.raises(ResourceExhausted) as caught:
        driver.publish(100, make_delta("prefix", driver.backbone.spec, seed=5))
    assert caught.value.reason == "POOL_FULL"
    driver.results(*(f"r{key}" for key in keys))
    driver.publish(100, driver.host[100])
    driver.idle()


def test_a_delta_larger_than_the_pool(drive, make_delta: MakeDelta):
    driver = drive("llama", pool_bytes=1000)
    with pytest.raises(FailedPrecondition) as caught:
        driver.publish(1, make_delta("lowrank", driver.backbone.spec))
    assert caught.value.reason == "DELTA_TOO_LARGE" and "--pool-bytes" in caught.value.message
    driver.submit(generate("r", 3, delta=driver.ref(1)), generate("bare", 3))
    assert error_of(driver, "r").reason == "DELTA_TOO_LARGE"
    driver.results("bare")
    driver.idle()


def test_a_delta_that_cannot_be_read_fails_those_that_wait_for_it(drive, caplog):
    driver = drive("llama")

    def fetch(key: int) -> Delta:
        if key == 1:
            raise NotFound("its files are gone")
        raise KeyError(key)

    driver.fetch_gate = fetch
    known, unknown = DeltaRef(1, "d1@1", ("lora",)), DeltaRef(2, "d2@1", ("lora",))
    driver.submit(generate("a", 3, delta=known), generate("b", 3, delta=known), generate("c", 3, delta=unknown))
    assert isinstance(error_of(driver, "a"), NotFound) and isinstance(error_of(driver, "b"), NotFound)
    assert isinstance(error_of(driver, "c"), Internal) and error_of(driver, "c").reason == "LOAD_FAILED"
    assert "d2@1" in caplog.text
    driver.finished(generate("bare", 3))
    driver.idle()


def test_retire_waits_for_the_requests_that_name_it(drive, make_delta: MakeDelta):
    driver = drive("llama", max_running=1)
    size = driver.publish(1, make_delta("lowrank", driver.backbone.spec))
    driver.submit(generate("running", 40, delta=driver.ref(1)), generate("waiting", 40, delta=driver.ref(1)))
    freed = driver.engine.retire(1)
    driver.until(lambda: bool(driver.output("waiting")))
    assert not freed.done() and driver.engine.stats().resident == (1,)
    assert freed.result(PATIENCE) == size
    assert [len(driver.output(name)) for name in ("running", "waiting")] == [40, 40]
    stats = driver.engine.stats()
    assert stats.resident == () and stats.pool_used_bytes == 0
    assert driver.engine.retire(1).result(PATIENCE) == 0
    driver.idle()


def test_the_last_delta_to_go_gives_modules_their_own_forward_back(drive, make_delta: MakeDelta):
    driver = drive("llama")
    changed = lambda: [n for n, m in driver.backbone.model.named_modules() if "forward" in vars(m)]  # noqa: E731
    assert changed() == []
    driver.publish(1, make_delta("all", driver.backbone.spec))
    driver.publish(2, make_delta("lowrank", driver.backbone.spec))
    assert "model.layers.0.self_attn.q_proj" in changed() and "model.norm" not in changed()
    driver.engine.retire(1).result(PATIENCE)
    assert changed()
    driver.engine.retire(2).result(PATIENCE)
    assert changed() == []


def test_publishing_twice_and_to_a_slot_that_was_used_before(drive, make_delta: MakeDelta):
    driver = drive("llama")
    first, second = (make_delta(kind, driver.backbone.spec, seed=9) for kind in ("all", "prefix"))
    assert driver.publish(1, first) == driver.publish(1, first)
    driver.finished(generate("a", 8, delta=driver.ref(1)))
    driver.engine.retire(1).result(PATIENCE)
    driver.publish(2, second)
    driver.finished(generate("b", 8, delta=driver.ref(2)))
    driver.publish(3, first)
    driver.finished(generate("c", 8, delta=driver.ref(3)))
    assert driver.output("a") == driver.output("c") != driver.output("b")


def test_a_load_beside_running_requests_does_not_stop_them(drive, make_delta: MakeDelta):
    driver = drive("llama")
    hold = threading.Event()
    delta = make_delta("lowrank", driver.backbone.spec)
    driver.host[1] = delta
    driver.fetch_gate = lambda key: (hold.wait(PATIENCE), delta)[1]
    driver.submit(generate("waits", 4, delta=driver.ref(1)))
    driver.finished(generate("passes", 20))
    assert driver.engine.stats().waiting_for_load == 1 and "waits" not in driver.ended
    hold.set()
    driver.results("waits")
    driver.idle()


def test_a_load_goes_on_when_its_caller_goes_away(drive, make_delta: MakeDelta):
    driver = drive("llama")
    asked = driver.engine.publish(1, make_delta("lowrank", driver.backbone.spec), "d1@1")
    assert not asked.cancel(), "the caller's event loop would; the engine must be able to answer all the same"
    assert asked.result(PATIENCE) > 0 and driver.engine.stats().resident == (1,)
    assert not driver.engine.retire(1).cancel()
    driver.until(lambda: driver.engine.stats().resident == ())


def test_requests_in_a_row_do_not_keep_another_delta_out(drive, make_delta: MakeDelta, monkeypatch):
    """The pool holds one delta; overlapping requests for it never let its pins go, and one for another must end."""
    monkeypatch.setattr("deltaserve.engine.residency.PATIENCE", 0.2)
    driver = drive("llama", pool_bytes=40_000)
    for key in range(2):
        driver.publish(key, make_delta("lowrank", driver.backbone.spec, seed=key))
    driver.finished(generate("warm", 2, delta=driver.ref(0)))
    assert driver.engine.stats().resident == (0,)
    stop = threading.Event()
    crowd = [generate(f"crowd-{i}", 40, delta=driver.ref(0)) for i in range(400)]

    def overlap() -> None:
        for request in crowd:
            if stop.is_set():
                return
            driver.submit(request)
            driver.until(lambda r=request: len(driver.output(r.id)) > 20 or r.id in driver.ended or stop.is_set())

    thread = threading.Thread(target=overlap)
    thread.start()
    try:
        driver.until(lambda: driver.engine.stats().running > 0)
        driver.submit(generate("other", 4, delta=driver.ref(1)))
        driver.results("other")
        assert len(driver.ended) < len(crowd), "it ended only when the crowd had gone"
    finally:
        stop.set()
        thread.join(PATIENCE)
    driver.until(lambda: driver.engine.stats().running + driver.engine.stats().waiting == 0)
    driver.idle()


def test_a_delta_that_cannot_be_installed_fails_alone(drive, make_delta: MakeDelta, caplog):
    driver = drive("llama")
    good = make_delta("lowrank", driver.backbone.spec)
    site, primitives = next(iter(good.at.items()))
    bad = dataclasses.replace(good, at={site: primitives, "model.no.such.module": primitives})
    with pytest.raises(Internal):
        driver.publish(1, bad)
    driver.publish(2, good)
    driver.finished(generate("after", 4, delta=driver.ref(2)))
    assert driver.engine.stats().resident == (2,)
    driver.idle()
