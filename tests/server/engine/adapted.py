"""Adapters on plain transformers, one request at a time: each equation written down once more, by hooks."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from deltaserve.deltas.adapters import Adapter, Bottleneck, Fusion, Gate, OwnNorm, Positions, Reach, Tap
from deltaserve.deltas.delta import Delta, Provenance
from deltaserve.deltas.sites import BackboneSpec, Sublayer, Task
from deltaserve.engine.request import Request
from deltaserve_kernels.testing import error_ratio

ACTS: Mapping[str | None, Callable[[torch.Tensor], torch.Tensor]] = {
    None: lambda x: x,
    "relu": torch.relu,
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "tanh": torch.tanh,
}


def drawn(g: torch.Generator, *shape: int, size: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=g) * size


def own_norm(g: torch.Generator, width: int) -> OwnNorm:
    return OwnNorm(1 + drawn(g, width, size=0.3), drawn(g, width, size=0.3))


def random_bottleneck(g: torch.Generator, wide: int, out: int, **known: object) -> Bottleneck:
    """Of a width, activation and biases that `g` draws. In front of a norm it has biases: rows must not be constant."""
    width = int(torch.randint(1, 9, (), generator=g))
    names = list(ACTS)
    biased = bool(torch.randint(0, 2, (), generator=g)) or known.get("after") is not None
    return Bottleneck(
        down=drawn(g, width, wide, size=wide**-0.5),
        up=drawn(g, out, width, size=width**-0.5),
        down_bias=drawn(g, width, size=0.2) if biased else None,
        up_bias=drawn(g, out, size=0.5) if biased else None,
        activation=names[int(torch.randint(0, len(names), (), generator=g))],
        scale=0.3 + float(torch.rand((), generator=g)),
        **known,
    )


def random_fusion(g: torch.Generator, wide: int, inputs: tuple[Tap, ...], **known: object) -> Fusion:
    members = tuple(random_bottleneck(g, wide, wide, input=tap) for tap in inputs)
    square = {name: drawn(g, wide, wide, size=wide**-0.5) for name in ("query", "key", "value")}
    return Fusion(members, **square, query_bias=drawn(g, wide, size=0.2), key_bias=drawn(g, wide, size=0.2), **known)


def random_gate(g: torch.Generator, wide: int, numbers: int = 1) -> Gate:
    return Gate(drawn(g, numbers, wide, size=0.4), drawn(g, numbers))


def norm_by_hand(x: torch.Tensor, own: OwnNorm | None) -> torch.Tensor:
    if own is None:
        return x
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (variance + own.eps).sqrt() * own.weight + own.bias


def gate_by_hand(u: torch.Tensor, gate: Gate) -> torch.Tensor:
    """[numbers], the means over all rows."""
    return torch.sigmoid(functional.linear(u, gate.weight, gate.bias)).mean(0)


def edited(positions: Positions | None, rows: int, prompt: tuple[int, int] = (0, 0)) -> torch.Tensor:
    """bool [rows]: which rows of a whole sequence are; a soft prompt is (its rows, those that stand before it)."""
    if positions is None:
        return torch.ones(rows, dtype=torch.bool)
    own = [row for row in range(rows) if not prompt[1] <= row < prompt[1] + prompt[0]]
    last = set(own[-positions.last :] if positions.last else [])
    first = set(own[: positions.first]) - last
    wanted = {Reach.FIRST: first, Reach.LAST: last, Reach.BOTH: first | last}[positions.reach]
    return torch.tensor([row in wanted for row in range(rows)])


@dataclass(eq=False)
class Seen:
    """What one sublayer's adapters can read. [rows, width] each; `norms` by name, without their hooks."""

    own: torch.Tensor
    output: torch.Tensor
    residual: torch.Tensor | None = None
    input: torch.Tensor | None = None
    norm: Callable[[str | None, torch.Tensor], torch.Tensor] | None = None

    def read(self, tap: Tap, norm: str | None) -> torch.Tensor:
        match tap:
            case Tap.OUTPUT:
                return self.output
            case Tap.OWN:
                return self.own
            case Tap.INPUT:
                return self.input
            case Tap.RESIDUAL:
                return self.residual
            case Tap.SUM:
                return self.output + self.residual
        return self.norm(norm, self.output + self.residual)


def network(b: Bottleneck, u: torch.Tensor) -> torch.Tensor:
    hidden = ACTS[b.activation](functional.linear(norm_by_hand(u, b.before), b.down, b.down_bias))
    return b.scale * (hidden @ b.up.T) + (0 if b.up_bias is None else b.up_bias)


def result(adapter: Adapter, seen: Seen) -> torch.Tensor:
    q = 0 if adapter.carry is None else adapter.carry_scale * seen.read(adapter.carry, adapter.norm)
    if isinstance(adapter, Bottleneck):
        u = seen.read(adapter.input, adapter.norm)
        z = network(adapter, u) * (1 if adapter.gate is None else gate_by_hand(u, adapter.gate)[0])
    else:
        made = [network(m, seen.read(m.input, adapter.norm)) for m in adapter.members]
        made = [u + q if adapter.members_carry else u for u in made]
        asked = functional.linear(seen.read(adapter.query_tap, adapter.norm), adapter.query, adapter.query_bias)
        scores = torch.stack([(asked * functional.linear(u, adapter.key, adapter.key_bias)).sum(-1) for u in made])
        z = (scores.softmax(0).unsqueeze(-1) * torch.stack([u @ adapter.value.T for u in made])).sum(0)
        q = 0 if adapter.members_carry else q
    return norm_by_hand(z + q, adapter.after) if adapter.carry_inside else norm_by_hand(z, adapter.after) + q


