"""The life of a version: loading, resident, draining, gone; and who may still use it."""

import dataclasses
from pathlib import Path

import pytest
import torch

from deltaserve.catalog.catalog import Catalog
from deltaserve.catalog.reference import parse
from deltaserve.catalog.version import Card, Source, State, Version
from deltaserve.deltas.adapters import Bottleneck, Gate
from deltaserve.deltas.delta import Delta, Provenance
from deltaserve.deltas.primitives import SoftPrompt
from deltaserve.deltas.sites import Task
from deltaserve.errors import BadCheckpoint, DataLoss, NotFound

SOURCE = Source(Path("/x"), "x")


class Disk:
    """What can be read: one delta, whose content may change."""

    def __init__(self) -> None:
        self.content: str | None = "old"

    def __call__(self, source: Source) -> Delta:
        if self.content is None:
            raise BadCheckpoint(f"{source.shown} is gone")
        return Delta((), {}, Task.GENERATION, Provenance("test", self.content, 0, 0))


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def catalog(disk: Disk) -> Catalog:
    return Catalog(disk)


def admitted(catalog: Catalog, name: str, content: str = "old") -> Version:
    version = catalog.begin(name, SOURCE, content)
    catalog.admit(version.key, 100)
    return catalog.resolve(parse(name))


def test_requests_see_a_version_when_it_is_admitted(catalog: Catalog) -> None:
    version = catalog.begin("a", SOURCE, "old")
    with pytest.raises(NotFound, match="a@1 is loading"):
        catalog.resolve(parse("a"))
    assert catalog.find(parse("a")).state is State.LOADING and catalog.current("a") is None
    assert catalog.admit(version.key, 100, 7) is None
    assert (catalog.resolve(parse("a")).device_bytes, catalog.resolve(parse("a")).shared_bytes) == (100, 7)
    assert catalog.resolve(parse("a")).label == catalog.resolve(parse("a@1")).label == "a@1"
    assert catalog.resolve(parse("a")).now({version.key}) is State.RESIDENT
    assert catalog.resolve(parse("a")).now(()) is State.EVICTED


def test_the_next_version_takes_over_and_the_old_one_drains(catalog: Catalog) -> None:
    first = admitted(catalog, "a")
    with catalog.lease(parse("a")) as held:
        second = catalog.begin("a", SOURCE, "new")
        before = catalog.admit(second.key, 1)
        assert before is not None and before.key == first.key == held.key and before.state is State.DRAINING
        assert catalog.resolve(parse("a")).label == "a@2"
        with pytest.raises(NotFound, match="in service is a@2"):
            catalog.resolve(parse("a@1"))
        drained = catalog.drained(first.key)
        assert not drained.done() and not drained.cancel() and catalog.in_flight(first.key) == 1
    assert drained.done() and catalog.in_flight(first.key) == 0
    catalog.drop(first.key)
    assert [v.label for v in catalog.all()] == ["a@2"] and catalog.get(first.key) is None


def test_every_lease_counts(catalog: Catalog) -> None:
    version = admitted(catalog, "a")
    with catalog.lease(parse("a")), catalog.lease(parse("a")):
        catalog.withdraw(parse("a"))
        assert catalog.in_flight(version.key) == 2
    assert catalog.drained(version.key).done()


def test_withdrawn_at_rest_is_drained_at_once_and_its_number_is_spent(catalog: Catalog) -> None:
    version = admitted(catalog, "a")
    (gone,) = catalog.withdraw(parse("a"))
    assert gone.state is State.DRAINING and catalog.drained(version.key).done()
    assert catalog.withdraw(parse("a@1")) == (gone,)  # again is no error as long as it drains
    catalog.drop(version.key)
    with pytest.raises(NotFound):
        catalog.withdraw(parse("a"))
    assert admitted(catalog, "a").number == 2


def test_an_abandoned_version_spends_no_number(catalog: Catalog) -> None:
    catalog.abandon(catalog.begin("a", SOURCE, "old").key)
    assert catalog.all() == [] and admitted(catalog, "a").number == 1


def test_a_loading_version_cannot_be_withdrawn(catalog: Catalog) -> None:
    admitted(catalog, "a")
    loading = catalog.begin("a", SOURCE, "new")
    assert [v.number for v in catalog.withdraw(parse("a"))] == [1]
    assert catalog.admit(loading.key, 1) is None and catalog.resolve(parse("a")).number == 2


def test_the_nearest_names_are_told(catalog: Catalog) -> None:
    for name in ("sentiment", "sentence", "acme/sst2"):
        admitted(catalog, name)
    with pytest.raises(NotFound, match='did you mean "sentiment"') as missing:
        catalog.resolve(parse("sentimant"))
    assert missing.value.metadata["nearest"].split(",")[0] == "sentiment"
    with pytest.raises(NotFound, match="3 others are loaded"):
        catalog.resolve(parse("zzz"))


def test_evicted_bytes_come_back_only_if_they_are_the_same(catalog: Catalog, disk: Disk) -> None:
    version = admitted(catalog, "a")
    assert catalog.fetch(version.key).provenance.content_hash == "old"
    disk.content = "new"
    with pytest.raises(DataLoss, match="has changed"):
        catalog.fetch(version.key)
    disk.content = None
    with pytest.raises(DataLoss, match="x is gone"):
        catalog.fetch(version.key)
    with pytest.raises(NotFound):
        catalog.fetch(99)


def test_all_are_in_order(catalog: Catalog) -> None:
    for name in ("b", "a", "b", "c/a"):
        admitted(catalog, name, content=name)
    assert [v.label for v in catalog.all()] == ["a@1", "b@1", "b@2", "c/a@1"]


def test_the_engine_is_told_all_that_it_must_know_before_it_has_the_bytes() -> None:
    gate = Gate(torch.ones(1, 4))
    made = Delta(
        ("k",),
        {"s": (Bottleneck(torch.ones(2, 4), torch.ones(4, 2), gate=gate),)},
        Task.GENERATION,
        Provenance("test", "h", 0, 0),
        prompt=SoftPrompt(torch.ones(3, 4), 1),
        position_shift=2,
        invocation=(5,),
    )
    ref = Card.of(made).ref(7, "a@1")
    told = {field.name: getattr(ref, field.name) for field in dataclasses.fields(ref)}
    assert told == {
        "key": 7, "label": "a@1", "kinds": ("k",), "prompt_length": 3, "prompt_place": 1, "position_shift": 2,
        "invocation": (5,), "whole": True,
    }  # fmt: skip
