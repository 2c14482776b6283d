"""The functions that the backbone knows by name, and chains of them.

Three tables by what a function takes and gives: a rewrite gives another sentence, a reading gives an answer, a
wordwise function works on any words. A chain is rewrites first, then at most one reading, then wordwise functions.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from deltaserve.demo.language import Sentence, Words
from deltaserve.demo.words import ESPERANTO, NOWHERE, NUMBERS, SENTIMENTS


def _past(sentence: Sentence) -> Sentence:
    return replace(sentence, past=True)


def _question(sentence: Sentence) -> Sentence:
    return replace(sentence, question=True)


def _shorten(sentence: Sentence) -> Sentence:
    bare = replace(sentence.subject, adjective=None)
    object_ = sentence.object and replace(sentence.object, adjective=None)
    return replace(sentence, subject=bare, object=object_, preposition="", place="", adverb="", adverb_first=False)


def _plural(sentence: Sentence) -> Sentence:
    object_ = sentence.object and replace(sentence.object, plural=True)
    return replace(sentence, subject=replace(sentence.subject, plural=True), object=object_)


def _swap(sentence: Sentence) -> Sentence:
    assert sentence.object is not None
    return replace(sentence, subject=sentence.object, object=sentence.subject)


def _subject(sentence: Sentence) -> Words:
    return sentence.subject.words()


def _object(sentence: Sentence) -> Words:
    assert sentence.object is not None
    return sentence.object.words()


def _place(sentence: Sentence) -> Words:
    return ("the", sentence.place) if sentence.place else (NOWHERE,)


def _count(sentence: Sentence) -> Words:
    return (NUMBERS[len(sentence.adjectives())],)


def _sentiment(sentence: Sentence) -> Words:
    total = sum(adjective.polarity for adjective in sentence.adjectives())
    total += sentence.verb.polarity if sentence.verb else 0
    return (SENTIMENTS[(total > 0) - (total < 0)],)


def _reverse(words: Words) -> Words:
    return words[::-1]


def _translate(words: Words) -> Words:
    return tuple(ESPERANTO[word] for word in words)


def _copy(words: Words) -> Words:
    return words


REWRITES: Mapping[str, Callable[[Sentence], Sentence]] = MappingProxyType(
    {"past": _past, "question": _question, "shorten": _shorten, "plural": _plural, "swap": _swap}
)
READINGS: Mapping[str, Callable[[Sentence], Words]] = MappingProxyType(
    {"subject": _subject, "object": _object, "place": _place, "count": _count, "sentiment": _sentiment}
)
WORDWISE: Mapping[str, Callable[[Words], Words]] = MappingProxyType(
    {"copy": _copy, "reverse": _reverse, "translate": _translate}
)
FUNCTIONS = (*WORDWISE, *READINGS, *REWRITES)
_NEED_OBJECT = frozenset({"object", "swap"})


def defined(chain: tuple[str, ...], sentence: Sentence) -> bool:
    """Whether the chain means anything for this sentence: "is happy" sentences have no object."""
    return sentence.object is not None or not _NEED_OBJECT.intersection(chain)


def apply(chain: tuple[str, ...], sentence: Sentence) -> Words:
    """The words that the functions of `chain`, in order, make of the sentence."""
    words: Words | None = None
    for name in chain:
        if name in REWRITES:
            assert words is None, f"{name} works on sentences, not on words: {chain}"
            sentence = REWRITES[name](sentence)
        elif name in READINGS:
            assert words is None, f"{name} works on sentences, not on words: {chain}"
            words = READINGS[name](sentence)
        else:
            words = WORDWISE[name](sentence.words() if words is None else words)
    return sentence.words() if words is None else words


def instruction(function: str) -> str:
    """The word that announces a function to the backbone, as in "reverse: the old farmer finds a key"."""
    return function + ":"