@dataclass(eq=False)
class Oracle:
    """Hooks for the adapters `at` sites of a plain model, whose names for its modules lack `start`."""

    model: PreTrainedModel
    spec: BackboneSpec
    at: Mapping[str, tuple[Adapter, ...]]
    prompt: tuple[int, int] = (0, 0)
    _got: dict[str, torch.Tensor] = field(default_factory=dict)
    _instead: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def module(self, name: str) -> torch.nn.Module:
        bert = self.spec.family in ("bert", "roberta")
        return self.model.get_submodule(name.removeprefix(self.spec.prefix + ".") if bert else name)

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        handles = []
        ends = {sublayer.last: sublayer for sublayer in self.spec.sublayers}
        for name in self.at:
            ending = ends.get(name)
            for site in () if ending is None else (ending.first[0], ending.norm):
                hook = lambda m, args, s=site: self._got.__setitem__(s, args[0].flatten(0, -2))  # noqa: E731
                handles.append(self.module(site).register_forward_pre_hook(hook))
            if ending is not None and (ending.post or ending.sandwich):
                site = ending.norm if ending.post else ending.sandwich
                hook = lambda m, args, y, s=site: self._stood(s, y)  # noqa: E731
                handles.append(self.module(site).register_forward_hook(hook))
        for name, adapters in self.at.items():
            hook = lambda m, args, y, n=name, a=adapters: self._acted(a, ends.get(n), args[0], y)  # noqa: E731
            handles.append(self.module(name).register_forward_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        module = self.module(name)
        return type(module).forward(module, x)

    def _stood(self, site: str, y: torch.Tensor) -> torch.Tensor:
        if site not in self._instead:
            return y
        mask, rows = self._instead.pop(site)
        return torch.where(mask.unsqueeze(-1), rows, y.flatten(0, -2)).view(y.shape)

    def _acted(self, adapters: tuple[Adapter, ...], end: Sublayer | None, x: torch.Tensor, y: torch.Tensor):
        seen = Seen(x.flatten(0, -2), y.flatten(0, -2))
        if end is not None:
            seen.residual = self._got[end.first[0] if end.post else end.norm]
            seen.input = self._got[end.first[0]]
            seen.norm = lambda name, rows: self._norm(name or end.norm, rows)
        for adapter in adapters:
            positions = adapter.positions if isinstance(adapter, Bottleneck) else None
            mask = edited(positions, seen.output.shape[0], self.prompt)
            made = result(adapter, seen)
            if adapter.replaces and not end.post:
                made = made - seen.residual
            if adapter.replaces and (end.post or end.sandwich):
                self._instead[end.norm if end.post else end.sandwich] = (mask, made)
            else:
                seen.output = torch.where(mask.unsqueeze(-1), made, seen.output)
        return seen.output.view(y.shape)


def ids_of(length: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(1000 * length + seed)
    return tuple(torch.randint(3, 101, (length,), generator=generator).tolist())


def delta_of(at: dict[str, tuple[Adapter, ...]], kind: str = "adapter", **known: object) -> Delta:
    return Delta((kind,), at, Task.GENERATION, Provenance("test", kind, 0, 0), **known)


def at_ends(spec: BackboneSpec, make: Callable[[int, int], tuple[Adapter, ...]], step: int = 1) -> Delta:
    """Adapters at every `step`th sublayer; `make` gets what the last linear gets and gives."""
    sites = [spec.sites[s.last] for s in spec.sublayers[::step]]
    return delta_of({site.name: make(site.in_features, site.out_features) for site in sites})


def alone(model: PreTrainedModel, spec: BackboneSpec, ids: tuple[int, ...], delta: Delta | None) -> torch.Tensor:
    """Hidden rows of the encoder, or of a decoder-only model."""
    base = model.encoder if model.config.is_encoder_decoder else model.base_model
    with Oracle(model, spec, {} if delta is None else delta.at).hooked(), torch.no_grad():
        return base(input_ids=torch.tensor([ids])).last_hidden_state[0]


def logits(
    model: PreTrainedModel, spec: BackboneSpec, ids: tuple[int, ...], made: list[int], delta: Delta | None
) -> torch.Tensor:
    """Of the row that gives the next token, by a whole forward without a cache."""
    with Oracle(model, spec, {} if delta is None else delta.at).hooked(), torch.no_grad():
        if model.config.is_encoder_decoder:
            given = {"input_ids": torch.tensor([ids]), "decoder_input_ids": torch.tensor([[0, *made]])}
        else:
            given = {"input_ids": torch.tensor([[*ids, *made]])}
        return model(**given).logits[0, -1]


def check_generation(driver, model: PreTrainedModel, requests: Sequence[Request]) -> set[int]:
    """The keys whose tokens are not those of the bare backbone."""
    spec, moved = driver.backbone.spec, set()
    for request in requests:
        delta = None if request.delta is None else driver.host[request.delta.key]
        tokens = driver.output(request.id)
        told = [e.logprobs[0].chosen.logprob for e in driver.tokens[request.id]]
        expected = []
        for count, token in enumerate(tokens):
            scores = torch.log_softmax(logits(model, spec, request.ids, tokens[:count], delta), -1)
            assert int(scores.argmax()) == token
            expected.append(float(scores[token]))
            if delta is not None and int(logits(model, spec, request.ids, tokens[:count], None).argmax()) != token:
                moved.add(request.delta.key)
        # A log-probability is the difference of a logit and of a sum as large: five times the logits' share of itself.
        assert error_ratio(torch.tensor([told]), torch.tensor([expected])) <= 5e-5, delta and delta.at
    return moved
