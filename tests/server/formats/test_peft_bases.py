"""What is frozen is a base: deltas that were trained apart have the same, and only what was learned is their own."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import peft
import pytest
import torch

from deltaserve.backbone.model import Backbone
from deltaserve.deltas.delta import Delta
from deltaserve.deltas.primitives import LowRank
from deltaserve.errors import BadCheckpoint
from deltaserve.formats.registry import read


def tuner(word: str, **told: Any) -> Callable[[], Any]:
    modules = {"target_modules": ["query", "intermediate.dense"]}

    def make() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return getattr(peft, f"{word}Config")(**(modules | told))

    return make


SHARING: Mapping[str, Callable[[], Any]] = {
    "vera": tuner("Vera", r=12),
    "vera-drawn": tuner("Vera", r=12, save_projection=False, projection_prng_key=5),
    "pvera": tuner("Pvera", r=12),
    "tinylora": tuner("TinyLora", r=3, u=8),
    "tinylora-drawn": tuner("TinyLora", r=3, u=8, save_projection=False),
    "psoft": tuner("Psoft", r=5),
    "psoft-pissa": tuner("Psoft", r=5, ab_svd_init="pissa_init"),
    "miss": tuner("Miss", r=4),
    "miss-mini": tuner("Miss", r=4, mini_r=4, init_weights="mini", target_modules=["query", "value"]),
    "glora-vector": tuner("Glora", r=2, config_A_B="vector"),
}
FROZEN = ("vera_A", "vera_B", "tinylora_A", "tinylora_B", "tinylora_P", "base_layer")


def again(tensors: dict[str, torch.Tensor]) -> None:
    """Other numbers for all that is trained."""
    for name, tensor in tensors.items():
        if not any(word in name for word in FROZEN):
            tensor.mul_(0.5)


def pairs(delta: Delta) -> list[LowRank]:
    return [one for primitives in delta.at.values() for one in primitives if isinstance(one, LowRank)]


@pytest.mark.parametrize("name", SHARING)
def test_what_is_frozen_is_shared(name: str, written: Any, backbones: Mapping[str, Backbone]) -> None:
    backbone, spoilt = backbones["bert"], written("bert", SHARING[name]())
    first = read(spoilt.folder, backbone.spec, backbone.weights)
    spoilt.tensors(again)
    second = read(spoilt.folder, backbone.spec, backbone.weights)
    assert first.bases and first.bases.keys() == second.bases.keys()
    assert not any(torch.equal(a, b) for a, b in zip(first.tensors(), second.tensors(), strict=True))
    assert len(pairs(first)) == 4
    for one in pairs(first):
        assert first.owners.base_of(one.a) is not None and one.a.stride(-1) == 1
        assert (first.owners.base_of(one.b) is not None) is (one.inner is not None)
        assert one.inner is None or first.owners.base_of(one.inner) is None


@pytest.mark.parametrize("name", ["vera", "pvera", "tinylora", "psoft"])
def test_its_own_bytes_are_those_of_what_was_learned(
    name: str, written: Any, backbones: Mapping[str, Backbone]
) -> None:
    backbone, spoilt = backbones["bert"], written("bert", SHARING[name]())
    delta = read(spoilt.folder, backbone.spec, backbone.weights)
    rank = pairs(delta)[0].a.shape[0]
    each = {"vera": rank * 4 + 41 * 2, "pvera": rank * 4 + 41 * 2, "tinylora": 4 * rank**2, "psoft": 4 * rank**2}
    assert delta.parameters == each[name], "two layers, 16 and 25 outputs"
    shapes = {tuple(base.shape) for base in delta.bases.values()}
    assert shapes == ({(rank, 16), (25, rank)} if "vera" in name else {(rank, 16), (16, rank), (25, rank)})


def test_saved_and_drawn_projections_are_one_base(written: Any, backbones: Mapping[str, Backbone]) -> None:
    backbone = backbones["bert"]
    found = [
        read(written("bert", made()).folder, backbone.spec, backbone.weights).bases.keys()
        for made in (
            tuner("Vera", r=7, projection_prng_key=5),
            tuner("Vera", r=7, projection_prng_key=5, save_projection=False),
            tuner("Vera", r=7, projection_prng_key=6),
            tuner("Vera", r=8, projection_prng_key=5),
        )
    ]
    assert found[0] == found[1] and len(set().union(*found)) == 6


@pytest.mark.parametrize("part", ["vera_lambda_b", "vera_lambda_d"])
def test_a_scale_that_makes_a_base_overflow(part: str, written: Any, backbones: Mapping[str, Backbone]) -> None:
    backbone, spoilt = backbones["bert"], written("bert", tuner("Vera", r=3)())
    matrix = "base_model.vera_B" if part.endswith("b") else "base_model.vera_A"

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[matrix].mul_(100)
        for name in tensors:
            if name.endswith(part):
                tensors[name].fill_(3e37)

    spoilt.tensors(spoil)
    with pytest.raises(BadCheckpoint, match="what they come to is not in float32"):
        read(spoilt.folder, backbone.spec, backbone.weights)


def test_halves_are_stored_as_halves(written: Any, backbones: Mapping[str, Backbone]) -> None:
    backbone, spoilt = backbones["bert"], written("bert", tuner("Vera", r=12)())
    whole = read(spoilt.folder, backbone.spec, backbone.weights)
    spoilt.tensors(lambda tensors: tensors.update({name: t.to(torch.bfloat16) for name, t in tensors.items()}))
    half = read(spoilt.folder, backbone.spec, backbone.weights)
    assert (half.nbytes, half.shared_bytes) == (whole.nbytes / 2, whole.shared_bytes / 2)
    assert not half.bases.keys() & whole.bases.keys()
