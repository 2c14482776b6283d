"""transformers' own models as servers: a fine-tuned copy, one whose weights are swapped, and batches through either."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from bench import shapes
from bench.answers import Answers
from bench.shapes import Twins
from deltaserve.deltas.adapters import Bottleneck
from deltaserve.deltas.delta import Delta
from deltaserve.deltas.primitives import Affine, LowRank, Prefix, SitePrimitive


class Copy:
    """A model with weights of its own that is fine-tuned for one task at a time.

    LoRA, biases and factors are in its weights, as after full fine-tuning, and cost nothing when it runs; an adapter
    stands behind its linear, a prefix in its cache, a prompt before its input.
    """

    def __init__(self, shape: str, pair: Twins) -> None:
        self.model: PreTrainedModel = copy.deepcopy(shapes.sharing(shape, pair.ours))
        self.delta: Delta | None = None
        family = pair.ours.family
        self._prefix = f"{family.prefix}." if family.base_only else ""
        self._modules = dict(self.model.named_modules())
        self._frozen = dict(pair.plain.named_modules())
        self._hooks: list[Any] = []

    @torch.inference_mode()
    def take(self, delta: Delta) -> None:
        """Becomes the copy of another task.

        Merging writes W + B A straight from the frozen weights: one pass, where to unmerge and merge are two, and no
        rounding adds up. That takes a second copy of the weights.
        """
        if delta is self.delta:
            return
        before = {} if self.delta is None else self.delta.at
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for name in {**before, **delta.at}:
            module, frozen = (of[name.removeprefix(self._prefix)] for of in (self._modules, self._frozen))
            parts = delta.at.get(name, ())
            if isinstance(module, nn.Linear):
                _fine_tune(module, frozen, parts)
            self._hooks += [
                module.register_forward_hook(_behind(part)) for part in parts if isinstance(part, Bottleneck)
            ]
        self.delta = delta

    def batch(self, ids: torch.Tensor) -> "Batch":
        return Batch(self.model, ids, self.delta)


def _fine_tune(module: nn.Linear, frozen: Any, parts: tuple[SitePrimitive, ...]) -> None:
    merged = [part for part in parts if isinstance(part, LowRank | Affine)]
    assert len(merged) <= 1, "one primitive a linear"
    weight: torch.Tensor = frozen.weight
    bias: torch.Tensor | None = frozen.bias
    match merged:
        case [LowRank(a, b, scale)]:
            torch.addmm(weight, b, a, alpha=scale, out=module.weight)
        case [Affine(in_scale, scale)] if in_scale is not None or scale is not None:
            ones = torch.ones(())
            rows, columns = ones if scale is None else scale[:, None], ones if in_scale is None else in_scale
            torch.mul(weight, rows * columns, out=module.weight)
            bias = bias if bias is None or scale is None else bias * scale
        case _:
            module.weight.copy_(weight)
    for part in merged:
        if isinstance(part, Affine) and part.shift is not None:
            bias = part.shift if bias is None else bias + part.shift
    own = None if bias is None else nn.Parameter(bias.clone(), requires_grad=False)
    module.register_parameter("bias", own)


def _behind(part: Bottleneck) -> Any:
    """h + up relu(down h), as a hook."""
    assert part.activation == "relu" and part.down_bias is not None and part.up_bias is not None

    def hook(_: nn.Module, __: Any, h: torch.Tensor) -> torch.Tensor:
        inner = torch.relu(nn.functional.linear(h, part.down, part.down_bias))
        return h + nn.functional.linear(inner, part.up, part.up_bias)

    return hook


class Batch:
    """Requests of equal length through one model at once. `more`: what its forward gets beside them (PEFT's names)."""

    def __init__(
        self, model: Any, ids: torch.Tensor, delta: Delta | None = None, more: Mapping[str, Any] | None = None
    ) -> None:
        self._model, self._ids, self._delta, self._more = model, ids, delta, dict(more or {})
        self._cache: Any = None
        self._tokens: list[torch.Tensor] = []
        self._logprobs: list[torch.Tensor] = []

    @torch.inference_mode()
    def encode(self) -> torch.Tensor:
        """The mean of each input's rows, without those of a prompt."""
        told: dict[str, Any] = self._inputs()
        cache = self._prefixed()
        if cache is not None:
            assert self._delta is not None
            positions = torch.arange(self._ids.shape[1]) + self._delta.position_shift
            told |= {"past_key_values": cache, "position_ids": positions[None]}
        hidden = self._model(**told, **self._more).last_hidden_state
        mean: torch.Tensor = hidden[:, -self._ids.shape[1] :].mean(1)
        return mean

    @torch.inference_mode()
    def begin(self, told: bool = False) -> None:
        """Reads the input and chooses the first token; `told`, keeps log-probabilities."""
        self._cache = self._prefixed() or DynamicCache(config=self._model.config)
        self._tokens, self._logprobs = [], []
        self._choose(self._inputs(), told)

    @torch.inference_mode()
    def step(self, told: bool = False) -> None:
        self._choose({"input_ids": self._tokens[-1][:, None]}, told)

    def answers(self) -> Answers:
        tokens = torch.stack(self._tokens, 1)
        return Answers(torch.stack(self._logprobs, 1) if self._logprobs else torch.zeros(tokens.shape), tokens)

    def _choose(self, inputs: dict[str, Any], told: bool) -> None:
        out = self._model(**inputs, past_key_values=self._cache, use_cache=True, logits_to_keep=1, **self._more)
        logits = out.logits[:, -1]
        chosen = logits.argmax(-1)
        self._tokens.append(chosen)
        if told:
            self._logprobs.append(logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0])

    def _inputs(self) -> dict[str, Any]:
        prompt = None if self._delta is None else self._delta.prompt
        if prompt is None:
            return {"input_ids": self._ids}
        embedded = self._model.get_input_embeddings()(self._ids)
        return {"inputs_embeds": torch.cat((prompt.rows.expand(len(self._ids), -1, -1), embedded), 1)}

    def _prefixed(self) -> Any:
        """A cache that begins with the prefix's keys and values; None without one."""
        prefixes = [part for part in _parts(self._delta) if isinstance(part, Prefix)]
        if not prefixes:
            return None
        cache = DynamicCache(config=self._model.config)
        for layer, part in enumerate(prefixes):
            keys, values = (t.transpose(0, 1).expand(len(self._ids), -1, -1, -1) for t in (part.keys, part.values))
            cache.update(keys, values, layer)
        return cache


def _parts(delta: Delta | None) -> tuple[SitePrimitive, ...]:
    return () if delta is None else tuple(part for parts in delta.at.values() for part in parts)
