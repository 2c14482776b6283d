"""Heads beside AdapterHub's adapters, and families that its library does not know."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import HIDDEN, LORA, PREFIX, SEQ, Draw, Made, Reading, Stream, Tensors, bottlenecks, save
from test_adapterhub_others import prefixed
from torch.nn.functional import gelu, linear

from deltaserve.backbone.model import Backbone
from deltaserve.deltas.adapters import Bottleneck, Tap
from deltaserve.deltas.primitives import Affine, Dense
from deltaserve.deltas.sites import Pooling, Task
from deltaserve.errors import BadCheckpoint, FailedPrecondition
from deltaserve.formats.registry import Wanted
from deltaserve_kernels.testing import error_ratio

EXACT = 1e-5


@pytest.fixture
def reading(backbones: Mapping[str, Backbone], tmp_path: Path) -> Reading:
    return Reading(backbones, tmp_path)


def with_head(folder: Path, told: Any, tensors: Tensors, **known: Any) -> Path:
    config = {"name": "a", "config": told, "model_class": "BertAdapterModel", "model_type": "bert", **known}
    (folder / "head_config.json").write_text(json.dumps(config))
    save(tensors, folder, "model_head.safetensors", "pytorch_model_head.bin")
    return folder


def plain(tmp_path: Path, family: str = "bert") -> Path:
    return Made(SEQ, bottlenecks(SEQ, family), family).write(tmp_path / "headed")


def flexible(kind: str, **told: Any) -> dict[str, Any]:
    labels = {"label2id": {"no": 0, "yes": 1, "perhaps": 2}} if told.get("num_labels", 3) == 3 else {}
    return {
        "head_type": kind,
        "layers": 2,
        "activation_function": "tanh",
        "num_labels": 3,
        "bias": True,
        **labels,
        **told,
    }


def layers_of(*sizes: tuple[int, int, int]) -> Tensors:
    """`heads.a.NUMBER` of so many outputs and inputs."""
    draw, made = Draw(), Tensors()
    for number, outputs, inputs in sizes:
        made |= draw.linear(f"heads.a.{number}", inputs, outputs)
    return made


FLEXIBLE: tuple[tuple[str, Mapping[str, Any], tuple[tuple[int, int, int], ...], Task, Pooling, str], ...] = (
    ("classification", {}, ((1, 16, 16), (4, 3, 16)), Task.SEQUENCE_CLASSIFICATION, Pooling.CLS, "single"),
    ("classification", {"layers": 1}, ((1, 3, 16),), Task.SEQUENCE_CLASSIFICATION, Pooling.CLS, "single"),
    ("classification", {"activation_function": None}, ((1, 16, 16), (3, 3, 16)), Task.SEQUENCE_CLASSIFICATION,
     Pooling.CLS, "single"),
    ("classification", {"use_pooler": True}, ((1, 16, 16), (4, 3, 16)), Task.SEQUENCE_CLASSIFICATION, Pooling.POOLER,
     "single"),
    ("classification", {"num_labels": 1, "layers": 1}, ((1, 1, 16),), Task.SEQUENCE_CLASSIFICATION, Pooling.CLS,
     "regression"),
    ("multilabel_classification", {}, ((1, 16, 16), (4, 3, 16)), Task.SEQUENCE_CLASSIFICATION, Pooling.CLS, "multi"),
    ("multiple_choice", {"layers": 1}, ((1, 1, 16),), Task.MULTIPLE_CHOICE, Pooling.CLS, ""),
    ("tagging", {"layers": 1}, ((1, 3, 16),), Task.TOKEN_CLASSIFICATION, Pooling.TOKENS, "single"),
    ("question_answering", {"layers": 1, "num_labels": 2}, ((1, 2, 16),), Task.QUESTION_ANSWERING, Pooling.TOKENS, ""),
)  # fmt: skip


@pytest.mark.parametrize(("kind", "changes", "sizes", "task", "pooling", "problem"), FLEXIBLE)
def test_flexible_heads(
    kind: str, changes: Any, sizes: Any, task: Task, pooling: Pooling, problem: str, reading: Reading, tmp_path: Path
) -> None:
    told, tensors = flexible(kind, **changes), layers_of(*sizes)
    delta = reading(with_head(plain(tmp_path), told, tensors))
    assert delta.task is task and delta.pooling is pooling and delta.head is not None
    assert (delta.problem_type or "").startswith(problem)
    for (number, outputs, _), layer in zip(sizes, delta.head.layers, strict=True):
        assert torch.equal(layer.weight, tensors[f"heads.a.{number}.weight"])
        last = number == sizes[-1][0]
        assert layer.activation == (None if last or not told["activation_function"] else "tanh")
        assert layer.weight.shape[0] == outputs
    if told["num_labels"] == 3 and problem:
        assert delta.labels == ("no", "yes", "perhaps")
    assert "head" in delta.kinds and "task" not in delta.provenance.guessed


def test_head_of_a_decoder_reads_the_last_token(reading: Reading, tmp_path: Path) -> None:
    folder = with_head(plain(tmp_path, "gpt2"), flexible("classification", layers=1), layers_of((1, 3, 16)))
    assert reading(folder, "gpt2").pooling is Pooling.LAST_REAL


def test_static_heads(reading: Reading, tmp_path: Path) -> None:
    tensors = Draw().linear("classifier", HIDDEN, 3)
    known = {"model_class": "BertForSequenceClassification", "num_labels": 3, "label2id": {"a": 0, "b": 1, "c": 2}}
    delta = reading(with_head(plain(tmp_path), None, tensors, name=None, **known))
    assert delta.task is Task.SEQUENCE_CLASSIFICATION and delta.pooling is Pooling.POOLER
    assert delta.labels == ("a", "b", "c") and delta.head is not None and delta.head.width == 3
    known["model_class"] = "BertForTokenClassification"
    delta = reading(with_head(plain(tmp_path), None, tensors, name=None, **known))
    assert delta.task is Task.TOKEN_CLASSIFICATION and delta.pooling is Pooling.TOKENS


def test_head_of_a_masked_language_model_is_left_out(reading: Reading, tmp_path: Path) -> None:
    folder = with_head(plain(tmp_path), flexible("masked_lm"), layers_of((0, 16, 16), (3, 40, 16)))
    delta = reading(folder)
    assert delta.task is Task.EMBEDDING and delta.head is None
    assert any("left out" in text for text in delta.provenance.warnings)


def test_head_that_is_not_wanted_is_left_out(reading: Reading, tmp_path: Path) -> None:
    folder = with_head(plain(tmp_path), flexible("classification"), layers_of((1, 16, 16), (4, 3, 16)))
    delta = reading(folder, wanted=Wanted(task=Task.EMBEDDING))
    assert delta.head is None and any("left out" in text for text in delta.provenance.warnings)
    reading.refused(folder, "the checkpoint's head is for", wanted=Wanted(task=Task.TOKEN_CLASSIFICATION))
    reading.refused(Made(SEQ, bottlenecks(SEQ)), "has no head", wanted=Wanted(task=Task.SEQUENCE_CLASSIFICATION))


def vocabulary(backbone: Backbone, **told: Any) -> tuple[dict[str, Any], Tensors]:
    draw = Draw()
    tensors = draw.linear("heads.a.0", HIDDEN, HIDDEN) | draw.norm("heads.a.2")
    tensors |= {"heads.a.3.weight": backbone.weights("lm_head").clone(), "heads.a.3.bias": draw(40)}
    known = {
        "activation_function": "gelu",
        "layer_norm": True,
        "bias": True,
        "embedding_size": HIDDEN,
        "vocab_size": 40,
    }
    return flexible("causal_lm", **known, **told), tensors


def test_causal_head(reading: Reading, backbones: Mapping[str, Backbone], tmp_path: Path) -> None:
    """Its linear and its norm come behind the last norm; of the vocabulary's matrix, the backbone's own, the bias."""
    told, tensors = vocabulary(backbones["gpt2"])
    delta = reading(with_head(plain(tmp_path, "gpt2"), told, tensors), "gpt2")
    (one,) = delta.at["transformer.ln_f"]
    (shift,) = delta.at["lm_head"]
    assert isinstance(one, Bottleneck) and one.carry is None and one.input is Tap.OUTPUT
    x = Draw(4)(3, HIDDEN)
    wanted = gelu(linear(x, tensors["heads.a.0.weight"], tensors["heads.a.0.bias"]))
    wanted = torch.nn.functional.layer_norm(
        wanted, (HIDDEN,), tensors["heads.a.2.weight"], tensors["heads.a.2.bias"], 1e-12
    )
    assert error_ratio(Stream(x, x, x, lambda z: z).after((one,)), wanted) < EXACT
    assert isinstance(shift, Affine) and torch.equal(shift.shift, tensors["heads.a.3.bias"])  # type: ignore[arg-type]
    assert delta.task is Task.GENERATION and delta.head is None
    tensors["heads.a.3.weight"] += 1
    delta = reading(with_head(plain(tmp_path, "gpt2"), told, tensors), "gpt2")
    (dense,) = delta.at["lm_head"]
    assert isinstance(dense, Dense) and dense.replace and torch.equal(dense.weight, tensors["heads.a.3.weight"])


def test_language_head_of_a_class_of_transformers(
    reading: Reading, backbones: Mapping[str, Backbone], tmp_path: Path
) -> None:
    """It is the backbone's own, and to the library prefixes of T5 are part of it."""
    weight = backbones["t5"].weights("lm_head").clone()
    told = {**PREFIX}
    folder = Made(told, prefixed("t5", told), "t5", pickled=True).write(tmp_path / "headed")
    copies = {name: tensor for name, tensor in prefixed("t5", told).items() if name.startswith("prefix_tuning.")}
    known = {"name": None, "model_class": "T5ForConditionalGeneration"}
    delta = reading(with_head(folder, None, {"lm_head.weight": weight, **copies}, **known), "t5")
    assert delta.kinds == ("prefix-tuning",) and "lm_head" not in delta.at


