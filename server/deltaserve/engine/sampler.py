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


def choose(logits: torch.Tensor, sequences: Rows[Sequence]) -> list[int]:
    """The next token of each sequence. logits [n, vocabulary], any float dtype; row i belongs to sequences[i]."""
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
    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, device=scores.device, dtype=torch.float32).unsqueeze(1)

    vocabulary = scores.shape[-1]
    ordered, ids = torch.sort(scores / column([s.temperature for s in samplings]), dim=-1, descending=True, stable=True)
    ranks = torch.arange(vocabulary, device=scores.device)
    kept = torch.where(ranks < column([s.top_k or vocabulary for s in samplings]), ordered, -math.inf)
    probabilities = kept.softmax(-1)
    # A token stays while the mass before it is below p: the smallest set that reaches p, never empty.
    before = probabilities.cumsum(-1) - probabilities
    stays = before < column([s.top_p for s in samplings])
    stays &= probabilities >= column([s.min_p for s in samplings]) * probabilities[:, :1]
    stays[:, 0] = True
    probabilities = torch.where(stays, probabilities, 0.0)
    mass = probabilities.double().cumsum(-1)
    points = torch.tensor([_uniform(s) for s in sequences], device=scores.device, dtype=torch.float64).unsqueeze(1)
    at = (mass <= points * mass[:, -1:]).sum(-1, keepdim=True)
    # What stays is a leading run; rounding may not carry a point past its end.
    at = torch.minimum(at, stays.sum(-1, keepdim=True) - 1)
    picked: torch.Tensor = ids.gather(1, at).squeeze(1)
    return picked


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
