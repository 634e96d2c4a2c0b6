"""A small English grammar: two-clause sentences whose parts are marked, so that tasks can point at them.

Every sentence tells of an *encounter* (a person and a person: "the nurse called the pilots") and a *handling* (a person
and a thing: "the judge ironed a shirt"), one in the main clause and one in a subordinate clause, and one of the two
stands in the past perfect. The four structures:

- ``right``: "The nurse called the pilots who had ironed a shirt."
- ``center``: "The nurse who called the pilots had ironed a shirt."
- ``medial``: "The nurse called the pilots before the judge had ironed a shirt."
- ``initial``: "Before the judge had ironed a shirt, the nurse called the pilots."
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Literal

from probing.tasks.base import Text
from probing.tasks.lexicon import Noun, article

Structure = Literal["right", "center", "medial", "initial"]
Event = Literal["encounter", "handling"]
#: How the encounter is told; ``object-relative``: "the pilot who the nurse called".
Voice = Literal["active", "passive", "object-relative"]

EVENTS: tuple[Event, Event] = ("encounter", "handling")
NOUNS = ("agent", "patient", "maker", "thing")
#: A word and the part that it plays (one of the events, one of the nouns, "adverb"), or None.
Token = tuple[str, str | None]


@dataclass(frozen=True)
class Phrase:
    """A noun phrase before it is put into words.

    Attributes:
        noun: the head.
        plural: the head's number.
        determiner: ``the``, ``a`` (which becomes "an" where it must), ``some``, ``no``, or an empty string.
        adjective: one adjective, or an empty string.
    """

    noun: Noun
    plural: bool
    determiner: str = "the"
    adjective: str = ""

    def tokens(self, part: str) -> list[Token]:
        """The phrase's words, the head marked as ``part``."""
        words = [w for w in (self.adjective, self.noun.form(plural=self.plural)) if w]
        determiner = article(words[0]) if self.determiner == "a" else self.determiner
        marked: list[Token] = [(w, None) for w in ([determiner] if determiner else []) + words[:-1]]
        return [*marked, (words[-1], part)]


@dataclass(frozen=True)
class Plan:
    """All choices that make a sentence; what the tasks' labels are read from.

    Attributes:
        structure: which clause holds which, and in which order.
        main: the event of the main clause (``right``: the encounter, ``center``: the handling).
        perfect: the event in the past perfect; the other one is in the simple past.
        voice: how the encounter is told; ``object-relative`` in ``center`` only.
        handling_passive: the thing is the handling's subject (``medial``, ``initial`` only).
        connective: "before" or "after" (``medial``, ``initial``), "who" or "that" (``right``, ``center``).
        agent: who acts in the encounter.
        patient: whom the encounter befalls.
        maker: who handles the thing, where a clause of its own tells of it and names the person; else None.
        thing: what is handled.
        encounter: verb of the encounter.
        handling: verb of the handling.
        adverbs: event to the adverb before its verb; at most one.
        odd: the handling's verb does not go with the thing.
        denied: the event that a "no" among the determiners denies, if any.
    """

    structure: Structure
    main: Event
    perfect: Event
    voice: Voice
    handling_passive: bool
    connective: str
    agent: Phrase
    patient: Phrase
    maker: Phrase | None
    thing: Phrase
    encounter: str
    handling: str
    adverbs: tuple[tuple[Event, str], ...]
    odd: bool
    denied: Event | None

    @property
    def first(self) -> str:
        """``agent`` or ``patient``: which of the two its clause names first."""
        return "agent" if self.voice == "active" else "patient"

    @property
    def second(self) -> str:
        """The other one of ``agent`` and ``patient``."""
        return "patient" if self.first == "agent" else "agent"

    def subject(self, event: Event) -> Phrase:
        """The grammatical subject of an event's verb (for a relative pronoun, the noun that it stands for)."""
        if event == "encounter":
            return self.patient if self.voice == "passive" else self.agent
        if self.structure in ("medial", "initial"):
            return self.thing if self.handling_passive or self.maker is None else self.maker
        phrase = self.first if self.structure == "center" else self.second
        return self.agent if phrase == "agent" else self.patient

    def passive(self, event: Event) -> bool:
        """Whether an event is told in the passive voice."""
        return self.voice == "passive" if event == "encounter" else self.handling_passive