HEADS_REFUSED: tuple[tuple[str, Mapping[str, Any], str, type[Exception]], ...] = (
    ("a head of one's own", {"head_type": "my.module.Head"}, "'head_type' is 'my.module.Head'", FailedPrecondition),
    ("no type", {"head_type": None}, "'head_type' is None", FailedPrecondition),
    ("many layers", {"layers": 1000}, "'layers' is 1000", BadCheckpoint),
    ("many labels", {"num_labels": 1 << 40}, "'num_labels'", BadCheckpoint),
    ("other labels", {"num_labels": 5, "label2id": None}, r"heads.a.4", BadCheckpoint),
    ("an unknown activation", {"activation_function": "glow"}, "'activation_function' is 'glow'", FailedPrecondition),
)


@pytest.mark.parametrize(("what", "changes", "said", "error"), HEADS_REFUSED)
def test_heads_refused(what: str, changes: Any, said: str, error: Any, reading: Reading, tmp_path: Path) -> None:
    told = flexible(**{"kind": "classification"}) | changes
    folder = with_head(plain(tmp_path), told, layers_of((1, 16, 16), (4, 3, 16)))
    reading.refused(folder, said, error=error)


def test_pooler_of_a_backbone_without_one(reading: Reading, tmp_path: Path) -> None:
    folder = with_head(
        plain(tmp_path, "gpt2"), flexible("classification", use_pooler=True), layers_of((1, 16, 16), (4, 3, 16))
    )
    reading.refused(folder, "no pooler", error=FailedPrecondition, family="gpt2")


