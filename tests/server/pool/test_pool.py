"""The arena: what is copied into it is what was given, and slots and bytes come back."""

import dataclasses
import itertools

import pytest
import torch

from deltaserve.deltas.bases import content_key
from deltaserve.deltas.delta import Delta, Provenance
from deltaserve.deltas.primitives import Affine, Dense, LowRank
from deltaserve.deltas.sites import Task
from deltaserve.pool.pool import Pool, Resident

CPU = torch.device("cpu")


def delta_of(seed: int, rank: int = 3, dtype: torch.dtype = torch.float32) -> Delta:
    g = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(shape, generator=g).to(dtype)  # noqa: E731
    at = {
        "a": (LowRank(make(rank, 33), make(17, rank), 1.5), Affine(shift=make(17).to(torch.bfloat16))),
        "b": (Dense(make(5, 7), make(5)),),
    }
    return Delta(("lora",), at, Task.GENERATION, Provenance("test", str(seed), 0, 0))


def put(pool: Pool, key: int, delta: Delta) -> Resident:
    place = pool.reserve(key, f"d{key}@1", delta)
    assert place is not None
    pool.publish(place, pool.copy(place, delta))
    pool.check()
    return place


def same(a: Delta, b: Delta) -> bool:
    return all(x.dtype is y.dtype and torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


def test_copies_are_equal_aligned_contiguous_and_apart():
    pool = Pool(1 << 16, 8, CPU)
    deltas = {key: delta_of(key, 1 + key, dtype) for key, dtype in enumerate((torch.float32, torch.float16))}
    places = {key: put(pool, key, delta) for key, delta in deltas.items()}
    spans = []
    for key, delta in deltas.items():
        assert same(places[key].delta, delta) and places[key].nbytes == pool.size(delta)
        for tensor in places[key].delta.tensors():
            assert tensor.is_contiguous() and (tensor.data_ptr() - pool._arena.data_ptr()) % 256 == 0
            spans.append((tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()))
    spans.sort()
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    assert [places[key].slot for key in deltas] == [0, 1]
    assert pool.used == sum(p.nbytes for p in places.values()) <= pool.capacity


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dtype_of_the_pool_changes_that_of_all_weights(dtype: torch.dtype):
    pool, delta = Pool(1 << 16, 8, CPU, dtype), delta_of(0)
    place = put(pool, 0, delta)
    for ours, given in zip(place.delta.tensors(), delta.tensors(), strict=True):
        assert ours.dtype is dtype and torch.equal(ours, given.to(dtype))


def test_slots_run_out_before_bytes():
    pool = Pool(1 << 20, 2, CPU)
    places = [put(pool, key, delta_of(key)) for key in range(2)]
    assert pool.reserve(2, "d2@1", delta_of(2)) is None
    assert pool.release(places[0]) == places[0].nbytes
    assert put(pool, 2, delta_of(2)).slot == 0 and pool.get(0) is None


def test_bytes_run_out_before_slots():
    size = Pool(1 << 16, 8, CPU).size(delta_of(0))
    pool = Pool(2 * size, 8, CPU)
    first = put(pool, 0, delta_of(0))
    put(pool, 1, delta_of(1))
    assert pool.reserve(2, "d2@1", delta_of(2)) is None and pool.used == pool.capacity
    pool.release(first)
    assert same(put(pool, 2, delta_of(2)).delta, delta_of(2)) and same(pool.get(1).delta, delta_of(1))


def test_the_victim_is_the_least_recently_used_that_nobody_uses():
    pool = Pool(1 << 20, 8, CPU)
    places = [put(pool, key, delta_of(key)) for key in range(3)]
    pool.touch(0)
    assert pool.resident == (1, 2, 0) and pool.victim(delta_of(9)) is places[1]
    places[1].pins = 1
    assert pool.victim(delta_of(9)) is places[2] and pool.pins == 1
    places[0].pins = places[2].pins = 2
    assert pool.victim(delta_of(9)) is None and pool.pins == 5


def test_a_delta_in_use_cannot_be_released():
    pool = Pool(1 << 20, 8, CPU)
    place = put(pool, 0, delta_of(0))
    place.pins = 1
    with pytest.raises(AssertionError):
        pool.release(place)


def test_a_place_that_was_never_published_comes_back():
    pool = Pool(1 << 16, 8, CPU)
    place = pool.reserve(0, "d0@1", delta_of(0))
    assert pool.get(0) is None and pool.used > 0
    pool.release(place)
    pool.check()
    assert pool.used == 0


def test_a_delta_without_tensors_is_resident_too():
    pool = Pool(1 << 12, 8, CPU)
    empty = Delta((), {}, Task.GENERATION, Provenance("test", "", 0, 0))
    place = put(pool, 0, empty)
    assert place.nbytes >= 0 and pool.get(0) is place
    pool.release(place)
    assert pool.used == 0


def sharing(seed: int, *bases: torch.Tensor, rank: int = 3) -> Delta:
    """A delta of little more than views of bases [40, 40], one LowRank for each."""
    g = torch.Generator().manual_seed(seed)
    at = {
        f"s{place}": (LowRank(base[:rank, :33], base[:17, :rank], 1.0, torch.randn(rank, generator=g)),)
        for place, base in enumerate(bases)
    }
    found = {content_key(base): base for base in bases}
    return Delta(("vera",), at, Task.GENERATION, Provenance("test", str(seed), 0, 0), bases=found)


def base(seed: int) -> torch.Tensor:
    return torch.randn(40, 40, generator=torch.Generator().manual_seed(seed))


BASE = 6400
"""Bytes of one."""


def test_three_deltas_have_one_copy_of_their_base():
    pool, deltas = Pool(1 << 16, 8, CPU), [sharing(seed, base(1), base(2)) for seed in range(3)]
    places = [put(pool, key, delta) for key, delta in enumerate(deltas)]
    assert pool.size(deltas[0]) == 2 * 256 and pool.shared(deltas[0]) == 2 * BASE
    assert pool.used == 3 * 2 * 256 + 2 * BASE and all(place.nbytes == 2 * 256 for place in places)
    for place, delta in zip(places, deltas, strict=True):
        for site, (given,) in delta.at.items():
            (ours,) = place.delta.at[site]
            views = [getattr(place.delta.at[site][0], name) for name in ("a", "b")]
            assert (
                torch.equal(ours.a, given.a) and torch.equal(ours.b, given.b) and torch.equal(ours.inner, given.inner)
            )
            assert [v.data_ptr() for v in views] == [getattr(places[0].delta.at[site][0], n).data_ptr() for n in "ab"]
    assert [pool.release(place) for place in places] == [512, 512, 512 + 2 * BASE]
    pool.check()
    assert pool.used == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_base_is_stored_in_the_pools_dtype(dtype: torch.dtype):
    pool, delta = Pool(1 << 16, 8, CPU, dtype), sharing(0, base(1))
    place = put(pool, 0, delta)
    (ours,), (given,) = place.delta.at["s0"], delta.at["s0"]
    assert 0 <= pool.shared(delta) - 1600 * dtype.itemsize < 256 and ours.a.dtype is ours.inner.dtype is dtype
    assert torch.equal(ours.a, given.a.to(dtype)) and torch.equal(ours.b, given.b.to(dtype))


def test_a_base_that_does_not_fit_leaves_nothing_behind():
    pool = Pool(2 * BASE, 8, CPU)
    put(pool, 0, sharing(0, base(1)))
    used = pool.used
    for delta in (sharing(1, base(2)), sharing(1, base(1), base(2)), sharing(1, base(2), base(1))):
        assert pool.reserve(1, "d1@1", delta) is None
        pool.check()
        assert pool.used == used
    full = Pool(2 * BASE, 8, CPU)
    assert full.reserve(0, "d0@1", sharing(0, base(1), base(2))) is None and full.used == 0, "its own bytes do not fit"
    assert same(put(pool, 1, sharing(1, base(1))).delta, sharing(1, base(1)))


def test_slots_run_out_before_a_base_is_placed():
    pool = Pool(1 << 16, 1, CPU)
    put(pool, 0, sharing(0, base(1)))
    used = pool.used
    assert pool.reserve(1, "d1@1", sharing(1, base(2))) is None and pool.used == used


def test_who_fails_while_copying_gives_its_base_to_the_next():
    pool, spoilt, good = Pool(1 << 16, 8, CPU), sharing(0, base(1)), sharing(1, base(1))
    first = pool.reserve(0, "d0@1", spoilt)
    second = pool.reserve(1, "d1@1", good)
    assert first is not None and second is not None and pool.used == 2 * 256 + BASE
    with pytest.raises(KeyError):
        pool.copy(first, dataclasses.replace(spoilt, bases={}))
    pool._arena[: pool.used] = 255  # what was there before
    assert pool.release(first) == 256
    pool.publish(second, pool.copy(second, good))
    pool.check()
    assert torch.equal(second.delta.at["s0"][0].a, good.at["s0"][0].a)
    assert pool.release(second) == 256 + BASE and pool.used == 0


def test_a_base_comes_back_whole_after_its_last_user_left():
    pool, delta = Pool(1 << 14, 8, CPU), sharing(0, base(1))
    pool.release(put(pool, 0, delta))
    pool._arena.fill_(255)
    again = put(pool, 1, delta)
    assert torch.equal(again.delta.at["s0"][0].b, delta.at["s0"][0].b)


def test_the_last_user_of_a_base_that_is_wanted_goes_last():
    pool = Pool(1 << 16, 8, CPU)
    places = [
        put(pool, key, delta) for key, delta in enumerate([sharing(0, base(1)), delta_of(1), sharing(2, base(2))])
    ]
    incoming = sharing(3, base(1))
    assert pool.victim(delta_of(9)) is places[0] and pool.victim(incoming) is places[1]
    pool.release(places[1])
    assert pool.victim(incoming) is places[2]
    pool.release(places[2])
    assert pool.victim(incoming) is places[0], "better than nothing"
    more = put(pool, 3, incoming)
    assert pool.victim(sharing(4, base(1))) is places[0], "it is not the last"
    places[0].pins = 1
    assert pool.victim(sharing(4, base(1))) is more
