"""Setups of AdapterHub's that cannot be one delta, or are spoilt: refused, each with its reason."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import (
    HOULSBY,
    LORA,
    PAR,
    SEQ,
    Made,
    Reading,
    bottlenecks,
)
from test_adapterhub_setups import SMALL, VECTOR, Setup, block, flat, fusion_of, loras, pair

from deltaserve.backbone.model import Backbone
from deltaserve.deltas.delta import Delta
from deltaserve.errors import BadCheckpoint, FailedPrecondition
from deltaserve.formats.registry import content_hash


@pytest.fixture
def reading(backbones: Mapping[str, Backbone], tmp_path: Path) -> Reading:
    return Reading(backbones, tmp_path)


def changed(**changes: Any) -> Callable[[Setup], Any]:
    told = {"query": True, "key": True, "value": True, **changes}
    return lambda setup: setup.fusion(("a", "b"), fusion_of("bert", told, "a,b"), told)


REFUSED: Mapping[str, tuple[Any, Callable[[Setup], Any] | None, str, type[Exception]]] = {
    "no setup": (None, None, "'adapter_setup' holds None", BadCheckpoint),
    "a word": ("Stack", None, "'adapter_setup' holds 'Stack'", BadCheckpoint),
    "Parallel": (block("Parallel", "a", "b"), None, "an answer of its own", FailedPrecondition),
    "BatchSplit": (block("BatchSplit", "a", "b"), None, "each request names its delta", FailedPrecondition),
    "Split": (block("Split", "a", "b"), None, "one length alone", FailedPrecondition),
    "unknown": (block("os.system", "a"), None, "of type 'os.system'", FailedPrecondition),
    "no children": ({"type": "Stack", "children": []}, None, "has children []", BadCheckpoint),
    "too many": ({"type": "Stack", "children": ["a"] * 1000}, None, "1 to 32 are expected", BadCheckpoint),
    "an adapter that is not there": (block("Stack", "a", "../b"), None, "'../b'", BadCheckpoint),
    "no name": (block("Stack", {"type": "single", "children": [5]}), None, "one name is expected", BadCheckpoint),
    "nested": (block("Fuse", "a", block("Stack", "b")), None, "Stack block inside", FailedPrecondition),
    "fused averages": (block("Fuse", "a", block("Average", "b", weights=[1])), None, "in a Fuse", FailedPrecondition),
    "twice": (block("Fuse", "a", "a"), None, "names an adapter twice", BadCheckpoint),
    "no weights": (block("Average", "a", "b"), None, "has weights None", BadCheckpoint),
    "a weight too many": (block("Average", "a", "b", weights=[1, 2, 3]), None, "2 numbers", BadCheckpoint),
    "weights of nothing": (block("Average", "a", "b", weights=[1, -1]), None, "by their sum, 0", BadCheckpoint),
    "no fusion": (block("Fuse", "a", "b"), None, "no folder has a fusion of these", BadCheckpoint),
    "another fusion": (block("Fuse", "b", "a"), changed(), "no folder has a fusion of these", BadCheckpoint),
    "temperature": (block("Fuse", "a", "b"), changed(temperature=True), "lowers it at each", FailedPrecondition),
    "nothing to fuse with": (
        block("Fuse", "a", "b"), changed(key=False, query=False, value=False), "no weights to fuse with",
        FailedPrecondition,
    ),
    "an option of tomorrow": (block("Fuse", "a", "b"), changed(heads=4), "'heads' is 4", FailedPrecondition),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refusals(what: str, reading: Reading, tmp_path: Path) -> None:
    told, change, said, error = REFUSED[what]
    setup = Setup(tmp_path, pair("bert"), told)
    if change is not None:
        change(setup)
    reading.refused(setup.folder, said, error=error)


def test_a_fusion_alone_is_refused(reading: Reading, tmp_path: Path) -> None:
    setup = Setup(tmp_path, pair("bert"), block("Fuse", "a", "b"))
    changed()(setup)
    reading.refused(setup.folder / "fused", "save_adapter_setup", error=FailedPrecondition)


def test_fusion_of_what_is_at_unlike_places(reading: Reading, tmp_path: Path) -> None:
    setup = Setup(tmp_path, pair("bert", HOULSBY), block("Fuse", "a", "b"))
    changed()(setup)
    reading.refused(setup.folder, "lacks 'b'")


def test_mixtures_that_the_library_cannot_run(reading: Reading, tmp_path: Path) -> None:
    mixed = Setup(tmp_path / "1", loras(LORA, VECTOR), block("Stack", "a", "b"))
    reading.refused(mixed.folder, "LoRA and IA3", error=FailedPrecondition)
    fused_loras = Setup(tmp_path / "2", loras(), block("Fuse", "a", "b"))
    reading.refused(fused_loras.folder, "fuses bottleneck adapters alone", error=FailedPrecondition)
    prefixes = Setup(tmp_path / "3", [flat("a", 3, 1), flat("b", 2, 2)], block("Average", "a", "b", weights=[1, 1]))
    reading.refused(prefixes.folder, "prefixes in a block of type Average", error=FailedPrecondition)
    unlike = Setup(tmp_path / "4", pair("bert", SEQ, PAR), block("Average", "a", "b", weights=[1, 1]))
    reading.refused(unlike.folder, "in a row and beside", error=FailedPrecondition)
    normed = Setup(tmp_path / "5", pair("bert", {**SEQ, "ln_after": True}), block("Average", "a", "b", weights=[1, 1]))
    reading.refused(normed.folder, "within an Average", error=FailedPrecondition)


def test_content_is_that_of_all_folders(tmp_path: Path) -> None:
    setup = Setup(tmp_path, pair("bert"), block("Stack", "a", "b"))
    before = content_hash(setup.folder)
    assert content_hash(setup.folder) == before
    Made(SMALL, bottlenecks(SMALL, name="b", seed=99), name="b").write(setup.folder / "folder-1")
    assert content_hash(setup.folder) != before


def test_links_are_not_followed(reading: Reading, tmp_path: Path) -> None:
    setup = Setup(tmp_path, pair("bert"), block("Stack", "a", "b"))
    (setup.folder / "folder-1").rename(tmp_path / "elsewhere")
    (setup.folder / "link").symlink_to(tmp_path / "elsewhere")
    reading.refused(setup.folder, "none of its folders holds an adapter of that name")


def test_a_missing_or_an_extra_tensor_of_a_member(reading: Reading, tmp_path: Path) -> None:
    made = pair("bert")
    del made[1].tensors["encoder.layer.1.output.adapters.b.adapter_up.bias"]
    reading.refused(Setup(tmp_path / "1", made, block("Stack", "a", "b")).folder, "adapter_up.bias' is missing")
    made = pair("bert")
    made[1].tensors["encoder.layer.9.output.adapters.b.adapter_up.bias"] = torch.ones(1)
    reading.refused(Setup(tmp_path / "2", made, block("Stack", "a", "b")).folder, "no place in", "layer.9")


def test_kinds_of_a_delta(reading: Reading, tmp_path: Path) -> None:
    delta: Delta = reading(Setup(tmp_path, pair("bert", SEQ, PAR), block("Stack", "a", "b")).folder)
    assert delta.kinds == ("adapter", "parallel-adapter") and delta.provenance.format == "adapterhub"
