"""A run never replaces the finished results of another one in its folder unless it is told to."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import BertModel

import probing.running
from probing import ProbeResults, probe_layers
from probing.config import ProbeConfig
from probing.planning import plan_probing
from spafit.errors import OutputError
from tests.test_cli_probe import QUICK, invoke, reference, write_table
from tests.test_running import contents, quick, sentence_task, word_task


@pytest.fixture
def no_fitting(monkeypatch):
    def never(*_, **__):
        raise AssertionError("a task was fitted")

    def forbid():
        monkeypatch.setattr(probing.running, "fit_task", never)

    return forbid


def test_other_options_are_refused_before_the_model_loads_and_change_nothing(small_bert, tmp_path, cache, monkeypatch):
    out = tmp_path / "run"
    quick(small_bert, out)
    before = contents(out)

    def never(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("spafit.models.load_model", never)
    with pytest.raises(OutputError, match=r"--max-train \(default there, 50 here\).*another --out.*--overwrite always"):
        quick(small_bert, out, max_train=50)
    with pytest.raises(OutputError, match=r"--tasks \(without made\.even, finished there\)"):
        quick(small_bert, out, tasks=[word_task()])
    with pytest.raises(OutputError, match=r"--seeds \(0,1 there, 0 here\).*--limit \(default there, 20 here\)"):
        quick(small_bert, out, seeds=(0,), limit=20)
    with pytest.raises(OutputError, match="--model"):
        quick(small_bert.parent / "other", out)
    with pytest.raises(OutputError, match=r"the level of made\.plural"):
        quick(small_bert, out, tasks=[word_task().regroup("semantics"), sentence_task()])
    with pytest.raises(OutputError, match=r"the data of made\.plural"):
        quick(small_bert, out, tasks=[replace(word_task(), items=word_task().items[:-1]), sentence_task()])
    assert contents(out) == before


def test_the_default_folder_is_checked_before_the_model_loads_too(small_bert, tmp_path, cache, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "damaged").mkdir(parents=True)
    (tmp_path / "runs" / "damaged" / "run.json").write_text("{")
    quick(small_bert, None)
    assert quick(small_bert, None).folder.is_dir()
    monkeypatch.setattr("spafit.models.load_model", None)
    with pytest.raises(OutputError, match=r"--n-boot \(100 there, 120 here\)"):
        quick(small_bert, None, n_boot=120)


def test_more_tasks_are_added_and_where_it_runs_is_free(small_bert, tmp_path, cache, no_fitting):
    out = tmp_path / "run"
    quick(small_bert, out, tasks=[word_task()])
    written = (out / "parts" / "made.plural.json").stat().st_mtime_ns
    assert quick(small_bert, out).tasks == ("made.plural", "made.even")
    assert (out / "parts" / "made.plural.json").stat().st_mtime_ns == written
    no_fitting()
    again = quick(small_bert, out, device="cpu", offline=True, cache_dir=tmp_path / "elsewhere")
    assert again.tasks == ("made.plural", "made.even")


def test_an_unfinished_run_goes_on_and_one_without_finished_tasks_holds_nothing_to_lose(
    small_bert, tmp_path, cache, monkeypatch
):
    out, real = tmp_path / "run", probing.running.fit_task

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(probing.running, "fit_task", stop)
    with pytest.raises(KeyboardInterrupt):
        quick(small_bert, out)
    monkeypatch.setattr(probing.running, "fit_task", real)
    assert quick(small_bert, out, tasks=[sentence_task()]).run["status"] == "complete"


def test_other_weights_under_the_same_name_are_refused(small_bert, tmp_path, cache):
    from transformers import AutoTokenizer

    model, tokenizer = BertModel.from_pretrained(small_bert), AutoTokenizer.from_pretrained(small_bert)
    options = {"out": tmp_path / "run", "seeds": (0,), "n_boot": 100, "quiet": True}
    probe_layers((model, tokenizer), [sentence_task()], **options)
    model.embeddings.word_embeddings.weight.data += 1.0
    with pytest.raises(OutputError, match="the weights or tokenizer of --model"):
        probe_layers((model, tokenizer), [sentence_task()], **options)


def test_always_removes_the_old_runs_files_and_no_others(small_bert, tmp_path, cache):
    from analysis import interpret

    out = tmp_path / "run"
    interpret(quick(small_bert, out))
    (out / "figures" / "mine.png").write_text("")
    (out / "notes.txt").write_text("")
    results = quick(small_bert, out, tasks=[sentence_task()], overwrite="always")
    assert results.tasks == ("made.even",)
    names = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert {"notes.txt", "figures/mine.png"} <= names
    assert not [n for n in names if "made.plural" in n or n in ("report.html", "verdict.json", "figures/layers.png")]


def test_a_run_json_that_tells_no_options_is_refused(tmp_path):
    (tmp_path / "run.json").write_text('{"schema_version": 1}')
    config = ProbeConfig(model="no-such-model", out=str(tmp_path))
    with pytest.raises(OutputError, match="it was not made by spafit-probe"):
        plan_probing(config, given=[word_task()], only_given=True)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(OutputError, match=r"run\.json cannot be read"):
        plan_probing(replace(config, limit=20), given=[word_task()], only_given=True)


def test_the_command_says_what_differs_in_one_sentence(small_bert, tmp_path, cache):
    out, table = tmp_path / "run", reference(write_table(tmp_path))
    invoke("--model", small_bert, "--tasks", table, "--out", out, *QUICK)
    scores = ProbeResults.load(out).scores
    refused = invoke("--model", small_bert, "--tasks", table, "--out", out, *QUICK, "--limit", 40, code=1)
    assert "--limit (default there, 40 here)" in str(refused.exception)
    assert ProbeResults.load(out).scores.equals(scores)
