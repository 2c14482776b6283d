"""OpenDelta's checkpoints as files: what a config names, what is told of one, and what becomes of it converted."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from opendeltas import (
    ADAPTER,
    ATTENTIONS,
    ENDS,
    HIDDEN,
    LINEARS,
    LORA,
    PAIRS,
    PREFIX,
    Draw,
    Made,
    Reading,
    Tensors,
    adapter,
    all_made,
    everywhere,
    flat,
    lora,
    only,
    table,
)
from test_native import same

from deltaserve.backbone.model import Backbone
from deltaserve.deltas.sites import Task
from deltaserve.errors import FailedPrecondition, InvalidArgument
from deltaserve.formats import native
from deltaserve.formats.opendelta.types import TYPES
from deltaserve.formats.registry import Wanted, content_hash, read
from deltaserve.formats.weighed import Weighed


@pytest.fixture
def reading(backbones: Mapping[str, Backbone], tmp_path: Path) -> Reading:
    return Reading(backbones, tmp_path)


def test_every_method_is_told_by_its_own_config(reading: Reading) -> None:
    assert {made.config["delta_type"] for _, made in all_made(reading.backbones)} == set(TYPES)


def test_converted_they_are_the_same(reading: Reading, tmp_path: Path) -> None:
    for name, made in all_made(reading.backbones):
        backbone = reading.backbones[made.family]
        weights = Weighed(backbone.weights)
        folder = made.write(tmp_path / name)
        delta = read(folder, backbone.spec, weights)
        assert delta.provenance.format == "opendelta" and delta.provenance.tensors_matched == len(made.tensors), name
        assert delta.provenance.content_hash == content_hash(folder)
        native.write(delta, tmp_path / f"{name}-converted", backbone.spec, weights)
        assert same(read(tmp_path / f"{name}-converted", backbone.spec, backbone.weights), delta), name


@pytest.mark.parametrize("family", ["bert", "gpt2", "opt"])
def test_the_bare_base_model_leaves_the_prefix_out(reading: Reading, family: str) -> None:
    made = Made(dict(ADAPTER), everywhere(ENDS, family, adapter), family)
    long = reading(made)
    made.bare = True
    short = reading(made)
    assert list(long.at) == list(short.at)


def test_an_archive_is_read_where_that_is_allowed(reading: Reading) -> None:
    made = Made(dict(ADAPTER), everywhere(ENDS, "bert", adapter), pickled=True)
    reading.refused(made, "pytorch_model.bin", "--allow-pickle-archives", error=FailedPrecondition)
    delta = reading(made, allow_pickle=True)
    made.pickled = False
    assert all(torch.equal(a, b) for a, b in zip(delta.tensors(), reading(made).tensors(), strict=True))


def test_a_config_of_transformers_is_no_delta(reading: Reading, tmp_path: Path) -> None:
    made = Made({"delta_type": ..., "model_type": "bert"}, everywhere(ENDS, "bert", adapter))
    reading.refused(made, "delta_type", "not known who wrote it")
    folder = Made(dict(ADAPTER), everywhere(ENDS, "bert", adapter)).write(tmp_path / "beside")
    shutil.copy(folder / "model.safetensors", folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "NOTHING"}')
    with pytest.raises(FailedPrecondition, match="peft_type"):
        read(folder, reading.backbones["bert"].spec, reading.backbones["bert"].weights)


NAMED: Mapping[str, tuple[list[str], bool, tuple[str, ...]]] = {
    "by their ends": (["output.dense"], False, ENDS["bert"]),
    "one of them": (["1.attention.output.dense"], False, (ENDS["bert"][2],)),
    "the common structure": (["ff@.w2@"], True, (ENDS["bert"][1], ENDS["bert"][3])),
    "one layer of it": (["block@.1.attn@.proj@"], True, (ENDS["bert"][2],)),
}


@pytest.mark.parametrize("name", NAMED)
def test_modules_that_a_config_names(reading: Reading, name: str) -> None:
    """They have tensors, each of them, and no other module has."""
    modules, common, places = NAMED[name]
    config = ADAPTER | {"modified_modules": modules, "common_structure": common}
    tensors, draw = Tensors(), Draw()
    for at in places:
        tensors |= adapter(at, draw)
    assert list(reading(Made(config, tensors)).at) == [f"bert.{at}" for at in places]
    gone = {n: t for n, t in tensors.items() if not n.startswith(places[-1])}
    reading.refused(Made(config, gone or adapter("encoder.layer.0.output.dense", draw)), places[-1])
    more = adapter("encoder.layer.0.attention.self.query", draw)
    reading.refused(Made(config, tensors | more), "does not mean it", "self.query")


def test_a_pattern_is_never_compiled(reading: Reading) -> None:
    """Where the tensors stand is said by their names; a pattern only leaves it unknown whether some are lacking."""
    config = ADAPTER | {"modified_modules": ["[r](a+)+$", "[r](("], "common_structure": False}
    delta = reading(Made(config, adapter(ENDS["bert"][0], Draw())))
    assert list(delta.at) == [f"bert.{ENDS['bert'][0]}"]
    assert any("never compiled" in warning for warning in delta.provenance.warnings)
    parallel = adapter("encoder.layer.0.attention", Draw(), word="parallel_adapter")
    config = PAIRS | {"modified_modules": ["[r]x", "[r]y"], "common_structure": False}
    assert only(reading(Made(config, parallel)), "bert.encoder.layer.0.attention.output.dense").replaces
    made = table("encoder.layer.0.attention", Draw(), 2)
    delta = reading(Made(PREFIX | {"modified_modules": ["[r]x"]}, made))
    assert len(delta.at) == 2, "as many as there are attentions: it is all of them"


def test_excluded_modules(reading: Reading) -> None:
    config = ADAPTER | {"exclude_modules": ["encoder.layer.0"]}
    tensors = {n: t for n, t in everywhere(ENDS, "bert", adapter).items() if "layer.1" in n}
    assert len(reading(Made(config, tensors, bare=True)).at) == 2


def test_methods_that_need_no_config_of_their_own(reading: Reading) -> None:
    """A file may hold several; the library keeps the last one's config."""
    prompt = {"soft_prompt_layer.soft_embeds": Draw()(3, HIDDEN)}
    prefixes = everywhere(ATTENTIONS, "bert", flat, rows=2)
    made = Made(dict(ADAPTER), everywhere(ENDS, "bert", adapter) | prompt | prefixes)
    delta = reading(made)
    assert delta.kinds == ("prefix-tuning", "prompt-tuning", "adapter")
    assert delta.prompt is not None and len(delta.prompt.rows) == 3
    assert len(only(delta, "bert.encoder.layer.0.attention.self").keys) == 2
    assert len([warning for warning in delta.provenance.warnings if "alone" in warning]) == 2
    both = Made(dict(ADAPTER), everywhere(ENDS, "bert", adapter) | everywhere(LINEARS, "bert", lora))
    reading.refused(both, "lora", "'adapter'", "own", error=FailedPrecondition)


