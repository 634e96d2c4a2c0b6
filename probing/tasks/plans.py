"""Balanced choices: the plans of the generated suite's sentences, with every factor even and independent of the others.

What makes a task hard for a bag of words is decided here: whatever a label is about, the sentence also holds the
opposite. One of its two verbs is in the past perfect and one in the simple past, one of its two subjects is singular
and one plural, one of two clauses is passive or one of two events denied, and words take every part equally often.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from itertools import product
from random import Random
from typing import Any, TypeVar

from probing.tasks.grammar import EVENTS, Event, Phrase, Plan, Structure, Voice
from probing.tasks.lexicon import ODD_CLASSES, Noun, Vocabulary

STRUCTURES: tuple[Structure, ...] = ("right", "center", "medial", "initial")
T = TypeVar("T")


class Decks:
    """Shuffled decks of values, one for each key: a value comes again only after all others of its deck have come."""

    def __init__(self, random: Random):
        self.random = random
        self._piles: dict[Hashable, list[Any]] = {}

    def draw(self, key: Hashable, values: Iterable[T]) -> T:
        """The next value of the deck ``key``, which holds ``values``."""
        pile = self._piles.setdefault(key, [])
        if not pile:
            pile.extend(values)
            self.random.shuffle(pile)
        value: T = pile.pop()
        return value

    def put_back(self, key: Hashable, value: object) -> None:
        """Return a value that could not be used to the top of its deck."""
        self._piles[key].append(value)


def other(event: Event) -> Event:
    """The event that is not ``event``."""
    return "handling" if event == "encounter" else "encounter"


class Planner:
    """Draws plans whose factors are crossed and whose words are spread evenly over the parts that they can play."""

    def __init__(self, words: Vocabulary, random: Random):
        self.words, self.random, self.decks = words, random, Decks(random)

    def plans(self, count: int) -> list[Plan]:
        """``count`` plans (a multiple of 32) with structure, main tense, main number and fit of the thing crossed."""
        cells = list(product(STRUCTURES, (False, True), (False, True), (False, True))) * (count // 32)
        self.random.shuffle(cells)
        return [self.plan(*cell) for cell in cells]

    def plan(self, structure: Structure, main_perfect: bool, main_plural: bool, odd: bool) -> Plan:
        """One plan with the four crossed factors given and the others drawn."""
        relative = structure in ("right", "center")
        if relative:
            main: Event = "encounter" if structure == "right" else "handling"
            connective = self.decks.draw(structure, ("who", "that"))
        else:
            main, connective = self.decks.draw(structure, tuple(product(EVENTS, ("before", "after"))))
        perfect = main if main_perfect else other(main)
        voice, handling_passive = self._voices(structure, perfect)
        agentless = handling_passive and self.decks.draw(("agentless", structure), (True, True, False))
        denied, negative = self._denial(structure, voice) if relative else (None, "")

        nouns: dict[str, Noun] = {}
        for part in ("agent", "patient", "maker"):
            nouns[part] = self._person(part, list(nouns.values()))
        handling, nouns["thing"] = self._handling(odd)
        plural = dict(zip(nouns, self.random.choices((False, True), k=4), strict=True))
        main_subject, other_subject = self._subjects(structure, main, voice, handling_passive)
        plural[main_subject], plural[other_subject] = main_plural, not main_plural

        # Subjects are always definite: an article that shows number would give away which of the two is the plural.
        definite = {"agent", "patient"} if relative else {main_subject, other_subject}
        stressed = self._stressed(structure, handling_passive)
        described = self.random.choice(("thing", "maker")) if self.random.random() < 0.2 else ""
        phrases = {}
        for part, noun in nouns.items():
            determiner = "the" if part in definite else self._determiner(plural[part])
            adjectives = self.words.thing_adjectives if part == "thing" else self.words.person_adjectives
            adjective = self.decks.draw(adjectives, adjectives) if part == described else ""
            phrases[part] = Phrase(noun, plural[part], "no" if part == negative else determiner, adjective)
        adverbs = () if stressed is None else ((stressed, self.decks.draw("adverb", self.words.adverbs)),)
        return Plan(
            structure=structure,
            main=main,
            perfect=perfect,
            voice=voice,
            handling_passive=handling_passive,
            connective=connective,
            agent=phrases["agent"],
            patient=phrases["patient"],
            maker=None if relative or agentless else phrases["maker"],
            thing=phrases["thing"],
            encounter=self.decks.draw("encounter", self.words.encounters),
            handling=handling,
            adverbs=adverbs,
            odd=odd,
            denied=denied,
        )

    def _voices(self, structure: Structure, perfect: Event) -> tuple[Voice, bool]:
        """Voice of the encounter, and whether the handling is passive.

        Two independent clauses: just one of them is passive. Relative clauses: the agent comes first in half of the
        sentences, and passives are in the perfect only, since "was" and "were" would show the main subject's number.
        """
        if structure in ("medial", "initial"):
            encounter_passive = self.decks.draw(("passive", structure), (False, True))
            return ("passive" if encounter_passive else "active"), not encounter_passive
        deck: tuple[Voice, ...]
        if structure == "right":
            deck = ("passive",) * 6 + ("active",) * 2 if perfect == "encounter" else ("active",)
        elif perfect == "encounter":
            deck = ("passive",) * 15 + ("active",) * 3 + ("object-relative",) * 2
        else:
            deck = ("active",) * 12 + ("object-relative",) * 8
        return self.decks.draw(("voice", structure, perfect), deck), False

    def _denial(self, structure: Structure, voice: Voice) -> tuple[Event, str]:
        """The event that is denied, and the phrase whose "no" denies it."""
        first, second = ("agent", "patient") if voice == "active" else ("patient", "agent")
        denied = self.decks.draw(("denied", structure), EVENTS)
        if structure == "right":
            at = self.decks.draw("no in right", (first, second)) if denied == "encounter" else "thing"
        else:
            at = second if denied == "encounter" else self.decks.draw("no in center", (first, "thing"))
        return denied, at

    def _subjects(self, structure: Structure, main: Event, voice: Voice, handling_passive: bool) -> tuple[str, str]:
        """Phrases that are the main clause's subject, and the other phrase that has the opposite number."""
        if structure in ("right", "center"):
            return ("agent", "patient") if voice == "active" else ("patient", "agent")
        subjects = {
            "encounter": "patient" if voice == "passive" else "agent",
            "handling": "thing" if handling_passive else "maker",
        }
        return subjects[main], subjects[other(main)]

    def _stressed(self, structure: Structure, handling_passive: bool) -> Event | None:
        """The event that gets an adverb, or None.

        An adverb mostly stands where it makes up for a word that another construction has before its verb ("who" in
        ``center``, "was" in a passive), so that a word's position says little of its part.
        """
        if structure in ("right", "center"):
            event: Event = "encounter" if structure == "right" else "handling"
        else:
            event = "encounter" if handling_passive else "handling"
        chance = self.random.random()
        return event if chance < 0.45 else other(event) if chance < 0.5 else None

    def _person(self, part: str, taken: list[Noun]) -> Noun:
        """The next person for ``part`` who is not in the sentence yet."""
        passed_over: list[Noun] = []
        while (noun := self.decks.draw(part, self.words.persons)) in taken:
            passed_over.append(noun)
        for skipped in passed_over:
            self.decks.put_back(part, skipped)
        return noun

    def _handling(self, odd: bool) -> tuple[str, Noun]:
        """A verb and a thing: of the verb's class, or of a class that is odd with it; both as often in either case."""
        name = self.decks.draw(("class", odd), tuple(self.words.handlings))
        verb = self.decks.draw(("verb", name, odd), self.words.handlings[name])
        kind = self.decks.draw(("odd class", name), ODD_CLASSES[name]) if odd else name
        return verb, self.decks.draw(("thing", kind, odd), self.words.things[kind])

    def _determiner(self, plural: bool) -> str:
        return self.random.choice(("the", "the", "some", "") if plural else ("the", "a"))
