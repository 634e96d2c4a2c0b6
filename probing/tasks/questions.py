"""What the generated suite asks: for each task its items in the sentences, its labels, and why it has its level.

A task's items are one word or the whole of each sentence, or two words with opposite labels.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from random import Random

from probing.tasks.base import Level, Unit
from probing.tasks.grammar import EVENTS, Plan, Sentence
from probing.tasks.lexicon import vocabulary
from probing.tasks.plans import Decks, other

#: Number of words of the longest sentence in each class of ``core.length`` but the last.
LENGTH_BINS = (10, 11, 12, 14)
#: Index (from 0) of the last word in each class of ``core.word_position`` but the last.
POSITION_BINS = (2, 4, 6, 8)
#: Number of letters of the longest word in each class of ``core.word_length`` but the last.
LETTER_BINS = (5, 6, 7)
#: Number of words behind the word, at most, in each class of ``core.words_after`` but the last.
AFTER_BINS = (4, 6)
#: Indices (from 0) of the words that ``core.words_after`` asks about: all of its classes occur at each of them.
AFTER_POSITIONS = range(3, 10)


@dataclass(frozen=True)
class Entry:
    """A sentence of the corpus: split and number there, plan, words, its text's position, and the parts with spans.

    The two persons come first among the parts, in the sentence's order, and the two verbs last.
    """

    split: str
    number: int
    plan: Plan
    sentence: Sentence
    text: int
    parts: tuple[str, ...]

    @cached_property
    def group(self) -> str:
        """The sentence's id."""
        return f"{self.split}-{self.number:04d}"

    def word(self, part: str) -> str:
        """The word that plays ``part``."""
        return self.neighbour(part, 0)

    def neighbour(self, part: str, step: int) -> str:
        """The word ``step`` words after the one that plays ``part``; there must be one."""
        return self.sentence.tokens[self.sentence.position(part) + step][0]


#: One item before it becomes a row: the part that it points at (empty for the sentence) and its label.
Item = tuple[Entry, str, int]


def _relative(entries: list[Entry]) -> list[Entry]:
    return [e for e in entries if e.plan.structure in ("right", "center")]


def _adverbial(entries: list[Entry]) -> list[Entry]:
    return [e for e in entries if e.plan.structure in ("medial", "initial")]


def _bin_names(bounds: tuple[int, ...], first: int) -> tuple[str, ...]:
    """Names of the classes of whole numbers that ``bounds`` cut: "3-4", "5", "6+"."""
    starts = (first, *(b + 1 for b in bounds))
    names = [str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, bounds, strict=False)]
    return (*names, f"{starts[-1]}+")


def _length(entries: list[Entry], random: Random) -> Iterator[Item]:
    for e in entries:
        yield e, "", bisect_left(LENGTH_BINS, len(e.sentence.tokens))


def _word_content(entries: list[Entry], random: Random) -> Iterator[Item]:
    index = {noun: i for i, noun in enumerate(_things())}
    for e in entries:
        if e.split != "unseen":
            yield e, "", index[e.plan.thing.noun.singular]


def _word_length(entries: list[Entry], random: Random) -> Iterator[Item]:
    yield from _spread(entries, random, lambda e, part: len(e.word(part)), LETTER_BINS)


def _word_position(entries: list[Entry], random: Random) -> Iterator[Item]:
    yield from _spread(entries, random, lambda e, part: e.sentence.position(part), POSITION_BINS)


def _words_after(entries: list[Entry], random: Random) -> Iterator[Item]:
    def value(entry: Entry, part: str) -> int | None:
        position = entry.sentence.position(part)
        return len(entry.sentence.tokens) - 1 - position if position in AFTER_POSITIONS else None

    yield from _spread(
        entries, random, value, AFTER_BINS, even_within=lambda e, part: (e.sentence.position(part), part)
    )


def _spread(
    entries: list[Entry],
    random: Random,
    value: Callable[[Entry, str], int | None],
    bounds: tuple[int, ...],
    even_within: Callable[[Entry, str], tuple[int | str, ...]] = lambda e, part: (),
) -> Iterator[Item]:
    """One word per sentence, of a class that lags behind, so that classes come out even in each split.

    They come out about even, too, among the words with the same trait, for each of the traits in ``even_within``.
    Words without a value are passed over.
    """
    counts: dict[tuple[str, int | str], list[int]] = defaultdict(lambda: [0] * (len(bounds) + 1))
    for e in entries:
        options = []
        for part in e.parts:
            number = value(e, part)
            if number is not None:
                label = bisect_left(bounds, number)
                tallies = [counts[e.split, trait] for trait in ("", *even_within(e, part))]
                options.append((sum(t[label] - min(t) for t in tallies), random.random(), part, label, tallies))
        *_, part, label, tallies = min(options)
        for tally in tallies:
            tally[label] += 1
        yield e, part, label


