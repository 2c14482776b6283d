"""The backbone's own tensors in OpenDelta's checkpoints: what is as in the backbone is dropped, the rest is kept."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from opendeltas import ADAPTER, ENDS, HIDDEN, START, Draw, Made, Reading, Tensors, adapter, everywhere, only

from deltaserve.backbone.model import Backbone
from deltaserve.deltas.delta import Delta
from deltaserve.deltas.primitives import Affine, Dense, Rows
from deltaserve.errors import BadCheckpoint, FailedPrecondition
from deltaserve.formats.registry import read


@pytest.fixture
def reading(backbones: Mapping[str, Backbone], tmp_path: Path) -> Reading:
    return Reading(backbones, tmp_path)


def whole(backbone: Backbone) -> Tensors:
    """The state of transformers' own model, as one that was never frozen is saved."""
    start = f"{backbone.spec.prefix}." if backbone.spec.family == "bert" else ""
    return {start + name: tensor.detach().clone() for name, tensor in backbone.model.state_dict().items()}


def beside(reading: Reading, family: str, **told: Any) -> Made:
    made = Made(dict(ADAPTER), everywhere(ENDS, family, adapter), family, **told)
    made.whole = whole(reading.backbones[family])
    return made


def parts(delta: Delta) -> dict[str, Any]:
    """What acts beside the adapters."""
    found = {site: [p for p in delta.at[site] if isinstance(p, Dense | Affine | Rows)] for site in delta.at}
    return {site: held[0] for site, held in found.items() if held}


@pytest.mark.parametrize("family", START)
def test_what_is_as_in_the_backbone_is_dropped(reading: Reading, family: str) -> None:
    made = beside(reading, family)
    delta = reading(made)
    assert delta.kinds == ("adapter",) and not parts(delta) and len(delta.at) == len(ENDS[family])
    (warning,) = delta.provenance.warnings
    assert warning == f"{len(made.whole)} of its tensors equal the backbone's and are left out"


def test_one_that_is_served_in_fewer_bits(reading: Reading) -> None:
    """What was saved before the backbone was rounded is the backbone's all the same; a changed one is not."""
    made = beside(reading, "bert")
    backbone, spec = reading.backbones["bert"], reading.backbones["bert"].spec

    def rounded(name: str) -> torch.Tensor:
        return backbone.weights(name).bfloat16().float()

    made.whole = {name: tensor for name, tensor in made.whole.items() if name.endswith("dense.weight")}
    assert read(made.write(reading.folder / "rounded"), spec, rounded).kinds == ("adapter",)
    name = "bert.encoder.layer.0.output.dense.weight"
    made.whole[name] = made.whole[name] + 0.1
    assert list(parts(read(made.write(reading.folder / "changed"), spec, rounded))) == [name.removesuffix(".weight")]


CHANGED: Mapping[str, tuple[str, str]] = {
    "a linear": ("bert", "bert.encoder.layer.1.output.dense"),
    "a linear stored turned": ("gpt2", "transformer.h.1.mlp.c_fc"),
    "a linear without a bias": ("t5", "decoder.block.0.layer.1.EncDecAttention.q"),
    "a norm": ("bert", "bert.encoder.layer.0.output.LayerNorm"),
    "a norm without a bias": ("t5", "encoder.final_layer_norm"),
    "positions": ("bert", "bert.embeddings.position_embeddings"),
    "a pooler": ("bert", "bert.pooler.dense"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_what_differs_is_kept_whole(reading: Reading, name: str) -> None:
    family, site = CHANGED[name]
    made = beside(reading, family)
    backbone, turned = reading.backbones[family], name == "a linear stored turned"
    shape = backbone.weights(site).shape
    made.whole[f"{site}.weight"] = Draw()(*(shape[::-1] if turned else shape))
    delta = reading(made)
    ((found, part),) = parts(delta).items()
    bias = backbone.spec.sites[site].bias
    assert found == site and part.replace and "selective-module" in delta.kinds
    weight = part.scale if isinstance(part, Affine) else part.weight
    saved = made.whole[f"{site}.weight"]
    assert torch.equal(weight, saved.T if turned else saved)
    held = part.shift if isinstance(part, Affine) else part.bias
    assert (held is None) == (bias is None) and (bias is None or torch.equal(held, bias))
    assert any("1 modules have weights of their own" in warning for warning in delta.provenance.warnings)


def test_a_bias_alone_is_a_difference(reading: Reading) -> None:
    made = beside(reading, "bert")
    site = "bert.encoder.layer.0.attention.self.query"
    made.whole[f"{site}.bias"] += 1
    delta = reading(made)
    assert delta.kinds == ("adapter", "bias")
    shift = only(delta, site).shift
    assert torch.equal(shift, made.whole[f"{site}.bias"] - reading.backbones["bert"].spec.sites[site].bias)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_an_embedding_takes_what_is_tied_along(reading: Reading, family: str) -> None:
    """Few rows are Rows, many a table of its own; either way all that have this weight get it."""
    backbone = reading.backbones[family]
    sites = {backbone.spec.input_embedding, *backbone.spec.tied}
    names = [name for name in whole(backbone) if name.rpartition(".")[2] == "weight" and name.split(".")[-2] in
             ("wte", "lm_head", "shared", "embed_tokens")]  # fmt: skip
    assert len(sites) == len(names) == (2 if family == "gpt2" else 4)
    few = beside(reading, family)
    for name in names:
        few.whole[name][[3, 7]] += 1
    found = parts(reading(few))
    assert set(found) == sites
    for part in found.values():
        assert isinstance(part, Rows) and part.index.tolist() == [3, 7]
        assert torch.equal(part.values, few.whole[names[0]][[3, 7]])
    many = beside(reading, family)
    for name in names:
        many.whole[name] += 1
    delta = reading(many)
    assert set(parts(delta)) == sites and len(delta.bases) == 1, "it is stored once"
    assert all(torch.equal(part.weight, many.whole[names[0]]) for part in parts(delta).values())
    one = beside(reading, family)
    one.whole = {names[-1]: few.whole[names[0]]}
    assert set(parts(reading(one))) == sites, "a file need not have the same weight under each name"
    many.whole[names[0]] -= 1
    reading.refused(many, "in this backbone they are one")


def test_heads_for_masked_words_are_left_out(reading: Reading) -> None:
    made = beside(reading, "bert")
    made.whole |= {"cls.predictions.decoder.weight": torch.ones(40, HIDDEN), "cls.predictions.bias": torch.ones(40)}
    made.whole["bert.embeddings.position_ids"] = torch.arange(32)[None]
    delta = reading(made)
    assert any("2 tensors of a head for masked words" in warning for warning in delta.provenance.warnings)
    assert not parts(delta)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("t5", "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        ("opt", "model.decoder.embed_positions.weight"),
    ],
)
def test_what_no_delta_can_change(reading: Reading, family: str, name: str) -> None:
    made = beside(reading, family)
    made.whole[name] += 1
    reading.refused(made, name.removesuffix(".weight"), "cannot change", error=FailedPrecondition)


def test_nothing_but_the_backbone(reading: Reading) -> None:
    made = Made({"delta_type": "bitfit"}, {}, whole=whole(reading.backbones["bert"]))
    reading.refused(made, "nothing but what is in the backbone")
    made.whole = {name: tensor for name, tensor in made.whole.items() if "layer.1.output.dense.bias" not in name}
    reading.refused(made, "layer.1.output.dense.bias", "missing", error=BadCheckpoint)
