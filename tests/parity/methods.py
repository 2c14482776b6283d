"""PEFT's methods and options, a config each, and which of them are tried where."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import peft
from families import FAMILIES, SPECIAL, Family

from deltaserve.formats.wanted import Wanted

Make = Callable[[Family], Any]


def _tuner(word: str, **told: Any) -> Make:
    """`peft.<word>Config`; a callable is given the family."""

    def make(family: Family) -> Any:
        chosen = {"target_modules": list(family.linears[:2])} | told
        return getattr(peft, f"{word}Config")(**{key: v(family) if callable(v) else v for key, v in chosen.items()})

    return make


def _lora(**told: Any) -> Make:
    return _tuner("Lora", **({"r": 4, "lora_alpha": 6} | told))


def _ia3(family: Family) -> Any:
    return peft.IA3Config(target_modules=list(family.ia3[0]), feedforward_modules=list(family.ia3[1]))


def _cpt(family: Family) -> Any:
    return peft.CPTConfig(
        task_type=family.task, cpt_token_ids=[9, 30, 7, 50, 11], cpt_mask=[1] * 5, cpt_tokens_type_mask=[1, 2, 2, 3, 4],
        opt_projection_epsilon=2.0, opt_projection_format_epsilon=1.0,
    )  # fmt: skip


def _head_by_pattern(family: Family) -> str:
    """PEFT finds again by it what is tied to any family's embedding."""
    return rf"(.*\.)?lm_head|.*{family.linears[0]}"


NORM = {"t5": "layer_norm", "flan-t5": "final_layer_norm", "bert": "LayerNorm", "gpt2": "ln_2", "llama": "norm"}
NORM |= {"modernbert": "attn_norm"}
"""A norm of each family that is tried in full."""

INVOCATION = (30, 7)
"""What the activated LoRA of these tests are invoked by."""

