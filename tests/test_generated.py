"""The generated suite keeps what its sentences, splits and labels promise; words and length do not tell the labels."""

from __future__ import annotations

import hashlib
import itertools
import re
from dataclasses import replace
from random import Random

import numpy as np
import pandas as pd
import pytest

from probing.tasks.base import Task
from probing.tasks.generated import core_tasks
from probing.tasks.grammar import Phrase, Plan, realize, shifted
from probing.tasks.lexicon import Noun, article, pluralize, vocabulary
from spafit.errors import UsageError
from tests.bench.core_difficulty import baselines, differs, leaks

TASKS = {task.name.removeprefix("core."): task for task in core_tasks()}
CORPUS = TASKS["tense"].corpus
FUNCTION_WORDS = {"the", "a", "an", "some", "no", "who", "that", "before", "after", "had", "was", "were", "been", "by"}
NEIGHBOURS = ("previous_word", "next_word")
DEEP = [name for name, task in TASKS.items() if task.level in ("syntax", "semantics")]


def words_of(string: str) -> list[str]:
    return re.findall(r"[a-z]+", string.lower())


def strings(task: Task, *splits: str) -> list[str]:
    return [task.corpus.texts[i].string for i in task.items.loc[task.items["split"].isin(splits), "text"]]


def intact() -> list[tuple[str, str]]:
    """Every sentence that is not swapped, with its structure."""
    items = TASKS["tense"].items
    return [(CORPUS.texts[i].string, s) for i, s in zip(items["text"], items["structure"], strict=True)]


def test_there_are_enough_tasks_of_each_level_and_unit():
    for level in ("surface", "syntax", "semantics"):
        of_level = [t for t in TASKS.values() if t.level == level]
        assert len(of_level) >= 4
        assert {t.unit for t in of_level} == {"sentence", "word"}


@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_valid_and_large_enough(name):
    task = TASKS[name].validate()
    counts = task.items["split"].value_counts()
    assert len(task.training_draw(0, None)) >= 2000
    assert counts["dev"] >= 500
    assert task.test_splits == (("seen",) if name == "word_content" else ("seen", "unseen"))
    assert min(counts[s] for s in task.test_splits) >= 1000
    assert task.corpus is CORPUS
    assert task.level in task.description.lower()
    assert (task.items["control"] != "").all()
    assert not FUNCTION_WORDS & set(task.items["control"])


@pytest.mark.parametrize("name", [n for n in TASKS if n not in ("length", "word_content")])
def test_labels_are_even_in_every_split(name):
    shares = TASKS[name].items.groupby("split")["label"].value_counts(normalize=True).unstack()
    assert (shares - 1 / len(TASKS[name].labels)).abs().to_numpy().max() < 0.02


def test_texts_are_few_distinct_and_short():
    texts = [t.string for t in CORPUS.texts]
    assert len(set(texts)) == len(texts) < 8000
    lengths = [len(t.split()) for t in texts]
    assert min(lengths) >= 8
    assert max(lengths) <= 16
    assert np.mean(lengths) < 13


def test_no_text_and_no_group_is_in_two_splits():
    for task in TASKS.values():
        assert (task.items.groupby("text")["split"].nunique() == 1).all()
        assert (task.items.groupby("group")["split"].nunique() == 1).all()
    split_of = pd.concat([task.items for task in TASKS.values()]).groupby("text")["split"]
    assert (split_of.nunique() == 1).all()


def test_unseen_words_are_disjoint_and_seen_words_all_occur_in_training():
    used: dict[str, set[str]] = {split: set() for split in ("train", "dev", "seen", "unseen")}
    for name in ("tense", "bigram_shift"):
        for split, words in used.items():
            words.update(word for string in strings(TASKS[name], split) for word in words_of(string))
    assert used["unseen"] & (used["train"] | used["dev"] | used["seen"]) <= FUNCTION_WORDS
    assert not vocabulary("seen").forms() & vocabulary("unseen").forms()
    assert used["seen"] <= used["train"]
    for task in TASKS.values():
        if task.unit == "word":
            seen, train = (task.items.loc[task.items["split"] == split, "control"] for split in ("seen", "train"))
            assert seen.isin(set(train)).mean() > 0.97


