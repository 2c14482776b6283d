"""What is tried with AdapterHub's library: configs, compositions and heads by name, and which family tries which.

Needs the library where a case is made; its tables of names need nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Make = Callable[[], Any]
"""An adapter's config, made when the library is there."""

POST_NORM, ENCODERS = ("bert", "roberta"), ("bert", "roberta")
SEQ2SEQ = ("t5", "flan-t5")
HOOKED = ("qwen3", "gemma2")
FULL = ("bert", "t5", "gpt2", "llama")
"""Tried in full; the others try what their modules or their norms make different."""


@dataclass(frozen=True)
class Case:
    """One delta.

    `adapters`: a config for each adapter by its name. `block`: what is active, as the name of a composition block and
    its members; none: the one adapter. `fused`: config of a fusion of all that the block fuses. `head`: a method of the
    library's flexible models and its arguments, or the name of transformers' class. `flexible`: made from the
    library's own model class, as one with a head is. `merged`: how several become one before saving.
    """

    name: str
    adapters: Mapping[str, Make]
    block: Callable[[Any], Any] | None = None
    fused: Mapping[str, Any] | None = None
    head: tuple[str, Mapping[str, Any]] | None = None
    static: str | None = None
    flexible: bool = False
    merged: Mapping[str, Any] | None = None
    ejected: bool = False
    pickled: bool = False
    reading: str | None = None
    texts: int = field(default=0)


def _config(word: str, **told: Any) -> Make:
    def make() -> Any:
        import adapters

        return getattr(adapters, f"{word}Config")(**told)

    return make


def _bn(word: str, **told: Any) -> Make:
    return _config(word, **({"reduction_factor": 4} | told))


def _union(*parts: Make) -> Make:
    def make() -> Any:
        import adapters

        return adapters.ConfigUnion(*[part() for part in parts])

    return make


def _reft(word: str, **told: Any) -> Make:
    return _config(word, **({"r": 2, "prefix_positions": 3, "suffix_positions": 2} | told))


def _prefix(**told: Any) -> Make:
    return _config("PrefixTuning", **({"prefix_length": 5, "bottleneck_size": 12} | told))


SEQ, HOULSBY, PAR = _bn("SeqBn"), _bn("DoubleSeqBn"), _bn("ParBn", scaling=1.5)
LORA = _config("LoRA", r=3, alpha=5)
GATED = {"use_gating": True}

