"""Several adapters at a site, fusions, gates, edits of some positions, and adapters where no sublayer ends."""

import pytest
import torch
from adapted import (
    Oracle,
    alone,
    at_ends,
    check_generation,
    delta_of,
    ids_of,
    own_norm,
    random_bottleneck,
    random_fusion,
    random_gate,
)

from deltaserve.deltas.adapters import Adapter, Positions, Reach, Tap
from deltaserve.deltas.delta import Delta
from deltaserve.deltas.primitives import SoftPrompt
from deltaserve.deltas.sites import Axis, BackboneSpec, Pooling, SiteType
from deltaserve.engine.request import Job, Request, Sampling
from deltaserve.errors import FailedPrecondition
from deltaserve_kernels.testing import error_ratio

EXACT = 1e-5
ENCODERS = ("bert", "roberta", "t5", "llama", "gpt2", "gemma2", "modernbert")
DECODERS = ("t5", "llama", "gpt2", "gemma2")
BARE = 2


def embedded(driver, model, deltas: list[Delta], length: int = 9) -> set[int]:
    """Each delta on two requests among bare ones, all in one batch; the keys that moved them."""
    for key, delta in enumerate(deltas):
        driver.publish(key, delta)
    keys = [*range(len(deltas)), *[None] * BARE, *range(len(deltas))]
    requests = [
        Request(f"e{i}", Job.EMBED, ids_of(1 + (i * 5) % length, i), key if key is None else driver.ref(key),
                pooling=Pooling.MEAN)
        for i, key in enumerate(keys)
    ]  # fmt: skip
    moved = set()
    for key, request, end in zip(keys, requests, driver.finished(*requests), strict=True):
        delta = None if key is None else deltas[key]
        expected = alone(model, driver.backbone.spec, request.ids, delta).mean(0)
        assert error_ratio(torch.tensor(end.vector), expected) <= EXACT, (request.ids, delta and delta.at)
        bare = alone(model, driver.backbone.spec, request.ids, None).mean(0)
        if key is not None and error_ratio(bare, expected) > 0.01:
            moved.add(key)
    driver.idle()
    return moved


def generated(driver, model, deltas: list[Delta], length: int = 25) -> set[int]:
    for key, delta in enumerate(deltas):
        driver.publish(key, delta)
    keys = [*range(len(deltas)), *[None] * BARE]
    requests = [
        Request(f"g{i}", Job.GENERATE, ids_of(1 + (i * 7) % length, i), key if key is None else driver.ref(key),
                sampling=Sampling(7, logprobs=0))
        for i, key in enumerate(keys)
    ]  # fmt: skip
    for i, request in enumerate(requests[4:]):
        driver.join(1 + 3 * i, [request])
    driver.submit(*requests[:4])
    driver.results(*(r.id for r in requests))
    moved = check_generation(driver, model, requests)
    driver.idle()
    return moved


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stage(g: torch.Generator, width: int, last: bool, post: bool) -> Adapter:
    """Any of them; where the norm stands behind, only the last of a chain may replace."""
    taps = [tap for tap in Tap if tap is not Tap.OWN]
    pick = lambda: taps[int(torch.randint(0, len(taps), (), generator=g))]  # noqa: E731
    replaces = bool(torch.randint(0, 2, (), generator=g)) and (last or not post)
    carry = Tap.SUM if replaces else Tap.OUTPUT
    if int(torch.randint(0, 3, (), generator=g)) == 0:
        inputs = tuple(pick() for _ in range(2 + int(torch.randint(0, 2, (), generator=g))))
        return random_fusion(g, width, inputs, query_tap=pick(), carry=carry, replaces=replaces)
    return random_bottleneck(g, width, width, input=pick(), carry=carry, replaces=replaces)


def chains(spec: BackboneSpec, count: int) -> list[Delta]:
    made = []
    fenced = any(s.post or s.sandwich for s in spec.sublayers)
    for number in range(count):
        g, length = generator(number), 1 + number % 3

        def chain(wide: int, out: int, g=g, length=length) -> tuple[Adapter, ...]:
            return tuple(stage(g, out, i + 1 == length, fenced) for i in range(length))

        made.append(at_ends(spec, chain, 1 + number % 2))
    return made


@pytest.mark.parametrize("name", ENCODERS)
def test_chains_of_bottlenecks_and_fusions(name: str, drive, plain):
    driver = drive(name, pool_bytes=1 << 25)
    assert len(embedded(driver, plain(name), chains(driver.backbone.spec, 24))) == 24


@pytest.mark.parametrize("name", DECODERS)
def test_chains_in_generation(name: str, drive, plain):
    driver = drive(name, pool_bytes=1 << 25, max_batch_tokens=60)
    assert len(generated(driver, plain(name), chains(driver.backbone.spec, 12))) > 6


