"""The functions that the backbone knows, and their chains."""

from collections.abc import Iterator
from random import Random

import pytest

from deltaserve.demo import language
from deltaserve.demo.functions import FUNCTIONS, READINGS, REWRITES, apply, defined, instruction
from deltaserve.demo.language import Phrase, Sentence
from deltaserve.demo.tasks import RECIPES
from deltaserve.demo.words import ADJECTIVES, BEINGS, NOWHERE, THINGS, VERBS, vocabulary


def sentences(count: int = 400) -> Iterator[Sentence]:
    random = Random(17)
    return (language.draw(random) for _ in range(count))


def adjective(word: str):
    return next(each for each in ADJECTIVES if each.word == word)


OLD_LOVES = Sentence(
    Phrase("the", BEINGS[0], adjective=adjective("old")),
    next(verb for verb in VERBS if verb.plural == "love"),
    Phrase("this", THINGS[0], adjective=adjective("red")),
    preposition="in",
    place="garden",
    adverb="today",
    adverb_first=True,
)


@pytest.mark.parametrize(
    ("chain", "answer"),
    [
        (("copy",), "today the old farmer loves this red basket in the garden"),
        (("reverse",), "garden the in basket red this loves farmer old the today"),
        (("translate",), "hodiaŭ la maljuna farmisto amas tiu ruĝa korbo en la ĝardeno"),
        (("sentiment",), "positive"),
        (("subject",), "the old farmer"),
        (("object",), "this red basket"),
        (("place",), "the garden"),
        (("past",), "today the old farmer loved this red basket in the garden"),
        (("swap",), "today this red basket loves the old farmer in the garden"),
        (("question",), "does the old farmer love this red basket in the garden today"),
        (("count",), "two"),
        (("shorten",), "the farmer loves this basket"),
        (("plural",), "today the old farmers love these red baskets in the garden"),
        (("past", "question"), "did the old farmer love this red basket in the garden today"),
        (("shorten", "translate"), "la farmisto amas tiu korbo"),
        (("shorten", "translate", "reverse"), "korbo tiu amas farmisto la"),
        (("plural", "subject"), "the old farmers"),
    ],
)
def test_what_they_make_of_a_sentence(chain: tuple[str, ...], answer: str) -> None:
    assert " ".join(apply(chain, OLD_LOVES)) == answer


def test_there_are_thirteen_with_an_instruction_each() -> None:
    assert len(FUNCTIONS) == len(set(FUNCTIONS)) == 13
    assert not {instruction(name) for name in FUNCTIONS}.intersection(vocabulary())


def test_reverse_twice_is_copy() -> None:
    for sentence in sentences():
        assert apply(("reverse", "reverse"), sentence) == apply(("copy",), sentence)


def test_swap_twice_is_copy() -> None:
    for sentence in sentences():
        if defined(("swap",), sentence):
            assert apply(("swap", "swap"), sentence) == apply(("copy",), sentence)


@pytest.mark.parametrize("name", sorted(set(REWRITES) - {"swap"}))
def test_the_other_rewrites_change_nothing_the_second_time(name: str) -> None:
    for sentence in sentences():
        assert apply((name, name), sentence) == apply((name,), sentence)


def test_rewrites_of_unlike_parts_commute() -> None:
    for sentence in sentences():
        assert apply(("past", "plural"), sentence) == apply(("plural", "past"), sentence)
        assert apply(("question", "shorten"), sentence) == apply(("shorten", "question"), sentence)


def test_translate_and_reverse_commute() -> None:
    for sentence in sentences():
        assert apply(("translate", "reverse"), sentence) == apply(("reverse", "translate"), sentence)


def test_readings_agree_with_the_sentence() -> None:
    for sentence in sentences():
        text = sentence.text()
        assert " ".join(apply(("subject",), sentence)) in text
        place = " ".join(apply(("place",), sentence))
        assert (place == NOWHERE) != (place in text)
        if defined(("object",), sentence):
            assert " ".join(apply(("object",), sentence)) in text


def test_every_reading_has_several_answers() -> None:
    """Else a delta could be right without reading its input."""
    drawn = list(sentences())
    for name in READINGS:
        answers = {apply((name,), sentence) for sentence in drawn if defined((name,), sentence)}
        assert len(answers) > 2, name


def test_object_and_swap_need_an_object() -> None:
    happy = Sentence(Phrase("the", BEINGS[0]), predicate=adjective("happy"))
    assert [name for name in FUNCTIONS if not defined((name,), happy)] == ["object", "swap"]


def test_words_cannot_be_rewritten() -> None:
    with pytest.raises(AssertionError, match="works on sentences"):
        apply(("reverse", "past"), OLD_LOVES)


def test_recipes_are_told_apart_and_mean_something() -> None:
    assert len({recipe.name for recipe in RECIPES}) == len(RECIPES)
    assert len({recipe.chain for recipe in RECIPES}) == len(RECIPES)
    for recipe in RECIPES:
        assert apply(recipe.chain, OLD_LOVES)