SINGLE: Mapping[str, Make] = {
    "double_seq_bn": HOULSBY,
    "double_seq_bn_lnbefore": _bn("DoubleSeqBn", original_ln_before=True),
    "seq_bn": SEQ,
    "seq_bn_leakyrelu": _bn("SeqBn", non_linearity="leakyrelu"),
    "seq_bn_gelu_new": _bn("SeqBn", non_linearity="gelu_new"),
    "seq_bn_gelu": _bn("SeqBn", non_linearity="gelu"),
    "seq_bn_tanh": _bn("SeqBn", non_linearity="tanh"),
    "seq_bn_linear": _bn("SeqBn", non_linearity=None),
    "seq_bn_resid_after_ln": _bn("SeqBn", residual_before_ln=False),
    "seq_bn_post_add": _bn("SeqBn", residual_before_ln="post_add"),
    "seq_bn_ln_before": _bn("SeqBn", ln_before=True),
    "seq_bn_ln_after": _bn("SeqBn", ln_after=True),
    "seq_bn_ln_after_resid_inside": _bn("SeqBn", ln_after=True, adapter_residual_before_ln=True),
    "seq_bn_no_orig_ln_after": _bn("SeqBn", original_ln_after=False),
    "seq_bn_scale": _bn("SeqBn", scaling=2.5),
    "seq_bn_scale_learned": _bn("SeqBn", scaling="learned"),
    "seq_bn_scale_channel": _bn("SeqBn", scaling="channel"),
    "seq_bn_adapterdrop": _bn("SeqBn", leave_out=[0]),
    "seq_bn_reduction_map": _bn("SeqBn", reduction_factor={"0": 2, "1": 0.5, "default": 8}),
    "seq_bn_gating": _bn("SeqBn", **GATED),
    "seq_bn_glow": _bn("SeqBn", inv_adapter="glow", inv_adapter_reduction_factor=2),
    "seq_bn_inv": _bn("SeqBn", inv_adapter="nice", inv_adapter_reduction_factor=2),
    "adapter_plus": _bn("AdapterPlus", stochastic_depth=0.0),
    "par_bn": PAR,
    "par_bn_both": _bn("ParBn", mh_adapter=True),
    "par_bn_ln_after": _bn("ParBn", ln_after=True, ln_before=True),
    "scaled_par_bn": _bn("ParBn", scaling="learned"),
    "compacter": _bn("CompacterPlusPlus", mh_adapter=True),
    "compacter_pp": _bn("CompacterPlusPlus"),
    "compacter_own_rule": _bn("CompacterPlusPlus", shared_phm_rule=False),
    "compacter_factor_rule": _bn("CompacterPlusPlus", factorized_phm_rule=True),
    "compacter_own_factor_rule": _bn("CompacterPlusPlus", factorized_phm_rule=True, shared_phm_rule=False),
    "compacter_shared_w": _bn("CompacterPlusPlus", shared_W_phm=True),
    "compacter_full_w": _bn("CompacterPlusPlus", factorized_phm_W=False),
    "compacter_rank2": _bn("CompacterPlusPlus", phm_rank=2, phm_dim=2),
    "lora": LORA,
    "lora_all": _config("LoRA", r=3, alpha=5, intermediate_lora=True, output_lora=True, attn_matrices=["q", "k", "v"]),
    "lora_q_only": _config("LoRA", r=3, alpha=5, attn_matrices=["q"]),
    "lora_kv": _config("LoRA", r=2, alpha=6, attn_matrices=["k", "v"], leave_out=[1]),
    "lora_gating": _config("LoRA", r=3, alpha=5, **GATED),
    "ia3": _config("IA3"),
    "ia3_alpha": _config("IA3", alpha=2, output_lora=True),
    "vera": _config("Vera", r=4, alpha=6),
    "dora": _config("DoRA", r=3, alpha=5, intermediate_lora=True),
    "dvora": _config("DvoRA", r=4, alpha=6),
    "mtl_lora": _config("MTLLoRA", r=3, alpha=5, n_up_projection=3),
    "prefix_mlp": _prefix(),
    "prefix_flat": _prefix(flat=True),
    "prefix_ejected": _prefix(),
    "prefix_leave_out_0": _prefix(flat=True, leave_out=[0]),
    "prefix_leave_out_1": _prefix(flat=True, leave_out=[1]),
    "prefix_gated": _prefix(flat=True, **GATED),
    "prefix_gated_two": _prefix(flat=True, shared_gating=False, **GATED),
    "prompt": _config("PromptTuning", prompt_length=4),
    "prompt_after_bos": _config("PromptTuning", prompt_length=4, combine="prefix_after_bos"),
    "loreft": _reft("LoReft"),
    "loreft_first": _reft("LoReft", suffix_positions=0),
    "loreft_tied": _reft("LoReft", tied_weights=True),
    "loreft_layer1": _reft("LoReft", layers=[1], suffix_positions=0),
    "loreft_gelu": _reft("LoReft", suffix_positions=0, non_linearity="gelu"),
    "noreft": _reft("NoReft", suffix_positions=0),
    "direft": _reft("DiReft", suffix_positions=0),
    "mam": _union(_prefix(), _bn("ParBn", scaling=2.0)),
    "unipelt": _union(
        _config("LoRA", r=3, alpha=5, **GATED), _prefix(flat=True, **GATED), _bn("SeqBn", **GATED)
    ),
    "union_lora_bn": _union(LORA, SEQ),
    "union_ia3_houlsby": _union(_config("IA3"), HOULSBY),
}  # fmt: skip
SEQ2SEQ_ONLY: Mapping[str, Make] = {
    "cross_adapter": _bn("DoubleSeqBn", cross_adapter=True),
    "cross_adapter_par": _bn("ParBn", cross_adapter=True, mh_adapter=True),
    "cross_adapter_seq": _bn("SeqBn", cross_adapter=True),
    "prefix_dec_only": _prefix(flat=True, encoder_prefix=False, cross_prefix=False),
    "prefix_no_cross": _prefix(flat=True, cross_prefix=False),
    "prefix_leave_out_4": _prefix(flat=True, leave_out=[2, 4]),
}


def _stack(*names: str) -> Callable[[Any], Any]:
    return lambda blocks: blocks.Stack(*names)


def _fuse(*names: str) -> Callable[[Any], Any]:
    return lambda blocks: blocks.Fuse(*names)


def _average(**told: Any) -> Callable[[Any], Any]:
    return lambda blocks: blocks.Average("a", "b", **told)


