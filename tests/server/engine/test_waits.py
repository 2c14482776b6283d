"""The host waits for a forward once: for its tokens. And its plan goes to the device in one piece."""

import pytest
import torch

from bench import deltas, forwards, shapes
from deltaserve.backbone.families import Shape
from deltaserve.engine import sampler
from deltaserve.engine.planner import Planner
from deltaserve.engine.request import Job, Request, Sampling
from deltaserve.engine.runner import Runner
from deltaserve.engine.scheduler import Batch
from deltaserve.engine.sequence import Sequence
from deltaserve_kernels.dispatch import Implementation, forced

CPU = torch.device("cpu")
WAITS = ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would make the host wait for a GPU, as often as it is called."""
    seen: list[str] = []
    for name in WAITS:
        real = getattr(torch.Tensor, name)

        def watched(self, *args, real=real, name=name, **kwargs):
            seen.append(name)
            return real(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, watched)
    return seen


@pytest.fixture(scope="module")
def pair() -> shapes.Twins:
    return shapes.twins("tiny-llama", torch.float32, CPU, 3)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8}, {"temperature": 0.9, "top_k": 7, "top_p": 0.9}])
def test_a_decode_step_waits_for_its_tokens_alone(pair, sampling, waits, monkeypatch):
    """On the kernels' path, as on a GPU, where the whole vocabulary is sorted; deltas of all kinds but prompts."""
    monkeypatch.setattr(sampler, "_widths", lambda scores: (scores.shape[-1],))
    made = [each for each in deltas.of_all_kinds(pair.ours.spec, 3) if each.prompt is None]
    forward = forwards.decode(pair, len(made), 6, 3)
    for slot, delta in enumerate(made):
        pair.ours.install(slot, delta)
    try:
        sequences = []
        for number in range(len(made)):
            request = Request(
                f"r{number}", Job.GENERATE, (5, 6, 7, 8, 9, 10), sampling=Sampling(max_new_tokens=8, seed=1, **sampling)
            )
            sequence = forwards.running(pair.ours, request, number)
            sequence.computed, sequence.output, sequence.self_start = 6, [11], number * 7
            sequences.append(sequence)
        runner = Runner(pair.ours)
        with forced(Implementation.TRITON):
            first = runner.run(Batch(tuple(sequences), ()))  # boards are filled
            waits.clear()
            again = runner.run(Batch(tuple(sequences), ()))
        assert waits == ["tolist"]
        assert [o.token for o in first] == [o.token for o in again]
        assert forward is not None
    finally:
        for slot, delta in enumerate(made):
            pair.ours.remove(slot, delta)


def test_the_whole_vocabulary_sorted_gives_the_tokens_that_a_head_of_it_gives(monkeypatch):
    torch.manual_seed(5)
    logits = torch.randn(24, 5000) * 3
    sequences = []
    for number in range(24):
        told = {"top_k": (0, 3, 2000)[number % 3], "top_p": (1.0, 0.5, 0.999)[number // 3 % 3], "min_p": 0.0}
        request = Request(
            f"r{number}", Job.GENERATE, (1,), sampling=Sampling(temperature=1.5, seed=number, max_new_tokens=1, **told)
        )
        sequences.append(Sequence(request, lambda _: None, Shape.DECODER, 0.0))
    short = sampler.choose(logits, sequences)
    monkeypatch.setattr(sampler, "_widths", lambda scores: (scores.shape[-1],))
    assert sampler.choose(logits, sequences) == short


def test_what_kernels_ask_for_is_made_ahead_from_the_second_forward_on(pair):
    """Also when other requests with other slots are there."""
    forward = forwards.decode(pair, 4, 6, 3)
    lora = deltas.lora(pair.ours.spec, 4, 3)
    planner = Planner(pair.ours)
    plans = []
    for slot in (0, 1):
        pair.ours.install(slot, lora)
    try:
        for slots in ([0, 1, -1, 0], [1, 1, 0, -1], [-1, -1, -1, -1]):
            batch = []
            for number, slot in enumerate(slots):
                request = Request(f"r{number}", Job.GENERATE, (5, 6, 7, 8, 9, 10), sampling=Sampling(max_new_tokens=8))
                sequence = forwards.running(pair.ours, request, slot)
                sequence.computed, sequence.output, sequence.self_start = 6, [11], number * 7
                batch.append(sequence)
            plan = planner.layout(Batch(tuple(batch), ())).plan
            before = {axis: rowmap.asked for axis, rowmap in plan.maps.items()}
            cuts = {axis: set(sequences.kept) for axis, sequences in plan.attention.items()}
            with forced(Implementation.TRITON):
                ours = forward.ours(plan)
            with forced(Implementation.REFERENCE):
                assert torch.allclose(ours, forward.ours(plan), atol=1e-5)
            if plans:
                assert {axis: rowmap.asked for axis, rowmap in plan.maps.items()} == before
                assert {axis: set(sequences.kept) for axis, sequences in plan.attention.items()} == cuts
            plans.append(plan)
    finally:
        for slot in (0, 1):
            pair.ours.remove(slot, lora)
