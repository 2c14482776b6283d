"""Soft prompts in what the embedding module gives, couplings of embedded rows, gated and empty prefixes."""

from collections.abc import Callable

import pytest
import torch
from adapted import ACTS, delta_of, drawn, gate_by_hand, ids_of, random_gate
from transformers import PreTrainedModel

from deltaserve.deltas.adapters import Coupling, Net
from deltaserve.deltas.delta import Delta, Provenance
from deltaserve.deltas.primitives import Head, HeadLayer, Prefix, SoftPrompt
from deltaserve.deltas.sites import BackboneSpec, Pooling, Task
from deltaserve.engine.request import Job, Request, Sampling
from deltaserve_kernels.testing import error_ratio

EXACT = 1e-5
WIDTH = 32


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def embed(i: int, ref, pooling: Pooling, length: int = 9) -> Request:
    return Request(f"e{i}{pooling}", Job.EMBED, ids_of(1 + i % length, i), ref, pooling=pooling)


def prompted(model: PreTrainedModel, ids: tuple[int, ...], rows: torch.Tensor, place: int, types=None) -> torch.Tensor:
    """Hidden rows of an encoder whose embedding module's output has `rows` behind its first `place` rows."""

    def put(_, __, y: torch.Tensor) -> torch.Tensor:
        return torch.cat((y[:, :place], rows.unsqueeze(0), y[:, place:]), 1)

    handle = model.embeddings.register_forward_hook(put)
    try:
        mask = torch.ones(1, 1, 1, len(ids) + rows.shape[0], dtype=torch.bool)
        given = {} if types is None else {"token_type_ids": torch.tensor([types])}
        start = 1 + model.config.pad_token_id if model.config.model_type == "roberta" else 0
        positions = torch.arange(start, start + len(ids)).unsqueeze(0)
        with torch.no_grad():
            found = model(input_ids=torch.tensor([ids]), position_ids=positions, attention_mask=mask, **given)
    finally:
        handle.remove()
    return found.last_hidden_state[0]


@pytest.mark.parametrize("name", ["bert", "roberta"])
@pytest.mark.parametrize("place", [0, 1])
def test_soft_prompts_behind_the_embeddings(name: str, place: int, drive, plain, make_delta: Callable[..., Delta]):
    driver, model = drive(name), plain(name)
    prompts = [SoftPrompt(drawn(generator(i), 1 + 2 * i, WIDTH), place) for i in range(3)]
    for key, prompt in enumerate(prompts):
        driver.publish(key, delta_of({}, prompt=prompt))
    driver.publish(3, make_delta("prompt", driver.backbone.spec, seed=3))
    driver.publish(4, make_delta("all", driver.backbone.spec, seed=3))
    for pooling in (Pooling.MEAN, Pooling.CLS, Pooling.LAST):
        requests = [embed(i, driver.ref((i * 3) % 5), pooling) for i in range(15)]
        requests.append(embed(15, None, pooling))
        for request, end in zip(requests, driver.finished(*requests), strict=True):
            key = None if request.delta is None else request.delta.key
            if key in (3, 4):
                continue  # test_mixed.py's
            rows = torch.empty(0, WIDTH) if key is None else prompts[key].rows
            hidden = prompted(model, request.ids, rows, place)
            own = torch.cat((hidden[:place], hidden[place + rows.shape[0] :]))
            expected = {Pooling.MEAN: own.mean(0), Pooling.CLS: hidden[0], Pooling.LAST: hidden[-1]}[pooling]
            assert error_ratio(torch.tensor(end.vector), expected) <= EXACT
    driver.idle()


