"""What some types take from elsewhere than the checkpoint: wavelets, the order of weights, embeddings."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import peft
import pytest
import torch

from deltaserve.backbone.model import Backbone
from deltaserve.deltas.sites import Weights
from deltaserve.errors import BadCheckpoint, FailedPrecondition
from deltaserve.formats.peft.wavelets import FILTERS
from deltaserve.formats.registry import read


@pytest.mark.parametrize("name", [name for name in FILTERS if name != "coif4"])
def test_wavelet_keeps_lengths(name: str) -> None:
    """Σ h = √2, and h is orthogonal to itself moved by two; PEFT's coif4 is not, and is what PEFT computes with."""
    low = torch.tensor(FILTERS[name], dtype=torch.float64)
    assert float(low.sum()) == pytest.approx(2**0.5, abs=1e-10)
    for moved in range(0, low.shape[0], 2):
        product = float((low[moved:] * low[: low.shape[0] - moved]).sum())
        assert product == pytest.approx(float(moved == 0), abs=1e-10)


@pytest.fixture
def backbone(backbones: Mapping[str, Backbone]) -> Backbone:
    return backbones["bert"]


@pytest.fixture
def reading(backbone: Backbone) -> Callable[..., Any]:
    def do(spoilt: Any, weights: Weights = backbone.weights) -> Any:
        return read(spoilt.folder, backbone.spec, weights)

    return do


def supertuning(written: Any, **told: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return written("bert", peft.SupertuningConfig(target_modules=["query", "value"], sparsity=0.1, **told))


def test_supertuning_without_places_has_as_many_numbers_as_its_sparsity_says(written: Any, reading: Any) -> None:
    spoilt = supertuning(written)
    spoilt.tensors(lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith("indices")])
    with pytest.raises(BadCheckpoint, match="supertuning_indices' is missing"):
        reading(spoilt)
    spoilt.config(save_precomputed_indices=False)
    assert reading(spoilt).kinds == ("supertuning",)
    spoilt.config(sparsity=0.999_999)
    with pytest.raises(BadCheckpoint, match="sparsity says 0"):
        reading(spoilt)
    spoilt.config(sparsity=0.2)
    with pytest.raises(BadCheckpoint, match=r"supertuning_values has \d+ numbers; sparsity says \d+"):
        reading(spoilt)


def test_supertuning_of_equal_weights(written: Any, reading: Any, backbone: Backbone) -> None:
    """The order of equal weights is the device's: said where they are few, refused where they are many."""
    spoilt = supertuning(written, save_precomputed_indices=False)

    def few(name: str) -> torch.Tensor:
        weight = backbone.weights(name).clone()
        weight.view(-1)[weight.abs().argmax()] = -weight.abs().flatten().topk(2).values[1]
        return weight

    assert reading(spoilt).provenance.warnings == ()
    told = reading(spoilt, few).provenance.warnings
    assert told and all("2 of the 230 weights" in warning for warning in told)
    with pytest.raises(FailedPrecondition, match=r"'save_precomputed_indices' is False: 2\d\d of the 230") as raised:
        reading(spoilt, lambda name: (backbone.weights(name) * 100).round() / 100)
    assert raised.value.metadata["key"] == "save_precomputed_indices"


EMBEDDED: Mapping[str, tuple[Callable[..., Any], str]] = {
    "hira": (lambda **told: peft.HiraConfig(r=2, **told), "hira_embedding_A"),
    "oft": (lambda **told: peft.OFTConfig(oft_block_size=4, r=0, **told), "oft_embedding_R.weight"),
    "tinylora": (lambda **told: peft.TinyLoraConfig(r=2, u=4, **told), "tinylora_A"),
}


@pytest.mark.parametrize("kind", EMBEDDED)
def test_embedding_is_checked_like_a_linear(kind: str, written: Any, reading: Any) -> None:
    make, part = EMBEDDED[kind]
    spoilt = written("bert", make(target_modules=["query", "word_embeddings"]))
    name = f"base_model.model.embeddings.word_embeddings.{part}"
    assert "bert.embeddings.word_embeddings" in reading(spoilt).at
    spoilt.tensors(lambda tensors: tensors.update({name: tensors[name].repeat(2, 1)}))
    with pytest.raises(BadCheckpoint, match=part):
        reading(spoilt)
    spoilt.tensors(lambda tensors: tensors.pop(name))
    with pytest.raises(BadCheckpoint, match=part):
        reading(spoilt)
