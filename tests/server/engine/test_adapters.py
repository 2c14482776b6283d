"""Adapters of every form in one batch: each request gets what plain transformers gives with its own, alone."""

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from adapted import alone, at_ends, check_generation, ids_of, own_norm, random_bottleneck

from deltaserve.deltas.adapters import Adapter, Tap
from deltaserve.deltas.delta import Delta
from deltaserve.deltas.sites import BackboneSpec, Pooling
from deltaserve.engine.request import Job, Request, Sampling
from deltaserve_kernels.testing import error_ratio

EXACT = 1e-5
NAMES = ("bert", "t5", "llama", "gpt2")
CARRIES = (None, *Tap)


def forms(width: int) -> Iterator[dict[str, object]]:
    """Every tap with every carry, with a norm of its own behind or not, adding or replacing."""
    for number, (tap, carry, replaces) in enumerate(itertools.product(Tap, CARRIES, (False, True))):
        g = torch.Generator().manual_seed(number)
        for after, inside in ((False, False), (True, False), (True, True)):
            yield {
                "input": tap,
                "carry": carry,
                "carry_scale": 1.0 if number % 3 else 0.6,
                "replaces": replaces,
                "carry_inside": inside,
                "after": own_norm(g, width) if after else None,
            }


def deltas_of_every_form(spec: BackboneSpec) -> list[Delta]:
    made = []
    for number, form in enumerate(forms(spec.hidden_size)):
        g = torch.Generator().manual_seed(1000 + number)

        def one(wide: int, out: int, g=g, form=form, number=number) -> tuple[Adapter, ...]:
            known = form | {"carry": Tap.INPUT} if form["carry"] is Tap.OWN and wide != out else form
            wide = wide if form["input"] is Tap.OWN else out
            before = own_norm(g, wide) if number % 4 == 0 else None
            return (random_bottleneck(g, wide, out, before=before, **known),)

        # A row that only LayerNorms made, over and over, says little of the tap: every other sublayer is left alone.
        made.append(at_ends(spec, one, step=2 if number % 2 else 1))
    return made


@pytest.mark.parametrize("name", NAMES)
def test_hidden_rows_with_adapters_of_every_form(name: str, drive, plain, make_delta: Callable[..., Delta]):
    driver, model = drive(name, pool_bytes=1 << 26), plain(name)
    spec = driver.backbone.spec
    deltas = deltas_of_every_form(spec)
    for key, delta in enumerate([*deltas, make_delta("all", spec), make_delta("affine", spec)]):
        driver.publish(key, delta)
    keys = [*range(len(deltas)), None, None]
    order = [keys[i * 97 % len(keys)] for i in range(len(keys))]
    requests = [
        Request(
            f"e{i}", Job.EMBED, ids_of(1 + i % 7, i), None if key is None else driver.ref(key), pooling=Pooling.MEAN
        )
        for i, key in enumerate(order)
    ]
    for i in (3, 50, 111):  # of other kinds, among them
        requests.insert(
            i, Request(f"o{i}", Job.EMBED, ids_of(5, i), driver.ref(len(deltas) + i % 2), pooling=Pooling.MEAN)
        )
    moved = 0
    for request, end in zip(requests, driver.finished(*requests), strict=True):
        if request.id.startswith("o"):
            continue
        delta = None if request.delta is None else driver.host[request.delta.key]
        expected = alone(model, spec, request.ids, delta).mean(0)
        assert error_ratio(torch.tensor(end.vector), expected) <= EXACT, delta and next(iter(delta.at.values()))
        if delta is not None:
            bare = alone(model, spec, request.ids, None).mean(0)
            moved += float((bare - expected).abs().max()) > 1e-3
    assert moved == len(deltas)
    driver.idle()


@pytest.mark.parametrize("name", ["t5", "t5-gated", "llama", "gpt2"])
def test_generation_with_adapters_of_many_forms(name: str, drive, plain, make_delta: Callable[..., Delta]):
    """Prefill in chunks, and decode; some requests join while others run."""
    driver, model = drive(name, pool_bytes=1 << 25, max_batch_tokens=70), plain(name)
    spec = driver.backbone.spec
    deltas = deltas_of_every_form(spec)[::7]
    for key, delta in enumerate(deltas):
        driver.publish(key, delta)
    keys = [*range(len(deltas)), None, None]
    requests = [
        Request(
            f"g{i}", Job.GENERATE, ids_of(1 + i * 5 % 29, i), None if key is None else driver.ref(key),
            sampling=Sampling(6, logprobs=0),
        )
        for i, key in enumerate(keys)
    ]  # fmt: skip
    for i, request in enumerate(requests[9:]):
        driver.join(1 + 3 * i, [request])
    driver.submit(*requests[:9])
    driver.results(*(r.id for r in requests))
    moved = check_generation(driver, model, requests)
    assert len(moved) > len(deltas) / 2
    driver.idle()