def test_heads_over_placed_prompts(drive, plain):
    """Labels of tokens leave the prompt out; the first row is read of the prompted sequence; segments stay in place."""
    driver, model = drive("bert"), plain("bert")
    layer = HeadLayer(drawn(generator(5), 3, WIDTH), drawn(generator(6), 3))
    poolings = (Pooling.TOKENS, Pooling.CLS, Pooling.POOLER)
    for key, pooling in enumerate(poolings):
        prompt = SoftPrompt(drawn(generator(key), 4, WIDTH), 1)
        known = {"head": Head((layer,)), "pooling": pooling, "prompt": prompt}
        made = Delta(("prompt",), {}, Task.SEQUENCE_CLASSIFICATION, Provenance("test", str(key), 0, 0), **known)
        driver.publish(key, made)
    types = (0, 0, 0, 1, 1)
    requests = [Request(f"c{i}", Job.CLASSIFY, ids_of(5, i), driver.ref(i % 3), token_type_ids=types) for i in range(9)]
    for request, end in zip(requests, driver.finished(*requests), strict=True):
        delta = driver.host[request.delta.key]
        hidden = prompted(model, request.ids, delta.prompt.rows, 1, types)
        read = {
            Pooling.TOKENS: torch.cat((hidden[:1], hidden[5:])),
            Pooling.CLS: hidden[:1],
            Pooling.POOLER: model.pooler(hidden[:1].unsqueeze(0)),
        }[delta.pooling]
        assert error_ratio(torch.tensor(end.scores), read @ layer.weight.T + layer.bias) <= EXACT


def net(g: torch.Generator, width: int, act: str | None) -> Net:
    half = WIDTH // 2
    size = half**-0.5
    return Net(drawn(g, width, half, size=size), drawn(g, width), drawn(g, half, width, size=size), drawn(g, half), act)


def couplings() -> list[Coupling]:
    names = list(ACTS)
    pairs = [(net(generator(i), 4 + i, names[i % 5]), net(generator(10 + i), 9, names[(i + 1) % 5])) for i in range(4)]
    return [Coupling(f, g, undone=i % 2 == 1) for i, (f, g) in enumerate(pairs)]


def through(f: Net, x: torch.Tensor) -> torch.Tensor:
    return ACTS[f.activation](x @ f.down.T + f.down_bias) @ f.up.T + f.up_bias


