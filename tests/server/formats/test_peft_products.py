"""Every type of PEFT at a linear: what its primitives compute is what PEFT's own module does, on rows of noise."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.nn import functional
from tuners import MADE, square, tuner

from deltaserve.backbone.model import Backbone
from deltaserve.deltas.primitives import Affine, Block, Dense, LowRank, Sparse
from deltaserve.errors import BadCheckpoint
from deltaserve.formats.peft import ofweight
from deltaserve.formats.peft.wavelets import FILTERS
from deltaserve.formats.registry import read
from deltaserve_kernels.testing import error_ratio


def applied(primitives: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The order of deltaserve.deltas.primitives, written down once more."""
    by = {type(primitive): primitive for primitive in primitives}
    blocks, affine = by.get(Block), by.get(Affine, Affine())
    if blocks is not None and not blocks.outputs:
        x = x @ diagonal(blocks.blocks)
    u = x if affine.in_scale is None else x * affine.in_scale
    dense = by.get(Dense)
    y = functional.linear(u, weight, bias) if dense is None or not dense.replace else 0
    if dense is not None:
        y = y + functional.linear(u, dense.weight, dense.bias)
    if LowRank in by:
        low = by[LowRank]
        hidden = u @ low.a.T
        if low.inner is not None:
            hidden = hidden * low.inner if low.inner.ndim == 1 else hidden @ low.inner.T
        y = y + low.scale * (1.0 if low.outer is None else low.outer) * (hidden @ low.b.T)
    if Sparse in by:
        index = by[Sparse].index.long()
        y = y + u @ torch.zeros_like(weight).index_put((index[0], index[1]), by[Sparse].values).T
    if blocks is not None and blocks.outputs:
        y = y @ diagonal(blocks.blocks)
    y = y if affine.scale is None else y * affine.scale
    return y if affine.shift is None else y + affine.shift


def diagonal(blocks: torch.Tensor) -> torch.Tensor:
    """The whole matrix; a number of a block that turns what stands apart is a diagonal of its own."""
    if blocks.ndim == 4:
        blocks = torch.diag_embed(blocks).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return torch.block_diag(*blocks)


MORE: Mapping[str, Callable[[], Any]] = {
    f"GLORA {of_weight} {of_inputs} {of_bias}": lambda told=(of_weight, of_inputs, of_bias): tuner(
        "Glora", r=2, config_A_B=told[0], config_C=told[1], config_D_E=told[2]
    )
    for of_weight in ("lora", "vector", "constant", "none")
    for of_inputs in ("lora", "vector", "none")
    for of_bias in ("constant", "vector", "none")
} | {
    "WAVEFT dense": lambda: tuner("WaveFT", n_frequency=200),
    "WAVEFT direct": lambda: tuner("WaveFT", n_frequency=20, use_idwt=False),
    "PEANUT silu": lambda: tuner("Peanut", r=2, act_fn="silu"),
    "PSOFT lowrank": lambda: tuner("Psoft", r=3, psoft_svd="lowrank", psoft_svd_lowrank_niter=2, random_seed=9),
    "GLORA biases": lambda: tuner("Glora", r=2, bias="glora_only", config_C="vector", config_D_E="vector"),
    "SUPERTUNING chosen again": lambda: tuner(
        "Supertuning", r=2, sparsity=0.3, select_top=False, save_precomputed_indices=False
    ),
    "DEFT wide": lambda: tuner("Deft", r=20, decomposition_method="qr"),
    "OSF none": lambda: tuner("OSF", effective_rank=16, rank_pattern={"query": 3}),
    "TINYLORA wide": lambda: tuner("TinyLora", r=30, u=4, weight_tying=1.0, save_projection=False),
    "OFT two": lambda: square("OFT", oft_block_size=4, r=0, num_cayley_neumann_terms=2),
}
MORE |= {f"PEANUT {act}": lambda act=act: tuner("Peanut", r=2, act_fn=act) for act in ofweight.ACTIVATIONS}
MORE |= {f"WAVEFT {name}": lambda name=name: tuner("WaveFT", n_frequency=20, wavelet_family=name) for name in FILTERS}
ELSEWHERE = {"LN_TUNING", "CPT", "CARTRIDGE", "TRAINABLE_TOKENS", "MULTITASK_PROMPT_TUNING"}
ELSEWHERE |= {"PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"}
"""Not at linear layers."""


@pytest.mark.parametrize("kind", [kind for kind in (*MADE, *MORE) if kind not in ELSEWHERE])
def test_each_linear_computes_what_pefts_does(kind: str, written: Any, backbones: Mapping[str, Backbone]) -> None:
    """Odd sizes, and options beside those of tests/parity, on rows of noise."""
    backbone = backbones["bert"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = (MADE | MORE)[kind]()
    spoilt = written("bert", config)
    compare(kind, spoilt, backbone, "AutoModel", "bert.")


HEADLESS = {"LORA", "PVERA", "IA3"}
"""Of LoRA there are tests of its own; the others are like VeRA, and have their feed-forward modules."""


@pytest.mark.parametrize("kind", [kind for kind in MADE if kind not in ELSEWHERE | HEADLESS])
def test_each_vocabulary_linear_computes_what_pefts_does(
    kind: str, written: Any, backbones: Mapping[str, Backbone]
) -> None:
    """With a targeted lm_head PEFT also saves the weight below it, whatever the type is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = MADE[kind]()
    config.target_modules, config.task_type = {"q_proj", "lm_head"}, "CAUSAL_LM"
    spoilt = written("opt", config)
    name = "base_model.model.lm_head.base_layer.weight"
    assert name in load_file(spoilt.folder / "adapter_model.safetensors")
    delta = compare(kind, spoilt, backbones["opt"], "AutoModelForCausalLM", "")
    assert "lm_head" in delta.at
    spoilt.tensors(lambda tensors: tensors[name].add_(0.1))
    with pytest.raises(BadCheckpoint, match=r"lm_head\.base_layer\.weight is not this backbone's"):
        read(spoilt.folder, backbones["opt"].spec, backbones["opt"].weights)


def compare(kind: str, spoilt: Any, backbone: Backbone, auto: str, prefix: str) -> Any:
    """Each module of the delta beside PEFT's, on rows of noise; returns the delta."""
    delta = read(spoilt.folder, backbone.spec, backbone.weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = getattr(transformers, auto).from_pretrained(backbone.name, dtype=torch.float32)
        model = peft.PeftModel.from_pretrained(plain, spoilt.folder).eval()
    told = {"task_ids": torch.zeros(1, dtype=torch.long)} if kind == "POLY" else {}
    assert delta.at
    for name, primitives in delta.at.items():
        site = backbone.spec.sites[name]
        x = torch.randn(1, 6, site.in_features, generator=torch.Generator().manual_seed(len(name)))
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = model.base_model.model.get_submodule(name.removeprefix(prefix))(x, **told)
        ours = applied(primitives, x, backbone.weights(name), site.bias)
        assert error_ratio(ours, theirs) <= 1e-5, name
    return delta
