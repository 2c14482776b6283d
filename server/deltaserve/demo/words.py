"""The demo's closed vocabulary: English words, their forms, and the Esperanto word each is translated to."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Noun:
    singular: str
    plural: str
    root: str  # Esperanto, without its ending

    def form(self, plural: bool) -> str:
        return self.plural if plural else self.singular


@dataclass(frozen=True)
class Verb:
    plural: str  # also the bare form: "do they carry"
    singular: str
    past: str
    root: str
    polarity: int  # -1, 0 or 1: what the verb says for the sentence's sentiment


@dataclass(frozen=True)
class Adjective:
    word: str
    root: str
    polarity: int


_IRREGULAR = {"child": "children", "woman": "women", "man": "men", "mouse": "mice", "knife": "knives"}


def _nouns(listing: str) -> tuple[Noun, ...]:
    def plural(word: str) -> str:
        return _IRREGULAR.get(word) or (word + "es" if word.endswith(("x", "s", "ch", "sh")) else word + "s")

    pairs = (entry.split(":") for entry in listing.split())
    return tuple(Noun(word, plural(word), root) for word, root in pairs)


def _adjectives(polarity: int, listing: str) -> tuple[Adjective, ...]:
    pairs = (entry.split(":") for entry in listing.split())
    return tuple(Adjective(word, root, polarity) for word, root in pairs)


def _verbs(polarity: int, listing: str) -> tuple[Verb, ...]:
    forms = (entry.split(":") for entry in listing.split())
    return tuple(Verb(plural, singular, past, root, polarity) for plural, singular, past, root in forms)


BEINGS = _nouns("""
    farmer:farmist doctor:kuracist teacher:instruist sailor:marist baker:bakist singer:kantist painter:pentrist
    soldier:soldat queen:reĝin king:reĝ child:infan woman:virin man:vir student:student driver:ŝofor
    gardener:ĝardenist hunter:ĉasist judge:juĝist neighbour:najbar dog:hund cat:kat horse:ĉeval fox:vulp bear:urs
    bird:bird mouse:mus
""")
THINGS = _nouns("""
    basket:korb lamp:lamp letter:leter book:libr apple:pom boat:boat key:ŝlosil hat:ĉapel coat:mantel knife:tranĉil
    table:tabl chair:seĝ box:skatol picture:bild bell:sonoril clock:horloĝ cup:tas flower:flor ring:ring map:map
    bottle:botel bicycle:bicikl violin:violon ladder:ŝtupetar mirror:spegul drum:tambur
""")
ADJECTIVES = (
    *_adjectives(1, """
        happy:feliĉ kind:afabl brave:kuraĝ lovely:ĉarm clever:lert gentle:mild honest:honest wonderful:mirind
        cheerful:gaj pleasant:agrabl
    """),
    *_adjectives(-1, """
        angry:koler cruel:kruel lazy:pigr ugly:malbel awful:terur rude:malĝentil greedy:avid nasty:aĉ stupid:stult
        gloomy:morn
    """),
    *_adjectives(0, """
        old:maljun young:jun tall:alt small:malgrand red:ruĝ green:verd blue:blu heavy:pez round:rond new:nov
        quiet:kviet wet:malsek
    """),
)  # fmt: skip
VERBS = (
    *_verbs(0, """
        carry:carries:carried:port find:finds:found:trov watch:watches:watched:observ paint:paints:painted:pentr
        clean:cleans:cleaned:purig buy:buys:bought:aĉet sell:sells:sold:vend take:takes:took:pren
        bring:brings:brought:alport hide:hides:hid:kaŝ lose:loses:lost:perd push:pushes:pushed:puŝ
        follow:follows:followed:sekv need:needs:needed:bezon draw:draws:drew:desegn
        remember:remembers:remembered:memor
    """),
    *_verbs(1, "love:loves:loved:am praise:praises:praised:laŭd admire:admires:admired:admir"),
    *_verbs(-1, "hate:hates:hated:malam break:breaks:broke:romp steal:steals:stole:ŝtel"),
)  # fmt: skip


def _pairs(listing: str) -> "MappingProxyType[str, str]":
    return MappingProxyType(dict(entry.split(":") for entry in listing.split()))


PLACES = _pairs("""
    garden:ĝardeno river:rivero market:foirejo harbour:haveno forest:arbaro school:lernejo bridge:ponto church:preĝejo
    station:stacidomo kitchen:kuirejo tower:turo mill:muelejo lake:lago castle:kastelo library:biblioteko
    village:vilaĝo
""")
PREPOSITIONS = _pairs("in:en near:apud behind:malantaŭ before:antaŭ around:ĉirkaŭ")
ADVERBS = _pairs("""
    today:hodiaŭ now:nun often:ofte again:denove sometimes:foje always:ĉiam slowly:malrapide quickly:rapide
""")
DETERMINERS = _pairs(
    "the:la another:alia this:tiu that:tiu every:ĉiu my:mia other:aliaj these:tiuj those:tiuj all:ĉiuj"
)
PLURAL_OF = _pairs("the:the another:other this:these that:those every:all my:my")
AUXILIARIES = _pairs("is:estas are:estas was:estis were:estis does:ĉu do:ĉu did:ĉu")
NUMBERS = ("zero", "one", "two", "three")
SENTIMENTS = MappingProxyType({1: "positive", -1: "negative", 0: "neutral"})
NOWHERE = "nowhere"


def _translations() -> Iterator[tuple[str, str]]:
    for pairs in (DETERMINERS, AUXILIARIES, PREPOSITIONS, PLACES, ADVERBS):
        yield from pairs.items()
    for noun in (*BEINGS, *THINGS):
        yield from ((noun.singular, noun.root + "o"), (noun.plural, noun.root + "oj"))
    for adjective in ADJECTIVES:
        yield adjective.word, adjective.root + "a"
    for verb in VERBS:
        yield from ((verb.plural, verb.root + "as"), (verb.singular, verb.root + "as"), (verb.past, verb.root + "is"))


# Word by word: no agreement, no accusative.
ESPERANTO = MappingProxyType(dict(_translations()))


def vocabulary() -> tuple[str, ...]:
    """Every word that a sentence or an answer can hold, each once, in a fixed order."""
    every = (*ESPERANTO, *ESPERANTO.values(), *NUMBERS, *SENTIMENTS.values(), NOWHERE)
    return tuple(dict.fromkeys(every))