def test_what_it_is_for(reading: Reading) -> None:
    """Its class says it where the head is in the file; else it answers as the backbone."""
    tensors = everywhere(ENDS, "bert", adapter)
    head = {"classifier.weight": Draw()(3, HIDDEN), "classifier.bias": Draw()(3)}
    told = ADAPTER | {"backbone_class": "BertForTokenClassification", "backbone_checkpoint_name": "bert-base"}
    delta = reading(Made(told, tensors, whole=head))
    assert (delta.task, delta.kinds, delta.pooling) == (Task.TOKEN_CLASSIFICATION, ("adapter", "head"), "tokens")
    assert delta.provenance.guessed == ("labels", "problem_type") and delta.provenance.base_model == "bert-base"
    assert any("bert-base" in warning for warning in delta.provenance.warnings)
    delta = reading(Made(told, tensors))
    assert delta.task is Task.EMBEDDING and delta.provenance.guessed == ("task",)
    assert any("BertForTokenClassification" in warning for warning in delta.provenance.warnings)
    guessed = reading(Made(dict(ADAPTER), tensors, whole=head))
    assert guessed.task is Task.SEQUENCE_CLASSIFICATION and "task" in guessed.provenance.guessed
    without = reading(Made(told, tensors, whole=head), Wanted(task=Task.EMBEDDING))
    assert without.head is None and any("left out" in warning for warning in without.provenance.warnings)
    reading.refused(Made(told, tensors), "no tensors of its head", wanted=Wanted(task=Task.SEQUENCE_CLASSIFICATION))
    reading.refused(Made(told, tensors), "task_id", error=InvalidArgument, wanted=Wanted(task_id=0))
    assert reading(Made(dict(ADAPTER), everywhere(ENDS, "gpt2", adapter), "gpt2")).task is Task.GENERATION


def test_a_fresh_start_is_told(reading: Reading) -> None:
    tensors = everywhere(LINEARS, "bert", lora)
    zeros = {name: torch.zeros_like(t) if name.endswith("lora_B") else t for name, t in tensors.items()}
    assert any("fresh start" in warning for warning in reading(Made(dict(LORA), zeros)).provenance.warnings)
