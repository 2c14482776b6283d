"""Backbones of real size with random weights: ours, and transformers' own with the same bytes."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import BertConfig, GPT2Config, LlamaConfig, PreTrainedModel, T5Config
from transformers.initialization import no_init_weights

from deltaserve.backbone import attention
from deltaserve.backbone.families import family_of
from deltaserve.backbone.model import Backbone

SHAPES: Mapping[str, Callable[[], Any]] = {
    "bert-base": lambda: BertConfig(),
    "llama-24": lambda: LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=2048,
    ),
    "llama-8b": lambda: LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    ),
    "llama-1b": lambda: LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "tiny-bert": lambda: BertConfig(**_tiny(), intermediate_size=48, max_position_embeddings=96),
    "tiny-llama": lambda: LlamaConfig(
        **_tiny(), intermediate_size=48, num_key_value_heads=2, max_position_embeddings=96
    ),
    "tiny-gpt2": lambda: GPT2Config(
        vocab_size=101, n_embd=32, n_layer=2, n_head=4, n_positions=96, bos_token_id=None, eos_token_id=2
    ),
    "tiny-t5": lambda: T5Config(
        vocab_size=101, d_model=32, d_kv=8, num_heads=4, d_ff=48, num_layers=2, decoder_start_token_id=0
    ),
}
"""Configs by name. bert-base has 109 million parameters, llama-24 has 348 million, llama-8b 8.0 and llama-1b 1.2
thousand million, in the shapes of Llama 3.1 and 3.2.
"""


def _tiny() -> dict[str, int]:
    return dict(vocab_size=101, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)


@dataclass(frozen=True, eq=False)
class Twins:
    """`ours` is opened up, `plain` is transformers' own forward. They share every weight."""

    ours: Backbone
    plain: PreTrainedModel


def twins(shape: str, dtype: torch.dtype, device: torch.device, seed: int) -> Twins:
    """Makes both. Encoders go without a pooler, which nobody asks for here."""
    ours = backbone(shape, dtype, device, seed)
    return Twins(ours, sharing(shape, ours))


def backbone(shape: str, dtype: torch.dtype, device: torch.device, seed: int, scale: float = 0.02) -> Backbone:
    """Every parameter is moved off its initial value by `scale`, so that no bias is 0 and no norm is 1."""
    attention.register()
    torch.manual_seed(seed)
    config = SHAPES[shape]()
    family = family_of(config, shape)
    model = _model(family.loader, config, dtype, attention.NAME)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=scale)
    model = model.to(device).eval().requires_grad_(False)
    return Backbone(name=shape, family=family, model=model, tokenizer=None)


def large(shape: str, dtype: torch.dtype, device: torch.device) -> Backbone:
    """Made where it will be, with transformers' own initial weights: seconds on a GPU, nothing on the meta device."""
    attention.register()
    config = SHAPES[shape]()
    family = family_of(config, shape)
    with device:
        model = _model(family.loader, config, dtype, attention.NAME)
    return Backbone(name=shape, family=family, model=model.eval().requires_grad_(False), tokenizer=None)


def nbytes(shape: str, dtype: torch.dtype) -> int:
    """Of the weights of one model, tied ones once; none is made."""
    config = SHAPES[shape]()
    with torch.device("meta"):
        model = _model(family_of(config, shape).loader, config, dtype, "sdpa")
    if hasattr(model, "pooler"):
        model.pooler = None
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def sharing(shape: str, ours: Backbone, headed: bool = False) -> PreTrainedModel:
    """transformers' own model over the weights of `ours`, with torch's fused attention; `headed`, as a classifier."""
    with no_init_weights():
        plain = _model(ours.family.loader, SHAPES[shape](), ours.dtype, "sdpa")
        whole = _model("AutoModelForSequenceClassification", SHAPES[shape](), ours.dtype, "sdpa") if headed else plain
    if hasattr(plain, "pooler"):
        plain.pooler = None
    plain.load_state_dict(ours.model.state_dict(), assign=True)
    if headed:
        setattr(whole, ours.spec.prefix, plain)
        torch.nn.init.normal_(whole.classifier.weight, std=0.02)
        torch.nn.init.zeros_(whole.classifier.bias)
    return whole.to(ours.device).eval().requires_grad_(False)


def _model(loader: str, config: Any, dtype: torch.dtype, attention_name: str) -> PreTrainedModel:
    made = getattr(transformers, loader).from_config(
        copy.deepcopy(config), dtype=dtype, attn_implementation=attention_name
    )
    assert isinstance(made, PreTrainedModel)
    return made
