"""SentEval files: counts, levels, one corpus per folder, malformed lines named."""

from __future__ import annotations

import pytest

from probing.tasks.senteval import LEVELS, senteval_tasks
from spafit.errors import DataError, TaskError, UnknownTaskError
from tests.paths import SHARED, needs_shared

DERIVED = SHARED / "senteval_derived_from_ewt"

TENSE = (
    "tr\tPAST\tIt rained .\ntr\tPRES\tIt rains .\nva\tPAST\tIt rained .\nte\tPRES\tIt rains .\nte\tPAST\tHe left .\n"
)
LENGTH = "tr\t10\tIt rained .\ntr\t9\tA dog .\nva\t9\tA dog .\nte\t10\tHe left .\n"


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "my suite"
    path.mkdir()
    (path / "past_present.txt").write_text(TENSE)
    (path / "sentence_length.txt").write_text(LENGTH)
    (path / "README.txt").write_text("Not a task.")
    (path / "LICENSE").write_text("CC0 1.0\n")
    return path


def test_a_folder_gives_one_task_per_file_on_one_corpus(folder):
    length, tense = sorted(senteval_tasks(folder), key=lambda t: t.level == "semantics")
    assert (tense.name, tense.level, tense.unit) == ("my_suite.past_present", "semantics", "sentence")
    assert (length.level, length.labels) == ("surface", ("9", "10"))  # numbers in numerical order
    assert length.corpus is tense.corpus
    assert sorted(t.string for t in tense.corpus.texts) == ["A dog .", "He left .", "It rained .", "It rains ."]
    assert tense.items["item"].tolist() == [f"past_present:{i}" for i in range(1, 6)]
    assert tense.items["group"].iloc[0] == tense.items["group"].iloc[2]  # the same sentence
    assert tense.licence == "CC0 1.0"
    assert tense.notes == ("1 test sentence(s) also occur in training; they are kept.",)


def test_selecting_a_task_does_not_change_its_corpus(folder):
    (alone,) = senteval_tasks(folder, ["past_present"])
    assert alone.digest == senteval_tasks(folder)[0].digest
    (file,) = senteval_tasks(folder / "past_present.txt")
    assert file.name == alone.name
    assert len(file.corpus.texts) == 3
    assert file.corpus.name != alone.corpus.name


def test_empty_sentences_are_dropped_and_counted(folder):
    (folder / "past_present.txt").write_text(TENSE + "tr\tPAST\t \nte\tPAST\t\n")
    (task,) = senteval_tasks(folder, ["past_present"])
    assert "2 empty sentence(s) dropped." in task.notes
    assert len(task.items) == 5
    (folder / "past_present.txt").write_text("tr\tPAST\t\nte\tPAST\t\n")
    with pytest.raises(TaskError, match="every sentence is empty"):
        senteval_tasks(folder, ["past_present"])


def test_tasks_with_other_names_are_filed_under_other(folder):
    (folder / "rhyme.txt").write_text(TENSE)
    assert senteval_tasks(folder, ["rhyme"])[0].level == "other"
    assert set(LEVELS.values()) == {"surface", "syntax", "semantics"}
    assert len(LEVELS) == 10


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("tr\tPAST", r"past_present\.txt:6: 2 cell\(s\) where the format has 3"),
        ("tr\tPAST\ta\tb", r"past_present\.txt:6: 4 cell\(s\)"),
        ("", r"past_present\.txt:6: 1 cell\(s\)"),
        ("dev\tPAST\ta", r"past_present\.txt:6: split 'dev' is not one of tr, va, te"),
        ("tr\t\ta", r"past_present\.txt:6: the label is empty"),
    ],
)
def test_a_malformed_line_is_named(folder, line, message):
    (folder / "past_present.txt").write_text(TENSE + line + "\n")
    with pytest.raises(DataError, match=message):
        senteval_tasks(folder)


def test_a_label_in_test_only_is_an_error(folder):
    (folder / "past_present.txt").write_text(TENSE + "te\tFUT\tIt will .\n")
    with pytest.raises(TaskError, match=r"'FUT' occur in dev or test but never in\s+training"):
        senteval_tasks(folder)


def test_what_is_not_there_is_said(folder, tmp_path):
    with pytest.raises(UnknownTaskError, match=r"has no task 'past'\. .*It has past_present, sentence_length"):
        senteval_tasks(folder, ["past"])
    with pytest.raises(DataError, match="no such file or folder"):
        senteval_tasks(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no \.txt task file"):
        senteval_tasks(tmp_path / "empty")


@needs_shared
def test_the_derived_suite_has_its_counts():
    tasks = {t.name.partition(".")[2]: t for t in senteval_tasks(DERIVED)}
    assert len(tasks) == 9
    sizes = {name: tuple((t.items["split"] == s).sum() for s in ("train", "dev", "test")) for name, t in tasks.items()}
    assert sizes["sentence_length"] == (8758, 1361, 1371)
    assert sizes["coordination_inversion"] == (684, 89, 89)
    assert tasks["tree_depth"].labels == ("5", "6", "7", "8", "9", "10", "11")
    assert len(tasks["word_content"].labels) == 30
    assert len({id(t.corpus) for t in tasks.values()}) == 1