def fusions(spec: BackboneSpec) -> list[Delta]:
    made = []
    options = [(carry, inside, replaces, shared) for carry in (None, Tap.OUTPUT, Tap.SUM, Tap.NORMED)
               for inside in (False, True) for replaces in (False, True) for shared in (False, True)]  # fmt: skip
    for number, (carry, inside, replaces, shared) in enumerate(options):
        g = generator(number)
        inputs = (Tap.OUTPUT, Tap.RESIDUAL, Tap.SUM, Tap.NORMED)[: 1 + number % 4]

        def make(wide: int, out: int, g=g, inputs=inputs, number=number, known=(carry, inside, replaces, shared)):
            carry, inside, replaces, shared = known
            after = own_norm(g, out) if number % 3 else None
            query = (Tap.NORMED, Tap.OUTPUT, Tap.SUM)[number % 3]
            options = {
                "carry_scale": 1.0 if number % 5 else 0.7,
                "carry_inside": inside,
                "replaces": replaces,
                "members_carry": shared,
                "after": after,
            }
            return (random_fusion(g, out, inputs, query_tap=query, carry=carry, **options),)

        made.append(at_ends(spec, make, 2))
    return made


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_fusions_of_every_form(name: str, drive, plain):
    driver = drive(name, pool_bytes=1 << 26)
    deltas = fusions(driver.backbone.spec)
    assert len(embedded(driver, plain(name), deltas)) == len(deltas) == 32


def anywhere(spec: BackboneSpec, seed: int) -> Delta:
    """Adapters that need nothing but their site, at every second linear and norm, in chains of one or two."""
    g, at = generator(seed), {}
    sites = [s for s in spec.sites.values() if s.type in (SiteType.LINEAR, SiteType.CONV1D, SiteType.NORM)]
    sites = [s for s in sites if s.axis is not Axis.POOLED and not s.name.endswith(("q_norm", "k_norm"))]
    for number, site in enumerate(sites[seed % 2 :: 2]):
        wide, out = site.in_features, site.out_features
        own = random_bottleneck(g, wide, out, input=Tap.OWN, carry=Tap.OUTPUT, carry_scale=0.9)
        carry = Tap.OWN if wide == out and number % 4 == 0 else Tap.OUTPUT
        at[site.name] = (own, random_bottleneck(g, out, out, carry=carry))[number % 2 :][: 1 + number % 3]
    return delta_of(at)


@pytest.mark.parametrize("name", ["bert", "t5", "gpt2", "llama"])
def test_adapters_at_any_linear_and_norm(name: str, drive, plain):
    driver = drive(name, pool_bytes=1 << 25)
    assert len(embedded(driver, plain(name), [anywhere(driver.backbone.spec, i) for i in range(6)])) == 6


@pytest.mark.parametrize("name", ["t5", "t5-gated", "gpt2", "llama"])
def test_adapters_at_any_linear_and_norm_in_generation(name: str, drive, plain):
    """The vocabulary linear among them, and what makes T5's cross keys and values."""
    driver = drive(name, pool_bytes=1 << 25)
    assert len(generated(driver, plain(name), [anywhere(driver.backbone.spec, i) for i in range(6)])) > 3


def test_adapters_of_cross_attention_alone(drive, plain):
    driver, model = drive("t5", pool_bytes=1 << 24), plain("t5")
    crossing = [s for s in driver.backbone.spec.sublayers if s.part == "cross_attention"]
    deltas = []
    for number, tap in enumerate(tap for tap in Tap if tap is not Tap.OWN):
        g = generator(number)
        carry = (Tap.OUTPUT, Tap.NORMED)[number % 2]
        deltas.append(delta_of({s.last: (random_bottleneck(g, 32, 32, input=tap, carry=carry),) for s in crossing}))
    assert len(generated(driver, model, deltas)) >= 3


def test_gemma_taps_a_norm_of_another_layer(drive, plain):
    """AdapterHub's: LN is the last layer's norm behind its sublayer, wherever the adapter stands."""
    driver = drive("gemma2", pool_bytes=1 << 24)
    spec = driver.backbone.spec
    deltas = []
    for number in range(4):
        g, norm = generator(number), (spec.sublayers[-1].sandwich, spec.sublayers[-2].sandwich, None)[number % 3]
        carry = (Tap.OUTPUT, Tap.NORMED)[number % 2]
        deltas.append(
            at_ends(spec, lambda _, out, g=g, n=norm, c=carry: (
                random_bottleneck(g, out, out, input=Tap.NORMED, carry=c, norm=n),
            ))
        )  # fmt: skip
    assert len(generated(driver, plain("gemma2"), deltas)) == 4


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_gates_are_means_over_a_sequence(name: str, drive, plain):
    driver = drive(name, pool_bytes=1 << 24)
    spec, deltas = driver.backbone.spec, []
    for number, tap in enumerate(Tap):
        g = generator(number)

        def gated(wide: int, out: int, g=g, tap=tap, number=number) -> tuple[Adapter, ...]:
            wide = wide if tap is Tap.OWN else out
            return (random_bottleneck(g, wide, out, input=tap, gate=random_gate(g, wide), replaces=number % 2 == 1,
                                      carry=Tap.SUM if number % 2 else Tap.OUTPUT),)  # fmt: skip

        deltas.append(at_ends(spec, gated))
    g, at = generator(9), {}
    for site in [spec.sites[first] for s in spec.sublayers for first in s.first]:
        gate = random_gate(g, site.in_features)
        at[site.name] = (random_bottleneck(g, site.in_features, site.out_features, input=Tap.OWN, gate=gate),)
    deltas.append(delta_of(at))
    assert len(embedded(driver, plain(name), deltas)) == len(deltas)