def test_the_suite_is_determined_by_version_and_seed():
    again = core_tasks(version=1, seed=0)
    assert again[0].corpus == CORPUS
    for one, two in zip(again, TASKS.values(), strict=True):
        assert one.items.equals(two.items)
    other = core_tasks(seed=1)
    assert not {t.string for t in other[0].corpus.texts} & {t.string for t in CORPUS.texts}
    with pytest.raises(UsageError, match="Edition 2"):
        core_tasks(version=2)


def test_edition_1_has_not_changed():
    """Scores of one edition must stay comparable: a change in sentences, labels or splits needs a new edition."""
    digest = hashlib.sha256("\n".join(f"{t.string}{t.spans}" for t in CORPUS.texts).encode())
    for task in TASKS.values():
        rows = task.items[["text", "span", "label", "split", "group", "control"]].to_numpy().tolist()
        digest.update(f"{task.name} {task.labels} {rows}".encode())
    assert digest.hexdigest()[:16] == "fcdff807edf8c0ec"


@pytest.mark.parametrize("name", [*DEEP, *NEIGHBOURS])
def test_words_length_and_word_identity_stay_near_chance(name):
    for split, scores in baselines(TASKS[name], l2=(0.1,)).items():
        assert scores["chance"] == pytest.approx(0.5, abs=0.02)
        assert not leaks(scores), f"{split}: {scores}"


@pytest.mark.parametrize(("name", "most"), [("words_after", 0.15), ("previous_word", 0.08), ("next_word", 0.08)])
def test_the_position_tells_little_of_what_stands_around_a_word(name, most):
    for split, scores in baselines(TASKS[name], l2=(0.1,)).items():
        assert scores["position"] < scores["chance"] + most, f"{split}: {scores}"
    ordinal = baselines(TASKS["word_position"], l2=(0.1,))["seen"]
    assert ordinal["position"] > 0.95


@pytest.mark.parametrize(
    ("baseline", "leak"),
    [
        ("bow", lambda task, i: "who" in words_of(task.corpus.texts[task.items["text"].iloc[i]].string)),
        ("length", lambda task, i: len(task.corpus.texts[task.items["text"].iloc[i]].string.split()) > 12),
        ("identity", lambda task, i: hashlib.md5(task.items["control"].iloc[i].encode()).digest()[0] % 2),
    ],
)
def test_a_leaky_labelling_is_caught(baseline, leak):
    task = TASKS["verb_number"]
    leaky = replace(task, items=task.items.assign(label=[int(leak(task, i)) for i in range(len(task.items))]))
    assert baseline in leaks(baselines(leaky, l2=(0.1,))["seen"])


def test_a_difference_between_layers_must_exceed_chance():
    rng = np.random.default_rng(0)
    flat = [rng.random(1000) < 0.6 for _ in range(7)]
    assert not differs(flat)
    assert differs([*flat[:-1], rng.random(1000) < 0.75])


def plan(**changes: object) -> Plan:
    nurse, pilot, judge, shirt = (Phrase(Noun(w, pluralize(w)), p) for w, p in zip(
        ("nurse", "pilot", "judge", "shirt"), (False, True, False, True), strict=True))  # fmt: skip
    base = Plan(
        structure="medial", main="encounter", perfect="handling", voice="active", handling_passive=False,
        connective="before", agent=nurse, patient=pilot, maker=judge, thing=shirt, encounter="called",
        handling="ironed", adverbs=(), odd=False, denied=None,
    )  # fmt: skip
    return replace(base, **changes)


RELATIVE = {"maker": None, "connective": "who"}
CENTER = {**RELATIVE, "structure": "center", "main": "handling"}


