"""Tiny random backbones, transformers' own models of the same weights, and an engine to drive them with."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    BertConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    PretrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    T5Config,
)

from deltaserve.backbone.load import load
from deltaserve.backbone.model import Backbone
from deltaserve.deltas.bases import content_key
from deltaserve.deltas.delta import Delta, Provenance
from deltaserve.deltas.primitives import Affine, Dense, LowRank, Prefix, SitePrimitive, SoftPrompt
from deltaserve.deltas.sites import BackboneSpec, Site, SiteType, Task
from deltaserve.engine.loop import Engine, EngineSettings
from deltaserve.engine.request import DeltaRef, Event, Failed, Finished, Request, Tokens

VOCABULARY = 101
POSITIONS = 96
PATIENCE = 60.0


def _t5(**changed: Any) -> PretrainedConfig:
    values = dict(vocab_size=VOCABULARY, d_model=32, d_kv=8, num_heads=4, d_ff=48, num_layers=3, num_decoder_layers=2)
    ids = dict(decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    return T5Config(
        **values | ids | dict(relative_attention_num_buckets=8, relative_attention_max_distance=20) | changed
    )


def _llama(**changed: Any) -> PretrainedConfig:
    values = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=POSITIONS)
    return LlamaConfig(**values | heads | dict(bos_token_id=None, eos_token_id=2, pad_token_id=0) | changed)


def _modernbert(**changed: Any) -> PretrainedConfig:
    """Layers 0 and 3 attend to everything, 1 and 2 to three rows on either side."""
    values = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=4)
    values |= dict(num_attention_heads=4, max_position_embeddings=POSITIONS, local_attention=6)
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
    return ModernBertConfig(**values | ids | changed)


CONFIGS: dict[str, tuple[str, Callable[[], PretrainedConfig]]] = {
    "t5": ("AutoModelForSeq2SeqLM", _t5),
    "t5-gated": (
        "AutoModelForSeq2SeqLM",
        lambda: _t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False, d_kv=12, scale_decoder_outputs=False),
    ),
    "bert": (
        "AutoModel",
        lambda: BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=POSITIONS,
        ),
    ),
    "roberta": (
        "AutoModel",
        lambda: RobertaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=POSITIONS,
        ),
    ),
    "gemma2": (
        "AutoModelForCausalLM",
        lambda: Gemma2Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            max_position_embeddings=POSITIONS,
            sliding_window=6,
        ),
    ),
    "modernbert": ("AutoModelForMaskedLM", _modernbert),
    "modernbert-mean": (
        "AutoModelForMaskedLM",
        lambda: _modernbert(
            classifier_pooling="mean",
            attention_bias=True,
            mlp_bias=True,
            norm_bias=True,
            classifier_bias=True,
        ),
    ),
    "gpt2": (
        "AutoModelForCausalLM",
        lambda: GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=3,
            n_head=4,
            n_positions=POSITIONS,
            bos_token_id=None,
            eos_token_id=2,
        ),
    ),
    "llama": ("AutoModelForCausalLM", _llama),
    "llama-tied": (
        "AutoModelForCausalLM",
        lambda: _llama(num_key_value_heads=4, tie_word_embeddings=True, attention_bias=True, head_dim=12),
    ),
}
"""Name -> transformers' loader and a config."""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with a random model of a name in CONFIGS; every parameter is moved off its initial value."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            loader, config = CONFIGS[name]
            torch.manual_seed(sum(name.encode()))
            model = getattr(transformers, loader).from_config(config())
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.15)
            made[name] = tmp_path_factory.mktemp(name)
            model.save_pretrained(made[name])
        return made[name]

    return folder


@pytest.fixture(scope="session")
def plain(tiny: Callable[[str], Path]) -> Callable[..., PreTrainedModel]:
    """transformers' own model of a name, eager attention."""
    made: dict[tuple[str, str], PreTrainedModel] = {}

    def model(name: str, dtype: str = "float32") -> PreTrainedModel:
        if (name, dtype) not in made:
            loader = getattr(transformers, CONFIGS[name][0])
            found = loader.from_pretrained(tiny(name), attn_implementation="eager", dtype=getattr(torch, dtype))
            made[name, dtype] = found.eval().requires_grad_(False)
        return made[name, dtype]

    return model


