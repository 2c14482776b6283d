"""What requests get, whoever serves them, and how far two servers' answers are apart."""

from dataclasses import dataclass

import torch

from deltaserve_kernels.testing import error_ratio


@dataclass(frozen=True, eq=False)
class Answers:
    """`numbers` [requests, n]: the mean of an input's rows, or the log-probabilities of the tokens that were chosen.

    `tokens` [requests, n] where there was something to generate.
    """

    numbers: torch.Tensor
    tokens: torch.Tensor | None = None


def apart(ours: Answers, reference: Answers) -> float:
    """The error ratio of the numbers; of a generation, of those up to the first token that differs.

    That token's are compared: where two tokens are as likely, either may be chosen, and what follows has other inputs.
    """
    if ours.tokens is None or reference.tokens is None:
        return error_ratio(ours.numbers, reference.numbers)
    differs = (ours.tokens != reference.tokens).int()
    counts = differs.cumsum(1) - differs == 0
    return error_ratio(torch.where(counts, ours.numbers, reference.numbers), reference.numbers)


def moved(ours: Answers, bare: Answers) -> float:
    """By how much the least moved request differs from the bare backbone's answer."""
    pairs = zip(ours.numbers, bare.numbers, strict=True)
    return min(error_ratio(one, other) for one, other in pairs)
