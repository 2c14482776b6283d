"""Converted deltas: what is read back is what was written, bit for bit, or refused in words that say what is wrong."""

import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltaserve.backbone.load import load
from deltaserve.backbone.model import Backbone
from deltaserve.deltas import adapters, primitives
from deltaserve.deltas.delta import Delta, Provenance
from deltaserve.deltas.primitives import Affine, Dense, LowRank, Rows, Sparse
from deltaserve.deltas.sites import SiteType, Task
from deltaserve.errors import AlreadyExists, BadCheckpoint, FailedPrecondition, InvalidArgument
from deltaserve.formats import native
from deltaserve.formats.native.record import PRIMITIVES
from deltaserve.formats.registry import Wanted, content_hash, read
from deltaserve.formats.weighed import Weighed


def bits(value: Any) -> Any:
    """A delta or a part of it as plain values that are equal where every bit is."""
    if isinstance(value, torch.Tensor):
        octets = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return str(value.dtype), tuple(value.shape), value.stride(), octets
    if dataclasses.is_dataclass(value):
        return type(value).__name__, {f.name: bits(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: bits(each) for key, each in value.items()}
    return tuple(bits(each) for each in value) if isinstance(value, tuple) else value


def same(read_back: Delta, delta: Delta) -> bool:
    """But for where it was read from, which the converted one remembers."""
    told = {"warnings": delta.provenance.warnings, "guessed": delta.provenance.guessed}
    assert read_back.provenance.origin == dataclasses.replace(delta.provenance, **told)
    assert list(read_back.at) == list(delta.at), "the order in which the pool lays them out"
    assert (read_back.nbytes, read_back.shared_bytes) == (delta.nbytes, delta.shared_bytes)
    return bool(bits(dataclasses.replace(read_back, provenance=delta.provenance)) == bits(delta))


def converted(folder: Path, backbone: Backbone, destination: Path, wanted: Wanted = Wanted()) -> Delta:  # noqa: B008
    """What was lowered, and written to `destination`."""
    weights = Weighed(backbone.weights)
    delta = read(folder, backbone.spec, weights, wanted)
    native.write(delta, destination, backbone.spec, weights)
    return delta


def test_every_method_comes_back_bit_for_bit(checkpoints: list[tuple[Backbone, Path, Wanted]], tmp_path: Path) -> None:
    kinds, types, weighed = set[str](), set[type](), 0
    for n, (backbone, folder, wanted) in enumerate(checkpoints):
        delta = converted(folder, backbone, tmp_path / str(n), wanted)
        found = read(tmp_path / str(n), backbone.spec, backbone.weights)
        assert same(found, delta), folder.name
        assert found.provenance.format == "deltaserve"
        assert found.provenance.content_hash == content_hash(tmp_path / str(n))
        kinds |= set(delta.kinds)
        types |= {type(part) for parts in delta.at.values() for part in parts}
        weighed += bool(json.loads((tmp_path / str(n) / "delta.json").read_text())["weights"])
    assert len(checkpoints) > 90 and len(kinds) > 35 and weighed > 10
    assert types == set(primitives.SitePrimitive.__args__) - set(adapters.Adapter.__args__)


def test_every_primitive_and_field_is_known() -> None:
    """A new one is stored, or this fails: what is left out would be lost without a word."""
    (*sited,) = primitives.SitePrimitive.__args__
    assert set(PRIMITIVES.values()) == {*sited, primitives.SoftPrompt, primitives.HeadLayer, adapters.Coupling}
    assert {f.name for f in dataclasses.fields(Delta)} == {
        *("kinds", "at", "task", "provenance", "prompt", "position_shift", "head", "pooling", "labels"),
        *("problem_type", "invocation", "task_id", "token_types", "coupling", "bases"),
    }


@pytest.fixture
def other(backbones: Mapping[str, Backbone], tmp_path: Path) -> Callable[[str, str], Backbone]:
    """The backbone of a family with one parameter changed by a little."""

    def make(family: str, parameter: str) -> Backbone:
        place = tmp_path / f"other-{family}"
        shutil.copytree(backbones[family].name, place)
        file = place / "model.safetensors"
        found = load_file(file)
        (name,) = [name for name in found if name.endswith(parameter)]
        found[name].view(-1)[0] += 1e-3
        save_file(found, file, {"format": "pt"})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load(str(place), dtype="float32", device="cpu")

    return make


@pytest.mark.parametrize(
    ("name", "parameter", "part"),
    [
        ("pissa", "layers.0.self_attn.q_proj.weight", "weight"),
        ("dora", "layers.0.self_attn.q_proj.weight", "weight"),
        ("dora", "layers.0.self_attn.q_proj.bias", "bias"),
        ("biased", "layers.0.self_attn.q_proj.bias", "bias"),
    ],
)
def test_numbers_of_other_weights_are_refused(
    name: str, parameter: str, part: str, made: Callable[..., Any], other: Any
) -> None:
    spoilt = made(name)
    changed = dataclasses.replace(spoilt, backbone=other("opt", parameter))
    changed.refused("made for other weights", part, "q_proj")
    with pytest.raises(BadCheckpoint) as caught:
        changed.read()
    assert caught.value.reason == "OTHER_WEIGHTS"


def test_numbers_of_no_weights_go_everywhere(made: Callable[..., Any], other: Any) -> None:
    """A LoRA is one for all that are made alike; a weight that no lowering asked for may be another."""
    changed = dataclasses.replace(made("lora"), backbone=other("gpt2", "h.0.attn.c_attn.weight"))
    (warning,) = changed.read().provenance.warnings
    assert "other-gpt2" in warning
    dataclasses.replace(made("pissa"), backbone=other("opt", "layers.0.self_attn.k_proj.weight")).read()


def test_what_the_operator_says(made: Callable[..., Any]) -> None:
    """By the rules that hold for a checkpoint."""
    spoilt = made("mood")
    assert spoilt.read().provenance.guessed == ("labels", "problem_type")
    told = spoilt.read(Wanted(labels=("a", "b", "c"), problem_type="multi_label_classification"))
    assert (told.labels, told.problem_type) == (("a", "b", "c"), "multi_label_classification")
    assert not {"labels", "problem_type"} & set(told.provenance.guessed)
    plain = spoilt.read(Wanted(task=Task.EMBEDDING))
    assert (plain.task, plain.head, plain.pooling, plain.labels, plain.kinds) == (
        Task.EMBEDDING,
        None,
        None,
        (),
        ("lora",),
    )
    assert "'classifier' is left out" in plain.provenance.warnings[-1]
    tags = spoilt.read(Wanted(task=Task.TOKEN_CLASSIFICATION))
    assert (tags.task, tags.pooling) == (Task.TOKEN_CLASSIFICATION, "tokens") and tags.head is not None
    spoilt.refused("2 labels", error=InvalidArgument, wanted=Wanted(labels=("a", "b")))
    lora = made("lora")
    assert lora.read(Wanted(task=Task.EMBEDDING)).task is Task.EMBEDDING
    lora.refused("1 labels", error=InvalidArgument, wanted=Wanted(labels=("a",)))
    lora.refused("task_id is 1", "no tasks", error=InvalidArgument, wanted=Wanted(task_id=1))
    lora.refused("problem_type", error=InvalidArgument, wanted=Wanted(problem_type="regression"))
    lora.refused("holds no head", wanted=Wanted(task=Task.SEQUENCE_CLASSIFICATION))


def test_the_same_as_lowering_with_that_wish(made: Callable[..., Any], tmp_path: Path) -> None:
    """A wish at the conversion, at the load, or without a conversion: one answer."""
    wish = Wanted(task=Task.TOKEN_CLASSIFICATION, labels=("x", "y", "z"))
    early = made("mood", wish)
    checkpoint = next(place for place in tmp_path.iterdir() if (place / "adapter_config.json").is_file())
    lowered = read(checkpoint, early.backbone.spec, early.backbone.weights, wish)
    assert same(early.read(), lowered)
    late = made("mood", name="late").read(wish)
    left = {"provenance": lowered.provenance}
    assert bits(dataclasses.replace(late, **left)) == bits(lowered)


def test_equal_tensors_are_stored_once(made: Callable[..., Any]) -> None:
    """Rows of tied embeddings, and MISS's equal matrices: one tensor in the file, and one in memory."""
    spoilt = made("tokens")
    delta = spoilt.read()
    sites = [part for parts in delta.at.values() for part in parts]
    assert len(sites) == 2 and all(isinstance(part, Rows) for part in sites)
    assert sites[0].index is sites[1].index and len(load_file(spoilt.folder / "delta.safetensors")) <= 3


def test_destination(made: Callable[..., Any], tmp_path: Path) -> None:
    """All at once or not at all, and nothing of somebody else's is replaced."""
    spoilt = made("lora")
    weights = Weighed(spoilt.backbone.weights)
    delta = spoilt.read()

    def write(place: Path, **told: Any) -> None:
        native.write(delta, place, spoilt.backbone.spec, weights, **told)

    before = sorted(tmp_path.iterdir())
    with pytest.raises(AlreadyExists, match="--force"):
        write(spoilt.folder)
    write(spoilt.folder, replace=True)
    assert same(spoilt.read(), dataclasses.replace(delta, provenance=delta.provenance.origin))
    for place in (tmp_path / "mine", tmp_path / "file", tmp_path / "link"):
        if place.name == "link":
            place.symlink_to(spoilt.folder)
        elif place.name == "file":
            place.write_text("x")
        else:
            place.mkdir()
            (place / "notes.txt").write_text("x")
        with pytest.raises(AlreadyExists, match="no converted delta"):
            write(place, replace=True)
    with pytest.raises(FailedPrecondition, match="is not a folder"):
        write(tmp_path / "nowhere" / "x")
    long = dataclasses.replace(delta, labels=("x" * 300,))
    with pytest.raises(BadCheckpoint, match="labels"):
        native.write(long, tmp_path / "long", spoilt.backbone.spec, weights)
    assert sorted(tmp_path.iterdir()) == sorted([*before, *(tmp_path / n for n in ("mine", "file", "link"))])


def test_deltas_of_all_sites_and_dtypes(backbones: Mapping[str, Backbone], tmp_path: Path) -> None:
    """What no lowering of PEFT's makes in one: every primitive that a linear takes together, in three dtypes."""
    backbone = backbones["opt"]
    site = next(s for s in backbone.spec.sites.values() if s.type is SiteType.LINEAR and s.bias is not None)
    i, o = site.in_features, site.out_features

    def parts(dtype: torch.dtype) -> Iterable[Any]:
        yield LowRank(torch.randn(3, i).to(dtype), torch.randn(o, 3), -0.1)
        yield Affine(torch.randn(i).to(dtype), torch.randn(o), torch.randn(o).to(dtype))
        yield Dense(torch.randn(o, i).to(dtype), torch.randn(o), replace=True)
        yield Sparse(torch.tensor([[3, 0, 3], [1, 2, 1]], dtype=torch.int32), torch.randn(3).to(dtype))
        yield Rows(torch.tensor([0, o - 1], dtype=torch.int32), torch.randn(2, i).to(dtype))

    weights = Weighed(backbone.weights)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        made = native_delta(site.name, tuple(parts(dtype)))
        place = tmp_path / str(dtype)
        native.write(made, place, backbone.spec, weights)
        assert same(read(place, backbone.spec, backbone.weights), made)


def native_delta(site: str, parts: tuple[Any, ...]) -> Delta:
    return Delta(("lora", "bias"), {site: parts}, Task.GENERATION, Provenance("test", "0" * 64, 1, 2, "x", ("w",)))
