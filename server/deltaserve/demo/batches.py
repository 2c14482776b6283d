"""Training and held-out examples as token ids, drawn anew and never repeated on purpose."""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import torch

from deltaserve.demo import language, tokenizer
from deltaserve.demo.functions import FUNCTIONS, apply, defined, instruction

IGNORED = -100  # no loss here


@dataclass(frozen=True)
class Batch:
    """`inputs`, `mask`: [examples, longest input]; `decoder`, `labels`: [examples, longest answer]. All int64."""

    inputs: torch.Tensor
    mask: torch.Tensor
    decoder: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class Example:
    """Words in, words out. `announced` opens the decoder's input: an instruction given to the decoder instead."""

    source: tuple[str, ...]
    target: tuple[str, ...]
    announced: tuple[str, ...] = ()


def example(random: Random, chain: tuple[str, ...], *, held: bool = False) -> Example:
    """A sentence without an instruction and what the chain makes of it."""
    while True:
        sentence = language.draw(random, held=held)
        if defined(chain, sentence):
            return Example(sentence.words(), apply(chain, sentence))


def instructed(random: Random, function: str, *, held: bool = False, decoder: bool = False) -> Example:
    """A sentence with its instruction before it, in the encoder's input or in the decoder's.

    The backbone learns both: what the decoder is told must not be in the encoder's rows, which are those that a
    prefix, living in the decoder alone, will find.
    """
    bare = example(random, (function,), held=held)
    word = (instruction(function),)
    return Example(bare.source, bare.target, word) if decoder else Example(word + bare.source, bare.target)


def collate(examples: list[Example]) -> Batch:
    table = tokenizer.ids()
    pad, eos = table[tokenizer.PAD], table[tokenizer.EOS]

    def rows(listing: list[list[int]], filler: int) -> torch.Tensor:
        longest = max(map(len, listing))
        return torch.tensor([row + [filler] * (longest - len(row)) for row in listing])

    inputs, decoder, labels = [], [], []
    for each in examples:
        announced = [table[word] for word in each.announced]
        target = [table[word] for word in each.target]
        inputs.append([*(table[word] for word in each.source), eos])
        decoder.append([pad, *announced, *target])
        labels.append([*(IGNORED for _ in announced), *target, eos])
    packed = rows(inputs, pad)
    return Batch(packed, (packed != pad).long(), rows(decoder, pad), rows(labels, IGNORED))


def pretraining(random: Random, size: int) -> Iterator[Batch]:
    """Every function, half of the instructions to the encoder and half to the decoder; without end."""
    while True:
        yield collate(
            [instructed(random, random.choice(FUNCTIONS), decoder=random.random() < 0.5) for _ in range(size)]
        )


def tuning(random: Random, chain: tuple[str, ...], size: int) -> Iterator[Batch]:
    while True:
        yield collate([example(random, chain) for _ in range(size)])
