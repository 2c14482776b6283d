"""Checkpoints of every kind with one or two things spoilt: lowered or refused in words, soon, and without a trace.

What is lowered can be installed and holds finite numbers alone. Reading opens no file but the checkpoint's own, no
socket and no process, unpickles nothing but tensors, and takes bounded time and memory.
"""

import contextlib
import json
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hub_cases
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opendeltas import all_made
from safetensors.torch import load_file
from spoils import SPOILED_BY, TENSORLESS, Files

from deltaserve.backbone.model import Backbone
from deltaserve.deltas.primitives import LowRank
from deltaserve.errors import DeltaserveError
from deltaserve.formats import folder as layouts
from deltaserve.formats import native
from deltaserve.formats.folder import NATIVE, OPENDELTA, PEFT, Layout
from deltaserve.formats.registry import read
from deltaserve.formats.wanted import NOTHING_WANTED, Wanted
from deltaserve.formats.weighed import Weighed

SECONDS = 5.0
ROOM = 1 << 30
"""Bytes that a reader may take beside what the process has; the checkpoints have some thousand."""


@dataclass(frozen=True)
class Whole:
    """A checkpoint as it was. `beside`: files of it that are not spoilt; `inside`: the sub-folder of those that are."""

    backbone: Backbone
    wanted: Wanted
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    layout: Layout
    beside: Mapping[str, bytes] = field(default_factory=dict)
    inside: str = ""


@pytest.fixture(scope="module")
def whole(checkpoints: list[tuple[Backbone, Path, Wanted]]) -> list[Whole]:
    """Every checkpoint as it was, simplest first; each can be read."""
    return [as_it_was(folder, backbone, wanted, PEFT) for backbone, folder, wanted in checkpoints]


