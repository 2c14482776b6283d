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
from safetensors.torch import load_file, save_file

from deltaserve.backbone.load import load
from deltaserve.backbone.model import Backbone

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
