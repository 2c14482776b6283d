"""Tasks to serve: random deltas of the kinds that can be had as a full fine-tuned copy too, and who asks for which."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from bench.deltas import linears, lora
from deltaserve.deltas.adapters import Bottleneck
from deltaserve.deltas.delta import Delta, Provenance
from deltaserve.deltas.primitives import Affine, Prefix, SitePrimitive, SoftPrompt
from deltaserve.deltas.sites import BackboneSpec, Part, Task
from deltaserve_kernels.testing import popularity

RANK, WIDTH, VIRTUAL = 8, 64, 20
"""Of a LoRA, of an adapter's bottleneck, of prefixes and prompts (tokens)."""
_SIZE = 0.02
_RANDOM = Provenance(format="random", content_hash="", file_bytes=0, tensors_matched=0)

At = Mapping[str, tuple[SitePrimitive, ...]]


@dataclass(frozen=True)
class _Maker:
    """Random numbers for one task."""

    spec: BackboneSpec
    random: torch.Generator

    def normal(self, *shape: int, size: float = _SIZE) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random) * size

    def adapters(self) -> At:
        """Behind each feed-forward (arXiv 2005.00247)."""
        return {
            last: (
                Bottleneck(
                    self.normal(WIDTH, self.spec.hidden_size), self.normal(self.spec.hidden_size, WIDTH),
                    self.normal(WIDTH), self.normal(self.spec.hidden_size), "relu",
                ),
            )
            for last in self._ends()
        }  # fmt: skip

    def biases(self) -> At:
        """Of all linears (arXiv 2106.10199); what the backbone has no bias at gains one."""
        return {site.name: (Affine(shift=self.normal(site.out_features, size=0.1)),) for site in linears(self.spec)}

    def ia3(self) -> At:
        """Keys, values, and what the last linear of each feed-forward gets (arXiv 2205.05638)."""
        ends = self._ends()
        found: dict[str, tuple[SitePrimitive, ...]] = {}
        for site in linears(self.spec):
            if site.name.rpartition(".")[2] in ("key", "value", "k_proj", "v_proj"):
                found[site.name] = (Affine(scale=1 + self.normal(site.out_features, size=0.3)),)
            elif site.name in ends:
                found[site.name] = (Affine(in_scale=1 + self.normal(site.in_features, size=0.3)),)
        return found

    def prefix(self) -> At:
        sites = [self.spec.sites[name] for name in self.spec.prefix_sites]
        shapes = {site.name: (VIRTUAL, site.kv_heads, site.head_dim) for site in sites}
        return {name: (Prefix(self.normal(*s, size=0.5), self.normal(*s, size=0.5)),) for name, s in shapes.items()}

    def prompt(self) -> SoftPrompt:
        return SoftPrompt(self.normal(VIRTUAL, self.spec.hidden_size, size=0.1))

    def _ends(self) -> set[str]:
        return {sublayer.last for sublayer in self.spec.sublayers if sublayer.part is Part.FEED_FORWARD}


_AT: Mapping[str, Callable[[_Maker], At]] = {
    "adapter": _Maker.adapters,
    "prefix": _Maker.prefix,
    "prompt": lambda _: {},
    "BitFit": _Maker.biases,
    "IA3": _Maker.ia3,
}
LORA, PROMPT, MIXED = "LoRA", "prompt", "mixed"
KINDS = (LORA, *_AT, MIXED)
"""`mixed` is each of the others in turn."""
POPULARITIES = {"distinct": "distinct", "uniform": "uniform", "zipf-1.5": "zipf", "identical": "identical"}
"""By the name in rows: the one in `deltaserve_kernels.testing`."""


def of_kind(kind: str, count: int, spec: BackboneSpec, seed: int) -> list[Delta]:
    """`count` deltas on the host, each of other numbers. Every one can be merged or put beside a plain model."""
    alone = [kind] if kind != MIXED else [each for each in KINDS if each != MIXED]
    return [_delta(alone[number % len(alone)], spec, seed + number) for number in range(count)]


def _delta(kind: str, spec: BackboneSpec, seed: int) -> Delta:
    if kind == LORA:
        return lora(spec, RANK, seed, 0.05)
    maker = _Maker(spec, torch.Generator().manual_seed(seed))
    return Delta(
        kinds=(kind,),
        at=_AT[kind](maker),
        task=Task.GENERATION,
        provenance=_RANDOM,
        prompt=maker.prompt() if kind == PROMPT else None,
        position_shift=VIRTUAL if kind == "prefix" and spec.prefix_positions else 0,
    )


@dataclass(frozen=True, eq=False)
class Asked:
    """A closed loop's requests: `ids` [requests, tokens], the task of each, and tokens to generate (0: to encode).

    The first token of each comes with the input; the others are what is timed.
    """

    ids: torch.Tensor
    tasks: tuple[int, ...]
    generate: int

    @property
    def groups(self) -> dict[int, list[int]]:
        """The requests of each task that is asked for: what a copy of its own can put into one batch."""
        found: dict[int, list[int]] = {}
        for number, task in enumerate(self.tasks):
            found.setdefault(task, []).append(number)
        return found


def asked(spec: BackboneSpec, requests: int, tokens: int, generate: int, tasks: Sequence[int], seed: int) -> Asked:
    random = torch.Generator().manual_seed(seed)
    return Asked(torch.randint(3, spec.vocab_size, (requests, tokens), generator=random), tuple(tasks), generate)


def drawn(name: str, requests: int, tasks: int, seed: int) -> tuple[int, ...]:
    """The task of each request."""
    return tuple(popularity(POPULARITIES[name], requests, tasks, seed))
