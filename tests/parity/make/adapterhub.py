"""Checkpoints of AdapterHub's library and what it answers: `python -P -m make.adapterhub [family ...]`.

Every case is built, given numbers of its own, saved, loaded again into a fresh backbone by the library itself, and
asked there: batch 1, whole forwards without a cache, eager attention, float32.
"""

import logging
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import adapters
import torch
import transformers
from adapters import composition
from make.adapterhub_cases import ENCODERS, FAMILIES, PICKLED, SEQ2SEQ, Case, cases
from make.recorded import MOVED, RELOADED, Answer, Recorder, backbone, greedy, ratio, said, seed, texts, versions

AUTO = {"bert": "AutoModel", "roberta": "AutoModel", "t5": "AutoModelForSeq2SeqLM", "flan-t5": "AutoModelForSeq2SeqLM"}
ATTENTION = {"attn_implementation": "eager", "dtype": torch.float32}
TEXTS = 2
LOSSY = ("direft", "average_bn_raw", "prefix_ejected")
"""Loaded again these are others: NoReFT, an average of normalised weights, a random prefix (it is asked before)."""


class Lost(Exception):
    """A library's checkpoint does not hold what its model had."""


def fresh(family: str, case: Case | None) -> Any:
    """A fresh model that takes adapters. BERT's are the library's own class, whose names begin with `bert.`."""
    folder = backbone("adapterhub", family)
    if case is not None and case.static is not None:
        known: dict[str, Any] = {"num_labels": 3, **ATTENTION}
        model = getattr(transformers, f"AutoModelFor{case.static}").from_pretrained(folder, **known)
    elif family == "bert" or (case is not None and case.flexible):
        model = adapters.AutoAdapterModel.from_pretrained(folder, **ATTENTION)
    else:
        model = getattr(transformers, AUTO.get(family, "AutoModelForCausalLM")).from_pretrained(folder, **ATTENTION)
    if not hasattr(model, "adapters_config"):
        adapters.init(model)
    model.config.name_or_path = f"tiny/{family}"  # it is saved, and would be this folder
    return model.eval()


def drawn(model: Any, old: set[int], name: str) -> None:
    """New numbers for all parameters that are not in `old`."""
    random = torch.Generator().manual_seed(seed(name))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if id(parameter) in old:
                continue
            old.add(id(parameter))
            noise = torch.randn(parameter.shape, generator=random)
            word = key.rpartition(".")[2]
            if word == "scaling" or ("norm" in key.lower() and word == "weight") or key.endswith(".m.weight"):
                parameter.mul_(1 + 0.3 * noise)
            elif word == "lora_B" and parameter.shape[-1] == 1 and parameter.abs().min() > 0:  # IA3's vector
                parameter.copy_(1 + 0.3 * noise)
            elif word == "original":  # of an orthogonal map, whose diagonal is of signs
                parameter.copy_((0.5 * noise).fill_diagonal_(0) + parameter * torch.eye(*parameter.shape))
            elif word in ("control_trans", "wte") or "prompt_embedding" in key or ".wte." in key:
                parameter.copy_(0.8 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.2 * noise)
            elif word in ("W_left", "W_right", "phm_rule", "phm_rule_left", "phm_rule_right", "W") or "W_down" in word:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(0.6 * noise * parameter.shape[-1] ** -0.5)


def build(family: str, case: Case) -> tuple[Any, Any]:
    """The model of a case and what is active in it."""
    transformers.set_seed(seed(case.name))
    model = fresh(family, case)
    old = {id(parameter) for parameter in model.parameters()}
    if case.static is not None:
        old -= {id(p) for n, p in model.named_parameters() if n.startswith(("classifier", "score"))}
    for name, make in case.adapters.items():
        model.add_adapter(name, config=make())
    if case.head is not None:
        method, told = case.head
        getattr(model, method)(next(iter(case.adapters)), **told)
    active: Any = next(iter(case.adapters)) if case.block is None else case.block(composition)
    if case.fused is not None:
        fusing = active if isinstance(active, composition.Fuse) else active[-1]
        told = {key: value for key, value in case.fused.items() if key != "which"}
        made = {"dynamic": adapters.DynamicAdapterFusionConfig, "static": adapters.StaticAdapterFusionConfig}
        model.add_adapter_fusion(fusing, made[case.fused["which"]](**told))
    drawn(model, old, f"{family}/{case.name}")
    if case.merged is not None:
        model.average_adapter("merged", list(case.adapters), **case.merged)
        active = "merged"
    model.set_active_adapters(active)
    if case.name == "prefix_ejected":
        model.eject_prefix_tuning(active)
    return model.eval(), active


