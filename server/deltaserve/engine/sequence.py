"""One request inside the engine: what it still has to compute and what it holds. No torch here."""

import sys
from dataclasses import dataclass, field

from deltaserve.backbone.families import Shape
from deltaserve.engine.invocation import last_start
from deltaserve.engine.request import Emit, Job, PositionLogprobs, Request
from deltaserve.pool.pool import Resident

_NEVER = sys.maxsize


@dataclass(eq=False)
class Sequence:
    """Rows of the input axis are the soft prompt's, then `ids`; a decoder-only score has its continuation behind.

    A placed prompt stands behind the first `prompt_place` of `ids`.

    `computed`: input rows done. `output`: tokens generated. `self_start` and `memory_start`: extents in the KV cache,
    None while there is none. `place`: the pinned delta, None for the bare backbone or while it waits. `queued`: counts
    against the limit of those that wait. `counts`: how often each token is in `output`. `prompt_positions`: the input's
    log-probabilities, gathered over its chunks. `acts_from`: the first of its rows, counted along the input and then
    the output, on which its delta acts.
    """

    request: Request
    emit: Emit
    shape: Shape
    arrival: float
    computed: int = 0
    output: list[int] = field(default_factory=list)
    self_start: int | None = None
    memory_start: int | None = None
    place: Resident | None = None
    queued: bool = True
    counts: dict[int, int] = field(default_factory=dict)
    prompt_positions: list[PositionLogprobs] = field(default_factory=list)
    acts_from: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        """PEFT looks for the invocation in what one forward is given: the prompt, or the input and its continuation."""
        delta = self.request.delta
        if delta is not None and delta.invocation:
            assert not self.encoder_decoder, "formats refuse it"
            start = last_start(self.request.ids + self.request.continuation, delta.invocation)
            self.acts_from = _NEVER if start is None else self.prompt_rows + start

    @property
    def encoder_decoder(self) -> bool:
        return self.shape is Shape.ENCODER_DECODER

    @property
    def slot(self) -> int:
        return -1 if self.place is None else self.place.slot

    def slots(self, first: int, count: int) -> tuple[tuple[int, int], ...]:
        """(slot, rows) of its rows [first, first + count), counted along the input and then the output."""
        bare = min(max(self.acts_from - first, 0), count)
        return ((-1, bare), (self.slot, count - bare)) if bare else ((self.slot, count),)

    @property
    def generates(self) -> bool:
        return self.request.job is Job.GENERATE

    @property
    def prompt_rows(self) -> int:
        return 0 if self.request.delta is None else self.request.delta.prompt_length

    @property
    def prompt_place(self) -> int:
        """Rows of its own that stand before the soft prompt."""
        return 0 if self.request.delta is None else self.request.delta.prompt_place or 0

    @property
    def prompt_placed(self) -> bool:
        """Whether the soft prompt stands in what the embedding module gives; positions know nothing of it then."""
        return self.request.delta is not None and self.request.delta.prompt_place is not None

    @property
    def position_shift(self) -> int:
        return 0 if self.request.delta is None else self.request.delta.position_shift

    @property
    def input_ids(self) -> tuple[int, ...]:
        """Ids of the input axis behind the soft prompt. The last token of a continuation is never an input."""
        request = self.request
        if request.job is Job.SCORE and not self.encoder_decoder:
            return request.ids + request.continuation[:-1]
        return request.ids

    @property
    def input_rows(self) -> int:
        extra = 0
        if self.request.job is Job.SCORE and not self.encoder_decoder:
            extra = len(self.request.continuation) - 1
        return self.prompt_rows + len(self.request.ids) + extra

    @property
    def decoder_rows(self) -> int:
        """Decoder rows of the step that admits it (encoder-decoder only)."""
        if not self.encoder_decoder or self.request.job is Job.EMBED:
            return 0
        return len(self.request.continuation) if self.request.job is Job.SCORE else 1

    @property
    def room(self) -> int:
        """Tokens to generate at most."""
        return 0 if self.request.sampling is None else self.request.sampling.max_new_tokens

    @property
    def self_tokens(self) -> int:
        """KV tokens of causal self-attention that it reserves, for its whole life."""
        if self.shape is Shape.ENCODER:
            return 0
        if self.encoder_decoder:
            return self.decoder_rows + self.room
        return self.input_rows + self.room

    @property
    def memory_tokens(self) -> int:
        """KV tokens of cross-attention."""
        return self.input_rows if self.decoder_rows else 0

    @property
    def chunkable(self) -> bool:
        """Whether its input may be spread over steps: a prefill may, what is encoded or pooled may not."""
        return self.generates and not self.encoder_decoder

    @property
    def decoding(self) -> bool:
        return self.generates and self.computed >= self.input_rows