@dataclass(eq=False)
class Driver:
    """An engine with its thread, and what it emitted. `fetched` lists the keys that were read again."""

    backbone: Backbone
    settings: EngineSettings
    host: dict[int, Delta] = field(default_factory=dict)
    fetched: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.fetch_gate: Callable[[int], Delta] = self._fetch
        self.engine = Engine(self.backbone, self.settings, lambda key: self.fetch_gate(key))
        self.tokens: dict[str, list[Tokens]] = defaultdict(list)
        self.ended: dict[str, Finished | Failed] = {}
        self._ready = threading.Condition()
        self._joins: list[tuple[int, Sequence[Request]]] = []
        self._count = 0

    def _fetch(self, key: int) -> Delta:
        self.fetched.append(key)
        return self.host[key]

    def emit(self, events: Sequence[Event]) -> None:
        """For `Engine.submit`; also submits requests that were to join by now."""
        with self._ready:
            for event in events:
                if isinstance(event, Tokens):
                    self.tokens[event.request_id].append(event)
                    self._count += len(event.ids)
                else:
                    assert event.request_id not in self.ended, "a request ended twice"
                    self.ended[event.request_id] = event
            self._ready.notify_all()
            due = [requests for count, requests in self._joins if count <= self._count]
            self._joins = [join for join in self._joins if join[0] > self._count]
        for requests in due:
            self.engine.submit(requests, self.emit)

    def join(self, count: int, requests: Sequence[Request]) -> None:
        """Submits requests once `count` tokens have been emitted in all."""
        self._joins.append((count, requests))

    def submit(self, *requests: Request) -> None:
        self.engine.submit(requests, self.emit)

    def wait(self, *ids: str, seconds: float = PATIENCE) -> list[Finished | Failed]:
        """Until these requests have ended."""
        with self._ready:
            assert self._ready.wait_for(lambda: all(i in self.ended for i in ids), seconds), f"no end of {ids}"
        return [self.ended[i] for i in ids]

    def finished(self, *requests: Request) -> list[Finished]:
        """Submits, waits, and takes for granted that all of them worked."""
        self.submit(*requests)
        return self.results(*(r.id for r in requests))

    def results(self, *ids: str) -> list[Finished]:
        ended = self.wait(*ids)
        for event in ended:
            assert isinstance(event, Finished), event
        return [event for event in ended if isinstance(event, Finished)]

    def output(self, request_id: str) -> list[int]:
        return [token for event in self.tokens[request_id] for token in event.ids]

    def ref(self, key: int) -> DeltaRef:
        delta = self.host[key]
        known = delta.kinds, delta.prompt_length, delta.position_shift, delta.invocation
        return DeltaRef(key, f"d{key}@1", *known, delta.prompt_place, delta.whole)

    def publish(self, key: int, delta: Delta, label: str = "") -> int:
        self.host[key] = delta
        done: Future[int] = self.engine.publish(key, delta, label or f"d{key}@1")
        return done.result(PATIENCE)

    def until(self, check: Callable[[], bool], seconds: float = PATIENCE) -> None:
        end = time.monotonic() + seconds
        while not check():
            assert time.monotonic() < end, "it never came true"
            time.sleep(0.002)

    def idle(self) -> None:
        """Nothing is left behind: no KV, pin or queue entry."""
        self.until(lambda: self.engine.stats().running + self.engine.stats().waiting == 0)
        stats = self.engine.stats()
        assert (stats.kv_used_tokens, stats.pins, stats.waiting_for_load) == (0, 0, 0)


@pytest.fixture
def drive(tiny: Callable[[str], Path]) -> Iterator[Callable[..., Driver]]:
    """Opens a tiny backbone and starts an engine on it; other settings by name."""
    started: list[Driver] = []

    def start(name: str, dtype: str = "float32", run: bool = True, **settings: Any) -> Driver:
        given = dict(pool_bytes=1 << 22, kv_bytes=1 << 22, threads=1) | settings
        driver = Driver(load(str(tiny(name)), dtype=dtype, device="cpu"), EngineSettings(**given))
        started.append(driver)
        if run:
            driver.engine.start()
        return driver

    yield start
    for driver in started:
        driver.engine.drain(0)


def _random(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator)