@pytest.fixture(scope="module")
def converted(
    checkpoints: list[tuple[Backbone, Path, Wanted]],
    backbones: Mapping[str, Backbone],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[Whole]:
    """The same and OpenDelta's, converted."""
    place, found = tmp_path_factory.mktemp("converted"), []
    others = [(backbones[m.family], m.write(place / f"of-{name}"), NOTHING_WANTED) for name, m in all_made(backbones)]
    for n, (backbone, folder, wanted) in enumerate([*checkpoints, *others]):
        weights = Weighed(backbone.weights)
        native.write(read(folder, backbone.spec, weights, wanted), place / str(n), backbone.spec, weights)
        found.append(as_it_was(place / str(n), backbone, NOTHING_WANTED, NATIVE))
    return found


@pytest.fixture(scope="module")
def opendelta(backbones: Mapping[str, Backbone], tmp_path_factory: pytest.TempPathFactory) -> list[Whole]:
    """OpenDelta's of every method, and one that holds the whole model."""
    place, found = tmp_path_factory.mktemp("opendelta"), []
    for name, made in all_made(backbones):
        found.append(as_it_was(made.write(place / name), backbones[made.family], NOTHING_WANTED, OPENDELTA))
        if name == "adapter-bert":
            made.whole = {f"bert.{n}": tensor.clone() for n, tensor in backbones["bert"].model.state_dict().items()}
            found.append(as_it_was(made.write(place / "whole"), backbones["bert"], NOTHING_WANTED, OPENDELTA))
    return found


def as_it_was(folder: Path, backbone: Backbone, wanted: Wanted, layout: Layout) -> Whole:
    checked(folder, backbone, wanted)
    config = json.loads((folder / layout.config).read_text())
    return Whole(backbone, wanted, config, load_file(folder / layout.tensors), layout)


@pytest.fixture(scope="module")
def hub(backbones: Mapping[str, Backbone], tmp_path_factory: pytest.TempPathFactory) -> list[Whole]:
    """Checkpoints of AdapterHub's; of setups the file that says how they act, or one of their members, is spoilt."""
    place, found = tmp_path_factory.mktemp("hub"), []
    for n, (made, head) in enumerate(hub_cases.singles(backbones)):
        folder = made.write(place / str(n))
        layout = layouts.HUB
        if head is not None:
            hub_cases.with_head(folder, *head)
            layout = layouts.HUB_HEAD
        checked(folder, backbones[made.family], NOTHING_WANTED)
        for spoilt in {layouts.HUB, layout}:
            found.append(_part(folder, "", spoilt, backbones[made.family]))
    for n, (family, write) in enumerate(hub_cases.setups()):
        folder = write(place / f"setup-{n}")
        checked(folder, backbones[family], NOTHING_WANTED)
        found.append(_part(folder, "", layouts.HUB_SETUP, backbones[family]))
        for inside, layout in (("folder-0", layouts.HUB), ("fused", layouts.HUB_FUSION)):
            if (folder / inside).is_dir():
                found.append(_part(folder, inside, layout, backbones[family]))
    return found


def _part(folder: Path, inside: str, layout: Layout, backbone: Backbone) -> Whole:
    here = folder / inside
    spoilt = {here / layout.config, here / layout.tensors}
    others = [file for file in folder.rglob("*") if file.is_file() and file not in spoilt]
    beside = {str(file.relative_to(folder)): file.read_bytes() for file in others}
    tensors = load_file(here / layout.tensors) if layout.tensors else {}
    config = json.loads((here / layout.config).read_text())
    return Whole(backbone, NOTHING_WANTED, config, tensors, layout, beside, inside)


class Watch:
    """What Python reports to audit hooks while `folder` is set: things that reading a checkpoint never does."""

    NEVER = (
        "socket.",
        "subprocess.",
        "os.system",
        "os.exec",
        "os.spawn",
        "os.posix_spawn",
        "ctypes.dlopen",
        "os.remove",
    )

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.seen: list[str] = []
        self._known = tuple(str(Path(p).resolve()) for p in (sys.prefix, sys.base_prefix, "/proc", "/sys", "/dev"))
        self._known += tuple(str(Path(p).resolve()) for p in sys.path if p)
        sys.addaudithook(self._heard)

    def _heard(self, event: str, told: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event.startswith(self.NEVER):
            self.seen.append(f"{event} {told!r}"[:200])
        elif event == "open" and isinstance(told[0], str | bytes):
            path = str(Path(told[0] if isinstance(told[0], str) else told[0].decode()).absolute())
            if not path.startswith((str(self.folder), *self._known)):
                self.seen.append(f"open {path}")
        elif event == "pickle.find_class" and told[0].partition(".")[0] not in ("torch", "collections"):
            self.seen.append(f"{event} {told!r}")


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Fails what takes more than SECONDS, or ROOM where the system can say no."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, before[1]))
    start = time.monotonic()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.monotonic() - start < SECONDS


def checked(folder: Path, backbone: Backbone, wanted: Wanted, **told: bool) -> None:
    """Reads a checkpoint, and asserts that what comes of it can be installed and computed with."""
    delta = read(folder, backbone.spec, backbone.weights, wanted, **told)
    assert delta.kinds and delta.provenance.tensors_matched > 0
    assert all(bool(torch.isfinite(tensor).all()) for tensor in (*delta.tensors(), *delta.bases.values()))
    scales = [one.scale for primitives in delta.at.values() for one in primitives if isinstance(one, LowRank)]
    assert all(abs(scale) <= torch.finfo(torch.float32).max for scale in scales)
    backbone.install(0, delta)
    backbone.remove(0, delta)


def fuzz(whole: list[Whole], watch: Watch, examples: int) -> dict[str, int]:
    """Reads so many spoilt checkpoints; returns how many were lowered, and how many were refused."""
    outcomes = {"lowered": 0, "refused": 0}

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.data())
    def spoilt(data: st.DataObject) -> None:
        one = whole[data.draw(st.integers(0, len(whole) - 1))]
        files = Files(dict(one.config), dict(one.tensors), one.layout)
        ways = SPOILED_BY[one.layout] if one.tensors else TENSORLESS
        for spoil in data.draw(st.lists(st.sampled_from(ways), min_size=1, max_size=2)):
            if files.config and (files.tensors or not one.tensors):
                spoil(data.draw, files)
        folder = Path(tempfile.mkdtemp(prefix="fuzz"))
        for name, content in one.beside.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        files.write(folder / one.inside)
        watch.folder, refusals = folder, list[str]()
        try:
            with bounded():
                checked(folder, one.backbone, one.wanted, allow_pickle=files.pickled)
            outcomes["lowered"] += 1
        except DeltaserveError as error:
            refusals.append(error.message)
        finally:
            watch.folder = None
            shutil.rmtree(folder)
        assert not watch.seen
        if refusals:
            (said,) = refusals
            assert 0 < len(said) < 2000
            assert str(folder) not in said, "where the server keeps its files is nobody's business"
            outcomes["refused"] += 1

    spoilt()
    return outcomes


@pytest.mark.timeout(300)
def test_spoilt_checkpoints_are_lowered_or_refused(whole: list[Whole], watch: Watch) -> None:
    outcomes = fuzz(whole, watch, 2000)
    assert min(outcomes.values()) > 100, outcomes


@pytest.mark.long
@pytest.mark.timeout(600)
def test_many_spoilt_checkpoints(whole: list[Whole], watch: Watch) -> None:
    outcomes = fuzz(whole, watch, 8_000)
    assert min(outcomes.values()) > 500, outcomes


@pytest.mark.timeout(600)
@pytest.mark.parametrize("examples", [1500, pytest.param(8000, marks=pytest.mark.long)])
def test_spoilt_checkpoints_of_adapterhub(hub: list[Whole], watch: Watch, examples: int) -> None:
    outcomes = fuzz(hub, watch, examples)
    assert min(outcomes.values()) > examples // 20, outcomes


@pytest.mark.timeout(600)
@pytest.mark.parametrize("examples", [1000, pytest.param(6000, marks=pytest.mark.long)])
def test_spoilt_checkpoints_of_opendelta(opendelta: list[Whole], watch: Watch, examples: int) -> None:
    assert min(fuzz(opendelta, watch, examples).values()) > examples // 50


@pytest.mark.timeout(600)
@pytest.mark.parametrize("examples", [1000, pytest.param(6000, marks=pytest.mark.long)])
def test_spoilt_conversions_are_read_or_refused(converted: list[Whole], watch: Watch, examples: int) -> None:
    assert min(fuzz(converted, watch, examples).values()) > examples // 50
