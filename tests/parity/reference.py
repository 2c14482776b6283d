"""What PEFT alone answers, one request at a time.

Nothing is trained: every number of a checkpoint is drawn anew, because fresh adapters change nothing.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from drawn import drawn
from families import FAMILIES, SPECIAL, VOCABULARY, Family
from methods import HEADS, INVOCATION, Case, config
from safetensors.torch import load_file
from transformers import PreTrainedModel

SEED = 20_261_124
NEW_TOKENS = 32
LABELS = 3
"""Outputs of a head, but where its task fixes them; see `outputs`."""


def backbone(family: Family, folder: Path) -> None:
    """Writes a tiny random model."""
    transformers.set_seed(SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(transformers, family.stored or family.auto).from_config(family.config())
        drawn(model, SEED)
        model.tie_weights()
        model.save_pretrained(folder)


def outputs(task: str) -> int:
    """Of a head: a span has a start and an end."""
    return 2 if task == "QUESTION_ANS" else LABELS


def plain(case: Case, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model for a case's task over a backbone; a head has random numbers.

    Some of its models for question answering call the base model otherwise than its causal ones do, find nothing in
    their checkpoints, and are left with random numbers all over: they get the backbone's from its base model.
    """
    auto = getattr(transformers, HEADS.get(case.task, FAMILIES[case.family].auto))
    known = {"attn_implementation": "eager", "dtype": dtype}
    model = auto.from_pretrained(folder, **known, **({"num_labels": outputs(case.task)} if case.task in HEADS else {}))
    if case.task == "QUESTION_ANS":
        own = model.base_model.state_dict()
        base = transformers.AutoModel.from_pretrained(folder, **known).state_dict()
        assert own.keys() <= base.keys()
        model.base_model.load_state_dict({name: base[name] for name in own})
    return model


def tuned(case: Case, backbone_folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The PEFT model of a case, with numbers of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(plain(case, backbone_folder, dtype), config(case))
        drawn(made, SEED + sum(map(ord, case.name)), trainable=True)
        return made.eval()


def bare(family: str, backbone_folder: Path) -> PreTrainedModel:
    auto = getattr(transformers, FAMILIES[family].auto)
    model = auto.from_pretrained(backbone_folder, attn_implementation="eager", dtype=torch.float32)
    assert isinstance(model, PreTrainedModel)
    return model.eval()


def inputs(case: Case) -> list[list[int]]:
    """Two texts of odd lengths, others for each delta. A classified one also ends in a pad token, as texts may."""
    random = torch.Generator().manual_seed(SEED + 31 * sum(map(ord, case.name)))
    lengths = [int(torch.randint(3, 14, (), generator=random)) for _ in range(2)]
    first, second = (torch.randint(SPECIAL, VOCABULARY, (n,), generator=random).tolist() for n in lengths)
    if case.method.startswith("alora"):
        first, second = [*first[:2], *INVOCATION, *first[2:]], [*INVOCATION, *second, *INVOCATION]
    return [first, [*second, 0] if case.task == "SEQ_CLS" else second]


def told(model: Any) -> dict[str, torch.Tensor]:
    """What PEFT must be told beside the text: the last task, of methods that know tasks."""
    config = getattr(model, "active_peft_config", None)
    counts = {"POLY": "n_tasks", "MULTITASK_PROMPT_TUNING": "num_tasks"}
    if config is None or config.peft_type not in counts:
        return {}
    return {"task_ids": torch.tensor([getattr(config, counts[config.peft_type]) - 1])}


def generated(model: Any, ids: list[int]) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens by PEFT's own generate, and the log-probabilities [NEW_TOKENS, vocabulary] it chose them by."""
    out = model.generate(
        input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=False,
        max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, output_logits=True, return_dict_in_generate=True,
        eos_token_id=None, **told(model),
    )  # fmt: skip
    tokens = out.sequences[0, -NEW_TOKENS:].tolist()
    return tokens, torch.log_softmax(torch.cat(out.logits).float(), -1)


Answer = tuple[list[int], torch.Tensor]
"""Greedy tokens (none for a head or a vector) and rows [n, width]: log-probabilities, raw scores or a vector."""


def answer(case: Case, model: Any, ids: list[int]) -> Answer:
    """What the model alone says, without batching, caches of ours, or padding."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if case.task in HEADS:
            said = model(input_ids=torch.tensor([ids]), **told(model))
            if case.task == "SEQ_CLS":
                return [], said.logits.float()
            spans = case.task == "QUESTION_ANS"
            scores = torch.stack((said.start_logits[0], said.end_logits[0]), 1) if spans else said.logits[0]
            # Beside a prompt transformers also scores the prompt's rows.
            return [], scores[-len(ids) :].float()
        if case.task == "FEATURE_EXTRACTION":
            hidden = model(input_ids=torch.tensor([ids]), **told(model)).last_hidden_state[0].float()
            return [], hidden[-len(ids) :].mean(0, keepdim=True)
        return generated(model, ids)


@dataclass(frozen=True)
class Prepared:
    """A family's folder, the cases that PEFT itself can do, and its answers to `inputs` by case and input."""

    folder: Path
    cases: tuple[Case, ...]
    references: Mapping[Case, tuple[Answer, ...]]
    without: Mapping[Case, tuple[Answer, ...]]
    """The same by the backbone alone, with the case's own head if it has one."""


def _without_delta(case: Case, folder: Path, saved: Path) -> Any:
    if case.task not in HEADS:
        return bare(case.family, folder)
    model = plain(case, folder)
    heads = {name.rpartition("base_model.")[2].removeprefix("model."): t for name, t in load_file(saved).items()}
    own = {name for name in model.state_dict() if name.partition(".")[0] in ("classifier", "score", "qa_outputs")}
    heads = {name: tensor for name, tensor in heads.items() if name in own}
    assert heads and not model.load_state_dict(heads, strict=False).unexpected_keys
    return model.eval()


def prepare(family: str, chosen: Sequence[Case], folder: Path) -> Prepared:
    """Writes `backbone` and `deltas/<name>` below a folder and asks PEFT about each of them."""
    backbone(FAMILIES[family], folder / "backbone")
    references, without = {}, {}
    for case in chosen:
        model = tuned(case, folder / "backbone")
        place = folder / "deltas" / case.name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(place)
            alone = _without_delta(case, folder / "backbone", place / "adapter_model.safetensors")
        references[case] = tuple(answer(case, model, ids) for ids in inputs(case))
        without[case] = tuple(answer(case, alone, ids) for ids in inputs(case))
    return Prepared(folder, tuple(references), references, without)
