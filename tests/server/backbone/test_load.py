"""What is loaded as a backbone, and what is refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    BertConfig,
    BertForMaskedLM,
    ModernBertForSequenceClassification,
    ModernBertModel,
)

from deltaserve.backbone.load import load
from deltaserve.deltas.sites import Axis, Pooling, SiteType, Task
from deltaserve.errors import FailedPrecondition

Tiny = Callable[[str], Path]


@pytest.fixture
def copied(tiny: Tiny, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a tiny backbone's folder, to be damaged."""
    return lambda name: Path(shutil.copytree(tiny(name), tmp_path / name))


def change_config(folder: Path, **changed: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def refusal(folder: Path) -> FailedPrecondition:
    with pytest.raises(FailedPrecondition) as caught:
        load(str(folder), dtype="float32", device="cpu")
    assert str(folder) in caught.value.message
    return caught.value


def test_a_family_that_is_not_served_is_refused_with_the_list(copied):
    folder = copied("gpt2")
    change_config(folder, model_type="bloom")
    error = refusal(folder)
    assert error.reason == "BACKBONE_NOT_SERVED"
    assert all(word in error.message for word in ("bloom", "bert", "gpt2", "llama", "t5"))


def test_a_folder_that_is_not_there(tmp_path):
    assert refusal(tmp_path / "nowhere").reason == "BACKBONE_NOT_FOUND"


def test_pickled_weights_are_not_read(copied):
    folder = copied("llama")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert refusal(folder).reason == "BACKBONE_NOT_LOADED"


@pytest.mark.parametrize("name", ["t5", "t5-gated", "bert", "modernbert", "gpt2", "llama", "llama-tied"])
def test_missing_weights_are_named(name, copied):
    folder = copied(name)
    tensors = load_file(folder / "model.safetensors")
    attention = ("q.weight", "query.weight", "Wqkv.weight", "c_attn.weight", "q_proj.weight")
    lost = next(key for key in tensors if key.endswith(attention))
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    error = refusal(folder)
    assert error.reason == "BACKBONE_NOT_LOADED" and lost in error.message


def test_weights_of_another_shape_are_refused(copied):
    folder = copied("llama")
    change_config(folder, intermediate_size=40)
    assert refusal(folder).reason == "BACKBONE_NOT_LOADED"


def test_a_truncated_file_is_refused(copied):
    folder = copied("llama")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert refusal(folder).reason == "BACKBONE_NOT_LOADED"


def test_angles_that_depend_on_the_batch_are_refused(copied):
    folder = copied("llama")
    change_config(folder, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    assert "dynamic" in refusal(folder).message


def test_angles_of_one_kind_of_layer_count_too(copied):
    folder = copied("llama")
    layers = {"full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}
    layers["sliding_attention"] = {"rope_type": "default", "rope_theta": 10000.0}
    change_config(folder, model_type="gemma3_text", rope_parameters=layers)
    assert "dynamic" in refusal(folder).message


def test_a_gemma_that_attends_both_ways_is_refused(copied):
    folder = copied("llama")
    change_config(folder, model_type="gemma3_text", use_bidirectional_attention=True)
    assert "use_bidirectional_attention" in refusal(folder).message


def test_a_causal_bert_is_refused(copied):
    folder = copied("bert")
    change_config(folder, is_decoder=True)
    assert "is_decoder" in refusal(folder).message


def test_a_checkpoint_without_a_pooler_serves_no_sequence_classification(tmp_path):
    config = dict(vocab_size=101, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertForMaskedLM(BertConfig(**config)).save_pretrained(tmp_path)
    spec = load(str(tmp_path), dtype="float32", device="cpu").spec
    assert set(spec.heads) == {Task.TOKEN_CLASSIFICATION, Task.QUESTION_ANSWERING}
    assert not any("pooler" in name for name in spec.sites)


def test_a_modernbert_without_its_head_embeds_and_classifies_nothing(tiny, tmp_path, caplog):
    ModernBertModel(AutoConfig.from_pretrained(tiny("modernbert"))).save_pretrained(tmp_path)
    spec = load(str(tmp_path), dtype="float32", device="cpu").spec
    assert not spec.heads and "model.layers.0.attn.Wqkv" in spec.sites
    assert not any(name.startswith("head") for name in spec.sites)
    assert "no head: deltas for sequence_classification" in caplog.text and "multiple_choice" in caplog.text


@pytest.mark.parametrize("kind", ["modernbert", "modernbert-mean"])
def test_a_modernbert_classifier_is_a_backbone_too(kind, tiny, tmp_path):
    """Its `head` is the backbone's; its own classifier, like a masked language model's decoder, is not."""
    ModernBertForSequenceClassification(AutoConfig.from_pretrained(tiny(kind))).save_pretrained(tmp_path)
    backbone = load(str(tmp_path), dtype="float32", device="cpu")
    whole = Pooling.POOLER if kind == "modernbert" else Pooling.POOLER_MEAN
    assert {task: head.pooling for task, head in backbone.spec.heads.items()} == {
        Task.SEQUENCE_CLASSIFICATION: whole,
        Task.TOKEN_CLASSIFICATION: Pooling.POOLER_TOKENS,
        Task.QUESTION_ANSWERING: Pooling.POOLER_TOKENS,
        Task.MULTIPLE_CHOICE: whole,
    }
    assert not any("decoder" in name or "classifier" in name for name in backbone.spec.modules)
    assert torch.equal(backbone.weights("head.dense"), load_file(tmp_path / "model.safetensors")["head.dense.weight"])


@pytest.mark.parametrize("device", ["mps", "bogus", "cpu:3", "cuda:999", "cuda:x", ""])
def test_a_device_that_is_not_there(device, tiny: Tiny):
    with pytest.raises(FailedPrecondition, match="not on this machine"):
        load(str(tiny("llama")), dtype="float32", device=device)


@pytest.mark.parametrize("name", ["t5", "bert", "gpt2", "llama"])
def test_a_folder_without_a_tokenizer_serves_ids(name, tiny: Tiny):
    assert load(str(tiny(name)), dtype="float32", device="cpu").tokenizer is None


def test_a_tokenizer_of_another_folder(tiny: Tiny, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="a").save_pretrained(tmp_path)
    backbone = load(str(tiny("llama")), tokenizer=str(tmp_path), dtype="float32", device="cpu")
    assert backbone.tokenizer is not None and backbone.tokenizer("b").input_ids == [1]


@pytest.mark.parametrize(
    ("name", "site", "type_", "axis", "shape"),
    [
        ("t5", "encoder.block.0.layer.0.SelfAttention.q", SiteType.LINEAR, Axis.TOKENS, (32, 32)),
        ("t5-gated", "decoder.block.1.layer.1.EncDecAttention.k", SiteType.LINEAR, Axis.MEMORY, (32, 48)),
        ("t5", "decoder.block.1.layer.1.EncDecAttention.o", SiteType.LINEAR, Axis.DECODER, (32, 32)),
        ("t5", "decoder.block.0.layer.0.layer_norm", SiteType.NORM, Axis.DECODER, (32, 32)),
        ("t5", "lm_head", SiteType.LINEAR, Axis.SAMPLED, (32, 101)),
        ("bert", "bert.encoder.layer.1.intermediate.dense", SiteType.LINEAR, Axis.TOKENS, (32, 48)),
        ("bert", "bert.pooler.dense", SiteType.LINEAR, Axis.POOLED, (32, 32)),
        ("bert", "bert.embeddings.LayerNorm", SiteType.NORM, Axis.TOKENS, (32, 32)),
        ("modernbert", "model.layers.1.attn.Wqkv", SiteType.LINEAR, Axis.TOKENS, (32, 96)),
        ("modernbert", "model.layers.1.attn_norm", SiteType.NORM, Axis.TOKENS, (32, 32)),
        ("modernbert", "model.embeddings.tok_embeddings", SiteType.EMBEDDING, Axis.TOKENS, (101, 32)),
        ("modernbert", "head.dense", SiteType.LINEAR, Axis.POOLED, (32, 32)),
        ("modernbert", "head.norm", SiteType.NORM, Axis.POOLED, (32, 32)),
        ("gpt2", "transformer.h.2.attn.c_attn", SiteType.CONV1D, Axis.TOKENS, (32, 96)),
        ("gpt2", "transformer.wte", SiteType.EMBEDDING, Axis.TOKENS, (101, 32)),
        ("llama", "model.layers.0.self_attn.k_proj", SiteType.LINEAR, Axis.TOKENS, (32, 16)),
        ("llama-tied", "lm_head", SiteType.LINEAR, Axis.SAMPLED, (32, 101)),
    ],
)
def test_sites(name, site, type_, axis, shape, tiny: Tiny):
    found = load(str(tiny(name)), dtype="float32", device="cpu").spec.sites[site]
    assert (found.type, found.axis, (found.in_features, found.out_features)) == (type_, axis, shape)


@pytest.mark.parametrize(
    ("name", "site", "heads", "width"),
    [
        ("t5-gated", "decoder.block.0.layer.1.EncDecAttention", 4, 12),
        ("bert", "bert.encoder.layer.0.attention.self", 4, 8),
        ("modernbert", "model.layers.0.attn", 4, 8),
        ("gpt2", "transformer.h.0.attn", 4, 8),
        ("llama", "model.layers.1.self_attn", 2, 8),
        ("llama-tied", "model.layers.1.self_attn", 4, 12),
    ],
)
def test_attention_sites(name, site, heads, width, tiny: Tiny):
    found = load(str(tiny(name)), dtype="float32", device="cpu").spec.sites[site]
    assert (found.type, found.kv_heads, found.head_dim) == (SiteType.ATTENTION, heads, width)