@pytest.mark.parametrize(
    ("changes", "expected", "main_subject"),
    [
        ({}, "The nurse called the pilots before the judge had ironed the shirts.", "nurse"),
        (
            {"structure": "initial", "perfect": "encounter", "connective": "after"},
            "After the judge ironed the shirts, the nurse had called the pilots.",
            "nurse",
        ),
        (
            {"main": "handling", "voice": "passive"},
            "The judge had ironed the shirts before the pilots were called by the nurse.",
            "judge",
        ),
        (
            {"structure": "initial", "main": "handling", "handling_passive": True, "maker": None},
            "Before the nurse called the pilots, the shirts had been ironed.",
            "shirts",
        ),
        (
            {**RELATIVE, "structure": "right", "voice": "passive", "perfect": "encounter"},
            "The pilots had been called by the nurse who ironed the shirts.",
            "pilots",
        ),
        ({**CENTER, "voice": "object-relative"}, "The pilots who the nurse called had ironed the shirts.", "pilots"),
        (
            {**CENTER, "adverbs": (("handling", "often"),)},
            "The nurse who called the pilots had often ironed the shirts.",
            "nurse",
        ),
    ],
)
def test_a_plan_reads_as_expected(changes, expected, main_subject):
    made = plan(**changes)
    text = realize(made).text(("encounter", "handling", "thing"))
    assert text.string == expected
    assert text.words == ("called", "ironed", "shirts")
    subject = made.subject(made.main)
    assert subject.noun.form(plural=subject.plural) == main_subject


def nouns() -> tuple[set[str], set[str]]:
    halves = (vocabulary("seen"), vocabulary("unseen"))
    found = [noun for half in halves for group in (half.persons, *half.things.values()) for noun in group]
    return {n.singular for n in found}, {n.plural for n in found}


def test_sentences_keep_the_grammars_promises():
    singular, plural = nouns()
    assert not singular & plural
    for string, structure in intact():
        found = words_of(string)
        assert re.fullmatch(r"[A-Z][a-z]*( [a-z]+,?)* [a-z]+\.", string), string
        assert all(a != b for a, b in itertools.pairwise(found)), string
        heads = [w for w in found if w in singular | plural]
        assert len(set(heads)) == len(heads) >= 3, string
        assert found.count("had") == 1, string
        assert ("," in string) == (structure == "initial"), string
        assert found.count("no") == (structure in ("right", "center")), string
        passives = [w for w in found if w in ("been", "was", "were")]
        assert passives in ([], ["been"]) if structure in ("right", "center") else len(passives) == 1, string
        for i, word in enumerate(found):
            if word in ("a", "an"):
                assert word == article(found[i + 1]), string
                assert next(w for w in found[i:] if w in singular | plural) in singular, string
            if word in ("was", "were"):
                subject = [w for w in found[:i] if w in singular | plural][-1]
                assert subject in (singular if word == "was" else plural), string
            if word == "some":
                assert next(w for w in found[i:] if w in singular | plural) in plural, string


def test_labels_agree_with_what_the_strings_say():
    """Labels again, read off the sentences by position alone."""
    singular, plural = nouns()

    def clauses(string: str, structure: str) -> tuple[str, str]:
        if structure == "initial":
            subordinate, main = string.split(", ")
        else:
            main, subordinate = re.split(r" (?:before|after) ", string)
        return main, subordinate

    for name in ("tense", "subject_number"):
        for row in TASKS[name].items.itertuples():
            text = CORPUS.texts[row.text]
            if row.structure in ("medial", "initial"):
                main = clauses(text.string, row.structure)[0]
                first, perfect = main, " had " in main
            else:
                first_verb = text.string.index(f" {text.words[-2]} ")
                late = text.string.index(" had ") > first_verb
                first, perfect = text.string, late == (row.structure == "center")
            subject = next(w for w in words_of(first) if w in singular | plural)
            assert row.label == (perfect if name == "tense" else subject in plural), text.string
    for row in TASKS["earlier"].items.itertuples():
        text = CORPUS.texts[row.text]
        main, _ = clauses(text.string, row.structure)
        in_main = text.words[row.span] in words_of(main)
        assert row.label == (in_main == ("before" in words_of(text.string))), text.string
    for row in TASKS["voice"].items.itertuples():
        text = CORPUS.texts[row.text]
        clause = next(c for c in clauses(text.string, row.structure) if text.words[row.span] in words_of(c))
        assert row.label == bool({"was", "were", "been"} & set(words_of(clause))), text.string
    for row in TASKS["distant_subject"].items.itertuples():
        text = CORPUS.texts[row.text]
        found = words_of(text.string)
        last = max(i for i, w in enumerate(found) if w in text.words[:2]) == found.index(text.words[row.span])
        assert row.label == (last == (row.structure == "right")), text.string


