"""Which spans of a text its tokens' scores as start and as end speak for: extractive question answering.

As the question-answering pipeline of transformers 4 has it (arXiv 1810.04805, section 4.2), without its rounding of an
answer to whole words.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from deltaserve.service.text import Encoding

Numbers = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Found:
    """Tokens `start` to `end`, the last one included; `logit` is the sum of their scores, `probability` a product."""

    start: int
    end: int
    logit: float
    probability: float


def allowed(encoding: Encoding, segment: int | None) -> list[bool]:
    """Tokens that a span may be of: those of a segment (None: of any), but no special ones."""
    count = len(encoding.ids)
    segments = encoding.segments or encoding.token_type_ids or (0,) * count
    special = encoding.special or (False,) * count
    return [not s and segment in (None, own) for s, own in zip(special, segments, strict=True)]


@np.errstate(invalid="ignore")  # a head may say NaN
def best(
    rows: Sequence[Sequence[float]], within: Sequence[bool], beside: Sequence[bool], top_k: int, longest: int
) -> list[Found]:
    """The `top_k` likeliest spans of at most `longest` tokens, best first; equal ones in the text's order.

    rows [tokens, 2]: start, end. P(i, j) = softmax(start)_i · softmax(end)_j for i ≤ j < i + longest, the softmax over
    the tokens `within` and `beside`. Every token of a span is `within`. O(tokens · longest).
    """
    inside = np.asarray(within, dtype=bool)
    if not inside.any():
        return []
    scores = np.asarray(rows, dtype=np.float64)
    counted = inside | np.asarray(beside, dtype=bool)
    total = _logsumexp(scores[counted, 0]) + _logsumexp(scores[counted, 1])
    starts, ends = scores[:, 0], scores[:, 1]
    logits, firsts, lasts = np.empty(0), np.empty(0, np.int64), np.empty(0, np.int64)
    whole = inside  # whether all tokens from one to the one `offset` behind it are within
    for offset in range(min(longest, len(scores))):
        whole = whole[: len(scores) - offset] & inside[offset:]
        places = np.flatnonzero(whole)
        sums = starts[places] + ends[places + offset]
        good = _highest(sums, top_k)
        logits = np.concatenate((logits, sums[good]))
        firsts, lasts = np.concatenate((firsts, places[good])), np.concatenate((lasts, places[good] + offset))
        order = np.lexsort((lasts, firsts, -logits))[:top_k]
        logits, firsts, lasts = logits[order], firsts[order], lasts[order]
    found = zip(logits.tolist(), firsts.tolist(), lasts.tolist(), strict=True)
    return [Found(start, end, logit, math.exp(logit - total)) for logit, start, end in found]


def _highest(values: Numbers, count: int) -> Places:
    """Where the `count` highest stand, in order of place; of equal ones those that come first."""
    if len(values) <= count:
        return np.arange(len(values))
    least = np.partition(values, len(values) - count)[len(values) - count]
    above = np.flatnonzero(values > least)
    return np.concatenate((above, np.flatnonzero(values == least)[: count - len(above)]))


def _logsumexp(values: Numbers) -> float:
    highest = float(values.max())
    return highest + math.log(float(np.exp(values - highest).sum()))
