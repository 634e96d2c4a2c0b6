"""IOB2: columns, spans, ill-formed sequences, and the real entities of EWT."""

from __future__ import annotations

import pytest

from probing.registry import load_tasks
from probing.tasks.iob import chunks, iob_tasks, read_iob
from spafit.errors import DataError, UnknownTaskError
from tests.paths import SHARED, needs_shared
from tests.span_fixtures import BOB, NEW_YORK

NER = SHARED / "ner" / "UNER_English-EWT"


def folder(path, train=NEW_YORK + BOB, dev=BOB, test=NEW_YORK):
    for split, text in (("train", train), ("dev", dev), ("test", test)):
        (path / f"xx-{split}.iob2").write_text(text, encoding="utf-8", newline="")
    return path


def spans_of(path):
    """Words and type of every marked span, in order."""
    (task,) = iob_tasks(read_iob(path), ["spans"])
    texts = [task.corpus.texts[i] for i in task.items["text"]]
    words = [t.string[slice(*t.spans[s])] for t, s in zip(texts, task.items["span"], strict=True)]
    return list(zip(words, [task.labels[i] for i in task.items["label"]], strict=True))


def test_chunks_and_tags_share_texts_with_the_spans_of_both(tmp_path):
    spans, tags = load_tasks([f"iob:{folder(tmp_path)}"])
    assert (spans.unit, spans.labels) == ("span", ("LOC", "PER"))
    assert (tags.unit, tags.labels) == ("word", ("B-LOC", "B-PER", "I-LOC", "O"))
    assert spans.corpus is tags.corpus
    first = spans.corpus.texts[0]
    assert first.string == "Ann left New York"
    assert first.words == ("Ann", "left", "New", "New York", "York")
    assert spans_of(tmp_path)[:4] == [("Ann", "PER"), ("New York", "LOC"), ("Bob", "PER"), ("Rome", "LOC")]
    assert spans.items["item"].tolist()[:2] == ["sentence-1:1", "sentence-1:3-4"]
    assert spans.items["control"].tolist()[:2] == ["ann", "new york"]
    (alone,) = load_tasks([f"iob:{tmp_path}#spans"])
    assert alone.digest == spans.digest  # its company does not change a task


def test_columns_by_tabs_spaces_and_numbers_give_the_same(tmp_path):
    expected = None
    numbered = "# sent_id = a\n# text = Ann left\n1\tAnn\tB-PER\t-\tx\n1-2\tno\t_\n2\tleft\tO\t-\tx\n\n"
    other = "# sent_id = b\n1\t#\tB-LOC\t-\tx\n2\tRome\tI-LOC\t-\tx\n\n"
    plain = "-DOCSTART- -X- O O\n\nAnn NNP I-NP B-PER\nleft VBD O O\n\n# NN O B-LOC\nRome NNP O I-LOC\n"
    tabs = "Ann\tB-PER\nleft\tO\n\n\n#\tB-LOC\nRome\tI-LOC\n"
    for text in (numbered + other, plain, tabs, "\ufeff" + tabs.replace("\n", "\r\n")):
        found = spans_of(folder(tmp_path, text, text, text))
        expected = expected or found
        assert found == expected
    assert expected[:2] == [("Ann", "PER"), ("# Rome", "LOC")]
    (task,) = iob_tasks(read_iob(folder(tmp_path, numbered + other, numbered, numbered)), ["spans"])
    assert task.items["group"].tolist() == ["a", "b", "a~2", "a~3"]  # ids are unique


def test_ill_formed_sequences_are_mended_counted_and_placed(tmp_path):
    train = "in\tO\nNew\tI-LOC\nYork\tI-LOC\nAnn\tI-PER\nBo\tB-PER\n\nRome\tI-LOC\n\n"
    source = read_iob(folder(tmp_path, train))
    assert source.notes[""] == [
        "3 ill-formed tag(s): I- without a chunk of its type before it, the first at xx-train.iob2:2; each is read as "
        "the beginning of a chunk."
    ]
    assert spans_of(tmp_path)[:4] == [("New York", "LOC"), ("Ann", "PER"), ("Bo", "PER"), ("Rome", "LOC")]
    (tags,) = iob_tasks(source, ["tags"])
    assert [tags.labels[i] for i in tags.items["label"][:5]] == ["O", "B-LOC", "I-LOC", "B-PER", "B-PER"]
    assert not any("ill-formed" in note for note in iob_tasks(read_iob(folder(tmp_path)))[0].notes)


def test_chunks_end_where_the_next_begins():
    found = [(t.ranges[0], t.labels[0]) for t in chunks(["B-A", "B-A", "I-A", "O", "B-B"])]
    assert found == [((0, 1), "A"), ((1, 3), "A"), ((4, 5), "B")]
    assert list(chunks(["O", "O"])) == []


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Ann\tS-PER\n", r"xx-train.iob2:1: tag 'S-PER' of 'Ann' is not O, B-TYPE or I-TYPE"),
        ("Ann\tO\nleft\n", r"xx-train.iob2:2: 'left' has one column"),
        ("Ann\tO\n\tO\n", r"xx-train.iob2:2: the word is empty"),
        ("1\tAnn\tO\n3\tleft\tO\n", r"xx-train.iob2:2: word number '3' where 2 is expected"),
        ("1\tAnn\tO\n2\tleft\t\n", r"xx-train.iob2:2: tag '' of 'left'"),
    ],
)
def test_malformed_lines_are_named(tmp_path, text, sentence):
    with pytest.raises(DataError, match=sentence):
        read_iob(folder(tmp_path, text))


def test_names_and_empty_files(tmp_path):
    with pytest.raises(UnknownTaskError, match=r"no task 'span'. Did you mean 'spans'\? Use spans, tags"):
        load_tasks([f"iob:{folder(tmp_path)}#span"])
    with pytest.raises(UnknownTaskError, match="Did you mean 'iob:'"):
        load_tasks(["iobs:x"])
    with pytest.raises(DataError, match="holds no sentences"):
        read_iob(folder(tmp_path, "\n", "\n", "\n"))


@needs_shared
def test_the_entities_of_ewt():
    source = read_iob(NER)
    spans, tags = iob_tasks(source)
    assert spans.labels == ("LOC", "ORG", "PER")
    counts = spans.items["split"].value_counts()
    # Well-formed throughout, so there are as many entities as tags B-: 966 = 399 + 224 + 343, 1,088 = 317 + 322 + 449.
    assert counts.to_dict() == {"train": 7005, "dev": 966, "test": 1088}
    assert len(tags.items) == 204579 + 25149 + 25097
    assert not any("ill-formed" in note for note in spans.notes)
    assert not (spans.items["control"] == "").any()
    first = spans.items.iloc[0]
    text = spans.corpus.texts[first["text"]]
    assert text.string[slice(*text.spans[first["span"]])] == "Al - Zaman"
    assert spans.licence.startswith(("Attribution", "CC", "#", "UNER", "Creative"))