POSITIONS = [
    Positions(first, last, reach)
    for first, last in ((3, 0), (0, 2), (3, 2), (1, 4), (20, 20))
    for reach in Reach
    if (first or reach is not Reach.FIRST) and (last or reach is not Reach.LAST)
]


def edits(spec: BackboneSpec, which: list[Positions]) -> list[Delta]:
    """ReFT's: behind the last linear of each layer, some of them in chains."""
    made = []
    for number, positions in enumerate(which):
        g = generator(number)

        def edit(_: int, out: int, g=g, positions=positions) -> tuple[Adapter, ...]:
            return (random_bottleneck(g, out, out, input=Tap.SUM, positions=positions),)

        made.append(at_ends(spec, edit, 1 + number % 2))
    return made


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_edits_of_the_first_and_last_positions(name: str, drive, plain):
    driver = drive(name, pool_bytes=1 << 24)
    moved = embedded(driver, plain(name), edits(driver.backbone.spec, POSITIONS), length=12)
    # Where the last of a short sequence are all of it, none is left to be one of the first.
    assert {*range(len(POSITIONS))} - moved == {POSITIONS.index(Positions(20, 20, Reach.FIRST))}


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_edits_of_the_first_positions_in_chunks_and_decode(name: str, drive, plain):
    """A chunk may begin within them, and where the input is short the tokens that are made are among them."""
    which = [Positions(first, 0, reach) for first in (1, 4, 11, 90) for reach in (Reach.FIRST, Reach.BOTH)]
    driver = drive(name, pool_bytes=1 << 24, max_batch_tokens=32)
    assert len(generated(driver, plain(name), edits(driver.backbone.spec, which))) >= 4


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_positions_are_counted_without_the_soft_prompt(name: str, drive, plain):
    driver, model = drive(name, pool_bytes=1 << 24), plain(name)
    spec = driver.backbone.spec
    for key, delta in enumerate(edits(spec, POSITIONS)):
        prompt = SoftPrompt(torch.randn(2 + key % 3, 32, generator=generator(key)))
        driver.publish(key, delta_of(delta.at, prompt=prompt))
    requests = [
        Request(f"e{i}", Job.EMBED, ids_of(1 + i % 9, i), driver.ref(i % len(POSITIONS)), pooling=Pooling.MEAN)
        for i in range(2 * len(POSITIONS))
    ]
    for request, end in zip(requests, driver.finished(*requests), strict=True):
        delta = driver.host[request.delta.key]
        rows = model.get_input_embeddings()(torch.tensor([request.ids]))
        rows = torch.cat((delta.prompt.rows.unsqueeze(0), rows), 1)
        with Oracle(model, spec, delta.at, (delta.prompt_length, 0)).hooked(), torch.no_grad():
            hidden = model.base_model(inputs_embeds=rows).last_hidden_state[0]
        assert error_ratio(torch.tensor(end.vector), hidden[delta.prompt_length :].mean(0)) <= EXACT


def test_what_needs_whole_sequences_does_not_generate(drive):
    driver = drive("llama", pool_bytes=1 << 24)
    driver.publish(0, edits(driver.backbone.spec, [Positions(0, 2)])[0])
    with pytest.raises(FailedPrecondition, match="does not generate"):
        driver.submit(Request("g", Job.GENERATE, (5, 6), driver.ref(0), sampling=Sampling(2)))
    score = Request("s", Job.SCORE, (5, 6), driver.ref(0), continuation=(7, 8))
    assert len(driver.finished(score)[0].positions) == 2


def test_an_adapter_leaves_nothing_behind(drive, make_delta):
    """Modules run transformers' own code again when the last slot that wanted theirs is gone."""
    driver = drive("bert", run=False)
    backbone = driver.backbone
    ours = lambda: {name for name, m in backbone._modules.items() if "forward" in vars(m)}  # noqa: E731
    assert ours() == set()
    deltas = [*chains(backbone.spec, 6), make_delta("affine", backbone.spec)]
    for slot, delta in enumerate(deltas):
        backbone.install(slot, delta)
    assert ours() > set(deltas[0].at)
    for slot, delta in enumerate(deltas):
        backbone.remove(slot, delta)
    assert ours() == set() and not backbone._now.kept
