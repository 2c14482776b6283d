"""Deltas of all kinds in one batch: each request gets what transformers gives with that delta alone.

The oracle is the plain model with hooks that are each primitive's equation, a cache that holds the prefix, or
embeddings with the soft prompt before them.
"""

import contextlib
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from deltaserve.backbone.model import Backbone
from deltaserve.deltas.delta import Delta
from deltaserve.deltas.primitives import Affine, Dense, Head, HeadLayer, LowRank, Prefix, SitePrimitive
from deltaserve.deltas.sites import Pooling, Task
from deltaserve.engine.request import Job, Request, Sampling
from deltaserve_kernels.testing import error_ratio

EXACT = 1e-5
AT_LINEARS = ("lowrank", "affine", "dense", "replace", "all", "sharing", "sharing")
KINDS = {
    "t5": (*AT_LINEARS, "prompt"),
    "t5-gated": (*AT_LINEARS, "prompt"),
    "bert": (*AT_LINEARS, "prompt"),
    "modernbert": (*AT_LINEARS, "prompt"),
    "gpt2": (*AT_LINEARS, "prompt", "prefix"),
    "llama": (*AT_LINEARS, "prompt", "prefix"),
    "llama-tied": (*AT_LINEARS, "prompt", "prefix"),
}


def ids_of(length: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(1000 * length + seed)
    return tuple(torch.randint(3, 101, (length,), generator=generator).tolist())


def acted(primitives: tuple[SitePrimitive, ...], x: torch.Tensor, y: torch.Tensor, inner: torch.nn.Module):
    """One site's equation, written down once more."""
    affine = next((p for p in primitives if isinstance(p, Affine)), Affine())
    if affine.in_scale is not None:
        x = x * affine.in_scale
        y = type(inner).forward(inner, x)
    added = torch.zeros_like(y)
    for p in primitives:
        match p:
            case LowRank(a, b, scale, inner, outer):
                hidden = x @ a.T * (1 if inner is None else inner)
                added = added + scale * (1 if outer is None else outer) * (hidden @ b.T)
            case Dense(weight, bias, replace):
                added = added + x @ weight.T + (0 if bias is None else bias) - (y if replace else 0)
    y = y + added
    return y * (1 if affine.scale is None else affine.scale) + (0 if affine.shift is None else affine.shift)


@contextlib.contextmanager
def hooked(model: PreTrainedModel, delta: Delta | None) -> Iterator[None]:
    prefix = "bert." if model.config.model_type == "bert" else ""
    handles = []
    for name, primitives in {} if delta is None else delta.at.items():
        if not isinstance(primitives[0], Prefix):
            module = model.get_submodule(name.removeprefix(prefix))
            hook = lambda m, args, y, p=primitives: acted(p, args[0], y, m)  # noqa: E731
            handles.append(module.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def prefixed(model: PreTrainedModel, delta: Delta) -> DynamicCache | None:
    found = [p for primitives in delta.at.values() for p in primitives if isinstance(p, Prefix)]
    if not found:
        return None
    cache = DynamicCache(config=model.config)
    for layer, p in enumerate(found):
        cache.update(p.keys.transpose(0, 1).unsqueeze(0), p.values.transpose(0, 1).unsqueeze(0), layer)
    return cache


def embedded(model: PreTrainedModel, ids: tuple[int, ...], delta: Delta | None) -> torch.Tensor:
    rows = model.get_input_embeddings()(torch.tensor([ids]))
    return rows if delta is None or delta.prompt is None else torch.cat((delta.prompt.rows.unsqueeze(0), rows), 1)


def alone(model: PreTrainedModel, ids: tuple[int, ...], delta: Delta | None, head: bool = False) -> torch.Tensor:
    """Hidden rows (logits with `head`) of decoder-only and encoder-only models, soft-prompt rows included."""
    rows = embedded(model, ids, delta)
    known: dict[str, object] = {}
    cache = None if delta is None else prefixed(model, delta)
    if cache is not None:
        known = {
            "past_key_values": cache,
            "position_ids": torch.arange(rows.shape[1]).unsqueeze(0) + delta.position_shift,
        }
    with hooked(model, delta):
        if head:
            return model(inputs_embeds=rows, **known).logits[0]
        return model.base_model(inputs_embeds=rows, **known).last_hidden_state[0]


def greedy(model: PreTrainedModel, ids: tuple[int, ...], delta: Delta | None, count: int) -> list[int]:
    """Greedy tokens from whole forwards, no cache but the prefix."""
    made: list[int] = []
    for _ in range(count):
        if model.config.is_encoder_decoder:
            with hooked(model, delta):
                given = torch.tensor([[0, *made]])
                logits = model(inputs_embeds=embedded(model, ids, delta), decoder_input_ids=given).logits[0]
        else:
            logits = alone(model, ids + tuple(made), delta, head=True)
        made.append(int(logits[-1].argmax()))
    return made


def checksum(backbone: Backbone) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(backbone.model.state_dict().items()):
        found.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def requests_for(driver, job: Job, kinds: tuple[str, ...], count: int, **known: object) -> list[Request]:
    """`count` requests with each delta and with none, of odd lengths, deltas not in order."""
    made = []
    assert math.gcd(7, len(kinds) + 1) == 1, "each has its turn"
    for i in range(count * (len(kinds) + 1)):
        key = (i * 7) % (len(kinds) + 1)
        delta = None if key == len(kinds) else driver.ref(key)
        made.append(Request(f"{job}{i}", job, ids_of(1 + (i * 7) % 23, i), delta, **known))
    return made


def host(driver, request: Request) -> Delta | None:
    return None if request.delta is None else driver.host[request.delta.key]


@pytest.mark.parametrize("name", ["t5", "t5-gated", "gpt2", "llama", "llama-tied"])
def test_generation_with_every_kind_in_one_batch(name, drive, plain, make_delta: Callable[..., Delta]):
    driver, model, kinds = drive(name, max_batch_tokens=200), plain(name), KINDS[name]
    before = checksum(driver.backbone)
    for key, kind in enumerate(kinds):
        driver.publish(key, make_delta(kind, driver.backbone.spec, seed=key))
    requests = requests_for(driver, Job.GENERATE, kinds, 3, sampling=Sampling(max_new_tokens=10))
    for i, request in enumerate(requests[4:]):
        driver.join(1 + 4 * i, [request])
    driver.submit(*requests[:4])
    driver.results(*(r.id for r in requests))
    moved = set()
    for request in requests:
        expected = greedy(model, request.ids, host(driver, request), 10)
        assert driver.output(request.id) == expected, host(driver, request) and host(driver, request).kinds
        if request.delta is not None and expected != greedy(model, request.ids, None, 10):
            moved.update(request.delta.kinds)
    assert moved == set(kinds), "a delta that moves nothing proves nothing"
    steps = driver.engine.stats(steps=True).steps
    assert max(len(step.kinds) for step in steps) == len(set(kinds))
    driver.idle()
    assert checksum(driver.backbone) == before


@pytest.mark.parametrize("name", ["bert", "modernbert", "gpt2", "llama", "llama-tied"])
def test_hidden_rows_with_every_kind_in_one_batch(name, drive, plain, make_delta: Callable[..., Delta]):
    driver, model, kinds = drive(name), plain(name), KINDS[name]
    for key, kind in enumerate(kinds):
        driver.publish(key, make_delta(kind, driver.backbone.spec, seed=key))
    for pooling, pool in ((Pooling.MEAN, 0), (Pooling.CLS, 1), (Pooling.LAST, 2)):
        requests = requests_for(driver, Job.EMBED, kinds, 2, pooling=pooling)
        requests = [Request(f"{pooling}{r.id}", r.job, r.ids, r.delta, pooling=pooling) for r in requests]
        for request, end in zip(requests, driver.finished(*requests), strict=True):
            delta = host(driver, request)
            rows = alone(model, request.ids, delta)
            prompt = 0 if delta is None else delta.prompt_length
            expected = (rows[prompt:].mean(0), rows[0], rows[-1])[pool]
            assert error_ratio(torch.tensor(end.vector), expected) <= EXACT
    driver.idle()


def random_head(spec, pooling: Pooling, task: Task, width: int, layers: int = 1) -> dict[str, object]:
    g = torch.Generator().manual_seed(width)
    sizes = [spec.hidden_size] * layers + [width]
    made = [
        HeadLayer(torch.randn(b, a, generator=g), torch.randn(b, generator=g), "tanh" if i + 1 < layers else None)
        for i, (a, b) in enumerate(itertools.pairwise(sizes))
    ]
    return {"head": Head(tuple(made)), "pooling": pooling, "task": task}


def through(head: Head, rows: torch.Tensor) -> torch.Tensor:
    for layer in head.layers:
        rows = rows @ layer.weight.T + layer.bias
        rows = rows.tanh() if layer.activation else rows
    return rows


def read_rows(model: PreTrainedModel, delta: Delta, ids: tuple[int, ...]) -> torch.Tensor:
    """The rows that a delta's head reads, by the plain model."""
    rows, prompt = alone(model, ids, delta), delta.prompt_length
    match delta.pooling:
        case Pooling.POOLER:
            with hooked(model, delta):
                return model.head(rows[:1]) if hasattr(model, "head") else model.pooler(rows[:1].unsqueeze(0))
        case Pooling.POOLER_MEAN:
            with hooked(model, delta):
                return model.head(rows.mean(0, keepdim=True))
        case Pooling.POOLER_TOKENS:
            with hooked(model, delta):
                return model.head(rows[prompt:])
        case Pooling.CLS:
            return rows[:1]
        case Pooling.LAST:
            return rows[-1:]
        case Pooling.LAST_REAL:
            real = [i for i, token in enumerate(ids) if token != model.config.pad_token_id]
            return rows[prompt + real[-1] :][:1]
    return rows[prompt:]


@pytest.mark.parametrize(
    ("name", "poolings"),
    [
        ("bert", (Pooling.POOLER, Pooling.TOKENS, Pooling.CLS, Pooling.POOLER)),
        ("modernbert", (Pooling.POOLER, Pooling.POOLER_TOKENS)),
        ("modernbert-mean", (Pooling.POOLER_MEAN, Pooling.POOLER_TOKENS)),
        ("gpt2", (Pooling.LAST_REAL, Pooling.TOKENS, Pooling.LAST)),
        ("llama", (Pooling.LAST_REAL, Pooling.TOKENS)),
    ],
)
def test_heads_of_different_widths_in_one_batch(name, poolings, drive, plain, make_delta: Callable[..., Delta]):
    driver, model = drive(name), plain(name)
    kinds = [(kind, pooling) for kind in ("lowrank", "prompt", "affine") for pooling in poolings]
    for key, (kind, pooling) in enumerate(kinds):
        tokens = pooling in (Pooling.TOKENS, Pooling.POOLER_TOKENS)
        task = Task.TOKEN_CLASSIFICATION if tokens else Task.SEQUENCE_CLASSIFICATION
        known = random_head(driver.backbone.spec, pooling, task, 1 + key % 4, layers=1 + key % 2)
        driver.publish(key, make_delta(kind, driver.backbone.spec, seed=key, **known))
    requests = [
        # 0 is Llama's pad token: its classifiers read the last row before it.
        Request(f"c{i}", Job.CLASSIFY, ids_of(2 + (i * 3) % 11, i) + (0,) * (i % 3), driver.ref((i * 5) % len(kinds)))
        for i in range(2 * len(kinds))
    ]
    for request, end in zip(requests, driver.finished(*requests), strict=True):
        delta = driver.host[request.delta.key]
        assert error_ratio(torch.tensor(end.scores), through(delta.head, read_rows(model, delta, request.ids))) <= EXACT
    driver.idle()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_deltas_keep_the_dtype_of_their_file(dtype, drive, plain, make_delta: Callable[..., Delta]):
    """Weights in 16 bits, products in fp32: equal to the oracle with the rounded weights."""
    from deltaserve.deltas.delta import mapped

    driver, model = drive("llama"), plain("llama")
    stored = [
        mapped(make_delta(k, driver.backbone.spec, seed=7), lambda t: t.to(getattr(torch, dtype))) for k in AT_LINEARS
    ]
    for key, delta in enumerate(stored):
        assert driver.publish(key, delta) < 1.2 * delta.nbytes + 256 * sum(1 for _ in delta.tensors())
    requests = [Request(f"e{i}", Job.EMBED, ids_of(5, i), driver.ref(i % 7), pooling=Pooling.LAST) for i in range(14)]
    for request, end in zip(requests, driver.finished(*requests), strict=True):
        widened = mapped(driver.host[request.delta.key], lambda t: t.float())
        assert error_ratio(torch.tensor(end.vector), alone(model, request.ids, widened)[-1]) <= EXACT


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_bfloat16_backbone_with_deltas(name, drive, plain, make_delta: Callable[..., Delta]):
    """Scores are near those in fp32: bf16 has 8 bits, and some twenty roundings follow each other."""
    exact, driver = drive(name), drive(name, "bfloat16")
    ends = []
    for each in (exact, driver):
        for key, kind in enumerate(KINDS[name]):
            each.publish(key, make_delta(kind, each.backbone.spec, seed=key))
        requests = requests_for(each, Job.SCORE, KINDS[name], 1, continuation=ids_of(4, 3))
        ends.append(torch.tensor([[p.chosen.logprob for p in end.positions] for end in each.finished(*requests)]))
    assert error_ratio(ends[1], ends[0]) <= 0.05
