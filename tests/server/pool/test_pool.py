"""The arena: what is copied into it is what was given, and slots and bytes come back."""

import itertools

import pytest
import torch

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