def _previous_word(entries: list[Entry], random: Random) -> Iterator[Item]:
    # How much more often a position, or a part, has come with another word than with "the".
    lead: Counter[tuple[str, int | str]] = Counter()
    for e in entries:
        # An adverbial sentence's subjects always have "the": asked of them, the function of the noun would tell.
        passed_over = _subjects(e.plan) if e.plan.structure in ("medial", "initial") else ()
        before, traits, ahead = {}, {}, {}
        for part in e.parts:
            position = e.sentence.position(part)
            if position and part not in (*EVENTS, *passed_over):
                before[part] = e.neighbour(part, -1).lower()
                traits[part] = (e.split, position), (e.split, part)
                ahead[part] = sum(lead[trait] for trait in traits[part])
        others = [part for part, word in before.items() if word in ("no", "a", "an", "some")]
        definite = [part for part, word in before.items() if word == "the"]
        if others and definite:
            other_noun, definite_noun = min(others, key=ahead.__getitem__), max(definite, key=ahead.__getitem__)
            lead.update(traits[other_noun])
            lead.subtract(traits[definite_noun])
            yield e, other_noun, 0
            yield e, definite_noun, 1


def _subjects(plan: Plan) -> tuple[str, str]:
    """The nouns that are the subjects of an adverbial sentence's encounter and handling."""
    return plan.first, "thing" if plan.handling_passive else "maker"


def _next_word(entries: list[Entry], random: Random) -> Iterator[Item]:
    for e in _adverbial(entries):
        for part in _subjects(e.plan):
            yield e, part, int(e.neighbour(part, 1) == "had")


def _subject_number(entries: list[Entry], random: Random) -> Iterator[Item]:
    for e in entries:
        yield e, "", int(e.plan.subject(e.plan.main).plural)


def _verb_number(entries: list[Entry], random: Random) -> Iterator[Item]:
    decks = Decks(random)
    for e in entries:
        event = decks.draw((e.split, e.plan.structure, e.plan.subject("encounter").plural), EVENTS)
        yield e, event, int(e.plan.subject(event).plural)


def _main_verb(entries: list[Entry], random: Random) -> Iterator[Item]:
    decks = Decks(random)
    for e in entries:
        main = decks.draw((e.split, e.plan.structure, e.plan.main), (0, 1))
        yield e, e.plan.main if main else other(e.plan.main), main


def _voice(entries: list[Entry], random: Random) -> Iterator[Item]:
    for e in _adverbial(entries):
        for event in EVENTS:
            yield e, event, int(e.plan.passive(event))


def _distant_subject(entries: list[Entry], random: Random) -> Iterator[Item]:
    for e in _relative(entries):
        for part, phrase in (("agent", e.plan.agent), ("patient", e.plan.patient)):
            yield e, part, int(e.plan.subject("handling") is phrase)


def _tense(entries: list[Entry], random: Random) -> Iterator[Item]:
    for e in entries:
        yield e, "", int(e.plan.perfect == e.plan.main)


def _odd_thing(entries: list[Entry], random: Random) -> Iterator[Item]:
    for e in entries:
        yield e, "", int(e.plan.odd)


def _agent(entries: list[Entry], random: Random) -> Iterator[Item]:
    decks = Decks(random)
    for e in entries:
        part = decks.draw((e.split, e.plan.structure, e.plan.voice), e.parts[:2])
        yield e, part, int(part == "agent")


def _earlier(entries: list[Entry], random: Random) -> Iterator[Item]:
    for e in _adverbial(entries):
        for event in EVENTS:
            yield e, event, int((event == e.plan.main) == (e.plan.connective == "before"))


def _denied(entries: list[Entry], random: Random) -> Iterator[Item]:
    for e in _relative(entries):
        for event in EVENTS:
            yield e, event, int(event == e.plan.denied)


def _things() -> list[str]:
    return [noun.singular for group in vocabulary("seen").things.values() for noun in group]


@dataclass(frozen=True)
class Question:
    """A task before it has a corpus; ``items`` is None where each sentence comes intact and with two words swapped."""

    name: str
    level: Level
    unit: Unit
    labels: tuple[str, ...]
    items: Callable[[list[Entry], Random], Iterator[Item]] | None
    description: str
    citation: str = ""


AFTER_CONNEAU = "Kind of task after Conneau et al. 2018 (arXiv 1805.01070); sentences and labels are our own."

