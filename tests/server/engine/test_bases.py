"""Deltas that share frozen bases come and go: a base is there once, as long as somebody has it."""

import dataclasses
import threading
from collections.abc import Callable

import pytest

from deltaserve.deltas.delta import Delta
from deltaserve.engine.request import Job, Request, Sampling
from deltaserve.errors import FailedPrecondition, Internal, ResourceExhausted

PATIENCE = 60.0
MakeDelta = Callable[..., Delta]


def generate(name: str, count: int, **known: object) -> Request:
    return Request(name, Job.GENERATE, tuple(range(5, 10)), sampling=Sampling(count), **known)  # type: ignore[arg-type]


def deltas_of(driver, make_delta: MakeDelta, *bases: int) -> tuple[list[Delta], int, int]:
    """A delta of each base; what one takes for itself, and what a base takes."""
    made = [make_delta("sharing", driver.backbone.spec, seed=seed, base=base) for seed, base in enumerate(bases)]
    pool = driver.engine._pool
    (own,), (shared,) = {pool.size(d) for d in made}, {pool.shared(d) for d in made}
    return made, own, shared


def test_one_copy_for_all_and_none_after_the_last(drive, make_delta: MakeDelta):
    driver = drive("llama")
    made, own, shared = deltas_of(driver, make_delta, 0, 0, 0, 1)
    assert shared > 2 * own
    told = [driver.publish(key, delta) for key, delta in enumerate(made)]
    assert told == [own] * 4 and driver.engine.shared_bytes(made[0]) == shared
    assert driver.engine.stats().pool_used_bytes == 4 * own + 2 * shared
    requests = [generate(f"r{key}", 12, delta=driver.ref(key)) for key in (0, 3, 1, 2)]
    driver.finished(*requests)
    assert len({tuple(driver.output(r.id)) for r in requests}) == 4
    freed = [driver.engine.retire(key).result(PATIENCE) for key in (1, 3, 0, 2)]
    assert freed == [own, own + shared, own, own + shared]
    assert driver.engine.stats().pool_used_bytes == 0
    driver.idle()


@pytest.mark.parametrize("room", [1, 3])
def test_a_pool_of_one_base_and_not_two(room, drive, make_delta: MakeDelta):
    """Requests for both bases take turns, and each gets what it gets where there is room for all."""
    roomy = drive("llama")
    made, own, shared = deltas_of(roomy, make_delta, 0, 0, 0, 1, 1, 1)
    small = drive("llama", pool_bytes=shared + room * own)
    outputs = {}
    for driver in (roomy, small):
        for key, delta in enumerate(made):
            driver.publish(key, delta)
        requests = [generate(f"r{i}", 6, delta=driver.ref(i * 5 % 6)) for i in range(24)]
        driver.finished(*requests)
        outputs[driver] = [driver.output(r.id) for r in requests]
        driver.idle()
    assert outputs[small] == outputs[roomy] and small.fetched and not roomy.fetched
    stats = small.engine.stats()
    assert stats.pool_used_bytes == shared + len(stats.resident) * own
    assert len({made[key].bases.keys() == made[0].bases.keys() for key in stats.resident}) == 1
    small.engine._pool.check()


def test_room_is_asked_for_a_delta_and_those_of_its_bases_that_are_not_there(drive, make_delta: MakeDelta):
    sizes = drive("llama", run=False)
    made, own, shared = deltas_of(sizes, make_delta, 0, 0, 1)
    driver = drive("llama", pool_bytes=shared + 2 * own)
    driver.publish(0, made[0])
    driver.submit(generate("holds", 80, delta=driver.ref(0)))
    driver.until(lambda: driver.engine.stats().pins == 1)
    with pytest.raises(ResourceExhausted) as caught:
        driver.publish(2, made[2])
    assert caught.value.reason == "POOL_FULL" and driver.engine.stats().pins == 1
    assert driver.publish(1, made[1]) == own, "its base is there"
    driver.results("holds")
    assert driver.publish(2, made[2]) == own and driver.engine.stats().resident == (2,)
    assert driver.engine.stats().pool_used_bytes == own + shared
    driver.idle()
    tight = drive("llama", pool_bytes=shared + own - 256)
    with pytest.raises(FailedPrecondition) as refused:
        tight.publish(0, made[0])
    assert refused.value.reason == "DELTA_TOO_LARGE" and refused.value.metadata["bytes"] == str(own + shared)


