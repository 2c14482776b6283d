"""The library's configs by name, and what is missing in one: a file may hold a name alone, or leave defaults out."""

from collections.abc import Mapping
from typing import Any

_BOTTLENECK: Mapping[str, Any] = {
    "mh_adapter": False,
    "output_adapter": False,
    "cross_adapter": False,
    "reduction_factor": None,
    "non_linearity": None,
    "original_ln_before": False,
    "original_ln_after": True,
    "ln_before": False,
    "ln_after": False,
    "is_parallel": False,
    "scaling": 1.0,
    "use_gating": False,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
    "inv_adapter": None,
    "inv_adapter_reduction_factor": None,
    "leave_out": [],
    "phm_layer": False,
    "phm_dim": 4,
    "factorized_phm_W": True,
    "shared_W_phm": False,
    "shared_phm_rule": True,
    "factorized_phm_rule": False,
    "phm_rank": 1,
    "phm_bias": True,
}
_LOW_RANK: Mapping[str, Any] = {
    "selfattn_lora": True,
    "intermediate_lora": False,
    "output_lora": False,
    "leave_out": [],
    "r": 8,
    "alpha": 8,
    "attn_matrices": ["q", "v"],
    "composition_mode": "add",
    "use_gating": False,
    "use_dora": False,
    "vera_d": None,
    "vera_b": None,
}
DEFAULTS: Mapping[str | None, Mapping[str, Any]] = {
    None: _BOTTLENECK,
    "prefix_tuning": {
        "encoder_prefix": True,
        "cross_prefix": True,
        "leave_out": [],
        "flat": False,
        "prefix_length": 30,
        "bottleneck_size": 512,
        "non_linearity": "tanh",
        "use_gating": False,
        "shared_gating": True,
    },
    "prompt_tuning": {"prompt_length": 10, "combine": "prefix"},
    "lora": _LOW_RANK,
    "mtl_lora": {
        **_LOW_RANK,
        "n_up_projection": 1,
        "task_specific_matrix_type": "singular_values",
        "weights_sharpness": 0.05,
    },
    "reft": {
        "layers": None,
        "prefix_positions": None,
        "suffix_positions": None,
        "r": None,
        "orthogonality": None,
        "tied_weights": False,
        "subtract_projection": True,
        "non_linearity": None,
    },
}
"""Of each architecture, where its own dataclass has them; None is a bottleneck."""

_SEQ = {"original_ln_before": True, "output_adapter": True, "non_linearity": "relu", "reduction_factor": 16}
_DOUBLE = {"mh_adapter": True, "output_adapter": True, "non_linearity": "swish", "reduction_factor": 16}
_PARALLEL = {
    "output_adapter": True,
    "non_linearity": "relu",
    "reduction_factor": 2,
    "is_parallel": True,
    "scaling": 4.0,
}
_INVERTIBLE = {"inv_adapter": "nice", "inv_adapter_reduction_factor": 2}
_COMPACTER = {"phm_layer": True, "reduction_factor": 32, "non_linearity": "gelu"}
_LORA = {"architecture": "lora"}
_VERA = {**_LORA, "vera_d": 0.1, "vera_b": 0.0}
_REFT = {
    "architecture": "reft",
    "layers": "all",
    "prefix_positions": 3,
    "suffix_positions": 0,
    "r": 1,
    "orthogonality": False,
}
_GATED = {"use_gating": True}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "seq_bn": _SEQ,
    "pfeiffer": _SEQ,
    "seq_bn_inv": {**_SEQ, **_INVERTIBLE},
    "pfeiffer+inv": {**_SEQ, **_INVERTIBLE},
    "double_seq_bn": _DOUBLE,
    "houlsby": _DOUBLE,
    "double_seq_bn_inv": {**_DOUBLE, **_INVERTIBLE},
    "houlsby+inv": {**_DOUBLE, **_INVERTIBLE},
    "par_bn": _PARALLEL,
    "parallel": _PARALLEL,
    "scaled_par_bn": {**_PARALLEL, "scaling": "learned"},
    "scaled_parallel": {**_PARALLEL, "scaling": "learned"},
    "compacter": {**_DOUBLE, **_COMPACTER},
    "compacter++": {**_SEQ, **_COMPACTER},
    "prefix_tuning": {"architecture": "prefix_tuning"},
    "prefix_tuning_flat": {"architecture": "prefix_tuning", "flat": True},
    "prompt_tuning": {"architecture": "prompt_tuning"},
    "lora": _LORA,
    "ia3": {
        **_LORA,
        "intermediate_lora": True,
        "r": 1,
        "alpha": 1,
        "attn_matrices": ["k", "v"],
        "composition_mode": "scale",
    },
    "dora": {**_LORA, "use_dora": True},
    "vera": _VERA,
    "dvora": {**_VERA, "use_dora": True},
    "mtl_lora": {"architecture": "mtl_lora"},
    "loreft": {**_REFT, "orthogonality": True},
    "noreft": _REFT,
    "direft": {**_REFT, "subtract_projection": False},
    "mam": {
        "architecture": "union",
        "configs": [{"architecture": "prefix_tuning", "bottleneck_size": 800}, _PARALLEL],
    },
    "unipelt": {
        "architecture": "union",
        "configs": [
            {"architecture": "prefix_tuning", "prefix_length": 10, **_GATED},
            {**_SEQ, **_GATED},
            {**_LORA, "alpha": 2, **_GATED},
        ],
    },
}
"""What the library's names for its configs mean."""