def test_class_of_an_unknown_model(reading: Reading, tmp_path: Path) -> None:
    folder = with_head(plain(tmp_path), None, {"x": torch.ones(1)}, model_class="BertForEverything")
    reading.refused(folder, "'BertForEverything'", error=FailedPrecondition)


def test_classifiers_of_t5(reading: Reading, tmp_path: Path) -> None:
    folder = with_head(plain(tmp_path, "t5"), flexible("classification"), layers_of((1, 16, 16), (4, 3, 16)))
    reading.refused(folder, "serves no head at all", error=FailedPrecondition, family="t5")


def interface(**changes: Any) -> dict[str, Any]:
    return {
        "layer_self_attn": "self_attn", "attn_o_proj": "out_proj", "layer_output_proj": "fc2",
        "layer_intermediate_proj": "fc1", "layer_pre_self_attn": "self_attn_layer_norm",
        "layer_pre_ffn": "final_layer_norm", "attn_q_proj": "q_proj", "attn_k_proj": "k_proj", "attn_v_proj": "v_proj",
        **changes,
    }  # fmt: skip


def described(folder: Path, **changes: Any) -> Path:
    (folder / "adapter_interface.json").write_text(json.dumps({"interface": interface(**changes)}))
    return folder


def test_family_that_the_library_does_not_know(reading: Reading, tmp_path: Path) -> None:
    folder = Made(SEQ, bottlenecks(SEQ, "opt"), "opt").write(tmp_path / "opt")
    reading.refused(folder, "no adapter_interface.json", error=FailedPrecondition, family="opt")
    (one,) = reading(described(folder), "opt").at["model.decoder.layers.0.fc2"]
    assert isinstance(one, Bottleneck) and one.input is Tap.SUM
    draw, at = Draw(), "decoder.layers.0.self_attn.{}_proj.loras.a.lora_{}"
    pairs = {at.format(w, ab): draw(*((3, 16) if ab == "A" else (16, 3))) for w in "qv" for ab in "AB"}
    folder = Made(LORA, pairs, "opt").write(tmp_path / "lora")
    assert len(reading(described(folder), "opt").at) == 2


INTERFACES: tuple[tuple[Mapping[str, Any], str, type[Exception]], ...] = (
    ({"layer_output_proj": "mlp.c_proj"}, "no sublayer of this backbone ends at", FailedPrecondition),
    ({"layer_pre_ffn": "fc1"}, "unlike residuals", FailedPrecondition),
    ({"layer_pre_ffn": "elsewhere"}, "is not what stands before", FailedPrecondition),
    ({"layer_ln_1": "final_layer_norm"}, "norms behind the sublayers", FailedPrecondition),
    ({"layer_self_attn": ["x"]}, "a module's name is expected", BadCheckpoint),
)


@pytest.mark.parametrize(("changes", "said", "error"), INTERFACES)
def test_interfaces_refused(changes: Any, said: str, error: Any, reading: Reading, tmp_path: Path) -> None:
    folder = Made(SEQ, bottlenecks(SEQ, "opt"), "opt").write(tmp_path / "opt")
    reading.refused(described(folder, **changes), said, error=error, family="opt")