def _fusion(name: str, first: Make, second: Make, third: Make | None = None, **told: Any) -> Case:
    made = {"a": first, "b": second} | ({} if third is None else {"c": third})
    return Case(name, made, _fuse(*made), {"which": "dynamic", **told})


SMALL = _bn("SeqBn", reduction_factor=8, non_linearity="gelu")
COMPOSED = (
    _fusion("fusion_dynamic", SEQ, SMALL),
    _fusion("fusion_three", SEQ, SMALL, _bn("SeqBn", ln_before=True, scaling=2.0)),
    _fusion("fusion_static", SEQ, SMALL, which="static"),
    _fusion("fusion_houlsby", HOULSBY, _bn("DoubleSeqBn", reduction_factor=8)),
    _fusion("fusion_par", PAR, _bn("ParBn", reduction_factor=8)),
    _fusion("fusion_residual_before", SEQ, SMALL, residual_before=True),
    _fusion("fusion_query_before_ln", SEQ, SMALL, query_before_ln=True),
    _fusion("fusion_value_after", SEQ, SMALL, value_before_softmax=False),
    _fusion("fusion_temperature", SEQ, SMALL, temperature=True),
    Case("stack_bn", {"a": SEQ, "b": SMALL}, _stack("a", "b")),
    Case("stack_houlsby_seq", {"a": HOULSBY, "b": SMALL}, _stack("a", "b")),
    Case("stack_par_seq", {"a": PAR, "b": SMALL}, _stack("a", "b")),
    Case("stack_seq_par", {"a": SEQ, "b": PAR}, _stack("a", "b")),
    Case("stack_lora", {"a": LORA, "b": _config("LoRA", r=2, alpha=3)}, _stack("a", "b")),
    Case("stack_lora_bn", {"a": LORA, "b": SEQ}, _stack("a", "b")),
    Case("stack_prefix", {"a": _prefix(flat=True), "b": _prefix(flat=True, prefix_length=3)}, _stack("a", "b")),
    Case(
        "stack_reft",
        {"a": _reft("LoReft", suffix_positions=0), "b": _reft("LoReft", suffix_positions=0)},
        _stack("a", "b"),
    ),
    Case(
        "stack_fuse", {"a": SEQ, "b": SMALL, "c": SEQ}, lambda blocks: blocks.Stack("a", blocks.Fuse("b", "c")),
        {"which": "dynamic"},
    ),
    Case("average_bn", {"a": SEQ, "b": SMALL}, _average(weights=[1.0, 3.0])),
    Case("average_bn_raw", {"a": SEQ, "b": SMALL}, _average(weights=[0.9, 0.6], normalize_weights=False)),
    Case("average_lora", {"a": LORA, "b": _config("LoRA", r=2, alpha=3)}, _average(weights=[1.0, 2.0])),
    Case("merge_bn", {"a": SEQ, "b": SEQ}, merged={"weights": [0.3, 0.7]}),
    Case("merge_lora", {"a": LORA, "b": LORA}, merged={"weights": [0.3, 0.7]}),
    Case(
        "merge_lora_svd", {"a": LORA, "b": LORA},
        merged={"weights": [0.3, 0.7], "combine_strategy": "lora_delta_w_svd", "svd_rank": 4},
    ),
)  # fmt: skip


def _headed(name: str, adapter: Make, method: str, reading: str, **told: Any) -> Case:
    return Case(name, {"a": adapter}, head=(f"add_{method}_head", told), reading=reading, flexible=True)


LABELS = {"num_labels": 3}
HEADED: Mapping[str, tuple[Case, ...]] = {
    "encoder": (
        _headed("head_classification", SEQ, "classification", "classify", **LABELS),
        _headed("head_classification_one", LORA, "classification", "classify", layers=1, **LABELS),
        _headed("head_classification_relu", HOULSBY, "classification", "classify", activation_function="relu"),
        _headed("head_multilabel", SEQ, "classification", "classify", multilabel=True, num_labels=4),
        _headed("head_prompt", SINGLE["prompt"], "classification", "classify", **LABELS),
        _headed("head_prefix", SINGLE["prefix_flat"], "classification", "classify", **LABELS),
        _headed("head_tagging", PAR, "tagging", "tokens", num_labels=5),
        _headed("head_qa", SEQ, "qa", "spans"),
        _headed("head_mlm", SEQ, "masked_lm", "hidden"),
        Case("head_static", {"a": SEQ}, static="SequenceClassification", reading="classify"),
        Case("head_static_tagging", {"a": LORA}, static="TokenClassification", reading="tokens"),
    ),
    "pooler": (_headed("head_classification_pooler", SEQ, "classification", "classify", use_pooler=True, **LABELS),),
    "decoder": (
        _headed("head_classification", SEQ, "classification", "classify", **LABELS),
        _headed("head_classification_one", LORA, "classification", "classify", layers=1, **LABELS),
        _headed("head_tagging", HOULSBY, "tagging", "tokens", num_labels=5),
        _headed("head_causal_lm", SEQ, "causal_lm", "generate"),
        Case("head_static", {"a": SEQ}, static="SequenceClassification", reading="classify"),
    ),
    "seq2seq": (
        _headed("head_seq2seq_lm", SEQ, "seq2seq_lm", "generate"),
        _headed("head_seq2seq_lm_compacter", SINGLE["compacter_pp"], "seq2seq_lm", "generate"),
        _headed("head_seq2seq_lm_vera", SINGLE["vera"], "seq2seq_lm", "generate"),
    ),
}

