"""Activated LoRA: what is read of the invocation, and what is refused beside it."""

from collections.abc import Callable, Mapping
from typing import Any

import peft
import pytest

from deltaserve.backbone.model import Backbone
from deltaserve.catalog.version import Card, Source, Version
from deltaserve.deltas.sites import Task
from deltaserve.errors import BadCheckpoint, FailedPrecondition
from deltaserve.formats.registry import Wanted, read

KEY = "alora_invocation_tokens"


def alora(**told: Any) -> Any:
    known = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["c_attn"], KEY: [3, 4, 3]}
    return peft.LoraConfig(**(known | told))


@pytest.fixture
def reading(backbones: Mapping[str, Backbone]) -> Callable[..., Any]:
    def do(family: str, spoilt: Any, wanted: Wanted = Wanted()) -> Any:  # noqa: B008
        backbone = backbones[family]
        return read(spoilt.folder, backbone.spec, backbone.weights, wanted)

    return do


def test_invocation_is_told_to_the_operator_and_to_the_engine(written: Any, reading: Any) -> None:
    spoilt = written("gpt2", alora(lora_bias=True, use_rslora=True))
    delta = reading("gpt2", spoilt)
    assert (delta.kinds, delta.invocation, delta.task) == (("lora", "alora"), (3, 4, 3), Task.GENERATION)
    (warning,) = delta.provenance.warnings
    assert "from the last occurrence of the tokens [3, 4, 3] on" in warning
    version = Version(1, "a", 1, Source(spoilt.folder, "a"), "", card=Card.of(delta))
    assert version.ref.invocation == (3, 4, 3)


