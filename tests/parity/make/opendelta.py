"""Checkpoints of OpenDelta and what it answers: `python -P -m make.opendelta [family ...]`.

Every case is built, given numbers of its own, frozen, saved, loaded again into a fresh backbone by the library itself,
and asked there: batch 1, whole forwards without a cache, eager attention, float32. Without -P this file would be found
where the library is looked for.
"""

import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
import transformers
from make.recorded import MOVED, RELOADED, Answer, Recorder, backbone, greedy, ratio, said, seed, texts, versions

ABSENT = ("DeltaCenter", "web", "rich", "rich.tree", "turtle")
"""What OpenDelta imports for its downloads and pictures; not all of it can be installed any more."""
SEQ2SEQ, ENCODERS = ("t5", "flan-t5"), ("bert", "roberta")
FAMILIES = ("bert", "t5", "gpt2", "llama", "opt", "roberta", "flan-t5")
AUTO = {"bert": "AutoModel", "roberta": "AutoModel", "t5": "AutoModelForSeq2SeqLM", "flan-t5": "AutoModelForSeq2SeqLM"}
TEXTS = 2


for _name in ABSENT:
    sys.modules[_name] = MagicMock(name=_name)
sys.modules["rich.tree"].Tree = object  # a base class

import opendelta  # noqa: E402


@dataclass(frozen=True)
class Case:
    """One delta: the library's class and its arguments.

    `named`: whether it finds its modules by itself where the library knows the family's structure. `at`: modules that
    it is told of, by family. `head`: of a model for sequences that is trained and saved with it. `whole`: saved
    without freezing, so that the file holds the whole model.
    """

    name: str
    kind: str
    told: Mapping[str, Any] = field(default_factory=dict)
    at: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    only: tuple[str, ...] = FAMILIES
    head: bool = False
    whole: bool = False


SITES: Mapping[str, tuple[str, ...]] = {
    "Adapter": ("self_attn.o_proj", "mlp.down_proj"),
    "Compacter": ("self_attn.o_proj", "mlp.down_proj"),
    "LowRankAdapter": ("self_attn.o_proj", "mlp.down_proj"),
    "Lora": ("q_proj", "v_proj"),
    "ParallelAdapter": ("self_attn", "self_attn"),
    "Prefix": ("self_attn",),
    "BitFit": ("self_attn", "mlp"),
}
"""Llama's, whose structure the library does not know."""
LORA_SITES = {
    "bert": ("query", "key", "intermediate.dense"), "roberta": ("value", "output.dense"), "t5": ("k", "wi", "o"),
    "flan-t5": ("EncDecAttention.q", "wi_1", "wo"), "opt": ("fc1", "out_proj", "k_proj"),
    "llama": ("up_proj", "[r]layers\\.[02]\\.self_attn\\.k_proj"),
}  # fmt: skip
ADAPTER_SITES = {
    "bert": ("attention", "intermediate"), "t5": ("layer.1", "SelfAttention"), "gpt2": ("mlp", "attn"),
    "llama": ("self_attn", "mlp.up_proj"), "opt": ("fc1", "self_attn"),
}  # fmt: skip
BN, LR = {"bottleneck_dim": 6}, {"reduction_factor": 4}
PREFIX = {"prefix_token_num": 4, "embed_dim": 16, "mid_dim": 12}

CASES = (
    Case("adapter", "Adapter", BN),
    Case("adapter_relu", "Adapter", BN | {"non_linearity": "relu"}),
    Case("adapter_gelu", "Adapter", BN | {"non_linearity": "gelu"}),
    Case("adapter_gelu_orig", "Adapter", BN | {"non_linearity": "gelu_orig"}),
    Case("adapter_leakyrelu", "Adapter", BN | {"non_linearity": "leakyrelu"}),
    Case("adapter_swish", "Adapter", BN | {"non_linearity": "swish"}),
    Case("adapter_tanh", "Adapter", BN | {"non_linearity": "tanh"}),
    Case("adapter_default_width", "Adapter", only=("bert", "t5", "gpt2")),
    Case("adapter_sites", "Adapter", BN, ADAPTER_SITES, tuple(ADAPTER_SITES)),
    Case("compacter", "Compacter", LR),
    Case("compacter_factor_rule", "Compacter", LR | {"factorized_phm_rule": True}),
    Case("compacter_full_w", "Compacter", LR | {"factorized_phm": False, "non_linearity": "relu"}),
    Case("compacter_rank2", "Compacter", LR | {"phm_rank": 2, "hypercomplex_division": 2}),
    Case("low_rank_adapter", "LowRankAdapter", LR),
    Case("low_rank_adapter_rank2", "LowRankAdapter", LR | {"low_rank_rank": 2}),
    Case("lora", "Lora", {"lora_r": 3, "lora_alpha": 5}),
    Case("lora_sites", "Lora", {"lora_r": 3, "lora_alpha": 5}, LORA_SITES, tuple(LORA_SITES)),
    Case("lora_head", "Lora", {"lora_r": 3}, only=ENCODERS, head=True),
    Case("lora_whole", "Lora", {"lora_r": 3}, only=("bert", "opt"), whole=True),
    Case("parallel_adapter", "ParallelAdapter", BN),
    Case("parallel_adapter_relu", "ParallelAdapter", BN | {"non_linearity": "relu"}, only=("bert", "t5", "gpt2")),
    Case("prefix", "Prefix", PREFIX),
    Case("prefix_flat", "Prefix", PREFIX | {"reparameterize": False}),
    Case("soft_prompt", "SoftPrompt", {"soft_token_num": 4, "token_init": False}),
    Case("bitfit", "BitFit"),
    Case("bitfit_sites", "BitFit", {}, {"llama": ("o_proj", "down_proj")}, ("llama",)),
    Case("adapter_head", "Adapter", BN, only=ENCODERS, head=True),
    Case("bitfit_head", "BitFit", only=ENCODERS, head=True),
)