def test_the_surface_labels_are_facts_about_the_string():
    """Labels again, read off the characters around each word without the grammar."""
    around = {"words_after": set(), "previous_word": set(), "next_word": set()}
    for name, pairs in around.items():
        task = TASKS[name]
        for row in task.items.itertuples():
            text = CORPUS.texts[row.text]
            start, end = text.spans[row.span]
            before, after = words_of(text.string[:start]), words_of(text.string[end:])
            seen = {"words_after": len(after), "previous_word": (before or [""])[-1], "next_word": (after or [""])[0]}
            pairs.add((seen[name], task.labels[row.label]))
    assert {(n, "0-4" if n < 5 else "5-6" if n < 7 else "7+") for n, _ in around["words_after"]} == around[
        "words_after"
    ]
    rest = "no, a or some"
    assert around["previous_word"] == {("the", "the"), ("no", rest), ("a", rest), ("an", rest), ("some", rest)}
    assert all((word == "had") == (label == "had") for word, label in around["next_word"])
    assert len(around["next_word"]) > 3


def test_a_sentence_has_a_noun_with_each_label_where_neighbours_are_asked():
    for name in NEIGHBOURS:
        labels = TASKS[name].items.groupby("group")["label"].agg(sorted)
        assert (labels.map(tuple) == (0, 1)).all()


def test_spans_are_the_words_that_items_ask_for():
    for task in TASKS.values():
        if task.unit == "word":
            at = zip(task.items["text"], task.items["span"], strict=True)
            assert [CORPUS.texts[i].words[k].lower() for i, k in at] == task.items["control"].tolist()


def test_every_verb_and_thing_is_as_often_odd_as_not():
    items = TASKS["odd_thing"].items
    things = TASKS["word_content"].items.set_index("text")["label"]
    for key in (things.reindex(items["text"]).to_numpy(), [CORPUS.texts[i].words[-1] for i in items["text"]]):
        train = items.assign(key=key)[(items["split"] == "train").to_numpy()]
        shares = train.groupby("key")["label"].mean()
        assert shares.between(0.4, 0.6).all()


def test_swapped_sentences_hold_the_same_words_in_an_order_that_is_not_in_the_grammar():
    items = TASKS["bigram_shift"].items
    pairs = items.pivot(index="group", columns="label", values="text")
    for whole, swapped in pairs.itertuples(index=False):
        a, b = CORPUS.texts[whole].string.split(), CORPUS.texts[swapped].string.split()
        moved = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
        assert moved == [moved[0], moved[0] + 1]
        assert moved[0] > 0
        assert sorted(a) == sorted(b)
    patient, thing = (Phrase(Noun(part, part + "s"), True, "") for part in ("patient", "thing"))
    bare = plan(**CENTER, patient=patient, thing=thing)
    forbidden = "The nurse who patients called had ironed things."
    made = {shifted(realize(bare), Random(i)).text().string for i in range(200)}
    assert forbidden not in made
    assert len(made) > 1


def test_forms_and_articles():
    assert [pluralize(w) for w in ("thief", "child", "lady", "boss", "potato", "donkey", "fisherman", "scarf")] == [
        "thieves", "children", "ladies", "bosses", "potatoes", "donkeys", "fishermen", "scarves",
    ]  # fmt: skip
    assert [article(w) for w in ("uniform", "omelet", "old", "nurse", "author")] == ["a", "an", "an", "a", "an"]