@dataclass(frozen=True)
class Sentence:
    """Words with their parts; ``comma`` is the position of the word that a comma follows, or -1."""

    tokens: tuple[Token, ...]
    comma: int = -1

    @property
    def words(self) -> tuple[str, ...]:
        """The words without punctuation, the first one capitalised."""
        words = [w for w, _ in self.tokens]
        return (words[0].capitalize(), *words[1:])

    @cached_property
    def _positions(self) -> dict[str | None, int]:
        return {part: i for i, (_, part) in enumerate(self.tokens)}

    def position(self, part: str) -> int:
        """Index of the word that plays ``part``."""
        return self._positions[part]

    def text(self, parts: Iterable[str] = ()) -> Text:
        """The sentence as it is encoded, with one span for each of ``parts``, in the order given."""
        starts, string = [], ""
        for i, word in enumerate(self.words):
            starts.append(len(string))
            string += word + ("," if i == self.comma else "") + " "
        at = [self.position(p) for p in parts]
        return Text(string[:-1] + ".", tuple((starts[i], starts[i] + len(self.tokens[i][0])) for i in at))


def _verb(plan: Plan, event: Event) -> list[Token]:
    """The verb group: "called", "had called", "was called" or "had been called", an adverb before the verb."""
    passive = plan.passive(event)
    auxiliaries = ["had"] if plan.perfect == event else []
    if passive:
        auxiliaries.append("been" if auxiliaries else "were" if plan.subject(event).plural else "was")
    adverbs = [adverb for of, adverb in plan.adverbs if of == event]
    return [*((w, None) for w in auxiliaries), *((w, "adverb") for w in adverbs), (getattr(plan, event), event)]


def _encounter_clause(plan: Plan) -> list[Token]:
    agent, patient = plan.agent.tokens("agent"), plan.patient.tokens("patient")
    if plan.voice == "passive":
        return [*patient, *_verb(plan, "encounter"), ("by", None), *agent]
    return [*agent, *_verb(plan, "encounter"), *patient]


def _handling_clause(plan: Plan) -> list[Token]:
    verb, thing = _verb(plan, "handling"), plan.thing.tokens("thing")
    maker = plan.maker.tokens("maker") if plan.maker else []
    if plan.handling_passive:
        return [*thing, *verb, *([("by", None), *maker] if maker else [])]
    return [*maker, *verb, *thing]


def realize(plan: Plan) -> Sentence:
    """Put a plan into words."""
    connective: Token = (plan.connective, None)
    handled = [*_verb(plan, "handling"), *plan.thing.tokens("thing")]
    if plan.structure == "right":
        return Sentence((*_encounter_clause(plan), connective, *handled))
    if plan.structure == "center":
        verb, agent, patient = _verb(plan, "encounter"), plan.agent.tokens("agent"), plan.patient.tokens("patient")
        if plan.voice == "active":
            told = [*agent, connective, *verb, *patient]
        elif plan.voice == "passive":
            told = [*patient, connective, *verb, ("by", None), *agent]
        else:
            told = [*patient, connective, *agent, *verb]
        return Sentence((*told, *handled))
    clauses = {"encounter": _encounter_clause(plan), "handling": _handling_clause(plan)}
    main = clauses.pop(plan.main)
    (subordinate,) = clauses.values()
    if plan.structure == "medial":
        return Sentence((*main, connective, *subordinate))
    return Sentence((connective, *subordinate, *main), comma=len(subordinate))


def shifted(sentence: Sentence, random: Random) -> Sentence:
    """The sentence with two neighbouring words swapped so that it is no longer English.

    Never a word with a capital or a mark of punctuation (those would tell), and never a swap that could give another
    sentence: beside an adverb, or a verb or pronoun with a bare plural ("who called pilots" / "who pilots called").
    """
    tokens = list(sentence.tokens)
    fixed = {0, sentence.comma, len(tokens) - 1}

    def breaks(i: int) -> bool:
        (left, a), (right, b) = tokens[i], tokens[i + 1]
        if {i, i + 1} & fixed or left == right or "adverb" in (a, b):
            return False
        if a in NOUNS:
            return b not in EVENTS
        return b not in NOUNS or (a not in EVENTS and left not in ("who", "that"))

    i = random.choice([i for i in range(1, len(tokens) - 1) if breaks(i)])
    tokens[i], tokens[i + 1] = tokens[i + 1], tokens[i]
    return Sentence(tuple(tokens), sentence.comma)
