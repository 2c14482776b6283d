"""Modules that have the input embedding's weight: what is tuned together, and what must be the same then."""

from collections.abc import Callable, Mapping
from typing import Any

import peft
import pytest

from deltaserve.backbone.model import Backbone
from deltaserve.errors import BadCheckpoint, FailedPrecondition
from deltaserve.formats.registry import read

HEAD = r"(.*\.)?lm_head|.*c_attn"


def lora(**told: Any) -> Any:
    return peft.LoraConfig(**({"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["c_attn"]} | told))


@pytest.fixture
def reading(backbones: Mapping[str, Backbone]) -> Callable[[Any], Any]:
    backbone = backbones["gpt2"]
    return lambda spoilt: read(spoilt.folder, backbone.spec, backbone.weights)


def tied(**told: Any) -> Any:
    return lora(ensure_weight_tying=True, **told)


def test_lora_of_what_is_tied_is_the_embeddings(written: Any, reading: Any) -> None:
    spoilt = written("gpt2", tied(target_modules=HEAD))
    assert {"lm_head", "transformer.wte"} <= set(reading(spoilt).at)
    name = "base_model.model.lm_head.lora_A.weight"
    spoilt.tensors(lambda tensors: tensors[name].add_(1))
    with pytest.raises(BadCheckpoint, match=r"the LoRA of 'lm_head' is not that of 'transformer\.wte'"):
        reading(spoilt)
    spoilt.tensors(lambda tensors: tensors.pop(name))
    with pytest.raises(BadCheckpoint, match=r"lm_head\.lora_A\.weight' is missing"):
        reading(spoilt)


def test_tie_that_peft_forgets(written: Any, reading: Any) -> None:
    """PEFT rewrites a list of targets to the embedding's name, and by `wte` it does not know the tie again."""
    spoilt = written("gpt2", tied(target_modules=["c_attn", "lm_head"]))
    with pytest.raises(
        FailedPrecondition, match=r"'ensure_weight_tying' is True: PEFT itself loses .*'lm_head'"
    ) as told:
        reading(spoilt)
    assert told.value.metadata["key"] == "ensure_weight_tying"


def test_saved_weight_of_what_is_tied_is_the_embeddings(written: Any, reading: Any) -> None:
    spoilt = written("gpt2", tied(modules_to_save=["lm_head"]))
    found = reading(spoilt).at
    assert found["lm_head"][0].weight is found["transformer.wte"][0].weight
    spoilt.tensors(lambda tensors: tensors["base_model.model.lm_head.weight"].add_(1))
    with pytest.raises(BadCheckpoint, match=r"the weight of 'lm_head' is not that of 'transformer\.wte'"):
        reading(spoilt)


def test_weight_below_a_tied_lora_is_one(written: Any, reading: Any) -> None:
    """A weight of the delta's own below lm_head is what the embedding looks up too."""
    spoilt = written("gpt2", lora(target_modules=["c_attn", "lm_head"]))
    name = "base_model.model.lm_head.base_layer.weight"
    spoilt.tensors(lambda tensors: tensors[name].add_(1))
    found = reading(spoilt)
    assert found.at["transformer.wte"][0].weight is found.at["lm_head"][0].weight
    assert any("lm_head.base_layer.weight differs" in warning for warning in found.provenance.warnings)
    spoilt = written("gpt2", tied(target_modules=HEAD))
    spoilt.tensors(lambda tensors: tensors[name].add_(1))
    with pytest.raises(BadCheckpoint, match="'lm_head' brings another weight than what is tied to it"):
        reading(spoilt)


def test_rows_for_the_vocabulary_linear(written: Any, reading: Any) -> None:
    """One list for both leaves the embedding's rows alone in the file; two lists are two sets of rows."""
    spoilt = written("gpt2", lora(trainable_token_indices={"wte": [3, 4], "lm_head": [3, 4]}))
    assert {"lm_head", "transformer.wte"} <= set(reading(spoilt).at)
    spoilt.config(trainable_token_indices={"wte": [3, 4], "lm_head": [4, 3]})
    with pytest.raises(BadCheckpoint, match="names 'lm_head'; the checkpoint has no rows for it"):
        reading(spoilt)
    spoilt.config(trainable_token_indices={"lm_head": [3, 4]})
    with pytest.raises(BadCheckpoint, match="names 'lm_head'; the checkpoint has no rows for it"):
        reading(spoilt)
