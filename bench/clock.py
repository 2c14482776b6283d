"""Times variants of one piece of work against each other in one process, interleaved."""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Variant:
    """`run` is timed; `before` puts things as this variant needs them, and is not."""

    name: str
    run: Callable[[], object]
    before: Callable[[], None] = _nothing


def interleaved(
    variants: Sequence[Variant],
    rounds: int,
    device: torch.device,
    seed: int,
    done: Callable[[], object] = _nothing,
    warm: bool = True,
) -> Mapping[str, list[float]]:
    """Seconds by variant, one for each round; in a round each variant runs once, in an order drawn anew.

    Every timed run comes right after an untimed one of the same variant, so that none pays for the caches that another
    has emptied; without `warm` it does not, where one run fills them many times over. `done` is called after each.
    """
    order = random.Random(seed)
    seconds: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for _ in range(rounds):
        for variant in order.sample(variants, len(variants)):
            for _ in range(1 + warm):
                variant.before()
                _wait(device)
                begin = time.perf_counter()
                variant.run()
                _wait(device)
                took = time.perf_counter() - begin
            seconds[variant.name].append(took)
            done()
    return seconds


def ratios(seconds: Sequence[float], against: Sequence[float]) -> list[float]:
    """Round by round."""
    return [ours / theirs for ours, theirs in zip(seconds, against, strict=True)]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
