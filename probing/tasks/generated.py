"""The generated suite ``core``: tasks on three linguistic levels over one corpus of controlled English sentences.

Sentences serve many tasks, so that a model encodes about 7,700 short texts for all of them. How the sentences are made
so that neither their words nor their length tell the labels is in :mod:`probing.tasks.plans`; what is asked of them in
:mod:`probing.tasks.questions`. Which level a task is filed under is an assumption; users can regroup.
"""

from __future__ import annotations

from random import Random
from typing import Any

import pandas as pd

from probing.tasks.base import ITEM_COLUMNS, Corpus, Task, Text
from probing.tasks.grammar import EVENTS, Plan, Sentence, realize, shifted
from probing.tasks.lexicon import Part, vocabulary
from probing.tasks.plans import Planner
from probing.tasks.questions import QUESTIONS, Entry, Question
from spafit.errors import UsageError
from spafit.runtime import seed_sequence

VERSIONS = (1,)
#: Sentences per split; multiples of 64, so that crossed factors come out even.
SIZES: dict[str, int] = {"train": 2560, "dev": 512, "seen": 1024, "unseen": 1024}


def core_tasks(*, version: int = 1, seed: int = 0) -> tuple[Task, ...]:
    """The tasks of the generated suite, all on one corpus; the same for the same ``version`` and ``seed``.

    Splits are ``train``, ``dev`` and the tests ``seen`` (words that occur in training) and ``unseen`` (no content word
    in common with training and dev; ``core.word_content`` has none). Further item columns: ``structure`` and ``voice``,
    the sentence's construction, to split results by.

    Args:
        version: edition of the suite; scores compare within one edition only.
        seed: draws other sentences from the same grammar and words.

    Raises:
        UsageError: an edition that does not exist.
    """
    if version not in VERSIONS:
        raise UsageError(f"Edition {version!r} of the core tasks does not exist. Use one of {VERSIONS}.")
    texts: list[Text] = []
    entries: list[Entry] = []
    swapped: dict[str, int] = {}
    known: set[str] = set()
    for split, size in SIZES.items():
        random = _random(seed, version, split)
        planner = Planner(vocabulary(_part(split)), random)
        for number, plan in enumerate(planner.plans(size)):
            sentence, text = _told(plan)
            while text.string in known:
                plan = planner.plan(plan.structure, plan.perfect == plan.main, plan.subject(plan.main).plural, plan.odd)
                sentence, text = _told(plan)
            entry = Entry(split, number, plan, sentence, len(texts), _parts(plan))
            entries.append(entry)
            texts.append(text)
            known.add(text.string)
            if number % 2:
                while (text := shifted(sentence, random).text()).string in known:
                    pass
                texts.append(text)
                known.add(text.string)
                swapped[entry.group] = len(texts) - 1
    corpus = Corpus("core", tuple(texts))
    return tuple(_task(q, corpus, entries, swapped, _random(seed, version, q.name)) for q in QUESTIONS)


def _random(seed: int, version: int, *keys: str) -> Random:
    """Python's generator, whose stream does not depend on the NumPy version."""
    return Random("-".join(map(str, seed_sequence(seed, "core", version, *keys).generate_state(4))))


def _part(split: str) -> Part:
    return "unseen" if split == "unseen" else "seen"


def _parts(plan: Plan) -> tuple[str, ...]:
    """Words whose states are kept: every noun and both verbs; see :class:`Entry` for their order."""
    return (plan.first, plan.second, *(("maker",) if plan.maker else ()), "thing", *EVENTS)


def _told(plan: Plan) -> tuple[Sentence, Text]:
    sentence = realize(plan)
    return sentence, sentence.text(_parts(plan))


def _task(question: Question, corpus: Corpus, entries: list[Entry], swapped: dict[str, int], random: Random) -> Task:
    rows: list[tuple[Any, ...]] = []

    def add(entry: Entry, part: str, label: int, text: int) -> None:
        item = f"{entry.group}-{part}" if part else entry.group if text == entry.text else f"{entry.group}-swapped"
        span = entry.parts.index(part) if part else -1
        control = entry.word(part or entry.plan.main).lower()
        plan = entry.plan
        rows.append((item, text, span, label, entry.split, entry.group, control, plan.structure, plan.voice))

    if question.items is None:
        for entry in entries:
            if entry.group in swapped:
                add(entry, "", 0, entry.text)
                add(entry, "", 1, swapped[entry.group])
    else:
        for entry, part, label in question.items(entries, random):
            add(entry, part, label, entry.text)
    items = pd.DataFrame(rows, columns=[*ITEM_COLUMNS, "structure", "voice"])
    return Task(
        name=f"core.{question.name}",
        level=question.level,
        unit=question.unit,
        labels=question.labels,
        corpus=corpus,
        items=items,
        description=question.description,
        source="generated by a controlled English grammar",
        licence="Apache-2.0",
        citation=question.citation,
    )