def coupled(c: Coupling, e: torch.Tensor) -> torch.Tensor:
    x1, x2 = e[..., : WIDTH // 2], e[..., WIDTH // 2 :]
    y1 = x1 + through(c.f, x2)
    return torch.cat((y1, x2 + through(c.g, y1)), -1)


def uncoupled(c: Coupling, y: torch.Tensor) -> torch.Tensor:
    y1, y2 = y[..., : WIDTH // 2], y[..., WIDTH // 2 :]
    x2 = y2 - through(c.g, y1)
    return torch.cat((y1 - through(c.f, x2), x2), -1)


EMBEDDED = {"bert": "embeddings", "gpt2": "transformer.drop"}


class Coupled:
    """Hooks for a coupling on a plain model: at its embedded rows, and in front of the vocabulary linear."""

    def __init__(self, model: PreTrainedModel, coupling: Coupling | None) -> None:
        self.handles = []
        if coupling is None:
            return
        kind = model.config.model_type
        if kind == "t5":
            place = model.encoder.block[0]
            hook = lambda _, args: (coupled(coupling, args[0]), *args[1:])  # noqa: E731
            self.handles.append(place.register_forward_pre_hook(hook))
        else:
            factor = WIDTH**0.5 if kind == "gemma2" else 1.0
            place = model.get_submodule(EMBEDDED.get(kind, "model.embed_tokens"))
            self.handles.append(place.register_forward_hook(lambda _, __, y: coupled(coupling, y / factor) * factor))
        if coupling.undone and hasattr(model, "lm_head"):
            back = lambda _, args: (uncoupled(coupling, args[0]),)  # noqa: E731
            self.handles.append(model.lm_head.register_forward_pre_hook(back))

    def __enter__(self) -> None:
        torch.set_grad_enabled(False)

    def __exit__(self, *_: object) -> None:
        torch.set_grad_enabled(True)
        for handle in self.handles:
            handle.remove()


def coupling_of(driver, request: Request) -> Coupling | None:
    return None if request.delta is None else driver.host[request.delta.key].coupling


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "gemma2", "t5"])
def test_couplings_of_embedded_rows(name: str, drive, plain, make_delta: Callable[..., Delta]):
    driver, model = drive(name), plain(name)
    for key, coupling in enumerate(couplings()):
        driver.publish(key, delta_of({}, coupling=coupling))
    driver.publish(4, make_delta("all", driver.backbone.spec))
    requests = [embed(i, None if i % 6 == 5 else driver.ref(i % 6), Pooling.MEAN) for i in range(24)]
    base = model.encoder if name == "t5" else model.base_model
    for request, end in zip(requests, driver.finished(*requests), strict=True):
        if request.delta is not None and request.delta.key == 4:
            continue
        with Coupled(model, coupling_of(driver, request)):
            expected = base(input_ids=torch.tensor([request.ids])).last_hidden_state[0].mean(0)
        assert error_ratio(torch.tensor(end.vector), expected) <= EXACT
    driver.idle()


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "t5"])
def test_couplings_in_generation(name: str, drive, plain):
    driver, model = drive(name, max_batch_tokens=24), plain(name)
    for key, coupling in enumerate(couplings()):
        driver.publish(key, delta_of({}, coupling=coupling))
    refs = [None if i % 5 == 4 else driver.ref(i % 5) for i in range(10)]
    requests = [
        Request(f"g{i}", Job.GENERATE, ids_of(1 + i * 5 % 17, i), ref, sampling=Sampling(6, logprobs=0))
        for i, ref in enumerate(refs)
    ]
    moved = 0
    driver.finished(*requests)
    for request in requests:
        tokens = driver.output(request.id)
        told = [event.logprobs[0].chosen.logprob for event in driver.tokens[request.id]]
        expected = []
        for count, token in enumerate(tokens):
            made = tokens[:count]
            if name == "t5":
                given = {"input_ids": torch.tensor([request.ids]), "decoder_input_ids": torch.tensor([[0, *made]])}
            else:
                given = {"input_ids": torch.tensor([[*request.ids, *made]])}
            with Coupled(model, coupling_of(driver, request)):
                scores = torch.log_softmax(model(**given).logits[0, -1], -1)
            with torch.no_grad():
                moved += int(model(**given).logits[0, -1].argmax()) != token
            assert int(scores.argmax()) == token
            expected.append(float(scores[token]))
        assert error_ratio(torch.tensor([told]), torch.tensor([expected])) <= EXACT
    assert moved > 6


def gated_prefixes(spec: BackboneSpec, numbers: int, seed: int) -> Delta:
    g = generator(seed)
    at = {}
    for name in spec.prefix_sites:
        site = spec.sites[name]
        keys, values = (drawn(g, 3 + seed, site.kv_heads, site.head_dim) for _ in range(2))
        at[name] = (Prefix(keys, values, gate=random_gate(g, WIDTH, numbers)),)
    return delta_of(at)


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_prefixes_with_gates(name: str, drive, plain, make_delta: Callable[..., Delta]):
    """The oracle attends by hand: transformers' own rows, keys and values, and the prefix's times their gates."""
    driver, model = drive(name), plain(name)
    spec = driver.backbone.spec
    for key in range(4):
        driver.publish(key, gated_prefixes(spec, 1 + key % 2, key))
    ungated = {n: (Prefix(p.keys, p.values),) for n, (p,) in gated_prefixes(spec, 1, 7).at.items()}
    driver.publish(4, delta_of(ungated))
    requests = [embed(i, None if i % 6 == 5 else driver.ref(i % 6), Pooling.MEAN) for i in range(18)]
    for request, end in zip(requests, driver.finished(*requests), strict=True):
        delta = None if request.delta is None else driver.host[request.delta.key]
        handles = []
        for site, (prefix,) in {} if delta is None else delta.at.items():
            module = model.get_submodule(site.removeprefix(f"{name}."))
            handles.append(module.register_forward_hook(lambda m, args, y, p=prefix: (by_hand(m, args[0], p), *y[1:])))
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([request.ids])).last_hidden_state[0].mean(0)
        for handle in handles:
            handle.remove()
        assert error_ratio(torch.tensor(end.vector), expected) <= EXACT
    driver.idle()