METHODS: Mapping[str, Make] = {
    "lora": _lora(),
    "lora-rslora": _lora(use_rslora=True, r=5, target_modules=lambda f: list(f.linears)),
    "lora-patterns": _lora(
        target_modules=lambda f: list(f.linears),
        rank_pattern=lambda f: {f.linears[0]: 7, f.linears[-1]: 2},
        alpha_pattern=lambda f: {f.linears[1]: 11},
    ),
    "lora-layers": _lora(layers_to_transform=[1]),
    "lora-regex": _lora(target_modules=lambda f: f.deep),
    "lora-all-linear": _lora(target_modules="all-linear", r=3),
    "lora-own-bias": _lora(lora_bias=True),
    "lora-bias-only": _lora(bias="lora_only"),
    "lora-bias-all": _lora(bias="all", target_modules=lambda f: list(f.linears)),
    "dora": _lora(use_dora=True, target_modules=lambda f: list(f.linears)),
    "dora-bias": _lora(use_dora=True, bias="lora_only"),
    "pissa": _lora(init_lora_weights="pissa"),
    "adalora": _tuner("AdaLora", init_r=5, target_r=3, lora_alpha=7, total_step=10),
    "vera": _tuner("Vera", r=6, target_modules=lambda f: list(f.linears)),
    "vera-drawn": _tuner("Vera", r=6, save_projection=False, projection_prng_key=5),
    "pvera": _tuner("Pvera", r=4),
    "vblora": _tuner("VBLoRA", r=3, num_vectors=8, vector_length=8, topk=2),
    "vblora-topk": _tuner("VBLoRA", r=3, num_vectors=8, vector_length=8, topk=3, save_only_topk_weights=True),
    "gralora": _tuner("Gralora", r=4, gralora_k=2, alpha=6),
    "gralora-hybrid": _tuner("Gralora", r=4, gralora_k=2, alpha=6, hybrid_r=2),
    "fourierft": _tuner("FourierFT", n_frequency=60, scaling=30.0),
    "hira": _tuner("Hira", r=4),
    "lora-embedding": _lora(target_modules=lambda f: [f.linears[0], f.embedding]),
    "dora-embedding": _lora(use_dora=True, target_modules=lambda f: [f.linears[0], f.embedding]),
    "lora-tokens": _lora(trainable_token_indices=lambda f: {f.embedding: [SPECIAL + 9, SPECIAL + 2, SPECIAL]}),
    "tokens": _tuner("TrainableTokens", target_modules=lambda f: [f.embedding], token_indices=list(range(40, 4, -1))),
    "ln-tuning": lambda f: peft.LNTuningConfig(target_modules=f.norms),
    "ia3": _ia3,
    "randlora": _tuner("RandLora", r=6, randlora_alpha=6, target_modules=lambda f: list(f.linears)),
    "waveft": _tuner("WaveFT", n_frequency=70, scaling=10.0),
    "waveft-direct": _tuner("WaveFT", n_frequency=50, scaling=5.0, use_idwt=False, proportional_parameters=True),
    "unilora": _tuner("UniLora", r=4, theta_d_length=500, proj_seed=3),
    "unilora-saved": _tuner("UniLora", r=3, theta_d_length=400, save_indices=True),
    "tinylora": _tuner("TinyLora", r=3, u=16, target_modules=lambda f: list(f.linears)),
    "tinylora-tied": _tuner("TinyLora", r=2, u=16, weight_tying=0.6, save_projection=False, projection_seed=9),
    "deft": _tuner("Deft", r=4, alpha=6),
    "deft-qr": _tuner("Deft", r=4, decomposition_method="qr", bias="deft_only"),
    "deft-para": _tuner("Deft", r=4, para=True),
    "frod": _tuner("Frod", sparse_rate=0.05, progressbar=False),
    "mica": _lora(init_lora_weights="mica"),
    "velora": _lora(velora_config=lambda f: peft.VeloraConfig(num_groups=8)),
    "monteclora": _lora(monteclora_config=lambda f: peft.MontecloraConfig(num_samples=2, buffer_size=2)),
    "lora-parameters": _lora(
        target_modules=[], target_parameters=lambda f: [f"{f.linears[0]}.weight", f"{f.linears[-1]}.weight"]
    ),
    "lora-saved-norm": _lora(modules_to_save=lambda f: [NORM[f.name]]),
    "lora-saved-embedding": _lora(modules_to_save=lambda f: ["embed_tokens" if f.encoder_decoder else f.embedding]),
    "cartridge": lambda f: peft.CartridgeConfig(num_virtual_tokens=5, num_frozen_tokens=2, **f.prefix),
    "prefix": lambda f: peft.PrefixTuningConfig(num_virtual_tokens=5, **f.prefix),
    "prefix-projected": lambda f: peft.PrefixTuningConfig(
        num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=16, **f.prefix
    ),
    "prompt": lambda f: peft.PromptTuningConfig(num_virtual_tokens=6),
    "p-tuning": lambda f: peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=16),
    "lora-tied": _lora(target_modules=_head_by_pattern, ensure_weight_tying=True),
    "dora-tied": _lora(target_modules=_head_by_pattern, ensure_weight_tying=True, use_dora=True),
    "lora-parameters-embedding": _lora(
        target_modules=[], target_parameters=lambda f: [f"{f.linears[0]}.weight", f"{f.embedding}.weight"]
    ),
    "lora-parameters-pissa": _lora(
        target_modules=[], init_lora_weights="pissa", target_parameters=lambda f: [f"{f.linears[0]}.weight"]
    ),
    "adalora-tokens": _tuner(
        "AdaLora",
        init_r=5,
        target_r=3,
        total_step=10,
        trainable_token_indices=lambda f: {f.embedding: [SPECIAL + 7, SPECIAL + 1]},
    ),
    "tinylora-embedding": _tuner("TinyLora", r=3, u=16, target_modules=lambda f: [f.linears[0], f.embedding]),
    "hira-embedding": _tuner("Hira", r=4, target_modules=lambda f: [*f.linears, f.embedding]),
    "waveft-sym4": _tuner("WaveFT", n_frequency=50, scaling=10.0, wavelet_family="sym4"),
}
LINEAR_ONLY: Mapping[str, Make] = {
    "kasa": _lora(kasa_config=lambda f: peft.KasaConfig()),
    "delora": _tuner("Delora", r=4),
    "hra": _tuner("HRA", r=4),
    "hra-orthogonal": _tuner("HRA", r=4, apply_GS=True),
    "miss": _tuner("Miss", r=4),
    "miss-bat": _tuner("Miss", r=4, init_weights="bat"),
    "miss-mini": _tuner("Miss", r=4, mini_r=4, init_weights="mini"),
    "loha": _tuner("LoHa", r=3, alpha=40),
    "loha-small": _tuner("LoHa", r=2, alpha=40),
    "lokr": _tuner("LoKr", r=2, alpha=5),
    "lokr-both": _tuner("LoKr", r=1, alpha=2, decompose_both=True, decompose_factor=4),
    "c3a": _tuner("C3A", block_size=8),
    "oft": _tuner("OFT", oft_block_size=8, r=0),
    "oft-cayley": _tuner("OFT", oft_block_size=4, r=0, use_cayley_neumann=False),
    "oft-coft": _tuner("OFT", oft_block_size=8, r=0, coft=True, eps=0.3),
    "oft-series": _tuner("OFT", oft_block_size=4, r=0, num_cayley_neumann_terms=3),
    "oft-shared": _tuner("OFT", oft_block_size=8, r=0, block_share=True),
    "boft": _tuner("BOFT", boft_block_size=8),
    "road-1": _tuner("Road", variant="road_1", group_size=8),
    "road-2": _tuner("Road", variant="road_2", group_size=8),
    "road-4": _tuner("Road", variant="road_4", group_size=4),
    "shira": _tuner("Shira", r=4),
    "supertuning": _tuner("Supertuning", sparsity=0.05, save_precomputed_indices=True),
    "supertuning-lora": _tuner("Supertuning", sparsity=0.02, r=3, lora_alpha=5, save_precomputed_indices=True),
    "beft": _tuner("Beft"),
    "olora": _lora(init_lora_weights="olora", target_modules=lambda f: list(f.linears)),
    "bdlora": _lora(
        target_modules=lambda f: list(f.linears),
        use_bdlora=lambda f: peft.BdLoraConfig(
            target_modules_bd_a=[f.linears[0]], target_modules_bd_b=[f.linears[1]], nblocks=2, match_strict=False
        ),
    ),
    "glora": _tuner("Glora", r=4),
    "glora-vector": _tuner(
        "Glora", target_modules=lambda f: [f.linears[1]], config_A_B="vector", config_C="vector", config_D_E="vector"
    ),
    "peanut": _tuner("Peanut", r=6, act_fn="gelu"),
    "peanut-deep": _tuner("Peanut", r=4, depth=2, scaling=2.0),
    "psoft": _tuner("Psoft", r=6, psoft_alpha=9),
    "psoft-series": _tuner(
        "Psoft", r=5, ab_svd_init="pissa_init", use_cayley_neumann=True, cayley_neumann_eps=0.4, psoft_mag_a=False
    ),
    "psoft-free": _tuner("Psoft", r=4, psoft_orth=False, psoft_mag_b=False),
    "poly": _tuner("Poly", r=4, n_skills=3, n_splits=2),
    "poly-tasks": _tuner("Poly", r=3, n_skills=2, n_splits=2, n_tasks=3),
    "osf": _tuner("OSF", effective_rank=0.8),
    "osf-half": _tuner("OSF"),
    "oft-embedding": _tuner("OFT", oft_block_size=8, r=0, target_modules=lambda f: [f.linears[0], f.embedding]),
    "supertuning-chosen-again": _tuner("Supertuning", sparsity=0.9, save_precomputed_indices=False),
    "glora-biases": _tuner("Glora", r=4, bias="all", config_C="vector", config_D_E="vector"),
    "psoft-lowrank": _tuner("Psoft", r=6, psoft_svd="lowrank", random_seed=5),
}
"""PEFT does these at nn.Linear alone, so not on GPT-2."""
GENERATING: Mapping[str, Make] = {
    "lora-lm-head": _lora(target_modules=lambda f: [f.linears[0], "lm_head"]),
    "lora-saved-head": _lora(modules_to_save=lambda f: ["lm_head"]),
    "pissa-lm-head": _lora(target_modules=lambda f: [f.linears[0], "lm_head"], init_lora_weights="pissa"),
    "tinylora-lm-head": _tuner("TinyLora", r=3, u=16, target_modules=lambda f: [f.linears[0], "lm_head"]),
    "lora-tokens-apart": _lora(
        trainable_token_indices=lambda f: {f.embedding: [SPECIAL + 9, SPECIAL], "lm_head": [SPECIAL + 3, SPECIAL + 20]}
    ),
}
DECODERS: Mapping[str, Make] = {
    "cpt": _cpt,
    "multitask-prompt": lambda f: peft.MultitaskPromptTuningConfig(num_virtual_tokens=4, num_ranks=3),
    "alora": _lora(alora_invocation_tokens=list(INVOCATION)),
    "alora-lm-head": _lora(
        alora_invocation_tokens=list(INVOCATION), lora_bias=True, target_modules=lambda f: [*f.linears, "lm_head"]
    ),
    "lora-tied-saved": _lora(modules_to_save=lambda f: ["lm_head"], ensure_weight_tying=True),
    "multitask-prompt-tasks": lambda f: peft.MultitaskPromptTuningConfig(
        num_virtual_tokens=3, num_ranks=2, num_tasks=3
    ),
}
"""PEFT does these at causal language models alone."""
POOLED: Mapping[str, Make] = {
    "lora-pooler": _lora(target_modules=lambda f: [f.linears[0], f.pooler]),
    "lora-saved-pooler": _lora(modules_to_save=lambda f: [f.pooler.partition(".")[0]]),
}
"""Tried where a head reads what the backbone's pooler makes."""
TASK_IDS = {"poly-tasks": 2, "multitask-prompt-tasks": 2}
"""Methods whose checkpoints are for several tasks, and the one that is tried: the last."""
HEADED = ("lora", "lora-bias-all", "ia3", "prefix", "prompt")
HEADS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
NO_HEAD = {"TOKEN_CLS": ("gemma3", "opt"), "QUESTION_ANS": ("modernbert", "gemma", "gemma2", "gemma3", "phi3")}
"""transformers has no class for it; or PEFT does not save the head that its class has: see test_heads.py."""
ENCODERS = ("bert", "roberta", "modernbert")
FEW = ("lora-all-linear", "dora", "lora-bias-all", "ia3", "prefix", "prompt", "lora-lm-head")
FEW += ("lora-embedding", "dora-embedding", "lora-tokens", "tokens", "ln-tuning", "oft", "shira")
"""What is tried on a family that another one much like it covers in full."""