#: The tasks of the suite, by level.
QUESTIONS = (
    Question(
        "length",
        "surface",
        "sentence",
        _bin_names(LENGTH_BINS, 9),
        _length,
        "Sentence: its number of words, in bins. Surface: read off the string by counting.",
        citation=AFTER_CONNEAU,
    ),
    Question(
        "word_content",
        "surface",
        "sentence",
        tuple(_things()),
        _word_content,
        "Sentence: which of the listed nouns it contains, in the singular or plural; just one in each sentence. "
        "Surface: a matter of which words are there, so there is no split of unseen words.",
        citation=AFTER_CONNEAU,
    ),
    Question(
        "word_length",
        "surface",
        "word",
        _bin_names(LETTER_BINS, 3),
        _word_length,
        "Word (noun or verb): its number of letters, in bins. Surface: spelling; a fact about the word type, so that "
        "the unseen split asks for spelling and the seen one for memory.",
    ),
    Question(
        "word_position",
        "surface",
        "word",
        _bin_names(POSITION_BINS, 1),
        _word_position,
        "Word (noun or verb): how many words stand before it, in bins. Surface: order without structure.",
    ),
    Question(
        "words_after",
        "surface",
        "word",
        _bin_names(AFTER_BINS, 0),
        _words_after,
        "Word (noun or verb) from the sentence's middle: how many words stand after it, in bins that are about even at "
        "each position from the start. Surface: counting; but unlike the position it takes the rest of the sentence.",
    ),
    Question(
        "previous_word",
        "surface",
        "word",
        ("no, a or some", "the"),
        _previous_word,
        "Noun: whether 'the' stands right before it, or 'no', 'a' or 'some'; the sentence has a noun of either kind. "
        "Surface: which string is next to the word, whatever it means.",
    ),
    Question(
        "next_word",
        "surface",
        "word",
        ("another word", "had"),
        _next_word,
        "Noun that is the subject of a clause: whether 'had' stands right after it; in each sentence it does after "
        "one of two such nouns. Surface: which string is next to the word; the clause need not be understood.",
    ),
    Question(
        "bigram_shift",
        "syntax",
        "sentence",
        ("intact", "swapped"),
        None,
        "Sentence: intact, or with two neighbouring words swapped so that it is not English any more; each comes in "
        "both forms, in one group. Syntax: legal word order, with the words held fixed.",
        citation=AFTER_CONNEAU,
    ),
    Question(
        "subject_number",
        "syntax",
        "sentence",
        ("singular", "plural"),
        _subject_number,
        "Sentence: number of the main clause's subject, where another noun (the other clause's subject, or the "
        "relative clause's noun) has the opposite number. Syntax: which noun is the main subject.",
        citation=AFTER_CONNEAU,
    ),
    Question(
        "verb_number",
        "syntax",
        "word",
        ("singular", "plural"),
        _verb_number,
        "Verb in a form that does not show number: number of its subject, where the other verb's subject or a noun "
        "nearby has the opposite number. Syntax: the subject-verb dependency that agreement follows.",
    ),
    Question(
        "main_verb",
        "syntax",
        "word",
        ("subordinate", "main"),
        _main_verb,
        "Verb: in the main clause, or in a relative or adverbial clause that comes before, inside or after it. Syntax: "
        "clause embedding.",
    ),
    Question(
        "voice",
        "syntax",
        "word",
        ("active", "passive"),
        _voice,
        "Verb whose past tense and participle are one form: active or passive, where the sentence's other verb is the "
        "opposite. Syntax: the verb phrase's construction.",
    ),
    Question(
        "distant_subject",
        "syntax",
        "word",
        ("no", "yes"),
        _distant_subject,
        "Noun for a person: whether it is the subject of the sentence's last verb ('the nurse who called the pilot "
        "ironed' / 'the nurse called the pilot who ironed'); one of two is. Syntax: attachment of a relative clause. "
        "The relative pronoun right after the noun gives it away, so a reader of neighbouring words suffices.",
    ),
    Question(
        "tense",
        "semantics",
        "sentence",
        ("past", "past perfect"),
        _tense,
        "Sentence: whether the main event is told in the past perfect or the simple past; the subordinate one is in "
        "the other. Semantics: time of the event that the sentence asserts.",
        citation=AFTER_CONNEAU,
    ),
    Question(
        "odd_thing",
        "semantics",
        "sentence",
        ("fits", "odd"),
        _odd_thing,
        "Sentence: whether its thing fits the verb ('ironed a shirt') or is odd with it ('ironed a horse'); every verb "
        "and thing is as often odd as not. Semantics: selectional preference between two words.",
        citation=AFTER_CONNEAU,
    ),
    Question(
        "agent",
        "semantics",
        "word",
        ("patient", "agent"),
        _agent,
        "Noun for a person: whether it acts on the other one or is acted on, across actives, passives and relative "
        "clauses on either. Semantics: the role, which no grammatical function or position settles.",
    ),
    Question(
        "earlier",
        "semantics",
        "word",
        ("later", "earlier"),
        _earlier,
        "Verb: whether its event comes before or after the other verb's, by 'before' or 'after' in either order of the "
        "clauses. Semantics: order in time, which no connective or position settles alone. The past perfect is "
        "independent of it.",
    ),
    Question(
        "denied",
        "semantics",
        "word",
        ("happened", "denied"),
        _denied,
        "Verb: whether a 'no' on some noun of the sentence denies its event or the other verb's. Semantics: scope of "
        "negation ('no nurse who called the pilot ironed a shirt').",
    ),
)
