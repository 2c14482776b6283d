"""What is wrong with a checkpoint is said by name, and nothing is loaded in part."""

import json
import re
import shutil
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from deltaserve.backbone.model import Backbone
from deltaserve.deltas.sites import Task
from deltaserve.errors import BadCheckpoint, DeltaserveError, FailedPrecondition, InvalidArgument
from deltaserve.formats.registry import Wanted, content_hash, read

A = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"
B = "base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"


def lora(**told: Any) -> Any:
    return peft.LoraConfig(**({"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["c_attn"]} | told))


@pytest.fixture
def reading(backbones: Mapping[str, Backbone]) -> Callable[..., Any]:
    def do(family: str, spoilt: Any, wanted: Wanted = Wanted(), **told: Any) -> Any:  # noqa: B008
        backbone = backbones[family]
        return read(spoilt.folder, backbone.spec, backbone.weights, wanted, **told)

    return do


OPTIONS = (
    ("use_qalora", True),
    ("arrow_config", {"top_k": 1}),
    ("layer_replication", [[0, 2]]),
    ("target_parameters", ["mlp.experts"]),
    ("loftq_config", {"bits": 4}),
    ("init_lora_weights", "pissa_niter_4"),
    ("init_lora_weights", "olora"),
    ("init_lora_weights", "corda"),
    ("init_lora_weights", "lora_ga"),
    ("init_lora_weights", "loftq"),
    ("an_option_of_tomorrow", "on"),
)


@pytest.mark.parametrize(("key", "value"), OPTIONS, ids=[f"{k}={v}"[:40] for k, v in OPTIONS])
def test_option_is_refused_by_its_key(key: str, value: Any, written: Any, reading: Any) -> None:
    spoilt = written("gpt2", lora())
    spoilt.config(**{key: value})
    with pytest.raises(FailedPrecondition, match=f"'{key}'") as raised:
        reading("gpt2", spoilt)
    assert raised.value.metadata["key"] == key


NOT_SERVED = (
    ("ADAPTION_PROMPT", "gated attention"),
    ("LILY", "averages over the whole batch"),
    ("SHADOW", "recurrent network"),
    ("XLORA", "a classifier mixes"),
    ("ADAMSS", "clusters the weights anew"),
    ("BONE", "convert the checkpoint to MISS"),
)


@pytest.mark.parametrize(("named", "why"), NOT_SERVED)
def test_type_is_refused_with_its_reason(named: str, why: str, written: Any, reading: Any) -> None:
    spoilt = written("gpt2", lora())
    spoilt.config(peft_type=named)
    with pytest.raises(FailedPrecondition, match=f"'{named}'.*{why}") as raised:
        reading("gpt2", spoilt)
    assert raised.value.reason == "KIND_NOT_SERVED"


@pytest.mark.parametrize("named", ["NOT_A_TYPE", 7, None, ["LORA"]])
def test_type_is_refused_with_those_served(named: Any, written: Any, reading: Any) -> None:
    spoilt = written("gpt2", lora())
    spoilt.config(peft_type=named)
    with pytest.raises(FailedPrecondition, match=r"this release serves LORA, IA3, .*, PROMPT_TUNING, P_TUNING"):
        reading("gpt2", spoilt)


VALUES: tuple[tuple[str, Any, str], ...] = (
    ("r", 0, "'r' is 0"),
    ("r", 2.5, "'r' is 2.5"),
    ("r", 1 << 30, "'r' is 1073741824"),
    ("lora_alpha", "much", "'lora_alpha' is 'much'"),
    ("lora_alpha", 10**400, "'lora_alpha' is 1000"),
    ("lora_alpha", float("inf"), "'lora_alpha' is inf"),
    ("lora_alpha", float("nan"), "'lora_alpha' is nan"),
    ("rank_pattern", {"c_attn": -1}, r"rank_pattern\['c_attn'\]"),
    ("rank_pattern", [1], "'rank_pattern'"),
    ("rank_pattern", {"(": 2}, "is not a pattern"),
    ("target_modules", 3, "'target_modules' is 3"),
    ("target_modules", [], "'target_modules' is empty"),
    ("target_modules", ["q_proj"], r"matches no module of this backbone"),
    ("target_modules", ["attn"], "is of type attention here"),
    ("target_modules", "(a+)+$" * 3, "matches no module|takes too long"),
    ("target_modules", r"(.*\.)*(.*\.)*(.*\.)*(.*\.)*(.*\.)*(.*\.)*z", "matches no module|takes too long"),
    ("target_modules", "x" * 3000, "a pattern of 3000 characters"),
    ("layers_to_transform", "one", "'layers_to_transform' is 'one'"),
    ("bias", "some", "'bias' is 'some'"),
    ("trainable_token_indices", [1, 2], "the checkpoint has no rows for it"),
    ("trainable_token_indices", [1, 1], "an id twice"),
    ("trainable_token_indices", [40], "distinct ids below 40"),
    ("use_bdlora", {"nblocks": 0}, "'nblocks' is 0"),
    ("use_bdlora", {"nblocks": 2}, "neither A nor B"),
    ("use_bdlora", {"target_modules_bd_a": ["attn"], "target_modules_bd_b": ["c_"]}, "both A and B"),
    ("use_bdlora", {"target_modules_bd_a": ["attn"], "nblocks": 3}, "3 blocks, which do not divide r"),
    ("target_parameters", ["c_attn.weight"], "lora_A.weight' is missing"),
    ("target_parameters", ["wte.weight"], r"wte\.lora_A\.weight' is missing"),
    (
        "target_parameters",
        ["mlp.experts.gate_up_proj"],
        "of this name; parameters of three dimensions are those of mix",
    ),
    ("target_parameters", ["ln_1.weight"], "no linear layer or embedding here has a weight of this name|of type norm"),
    ("ensure_weight_tying", "yes", "true or false is expected"),
    ("task_type", "QUESTION_ANS", "no tensors of its head 'qa_outputs'"),
    ("task_type", "IMAGE_CLS", "'task_type' is 'IMAGE_CLS'"),
)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(("key", "value", "said"), VALUES, ids=[f"{k}={v}"[:40] for k, v, _ in VALUES])
def test_value_is_refused(key: str, value: Any, said: str, written: Any, reading: Any) -> None:
    spoilt = written("gpt2", lora())
    spoilt.config(**{key: value})
    with pytest.raises(DeltaserveError, match=said):
        reading("gpt2", spoilt)


SPOILS: tuple[tuple[str, Callable[[dict[str, torch.Tensor]], Any], str], ...] = (
    ("missing A", lambda t: t.pop(A), "lora_A.weight' is missing"),
    ("missing B", lambda t: t.pop(B), "lora_B.weight' is missing"),
    ("no tensors", lambda t: t.clear(), "is missing"),
    ("extra", lambda t: t.update({"base_model.model.transformer.h.9.attn.c_attn.x": torch.ones(1)}), "no place in"),
    ("a norm of the backbone", lambda t: t.update({"base_model.model.transformer.ln_f.weight": torch.ones(16)}),
     "transformer.ln_f.weight"),
    ("a weight of the backbone",
     lambda t: t.update({"base_model.model.transformer.h.1.mlp.c_fc.weight": torch.ones(16, 64)}), "c_fc.weight"),
    ("other rank", lambda t: t.update({A: torch.ones(3, 16)}), r"shape \[3, 16\]; .* \[2, 16\]"),
    ("other width", lambda t: t.update({B: torch.ones(47, 2)}), r"shape \[47, 2\]; .* \[48, 2\]"),
    ("one dimension", lambda t: t.update({A: torch.ones(32)}), r"shape \[32\]"),
    ("NaN", lambda t: t[A].fill_(float("nan")), "NaN or infinite"),
    ("infinite", lambda t: t[B].fill_(float("inf")), "NaN or infinite"),
    ("integers", lambda t: t.update({A: torch.ones(2, 16, dtype=torch.int32)}), "a float type is expected"),
    ("foreign name", lambda t: t.update({"module.x": torch.ones(1)}), "does not begin with"),
)  # fmt: skip


@pytest.mark.parametrize(("change", "said"), [s[1:] for s in SPOILS], ids=[s[0] for s in SPOILS])
def test_tensors_are_refused(change: Any, said: str, written: Any, reading: Any) -> None:
    spoilt = written("gpt2", lora())
    spoilt.tensors(change)
    with pytest.raises(BadCheckpoint, match=said):
        reading("gpt2", spoilt)


def test_made_for_another_width(written: Any, reading: Any) -> None:
    spoilt = written("bert", peft.LoraConfig(r=2, target_modules=["query"]))
    spoilt.config(target_modules=["c_attn"])
    with pytest.raises(BadCheckpoint, match=r"is missing|no place"):
        reading("gpt2", spoilt)


def test_embedding_target_is_refused(written: Any, reading: Any) -> None:
    spoilt = written("gpt2", lora())
    spoilt.config(peft_type="ADALORA", target_modules=["wte", "c_attn"])
    with pytest.raises(BadCheckpoint, match=r"'transformer\.wte', which is of type embedding here"):
        reading("gpt2", spoilt)


@pytest.mark.parametrize("make", [peft.PrefixTuningConfig, peft.CartridgeConfig])
def test_prefix_where_the_backbone_has_no_way_in(make: Any, written: Any, reading: Any) -> None:
    spoilt = written("modernbert", make(num_virtual_tokens=3, task_type="FEATURE_EXTRACTION"), auto="AutoModel")
    with pytest.raises(FailedPrecondition, match=r"modernbert takes no keys and values from outside"):
        reading("modernbert", spoilt)


def test_saved_norm_of_another_width(written: Any, reading: Any) -> None:
    spoilt = written("gpt2", lora(modules_to_save=["ln_f"]))
    name = "base_model.model.transformer.ln_f.weight"
    spoilt.tensors(lambda tensors: tensors.update({name: torch.ones(15)}))
    with pytest.raises(BadCheckpoint, match=r"ln_f\.weight' has shape \[15\]; .* \[16\]"):
        reading("gpt2", spoilt)


@pytest.mark.parametrize(
    ("family", "table", "linear"), [("t5", "relative_attention_bias", "q"), ("opt", "embed_positions", "q_proj")]
)
def test_table_that_is_given_no_ids(family: str, table: str, linear: str, written: Any, reading: Any) -> None:
    """T5's attention reads its relative positions itself, and OPT's positions are counted from a mask."""
    spoilt = written(family, lora(target_modules=[linear]))
    spoilt.config(target_modules=[linear, table])
    with pytest.raises(BadCheckpoint, match=rf"{table}', which is no layer with weights here"):
        reading(family, spoilt)
    spoilt = written(family, lora(target_modules=[linear], modules_to_save=[table]))
    with pytest.raises(BadCheckpoint, match=rf"no place .*{table}"):
        reading(family, spoilt)


def test_prefix_of_other_layers(written: Any, reading: Any) -> None:
    spoilt = written("gpt2", peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    spoilt.config(num_layers=5)
    with pytest.raises(BadCheckpoint, match="'num_layers' is 5; this backbone has 2"):
        reading("gpt2", spoilt)


def test_prompt_longer_than_the_positions(written: Any, reading: Any) -> None:
    spoilt = written("gpt2", peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    spoilt.config(num_virtual_tokens=32)
    with pytest.raises(BadCheckpoint, match="leave no room"):
        reading("gpt2", spoilt)


def test_classifier_on_an_encoder_decoder(written: Any, reading: Any) -> None:
    spoilt = written("t5", lora(task_type="SEQ_2_SEQ_LM", target_modules=["q"]))
    with pytest.raises(FailedPrecondition, match="serves no head at all"):
        reading("t5", spoilt, Wanted(task=Task.SEQUENCE_CLASSIFICATION))


def test_classifier_without_its_head(written: Any, reading: Any) -> None:
    spoilt = written("bert", peft.LoraConfig(r=2, target_modules=["query"], task_type="FEATURE_EXTRACTION"))
    with pytest.raises(BadCheckpoint, match="no tensors of its head 'classifier'"):
        reading("bert", spoilt, Wanted(task=Task.SEQUENCE_CLASSIFICATION))


def test_labels_of_another_number(written: Any, reading: Any) -> None:
    spoilt = written(
        "bert",
        peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"),
        auto="AutoModelForSequenceClassification",
        num_labels=3,
    )
    with pytest.raises(InvalidArgument, match="2 labels for a head of 3 outputs"):
        reading("bert", spoilt, Wanted(labels=("no", "yes")))


def test_pickle_only_where_it_is_allowed(written: Any, reading: Any) -> None:
    spoilt = written("gpt2", lora())
    plain = reading("gpt2", spoilt)
    file = spoilt.folder / "adapter_model.safetensors"
    torch.save(load_file(file), spoilt.folder / "adapter_model.bin")
    file.unlink()
    with pytest.raises(FailedPrecondition, match="--allow-pickle-archives"):
        reading("gpt2", spoilt)
    allowed = reading("gpt2", spoilt, allow_pickle=True)
    assert all(torch.equal(a, b) for a, b in zip(allowed.tensors(), plain.tensors(), strict=True))


class Evil:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('ran')",))


@pytest.mark.parametrize("held", [{"x": Evil()}, [1, 2], {"x": "text"}, {"x": torch.ones(1).expand(1 << 40)}])
def test_pickle_with_more_than_weights(held: Any, written: Any, reading: Any) -> None:
    spoilt = written("gpt2", lora())
    (spoilt.folder / "adapter_model.safetensors").unlink()
    torch.save(held, spoilt.folder / "adapter_model.bin")
    with pytest.raises(BadCheckpoint):
        reading("gpt2", spoilt, allow_pickle=True)


def test_files_hosts_and_code_are_not_followed(tmp_path: Path, written: Any, reading: Any) -> None:
    """Keys by which a config names them change nothing, and none is opened, called or imported."""
    with socket.create_server(("127.0.0.1", 0)) as host:
        host.setblocking(False)
        address = f"http://127.0.0.1:{host.getsockname()[1]}/x"
        trap = tmp_path / "adapter_trap.py"
        trap.write_text("raise SystemExit('imported')")
        spoilt = written("gpt2", lora())
        plain = reading("gpt2", spoilt)
        for named in (address, str(trap), "adapter_trap"):
            spoilt.config(
                base_model_name_or_path=named, revision=named, peft_version=named, megatron_core=named,
                megatron_config={"x": named}, auto_mapping={"base_model_class": named, "parent_library": named},
            )  # fmt: skip
            found = reading("gpt2", spoilt)
            assert all(torch.equal(a, b) for a, b in zip(found.tensors(), plain.tensors(), strict=True))
        prompt = written(
            "gpt2", peft.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_ranks=2)
        )
        prompt.config(
            prompt_tuning_init="ONLY_SOURCE_SHARED", prompt_tuning_init_state_dict_path=str(tmp_path / "nowhere"),
            tokenizer_name_or_path=address, prompt_tuning_init_text=address,
        )  # fmt: skip
        assert reading("gpt2", prompt).prompt_length == 3
        with pytest.raises(BlockingIOError):
            host.accept()


@pytest.mark.parametrize("named", ["/etc/passwd", "http://127.0.0.1:9/x", "os.system", "../../x"])
@pytest.mark.parametrize("key", ["target_modules", "init_lora_weights", "bias", "peft_type", "task_type"])
def test_names_of_what_is_no_module_here(key: str, named: str, written: Any, reading: Any) -> None:
    spoilt = written("gpt2", lora())
    spoilt.config(**{key: named})
    with pytest.raises((BadCheckpoint, FailedPrecondition), match=re.escape(key)) as raised:
        reading("gpt2", spoilt)
    assert named in raised.value.message


@pytest.mark.parametrize("text", ["", "[]", "{", "nope", "[" * 100_000, '{"peft_type": 1', "\x00"])
def test_config_that_is_no_config(text: str, written: Any, reading: Any) -> None:
    spoilt = written("gpt2", lora())
    (spoilt.folder / "adapter_config.json").write_text(text)
    with pytest.raises(BadCheckpoint):
        reading("gpt2", spoilt)


def test_files_that_are_not_there(tmp_path: Path, written: Any, reading: Any) -> None:
    with pytest.raises(BadCheckpoint, match="is not a folder"):
        content_hash(tmp_path / "nothing")
    with pytest.raises(BadCheckpoint, match="holds no adapter_config"):
        content_hash(tmp_path)
    spoilt = written("gpt2", lora())
    (spoilt.folder / "adapter_model.safetensors").unlink()
    with pytest.raises(BadCheckpoint, match="holds no adapter_model"):
        content_hash(spoilt.folder)


@pytest.mark.parametrize("keep", [0, 4, 100, 600])
def test_truncated_tensors(keep: int, written: Any, reading: Any) -> None:
    spoilt = written("gpt2", lora())
    file = spoilt.folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(BadCheckpoint, match="not a safetensors file"):
        reading("gpt2", spoilt)


def test_hash_is_of_the_content(written: Any, tmp_path: Path) -> None:
    spoilt = written("gpt2", lora())
    before = content_hash(spoilt.folder)
    moved = tmp_path / "elsewhere"
    shutil.copytree(spoilt.folder, moved)
    assert content_hash(moved) == before
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 3}))
    assert content_hash(moved) != before