@pytest.mark.parametrize("value", [None, [], False])
def test_without_an_invocation_it_is_plain(value: Any, written: Any, reading: Any) -> None:
    spoilt = written("gpt2", alora())
    spoilt.config(**{KEY: value})
    delta = reading("gpt2", spoilt)
    assert (delta.kinds, delta.invocation, delta.provenance.warnings) == (("lora",), (), ())


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([40], "holds 40; token ids of this backbone are from 0 to 39"),
        ([3, -1], "holds -1"),
        ([True], "holds True"),
        ([3, 1.0], "holds 1.0"),
        ([3, None], "holds None"),
        ([[3]], r"holds \[3\]"),
        ([1 << 70], "holds 1180591620717411303424"),
        ([3] * 257, "at most 256 token ids"),
        ("3 4", "is '3 4'; a list"),
        ({"0": 3}, "a list of at most"),
        (3, "is 3; a list"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_no_token_ids(value: Any, said: str, written: Any, reading: Any) -> None:
    spoilt = written("gpt2", alora())
    spoilt.config(**{KEY: value})
    with pytest.raises(BadCheckpoint, match=said):
        reading("gpt2", spoilt)


EVERYWHERE: Mapping[str, Mapping[str, Any]] = {
    "bias": {"bias": "lora_only"},
    "modules_to_save": {"modules_to_save": ["ln_f"]},
    "trainable_token_indices": {"trainable_token_indices": [5]},
    "init_lora_weights": {"init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("key", EVERYWHERE)
def test_what_acts_on_every_token_is_refused_beside_it(key: str, written: Any, reading: Any) -> None:
    """PEFT does this; a row has one slot here."""
    spoilt = written("gpt2", alora(**EVERYWHERE[key]))
    with pytest.raises(FailedPrecondition, match=f"'{key}' .*acts on every token, and beside {KEY}") as raised:
        reading("gpt2", spoilt)
    assert raised.value.metadata["key"] == key


def test_a_changed_head_is_refused_beside_it(written: Any, reading: Any) -> None:
    """PEFT saves a targeted lm_head whole; where it is the backbone's it is of no account."""
    spoilt = written("opt", alora(target_modules=["q_proj", "lm_head"]))
    assert "lm_head" in reading("opt", spoilt).at
    spoilt.tensors(lambda t: [t[name].mul_(1.5) for name in t if "lm_head.base_layer.weight" in name])
    with pytest.raises(FailedPrecondition, match=r"lm_head.base_layer.weight differs from the backbone's"):
        reading("opt", spoilt)


TOGETHER: tuple[tuple[str, Any], ...] = (
    ("use_dora", True),
    ("use_bdlora", {"target_modules_bd_a": ["c_attn"], "nblocks": 2}),
    ("velora_config", {"num_groups": 8}),
    ("monteclora_config", {"num_samples": 2}),
    ("kasa_config", {"x": 1}),
    ("target_parameters", ["c_fc.weight"]),
    ("init_lora_weights", "mica"),
)


@pytest.mark.parametrize(("key", "value"), TOGETHER, ids=[key for key, _ in TOGETHER])
def test_what_peft_cannot_combine(key: str, value: Any, written: Any, reading: Any) -> None:
    spoilt = written("gpt2", alora())
    spoilt.config(**{key: value})
    with pytest.raises(BadCheckpoint, match=f"'{key}' .*beside {KEY}; PEFT allows one of them"):
        reading("gpt2", spoilt)


def test_embedding_beside_it(written: Any, reading: Any) -> None:
    spoilt = written("gpt2", alora())
    spoilt.config(target_modules=["wte", "c_attn"])
    with pytest.raises(BadCheckpoint, match=f"'transformer.wte'; beside {KEY} PEFT cannot do that"):
        reading("gpt2", spoilt)


@pytest.mark.parametrize(
    ("family", "task", "auto"),
    [
        ("bert", "FEATURE_EXTRACTION", "AutoModel"),
        ("bert", "SEQ_CLS", "AutoModelForSequenceClassification"),
        ("t5", "SEQ_2_SEQ_LM", "AutoModelForSeq2SeqLM"),
        ("t5", "CAUSAL_LM", "AutoModelForSeq2SeqLM"),
        ("gpt2", None, "AutoModelForCausalLM"),
        ("gpt2", "SEQ_CLS", "AutoModelForSequenceClassification"),
    ],
)
@pytest.mark.filterwarnings("ignore:aLoRA is currently only supported")
def test_where_peft_never_looks_for_it(family: str, task: str | None, auto: str, written: Any, reading: Any) -> None:
    targets = {"bert": "query", "t5": "q", "gpt2": "c_attn"}[family]
    spoilt = written(family, alora(task_type=task, target_modules=[targets]), auto=auto, **_padded(auto))
    with pytest.raises(FailedPrecondition, match=f"'{KEY}'.*decoder-only models of task_type CAUSAL_LM"):
        reading(family, spoilt)


def _padded(auto: str) -> dict[str, Any]:
    return {"num_labels": 3, "pad_token_id": 0} if "Sequence" in auto else {}


@pytest.mark.filterwarnings("ignore:aLoRA is currently only supported")
def test_a_head_beside_it(written: Any, reading: Any) -> None:
    """A config that does not say so, a checkpoint that has a head, and an operator who names its task."""
    spoilt = written(
        "gpt2", alora(task_type="SEQ_CLS"), auto="AutoModelForSequenceClassification", **_padded("Sequence")
    )
    spoilt.config(task_type="CAUSAL_LM", modules_to_save=None)
    with pytest.raises(FailedPrecondition, match="the head beside it acts on every token"):
        reading("gpt2", spoilt, Wanted(task=Task.SEQUENCE_CLASSIFICATION))


def test_where_peft_itself_fails(written: Any, reading: Any) -> None:
    """transformers gives OPT's feed-forward the rows of a whole batch on one axis, and PEFT's mask does not fit."""
    spoilt = written("opt", alora(target_modules=["q_proj", "fc2"]))
    with pytest.raises(FailedPrecondition, match=r"PEFT itself cannot run it at 'model.decoder.layers.0.fc2'"):
        reading("opt", spoilt)
    assert reading("opt", written("opt", alora(target_modules=["q_proj"]))).invocation == (3, 4, 3)