def fresh(family: str, headed: bool = False) -> Any:
    auto = "AutoModelForSequenceClassification" if headed else AUTO.get(family, "AutoModelForCausalLM")
    told = {"num_labels": 3} if headed else {}
    transformers.set_seed(seed(family))  # two backbones have one head
    return getattr(transformers, auto).from_pretrained(backbone("opendelta", family), **told).eval()


def drawn(model: Any, name: str) -> None:
    """New numbers for whatever is trained, but for the trained parts of the backbone itself others near theirs."""
    random = torch.Generator().manual_seed(seed(name))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            noise, word = torch.randn(parameter.shape, generator=random), key.rpartition(".")[2]
            if "prefix" in key or "soft_embeds" in key or ".wte." in key:
                parameter.copy_(0.8 * noise)
            elif parameter.ndim == 1:
                parameter.add_(0.2 * noise)
            elif word.startswith(("W_", "phm_rule", "W")):
                parameter.copy_(0.6 * noise)
            else:
                parameter.copy_(0.6 * noise * parameter.shape[-1] ** -0.5)


def build(family: str, case: Case) -> tuple[Any, Any]:
    """A backbone with a delta in it, and the delta."""
    model = fresh(family, case.head)
    told = dict(case.told)
    if family in case.at:
        told["modified_modules"] = list(case.at[family])
    elif family == "llama" and case.kind in SITES:
        told["modified_modules"] = list(SITES[case.kind])
    delta = getattr(opendelta, f"{case.kind}Model")(backbone_model=model, **told)
    if case.whole:
        whole = {name: p.requires_grad for name, p in model.named_parameters()}
        delta.freeze_module(exclude=["deltas"], set_state_dict=False)
    else:
        delta.freeze_module(exclude=["deltas", "classifier"] if case.head else ["deltas"], set_state_dict=True)
    drawn(model, f"{family}/{case.name}")
    if case.whole:
        for name, parameter in model.named_parameters():
            parameter.requires_grad = whole.get(name, True)
    return model.eval(), delta


def answer(family: str, how: str, model: Any, ids: list[int]) -> Answer:
    with torch.no_grad():
        given = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        if how == "hidden":
            return [], model(**given).last_hidden_state[0].float()
        if how == "classify":
            return [], model(**given).logits.float()

        def logits(ids: list[int], tokens: list[int]) -> torch.Tensor:
            if family in SEQ2SEQ:
                asked = given | {"decoder_input_ids": torch.tensor([[0, *tokens]])}
            else:
                whole = torch.tensor([[*ids, *tokens]])
                asked = {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
            found: torch.Tensor = model(**asked, use_cache=False).logits[0]
            return found

        return greedy(logits, ids)


def made(family: str, case: Case, folder: Path, recorder: Recorder) -> None:
    model, delta = build(family, case)
    how = "classify" if case.head else "hidden" if family in ENCODERS else "generate"
    asked = texts(f"{family}/{case.name}", 1 if how == "generate" else TEXTS)
    before = [answer(family, how, model, ids) for ids in asked]
    delta.save_finetuned(str(folder))
    if not torch.load(folder / "pytorch_model.bin", weights_only=True):
        recorder.refuse(case.name, "the checkpoint is empty", folder)
        return
    loaded = fresh(family, case.head)
    bare = [answer(family, how, loaded, ids) for ids in asked]
    opendelta.AutoDeltaModel.from_finetuned(str(folder), backbone_model=loaded, check_hash=False)
    answers = [answer(family, how, loaded.eval(), ids) for ids in asked]
    off = max(ratio(a[1], b[1]) for a, b in zip(answers, before, strict=True))
    if not off <= RELOADED:
        recorder.refuse(case.name, "loaded again by the library itself it is another delta", folder)
        return
    moved = min(ratio(a[1][-len(b[1]) :], b[1]) for a, b in zip(answers, bare, strict=True))
    assert moved >= MOVED, f"{case.name} moves nothing: {moved:.1e}"
    recorder.answered(case.name, asked, answers)
    recorder.keep(case.name, folder, {"reading": how, "file": "bin", "moved": float(f"{moved:.3g}"), "lost": False})


def column(family: str) -> Recorder:
    recorder = Recorder("opendelta", family)
    model, asked = fresh(family), texts(f"{family}/bare", 2)
    how = "hidden" if family in ENCODERS else "generate"
    recorder.answered("bare", asked, [answer(family, how, model, ids) for ids in asked])
    with tempfile.TemporaryDirectory() as place:
        for case in CASES:
            if family not in case.only:
                continue
            try:
                made(family, case, Path(place) / case.name, recorder)
            except AssertionError as error:
                if "moves nothing" in str(error):
                    raise
                recorder.refuse(case.name, said(error))
            except Exception as error:
                recorder.refuse(case.name, said(error))
    return recorder


def main() -> None:
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for family in sys.argv[1:] or FAMILIES:
        start = time.monotonic()
        recorder = column(family)
        recorder.write()
        say = f"{family}: {len(recorder.cases)} cases in {time.monotonic() - start:.0f} s; the library cannot:"
        print(say, *(f"  {name}: {row['why']}" for name, row in recorder.cannot.items()), sep="\n")
    versions("opendelta", "opendelta", "transformers", "torch", "safetensors", "numpy", "tokenizers")


if __name__ == "__main__":
    main()
