"""From logits to tokens, vectorised over the rows of a forward.

Order: repetition penalty (arXiv 1909.05858), presence and frequency penalties, minimum length, temperature, top-k,
top-p (arXiv 1904.09751), min-p. Log-probabilities are those of the logits as the backbone gave them.
"""

import hashlib
import math
import secrets
from collections.abc import Sequence as Rows

import torch

from deltaserve.engine.request import PositionLogprobs, Sampling, TokenLogprob
from deltaserve.engine.sequence import Sequence

_HEAD = 1024
"""Leading scores that are looked at first where a filter is set."""


def choose(logits: torch.Tensor, sequences: Rows[Sequence]) -> list[int]:
    """The next token of each sequence. logits [n, vocabulary], any float dtype; row i belongs to sequences[i].

    On a GPU nothing waits for it but these tokens.
    """
    wants = [s.request.sampling for s in sequences]
    assert all(w is not None for w in wants)
    samplings = [w for w in wants if w is not None]
    scores = logits.float()
    if any(_penalises(s) for s in samplings) or any(s.min_new_tokens for s in samplings):
        scores = _penalised(scores.clone(), sequences, samplings)
    drawn = [i for i, s in enumerate(samplings) if s.temperature > 0]
    if not drawn:
        return _ints(scores.argmax(-1))
    tokens = scores.argmax(-1)
    index = torch.tensor(drawn, device=scores.device)
    rows = scores if len(drawn) == len(samplings) else scores[index]
    picked = _draw(rows, [samplings[i] for i in drawn], [sequences[i] for i in drawn])
    return _ints(tokens.index_copy(0, index, picked))


def logprobs(logits: torch.Tensor, chosen: Rows[int], top: int) -> list[PositionLogprobs]:
    """What each chosen token's probability was, and the `top` most likely ones, or all. logits [n, vocabulary]."""
    scores = torch.log_softmax(logits.float(), -1)
    index = torch.tensor(chosen, device=scores.device).unsqueeze(1)
    own = scores.gather(1, index)
    ranks = _ints((scores > own).sum(-1) + 1)
    values = own.squeeze(1).tolist()
    top = min(top, scores.shape[-1])
    best_values, best_ids = scores.topk(top, -1) if top else (scores[:, :0], scores[:, :0].long())
    tops = zip(best_values.tolist(), best_ids.tolist(), strict=True)
    return [
        PositionLogprobs(
            TokenLogprob(token, value, rank),
            tuple(TokenLogprob(i, v, r) for r, (v, i) in enumerate(zip(vs, ids, strict=True), 1)),
        )
        for token, value, rank, (vs, ids) in zip(chosen, values, ranks, tops, strict=True)
    ]


def _penalises(s: Sampling) -> bool:
    return s.repetition_penalty != 1.0 or s.presence_penalty != 0.0 or s.frequency_penalty != 0.0


def _penalised(scores: torch.Tensor, sequences: Rows[Sequence], samplings: Rows[Sampling]) -> torch.Tensor:
    rows: list[int] = []
    ids: list[int] = []
    factors: list[float] = []
    shifts: list[float] = []
    for row, (sequence, s) in enumerate(zip(sequences, samplings, strict=True)):
        if not _penalises(s):
            continue
        seen = set(sequence.counts)
        if s.repetition_penalty != 1.0 and not sequence.encoder_decoder:
            seen.update(sequence.request.ids)
        for token in seen:
            count = sequence.counts.get(token, 0)
            rows.append(row)
            ids.append(token)
            factors.append(s.repetition_penalty)
            shifts.append(s.presence_penalty * (count > 0) + s.frequency_penalty * count)
    if rows:
        at = (torch.tensor(rows, device=scores.device), torch.tensor(ids, device=scores.device))
        factor = torch.tensor(factors, device=scores.device)
        values = scores[at]
        values = torch.where(values > 0, values / factor, values * factor)
        scores[at] = values - torch.tensor(shifts, device=scores.device)
    for row, (sequence, s) in enumerate(zip(sequences, samplings, strict=True)):
        if len(sequence.output) < s.min_new_tokens:
            # An end token of the config may lie outside of a cut vocabulary.
            banned = [token for token in s.end_ids | s.stop_ids if token < scores.shape[-1]]
            scores[row, banned] = -math.inf
    return scores


