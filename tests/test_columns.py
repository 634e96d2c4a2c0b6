"""Tasks from tables: references, splits, pairs, tokens, and everything that is dropped or refused, with its reason."""

from __future__ import annotations

import json
from collections import Counter

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probing.registry import load_tasks
from probing.tasks.columns import table_tasks
from probing.tasks.splits import with_all_splits
from probing.tasks.table_options import parse_options
from spafit.errors import DataError, TaskError, UnknownTaskError
from tests.paths import SHARED, needs_shared

GLUE = SHARED / "glue"


def read(body, base):
    (task,) = table_tasks(body, base=base)
    return task


def sizes(task):
    return tuple(int((task.items["split"] == s).sum()) for s in ("train", "dev", *task.test_splits))


def write_splits(folder, header="text\tlabel\n", **rows):
    folder.mkdir(exist_ok=True)
    for split, lines in rows.items():
        (folder / f"{split}.tsv").write_text(header + "".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder


def test_a_folder_of_three_files(tmp_path):
    write_splits(tmp_path / "Mood", train=["good \t1", "bad\t0"], dev=["fine\t1"], test=["poor\t0", "good\t1"])
    task = read("Mood,text=text,label=label", tmp_path)
    assert (task.name, task.unit, task.level, task.labels) == ("mood", "sentence", "other", ("0", "1"))
    assert task.items["item"].tolist() == ["train:2", "train:3", "dev:2", "test:2", "test:3"]
    assert [t.string for t in task.corpus.texts] == ["good", "bad", "fine", "poor"]
    assert task.items["group"].iloc[0] == task.items["group"].iloc[4]  # equal texts cluster
    assert task.notes == ("1 test text(s) also occur in training; they are kept.",)


def test_one_file_with_a_split_column_and_two_test_splits(tmp_path):
    rows = [("a", 1, "training"), ("b", 0, "train"), ("c", 1, "validation"), ("d", 0, "test"), ("e", 1, "test_far")]
    pd.DataFrame(rows, columns=["s", "y", "where"]).to_csv(tmp_path / "x.csv", index=False)
    task = read("x.csv,text=s,label=y,split=where,level=semantics,name=mine", tmp_path)
    assert (task.name, task.level, task.test_splits) == ("mine", "semantics", ("test", "test_far"))
    assert sizes(task) == (2, 1, 1, 1)
    (tmp_path / "x.csv").write_text("s,y,where\na,1,tain\n")
    with pytest.raises(DataError, match=r"x\.csv:2: split 'tain' is not one of train, "):
        read("x.csv,text=s,label=y,split=where", tmp_path)


def test_one_file_without_splits_is_cut_by_text(tmp_path):
    lines = [f"text {i % 100}\t{i % 2}" for i in range(200)]  # every text twice, with one label
    (tmp_path / "all.tsv").write_text("t\ty\n" + "\n".join(lines))
    task = read("all.tsv,text=t,label=y", tmp_path)
    assert task.name == "all"
    assert sizes(task) == (160, 20, 20)
    assert task.items.groupby("text")["split"].nunique().max() == 1
    assert task.items.groupby("split")["label"].mean().to_dict() == {"train": 0.5, "dev": 0.5, "test": 0.5}
    assert task.digest == read("all.tsv,text=t,label=y", tmp_path).digest
    assert "split 80/10/10 by text" in task.notes[0]


def test_a_missing_test_split_takes_dev_and_carves_dev(tmp_path):
    write_splits(tmp_path / "d", train=[f"t{i}\t{i % 2}" for i in range(40)], dev=["x\t0", "y\t1"])
    task = read("d,text=text,label=label", tmp_path)
    assert sizes(task) == (36, 4, 2)
    assert task.items.loc[task.items["split"] == "test", "item"].tolist() == ["dev:2", "dev:3"]
    assert task.notes == (
        "There is no test split: the dev split is used as test.",
        "There is no dev split: 4 training row(s) (10 % of the texts) are used as dev.",
    )


def test_a_found_test_file_without_labels_is_passed_over_but_a_named_one_is_not(tmp_path):
    folder = write_splits(tmp_path / "d", train=[f"t{i}\t{i % 2}" for i in range(40)], dev=["x\t0", "y\t1"])
    (folder / "test.tsv").write_text("index\ttext\n0\tz\n")
    assert "test.tsv has no labels and is not used." in read("d,text=text,label=label", tmp_path).notes
    with pytest.raises(TaskError, match=r"test\.tsv: has no column 'label' \(label=\)"):
        read("d,dev=dev.tsv,test=test.tsv,text=text,label=label", tmp_path)


def test_pairs_take_both_texts(tmp_path):
    write_splits(
        tmp_path / "p",
        header="a\tb\tlabel\n",
        train=["x\ty\tyes", "x\tz\tno", "x\t\tno"],
        dev=["u\tv\tyes"],
        test=["y\tx\tno"],
    )
    task = read("p,text=a,text2=b,label=label", tmp_path)
    assert (task.unit, task.labels) == ("pair", ("no", "yes"))
    assert [(t.string, t.second) for t in task.corpus.texts] == [("x", "y"), ("x", "z"), ("u", "v"), ("y", "x")]
    assert "1 row(s) with an empty text dropped." in task.notes


def test_token_classification_from_lists(tmp_path):
    rows = [
        {"words": ["Anna", "sleeps"], "tags": ["B-PER", "O"], "split": "train"},
        {"words": "Rome is old", "tags": ["B-LOC", None, "O"], "split": "train"},
        {"words": ["Rome"], "tags": ["B-LOC"], "split": "dev"},
        {"words": ["Anna"], "tags": ["B-PER"], "split": "test"},
    ]
    (tmp_path / "ner.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pd.DataFrame(rows[:1] + rows[2:]).to_parquet(tmp_path / "ner.parquet")
    task = read("ner.jsonl,text=words,label=tags,split=split", tmp_path)
    assert (task.unit, task.labels) == ("word", ("B-LOC", "B-PER", "O"))
    assert task.items["item"].tolist() == ["row:1:1", "row:1:2", "row:2:1", "row:2:3", "row:3:1", "row:4:1"]
    assert task.items["control"].tolist() == ["anna", "sleeps", "rome", "old", "rome", "anna"]
    spans = zip(task.items["text"], task.items["span"], strict=True)
    assert [task.corpus.texts[t].words[s] for t, s in spans][:4] == ["Anna", "sleeps", "Rome", "old"]
    with pytest.raises(TaskError, match="'B-LOC' occur in dev or test"):
        read("ner.parquet,text=words,label=tags,split=split", tmp_path)


def test_strings_of_tags_need_unit_word(tmp_path):
    write_splits(tmp_path / "d", train=["A b c\tX Y Y", "d\tX"], dev=["a b\tX Y"], test=["c\tY"])
    assert read("d,text=text,label=label,unit=word", tmp_path).labels == ("X", "Y")
    write_splits(tmp_path / "d", train=["A b c\tX Y", "d\tX"])
    with pytest.raises(DataError, match=r"train\.tsv:2: 2 label\(s\) for 3 word\(s\)"):
        read("d,text=text,label=label,unit=word", tmp_path)
    with pytest.raises(TaskError, match="unit=pair does not fit a sentence task: pair tasks need text2="):
        read("d,text=text,label=label,unit=pair", tmp_path)


def test_a_group_column_clusters_items(tmp_path):
    write_splits(
        tmp_path / "d", "text\tlabel\tdoc\n", train=["a\t1\td1", "b\t0\td1"], dev=["c\t1\td2"], test=["e\t0\t9"]
    )
    assert read("d,text=text,label=label,group=doc", tmp_path).items["group"].tolist() == ["d1", "d1", "d2", "9"]


def test_whole_floats_are_classes_and_measurements_are_refused(tmp_path):
    frame = pd.DataFrame({"t": [f"t{i}" for i in range(60)], "y": [float(i % 3) for i in range(60)]})
    frame.to_parquet(tmp_path / "ok.parquet")
    assert read("ok.parquet,text=t,label=y", tmp_path).labels == ("0", "1", "2")
    frame.assign(y=[i / 7 for i in range(60)]).to_parquet(tmp_path / "bad.parquet")
    with pytest.raises(TaskError, match=r"column 'y' holds 60 different decimal numbers.*Give kind=number"):
        read("bad.parquet,text=t,label=y", tmp_path)
    frame.assign(y=[(i % 5) / 2 for i in range(60)]).to_parquet(tmp_path / "few.parquet")
    assert read("few.parquet,text=t,label=y", tmp_path).labels == ("0", "0.5", "1", "1.5", "2")


def test_missing_texts_and_labels_are_dropped_and_counted(tmp_path):
    lines = [f"t{i}\t{i % 2}" for i in range(30)] + ["\t1", " \t0", "x\t"]
    write_splits(tmp_path / "d", train=lines, dev=["a\t1"], test=["b\t0"])
    task = read("d,text=text,label=label", tmp_path)
    assert task.notes == ("2 row(s) with an empty text dropped.", "1 row(s) without a label dropped.")
    assert sizes(task) == (30, 1, 1)
    write_splits(tmp_path / "d", train=["\t1", "\t0"])
    with pytest.raises(TaskError, match=r"gets no items from .*train\.tsv: every text is empty"):
        read("d,text=text,label=label", tmp_path)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("d,text=text", "a path .or name., text=COLUMN and label=COLUMN are needed"),
        ("d,txt=text,label=label", r"unknown option 'txt'\. Did you mean 'text'\?"),
        ("d,text=text,label=label,text=text", "option 'text' is given twice"),
        ("d,text=,label=label", "option 'text' has no value"),
        ("d,text=text,label=label,level=syntex", "level='syntex' is not one of surface"),
        ("d,text=text,label=label,quoting=all", "quoting='all' is not one of auto, none, minimal"),
        ("d,text=text,label=label,config=x", "unknown option 'config'"),
        ("d,text=text,label=lable", r"train\.tsv: has no column 'lable' .*Did you mean 'label'\? It has text, label"),
        ("d,text=text,label=label,split=s,dev=dev.tsv", "give either split= or train="),
        ("d,text=text,label=label,split=label", "split= needs one file"),
        ("d/train.tsv,train=x.tsv,text=text,label=label", "the path is the training file already"),
    ],
)  # fmt: skip
def test_a_reference_that_does_not_hold_together_is_explained(tmp_path, body, message):
    write_splits(tmp_path / "d", train=["a\t1", "b\t0"], dev=["c\t1"], test=["e\t0"])
    with pytest.raises(TaskError, match=message):
        table_tasks(body, base=tmp_path)


