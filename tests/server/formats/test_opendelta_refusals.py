"""What is wrong with a checkpoint of OpenDelta's is said by name, and nothing is loaded in part."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from opendeltas import (
    ADAPTER,
    ATTENTIONS,
    BITFIT,
    COMPACTER,
    ENDS,
    HIDDEN,
    LINEARS,
    LORA,
    LOW_RANK,
    PAIRS,
    PARALLEL,
    PREFIX,
    PROMPT,
    Draw,
    Made,
    Reading,
    Tensors,
    adapter,
    biases,
    compacter,
    everywhere,
    flat,
    lora,
    low_rank,
    table,
)

from deltaserve.backbone.model import Backbone
from deltaserve.errors import BadCheckpoint, DeltaserveError, FailedPrecondition
from deltaserve.formats.registry import content_hash, read

AT = "encoder.layer.0.output.dense"
DOWN, UP = (f"{AT}.adapter.modulelist.{name}_proj" for name in ("down", "up"))


@pytest.fixture
def reading(backbones: Mapping[str, Backbone], tmp_path: Path) -> Reading:
    return Reading(backbones, tmp_path)


SPOILS: Mapping[str, tuple[Callable[[Tensors], Any], tuple[str, ...]]] = {
    "missing": (lambda t: t.pop(f"{UP}.weight"), (f"{UP}.weight' is missing",)),
    "a module without": (lambda t: [t.pop(n) for n in list(t) if "layer.1.output" in n], ("layer.1.output.dense", "1")),
    "no tensors": (lambda t: t.clear(), ("no tensor at all",)),
    "extra": (lambda t: t.update({f"{AT}.adapter.scale": torch.ones(1)}), ("no place", "adapter.scale")),
    "another layer": (lambda t: t.update(adapter("encoder.layer.7.output.dense", Draw())), ("layer.7",)),
    "another width": (lambda t: t.update({f"{DOWN}.weight": torch.ones(5, HIDDEN)}), ("[5, 16]", "[3, 16]")),
    "another backbone": (lambda t: t.update({f"{DOWN}.weight": torch.ones(3, 24)}), ("[3, 24]", "[3, 16]")),
    "one dimension": (lambda t: t.update({f"{UP}.weight": torch.ones(48)}), ("[48]",)),
    "NaN": (lambda t: t[f"{UP}.bias"].fill_(float("nan")), ("NaN or infinite", f"{UP}.bias")),
    "infinite": (lambda t: t[f"{UP}.bias"].fill_(float("inf")), ("NaN or infinite",)),
    "whole numbers": (lambda t: t.update({f"{UP}.bias": torch.ones(HIDDEN, dtype=torch.int64)}), ("float type",)),
    "the same twice": (lambda t: t.update({f"bert.{UP}.bias": torch.ones(HIDDEN)}), ("one and the same place",)),
    "a name alone": (lambda t: t.update({"adapter": torch.ones(1)}), ("''",)),
    "an unknown module": (lambda t: t.update({"bottle.neck.weight": torch.ones(2)}), ("no place", "bottle.neck")),
}


@pytest.mark.parametrize("name", SPOILS)
def test_tensors_that_are_wrong(reading: Reading, name: str) -> None:
    change, said = SPOILS[name]
    tensors = everywhere(ENDS, "bert", adapter)
    bare = reading(Made(dict(ADAPTER), tensors, bare=True))
    assert len(bare.at) == len(ENDS["bert"])
    change(tensors)
    reading.refused(Made(dict(ADAPTER), tensors, bare=True), *said)


def headed(at: str) -> Tensors:
    return adapter(at, Draw(), word="parallel_adapter")


Told = tuple[Made, tuple[str, ...], type[DeltaserveError]]
SEQUENTIAL, ATTENDING = everywhere(ENDS, "bert", adapter), everywhere(ATTENTIONS, "bert", flat)
PAIRED = everywhere(PARALLEL, "bert", adapter, word="parallel_adapter")
CROSS = "decoder.block.0.layer.1.EncDecAttention"


def at(config: Mapping[str, Any], *modules: str) -> dict[str, Any]:
    return {**config, "modified_modules": list(modules), "common_structure": False}


BROKEN: Mapping[str, Told] = {
    "type": (Made(ADAPTER | {"delta_type": "magic"}, SEQUENTIAL), ("delta_type", "magic", "lora"), FailedPrecondition),
    "type-number": (Made(ADAPTER | {"delta_type": 5}, SEQUENTIAL), ("delta_type", "5"), FailedPrecondition),
    "another-method": (
        Made(LORA | {"modified_modules": ...}, SEQUENTIAL),
        ("'lora'", "no tensor's name"),
        BadCheckpoint,
    ),
    "unknown-key": (Made(ADAPTER | {"surprise": 1}, SEQUENTIAL), ("surprise", "does not know"), FailedPrecondition),
    "width-word": (
        Made(ADAPTER | {"bottleneck_dim": "3"}, SEQUENTIAL),
        ("bottleneck_dim", "whole number"),
        BadCheckpoint,
    ),
    "width-huge": (Made(ADAPTER | {"bottleneck_dim": 1 << 40}, SEQUENTIAL), ("bottleneck_dim", "16384"), BadCheckpoint),
    "width-0": (Made(ADAPTER | {"bottleneck_dim": 0}, SEQUENTIAL), ("bottleneck_dim", "from 1"), BadCheckpoint),
    "function": (Made(ADAPTER | {"non_linearity": "glow"}, SEQUENTIAL), ("non_linearity", "glow"), FailedPrecondition),
    "function-number": (Made(ADAPTER | {"non_linearity": 1}, SEQUENTIAL), ("non_linearity", "1"), BadCheckpoint),
    "modules": (Made(ADAPTER | {"modified_modules": 7}, SEQUENTIAL), ("modified_modules", "7"), BadCheckpoint),
    "many-modules": (
        Made(ADAPTER | {"modified_modules": ["x"] * 20_000}, SEQUENTIAL),
        ("modified_modules",),
        BadCheckpoint,
    ),
    "common-word": (Made(ADAPTER | {"common_structure": "yes"}, SEQUENTIAL), ("common_structure",), BadCheckpoint),
    "embedding": (
        Made(at(ADAPTER, "word_embeddings"), adapter("embeddings.word_embeddings", Draw())),
        ("word_embeddings", "linear layers"),
        FailedPrecondition,
    ),
    "two-layers": (Made(at(ADAPTER, "encoder"), adapter("encoder", Draw())), ("'bert.encoder'",), FailedPrecondition),
    "function-alone": (
        Made(
            at(ADAPTER, "layer.0.intermediate.intermediate_act_fn"),
            adapter("encoder.layer.0.intermediate.intermediate_act_fn", Draw()),
        ),
        ("intermediate_act_fn", "linear layers"),
        FailedPrecondition,
    ),
    "rank-2": (
        Made(LOW_RANK | {"low_rank_rank": 2}, everywhere(ENDS, "bert", low_rank)),
        ("low_rank_rank", "2", "fails"),
        FailedPrecondition,
    ),
    "nothing-left": (
        Made(LOW_RANK | {"reduction_factor": 32}, everywhere(ENDS, "bert", low_rank)),
        ("reduction_factor", "32"),
        BadCheckpoint,
    ),
    "division": (
        Made(COMPACTER | {"hypercomplex_division": 3}, everywhere(ENDS, "bert", compacter)),
        ("hypercomplex_division", "3"),
        BadCheckpoint,
    ),
    "shared-rule": (
        Made(COMPACTER | {"shared_phm_rule": True}, everywhere(ENDS, "bert", compacter)),
        ("shared_phm_rule", "refuses"),
        FailedPrecondition,
    ),
    "lost-rule": (
        Made(
            COMPACTER | {"learn_phm": False},
            {n: t for n, t in everywhere(ENDS, "bert", compacter).items() if "phm_rule" not in n},
        ),
        ("learn_phm", "at random"),
        FailedPrecondition,
    ),
    "overflow": (
        Made(dict(COMPACTER), {n: t * 1e20 for n, t in everywhere(ENDS, "bert", compacter).items()}),
        ("not in float32",),
        BadCheckpoint,
    ),
    "lora-rank": (Made(LORA | {"lora_r": 4}, everywhere(LINEARS, "bert", lora)), ("[3, 16]", "[4, 16]"), BadCheckpoint),
    "lora-alpha": (Made(LORA | {"lora_alpha": "x"}, everywhere(LINEARS, "bert", lora)), ("lora_alpha",), BadCheckpoint),
    "lora-turned": (
        Made(at(LORA, "h.0.attn.c_attn"), lora("h.0.attn.c_attn", Draw()), "gpt2"),
        ("c_attn", "no such linear"),
        BadCheckpoint,
    ),
    "odd-pairs": (Made(at(PAIRS, "attention"), PAIRED), ("modified_modules", "pairs"), BadCheckpoint),
    "no-second": (
        Made(at(PAIRS, "0.attention.self.query", "nowhere"), headed("encoder.layer.0.attention.self.query")),
        ("self.query", "nothing behind"),
        BadCheckpoint,
    ),
    "unlike-pair": (
        Made(at(PAIRS, "0.attention.self.query", "0.output.dense"), headed("encoder.layer.0.attention.self.query")),
        ("self.query", "output.dense"),
        FailedPrecondition,
    ),
    "whole-layer-pair": (
        Made(at(PAIRS, "encoder.layer.0", "encoder.layer.0"), headed("encoder.layer.0")),
        ("encoder.layer.0",),
        FailedPrecondition,
    ),
    "prefix-family": (
        Made(dict(PREFIX), flat("decoder.layers.0.self_attn", Draw()), "opt"),
        ("opt",),
        FailedPrecondition,
    ),
    "prefix-rows": (Made(PREFIX | {"prefix_token_num": 2}, ATTENDING), ("[3, 16]", "[2, 16]"), BadCheckpoint),
    "prefix-long": (Made(PREFIX | {"prefix_token_num": 32}, ATTENDING), ("32 rows", "31"), BadCheckpoint),
    "prefix-huge": (Made(PREFIX | {"prefix_token_num": 1 << 50}, ATTENDING), ("prefix_token_num",), BadCheckpoint),
    "prefix-cross": (
        Made(at(PREFIX, CROSS), flat(CROSS, Draw()), "t5"),
        ("EncDecAttention", "no self-att"),
        BadCheckpoint,
    ),
    "prefix-where": (
        Made(at(PREFIX, "pooler"), flat("pooler", Draw())),
        ("pooler", "no self-attention"),
        BadCheckpoint,
    ),
    "prefix-some": (
        Made(dict(PREFIX), {n: t for n, t in ATTENDING.items() if "layer.1" in n}),
        ("means 2", "1 others"),
        BadCheckpoint,
    ),
    "table-size": (
        Made(dict(PREFIX), table(ATTENTIONS["bert"][0], Draw(), 3)),
        ("control_trans.2.weight", "[96, 4]", "[64, 4]"),
        BadCheckpoint,
    ),
    "table-first": (Made(dict(PREFIX), table(ATTENTIONS["bert"][1], Draw(), 2)), ("layer.1", "first"), BadCheckpoint),
    "table-pattern": (
        Made(PREFIX | {"modified_modules": ["[r]1.attention"]}, table(ATTENTIONS["bert"][1], Draw(), 1)),
        ("never compiled", "without reparam"),
        FailedPrecondition,
    ),
    "table-twice": (Made(dict(PREFIX), table(ATTENTIONS["bert"][0], Draw(), 2) | ATTENDING), ("twice",), BadCheckpoint),
    "prompt-rows": (
        Made(PROMPT | {"soft_token_num": 4}, {"soft_prompt_layer.soft_embeds": torch.ones(3, HIDDEN)}),
        ("[3, 16]", "[4, 16]"),
        BadCheckpoint,
    ),
    "prompt-where": (
        Made(dict(PROMPT), {"encoder.soft_prompt_layer.soft_embeds": torch.ones(3, HIDDEN)}),
        ("encoder", "before a model's input"),
        BadCheckpoint,
    ),
    "prompt-expand": (
        Made(
            PROMPT | {"other_expand_ids": {"token_type_ids": 1}},
            {"soft_prompt_layer.soft_embeds": torch.ones(3, HIDDEN)},
        ),
        ("other_expand_ids",),
        FailedPrecondition,
    ),
    "no-rows-beside": (
        Made(dict(ADAPTER), SEQUENTIAL | {"soft_prompt_layer.soft_embeds": torch.ones(0, HIDDEN)}),
        ("0 rows",),
        BadCheckpoint,
    ),
    "bitfit-where": (
        Made(at(BITFIT, "nowhere"), {"embeddings.word_embeddings.bitfit.bias": torch.ones(HIDDEN)}),
        ("word_embeddings", "no linear"),
        BadCheckpoint,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named(reading: Reading, name: str) -> None:
    made, said, error = BROKEN[name]
    reading.refused(made, *said, error=error)


def test_a_bias_that_is_missing(reading: Reading) -> None:
    tensors = biases(reading.backbones["bert"])
    name = "encoder.layer.1.attention.self.key.bias"
    del tensors[name]
    reading.refused(Made(dict(BITFIT), tensors), name, "missing")


def test_an_empty_checkpoint_says_why(reading: Reading) -> None:
    """The library writes one where its names match nothing: LoRA's in GPT-2."""
    reading.refused(Made(dict(LORA), {}, "gpt2"), "no tensor at all", "LoRA do in GPT-2")


