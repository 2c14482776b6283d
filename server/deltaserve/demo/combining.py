"""How well deltas answer together that were tuned apart: asked of a server, as anybody would."""

from dataclasses import replace
from pathlib import Path
from random import Random

from deltaserve.demo import batches
from deltaserve.demo.batches import Example
from deltaserve.demo.launch import Server
from deltaserve.demo.results import CombinationOutcome, Results
from deltaserve.demo.tasks import COMBINATIONS, Combination
from deltaserve.demo.training import HELD_OUT_SEED, SHOWN_EXAMPLES, telling
from deltaserve_client import Client

_A_CALL = 64
"""Inputs that a request may have."""


def measure(assets: Path) -> Results:
    """Asks a server of an asset folder each combination, and writes what came of it to its results."""
    results = Results.read(assets)
    with Server(assets / "backbone", assets / "deltas", 0) as server, Client(server.address) as client:
        for name in sorted({name for each in COMBINATIONS for name in each.deltas}):
            client.deltas.load(name, name)
        measured = tuple(_measured(client, each, results.held_out) for each in COMBINATIONS)
    results = replace(results, combinations=measured)
    results.write(assets)
    return results


def _measured(client: Client, asked: Combination, count: int) -> CombinationOutcome:
    examples = _examples(asked.chain, count)
    answers = _answers(client, asked, examples)
    right = [each.target == tuple(answer.split()) for each, answer in zip(examples, answers, strict=True)]
    # Of the chain without one of its functions each other time: where the answer is the same, that one did nothing.
    without = [_examples(tuple(w for w in asked.chain if w != word), count) for word in asked.chain]
    shown = [
        (" ".join(each.source), " ".join(each.target))
        for each, good, *rest in zip(examples, right, *without, strict=True)
        if good and telling(each) and all(other.target != each.target for other in rest)
    ]
    return CombinationOutcome(asked.deltas, asked.chain, sum(right) / count, tuple(shown[:SHOWN_EXAMPLES]))


def _examples(chain: tuple[str, ...], count: int) -> list[Example]:
    random = Random(HELD_OUT_SEED)
    return [batches.example(random, chain, held=True) for _ in range(count)]


def _answers(client: Client, asked: Combination, examples: list[Example]) -> list[str]:
    texts = [" ".join(each.source) for each in examples]
    calls = (texts[at : at + _A_CALL] for at in range(0, len(texts), _A_CALL))
    return [result.samples[0].text for own in calls for result in client.generate(own, deltas=asked.deltas).results]
