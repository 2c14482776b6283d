"""Tiny models of every family, and PEFT's names for their modules."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import transformers
from transformers import BertConfig, GPT2Config, LlamaConfig, T5Config

VOCABULARY, SPECIAL = 96, 4


@dataclass(frozen=True)
class Family:
    """`auto` makes the plain model; `linears` and `ia3` (targets, feed-forward ones) are names of its modules.

    `stored`: the class whose checkpoint the backbone is, where `auto` lacks a part of it. `pooler`: a module in what
    stands between the base model and the heads of the tasks in `pooled`. `unable`: methods that PEFT cannot do on it.
    """

    name: str
    config: Callable[[], Any]
    auto: str
    task: str
    linears: tuple[str, ...]
    deep: str
    ia3: tuple[tuple[str, ...], tuple[str, ...]]
    prefix: Mapping[str, int] = field(default_factory=dict)
    encoder_decoder: bool = False
    embedding: str = "embed_tokens"
    norms: str = r".*norm.*|.*ln_.*|.*LayerNorm.*|.*layer_norm.*"
    stored: str = ""
    pooler: str = ""
    pooled: tuple[str, ...] = ()
    unable: tuple[str, ...] = ()
    few: bool = False
    """Only the methods in FEW, in `make test`."""


def _t5(**changes: Any) -> T5Config:
    sizes: dict[str, Any] = {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 48, "num_layers": 3}
    sizes |= {"vocab_size": VOCABULARY, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    return T5Config(**(sizes | changes))


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "t5", _t5, "AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM", ("q", "v", "wi", "wo"),
            r".*decoder.*\.(q|wo)", (("k", "v", "wo"), ("wo",)), encoder_decoder=True, embedding="shared",
        ),
        Family(
            "flan-t5",
            lambda: _t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False, d_kv=12, num_decoder_layers=3),
            "AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM", ("q", "v", "wi_0", "wo"), r".*EncDecAttention\.(k|o)",
            (("k", "v", "wo"), ("wo",)), {"token_dim": 48, "num_attention_heads": 4}, encoder_decoder=True,
        ),
        Family(
            "bert",
            lambda: BertConfig(
                vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
                intermediate_size=48, max_position_embeddings=64, hidden_act="gelu",
            ),
            "AutoModel", "FEATURE_EXTRACTION", ("query", "value", "dense"), r".*layer\.[12].*(key|output\.dense)",
            (("key", "value", "output.dense"), ("output.dense",)), embedding="word_embeddings",
            pooler="pooler.dense", pooled=("SEQ_CLS",),
        ),
        Family(
            "modernbert",
            lambda: transformers.ModernBertConfig(
                vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48,
                max_position_embeddings=96, local_attention=6, mlp_bias=True, classifier_bias=True, norm_bias=True,
                pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
            ),
            "AutoModel", "FEATURE_EXTRACTION", ("Wqkv", "Wo", "Wi"), r".*layers\.[13].*(Wqkv|mlp\.Wo)",
            (("Wqkv", "mlp.Wo"), ("mlp.Wo",)), embedding="tok_embeddings", stored="AutoModelForMaskedLM",
            pooler="head.dense", pooled=("SEQ_CLS", "TOKEN_CLS"),
            unable=("prefix", "prefix-projected", "cartridge", "lora-layers"),
            # The first layer has an Identity for its attn_norm, which PEFT cannot tune.
            norms=r".*(\.[1-9]\.attn_norm|mlp_norm|final_norm|embeddings\.norm)",
        ),
        Family(
            "gpt2",
            lambda: GPT2Config(
                vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=96, bos_token_id=1,
                eos_token_id=1, pad_token_id=0,
            ),
            "AutoModelForCausalLM", "CAUSAL_LM", ("c_attn", "c_fc", "c_proj"), r".*h\.1\..*c_proj",
            (("c_attn", "mlp.c_proj"), ("mlp.c_proj",)), embedding="wte",
        ),
        Family(
            "llama",
            lambda: LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=96, bos_token_id=1,
                eos_token_id=1, pad_token_id=0, tie_word_embeddings=False, attention_bias=True,
            ),
            "AutoModelForCausalLM", "CAUSAL_LM", ("q_proj", "v_proj", "down_proj"), r".*layers\.[02].*(k|up)_proj",
            (("k_proj", "v_proj", "down_proj"), ("down_proj",)),
        ),
    )
}  # fmt: skip


def _llama_like(name: str, word: str, **changes: Any) -> Family:
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    sizes |= {"max_position_embeddings": 96, "bos_token_id": 1, "eos_token_id": 1}
    linears = changes.pop("linears", ("q_proj", "v_proj", "down_proj"))
    embedding = changes.pop("embedding", "embed_tokens")
    return Family(
        name, lambda: getattr(transformers, f"{word}Config")(**(sizes | changes)), "AutoModelForCausalLM", "CAUSAL_LM",
        linears, rf".*\.1\..*{linears[0]}", ((linears[1], linears[2]), (linears[2],)), embedding=embedding, few=True,
    )  # fmt: skip


for _family in (
    Family(
        "roberta",
        lambda: transformers.RobertaConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
            max_position_embeddings=66, pad_token_id=1, bos_token_id=0, eos_token_id=2,
        ),
        "AutoModel", "FEATURE_EXTRACTION", ("query", "value", "dense"), r".*layer\.1.*(key|output\.dense)",
        (("key", "value", "output.dense"), ("output.dense",)), embedding="word_embeddings", few=True,
    ),
    _llama_like("mistral", "Mistral", sliding_window=9),
    _llama_like("qwen2", "Qwen2"),
    _llama_like("qwen3", "Qwen3", head_dim=12),
    _llama_like("gemma", "Gemma", head_dim=16),
    _llama_like("gemma2", "Gemma2", head_dim=16, sliding_window=6, final_logit_softcapping=8.0),
    _llama_like("gemma3", "Gemma3Text", head_dim=16, sliding_window=6, sliding_window_pattern=2),
    _llama_like("phi3", "Phi3", linears=("qkv_proj", "o_proj", "down_proj")),
    _llama_like(
        "opt", "OPT", ffn_dim=48, word_embed_proj_dim=32, linears=("q_proj", "v_proj", "fc2"), num_key_value_heads=4
    ),
    _llama_like("gpt-neox", "GPTNeoX", linears=("query_key_value", "dense_h_to_4h", "dense"), num_key_value_heads=4,
                embedding="embed_in"),
):  # fmt: skip
    FAMILIES[_family.name] = _family