def test_files_that_are_missing_or_ambiguous_are_named(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        read("nowhere,text=a,label=b", tmp_path)
    (tmp_path / "e").mkdir()
    with pytest.raises(DataError, match=r"e: has no training file.*train=FILE"):
        read("e,text=a,label=b", tmp_path)
    write_splits(tmp_path / "d", train=["a\t1", "b\t0"])
    (tmp_path / "d" / "train.csv").write_text("text,label\na,1\n")
    with pytest.raises(TaskError, match=r"several train files \(train\.csv, train\.tsv\)"):
        read("d,text=text,label=label", tmp_path)
    with pytest.raises(DataError, match=r"dev2\.tsv: no such file"):
        read("d/train.tsv,dev=dev2.tsv,text=text,label=label", tmp_path)


def test_a_label_in_test_only_is_an_error(tmp_path):
    write_splits(tmp_path / "d", train=["a\t1", "b\t0"], dev=["c\t1"], test=["e\t2"])
    with pytest.raises(TaskError, match="'2' occur in dev or test but never in"):
        read("d,text=text,label=label", tmp_path)


def test_cells_of_the_wrong_kind_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"t": "x", "y": 1}\n{"t": 5, "y": 0}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: column 't' holds a int; a text must be a string"):
        read("a.jsonl,text=t,label=y", tmp_path)
    (tmp_path / "a.jsonl").write_text('{"t": "x", "y": 1}\n{"t": "z", "y": {"a": 1}}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: a label is a dict"):
        read("a.jsonl,text=t,label=y", tmp_path)
    (tmp_path / "a.jsonl").write_text('{"t": ["x", ""], "y": ["A", "B"]}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:1: the words must be a list of non-empty strings"):
        read("a.jsonl,text=t,label=y", tmp_path)


def test_paths_and_columns_may_hold_commas():
    target, options = parse_options("r", "a,b/c.tsv,text=x, y,label=z", forbidden=())
    assert (target, options.text, options.label) == ("a,b/c.tsv", "x, y", "z")


@given(
    st.lists(st.tuples(st.integers(0, 30), st.sampled_from("abc")), min_size=5, max_size=80),
    st.sampled_from([("",), ("train",), ("train", "dev"), ("train", "test"), ("train", "dev", "test")]),
    st.booleans(),
)
def test_made_splits_keep_texts_together_and_labels_in_training(rows, given_splits, stratify):
    texts = [text for text, _ in rows]
    labels = [[label] for _, label in rows]
    split_of = [given_splits[text % len(given_splits)] for text in texts]
    splits, notes = with_all_splits(split_of, texts, labels, stratify=stratify)
    assert all(s == g for s, g in zip(splits, split_of, strict=True) if g in ("test",))
    by_text: dict[int, set[str]] = {}
    for text, split in zip(texts, splits, strict=True):
        by_text.setdefault(text, set()).add(split)
    assert all(len(found) == 1 for found in by_text.values())
    before = {label[0] for label, g in zip(labels, split_of, strict=True) if g in ("", "train")}
    after = {label[0] for label, s in zip(labels, splits, strict=True) if s == "train"}
    assert before == after
    assert bool(notes) == ({"dev", "test"} - set(split_of) != set())


@needs_shared
@pytest.mark.parametrize(
    ("body", "expected", "labels"),
    [
        (
            "CoLA,train=cola_public/raw/in_domain_train.tsv,dev=dev.tsv,text=3,label=1",
            {"train": 8551, "dev": 1043},
            ("0", "1"),
        ),
        (
            "RTE,text=sentence1,text2=sentence2,label=label",
            {"train": 2490, "dev": 277},
            ("entailment", "not_entailment"),
        ),
        (
            "SST-2,dev=dev.tsv,test=test-labeled.tsv,text=sentence,label=label",
            {"train": 67349, "dev": 872, "test": 1821},
            ("0", "1"),
        ),
        (
            "WNLI,train=train.rebuilt.tsv,dev=dev.tsv,text=sentence1,text2=sentence2,label=label",
            {"train": 635, "dev": 71},
            ("0", "1"),
        ),
    ],
)
def test_glue_files_run_as_they_come(body, expected, labels):
    task = read(body, GLUE)
    assert Counter(item.partition(":")[0] for item in task.items["item"]) == expected  # the file that a row is from
    assert task.labels == labels
    if "test" not in expected:
        assert (task.items["split"] == "test").sum() == expected["dev"]


@needs_shared
def test_glue_similarity_is_a_regression_where_it_is_asked_for():
    with pytest.raises(TaskError, match="Give kind=number"):
        read("STS-B,text=sentence1,text2=sentence2,label=score", GLUE)
    task = read("STS-B,text=sentence1,text2=sentence2,label=score,kind=number", GLUE)
    assert (task.kind, task.unit) == ("number", "pair")
    assert (task.items["label"].min(), task.items["label"].max()) == (0, 5)


def test_a_header_that_was_read_as_data_is_noted_and_a_wrong_number_lists_it(tmp_path):
    split = ["train"] * 20 + ["dev"] * 5 + ["test"] * 5
    rows = [f"text {i}\t{'yes' if i % 2 else 'no'}\t{s}" for i, s in enumerate(split)]
    (tmp_path / "h.tsv").write_text("\n".join(["sentence\tlabel\ttrain", *rows]) + "\n")
    (tmp_path / "p.tsv").write_text("\n".join(rows) + "\n")
    (task,) = table_tasks("h.tsv,text=0,label=1,split=2", base=tmp_path)
    assert "h.tsv: line 1 (sentence, label, train) looks like a header" in task.notes[0]
    (plain,) = table_tasks("p.tsv,text=0,label=1,split=2", base=tmp_path)
    assert not any("header" in note for note in plain.notes)
    with pytest.raises(UnknownTaskError, match=r"no column '7'.*has 0, 1, 2\..*1 is 'sentence', 'label', 'train'"):
        table_tasks("h.tsv,text=0,label=7", base=tmp_path)
    with pytest.raises(UnknownTaskError, match="It has sentence, label, train"):
        table_tasks("h.tsv,text=0,label=1,header=yes", base=tmp_path)


def test_numbers_are_read_and_carved_into_splits(tmp_path):
    path = tmp_path / "sizes.tsv"
    path.write_text("sentence\tsize\n" + "".join(f"text {i}\t{i * 0.5}\n" for i in range(100)))
    (task,) = load_tasks([f"table:{path},text=sentence,label=size,kind=number"])
    assert task.kind == "number"
    assert task.labels == ()
    assert sorted(task.items["label"]) == [i * 0.5 for i in range(100)]
    assert task.items["split"].value_counts().to_dict() == {"train": 80, "dev": 10, "test": 10}
    assert set(task.items["label"].map(type)) == {float}


@pytest.mark.parametrize(
    ("cell", "said"),
    [("nan", r"sizes\.tsv:5: 'nan' is no finite number"), ("inf", "no finite number"), ("big", "no finite number")],
)
def test_what_is_no_number_is_named(tmp_path, cell, said):
    path = tmp_path / "sizes.tsv"
    cells = [cell if i == 3 else str(i) for i in range(40)]
    path.write_text("sentence\tsize\n" + "".join(f"text {i}\t{c}\n" for i, c in enumerate(cells)))
    with pytest.raises(DataError, match=said):
        load_tasks([f"table:{path},text=sentence,label=size,kind=number"])


def test_numbers_that_do_not_vary_and_measurements_without_kind_are_refused(tmp_path):
    path = tmp_path / "sizes.tsv"
    path.write_text("sentence\tsize\n" + "".join(f"text {i}\t2.0\n" for i in range(40)))
    with pytest.raises(TaskError, match="every training target is 2"):
        load_tasks([f"table:{path},text=sentence,label=size,kind=number"])
    path.write_text("sentence\tsize\n" + "".join(f"text {i}\t{i}.5\n" for i in range(40)))
    with pytest.raises(TaskError, match="Give kind=number"):
        load_tasks([f"table:{path},text=sentence,label=size"])
    with pytest.raises(TaskError, match="kind='numbers' is not one of classes, number"):
        load_tasks([f"table:{path},text=sentence,label=size,kind=numbers"])


def test_kept_columns_are_metadata_and_numbers_where_all_cells_are(tmp_path):
    header = "text\tlabel\tppl\tsource\n"
    write_splits(
        tmp_path / "d", header=header, train=["a\t1\t2.5\tweb", "b\t0\t3\tmail"], dev=["c\t1\t4\tweb"],
        test=["d\t0\t-1e1\tweb"],
    )  # fmt: skip
    task = read("d,text=text,label=label,keep=ppl|source", tmp_path)
    assert task.items["ppl"].tolist() == [2.5, 3.0, 4.0, -10.0]
    assert task.items["source"].tolist() == ["web", "mail", "web", "web"]
    with pytest.raises(UnknownTaskError, match=r"no column 'pp' \(keep pp=\)"):
        read("d,text=text,label=label,keep=pp", tmp_path)
    with pytest.raises(TaskError, match="keep=label is a name that items use"):
        read("d,text=text,label=label,keep=label", tmp_path)
