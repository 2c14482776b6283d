"""The demo's grammar: agreement, word order, and a held-out part that training never draws."""

from dataclasses import replace
from random import Random

import pytest

from deltaserve.demo import language
from deltaserve.demo.language import Phrase, Sentence
from deltaserve.demo.words import ADJECTIVES, BEINGS, ESPERANTO, THINGS, VERBS, vocabulary

FARMER, LAMP = BEINGS[0], THINGS[1]
CARRY = VERBS[0]
OLD = next(adjective for adjective in ADJECTIVES if adjective.word == "old")
HAPPY = next(adjective for adjective in ADJECTIVES if adjective.word == "happy")
CARRIES = Sentence(Phrase("the", FARMER, adjective=OLD), CARRY, Phrase("this", LAMP, plural=True))
IS_HAPPY = Sentence(Phrase("my", FARMER), predicate=HAPPY)


@pytest.mark.parametrize(
    ("sentence", "text"),
    [
        (CARRIES, "the old farmer carries these lamps"),
        (replace(CARRIES, past=True), "the old farmer carried these lamps"),
        (replace(CARRIES, subject=Phrase("another", FARMER, plural=True)), "other farmers carry these lamps"),
        (replace(CARRIES, preposition="near", place="mill"), "the old farmer carries these lamps near the mill"),
        (replace(CARRIES, adverb="often", adverb_first=True), "often the old farmer carries these lamps"),
        (replace(CARRIES, adverb="often"), "the old farmer carries these lamps often"),
        (
            replace(CARRIES, adverb="often", adverb_first=True, question=True),
            "does the old farmer carry these lamps often",
        ),
        (replace(CARRIES, question=True, past=True), "did the old farmer carry these lamps"),
        (
            replace(CARRIES, question=True, subject=Phrase("every", FARMER, plural=True)),
            "do all farmers carry these lamps",
        ),
        (IS_HAPPY, "my farmer is happy"),
        (replace(IS_HAPPY, past=True, subject=Phrase("my", FARMER, plural=True)), "my farmers were happy"),
        (replace(IS_HAPPY, question=True), "is my farmer happy"),
    ],
)
def test_writes(sentence: Sentence, text: str) -> None:
    assert sentence.text() == text


def test_every_word_drawn_is_in_the_vocabulary_and_has_a_translation() -> None:
    random, known = Random(5), set(vocabulary())
    for _ in range(2000):
        words = language.draw(random).words()
        assert known.issuperset(words)
        assert ESPERANTO.keys() >= set(words)


def test_vocabulary_is_rich_and_without_repetition() -> None:
    words = vocabulary()
    assert len(words) == len(set(words))
    assert 350 <= len(words) <= 500
    assert not [word for word in words if word != word.lower() or " " in word]


def test_drawing_is_reproducible_and_varied() -> None:
    first, second = Random(8), Random(8)
    drawn = [language.draw(first).text() for _ in range(500)]
    assert drawn == [language.draw(second).text() for _ in range(500)]
    assert len(set(drawn)) > 490


def test_training_and_held_out_parts_do_not_meet() -> None:
    random = Random(3)
    assert not any(language.held_out(language.draw(random).text()) for _ in range(1000))
    assert all(language.held_out(language.draw(random, held=True).text()) for _ in range(200))


def test_a_tenth_is_held_out() -> None:
    random = Random(4)
    share = sum(language.held_out(language._draw(random).text()) for _ in range(5000)) / 5000
    assert 0.08 < share < 0.12