def save(case: Case, model: Any, active: Any, folder: Path) -> str:
    """Writes the checkpoint; says which kind of file it became."""
    headed = case.head is not None or case.static is not None
    for kind in ("bin",) if case.name in PICKLED else ("safetensors", "bin"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        told = {"use_safetensors": kind == "safetensors"}
        try:
            if isinstance(active, str):
                model.save_adapter(str(folder), active, with_head=headed, **told)
            else:
                model.save_adapter_setup(str(folder), active, **told)
            return kind
        except RuntimeError:
            if kind == "bin":
                raise
    raise AssertionError


def load(family: str, case: Case, folder: Path, kind: str) -> Any:
    """A fresh backbone into which the library itself loaded a checkpoint."""
    transformers.set_seed(1)
    model = fresh(family, case)
    told = {"set_active": True, "use_safetensors": kind == "safetensors"}
    if case.block is None:
        headed = case.head is not None or case.static is not None
        name = model.load_adapter(str(folder), with_head=headed, **told)
        if case.head is not None:
            model.active_head = name
    else:
        model.load_adapter_setup(str(folder), **told)
    return model.eval()


def reading(family: str, case: Case) -> str:
    return case.reading or ("hidden" if family in ENCODERS else "generate")


def answer(family: str, how: str, model: Any, ids: list[int], case: Case | None = None) -> Answer:
    with torch.no_grad():
        given = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        if how == "hidden":
            return [], model.base_model(**given).last_hidden_state[0].float()
        if how == "classify":
            return [], model(**given).logits.float()
        if how == "tokens":
            return [], model(**given).logits[0].float()
        if how == "spans":
            said = model(**given)
            return [], torch.stack((said.start_logits[0], said.end_logits[0]), 1).float()

        def logits(ids: list[int], tokens: list[int]) -> torch.Tensor:
            if family in SEQ2SEQ:
                asked = given | {"decoder_input_ids": torch.tensor([[0, *tokens]])}
            else:
                whole = torch.tensor([[*ids, *tokens]])
                asked = {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
            found: torch.Tensor = model(**asked, use_cache=False).logits[0]
            return found

        return greedy(logits, ids)


def without(family: str, case: Case, model: Any, ids: list[int]) -> torch.Tensor:
    """What the same model says with no adapter active."""
    active = model.active_adapters
    head = getattr(model, "active_head", None)
    model.set_active_adapters(None)
    if head is not None:
        model.active_head = head
    rows = answer(family, reading(family, case), model, ids)[1]
    model.set_active_adapters(active)
    if head is not None:
        model.active_head = head
    return rows


def made(family: str, case: Case, folder: Path, recorder: Recorder) -> None:
    model, active = build(family, case)
    how = reading(family, case)
    # The first forward may be what a shape is wrong in, so it comes before the saving.
    asked = texts(f"{family}/{case.name}", 1 if how == "generate" else TEXTS)
    before = [answer(family, how, model, ids) for ids in asked]
    kind = save(case, model, active, folder)
    if case.fused is not None and case.fused.get("temperature"):
        raise Lost("the temperature is lower after each forward, and is not saved")
    loaded = load(family, case, folder, kind)
    answers = [answer(family, how, loaded, ids) for ids in asked]
    off = max(ratio(a[1], b[1]) for a, b in zip(answers, before, strict=True))
    lost = not off <= RELOADED
    if lost and case.name not in LOSSY:
        raise Lost("loaded again by the library itself it is another delta")
    bare = [without(family, case, loaded, ids) for ids in asked]
    rows = [a[1][-len(b) :] for a, b in zip(answers, bare, strict=True)]
    moved = min(ratio(a, b) for a, b in zip(rows, bare, strict=True))
    assert moved >= MOVED, f"{case.name} moves nothing: {moved:.1e}"
    if case.name == "prefix_ejected":  # the library itself reads such a file as a random prefix
        answers = before
    facts = {"reading": how, "file": kind, "moved": float(f"{moved:.3g}"), "lost": lost}
    recorder.answered(case.name, asked, answers)
    recorder.keep(case.name, folder, facts)


def column(family: str) -> Recorder:
    recorder = Recorder("adapterhub", family)
    model, asked = fresh(family, None), texts(f"{family}/bare", 2)
    how = "hidden" if family in ENCODERS else "generate"
    recorder.answered("bare", asked, [answer(family, how, model, ids) for ids in asked])
    with tempfile.TemporaryDirectory() as place:
        for case in cases(family):
            folder = Path(place) / case.name
            try:
                made(family, case, folder, recorder)
            except AssertionError:
                raise
            except Lost as error:
                recorder.refuse(case.name, str(error), folder if folder.is_dir() else None)
            except Exception as error:
                recorder.refuse(case.name, said(error))
    return recorder


def main() -> None:
    transformers.logging.set_verbosity_error()
    logging.getLogger("adapters").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for family in sys.argv[1:] or FAMILIES:
        start = time.monotonic()
        recorder = column(family)
        recorder.write()
        say = f"{family}: {len(recorder.cases)} cases in {time.monotonic() - start:.0f} s; the library cannot:"
        print(say, *(f"  {name}: {row['why']}" for name, row in recorder.cannot.items()), sep="\n")
    versions("adapterhub", "adapters", "transformers", "torch", "safetensors", "numpy", "tokenizers")


if __name__ == "__main__":
    main()
