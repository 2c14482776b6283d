"""Checkpoints that PEFT wrote, applied by hand to transformers' own model: several at a time, in an order.

Nothing of ours is used, and of PEFT only what makes a cache of a prefix, and OFT's rotation.
"""

import copy
import functools
import json
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import byadapter
import peft
import torch
from families import FAMILIES
from methods import HEADS, Case
from reference import SEED, drawn, plain
from safetensors.torch import load_file

Step = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Steps:
    """What happens at one linear, in the order of the contract; each list in the order of the members."""

    turns: list[Step] = field(default_factory=list)
    factors: list[torch.Tensor] = field(default_factory=list)
    added: list[Step] = field(default_factory=list)
    outputs: list[tuple[torch.Tensor | float, torch.Tensor | float]] = field(default_factory=list)

    def around(self, inner: Step) -> Step:
        def forward(x: torch.Tensor) -> torch.Tensor:
            for turn in self.turns:
                x = turn(x)
            for factor in self.factors:
                x = x * factor
            y = inner(x) + sum(add(x) for add in self.added)
            for scale, shift in self.outputs:
                y = y * scale + shift
            return y

        return forward


@functools.cache
def _read(case: Case, folder: Path) -> Any:
    """Not to be changed."""
    return plain(case, folder / "backbone")


def written(name: str, case: Case, config: Any, folder: Path) -> None:
    """A checkpoint `folder / name` of random numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(_read(case, folder)), config)
        drawn(model, SEED + sum(map(ord, name)), trainable=True)
        model.save_pretrained(folder / name)


class ByHand:
    """The model for `case`'s task with members `(name, weight)` of a folder, in order."""

    def __init__(self, case: Case, folder: Path, members: Sequence[tuple[str, float]]) -> None:
        self._case = case
        self._folder = folder
        self.model = copy.deepcopy(_read(case, folder)).eval()
        self._prompts: list[torch.Tensor] = []
        self._prefixes: list[torch.Tensor] = []
        self._steps: defaultdict[str, Steps] = defaultdict(Steps)
        self._inner = {name: module.forward for name, module in self.model.named_modules()}
        ends = byadapter.Ends(case.family, self.model if case.task not in HEADS else self.model.base_model)
        for name, weight in members:
            if name in byadapter.CONFIGS:
                ends.add(folder / name, weight)
            else:
                self._apply(folder / name, weight)
        for name, steps in self._steps.items():
            self.model.get_submodule(name).forward = steps.around(self._inner[name])
        if any(name in byadapter.CONFIGS for name, _ in members):
            ends.hook()

    @torch.no_grad()
    def logprobs(self, ids: list[int], tokens: list[int]) -> torch.Tensor:
        """Of the tokens that were generated: [tokens, vocabulary], one forward of all without a cache."""
        given = [0, *tokens[:-1]]
        if FAMILIES[self._case.family].encoder_decoder:
            out = self._called(ids, decoder_input_ids=torch.tensor([given]))
        else:
            out = self._called([*ids, *tokens[:-1]])
        return torch.log_softmax(out.logits[0, -len(tokens) :].float(), -1)

    @torch.no_grad()
    def rows(self, ids: list[int]) -> torch.Tensor:
        """A head's scores, or the mean of the input's hidden rows, [1, width]."""
        out = self._called(ids)
        if self._case.task in HEADS:
            return out.logits
        return out.last_hidden_state[0, -len(ids) :].mean(0, keepdim=True)

    def _called(self, ids: list[int], **told: Any) -> Any:
        embeds = self.model.get_input_embeddings()(torch.tensor([ids]))
        embeds = torch.cat([*(prompt.unsqueeze(0) for prompt in self._prompts), embeds], 1)
        if self._prefixes:
            told["past_key_values"] = self._cache()
        return self.model(inputs_embeds=embeds, **told)

    def _cache(self) -> Any:
        """PEFT's own, for one prefix of all rows."""
        rows = torch.cat(self._prefixes)
        config = peft.PrefixTuningConfig(
            task_type=self._case.task, num_virtual_tokens=len(rows), **FAMILIES[self._case.family].prefix
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tuned = peft.get_peft_model(copy.deepcopy(_read(self._case, self._folder)), config)
            tuned.prompt_encoder["default"].embedding.weight.copy_(rows)
            return tuned.get_prompt(batch_size=1)

    def _apply(self, folder: Path, weight: float) -> None:
        config = json.loads((folder / "adapter_config.json").read_text())
        found = load_file(folder / "adapter_model.safetensors")
        if "prompt_embeddings" in found:
            kept = self._prefixes if config["peft_type"] == "PREFIX_TUNING" else self._prompts
            kept.append(found["prompt_embeddings"][: config["num_virtual_tokens"]])
            return
        tensors: defaultdict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        for name, tensor in found.items():
            module, _, word = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
            if word not in _WORDS:
                module, _, word = name.removeprefix("base_model.model.").rpartition(".")
            tensors[self._named(module)][word] = tensor
        for module, own in tensors.items():
            self._at(module, own, config, weight, folder)

    def _named(self, module: str) -> str:
        """A module by the name that it has here: beneath a head the base model has one more."""
        base = self.model.base_model_prefix
        module = module.removesuffix(".base_layer").removesuffix(".ln_tuning_layers")
        for name in (module, f"{base}.{module}", module.removeprefix(f"{base}.")):
            if name in self._inner:
                return name
        raise AssertionError(module)

    def _at(self, name: str, own: Mapping[str, torch.Tensor], config: Any, weight: float, folder: Path) -> None:
        module, steps = self.model.get_submodule(name), self._steps[name]
        if "oft_R" in own:
            steps.turns.append(_rotation(module, own["oft_R"], config))
        if "ia3_l" in own:
            if own["ia3_l"].shape[0] == 1:
                steps.factors.append(own["ia3_l"][0])
            else:
                steps.outputs.append((own["ia3_l"][:, 0], 0.0))
        if "lora_A" in own:
            rank = own["lora_A"].shape[0]
            scale = config["lora_alpha"] / (math.sqrt(rank) if config["use_rslora"] else rank)
            change = scale * own["lora_B"] @ own["lora_A"]
            steps.added.append(lambda x: weight * (x @ change.T))
            if "lora_magnitude_vector" in own:
                matrix = module.weight if own["lora_A"].shape[1] == module.weight.shape[1] else module.weight.T
                factor = own["lora_magnitude_vector"] / (matrix + change).norm(dim=1)
                steps.outputs.append((factor, 0.0 if module.bias is None else (1 - factor) * module.bias))
        if "weight" in own:  # a norm or a head, whole
            module.weight.data, steps = own["weight"], Steps()
            if "bias" in own:
                module.bias.data = own["bias"]
        elif "bias" in own:
            steps.outputs.append((1.0, weight * (own["bias"] - module.bias.detach().clone())))


_WORDS = ("lora_A", "lora_B", "lora_magnitude_vector", "ia3_l", "oft_R")


def _rotation(module: torch.nn.Module, weight: torch.Tensor, config: Any) -> Step:
    """PEFT's rotation of inputs: it is its own module there."""
    size = config["oft_block_size"]
    holder = torch.nn.Sequential(torch.nn.Linear(module.in_features, module.out_features))
    told = {"r": 0, "oft_block_size": size, "target_modules": ["0"], "use_cayley_neumann": config["use_cayley_neumann"]}
    tuned = peft.get_peft_model(holder, peft.OFTConfig(**told))
    rotation = tuned.base_model.model[0].oft_R["default"]
    rotation.weight.data = weight
    return lambda x: rotation(x)
