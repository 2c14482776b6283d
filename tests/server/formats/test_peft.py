"""What a lowered checkpoint says of itself; that its numbers are right, tests/parity shows."""

import json
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import peft
import pytest
import torch

from deltaserve.backbone.model import Backbone
from deltaserve.deltas.primitives import Dense, LowRank, Prefix
from deltaserve.deltas.sites import Pooling, Task
from deltaserve.formats.registry import KINDS, Wanted, content_hash, read


@pytest.fixture
def reading(backbones: Mapping[str, Backbone]) -> Callable[..., Any]:
    def do(family: str, spoilt: Any, wanted: Wanted = Wanted()) -> Any:  # noqa: B008
        backbone = backbones[family]
        return read(spoilt.folder, backbone.spec, backbone.weights, wanted)

    return do


def lora(**told: Any) -> Any:
    return peft.LoraConfig(**({"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["c_attn"]} | told))


def classifier(written: Any, **told: Any) -> Any:
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    return written("bert", config, auto="AutoModelForSequenceClassification", **({"num_labels": 3} | told))


def test_what_is_reported(written: Any, reading: Any) -> None:
    spoilt = written("gpt2", lora())
    delta = reading("gpt2", spoilt)
    assert delta.kinds == ("lora",)
    assert set(delta.at) == {f"transformer.h.{layer}.attn.c_attn" for layer in range(2)}
    assert delta.parameters == 2 * (2 * 16 + 48 * 2)
    assert delta.task is Task.GENERATION
    made = delta.provenance
    assert (made.format, made.tensors_matched, made.guessed) == ("peft", 4, ())
    assert made.content_hash == content_hash(spoilt.folder)
    assert made.file_bytes == (spoilt.folder / "adapter_model.safetensors").stat().st_size
    assert made.warnings == ()


def test_kinds_are_those_of_the_release(written: Any, reading: Any) -> None:
    spoilt = written("gpt2", lora(bias="all", modules_to_save=["lm_head"]))
    kinds = reading("gpt2", spoilt).kinds
    assert kinds == ("lora", "bias", "selective-module")
    assert set(kinds) <= set(KINDS)


def test_entry_that_matches_nothing_is_a_warning(written: Any, reading: Any) -> None:
    spoilt = written("gpt2", lora())
    spoilt.config(target_modules=["c_attn", "q_proj"])
    assert reading("gpt2", spoilt).provenance.warnings == ("target_modules entry 'q_proj' matches no module here",)


def test_another_backbone_is_a_warning(written: Any, reading: Any) -> None:
    spoilt = written("gpt2", lora())
    spoilt.config(base_model_name_or_path="someone/gpt2-large")
    (warning,) = reading("gpt2", spoilt).provenance.warnings
    assert "someone/gpt2-large" in warning


def test_fresh_start_is_a_warning(written: Any, reading: Any) -> None:
    spoilt = written("gpt2", lora())
    spoilt.tensors(lambda tensors: [t.zero_() for name, t in tensors.items() if "lora_B" in name])
    assert "changes nothing" in reading("gpt2", spoilt).provenance.warnings[0]


def test_bare_base_model(written: Any, reading: Any) -> None:
    """A checkpoint of GPT2Model has no `transformer.` in its names."""
    spoilt = written("gpt2", lora(task_type="FEATURE_EXTRACTION"), auto="AutoModel")
    delta = reading("gpt2", spoilt)
    assert delta.task is Task.EMBEDDING
    assert set(delta.at) == {f"transformer.h.{layer}.attn.c_attn" for layer in range(2)}


def test_labels_are_guessed_and_said_so(written: Any, reading: Any) -> None:
    delta = reading("bert", classifier(written))
    assert delta.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert delta.problem_type == "single_label_classification"
    assert delta.provenance.guessed == ("labels", "problem_type")
    assert delta.pooling is Pooling.POOLER


def test_labels_of_the_model_config(written: Any, reading: Any) -> None:
    spoilt = classifier(written)
    names = {"0": "bad", "1": "so-so", "2": "good"}
    told = {"id2label": names, "problem_type": "multi_label_classification"}
    (spoilt.folder / "config.json").write_text(json.dumps(told))
    delta = reading("bert", spoilt)
    assert delta.labels == ("bad", "so-so", "good")
    assert delta.problem_type == "multi_label_classification"
    assert delta.provenance.guessed == ()


def test_what_the_operator_says_wins(written: Any, reading: Any) -> None:
    wanted = Wanted(labels=("a", "b", "c"), problem_type="multi_label_classification")
    delta = reading("bert", classifier(written), wanted)
    assert (delta.labels, delta.problem_type) == (wanted.labels, wanted.problem_type)
    assert delta.provenance.guessed == ()


def test_one_output_is_a_regression(written: Any, reading: Any) -> None:
    assert reading("bert", classifier(written, num_labels=1)).problem_type == "regression"


def test_task_left_open_is_guessed(written: Any, reading: Any) -> None:
    spoilt = classifier(written)
    spoilt.config(task_type=None)
    delta = reading("bert", spoilt)
    assert delta.task is Task.SEQUENCE_CLASSIFICATION
    assert "task" in delta.provenance.guessed


def test_head_left_out_on_purpose(written: Any, reading: Any) -> None:
    delta = reading("bert", classifier(written), Wanted(task=Task.EMBEDDING))
    assert delta.head is None
    assert "left out" in delta.provenance.warnings[0]


def test_head_of_a_prompted_decoder_reads_the_last_row(written: Any, reading: Any) -> None:
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    delta = reading("gpt2", written("gpt2", config, auto="AutoModelForSequenceClassification"))
    assert delta.pooling is Pooling.LAST
    assert delta.prompt_length == 3


def test_same_lm_head_is_not_stored(written: Any, reading: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spoilt = written("gpt2", lora(target_modules=["lm_head"]))
    (only,) = reading("gpt2", spoilt).at["lm_head"]
    assert isinstance(only, LowRank)


def test_another_lm_head_is_this_deltas_own(written: Any, reading: Any) -> None:
    spoilt = written("gpt2", lora(target_modules=["lm_head"]))
    name = "base_model.model.lm_head.base_layer.weight"
    spoilt.tensors(lambda tensors: tensors[name].add_(1))
    delta = reading("gpt2", spoilt)
    assert {type(p) for p in delta.at["lm_head"]} == {LowRank, Dense}
    assert "differs from the backbone's" in delta.provenance.warnings[0]


def test_prefix_slots_of_an_encoder_decoder(written: Any, reading: Any) -> None:
    """PEFT hands layer l of the decoder the slot 2 l mod L: with two layers both read slot 0."""
    spoilt = written("t5", peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3))
    delta = reading("t5", spoilt)
    first, second = (delta.at[f"decoder.block.{layer}.layer.0.SelfAttention"][0] for layer in range(2))
    assert isinstance(first, Prefix) and isinstance(second, Prefix)
    assert torch.equal(first.keys, second.keys)
    assert (first.pre, first.tok, delta.position_shift) == (-3, 0, 0)


def test_prefix_moves_the_positions_of_a_decoder(written: Any, reading: Any) -> None:
    spoilt = written("gpt2", peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert reading("gpt2", spoilt).position_shift == 3


def test_dtype_of_the_file_is_kept(written: Any, reading: Any) -> None:
    spoilt = written("gpt2", lora())
    spoilt.tensors(lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items()}))
    assert {t.dtype for t in reading("gpt2", spoilt).tensors()} == {torch.bfloat16}
