"""The scheduler alone, without torch: budgets, order of arrival, and extents that all come back."""

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve.backbone.families import Shape
from deltaserve.deltas.sites import Pooling
from deltaserve.engine.request import DeltaRef, Job, Limits, Request, Sampling
from deltaserve.engine.scheduler import Batch, Scheduler
from deltaserve.engine.sequence import Sequence
from deltaserve.pool.extents import Extents
from deltaserve.pool.pool import Resident


def sequence(
    name: str, length: int, room: int = 4, job: Job = Job.GENERATE, shape: Shape = Shape.DECODER, **known: object
) -> Sequence:
    wanted = Sampling(room) if job is Job.GENERATE else None
    pooling = Pooling.MEAN if job is Job.EMBED else None
    continuation = (1,) * room if job is Job.SCORE else ()
    request = Request(name, job, (5,) * length, sampling=wanted, pooling=pooling, continuation=continuation, **known)
    return Sequence(request, lambda _: None, shape, 0.0)


class Stage:
    """A scheduler, and the part of the engine that moves sequences on."""

    def __init__(
        self,
        rows: int = 32,
        running: int = 8,
        tokens: int = 320,
        memory: int = 0,
        acquire: Callable[[Sequence], bool] = lambda _: True,
    ) -> None:
        self.limits = Limits(64, rows, running, 100)
        self.self_tokens, self.memory_tokens = Extents(tokens, 16), Extents(memory, 16)
        self.scheduler = Scheduler(self.limits, self.self_tokens, self.memory_tokens, acquire)

    def step(self) -> Batch | None:
        batch = self.scheduler.schedule()
        if batch is None:
            return None
        assert 0 < batch.rows <= self.limits.max_batch_tokens
        assert self.scheduler.running <= self.limits.max_running
        assert len(batch.sequences) == len({s.request.id for s in batch.sequences})
        slots = [s.slot for s in batch.decode], [c.sequence.slot for c in batch.prefill]
        assert all(group == sorted(group) for group in slots)
        for chunk in batch.prefill:
            assert chunk.start == chunk.sequence.computed and chunk.count > 0
            assert chunk.sequence.chunkable or chunk.last
            chunk.sequence.computed += chunk.count
        for each in batch.sequences:
            assert each.self_start is not None or not each.self_tokens
            assert each.memory_start is not None or not each.memory_tokens
            if not each.generates:
                self.scheduler.remove(each)
            elif each.decoding:
                each.output.append(7)
                if len(each.output) == each.room:
                    self.scheduler.remove(each)
        self.check()
        return batch

    def check(self) -> None:
        self.self_tokens.check()
        self.memory_tokens.check()
        held = [s for s in self.scheduler.all() if s.self_start is not None]
        assert self.self_tokens.used == sum(self.self_tokens.rounded(s.self_tokens) for s in held)
        ranges = sorted((s.self_start, s.self_start + s.self_tokens) for s in held)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(ranges))


def names(batch: Batch | None) -> list[str]:
    return [] if batch is None else [s.request.id for s in batch.sequences]


def test_decode_rows_come_first_and_prefill_fills_what_is_left():
    stage = Stage(rows=10)
    stage.scheduler.add([sequence("a", 6), sequence("b", 9)])
    first = stage.step()
    assert [(c.start, c.count) for c in first.prefill] == [(0, 6), (0, 4)] and first.phase == "prefill"
    second = stage.step()
    assert names(second) == ["a", "b"] and second.phase == "mixed"
    assert [(c.start, c.count, c.last) for c in second.prefill] == [(4, 5, True)]
    assert stage.step().phase == "decode"


def test_what_is_encoded_is_never_cut():
    stage = Stage(rows=20)
    jobs = [sequence(f"e{i}", 12, job=Job.EMBED) for i in range(3)]
    stage.scheduler.add(jobs)
    assert [names(stage.step()) for _ in range(4)] == [["e0"], ["e1"], ["e2"], []]


def test_the_number_of_running_sequences_is_bounded():
    stage = Stage(running=2)
    stage.scheduler.add([sequence(f"r{i}", 3, room=2) for i in range(3)])
    assert [names(stage.step()) for _ in range(4)] == [["r0", "r1"], ["r0", "r1"], ["r2"], ["r2"]]


def test_a_large_request_is_not_starved_by_small_ones():
    stage = Stage(rows=64, tokens=64)
    stage.scheduler.add([sequence("a", 10, room=6), sequence("large", 40, room=20)])
    stage.scheduler.add([sequence(f"s{i}", 2, room=2) for i in range(20)])
    seen = []
    while (batch := stage.step()) is not None:
        seen += [name for name in names(batch) if name not in seen]
    assert seen[:2] == ["a", "large"] and len(seen) == 22


