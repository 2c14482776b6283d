"""PEFT's configs of small checkpoints, one of each type."""

from collections.abc import Callable, Mapping
from typing import Any

import peft


def tuner(word: str, **told: Any) -> Any:
    return getattr(peft, f"{word}Config")(**({"target_modules": ["query", "intermediate.dense"]} | told))


def square(word: str, **told: Any) -> Any:
    """For methods that cut a weight into blocks: `intermediate.dense` has 25 outputs."""
    return tuner(word, target_modules=["query", "value"], **told)


MADE: Mapping[str, Callable[[], Any]] = {
    "LORA": lambda: tuner("Lora", r=2, lora_bias=True),
    "IA3": lambda: tuner("IA3", feedforward_modules=[]),
    "ADALORA": lambda: tuner("AdaLora", init_r=3, target_r=2, total_step=9),
    "DELORA": lambda: tuner("Delora", r=2),
    "GRALORA": lambda: square("Gralora", r=4, gralora_k=2, hybrid_r=2),
    "HRA": lambda: tuner("HRA", r=2),
    "MISS": lambda: tuner("Miss", r=2),
    "VERA": lambda: tuner("Vera", r=3),
    "PVERA": lambda: tuner("Pvera", r=3),
    "VBLORA": lambda: square("VBLoRA", r=2, num_vectors=5, vector_length=4, topk=2),
    "LOHA": lambda: tuner("LoHa", r=2),
    "LOKR": lambda: square("LoKr", r=2),
    "FOURIERFT": lambda: tuner("FourierFT", n_frequency=20),
    "WAVEFT": lambda: tuner("WaveFT", n_frequency=20),
    "C3A": lambda: square("C3A", block_size=4),
    "HIRA": lambda: tuner("Hira", r=2),
    "OFT": lambda: square("OFT", oft_block_size=4, r=0),
    "BOFT": lambda: square("BOFT", boft_block_size=4),
    "ROAD": lambda: square("Road", group_size=4),
    "SHIRA": lambda: tuner("Shira", r=2),
    "SUPERTUNING": lambda: tuner("Supertuning", r=2, sparsity=0.1, save_precomputed_indices=True),
    "LN_TUNING": lambda: peft.LNTuningConfig(target_modules=["LayerNorm"]),
    "BEFT": lambda: tuner("Beft"),
    "UNILORA": lambda: tuner("UniLora", r=2, theta_d_length=40, save_indices=True),
    "TINYLORA": lambda: tuner("TinyLora", r=2, u=4),
    "POLY": lambda: square("Poly", r=2, n_skills=3, n_splits=2),
    "RANDLORA": lambda: tuner("RandLora", r=3),
    "FROD": lambda: tuner("Frod", sparse_rate=0.1, progressbar=False),
    "PSOFT": lambda: tuner("Psoft", r=3),
    "OSF": lambda: tuner("OSF", effective_rank=13),
    "DEFT": lambda: tuner("Deft", r=2),
    "PEANUT": lambda: tuner("Peanut", r=2, depth=1),
    "GLORA": lambda: tuner("Glora", r=2),
    "TRAINABLE_TOKENS": lambda: tuner("TrainableTokens", target_modules=["word_embeddings"], token_indices=[3, 1]),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3),
    "CARTRIDGE": lambda: peft.CartridgeConfig(num_virtual_tokens=3),
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(num_virtual_tokens=3),
    "P_TUNING": lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8),
    "CPT": lambda: peft.CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[3, 4], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2]
    ),
    "MULTITASK_PROMPT_TUNING": lambda: peft.MultitaskPromptTuningConfig(num_virtual_tokens=3, num_ranks=2),
}
"""A small checkpoint of each type, on BERT; CPT is for causal language models alone."""
