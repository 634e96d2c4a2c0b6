"""Edge-probing files: what becomes of targets, kinds and units, and one sentence for each kind of bad input."""

from __future__ import annotations

import pytest

from probing.registry import load_tasks
from probing.tasks.edges import edge_tasks
from spafit.errors import DataError
from tests.span_fixtures import edge, json_lines

A = edge("Ian ate strawberry ice cream", ((1, 2), (0, 1), "A0"), ((1, 2), (2, 5), "A1"))
B = edge("Ann saw him", ((1, 2), (0, 1), "A0"), ((1, 2), (2, 3), "A1"))


def read(path, *rows):
    """The task of a folder whose dev and test files hold two good lines each."""
    json_lines(path / "train.jsonl", *rows)
    json_lines(path / "development.jsonl", B)
    json_lines(path / "test.jsonl", B)
    (task,) = edge_tasks(path)
    return task


def test_targets_become_pairs_of_spans_with_exclusive_ends(tmp_path):
    task = read(tmp_path, A, B)
    assert (task.name, task.unit, task.kind, task.labels) == (tmp_path.name, "span-pair", "classes", ("A0", "A1"))
    items = task.items[task.items["split"] == "train"]
    assert items["item"].tolist()[:2] == ["train:1:2|1", "train:1:2|3-5"]
    spans = [[t.string[slice(*t.spans[i])] for i in (one, two)]
             for t, one, two in ((task.corpus.texts[r.text], r.span, r.span2) for r in items.itertuples())]  # fmt: skip
    assert spans == [["ate", "Ian"], ["ate", "strawberry ice cream"], ["saw", "Ann"], ["saw", "him"]]
    assert items["control"].tolist()[1] == "ate|strawberry ice cream"
    assert items["group"].tolist() == ["train:1", "train:1", "train:2", "train:2"]
    assert task.items["split"].unique().tolist() == ["train", "dev", "test"]
    assert [t.name for t in load_tasks([f"edges:{tmp_path}"])] == [task.name]


def test_white_space_of_any_kind_separates_words_and_escaped_emoji_are_whole(tmp_path):
    row = edge("Ian\tate \ud83c\udf66  today".encode("utf-16", "surrogatepass").decode("utf-16"), ((2, 4), "food"))
    json_lines(tmp_path / "x.jsonl", row, *(edge(f"a b{i}", ((0, 1), ("food", "other")[i % 2])) for i in range(30)))
    raw = (tmp_path / "x.jsonl").read_bytes()
    assert b"\\ud83c\\udf66" in raw
    (tmp_path / "y.jsonl").write_bytes(b"\xef\xbb\xbf" + raw.replace(b"\n", b"\r\n\r\n"))  # mark, CRLF, empty lines
    (one,), (two,) = edge_tasks(tmp_path / "x.jsonl"), edge_tasks(tmp_path / "y.jsonl")
    text = one.corpus.texts[0]
    assert text.string == "Ian ate 🍦 today"
    assert text.words == ("🍦 today",)
    assert one.corpus.texts == two.corpus.texts
    assert one.notes[0].startswith("The data bring no splits")


def test_lists_of_labels_and_labels_of_one_span_make_several_labels(tmp_path):
    task = read(tmp_path, edge("Ian ate", ((1, 2), (0, 1), ["moved", "A0"]), ((0, 1), (1, 2), ["A1"])), A)
    assert (task.kind, task.labels) == ("multilabel", ("A0", "A1", "moved"))
    assert task.items["label"].tolist()[:4] == ["1", "0,2", "0", "1"]  # by position of the spans
    task = read(tmp_path, edge("Ian ate", ((1, 2), (0, 1), "moved"), ((1, 2), (0, 1), "A0")), A)
    assert (task.kind, task.items["label"].iloc[0]) == ("multilabel", "0,2")
    assert "1 span(s) have labels from several targets: they are items with several labels." in task.notes
    task = read(tmp_path, edge("Ian ate", ((1, 2), (0, 1), [])), A, edge("x", ((0, 1), (0, 1), ["A1", "A0"])))
    assert task.items["label"].tolist()[:2] == ["", "0"]  # no label applies


