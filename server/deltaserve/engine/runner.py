"""One batch through the backbone: plan, forward, tokens, rows. The only caller of the backbone's forward."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import torch

from deltaserve.backbone.model import Backbone, Rows
from deltaserve.deltas.sites import Pooling
from deltaserve.engine import sampler
from deltaserve.engine.planner import Layout, Planner, Pooled, Sampled
from deltaserve.engine.request import Job, PositionLogprobs
from deltaserve.engine.scheduler import Batch
from deltaserve.engine.sequence import Sequence
from deltaserve_kernels.dense import heads
from deltaserve_kernels.rowmap import RowMap


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one forward gave a sequence. Only what belongs to its job is set."""

    sequence: Sequence
    token: int | None = None
    logprobs: tuple[PositionLogprobs, ...] = ()
    positions: tuple[PositionLogprobs, ...] = ()
    scores: tuple[tuple[float, ...], ...] = ()
    vector: tuple[float, ...] = ()


class Runner:
    """Owns the plan; the engine owns everything that outlives a step."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._planner = Planner(backbone)
        self._pad_id = backbone.defaults.pad_id

    @torch.inference_mode()
    def run(self, batch: Batch) -> list[Outcome]:
        """Runs the forward; one outcome for each sequence that got something in it."""
        layout = self._planner.layout(batch)
        rows = self._backbone.forward(layout.plan)
        outcomes: list[Outcome] = []
        if layout.sampled:
            outcomes += self._tokens(layout, self._backbone.logits(layout.plan, rows))
        if layout.pooled:
            outcomes += self._rows(layout, rows)
        return outcomes

    def _tokens(self, layout: Layout, logits: torch.Tensor) -> list[Outcome]:
        drawing = [s for s in layout.sampled if s.draw]
        chosen: dict[int, int] = {}
        if drawing:
            last = torch.tensor([s.at + s.count - 1 for s in drawing], device=logits.device)
            tokens = sampler.choose(logits[last], [s.sequence for s in drawing])
            chosen = {s.at: token for s, token in zip(drawing, tokens, strict=True)}
        return [self._token(s, logits, chosen.get(s.at)) for s in layout.sampled]

    @staticmethod
    def _token(place: Sampled, logits: torch.Tensor, token: int | None) -> Outcome:
        request = place.sequence.request
        own: tuple[PositionLogprobs, ...] = ()
        positions: tuple[PositionLogprobs, ...] = ()
        if place.targets:
            top = request.score_logprobs if request.job is Job.SCORE else 0
            if request.sampling is not None and request.sampling.prompt_logprobs is not None:
                top = request.sampling.prompt_logprobs
            rows = logits[place.at : place.at + len(place.targets)]
            positions = tuple(sampler.logprobs(rows, place.targets, top))
        if token is not None and request.sampling is not None and request.sampling.logprobs is not None:
            at = place.at + place.count - 1
            own = tuple(sampler.logprobs(logits[at : at + 1], [token], request.sampling.logprobs))
        return Outcome(place.sequence, token, own, positions)

    def _rows(self, layout: Layout, rows: Rows) -> list[Outcome]:
        hidden = rows.tokens
        assert hidden is not None
        embedded: list[tuple[Sequence, torch.Tensor]] = []
        classified: list[tuple[Pooled, torch.Tensor]] = []
        for place in layout.pooled:
            first, end = place.rows
            own = hidden[first:end]
            if place.sequence.request.job is Job.EMBED:
                pooling = place.sequence.request.pooling
                assert pooling is not None
                embedded.append((place.sequence, _EMBED[pooling](own, place.sequence).float()))
            else:
                classified.append((place, self._head_rows(place, own, rows)))
        # One wait for all.
        vectors = torch.stack([vector for _, vector in embedded]).tolist() if embedded else []
        told = zip(embedded, vectors, strict=True)
        return [Outcome(sequence, vector=tuple(vector)) for (sequence, _), vector in told] + self._classify(classified)

    def _head_rows(self, place: Pooled, own: torch.Tensor, rows: Rows) -> torch.Tensor:
        """The rows a delta's head reads, [n, hidden]."""
        sequence = place.sequence
        assert sequence.place is not None and sequence.place.delta is not None
        match sequence.place.delta.pooling:
            case Pooling.POOLER | Pooling.POOLER_MEAN | Pooling.POOLER_TOKENS:
                assert rows.pooled is not None and place.pooled_rows is not None
                return rows.pooled[slice(*place.pooled_rows)]
            case Pooling.CLS:
                return own[:1]
            case Pooling.LAST:
                return own[-1:]
            case Pooling.LAST_REAL:
                row = self._last_real(sequence)
                return _tokens(own, sequence)[row : row + 1]
            case Pooling.TOKENS:
                return _tokens(own, sequence)
            case other:
                raise AssertionError(f"no head reads {other}")

    def _last_real(self, sequence: Sequence) -> int:
        """transformers' decoder-only classifiers read the rightmost token that is not the pad token, else the first."""
        ids = sequence.request.ids
        if self._pad_id is None:
            return len(ids) - 1
        return next((i for i in range(len(ids) - 1, -1, -1) if ids[i] != self._pad_id), 0)

    def _classify(self, classified: list[tuple[Pooled, torch.Tensor]]) -> list[Outcome]:
        if not classified:
            return []
        rowmap = RowMap.of([(p.sequence.slot, r.shape[0]) for p, r in classified], self._backbone.device)
        layers = {}
        for place, _ in classified:
            resident = place.sequence.place
            assert resident is not None and resident.delta is not None and resident.delta.head is not None
            layers[resident.slot] = [(h.weight, h.bias, h.activation) for h in resident.delta.head.layers]
        scores = heads(torch.cat([r for _, r in classified]), rowmap, layers)
        told = iter(torch.cat(scores).tolist())
        numbers = iter([tuple(islice(told, row.shape[0])) for row in scores])
        outcomes = []
        for place, rows in classified:
            outcomes.append(Outcome(place.sequence, scores=tuple(islice(numbers, rows.shape[0]))))
        return outcomes


def _tokens(rows: torch.Tensor, sequence: Sequence) -> torch.Tensor:
    """Of all rows of a sequence [n, hidden] those of its tokens."""
    place, prompt = sequence.prompt_place, sequence.prompt_rows
    return rows[prompt:] if not place else torch.cat((rows[:place], rows[place + prompt :]))


_EMBED: dict[Pooling, Callable[[torch.Tensor, Sequence], torch.Tensor]] = {
    Pooling.MEAN: lambda rows, sequence: _tokens(rows, sequence).float().mean(0),
    Pooling.CLS: lambda rows, _: rows[0],
    Pooling.LAST: lambda rows, _: rows[-1],
}