@pytest.mark.parametrize("pickled", [True, False])
def test_a_truncated_file(reading: Reading, tmp_path: Path, pickled: bool) -> None:
    folder = Made(dict(ADAPTER), SEQUENTIAL, pickled=pickled).write(tmp_path / "cut")
    file = folder / ("pytorch_model.bin" if pickled else "model.safetensors")
    file.write_bytes(file.read_bytes()[:-50])
    backbone = reading.backbones["bert"]
    with pytest.raises(BadCheckpoint, match=file.name):
        read(folder, backbone.spec, backbone.weights, allow_pickle=True)


def test_sizes_that_a_file_does_not_have(reading: Reading, tmp_path: Path) -> None:
    folder = Made(dict(ADAPTER), SEQUENTIAL).write(tmp_path / "huge")
    file = folder / "model.safetensors"
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    for entry in header.values():
        if "shape" in entry:
            entry["shape"][0] = 1 << 40
    told = json.dumps(header).encode()
    file.write_bytes(len(told).to_bytes(8, "little") + told + content[8 + size :])
    backbone = reading.backbones["bert"]
    with pytest.raises(BadCheckpoint, match=r"model\.safetensors"):
        read(folder, backbone.spec, backbone.weights)
    (folder / "config.json").write_text("{" + " " * (2 << 20) + "}")
    with pytest.raises(BadCheckpoint, match=r"config\.json.*bytes"):
        read(folder, backbone.spec, backbone.weights)
    (folder / "config.json").write_text("{")
    with pytest.raises(BadCheckpoint, match="not JSON"):
        read(folder, backbone.spec, backbone.weights)


def test_a_changed_file_has_another_hash(tmp_path: Path) -> None:
    one = Made(dict(ADAPTER), SEQUENTIAL).write(tmp_path / "one")
    two = Made(ADAPTER | {"non_linearity": "relu"}, SEQUENTIAL).write(tmp_path / "two")
    assert content_hash(one) != content_hash(two)