def _matrix(generator: torch.Generator, rows: int, columns: int, size: float = 1.0) -> torch.Tensor:
    return _random(generator, rows, columns) * size / columns**0.5


def _lowrank(site: Site, g: torch.Generator) -> tuple[SitePrimitive, ...]:
    rank = 1 + int(torch.randint(0, 8, (), generator=g))
    return (LowRank(_matrix(g, rank, site.in_features), _matrix(g, site.out_features, rank), 0.4),)


def _affine(site: Site, g: torch.Generator) -> tuple[SitePrimitive, ...]:
    scale = 1 + 0.3 * _random(g, site.out_features)
    if site.type is SiteType.NORM:
        return (Affine(scale=scale, shift=0.1 * _random(g, site.out_features)),)
    return (Affine(1 + 0.3 * _random(g, site.in_features), scale, 0.1 * _random(g, site.out_features)),)


def _dense(site: Site, g: torch.Generator) -> tuple[SitePrimitive, ...]:
    bias = 0.1 * _random(g, site.out_features)
    return (Dense(_matrix(g, site.out_features, site.in_features, 0.4), bias),)


def _replace(site: Site, g: torch.Generator) -> tuple[SitePrimitive, ...]:
    return (Dense(_matrix(g, site.out_features, site.in_features), replace=True),)


def _all(site: Site, g: torch.Generator) -> tuple[SitePrimitive, ...]:
    return _lowrank(site, g) + _affine(site, g) + _dense(site, g)


def _sharing(
    spec: BackboneSpec, g: torch.Generator, base: int, rank: int = 64
) -> tuple[dict[str, tuple[SitePrimitive, ...]], dict[str, torch.Tensor]]:
    linears = [site for site in spec.sites.values() if site.type in _LINEAR]
    frozen = torch.Generator().manual_seed(base)
    a = _matrix(frozen, rank, max(site.in_features for site in linears))
    b = _matrix(frozen, max(site.out_features for site in linears), rank)
    at: dict[str, tuple[SitePrimitive, ...]] = {
        site.name: (
            LowRank(
                a[:, : site.in_features],
                b[: site.out_features],
                0.4,
                _random(g, rank) if place % 3 else None,
                _random(g, site.out_features),
            ),
        )
        for place, site in enumerate(linears)
    }
    return at, {content_key(a): a, content_key(b): b}


_LINEAR = (SiteType.LINEAR, SiteType.CONV1D)
_AT: dict[str, tuple[tuple[SiteType, ...], Callable[[Site, torch.Generator], tuple[SitePrimitive, ...]]]] = {
    "lowrank": (_LINEAR, _lowrank),
    "affine": ((*_LINEAR, SiteType.NORM), _affine),
    "dense": (_LINEAR, _dense),
    "replace": (_LINEAR, _replace),
    "all": (_LINEAR, _all),
}


@pytest.fixture(scope="session")
def make_delta() -> Callable[..., Delta]:
    """A random delta: `lowrank`, `affine`, `dense`, `replace`, `all` of them at every such site; `prefix`, `prompt`.

    Or `sharing`: scales of two frozen matrices, which are those of every other such delta of the same `base`.
    """

    def make(kind: str, spec: BackboneSpec, seed: int = 0, **known: Any) -> Delta:
        g = torch.Generator().manual_seed(seed)
        at: dict[str, tuple[SitePrimitive, ...]] = {}
        length = 2 + seed % 5
        if kind in _AT:
            types, primitives = _AT[kind]
            at = {site.name: primitives(site, g) for site in spec.sites.values() if site.type in types}
        elif kind == "sharing":
            at, known["bases"] = _sharing(spec, g, known.pop("base", 0))
        elif kind == "prefix":
            for name in spec.prefix_sites:
                site = spec.sites[name]
                keys, values = (_random(g, length, site.kv_heads, site.head_dim) for _ in range(2))
                at[name] = (Prefix(keys, values),)
            known["position_shift"] = length if spec.prefix_positions else 0
        elif kind == "prompt":
            known["prompt"] = SoftPrompt(_random(g, length, spec.hidden_size))
        provenance = Provenance("test", f"{kind}{seed}", 0, 0)
        return Delta((kind,), at, known.pop("task", Task.GENERATION), provenance, **known)

    return make