def test_a_sequence_that_waits_for_its_delta_lets_others_pass():
    there: set[str] = set()
    stage = Stage(acquire=lambda s: s.request.delta is None or s.request.id in there)
    ref = DeltaRef(1, "d@1", ("lora",))
    stage.scheduler.add([sequence("w", 3, delta=ref), sequence("x", 3)])
    assert names(stage.step()) == ["x"]
    there.add("w")
    assert names(stage.step()) == ["x", "w"]


def test_a_sequence_that_waits_holds_no_half_of_its_memory():
    """Else what it holds could keep one before it, whose delta comes later, from running: both would wait for ever."""
    there: set[str] = {"running", "half"}
    stage = Stage(rows=200, tokens=64, memory=64, acquire=lambda s: s.request.id in there)
    build = lambda name, length, room: sequence(name, length, room, shape=Shape.ENCODER_DECODER)  # noqa: E731
    stage.scheduler.add([build("running", 30, 3), build("late", 10, 40), build("half", 40, 20)])
    assert names(stage.step()) == ["running"]
    there.add("late")
    seen = set()
    while (batch := stage.step()) is not None:
        seen.update(names(batch))
    assert seen == {"running", "late", "half"} and stage.self_tokens.used == stage.memory_tokens.used == 0


@pytest.mark.parametrize(
    ("made", "fits"),
    [
        (sequence("s", 60, room=200), True),
        (sequence("s", 60, room=300), False),  # more KV than there is
        (sequence("s", 200, room=2), True),  # a prefill may be cut
        (sequence("s", 33, job=Job.EMBED), False),  # an embedding may not
        (sequence("s", 30, room=3, job=Job.SCORE), True),  # the last token of a continuation is never an input
        (sequence("s", 30, room=4, job=Job.SCORE), False),
        (sequence("s", 30, room=2, shape=Shape.ENCODER_DECODER), True),
        (sequence("s", 32, room=2, shape=Shape.ENCODER_DECODER), False),  # 32 to encode and one to decode
    ],
)
def test_what_could_never_run(made: Sequence, fits: bool):
    assert Stage(memory=320).scheduler.fits(made) is fits


def test_rows_and_extents_of_each_kind_of_sequence():
    prompt = DeltaRef(1, "d@1", ("prompt",), prompt_length=4, position_shift=3)
    decoder = sequence("s", 7, room=5, delta=prompt)
    assert (decoder.input_rows, decoder.decoder_rows, decoder.self_tokens, decoder.memory_tokens) == (11, 0, 16, 0)
    both = sequence("s", 7, room=5, shape=Shape.ENCODER_DECODER, delta=prompt)
    assert (both.input_rows, both.decoder_rows, both.self_tokens, both.memory_tokens) == (11, 1, 6, 11)
    scored = sequence("s", 7, room=5, job=Job.SCORE, shape=Shape.ENCODER_DECODER)
    assert (scored.input_rows, scored.decoder_rows, scored.self_tokens, scored.memory_tokens) == (7, 5, 5, 7)
    embedded = sequence("s", 7, job=Job.EMBED, shape=Shape.ENCODER)
    assert (embedded.self_tokens, embedded.memory_tokens, embedded.chunkable) == (0, 0, False)


_JOBS = st.sampled_from([Job.GENERATE, Job.GENERATE, Job.SCORE, Job.EMBED])
_MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), _JOBS, st.integers(1, 30), st.integers(1, 12), st.integers(-1, 3)),
        st.tuples(st.just("cancel"), st.integers(0, 1000)),
        st.tuples(st.just("step")),
        st.tuples(st.just("load"), st.integers(0, 3)),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(moves=_MOVES, shape=st.sampled_from([Shape.DECODER, Shape.ENCODER_DECODER]))
def test_nothing_leaks_whatever_comes_and_goes(moves: list[tuple], shape: Shape):
    there: set[int] = set()

    def acquire(s: Sequence) -> bool:
        key = None if s.request.delta is None else s.request.delta.key
        if key is not None and key in there and s.place is None:
            s.place = Resident(key, "d", key, 0, 0, ())
        return key is None or s.place is not None

    stage = Stage(rows=64, running=5, tokens=192, memory=128 if shape is Shape.ENCODER_DECODER else 0, acquire=acquire)
    admitted: list[str] = []
    for i, (move, *known) in enumerate(moves):
        match move:
            case "submit":
                job, length, room, key = known
                delta = None if key < 0 else DeltaRef(key, "d", ())
                made = sequence(f"s{i}", length, room, job, shape, delta=delta)
                assert stage.scheduler.fits(made)
                stage.scheduler.add([made])
            case "cancel":
                present = stage.scheduler.all()
                if present:
                    stage.scheduler.remove(present[known[0] % len(present)])
            case "load":
                there.add(known[0])
            case "step":
                stage.step()
        stage.check()
    there.update(range(4))
    for _ in range(600):
        batch = stage.step()
        if batch is None:
            break
        admitted += names(batch)
    assert stage.scheduler.all() == [], "once all deltas are there, everybody gets a turn"
    assert stage.self_tokens.used == stage.memory_tokens.used == 0
