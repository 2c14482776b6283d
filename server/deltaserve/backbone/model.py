"""A frozen backbone whose forward takes packed rows of many requests, each row with its own delta."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltaserve.backbone import survey
from deltaserve.backbone.attention import AttentionSite, attach
from deltaserve.backbone.embedded import Embedded
from deltaserve.backbone.embedding import WrappedEmbedding
from deltaserve.backbone.ending import Ending
from deltaserve.backbone.families import Family, Shape
from deltaserve.backbone.gates import GateTable
from deltaserve.backbone.linear import WrappedLinear
from deltaserve.backbone.norm import WrappedNorm
from deltaserve.backbone.wrap import WrappedModule
from deltaserve.deltas.delta import Delta
from deltaserve.deltas.primitives import Prefix
from deltaserve.deltas.sites import Axis, Site, SiteType
from deltaserve.plan import KeysValues, Now, Plan, Stack
from deltaserve_kernels.attention import PrefixTable, RelativeBias

SLOTS = 1024
"""Deltas that can be resident at one time."""

_UNTOLD = 1 << 20
_RELATIVE_LENGTH = 1024


@dataclass(frozen=True)
class GenerationDefaults:
    """From the model's generation config. `max_input`: rows of one sequence, None where nothing limits them."""

    eos_ids: tuple[int, ...]
    decoder_start_id: int | None
    pad_id: int | None
    max_input: int | None


@dataclass(frozen=True, eq=False)
class Rows:
    """What a forward leaves: hidden rows [rows, hidden] of each stack, and pooled rows. None where there were none."""

    tokens: torch.Tensor | None
    decoder: torch.Tensor | None
    pooled: torch.Tensor | None


