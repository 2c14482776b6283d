"""The training loop: it learns, a cut run goes on as if it had not been cut, and the batches are what they claim."""

from functools import partial
from pathlib import Path
from random import Random

import pytest
import torch

from deltaserve.demo import batches, language, learning, tokenizer
from deltaserve.demo.batches import IGNORED, Example

STREAM = partial(batches.pretraining, size=4)


class Cut(Exception):
    pass


def train(checkpoint: Path, *, cut_at: int | None = None, steps: int = 6, rate: float = 1e-3) -> torch.nn.Module:
    torch.manual_seed(0)
    model = learning.backbone()

    def report(done: int, steps: int, loss: float) -> None:
        if done == cut_at:
            raise Cut

    learning.learn(model, STREAM, steps=steps, rate=rate, seed=3, checkpoint=checkpoint, report=report)
    return model


def test_a_cut_run_ends_where_an_uncut_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "CHECKPOINT_SECONDS", 0.0)
    whole = train(tmp_path / "whole.pt").state_dict()
    with pytest.raises(Cut):
        train(tmp_path / "cut.pt", cut_at=4)
    assert torch.load(tmp_path / "cut.pt", weights_only=True)["done"] == 3
    resumed = train(tmp_path / "cut.pt").state_dict()
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = train(tmp_path / "done.pt").state_dict()
    second = train(tmp_path / "done.pt", cut_at=1).state_dict()  # a step would raise
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    train(tmp_path / "some.pt")
    with pytest.raises(
        learning.OtherTraining, match=r"another training \(steps 6, .* this one is steps 7.*another work folder"
    ):
        train(tmp_path / "some.pt", steps=7)


def test_it_learns(tmp_path: Path) -> None:
    """Forty steps on one short task bring the loss down by more than a half."""
    torch.manual_seed(0)
    losses: dict[int, float] = {}
    learning.learn(
        learning.backbone(),
        partial(batches.tuning, chain=("sentiment",), size=16),
        steps=40,
        rate=2e-3,
        seed=1,
        checkpoint=tmp_path / "sentiment.pt",
        report=lambda done, steps, loss: losses.update({done: loss}),
    )
    assert sum(losses[done] for done in range(36, 41)) < 0.5 * sum(losses[done] for done in range(1, 6))


def test_exact_match_counts_whole_answers() -> None:
    """Against transformers' own generation, cut at the end token by hand."""
    torch.manual_seed(0)
    model, random, table = learning.backbone().eval(), Random(1), tokenizer.ids()
    words = {index: word for word, index in table.items()}
    sources = [language.draw(random).words() for _ in range(6)]
    answers = []
    for source in sources:
        ids = torch.tensor([[*(table[word] for word in source), table[tokenizer.EOS]]])
        made = model.generate(input_ids=ids, max_new_tokens=24, do_sample=False)[0, 1:].tolist()
        answers.append(tuple(words[index] for index in made))
    assert not any(learning.marks(model, [Example(s, a[:2]) for s, a in zip(sources, answers, strict=True)]))
    ended = [tokenizer.EOS in answer for answer in answers]
    trimmed = [a[: a.index(tokenizer.EOS)] if tokenizer.EOS in a else a for a in answers]
    assert learning.marks(model, [Example(s, a) for s, a in zip(sources, trimmed, strict=True)]) == ended


def test_collate_puts_the_instruction_where_it_was_given() -> None:
    table = tokenizer.ids()
    to_encoder = Example(("past:", "the", "dog"), ("the", "dog"))
    to_decoder = Example(("the", "dog"), ("the",), announced=("past:",))
    batch = batches.collate([to_encoder, to_decoder])
    the, dog, past = (table[word] for word in ("the", "dog", "past:"))
    assert batch.inputs.tolist() == [[past, the, dog, 1], [the, dog, 1, 0]]
    assert batch.mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.decoder.tolist() == [[0, the, dog], [0, past, the]]
    assert batch.labels.tolist() == [[the, dog, 1], [IGNORED, the, 1]]


@pytest.mark.parametrize("held", [False, True])
def test_examples_keep_to_their_part(held: bool) -> None:
    random = Random(6)
    for _ in range(200):
        bare = batches.example(random, ("swap",), held=held)
        told = batches.instructed(random, "object", held=held, decoder=True)
        for each in (bare, told):
            assert language.held_out(" ".join(each.source)) == held
