"""The demo's grammar: sentences as structures, how they are written, how they are drawn, and which are held out."""

from dataclasses import dataclass
from random import Random
from zlib import crc32

from deltaserve.demo.words import (
    ADJECTIVES,
    ADVERBS,
    BEINGS,
    PLACES,
    PLURAL_OF,
    PREPOSITIONS,
    THINGS,
    VERBS,
    Adjective,
    Noun,
    Verb,
)

Words = tuple[str, ...]
_HELD_OUT_ONE_IN = 10


@dataclass(frozen=True)
class Phrase:
    """A noun with its determiner: "these old lamps". The determiner is kept in its singular form."""

    determiner: str
    noun: Noun
    plural: bool = False
    adjective: Adjective | None = None

    def words(self) -> Words:
        determiner = PLURAL_OF[self.determiner] if self.plural else self.determiner
        middle = (self.adjective.word,) if self.adjective else ()
        return (determiner, *middle, self.noun.form(self.plural))


@dataclass(frozen=True)
class Sentence:
    """One clause. Exactly one of `verb` (with `object`) and `predicate` ("is happy") is set."""

    subject: Phrase
    verb: Verb | None = None
    object: Phrase | None = None
    predicate: Adjective | None = None
    preposition: str = ""
    place: str = ""  # empty: says no place
    adverb: str = ""
    adverb_first: bool = False
    past: bool = False
    question: bool = False

    def adjectives(self) -> tuple[Adjective, ...]:
        every = (self.subject.adjective, self.object and self.object.adjective, self.predicate)
        return tuple(adjective for adjective in every if adjective)

    def words(self) -> Words:
        """The sentence as it is written, a word an item, without punctuation."""
        rest = self.object.words() if self.object else (self.predicate.word,) if self.predicate else ()
        where = (self.preposition, "the", self.place) if self.place else ()
        adverb = (self.adverb,) if self.adverb else ()
        subject = self.subject.words()
        if self.question:  # an adverb never opens a question
            first, then = self._asked()
            return (first, *subject, *then, *rest, *where, *adverb)
        told = (*subject, self._told(), *rest, *where)
        return (*adverb, *told) if self.adverb_first else (*told, *adverb)

    def text(self) -> str:
        return " ".join(self.words())

    def _told(self) -> str:
        many = self.subject.plural
        if self.verb is None:
            return _TO_BE[self.past, many]
        if self.past:
            return self.verb.past
        return self.verb.plural if many else self.verb.singular

    def _asked(self) -> tuple[str, Words]:
        if self.verb is None:
            return self._told(), ()
        return "did" if self.past else "do" if self.subject.plural else "does", (self.verb.plural,)


_TO_BE = {(False, False): "is", (False, True): "are", (True, False): "was", (True, True): "were"}


def held_out(text: str) -> bool:
    """Whether this sentence is kept out of all training. By its own bytes, so no list has to be kept."""
    return crc32(text.encode()) % _HELD_OUT_ONE_IN == 0


def draw(random: Random, *, held: bool = False) -> Sentence:
    """A sentence from the training part, or from the held-out part."""
    while True:
        sentence = _draw(random)
        if held_out(sentence.text()) == held:
            return sentence


def _draw(random: Random) -> Sentence:
    subject = _phrase(random, BEINGS)
    transitive = random.random() < 0.85
    placed = random.random() < 0.5
    adverb = random.choice(tuple(ADVERBS)) if random.random() < 0.4 else ""
    return Sentence(
        subject=subject,
        verb=random.choice(VERBS) if transitive else None,
        object=_phrase(random, THINGS if random.random() < 0.75 else BEINGS) if transitive else None,
        predicate=None if transitive else random.choice(ADJECTIVES),
        preposition=random.choice(tuple(PREPOSITIONS)) if placed else "",
        place=random.choice(tuple(PLACES)) if placed else "",
        adverb=adverb,
        adverb_first=bool(adverb) and random.random() < 0.5,
        past=random.random() < 0.2,
    )


def _phrase(random: Random, nouns: tuple[Noun, ...]) -> Phrase:
    return Phrase(
        determiner=random.choice(tuple(PLURAL_OF)),
        noun=random.choice(nouns),
        plural=random.random() < 0.35,
        adjective=random.choice(ADJECTIVES) if random.random() < 0.55 else None,
    )