class Backbone:
    """`spec` is what formats see of it. Owned by the engine's thread once the engine runs."""

    def __init__(
        self,
        *,
        name: str,
        family: Family,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        has_pooler: bool = True,
    ) -> None:
        self.name = name
        self.family = family
        self.model = model
        self.tokenizer = tokenizer
        self.device = model.device
        self.dtype = model.dtype
        self.parameters = sum(p.numel() for p in model.parameters())
        self.nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
        self.type_vocab_size = int(getattr(model.config, "type_vocab_size", 0) or 0)
        self.defaults = _defaults(model)
        self.spec = survey.spec(name, family, model, has_pooler)
        self._now = Now()
        self._modules = survey.named_modules(family, model)
        self._wrapped: dict[str, WrappedModule] = {
            site.name: _WRAPS[site.type](site, self._modules[site.name], self._now, SLOTS, self.device)
            for site in self.spec.sites.values()
            if site.type in _WRAPS
        }
        self._open_sublayers()
        self._attention = self._open_attention()
        self._embedded = self._open_embedded()
        self._pooler = self._take_pooler()

    @property
    def default_length(self) -> int:
        """Rows of one sequence where the operator names no limit."""
        if self.spec.max_positions is not None:
            return self.spec.max_positions
        told = getattr(self.tokenizer, "model_max_length", None) or 0
        return int(told) if 0 < told < _UNTOLD else _RELATIVE_LENGTH

    @property
    def cached_sites(self) -> Mapping[str, Axis]:
        """Attention sites that keep keys and values between steps, and the axis of those."""
        cached = [row for row in self.family.attentions if row.cached]
        return {name: row.axis for name in self._attention for row in cached if re.fullmatch(row.pattern, name)}

    def attach_cache(self, cache: Mapping[str, KeysValues]) -> None:
        """Gives every cached attention site its keys and values, [tokens, kv_heads, head_dim] each."""
        self._now.cache = cache

    def weights(self, site: str) -> torch.Tensor:
        """A site's weight, fp32 on the host: [out, in], of an embedding [vocabulary, width]. Not to be written to.

        Also that of a module which has one and is no site, as it is stored.
        """
        weight = self._modules[site].weight
        assert isinstance(weight, torch.Tensor)
        host = weight.detach().float().cpu()
        known = self.spec.sites.get(site)
        return host.T.contiguous() if known is not None and known.type is SiteType.CONV1D else host

    def install(self, slot: int, delta: Delta) -> None:
        """Publishes a delta whose tensors are on the device. Between forwards, on the engine's thread."""
        for name, primitives in delta.at.items():
            if name in self._attention:
                for primitive in primitives:
                    assert isinstance(primitive, Prefix)
                    self._attention[name].install(slot, primitive)
            else:
                self._wrapped[name].install(slot, primitives)
        self._embedded.install(slot, delta)

    def remove(self, slot: int, delta: Delta) -> None:
        """Takes back what `install` published, or the part of it that it came to."""
        for name in delta.at:
            if name in self._attention:
                self._attention[name].remove(slot)
            elif name in self._wrapped:
                self._wrapped[name].remove(slot)
        self._embedded.remove(slot)

    @torch.inference_mode()
    def forward(self, plan: Plan) -> Rows:
        """One forward of the mixed batch. All rows of a request equal what it would get alone."""
        with self._now.running(plan):
            return _FORWARDS[self.family.shape](self, plan)

    @torch.inference_mode()
    def logits(self, plan: Plan, rows: Rows) -> torch.Tensor:
        """Logits [sampled, vocabulary] of the rows that the plan samples, in the backbone's dtype."""
        hidden = rows.tokens if rows.decoder is None else rows.decoder
        assert hidden is not None and self.model.lm_head is not None
        hidden = hidden[plan.sampled]
        if getattr(self.model.config, "scale_decoder_outputs", False):
            hidden = hidden * self.model.model_dim**-0.5
        hidden = self._embedded.couplings.uncoupled(hidden, plan.maps[Axis.SAMPLED])
        with self._now.running(plan):
            logits = self.model.lm_head(hidden)
        assert isinstance(logits, torch.Tensor)
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _embed(self, module: torch.nn.Module, stack: Stack, axis: Axis = Axis.TOKENS) -> torch.Tensor:
        return self._embedded.of(module(stack.ids), stack, axis)

    def _decoder_only(self, plan: Plan) -> Rows:
        assert plan.tokens is not None
        out = self.model.base_model(
            inputs_embeds=self._embed(self.model.get_input_embeddings(), plan.tokens),
            position_ids=plan.tokens.positions.unsqueeze(0),
            use_cache=False,
        )
        return Rows(tokens=out.last_hidden_state[0], decoder=None, pooled=None)

    def _encoder_only(self, plan: Plan) -> Rows:
        assert plan.tokens is not None
        types = {"token_type_ids": plan.tokens.token_types.unsqueeze(0)} if self.type_vocab_size else {}
        out = self.model.base_model(
            inputs_embeds=self._embed(self.model.get_input_embeddings(), plan.tokens),
            position_ids=plan.tokens.positions.unsqueeze(0),
            **types,
        )
        hidden = out.last_hidden_state[0]
        pooled = None
        if self._pooler is not None and plan.pooled.numel():
            read = hidden[plan.pooled]
            if plan.averaged is not None:
                read = torch.stack([rows.float().mean(0) for rows in read.split(list(plan.averaged))]).to(read.dtype)
            # BERT's pooler reads row 0 of each sequence: every pooled row is handed in as a sequence of one.
            pooled = self._pooler(read.unsqueeze(1)).flatten(0, -2)
        return Rows(tokens=hidden, decoder=None, pooled=pooled)

    def _encoder_decoder(self, plan: Plan) -> Rows:
        model: Any = self.model
        encoder, decoder = model.encoder, model.decoder
        encoded: torch.Tensor | None = None
        if plan.tokens is not None:
            encoded = encoder(inputs_embeds=self._embed(encoder.embed_tokens, plan.tokens)).last_hidden_state[0]
        decoded: torch.Tensor | None = None
        if plan.decoder is not None:
            embeddings = self._embed(decoder.embed_tokens, plan.decoder, Axis.DECODER)
            if encoded is not None and plan.memory.numel():
                memory = encoded[plan.memory].unsqueeze(0)
            else:
                memory = embeddings.new_zeros(1, 1, embeddings.shape[-1])
            out = decoder(inputs_embeds=embeddings, encoder_hidden_states=memory, use_cache=False)
            decoded = out.last_hidden_state[0]
        return Rows(tokens=encoded, decoder=decoded, pooled=None)

    def _open_sublayers(self) -> None:
        """Tells the last linear of each sublayer what stands around it."""
        norms = {name: module for name, module in self._wrapped.items() if isinstance(module, WrappedNorm)}

        def norm(name: str, last: Site) -> WrappedNorm:
            if name not in norms:  # an Identity: no site, and its rows are kept all the same
                site = Site(name, SiteType.NORM, last.axis, last.out_features, last.out_features)
                norms[name] = WrappedNorm(site, self._modules[name], self._now, SLOTS, self.device)
            return norms[name]

        for sublayer in self.spec.sublayers:
            last = self._wrapped[sublayer.last]
            assert isinstance(last, WrappedLinear)
            sandwich = None if sublayer.sandwich is None else norms[sublayer.sandwich]
            first = self._wrapped[sublayer.first[0]]
            before = norm(sublayer.norm, last.site)
            last.adapters.ending = Ending(sublayer, first, before, sandwich, norms.__getitem__)
            if sandwich is not None:  # what it gives is what is added to the stream
                own = replace(sublayer, sandwich=None)
                sandwich.adapters.ending = Ending(own, first, before, None, norms.__getitem__)

    def _open_embedded(self) -> Embedded:
        module = None if self.family.embedded is None else self._modules[self.family.embedded]
        factor = self.spec.sites[self.spec.input_embedding].factor
        return Embedded(module, factor, self._now, SLOTS, self.device)

    def _open_attention(self) -> dict[str, AttentionSite]:
        found: dict[str, AttentionSite] = {}
        tables: dict[Axis, RelativeBias] = {}
        for name, module in self._modules.items():
            row = next((r for r in self.family.attentions if re.fullmatch(r.pattern, name)), None)
            if row is None:
                continue
            if self.family.shape is Shape.ENCODER_DECODER:
                _open_relative_bias(module, row.axis, tables)
            prefix, gates = PrefixTable(SLOTS, self.device), GateTable(SLOTS, self.device)
            starts = (s.first[0] for s in self.spec.sublayers if s.first[0].startswith(name + "."))
            first = next((self._wrapped[start] for start in starts), None)
            site = AttentionSite(name, row.axis, self._now, prefix, gates, tables.get(row.axis), first)
            attach(module, site)
            found[name] = site
        return found

    def _take_pooler(self) -> torch.nn.Module | None:
        """A base model would pool row 0 of the packed rows; it is ours to call instead, on the right rows."""
        if self.family.pooler is None:
            return None
        pooler: torch.nn.Module = self._modules[self.family.pooler]
        if self.family.base_only:
            self.model.pooler = None
        return pooler if self.family.pooler + ".dense" in self.spec.sites else None