def test_a_base_that_is_wanted_is_kept_while_others_make_room(drive, make_delta: MakeDelta):
    sizes = drive("llama", run=False)
    made, own, shared = deltas_of(sizes, make_delta, 0, 0)
    plain = make_delta("lowrank", sizes.backbone.spec)
    driver = drive("llama", pool_bytes=shared + own + sizes.engine._pool.size(plain))
    driver.publish(0, made[0])
    driver.publish(7, plain)
    base = driver.engine._pool.get(0).bases[0]
    driver.publish(1, made[1])
    assert driver.engine.stats().resident == (0, 1), "the plain delta was used later, and went first"
    assert driver.engine._pool.get(1).bases[0] is base and base.users == 2


def test_a_delta_that_cannot_be_installed_gives_its_bases_back(drive, make_delta: MakeDelta, caplog):
    driver = drive("llama")
    (first, second), own, shared = deltas_of(driver, make_delta, 0, 0)
    bad = dataclasses.replace(second, at={**second.at, "model.no.such.module": next(iter(second.at.values()))})
    with pytest.raises(Internal):
        driver.publish(1, bad)
    assert driver.engine.stats().pool_used_bytes == 0
    driver.publish(2, first)
    with pytest.raises(Internal):
        driver.publish(3, bad)
    assert driver.engine.stats().pool_used_bytes == own + shared
    driver.publish(4, second)
    requests = [generate(f"r{key}", 8, delta=driver.ref(key)) for key in (2, 4)]
    driver.finished(*requests)
    assert driver.output("r2") != driver.output("r4")
    driver.idle()


def test_the_last_user_goes_while_the_next_is_being_copied(drive, make_delta: MakeDelta, monkeypatch):
    driver = drive("llama")
    (first, second), own, shared = deltas_of(driver, make_delta, 0, 0)
    driver.publish(0, first)
    driver.finished(generate("before", 8, delta=driver.ref(0)))
    hold, copying, pool = threading.Event(), threading.Event(), driver.engine._pool
    copy = pool.copy

    def slowly(*given):
        copying.set()
        assert hold.wait(PATIENCE)
        return copy(*given)

    monkeypatch.setattr(pool, "copy", slowly)
    driver.host[1] = second
    driver.submit(generate("next", 8, delta=driver.ref(1)))
    assert copying.wait(PATIENCE)
    assert driver.engine.retire(0).result(PATIENCE) == own, "the base is the next one's already"
    assert driver.engine.stats().pool_used_bytes == own + shared
    hold.set()
    driver.results("next")
    driver.publish(2, first)
    driver.finished(generate("after", 8, delta=driver.ref(2)))
    assert driver.output("after") == driver.output("before") != driver.output("next")
    driver.idle()


def test_the_last_user_goes_before_the_next_is_read(drive, make_delta: MakeDelta):
    driver = drive("llama")
    (first, second), own, shared = deltas_of(driver, make_delta, 0, 0)
    driver.publish(0, first)
    hold = threading.Event()
    driver.host[1] = second
    driver.fetch_gate = lambda key: (hold.wait(PATIENCE), driver.host[key])[1]
    driver.submit(generate("next", 8, delta=driver.ref(1)))
    assert driver.engine.retire(0).result(PATIENCE) == own + shared
    assert driver.engine.stats().pool_used_bytes == 0
    hold.set()
    driver.results("next")
    assert driver.engine.stats().pool_used_bytes == own + shared
    driver.idle()


def test_a_copy_that_fails_leaves_its_base_to_those_that_wait(drive, make_delta: MakeDelta, monkeypatch, caplog):
    driver = drive("llama")
    (first, second), own, shared = deltas_of(driver, make_delta, 0, 0)
    pool, failed = driver.engine._pool, []
    copy = pool.copy

    def once(place, delta):
        if not failed:
            failed.append(place)
            pool._arena.fill_(255)
            raise OSError("a disk went away")
        return copy(place, delta)

    monkeypatch.setattr(pool, "copy", once)
    asked = [driver.engine.publish(key, delta, f"d{key}@1") for key, delta in enumerate((first, second))]
    with pytest.raises(Internal):
        asked[0].result(PATIENCE)
    assert asked[1].result(PATIENCE) == own and driver.engine.stats().pool_used_bytes == own + shared
    driver.host[1] = second
    driver.finished(generate("r", 8, delta=driver.ref(1)))
    other = drive("llama")
    other.publish(0, second)
    other.finished(generate("r", 8, delta=other.ref(0)))
    assert driver.output("r") == other.output("r")
    driver.idle()
