"""The command line: what it prints, its exit statuses, and one clear sentence for bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from analysis.cli.main import app, probe_app, run_guarded
from tests.paths import ROOT

WORDS = ("river", "stone", "garden", "window", "letter", "market", "doctor", "yellow")


def write_table(folder: Path, *, name: str = "colours.tsv", n: int = 160) -> Path:
    """A table whose label is whether the sentence names a colour."""
    rows = ["text\tlabel\tsplit"]
    for i in range(n):
        colour = i % 2
        split = "train" if i < 0.5 * n else "dev" if i < 0.7 * n else "test"
        adjective = ("red", "green")[i % 4 // 2] if colour else ("old", "tall")[i % 4 // 2]
        rows.append(f"the {adjective} {WORDS[i % 7]} near the {WORDS[i % 5]} {i}\t{'yes' if colour else 'no'}\t{split}")
    path = folder / name
    path.write_text("\n".join(rows) + "\n")
    return path


def reference(path: Path) -> str:
    return f"table:{path},text=text,label=label,split=split"


QUICK = ("--seeds", "1", "--n-boot", "100", "--quiet")


def invoke(*arguments: object, code: int | None = 0):
    result = CliRunner().invoke(probe_app, [str(a) for a in arguments])
    if code is not None:
        assert result.exit_code == code, (result.output, result.exception)
    return result


def run_process(*arguments: object, cwd: Path | None = None, **more) -> subprocess.CompletedProcess:
    code = "import sys; sys.argv[0] = 'spafit-probe'; from analysis.cli.main import probe_entry; probe_entry()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True, text=True, check=False, cwd=cwd, env=environment, **more,
    )  # fmt: skip


def test_a_run_ends_with_table_verdict_strata_and_paths(small_bert, tmp_path, cache):
    out = tmp_path / "run"
    result = invoke("--model", small_bert, "--tasks", reference(write_table(tmp_path)), "--out", out, *QUICK)
    for piece in ("| colours", "report.html", "strata.yaml", "verdict.json", "scores.csv", "run.json"):
        assert piece in result.stdout, piece
    # One task gives no verdict: one sentence each, the rest is in the files.
    lines = result.stdout.splitlines()
    assert "Verdict: inconclusive. Too few tasks per level for a verdict; see the scores." in lines
    assert sum(line.startswith("Strata:  No boundaries from these tasks") for line in lines) == 1
    assert "freeze" not in result.stdout
    assert "nothing: too few tasks" in (out / "report.html").read_text()
    for name in ("report.html", "report.md", "verdict.json", "strata.yaml", "scores.csv", "figures/layers.png"):
        assert (out / name).stat().st_size > 0
    plan = yaml.safe_load((out / "strata.yaml").read_text())
    assert plan["provenance"]["tested"] is False
    assert plan["model"]["blocks"] == {"encoder": 3}


def test_enough_tasks_give_verdict_and_strata_on_the_terminal(capsys):
    from analysis.cli.probe import _print
    from analysis.interpretation import Interpretation
    from analysis.localization import localization_test
    from analysis.run_suggestion import StackSuggestions
    from analysis.suggestion import suggest_strata
    from tests import report_fixtures, test_suggestion

    curves = test_suggestion.saturating(12, basic=0.05, other=0.15)
    results = report_fixtures.results()
    test, strata = localization_test(curves), suggest_strata(curves, num_blocks=12)
    both = StackSuggestions({"encoder": strata}, strata.config)
    interpretation = Interpretation(results, {"encoder": test}, both, test.to_dict(), (Path("report.html"),))
    assert f"verdict='{test.verdict}', boundaries=(2, 6))" in repr(interpretation)
    assert repr(results) == f"ProbeResults(not saved, {len(results.tasks)} task(s), status='unknown')"
    assert len(repr(interpretation)) < 200
    _print(results, interpretation)
    shown = capsys.readouterr().out
    assert test.sentence in shown
    assert strata.explain() in shown
    assert "freeze" in shown


def test_json_is_one_document_for_programs(small_bert, tmp_path, cache):
    arguments = ("--model", small_bert, "-t", reference(write_table(tmp_path)), "--out", tmp_path / "run", *QUICK)
    content = json.loads(invoke(*arguments, "--json").stdout)
    assert content["verdict"]["verdict"] == "inconclusive"
    assert {"accuracy", "bits"} <= {row["metric"] for row in content["scores"]}
    assert content["strata"]["strata"][0]["method"] == "freeze"


def test_dry_run_says_what_it_would_do_and_leaves_nothing(small_bert, tmp_path, cache):
    out = tmp_path / "run"
    table = reference(write_table(tmp_path))
    shown = invoke("--model", small_bert, "--tasks", table, "--out", out, "--dry-run").stdout
    for piece in ("3 blocks × 16", "texts", "estimate", "MB of pooled states"):
        assert piece in shown, piece
    assert not out.exists()


def test_printed_options_run_again_and_the_shell_wins(tmp_path):
    shown = invoke("--print-config", "--tasks", "core.tense,core.voice", "--seeds", "2", "--layers", "0-3").stdout
    options = yaml.safe_load(shown)
    assert options["tasks"] == ["core.tense", "core.voice"]
    assert options["seeds"] == [0, 1]
    (tmp_path / "c.yaml").write_text(shown)
    again = invoke("--config", tmp_path / "c.yaml", "--print-config", "--layers", "2").stdout
    assert yaml.safe_load(again) == {**options, "layers": "2"}


def test_several_models_get_a_folder_each_and_one_figure(small_bert, tmp_path, cache):
    import shutil

    other = tmp_path / "other-bert"
    shutil.copytree(small_bert, other)
    table = reference(write_table(tmp_path))
    result = invoke("-m", small_bert, "-m", other, "-t", table, "--out", tmp_path / "runs", *QUICK)
    assert "relative_depth.png" in result.stdout
    assert (tmp_path / "runs" / "small-bert" / "run.json").exists()
    assert (tmp_path / "runs" / "other-bert" / "run.json").exists()


def test_a_broken_reference_among_good_ones_is_listed_and_exits_with_3(small_bert, tmp_path, cache):
    good = reference(write_table(tmp_path))
    bad = write_table(tmp_path, name="bad.tsv")
    bad.write_text(bad.read_text().replace("\tno\t", "\tyes\t"))
    result = invoke("-m", small_bert, "-t", good, "-t", reference(bad), "--out", tmp_path / "run", *QUICK, code=3)
    assert "one class only" in result.stdout
    assert "| colours" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence", "status"),
    [
        (("--tasks", "cor.tense"), "Did you mean 'core", 2),
        (("--tasks", "core.tens"), "Did you mean 'core.tense'", 2),
        (("--pooling", "meen"), "Did you mean 'mean'", 2),
        (("--layers", "six"), "--layers 'six'", 2),
        (("--layers", "0-9", "--tasks", "core.tense"), "hidden 0 to 6", 2),
        (("--shard", "4/2"), "i/n with 0 <= i < n", 2),
        (("--l2", "big"), "must be numbers", 2),
        (("--l2", "nan"), "positive, finite penalties", 2),
        (("--device", "gpu9", "--tasks", "core.tense"), "'auto', 'cpu'", 2),
        (("--config", "no-such.yaml"), "cannot be read", 2),
        (("--tasks", "table:t.csv,text=txt,label=y"), "Did you mean 'text'", 2),
        (("--model", "./no-such-folder", "--tasks", "core.tense"), "no-such-folder", 1),
    ],
)
def test_bad_input_is_one_sentence_and_a_status(arguments, sentence, status, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["spafit-probe", *arguments])
    (tmp_path / "t.csv").write_text("text,y\na,0\nb,1\n")
    with pytest.raises(SystemExit) as caught:
        run_guarded(probe_app)
    assert caught.value.code == status
    printed = capsys.readouterr().err
    assert printed.startswith("Error: ")
    assert sentence in printed
    assert len(printed.strip().splitlines()) == 1


def test_debug_shows_the_traceback_wherever_it_stands(tmp_path, monkeypatch):
    from spafit.errors import SpafitError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["spafit-probe", "--debug", "--layers", "six"])
    with pytest.raises(SpafitError, match="six"):
        run_guarded(probe_app)


def test_help_shows_every_option_and_examples():
    shown = invoke("--help").stdout
    for option in ("--model", "--tasks", "--layers", "--dry-run", "--shard", "--json", "--overwrite"):
        assert option in shown
    assert "runs/<model>" in shown
    assert "spafit-probe --model bert-large-cased" in " ".join(shown.split())
    umbrella = CliRunner().invoke(app, ["--help"]).stdout
    for command in ("probe", "tasks", "cache", "report", "cite"):
        assert command in umbrella


def test_task_names_are_completed():
    from analysis.cli.probe import _complete_tasks

    assert "core.tense" in _complete_tasks("core.te")


def test_report_and_citations_come_from_the_folder(small_bert, tmp_path, cache):
    out = tmp_path / "run"
    invoke("--model", small_bert, "-t", reference(write_table(tmp_path)), "--out", out, *QUICK)
    (out / "report.html").unlink()
    assert "report.html" in CliRunner().invoke(app, ["report", str(out)]).stdout
    assert (out / "report.html").exists()
    assert "2405.00201" in CliRunner().invoke(app, ["cite", str(out)]).stdout


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_finished_and_exits_with_130(tmp_path, cache):
    code = "import sys; sys.argv[0] = 'spafit-probe'; from analysis.cli.main import probe_entry; probe_entry()"
    out = tmp_path / "run"
    arguments = ("--limit", "300", "--tasks", "core.tense,core.voice,core.agent,core.denied", "--out", out)
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 240
    while not list(out.glob("parts/*.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "What was finished is kept" in errors
    assert json.loads((out / "run.json").read_text())["status"] == "interrupted"
    assert (out / "scores.csv").exists()
    assert run_process(*arguments, "--quiet", cwd=ROOT).returncode == 0
    assert json.loads((out / "run.json").read_text())["status"] == "complete"