ADAPTER_NAMES = {"lora": "loras", "seq_bn": "adapters", "prefix_mlp": "prefix_tunings", "double_seq_bn": "a_b-c"}
"""Names that an adapter may have, though they look like words of the library."""
PICKLED = ("lora_all", "seq_bn_scale", "ia3", "fusion_static", "stack_bn", "head_classification_one")
"""Saved as torch does, as everything is that cannot be saved as safetensors."""
SOME = (
    "double_seq_bn", "double_seq_bn_lnbefore", "seq_bn", "seq_bn_resid_after_ln", "seq_bn_ln_after_resid_inside",
    "seq_bn_scale_channel", "seq_bn_inv", "adapter_plus", "par_bn_both", "compacter_own_rule", "lora_all", "ia3_alpha",
    "dora", "prefix_mlp", "prefix_leave_out_0", "prompt_after_bos", "union_lora_bn", "fusion_dynamic", "stack_bn",
    "average_bn", "cross_adapter", "loreft_first", "mam", "head_classification", "head_tagging",
)  # fmt: skip
HOOKED_TOO = (
    "seq_bn_post_add", "seq_bn_no_orig_ln_after", "seq_bn_ln_before", "seq_bn_scale_learned", "seq_bn_adapterdrop",
    "compacter_pp", "compacter_shared_w", "lora_kv", "stack_houlsby_seq", "stack_par_seq", "fusion_houlsby",
    "fusion_par", "fusion_residual_before", "fusion_query_before_ln", "seq_bn_gating", "average_lora",
    "par_bn_ln_after", "noreft",
)  # fmt: skip
LESS: Mapping[str, tuple[str, ...]] = {
    "t5": (
        "fusion_three", "fusion_value_after", "fusion_query_before_ln", "fusion_static", "fusion_temperature",
        "merge_bn", "merge_lora",
    ),
    "gpt2": ("fusion_value_after", "fusion_temperature", "merge_bn"),
    "llama": (
        "fusion_three", "fusion_value_after", "fusion_static", "fusion_query_before_ln", "fusion_residual_before",
        "fusion_temperature", "seq_bn_gelu", "seq_bn_gelu_new", "seq_bn_tanh", "compacter_own_factor_rule",
        "compacter_full_w", "compacter_rank2", "compacter_factor_rule", "average_bn_raw", "merge_bn", "merge_lora",
        "stack_seq_par",
    ),
}  # fmt: skip
"""What another family of the same kind covers, and would make the files larger."""
FAMILIES = ("bert", "t5", "gpt2", "llama", "roberta", "flan-t5", "qwen3", "gemma2")


def cases(family: str) -> list[Case]:
    """What is tried on a family."""
    single = SINGLE | (SEQ2SEQ_ONLY if family in SEQ2SEQ else {})
    if family not in ENCODERS:
        # The library has prompts for encoders alone.
        single = {name: make for name, make in single.items() if not name.startswith("prompt")}
    every = [Case(name, {ADAPTER_NAMES.get(name, "a"): make}) for name, make in single.items()]
    every += COMPOSED
    every += HEADED["encoder" if family in ENCODERS else "seq2seq" if family in SEQ2SEQ else "decoder"]
    every += HEADED["pooler"] if family == "bert" else ()
    if family not in FULL:
        wanted = SOME + (HOOKED_TOO if family in HOOKED else ())
        every = [case for case in every if case.name in wanted]
    if family in HOOKED:
        every = [case for case in every if case.head is None]
    return [case for case in every if case.name not in LESS.get(family, ())]