def test_repeated_targets_empty_lines_of_targets_and_unseen_labels_are_counted(tmp_path):
    (tmp_path / "more").mkdir()
    task = read(tmp_path, A, {**B, "targets": B["targets"] * 2}, edge("nothing here"), edge(""))
    assert task.kind == "classes"
    assert task.items["item"].is_unique
    assert "2 line(s) without targets are not used." in task.notes
    assert "2 target(s) that repeat another one of their line dropped." in task.notes
    json_lines(tmp_path / "test.jsonl", B, edge("Who ate", ((1, 2), (0, 1), "A9")))
    (task,) = edge_tasks(tmp_path)
    assert "1 dev or test item(s) dropped: their label is not in training (A9 1)." in task.notes
    assert (task.items["split"] == "test").sum() == 2


def test_the_control_task_needs_words_that_recur(tmp_path):
    assert not (read(tmp_path, A, B).items["control"] == "").any()
    json_lines(tmp_path / "test.jsonl", edge("Nobody slept", ((1, 2), (0, 1), "A0")), edge("I", ((0, 1), (0, 1), "A1")))
    (task,) = edge_tasks(tmp_path)
    assert (task.items["control"] == "").all()
    assert any("No word-type control task" in note for note in task.notes)


BAD = {
    "span1 [1, 6] reaches outside the 5 word(s)": edge("a b c d e", ((1, 6), "x")),
    "span1 [-1, 2] reaches outside": edge("a b", ((-1, 2), "x")),
    "target 1: span1 [2, 2] is empty; ends are exclusive, so one word is [2, 3]": edge(
        "a b c", ((0, 1), "x"), ((2, 2), "x")
    ),
    "span1 [2, 1] ends before it starts": edge("a b c", ((2, 1), "x")),
    "span1 is [0]; it must be [start, end)": edge("a b", ((0,), "x")),
    "span1 is [0, 1.5]": edge("a b", ((0, 1.5), "x")),
    "span1 is [False, True]": edge("a b", ((False, True), "x")),
    "target 1 has one span, and earlier targets have two": edge("a b", ((0, 1), (1, 2), "x"), ((0, 1), "x")),
    "label '' must be a non-empty string": edge("a b", ((0, 1), "")),
    "label 3 must be a non-empty string": edge("a b", ((0, 1), 3)),
    "label 'x' stands twice in one list": edge("a b", ((0, 1), ["x", "x"])),
    "must be an object with 'span1', 'label'": {"text": "a", "targets": [{"span1": [0, 1]}]},
    "needs 'text', a string, and 'targets', a list": {"targets": []},
    "holds a list; each line must be one JSON object": [1],
    "holds half of a surrogate pair": edge("a \ud83d", ((0, 1), "x")),
}


@pytest.mark.parametrize("sentence", BAD)
def test_bad_input_is_named_with_file_and_line(tmp_path, sentence):
    with pytest.raises(DataError) as caught:
        read(tmp_path, *([] if "earlier" in sentence else [edge("good", ((0, 1), "x"))]), BAD[sentence])
    line = 1 if "earlier" in sentence else 2
    assert sentence in str(caught.value)
    assert f"train.jsonl:{line}: " in str(caught.value)


def test_files_that_cannot_be_told_apart_or_hold_nothing(tmp_path):
    with pytest.raises(DataError, match="no training file"):
        edge_tasks(tmp_path)
    json_lines(tmp_path / "a-train.jsonl", A)
    json_lines(tmp_path / "b-train.jsonl", A)
    with pytest.raises(DataError, match=r"several train files \(a-train.jsonl, b-train.jsonl\)"):
        edge_tasks(tmp_path)
    json_lines(tmp_path / "empty.jsonl", edge("no targets"))
    with pytest.raises(DataError, match="holds no targets"):
        edge_tasks(tmp_path / "empty.jsonl")
    (tmp_path / "list.json").write_text('[\n{"text": "a"}\n]')
    with pytest.raises(DataError, match=r"list.json:1: not JSON .* one JSON object per line"):
        edge_tasks(tmp_path / "list.json")
    with pytest.raises(DataError, match="no such file or folder"):
        edge_tasks(tmp_path / "none")