def _draw(scores: torch.Tensor, samplings: Rows[Sampling], sequences: Rows[Sequence]) -> torch.Tensor:
    """A token for each row, int64 [rows]. How a row is drawn depends on nothing but the row."""
    scores = scores / _column([s.temperature for s in samplings], scores)
    points = torch.tensor([_uniform(s) for s in sequences], device=scores.device, dtype=torch.float64).unsqueeze(1)
    tokens = torch.empty(len(samplings), dtype=torch.int64, device=scores.device)
    filtered = [i for i, s in enumerate(samplings) if s.top_k or s.top_p < 1 or s.min_p]
    free = [i for i in range(len(samplings)) if i not in set(filtered)]
    if free:
        tokens[free] = _pick(scores[free].softmax(-1), points[free])
    for width in _widths(scores):
        if filtered:
            rows = scores[filtered]
            ordered, ids = rows.topk(min(width, scores.shape[-1]), -1)
            probabilities = _filtered(ordered, rows, [samplings[i] for i in filtered])
            tokens[filtered] = ids.gather(1, _pick(probabilities, points[filtered]).unsqueeze(1)).squeeze(1)
            if width >= scores.shape[-1]:
                break
            cut = (probabilities[:, -1] > 0).tolist()
            # Top-p is of what top-k left: all of that has to be in sight.
            filtered = [i for i, more in zip(filtered, cut, strict=True) if more or samplings[i].top_k > width]
    return tokens


def _widths(scores: torch.Tensor) -> tuple[int, ...]:
    """How many leading scores are looked at, one after the other: what filters leave mostly stands in a short head.

    On a CPU sorting a vocabulary costs as much as many layers; on a GPU to ask whether the head was long enough would
    wait for all that runs.
    """
    return (_HEAD, scores.shape[-1]) if scores.device.type == "cpu" else (scores.shape[-1],)


def _filtered(ordered: torch.Tensor, scores: torch.Tensor, samplings: Rows[Sampling]) -> torch.Tensor:
    """Probabilities of the leading scores, [n, width], 0 where top-k, top-p or min-p takes them out."""
    width = ordered.shape[-1]
    # As in transformers, all scores that equal the k-th stay.
    last = torch.tensor([min(s.top_k or width, width) - 1 for s in samplings], device=ordered.device).unsqueeze(1)
    limited = torch.tensor([s.top_k > 0 for s in samplings], device=ordered.device).unsqueeze(1)
    kept = torch.where(limited & (ordered < ordered.gather(1, last)), -math.inf, ordered)
    total = torch.where(limited, kept.logsumexp(-1, keepdim=True), scores.logsumexp(-1, keepdim=True))
    probabilities = (kept - total).exp()
    # A token stays while the mass before it is below p: the smallest set that reaches p, never empty.
    before = probabilities.cumsum(-1) - probabilities
    stays = before < _column([s.top_p for s in samplings], ordered)
    stays &= probabilities >= _column([s.min_p for s in samplings], ordered) * probabilities[:, :1]
    stays[:, 0] = True
    return torch.where(stays, probabilities, 0.0)


def _pick(probabilities: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Where each row's point in [0, 1) falls. probabilities [n, width], up to a factor; points fp64 [n, 1]."""
    mass = probabilities.double().cumsum(-1)
    at = (mass <= points * mass[:, -1:]).sum(-1)
    return at.clamp_max(probabilities.shape[-1] - 1)


def _column(values: list[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, device=like.device, dtype=torch.float32).unsqueeze(1)


def _uniform(sequence: Sequence) -> float:
    """A point in [0, 1): by seed and position alone, so that nothing else in the batch can move it."""
    sampling = sequence.request.sampling
    assert sampling is not None
    if sampling.seed is None:
        return secrets.randbits(53) / (1 << 53)
    digest = hashlib.blake2b(f"{sampling.seed}/{len(sequence.output)}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def _ints(tensor: torch.Tensor) -> list[int]:
    values: list[int] = tensor.tolist()
    return values
