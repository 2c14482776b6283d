"""A tiny GPT-2, BERT, OPT and T5, and checkpoints that were written by PEFT and then spoilt."""

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from driven import written as write_cases
from methods import DECODERS, GENERATING, Case, cases
from safetensors.torch import load_file, save_file

from deltaserve.backbone.load import load
from deltaserve.backbone.model import Backbone
from deltaserve.deltas.delta import Delta
from deltaserve.errors import BadCheckpoint, DeltaserveError
from deltaserve.formats import native
from deltaserve.formats.registry import Wanted, read
from deltaserve.formats.weighed import Weighed

CONFIGS = {
    "gpt2": ("AutoModelForCausalLM", lambda: transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=1)),
    "bert": ("AutoModel", lambda: transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=25,
        max_position_embeddings=32)),
    "modernbert": ("AutoModelForMaskedLM", lambda: transformers.ModernBertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=25,
        max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)),
    "opt": ("AutoModelForCausalLM", lambda: transformers.OPTConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=24, word_embed_proj_dim=16,
        max_position_embeddings=32)),
    "t5": ("AutoModelForSeq2SeqLM", lambda: transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, num_heads=2, d_ff=24, num_layers=2, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=1)),
    "llama": ("AutoModelForCausalLM", lambda: transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, bos_token_id=None, eos_token_id=1, pad_token_id=0)),
    "gemma2": ("AutoModelForCausalLM", lambda: transformers.Gemma2Config(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=32, bos_token_id=None, eos_token_id=1,
        pad_token_id=0)),
}  # fmt: skip


@dataclass(frozen=True)
class Spoilt:
    """A checkpoint's folder, to be changed in place."""

    folder: Path

    def config(self, **changes: Any) -> None:
        """Sets keys; a value of ... takes the key out."""
        file = self.folder / "adapter_config.json"
        told = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({key: value for key, value in told.items() if value is not ...}))

    def tensors(self, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        file = self.folder / "adapter_model.safetensors"
        found = load_file(file)
        change(found)
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, file)


@pytest.fixture(scope="session")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Backbone]:
    made = {}
    for name, (auto, config) in CONFIGS.items():
        folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            getattr(transformers, auto).from_config(config()).save_pretrained(folder)
            made[name] = load(str(folder), dtype="float32", device="cpu")
    return made


FAMILIES = ("llama", "bert", "t5")


def shared(family: str) -> list[Case]:
    """The families take turns at the methods; the few last ones, which not all have, are in the others too."""
    turn, few = FAMILIES.index(family), GENERATING | DECODERS
    return [case for n, case in enumerate(cases(family)) if n % len(FAMILIES) == turn or case.method in few]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Backbone, Path, Wanted]]:
    """One or more of every method and option of PEFT's: for which backbone, where, and what must be said of it."""
    made = []
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            write_cases(family, shared(family), folder)
        backbone = load(str(folder / "backbone"), dtype="float32", device="cpu")
        made += [(backbone, folder / case.name, case.wanted) for case in shared(family)]
    return made


@pytest.fixture
def written(backbones: Mapping[str, Backbone], tmp_path: Path) -> Callable[..., Spoilt]:
    """`written("gpt2", config)` is a checkpoint with random numbers; `auto` and `told` choose the class."""

    def write(family: str, config: Any, auto: str | None = None, **told: Any) -> Spoilt:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(2)
            model = getattr(transformers, auto or CONFIGS[family][0]).from_pretrained(
                backbones[family].name, dtype=torch.float32, **told
            )
            made: Any = peft.get_peft_model(model, config)
            for parameter in made.parameters():
                if parameter.requires_grad:
                    parameter.data.normal_()
            folder = tmp_path / f"{family}-{len(list(tmp_path.iterdir()))}"
            made.save_pretrained(folder)
        return Spoilt(folder)

    return write


@dataclass(frozen=True)
class Converted:
    """A converted delta, to be changed in place."""

    folder: Path
    backbone: Backbone

    def config(self, change: Callable[[dict[str, Any]], Any]) -> None:
        file = self.folder / "delta.json"
        told = json.loads(file.read_text())
        change(told)
        file.write_text(json.dumps(told))

    def tensors(self, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        file = self.folder / "delta.safetensors"
        found = load_file(file)
        change(found)
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, file)

    def tensor(self, end: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Changes the first tensor whose name ends so."""

        def one(found: dict[str, torch.Tensor]) -> None:
            name = next(name for name in sorted(found) if name.endswith(end))
            found[name] = change(found[name].clone())

        self.tensors(one)

    def first(self, type_: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """Finds the record of the first primitive of a type."""
        return lambda told: next(p for parts in told["at"].values() for p in parts if p["type"] == type_)

    def read(self, wanted: Wanted = Wanted()) -> Delta:  # noqa: B008
        return read(self.folder, self.backbone.spec, self.backbone.weights, wanted)

    def refused(self, *said: str, error: type[DeltaserveError] = BadCheckpoint, wanted: Wanted = Wanted()) -> None:  # noqa: B008
        with pytest.raises(error) as caught:
            self.read(wanted)
        assert all(word in caught.value.message for word in said), caught.value.message


_LORA = dict(r=2, lora_alpha=4)
CONVERTED: Mapping[str, tuple[str, Callable[[], Any], str | None]] = {
    "lora": ("gpt2", lambda: peft.LoraConfig(target_modules=["c_attn"], task_type="CAUSAL_LM", **_LORA), None),
    "pissa": (
        "opt",
        lambda: peft.LoraConfig(
            target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights="pissa", **_LORA
        ),
        None,
    ),
    "dora": (
        "opt",
        lambda: peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", use_dora=True, **_LORA),
        None,
    ),
    "biased": (
        "opt",
        lambda: peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", bias="lora_only", **_LORA),
        None,
    ),
    "tokens": (
        "gpt2",
        lambda: peft.TrainableTokensConfig(
            target_modules=["wte"], token_indices=[3, 9, 5], task_type="CAUSAL_LM"
        ),
        None,
    ),
    "shira": ("opt", lambda: peft.ShiraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"), None),
    "oft": (
        "opt",
        lambda: peft.OFTConfig(oft_block_size=4, r=0, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        None,
    ),
    "vera": ("opt", lambda: peft.VeraConfig(r=3, target_modules=["q_proj", "fc1"], task_type="CAUSAL_LM"), None),
    "alora": (
        "gpt2",
        lambda: peft.LoraConfig(
            target_modules=["c_attn"], task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6], **_LORA
        ),
        None,
    ),
    "prefix": ("gpt2", lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), None),
    "prompt": ("gpt2", lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), None),
    "norms": ("bert", lambda: peft.LNTuningConfig(target_modules=["LayerNorm"], task_type="FEATURE_EXTRACTION"), None),
    "mood": (
        "bert",
        lambda: peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS", **_LORA),
        "AutoModelForSequenceClassification",
    ),
}  # fmt: skip


@pytest.fixture
def made(written: Any, backbones: Mapping[str, Backbone], tmp_path: Path) -> Callable[..., Converted]:
    """`made("lora")`: a checkpoint of CONVERTED, converted."""

    def make(kind: str, wanted: Wanted = Wanted(), name: str = "") -> Converted:  # noqa: B008
        family, config, auto = CONVERTED[kind]
        told = {"num_labels": 3} if auto else {}
        folder = written(family, config(), auto=auto, **told).folder
        backbone, place = backbones[family], tmp_path / f"{name or kind}-converted"
        weights = Weighed(backbone.weights)
        native.write(read(folder, backbone.spec, weights, wanted), place, backbone.spec, weights)
        return Converted(place, backbone)

    return make
