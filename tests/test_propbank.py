"""Constituents from parse bits and roles of predicates: by hand, bad input, and the real sentences of EWT."""

from __future__ import annotations

from copy import deepcopy

import pytest

from probing.registry import load_tasks
from probing.tasks.propbank import brackets, propbank_tasks, read_propbank
from spafit.errors import DataError, UnknownTaskError
from tests.paths import SHARED, needs_shared
from tests.span_fixtures import IAN, RAN, json_lines

EWT = SHARED / "srl" / "propbank_ewt"


def folder(path, *train):
    json_lines(path / "train.jsonl", *(train or (IAN, RAN)))
    json_lines(path / "dev.jsonl", IAN, RAN)
    json_lines(path / "test.jsonl", IAN, RAN)
    return path


def shown(task, n):
    """Words of the span or spans, and label, of the first items."""
    rows = []
    for row in task.items.head(n).to_dict("records"):
        text = task.corpus.texts[row["text"]]
        rows.append((*(text.string[slice(*text.spans[row[c]])] for c in task.span_columns), task.labels[row["label"]]))
    return rows


def test_brackets_close_from_the_inside():
    found = list(brackets(IAN["parse"], 6, "here"))
    assert found == [
        ("NP", 0, 1), ("NP", 2, 4), ("PRT", 4, 5), ("NP", 5, 6), ("VP", 1, 6), ("S", 0, 6), ("TOP", 0, 6),
    ]  # fmt: skip


def test_constituents_are_phrases_of_two_words_and_more_the_innermost_of_a_chain(tmp_path):
    (task,) = propbank_tasks(read_propbank(folder(tmp_path)), ["constituents"])
    assert (task.unit, task.level, task.labels) == ("span", "syntax", ("NP", "S", "VP"))
    assert shown(task, 7) == [
        ("Ian ate ice cream up today", "S"),
        ("ate ice cream up today", "VP"),
        ("ice cream", "NP"),
        ("We ran to warm up", "S"),
        ("ran to warm up", "VP"),
        ("to warm up", "VP"),  # an S that is nothing but this VP
        ("warm up", "VP"),
    ]
    assert task.notes[0] == "3 time(s) a span is phrases of several types, one within the other; the innermost counts."


def test_roles_are_pairs_of_the_predicate_and_an_argument(tmp_path):
    (task,) = propbank_tasks(read_propbank(folder(tmp_path)), ["roles"])
    assert (task.unit, task.level, task.kind) == ("span-pair", "semantics", "classes")
    assert shown(task, 6) == [
        ("ate", "Ian", "ARG0"),
        ("ate", "ice cream", "ARG1"),
        ("ate", "today", "ARGM-TMP"),
        ("ran", "We", "ARG0"),
        ("ran", "to warm up", "ARGM-PRP"),
        ("warm up", "We", "ARG1"),
    ]
    assert task.items["item"].tolist()[1] == "s-1:2|3-4"
    assert not any("phrases" in note for note in task.notes)


def test_both_tasks_share_one_corpus_however_they_are_asked_for(tmp_path):
    together = load_tasks([f"propbank:{folder(tmp_path)}"])
    assert [t.name.rpartition(".")[2] for t in together] == ["constituents", "roles"]
    assert together[0].corpus is together[1].corpus
    apart = load_tasks([f"propbank:{tmp_path}#roles", f"propbank:{tmp_path}#constituents"])
    assert [t.digest for t in apart] == [t.digest for t in reversed(together)]
    with pytest.raises(UnknownTaskError, match="Did you mean 'roles'"):
        load_tasks([f"propbank:{tmp_path}#role"])


def bad(change):
    row = deepcopy(IAN)
    change(row)
    return row


def arguments(row, *values):
    row["predicates"][0]["args"] = list(values)


BAD = {
    "'parse' is a list of 5; it must be a list of one string per word, 6": bad(lambda r: r["parse"].pop()),
    "a bracket closes after word 5 that none opens": bad(lambda r: r["parse"].__setitem__(5, "*)))))")),
    "the bracket (S before word 0 is never closed": bad(lambda r: r["parse"].__setitem__(5, "(S(NP*)))")),
    "parse bit '(NP' of word 2 is not of the form": bad(lambda r: r["parse"].__setitem__(2, "(NP")),
    "predicate 0 has index 6; it must be a word, 0 to 5": bad(lambda r: r["predicates"][0].update(index=6)),
    "predicate 0: ARG0 [0, 7] reaches outside the 6 word(s)": bad(lambda r: arguments(r, ["ARG0", 0, 7])),
    "predicate 0: ARG0 [1, 1] is empty": bad(lambda r: arguments(r, ["ARG0", 1, 1])),
    "predicate 0: ARG0 [0, 3] and ARG1 [2, 4] overlap": bad(
        lambda r: arguments(r, ["ARG1", 2, 4], ["ARG0", 0, 3])
    ),
    "predicate 0: ARG0 [2, 4] and ARG1 [2, 4] overlap": bad(
        lambda r: arguments(r, ["ARG0", 2, 4], ["ARG1", 2, 4])
    ),
    "argument ['ARG0', 1] must be [role, start, end]": bad(lambda r: arguments(r, ["ARG0", 1])),
    "predicate 1 stands at words [1, 2], where another one stands": bad(
        lambda r: r["predicates"].append(r["predicates"][0])
    ),
    "predicate 0 must be an object with 'index' and 'args'": bad(lambda r: r.update(predicates=["x"])),
    "word 2 (from 0) is empty": bad(lambda r: r["words"].__setitem__(2, " ")),
    "'words' must be a list of strings": bad(lambda r: r.update(words="Ian ate")),
    "'sent_id' is 3; it must be a string": bad(lambda r: r.update(sent_id=3)),
}  # fmt: skip


@pytest.mark.parametrize("sentence", BAD)
def test_bad_input_is_named_with_file_and_line(tmp_path, sentence):
    with pytest.raises(DataError) as caught:
        read_propbank(folder(tmp_path, RAN, BAD[sentence]))
    assert sentence in str(caught.value)
    assert "train.jsonl:2: " in str(caught.value)


def test_sentences_without_words_or_parse(tmp_path):
    bare = {"sent_id": "s-3", "words": ["Go"], "predicates": []}
    source = read_propbank(folder(tmp_path, IAN, RAN, bare, {"words": []}))
    constituents, _ = propbank_tasks(source)
    assert "1 sentence(s) have no parse." in constituents.notes
    assert len(source.sentences) == 7


@needs_shared
def test_the_sentences_of_ewt():
    constituents, roles = propbank_tasks(read_propbank(EWT))
    # Counted apart from the reader: brackets of two words and more by distinct span; arguments but V and C-V.
    assert len(constituents.items) == 160917
    assert constituents.items["split"].value_counts()["test"] == 15373
    dropped = 1  # R-ARGM-ADJ
    assert len(roles.items) + dropped == 81251 + 9556 + 9321
    assert "V" not in roles.labels
    assert shown(roles, 1)[0][2] in roles.labels
    commonest = constituents.items["label"].value_counts().index[0]
    assert constituents.labels[commonest] == "NP"