_WRAPS: Mapping[SiteType, Callable[[Site, torch.nn.Module, Now, int, torch.device], WrappedModule]] = {
    SiteType.LINEAR: WrappedLinear,
    SiteType.CONV1D: WrappedLinear,
    SiteType.EMBEDDING: WrappedEmbedding,
    SiteType.NORM: WrappedNorm,
}

_FORWARDS = {
    Shape.DECODER: Backbone._decoder_only,
    Shape.ENCODER: Backbone._encoder_only,
    Shape.ENCODER_DECODER: Backbone._encoder_decoder,
}


def _open_relative_bias(module: Any, axis: Axis, tables: dict[Axis, RelativeBias]) -> None:
    """Keeps T5 from building its dense [heads, rows, rows] bias; attention buckets distances itself.

    The first self-attention of each stack owns the table of all of them. Cross-attention has none, and would build
    zeros of that size.
    """
    if module.has_relative_attention_bias:
        embedding = module.relative_attention_bias
        assert isinstance(embedding, torch.nn.Embedding)
        tables[axis] = RelativeBias(
            table=embedding.weight,
            bidirectional=not module.is_decoder,
            max_distance=int(module.relative_attention_max_distance),
        )
    module.compute_bias = lambda *_, **__: None
    module.has_relative_attention_bias = True


def _defaults(model: PreTrainedModel) -> GenerationDefaults:
    config, generation = model.config, getattr(model, "generation_config", None)

    def first(name: str) -> int | list[int] | None:
        value = getattr(generation, name, None)
        return getattr(config, name, None) if value is None else value

    eos, start, pad = first("eos_token_id"), first("decoder_start_token_id"), first("pad_token_id")
    eos_ids = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    assert not isinstance(start, list) and not isinstance(pad, list)
    limit = getattr(config, "max_position_embeddings", None)
    return GenerationDefaults(eos_ids, start, pad, None if limit is None else int(limit))