@dataclass(frozen=True)
class Case:
    """One delta; `task` is PEFT's task_type."""

    family: str
    method: str
    task: str

    @property
    def name(self) -> str:
        return f"{self.method}.{self.task.lower().replace('_', '-')}"

    @property
    def wanted(self) -> Wanted:
        """What an operator says of its checkpoint."""
        return Wanted(task_id=TASK_IDS.get(self.method))


def cases(family: str) -> list[Case]:
    """Every delta that is tried on a family."""
    row = FAMILIES[family]
    methods = [*METHODS, *(LINEAR_ONLY if family != "gpt2" else ()), *(GENERATING if family not in ENCODERS else ())]
    methods += DECODERS if row.task == "CAUSAL_LM" else ()
    plain = [Case(family, method, row.task) for method in methods if method in FEW or not row.few]
    tasks = () if row.encoder_decoder else [task for task in HEADS if family not in NO_HEAD.get(task, ())]
    headed = [
        Case(family, method, task)
        for task in tasks
        for method in HEADED
        # PEFT cannot give a prompt to transformers' token classifiers of decoders.
        if family in ENCODERS or (task, method) != ("TOKEN_CLS", "prompt")
    ]
    pooled = [Case(family, method, task) for task in row.pooled for method in POOLED]
    return [case for case in plain + headed + pooled if case.method not in row.unable]


def covering(family: str) -> list[Case]:
    """A part of `cases`: the families that are tried in full share the methods, the others get what differs most."""
    whole = cases(family)
    if FAMILIES[family].few:
        return [case for case in whole if case.method in FEWEST]
    return [case for case in whole if case.method in (*FEWEST, *POOLED) or _share(case) == family]


FEWEST = ("lora-all-linear", "ia3", "prefix", "prompt")


def _share(case: Case) -> str:
    """The family whose turn a method is, among those that PEFT can do it on."""
    able = [f for f, row in FAMILIES.items() if not row.few and any(c.method == case.method for c in cases(f))]
    every = [*METHODS, *LINEAR_ONLY, *GENERATING, *DECODERS]
    return able[every.index(case.method) % len(able)]


def config(case: Case) -> Any:
    """PEFT's config of a case."""
    made = (METHODS | LINEAR_ONLY | GENERATING | DECODERS | POOLED)[case.method](FAMILIES[case.family])
    made.task_type = case.task
    return made
