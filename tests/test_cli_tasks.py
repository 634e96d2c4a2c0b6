"""``spafit tasks``: what each command prints, and that errors leave through the project's error classes."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from analysis.cli.tasks import tasks_app
from probing import registry
from spafit.errors import DataError, TaskError, UsageError
from tests.paths import ROOT
from tests.span_fixtures import edge, json_lines
from tests.test_conllu import A, B, conllu, folder
from tests.test_registry import toy


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.setattr(registry, "_built", {})
    monkeypatch.setattr(registry, "_installed", lambda: {})
    registry.register_task("toy", lambda: [toy("toy.tense", "semantics"), toy("toy.length", "surface")])


def run(*arguments):
    result = CliRunner().invoke(tasks_app, list(arguments))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_list_names_every_task_with_level_and_sizes():
    lines = run().splitlines()
    assert lines[0].split() == ["name", "level", "unit", "classes", "train", "dev", "test", "description"]
    assert lines[2].split() == ["toy.tense", "semantics", "sentence", "2", "5", "2", "2", "Toy", "toy.tense"]
    listed = json.loads(run("--json"))
    assert [row["name"] for row in listed] == ["toy", "toy.tense", "toy.length"]


def test_show_describes_a_task_with_its_notes(tmp_path):
    folder(tmp_path, conllu(A, B, A), conllu(A), conllu(A))
    text = run("show", f"conllu:{tmp_path}#upos,head_direction")
    assert "xx_tiny.upos\n" in text
    assert "\nxx_tiny.head_direction\n" in text
    assert "ADV, DET, NOUN, VERB" in text
    assert "note         1 test sentence(s) also occur" in text
    (first, _) = json.loads(run("show", f"conllu:{tmp_path}#upos,head_direction", "--json"))
    assert first["chance"] == pytest.approx(1 / 3, abs=1e-3)  # most frequent class in training, NOUN or VERB
    assert first["classes"] == ["ADV", "DET", "NOUN", "VERB"]


def test_rows_mark_the_word_and_show_both_texts_of_a_pair(tmp_path):
    folder(tmp_path, conllu(A, B), conllu(A), conllu(B))
    text = run("rows", f"conllu:{tmp_path}#upos", "-n", "2", "--split", "test")
    assert [line.split(maxsplit=3)[2:] for line in text.splitlines()[1:]] == [
        ["DET", "[the] cat sleeps"],
        ["NOUN", "the [cat] sleeps"],
    ]
    (tmp_path / "p.csv").write_text("a,b,y,s\nx,y,1,train\nu,v,0,train\nw,z,0,dev\nq,r,1,test\n")
    (row,) = json.loads(run("rows", f"table:{tmp_path}/p.csv,text=a,text2=b,label=y,split=s", "-n", "1", "--json"))
    assert row == {"task": "p", "item": "row:2", "label": "1", "text": "x  ||  y"}
    with pytest.raises(UsageError, match=r"'toy.tense' has no split 'seen'; it has train, dev, test"):
        run("rows", "toy.tense", "--split", "seen")


def test_rows_mark_both_spans_and_name_several_labels(tmp_path):
    nested = edge("Ian ate ice cream", ((1, 4), (2, 4), ["food", "cold"]), ((1, 2), (0, 1), []))
    json_lines(tmp_path / "e.jsonl", *[nested] * 2, *(edge(f"x y{i}", ((0, 1), (1, 2), ["food"])) for i in range(20)))
    found = json.loads(run("rows", f"edges:{tmp_path}/e.jsonl", "-n", "2", "--json"))
    assert [(row["item"], row["label"], row["text"]) for row in found] == [
        ("line:1:2|1", "", "{Ian} [ate] ice cream"),
        ("line:1:2-4|3-4", "cold; food", "Ian [ate {ice cream}]"),
    ]
    (described,) = json.loads(run("show", f"edges:{tmp_path}/e.jsonl", "--json"))
    assert (described["unit"], described["kind"]) == ("span-pair", "multilabel")
    assert "chance" not in described  # of several labels there is no commonest one
    (tmp_path / "p.csv").write_text("a,b,y,s\nx,y,1,train\nu,v,0,train\nw,z,0,dev\nq,r,1,test\n")
    reference = f"table:{tmp_path}/p.csv,text=a,text2=b,label=y,split=s,pairs=features"
    (row,) = json.loads(run("rows", reference, "-n", "1", "--json"))
    assert row["text"] == "x  ||  y"


def test_validate_reports_ill_formed_tags(tmp_path):
    for split in ("train", "dev", "test"):
        (tmp_path / f"{split}.iob2").write_text("Ann\tB-PER\nin\tO\nRome\tI-LOC\n")
    text = run("validate", f"iob:{tmp_path}#spans")
    assert "    note: 3 ill-formed tag(s): I- without a chunk of its type before it, the first at train.iob2:3" in text


def test_validate_reports_sizes_and_fails_with_the_readers_sentence(tmp_path):
    folder(tmp_path, conllu(A, B, A), conllu(A), conllu(A))
    text = run("validate", f"toy,conllu:{tmp_path}#upos")
    assert text.splitlines()[0] == "ok  toy.tense: 5 train, 2 dev, 2 test, 2 classes, 9 texts"
    assert "    note: " in text
    (tmp_path / "xx_tiny-ud-dev.conllu").write_text("1\tx\n")
    with pytest.raises(DataError, match=r"xx_tiny-ud-dev\.conllu:1: 2 column\(s\)"):
        run("validate", f"conllu:{tmp_path}#upos")
    with pytest.raises(TaskError, match="Did you mean 'toy'"):
        run("validate", "tyo")


def test_json_before_a_command_is_refused_rather_than_ignored():
    with pytest.raises(UsageError, match="write it after the command"):
        run("--json", "show", "toy.tense")


def test_help_has_examples_for_every_command():
    assert "spafit tasks show core.tense" in run("--help")
    for command in ("show", "rows", "validate"):
        assert "Example" in run(command, "--help")


@pytest.mark.skipif(not (ROOT / "spafit").is_dir(), reason="runs in a checkout")
def test_importing_the_command_loads_nothing_heavy():
    code = (
        "import sys, analysis.cli.tasks; print([m for m in ('pandas', 'numpy', 'torch', 'yaml') if m in sys.modules])"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
    assert time.monotonic() - start < 20
