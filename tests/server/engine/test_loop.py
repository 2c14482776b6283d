"""The engine's thread: every request ends once, whatever happens, and leaves nothing behind."""

import threading
import time
from collections.abc import Callable

import pytest

from deltaserve.deltas.delta import Delta
from deltaserve.deltas.sites import Pooling
from deltaserve.engine.request import DeltaRef, Failed, Finished, FinishReason, Job, Request, Sampling
from deltaserve.errors import (
    Cancelled,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
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


def test_cancel_before_and_while_running(drive):
    driver = drive("llama", max_running=1)
    driver.submit(generate("running", 80), generate("waiting", 80))
    driver.until(lambda: len(driver.output("running")) > 2)
    driver.engine.cancel(["waiting", "running", "unknown"])
    assert isinstance(error_of(driver, "running"), Cancelled) and isinstance(error_of(driver, "waiting"), Cancelled)
    assert 2 < len(driver.output("running")) < 80 and driver.output("waiting") == []
    driver.engine.cancel(["running"])
    driver.finished(generate("after", 3))
    driver.idle()


def test_two_hundred_cancelled_requests_leave_nothing(drive, make_delta: MakeDelta):
    driver = drive("t5")
    driver.publish(1, make_delta("lowrank", driver.backbone.spec))
    ref = driver.ref(1)
    requests = [generate(f"r{i}", 50, 1 + i % 9, delta=ref if i % 2 else None) for i in range(200)]
    for i in range(0, 200, 20):
        driver.submit(*requests[i : i + 20])
        driver.engine.cancel(r.id for r in requests[i : i + 20 : 2])
    driver.until(lambda: any(driver.output(r.id) for r in requests))
    driver.engine.cancel([r.id for r in requests])
    ends = driver.wait(*(r.id for r in requests))
    assert {type(end) for end in ends} <= {Failed, Finished} and len(driver.ended) == 200
    driver.idle()
    assert driver.engine.stats().pool_used_bytes > 0


def test_deadlines_end_requests_that_run_and_that_wait(drive):
    driver = drive("llama", max_running=1)
    soon = time.monotonic() + 0.15
    driver.submit(generate("running", 90, deadline=soon), generate("waiting", 90, deadline=soon))
    driver.submit(generate("late", 3, deadline=time.monotonic() - 1))
    for name in ("waiting", "late"):
        assert isinstance(error_of(driver, name), DeadlineExceeded)
    (end,) = driver.wait("running")
    assert isinstance(end, Finished) or isinstance(end.error, DeadlineExceeded)
    assert time.monotonic() < soon + 5
    driver.idle()


def test_a_deadline_ends_a_request_whose_delta_never_comes(drive, make_delta: MakeDelta):
    driver = drive("llama")
    hold = threading.Event()
    driver.host[1] = make_delta("lowrank", driver.backbone.spec)
    fetch, driver.fetch_gate = driver.fetch_gate, lambda key: (hold.wait(PATIENCE), fetch(key))[1]
    driver.submit(generate("r", 3, delta=driver.ref(1), deadline=time.monotonic() + 0.1))
    driver.until(lambda: driver.engine.stats().waiting_for_load == 1 or "r" in driver.ended)
    assert isinstance(error_of(driver, "r"), DeadlineExceeded)
    hold.set()
    driver.finished(generate("after", 3))
    driver.idle()


def test_a_full_queue_takes_all_of_a_call_or_nothing(drive):
    driver = drive("llama", run=False, max_queued=3)
    driver.submit(generate("a", 3), generate("b", 3))
    with pytest.raises(ResourceExhausted) as caught:
        driver.submit(generate("c", 3), generate("d", 3))
    assert caught.value.reason == "QUEUE_FULL" and caught.value.retry_after
    driver.submit(generate("e", 3))
    assert driver.engine.stats().waiting == 3
    driver.engine.start()
    driver.results("a", "b", "e")
    assert set(driver.ended) == {"a", "b", "e"}
    driver.finished(generate("c", 3), generate("d", 3))


def test_what_can_never_run_is_refused_at_once(drive):
    driver = drive("llama", kv_bytes=64 * 3 * 2 * 2 * 8 * 4)
    assert driver.engine.stats().kv_capacity_tokens == 64
    with pytest.raises(InvalidArgument) as caught:
        driver.submit(generate("fits", 3), generate("too long", 60))
    assert caught.value.reason == "REQUEST_TOO_LARGE" and "--kv-bytes" in caught.value.message
    driver.finished(generate("fits", 59))


def test_a_length_that_the_backbone_has_no_positions_for(drive):
    with pytest.raises(InvalidArgument, match="96 positions"):
        drive("llama", max_model_len=97)


def test_drain_lets_requests_end_and_refuses_new_ones(drive):
    driver = drive("llama")
    driver.submit(generate("running", 60))
    driver.until(lambda: bool(driver.output("running")))
    draining = threading.Thread(target=driver.engine.drain, args=(PATIENCE,))
    draining.start()
    driver.until(lambda: driver.engine._refusal is not None)
    with pytest.raises(Unavailable):
        driver.submit(generate("new", 3))
    draining.join(PATIENCE)
    assert not draining.is_alive() and len(driver.output("running")) == 60
    assert driver.engine.failure.result(0) is None


def test_drain_without_patience_fails_what_runs(drive, make_delta: MakeDelta):
    driver = drive("llama", max_running=1)
    driver.publish(1, make_delta("lowrank", driver.backbone.spec))
    driver.submit(generate("running", 90, delta=driver.ref(1)), generate("waiting", 90))
    retired = driver.engine.retire(1)
    driver.until(lambda: bool(driver.output("running")))
    driver.engine.drain(0)
    assert isinstance(error_of(driver, "running"), Unavailable) and isinstance(error_of(driver, "waiting"), Unavailable)
    assert retired.result(PATIENCE) > 0, "nobody names it any more"
    driver.idle()
    with pytest.raises(Unavailable):
        driver.engine.publish(2, driver.host[1], "d2@1").result(PATIENCE)
    driver.engine.drain(0)


def test_drain_of_an_engine_that_never_started_ends_its_requests(drive):
    driver = drive("llama", run=False)
    driver.submit(generate("r", 3))
    driver.engine.drain(0)
    assert isinstance(error_of(driver, "r"), Unavailable)


def test_drain_ends_a_load_under_way(drive, make_delta: MakeDelta):
    driver = drive("llama")
    entered, hold = threading.Event(), threading.Event()
    delta = make_delta("lowrank", driver.backbone.spec)

    def fetch(key: int) -> Delta:
        entered.set()
        hold.wait(PATIENCE)
        return delta

    driver.host[1], driver.fetch_gate = delta, fetch
    driver.submit(generate("r", 3, delta=driver.ref(1)))
    assert entered.wait(PATIENCE)
    asked = driver.engine.publish(1, delta, "d1@1")
    draining = threading.Thread(target=driver.engine.drain, args=(0,))
    draining.start()
    # Everybody is told before the loader, which may be slow, is waited for.
    assert isinstance(error_of(driver, "r"), Unavailable)
    assert isinstance(asked.exception(PATIENCE), Unavailable)
    hold.set()
    draining.join(PATIENCE)
    assert not draining.is_alive()
    assert driver.engine.failure.result(0) is None


def test_batch_wait_gathers(drive):
    driver = drive("bert", batch_wait=0.4)
    start = time.monotonic()
    for i in range(3):
        driver.submit(Request(f"e{i}", Job.EMBED, (5, 6, 7), pooling=Pooling.MEAN))
        time.sleep(0.03)
    driver.results("e0", "e1", "e2")
    assert time.monotonic() - start >= 0.4
    assert [step.sequences for step in driver.engine.stats(steps=True).steps] == [3]


def test_batch_wait_ends_early_when_the_batch_is_full(drive):
    driver = drive("bert", batch_wait=30.0, max_running=2)
    driver.finished(*(Request(f"e{i}", Job.EMBED, (5, 6, 7), pooling=Pooling.MEAN) for i in range(2)))
    assert [step.sequences for step in driver.engine.stats(steps=True).steps] == [2]


def test_a_step_that_fails_fails_its_requests_only(drive, caplog):
    driver = drive("llama", max_running=2)
    driver.finished(generate("before", 3))
    # An id outside of the vocabulary: the service would have refused it, so for the engine it is a bug.
    broken = Request("broken", Job.GENERATE, (5, 10_000), sampling=Sampling(3))
    driver.submit(broken, generate("beside", 3), generate("behind", 3))
    assert isinstance(error_of(driver, "broken"), Internal) and error_of(driver, "broken").reason == "STEP_FAILED"
    assert isinstance(error_of(driver, "beside"), Internal)
    driver.results("behind")
    assert "a forward failed" in caplog.text
    driver.idle()


def test_the_death_of_the_thread_is_told_to_everybody(drive, make_delta: MakeDelta, caplog):
    driver = drive("llama", run=False, max_running=1)

    def explode(_: object) -> None:
        raise RuntimeError("a bug outside of a step")

    driver.engine._on_step = explode
    driver.submit(generate("running", 9), generate("waiting", 9))
    loading = driver.engine.publish(1, make_delta("lowrank", driver.backbone.spec), "d1@1")
    driver.engine.start()
    assert isinstance(driver.engine.failure.exception(PATIENCE), RuntimeError)
    for name in ("running", "waiting"):
        assert isinstance(error_of(driver, name), Internal) and error_of(driver, name).reason == "ENGINE_DIED"
    assert loading.exception(PATIENCE) is None or isinstance(loading.exception(0), Unavailable)
    with pytest.raises(Internal):
        driver.submit(generate("after", 3))
    with pytest.raises(Unavailable):
        driver.engine.retire(1).result(PATIENCE)
    driver.engine.drain(5)
    assert "the engine's thread died" in caplog.text


def test_an_emit_that_raises_hurts_nobody_else(drive, caplog):
    driver = drive("llama")

    def closed(_: object) -> None:
        raise RuntimeError("the event loop is closed")

    driver.engine.submit([generate("gone", 4)], closed)
    driver.finished(generate("there", 6))
    driver.until(lambda: driver.engine.stats().running == 0)
    driver.idle()
    assert "events could not be handed over" in caplog.text


def test_stop_ids_end_tokens_and_minimum_length(drive):
    driver = drive("llama")
    driver.finished(generate("free", 12))
    free = driver.output("free")
    stop = free[4]
    first = free.index(stop)
    known = {"stop_ids": frozenset({stop})}
    ends = driver.finished(
        generate("stop", 12, sampling=known), generate("end", 12, sampling={"end_ids": frozenset({stop})})
    )
    assert [end.reason for end in ends] == [FinishReason.STOP] * 2
    assert driver.output("stop") == driver.output("end") == free[: first + 1]
    driver.finished(generate("long", 12, sampling=known | {"min_new_tokens": 8}))
    assert stop not in driver.output("long")[:8] and len(driver.output("long")) >= 8


def test_steps_say_who_acted(drive, make_delta: MakeDelta):
    driver = drive("llama")
    driver.publish(1, make_delta("lowrank", driver.backbone.spec), "one@1")
    driver.publish(2, make_delta("prompt", driver.backbone.spec), "two@3")
    refs = [DeltaRef(1, "one@1", ("lowrank",)), DeltaRef(2, "two@3", ("prompt",), driver.ref(2).prompt_length)]
    driver.finished(*(generate(f"r{i}", 3, delta=ref) for i, ref in enumerate([*refs, None])))
    first = driver.engine.stats(steps=True).steps[0]
    assert (first.deltas, first.kinds, first.phase) == (("one@1", "two@3"), ("lowrank", "prompt"), "prefill")
    assert first.rows == 15 + refs[1].prompt_length and first.sequences == first.output_tokens == 3
    assert first.duration > 0 and abs(first.started - time.time()) < 600


def test_a_request_id_is_used_once_at_a_time(drive):
    driver = drive("llama", run=False)
    driver.submit(generate("r", 3))
    with pytest.raises(AssertionError):
        driver.submit(generate("r", 3))
    driver.engine.start()
    driver.results("r")
    driver.idle()
