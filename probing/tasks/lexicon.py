"""Words of the generated suite: curated English lists, cut into a seen and an unseen half that share no word.

Every verb is one whose past tense and past participle are the same word ("called", "had called", "was called"), so that
neither tense nor voice can be read off a verb's form. Things and the verbs that handle them come in seven classes; a
verb fits the things of its own class, and :data:`ODD_CLASSES` says which other classes make a clause odd.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

Part = Literal["seen", "unseen"]

_PERSONS = """
nurse pilot judge baker farmer lawyer teacher doctor singer waiter painter sailor soldier tailor banker butcher dancer
driver editor gardener hunter lawyer librarian manager merchant miner neighbor officer engineer plumber poet priest
prisoner professor queen reporter scientist secretary senator servant sheriff stranger student surgeon tourist widow
writer barber captain carpenter chef cousin critic customer designer detective diplomat director artist actor athlete
author babysitter bishop boxer broker builder cashier child cleaner clerk coach composer consultant cook cowboy
dentist employee expert firefighter fisherman florist guard guest guide historian hostess inspector inventor janitor
jeweler journalist king knight landlord magician maid mayor mechanic minister model monk musician nanny operator
orphan passenger patient pharmacist philosopher photographer physician pirate player politician porter president
prince princess programmer psychologist publisher rabbi ranger receptionist referee runner salesman scholar sculptor
shepherd smuggler spy swimmer thief trainer translator vendor veteran villager witness wizard
"""

_ENCOUNTERS = """
called helped thanked praised blamed warned visited invited followed greeted hired trusted admired noticed ignored
watched questioned interviewed met taught caught found heard led paid sued robbed kissed hugged married betrayed
defended accused arrested rescued protected supported encouraged inspired impressed annoyed insulted mocked teased
envied hated liked loved missed contacted phoned recognized remembered welcomed entertained surprised frightened
chased pushed tricked criticized replaced joined advised consulted persuaded assisted punished rewarded photographed
contradicted kidnapped attacked challenged cheated comforted congratulated interrupted confused amused avoided
described disappointed
"""

_CLASSES: dict[str, tuple[str, str]] = {
    "food": (
        "cooked tasted chewed swallowed fried grilled microwaved gobbled roasted nibbled boiled seasoned",
        "potato carrot cookie sausage apple pancake pizza tomato sandwich onion burger muffin omelet steak cake pie "
        "mushroom meatball dumpling biscuit",
    ),
    "text": (
        "published translated edited signed quoted printed drafted typed memorized revised summarized recited",
        "novel letter poem report article essay contract memo speech document magazine diary paragraph manual script "
        "pamphlet sentence biography editorial verse",
    ),
    "clothing": (
        "ironed stitched buttoned zipped laundered hemmed sewed embroidered knitted tailored starched crocheted",
        "shirt dress jacket skirt coat sweater scarf blouse glove sock uniform vest robe cardigan shawl gown cape "
        "hoodie tunic blazer",
    ),
    "vehicle": (
        "parked steered towed crashed refueled hijacked raced piloted chartered serviced overhauled garaged",
        "car truck bus taxi van tractor ferry train motorcycle helicopter ambulance jeep boat wagon limousine scooter "
        "minivan yacht trailer tram",
    ),
    "animal": (
        "petted tamed fed groomed milked bred vaccinated caged leashed neutered stabled muzzled",
        "horse dog cat goat cow donkey puppy rabbit camel pony kitten llama monkey parrot hamster pig poodle bull "
        "hound lamb",
    ),
    "plant": (
        "watered planted pruned fertilized uprooted cultivated pollinated weeded harvested potted mulched grafted",
        "rose tree bush flower tulip fern vine cactus shrub orchid lily daisy hedge oak maple sunflower seedling palm "
        "willow pine",
    ),
    "building": (
        "renovated demolished furnished remodeled vacated rewired constructed refurbished haunted rebuilt redecorated "
        "repainted",
        "house hotel church palace cottage cabin museum castle apartment temple mansion library tower warehouse garage "
        "chapel hospital school barn villa",
    ),
}

#: Classes of things that a class's verbs do not go with, whatever the word; no class is odd more often than another.
ODD_CLASSES: dict[str, tuple[str, ...]] = {
    "food": ("text", "vehicle", "building"),
    "text": ("food", "animal", "plant"),
    "clothing": ("animal", "building", "vehicle"),
    "vehicle": ("food", "plant", "clothing"),
    "animal": ("text", "clothing", "building"),
    "plant": ("text", "clothing", "vehicle"),
    "building": ("food", "animal", "plant"),
}

_PERSON_ADJECTIVES = "young old tall famous rich tired clever honest lazy brave quiet friendly nervous rude kind shy"
_THING_ADJECTIVES = (
    "new large small expensive cheap beautiful ugly strange ordinary special little lovely tiny huge fine odd"
)
_ADVERBS = """
quickly slowly quietly suddenly finally secretly often carefully eagerly recently already immediately gladly briefly
usually rarely openly nearly patiently promptly silently casually cheerfully foolishly
"""

_IRREGULAR_PLURALS = {
    "fisherman": "fishermen",
    "salesman": "salesmen",
    "child": "children",
    "thief": "thieves",
    "scarf": "scarves",
}


@dataclass(frozen=True)
class Noun:
    """A countable noun with its singular and plural."""

    singular: str
    plural: str

    def form(self, *, plural: bool) -> str:
        """The singular or the plural."""
        return self.plural if plural else self.singular


@dataclass(frozen=True)
class Vocabulary:
    """The words that one half of the suite draws from.

    Attributes:
        persons: nouns for people.
        encounters: verbs with a person on either side.
        handlings: class name to the verbs whose object is a thing of that class.
        things: class name to the nouns of that class.
        person_adjectives: adjectives for people.
        thing_adjectives: adjectives for things.
        adverbs: adverbs that stand directly before a verb.
    """

    persons: tuple[Noun, ...]
    encounters: tuple[str, ...]
    handlings: dict[str, tuple[str, ...]]
    things: dict[str, tuple[Noun, ...]]
    person_adjectives: tuple[str, ...]
    thing_adjectives: tuple[str, ...]
    adverbs: tuple[str, ...]

    def forms(self) -> frozenset[str]:
        """Every word form of this vocabulary."""
        nouns = [*self.persons, *(noun for group in self.things.values() for noun in group)]
        words = [*self.encounters, *self.person_adjectives, *self.thing_adjectives, *self.adverbs]
        words += [verb for group in self.handlings.values() for verb in group]
        return frozenset([*words, *(n.singular for n in nouns), *(n.plural for n in nouns)])


def pluralize(noun: str) -> str:
    """Plural of one of this file's nouns."""
    if noun in _IRREGULAR_PLURALS:
        return _IRREGULAR_PLURALS[noun]
    if noun.endswith(("s", "x", "ch", "sh")) or noun in ("potato", "tomato"):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeou":
        return noun[:-1] + "ies"
    return noun + "s"


def article(word: str) -> str:
    """``a`` or ``an``, as the word's first sound asks."""
    return "a" if word[0] not in "aeiou" or word.startswith(("uni", "use")) else "an"


def _half(words: str, part: Part) -> tuple[str, ...]:
    """Three words of five are seen, two unseen; interleaved, since the lists run from common to rare."""
    return tuple(w for i, w in enumerate(dict.fromkeys(words.split())) if (i % 5 in (0, 2, 3)) == (part == "seen"))


@cache
def vocabulary(part: Part) -> Vocabulary:
    """The words of the ``seen`` or the ``unseen`` half; the halves share no word form."""

    def nouns(words: str) -> tuple[Noun, ...]:
        return tuple(Noun(w, pluralize(w)) for w in _half(words, part))

    return Vocabulary(
        persons=nouns(_PERSONS),
        encounters=_half(_ENCOUNTERS, part),
        handlings={name: _half(verbs, part) for name, (verbs, _) in _CLASSES.items()},
        things={name: nouns(things) for name, (_, things) in _CLASSES.items()},
        person_adjectives=_half(_PERSON_ADJECTIVES, part),
        thing_adjectives=_half(_THING_ADJECTIVES, part),
        adverbs=_half(_ADVERBS, part),
    )