def by_hand(module: torch.nn.Module, x: torch.Tensor, prefix: Prefix) -> torch.Tensor:
    """BERT's self-attention of x [1, n, d] with a prefix in front."""
    heads, width = prefix.keys.shape[1:]
    q, k, v = (getattr(module, n)(x)[0].view(-1, heads, width) for n in ("query", "key", "value"))
    gates = torch.ones(1) if prefix.gate is None else gate_by_hand(x[0], prefix.gate)
    k, v = torch.cat((prefix.keys * gates[0], k)), torch.cat((prefix.values * gates[-1], v))
    p = (torch.einsum("qhd,khd->hqk", q, k) / width**0.5).softmax(-1)
    return torch.einsum("hqk,khd->qhd", p, v).reshape(1, x.shape[1], -1)


def test_prefixes_without_rows_take_the_bias_away(drive, plain):
    """AdapterHub's T5: layers behind one whose prefix is of another length than the first's have no bias at all."""
    driver, model = drive("t5"), plain("t5")
    spec = driver.backbone.spec
    names = [n for n, s in spec.sites.items() if n.endswith("SelfAttention")]
    empty = {n: (Prefix(torch.empty(0, 4, 8), torch.empty(0, 4, 8), biased=False),) for n in names}
    driver.publish(0, delta_of(empty))
    driver.publish(1, delta_of({names[1]: empty[names[1]]}))
    requests = [
        Request(f"g{i}", Job.GENERATE, ids_of(2 + i * 5 % 9, i), None if i % 3 == 2 else driver.ref(i % 3),
                sampling=Sampling(6, logprobs=0))
        for i in range(9)
    ]  # fmt: skip
    driver.finished(*requests)
    for request in requests:
        delta = None if request.delta is None else driver.host[request.delta.key]
        handles = [Unbiased(model.get_submodule(site)) for site in ({} if delta is None else delta.at)]
        tokens = driver.output(request.id)
        told = [event.logprobs[0].chosen.logprob for event in driver.tokens[request.id]]
        expected = []
        for count, token in enumerate(tokens):
            given = {
                "input_ids": torch.tensor([request.ids]),
                "decoder_input_ids": torch.tensor([[0, *tokens[:count]]]),
            }
            with torch.no_grad():
                expected.append(float(torch.log_softmax(model(**given).logits[0, -1], -1)[token]))
        for handle in handles:
            handle.remove()
        assert error_ratio(torch.tensor([told]), torch.tensor([expected])) <= EXACT


class Unbiased:
    """Hooks that give one self-attention the mask alone for its bias, and the layers behind it what it was given."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.given: list[torch.Tensor | None] = []
        pre = module.register_forward_pre_hook(self.before, with_kwargs=True)
        self.handles = [pre, module.register_forward_hook(self.behind)]

    def before(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...], known: dict[str, torch.Tensor]):
        self.given.append(known["position_bias"])
        rows = args[0].shape[1]
        mask = torch.zeros(rows, rows)
        if module.is_decoder:
            mask = torch.full((rows, rows), torch.finfo(torch.float32).min).triu(1)
        return args, known | {"position_bias": mask.expand(1, module.n_heads, rows, rows)}

    def behind(self, _: torch.nn.Module, __: tuple[torch.Tensor, ...], y: tuple[torch.Tensor, ...]):
        bias = self.given.pop()
        return y if bias is None else (y[0], bias, *y[2:])

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
