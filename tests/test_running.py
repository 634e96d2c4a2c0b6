"""A run is resumable, repeatable to the byte, and loses nothing when a task, the process or the user stops it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import probing.encoding
import probing.running
from probing import ProbeResults, probe_layers
from probing.tasks.base import Corpus, Task, Text
from spafit.errors import OutputError, TaskError, UsageError
from spafit.io import read_json

NOUNS = ("dog", "cat", "nurse", "baker", "river", "stone", "house", "garden")
TABLES = ("scores.parquet", "scores.csv", "summaries.parquet", "summaries.csv")


def word_task(name: str = "made.plural", n: int = 240) -> Task:
    """Is the noun plural? Many sentences, few words, so that it runs in a moment."""
    rng = np.random.default_rng(0)
    texts, rows = [], []
    for i in range(n):
        noun, plural = NOUNS[rng.integers(len(NOUNS))], int(rng.integers(2))
        words = ["The", noun + "s" * plural, "near", "the", NOUNS[rng.integers(len(NOUNS))], str(i)]
        texts.append(Text.from_words(words))
        split = "train" if i < 0.6 * n else "dev" if i < 0.75 * n else "test"
        rows.append((f"i{i}", i, 1, plural, split, f"s{i}", words[1]))
    items = pd.DataFrame(rows, columns=["item", "text", "span", "label", "split", "group", "control"])
    return Task(name, "syntax", "word", ("singular", "plural"), Corpus("made", tuple(texts)), items)


def sentence_task(name: str = "made.even") -> Task:
    task = word_task()
    items = task.items.assign(span=-1, control="", label=np.arange(len(task.items)) % 2)
    return replace(task, name=name, unit="sentence", labels=("even", "odd"), level="surface", items=items)


def quick(model: Path, out: Path, tasks=None, **more) -> ProbeResults:
    options = {"seeds": (0, 1), "n_boot": 100, "quiet": True, **more}
    return probe_layers(str(model), tasks or [word_task(), sentence_task()], out=out, **options)


def contents(folder: Path) -> dict[str, bytes]:
    written = [p for d in ("items", "probes") for p in sorted((folder / d).glob("[!.]*"))]  # a kill may leave .parts
    files = [folder / t for t in TABLES] + written
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def test_a_run_writes_its_folder_and_the_results_are_a_view_on_it(small_bert, tmp_path, cache):
    results = quick(small_bert, tmp_path / "run")
    assert results.run["status"] == "complete"
    again = ProbeResults.load(tmp_path / "run")
    pd.testing.assert_frame_equal(again.scores, results.scores)
    assert set(results.scores["control"]) == {
        "none", "word-type", "random-encoder", "difference:word-type", "difference:random-encoder",
    }  # fmt: skip
    assert set(results.scores["hidden"]) == {0, 1, 2, 3}
    assert (results.scores["block"] == results.scores["hidden"] - 1).all()
    assert {"encode", "fit probes", "total"} <= set(results.run["seconds"])
    assert "plural" in results.to_markdown()


def test_the_same_command_again_computes_nothing_and_gives_the_same_bytes(small_bert, tmp_path, cache, monkeypatch):
    quick(small_bert, tmp_path / "run")
    before = contents(tmp_path / "run")

    def never(*_, **__):
        raise AssertionError("finished work was done again")

    monkeypatch.setattr(probing.running, "fit_task", never)
    monkeypatch.setattr(probing.encoding, "encoders", never)
    quick(small_bert, tmp_path / "run")
    assert contents(tmp_path / "run") == before


def test_cold_warm_and_elsewhere_give_the_same_bytes(small_bert, tmp_path, cache, monkeypatch):
    quick(small_bert, tmp_path / "cold")
    quick(small_bert, tmp_path / "warm")
    monkeypatch.setenv("SPAFIT_CACHE", str(tmp_path / "other"))
    quick(small_bert, tmp_path / "again")
    assert contents(tmp_path / "cold") == contents(tmp_path / "warm") == contents(tmp_path / "again")


def test_changed_settings_are_not_taken_for_finished_work(small_bert, tmp_path, cache):
    first = quick(small_bert, tmp_path / "run").scores
    second = quick(small_bert, tmp_path / "run", max_train=50, overwrite="always").scores
    assert (first["n_train"] > 100).all()
    assert (second["n_train"] == 50).all()


def number_task() -> Task:
    task = word_task("made.number")
    values = np.random.default_rng(1).standard_normal(len(task.items))
    return replace(task, labels=(), kind="number", items=task.items.assign(label=task.items["label"] + values))


def test_families_of_one_run_share_its_files_and_score_their_own_states_again(small_bert, tmp_path, cache):
    from analysis.interpretation import interpret
    from probing.config import ProbeConfig
    from probing.extraction import extract
    from probing.item_states import item_states, rows_of_items
    from probing.planning import extraction_options, plan_probing
    from probing.transfer import stored_probes

    tasks, names = [word_task(), number_task()], ("linear", "mlp:8")
    results = quick(small_bert, tmp_path / "run", tasks=tasks, probe=names)
    assert list(dict.fromkeys(results.scores["probe"])) == list(names)
    assert results.run["tasks"]["made.number"]["kind"] == "number"
    assert interpret(results).paths[0].name == "report.html"
    page = (tmp_path / "run" / "report.md").read_text()
    assert "best score" in page
    assert "mlp:8" in page
    config = ProbeConfig.from_dict({k: v for k, v in results.run["config"].items() if v is not None}, where="run")
    plan = plan_probing(config, given=tasks, only_given=True)
    assert plan.done == {"made.plural", "made.number"}
    corpus = tasks[0].corpus.name
    store = extract(plan.loaded, plan.needed[corpus].texts, **extraction_options(config, plan.tasks, corpus))
    for task in tasks:
        rows, usable = rows_of_items(plan, task, store)
        test = np.flatnonzero((task.items["split"] == "test").to_numpy())
        items = results.items(task.name)
        for name in names:
            probes = stored_probes(
                plan.out, task, plan.settings, usable=usable, site="block", pooling="mean", probe=name
            )
            assert {c for c, _, _ in probes} == {"none", "word-type"}
            for (control, seed, hidden), probe in probes.items():
                own = items[(items["probe"] == name) & (items["control"] == control) & (items["hidden"] == hidden)]
                own = own[own["seed"] == seed]
                right, bits = probe.scores(item_states(task, store, rows[test], pooling="mean", hidden=hidden), test)
                np.testing.assert_allclose(bits, own["bits"], atol=1e-5)
                if task.kind == "number":
                    assert np.isnan(right).all()
                else:
                    np.testing.assert_array_equal(right == 1, (own["label"] == own["prediction"]).to_numpy())


def test_probes_of_files_that_name_no_family_are_linear(small_bert, tmp_path, cache):
    from safetensors.numpy import load_file, save_file

    from probing.fitting import ProbeSettings
    from probing.transfer import stored_probes
    from spafit.errors import DataError

    task = word_task()
    quick(small_bert, tmp_path / "run", tasks=[task])
    options = {"usable": np.ones(len(task.items), dtype=bool), "site": "block", "pooling": "mean"}
    settings, file = ProbeSettings(seeds=(0, 1)), tmp_path / "run" / "probes" / "made.plural.safetensors"
    now = stored_probes(tmp_path / "run", task, settings, **options)
    save_file({k.replace("/linear/", "/"): v for k, v in load_file(file).items()}, file)
    earlier = stored_probes(tmp_path / "run", task, settings, **options)
    assert set(now) == set(earlier)
    for key, probe in now.items():
        for name, value in probe.fit.parameters.items():
            np.testing.assert_array_equal(earlier[key].fit.parameters[name], value)
    with pytest.raises(DataError, match="no mlp:8 probes"):
        stored_probes(tmp_path / "run", task, settings, **options, probe="mlp:8")


def test_a_rank_above_the_classes_is_refused_before_the_model_is_loaded(tmp_path, monkeypatch):
    import spafit.models

    def never(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(spafit.models, "load_model", never)
    with pytest.raises(UsageError, match=r"low-rank:3.*'made\.plural' \(2\)"):
        probe_layers("no-such-model", [word_task()], probe="low-rank:3", out=tmp_path / "run")


def test_a_task_gives_the_same_numbers_alone_and_among_others(small_bert, tmp_path, cache):
    together = quick(small_bert, tmp_path / "both").scores
    alone = quick(small_bert, tmp_path / "one", tasks=[word_task()]).scores
    part = together[together["task"] == "made.plural"].reset_index(drop=True)
    pd.testing.assert_frame_equal(part, alone)


def test_one_failing_task_is_listed_and_the_rest_is_saved(small_bert, tmp_path, cache, monkeypatch):
    real = probing.running.fit_task

    def sometimes(task, *args, **kwargs):
        if task.name == "made.plural":
            raise ValueError("broken on purpose")
        return real(task, *args, **kwargs)

    monkeypatch.setattr(probing.running, "fit_task", sometimes)
    results = quick(small_bert, tmp_path / "run")
    assert results.run["status"] == "partial"
    assert results.run["tasks"]["made.plural"]["error"] == "broken on purpose"
    assert "ValueError" in results.run["tasks"]["made.plural"]["traceback"]
    assert results.tasks == ("made.even",)
    monkeypatch.undo()
    monkeypatch.setenv("SPAFIT_CACHE", str(cache))
    assert quick(small_bert, tmp_path / "run").run["status"] == "complete"


def test_when_every_task_fails_the_reasons_are_the_error(small_bert, tmp_path, cache, monkeypatch):
    def always(*_, **__):
        raise ValueError("broken on purpose")

    monkeypatch.setattr(probing.running, "fit_task", always)
    with pytest.raises(TaskError, match=r"made\.plural: broken on purpose"):
        quick(small_bert, tmp_path / "run")


def test_finished_tasks_survive_an_interrupt(small_bert, tmp_path, cache, monkeypatch):
    real = probing.running.fit_task

    def stop_at_second(task, *args, **kwargs):
        if task.name == "made.even":
            raise KeyboardInterrupt
        return real(task, *args, **kwargs)

    monkeypatch.setattr(probing.running, "fit_task", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        quick(small_bert, tmp_path / "run")
    kept = ProbeResults.load(tmp_path / "run")
    assert kept.run["status"] == "interrupted"
    assert kept.tasks == ("made.plural",)


def test_a_damaged_part_is_computed_again(small_bert, tmp_path, cache):
    quick(small_bert, tmp_path / "run")
    before = contents(tmp_path / "run")
    for name in ("items/made.plural.parquet", "probes/made.even.safetensors"):
        path = tmp_path / "run" / name
        path.write_bytes(path.read_bytes()[:-7])
    quick(small_bert, tmp_path / "run")
    assert contents(tmp_path / "run") == before


def test_an_output_folder_that_cannot_be_written_is_found_before_the_model_loads(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        probe_layers("no-such-model", [word_task()], out=tmp_path / "file" / "run")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "run.json").write_text("{}")
    with pytest.raises(OutputError, match="holds a run already"):
        probe_layers("no-such-model", [word_task()], out=tmp_path / "old", overwrite="never")
    with pytest.raises(UsageError, match="Did you mean 'core"):
        probe_layers("no-such-model", ["cor"], out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_words_beyond_the_window_are_dropped_and_said(small_bert, tmp_path, cache):
    task = word_task()
    long = [Text.from_words([*t.words, *(["word"] * 70), "dogs"]) for t in task.corpus.texts]
    items = task.items.assign(span=[1 if i % 3 else len(long[0].spans) - 1 for i in range(len(task.items))])
    task = replace(task, corpus=Corpus("long", tuple(long)), items=items)
    results = quick(small_bert, tmp_path / "run", tasks=[task])
    test = task.items["split"] == "test"
    assert results.scores["n"].unique().tolist() == [int((test & (task.items["span"] == 1)).sum())]
    assert any("window" in note for note in results.run["tasks"]["made.plural"]["notes"])
    assert results.run["truncated"] == results.run["texts"] > 200


SCRIPT = """
import sys
from tests.test_running import quick
quick(sys.argv[1], __import__("pathlib").Path(sys.argv[2]))
"""


def start(model: Path, out: Path) -> subprocess.Popen:
    root = Path(__file__).resolve().parents[1]
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(model), str(out)], cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.mark.slow
def test_killed_at_random_points_and_run_again_gives_the_same_bytes(small_bert, tmp_path, cache, monkeypatch):
    begun = time.monotonic()
    assert start(small_bert, tmp_path / "whole").wait() == 0
    whole = time.monotonic() - begun
    reference = contents(tmp_path / "whole")
    rng = np.random.default_rng(0)
    monkeypatch.setenv("SPAFIT_CACHE", str(tmp_path / "fresh"))
    for _ in range(8):
        process = start(small_bert, tmp_path / "killed")
        time.sleep(rng.uniform(0.4, 1.0) * whole)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start(small_bert, tmp_path / "killed").wait() == 0
    assert contents(tmp_path / "killed") == reference


@pytest.mark.slow
def test_two_runs_at_once_on_one_cache_are_both_right(small_bert, tmp_path, cache, monkeypatch):
    pair = [start(small_bert, tmp_path / name) for name in ("a", "b")]
    assert [p.wait() for p in pair] == [0, 0]
    monkeypatch.setenv("SPAFIT_CACHE", str(tmp_path / "fresh"))
    assert start(small_bert, tmp_path / "alone").wait() == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "alone")


def test_shards_fill_the_cache_that_a_later_run_uses(small_bert, tmp_path, cache):
    from probing.config import ProbeConfig
    from probing.encoding import extract_shard
    from probing.planning import plan_probing
    from probing.running import run_plan

    given = [word_task(), sentence_task()]
    config = ProbeConfig(model=str(small_bert), out=str(tmp_path / "run"), seeds=(0,), n_boot=100)
    plan = plan_probing(config, given=given, only_given=True)
    for i in range(2):
        extract_shard(plan, (i, 2), quiet=True)
    assert not (tmp_path / "run").exists()
    sharded = run_plan(plan, quiet=True).scores
    single = quick(small_bert, tmp_path / "single", seeds=(0,), cache_dir=tmp_path / "other").scores
    pd.testing.assert_frame_equal(sharded, single)
    assert read_json(tmp_path / "run" / "run.json")["status"] == "complete"


def test_tasks_that_would_be_mixed_up_are_refused(small_bert, tmp_path):
    other = replace(sentence_task(), corpus=Corpus("made", tuple(Text("something else") for _ in range(240))))
    with pytest.raises(TaskError, match="different texts"):
        quick(small_bert, tmp_path / "run", tasks=[word_task(), other])
    with pytest.raises(UsageError, match="names one twice"):
        quick(small_bert, tmp_path / "run", tasks=[word_task(), replace(sentence_task(), name="made.plural")])


def test_an_unfinished_run_leaves_no_other_runs_tables(small_bert, tmp_path, cache, monkeypatch):
    quick(small_bert, tmp_path / "run")

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(probing.running, "fit_task", stop)
    with pytest.raises(KeyboardInterrupt):
        quick(small_bert, tmp_path / "run", max_train=40, overwrite="always")
    assert not (tmp_path / "run" / "scores.parquet").exists()


def test_a_number_of_seeds_means_that_many(small_bert, tmp_path, cache):
    assert quick(small_bert, tmp_path / "run", tasks=[sentence_task()], seeds=1).run["seeds"] == [0]


def test_probing_some_layers_writes_scaled_strata_and_the_models_depth(small_bert, tmp_path, cache):
    from analysis import default_hypothesis, interpret, localize, read_evidence

    results = quick(small_bert, tmp_path / "run", layers="1-2")
    interpretation = interpret(results)
    assert interpretation.verdict["num_blocks"] == 3
    claim = default_hypothesis()
    own = localize(read_evidence(tmp_path / "run", claim), claim).runs[0].test  # spafit localize on the same folder
    assert own.to_dict() == interpretation.verdict == read_json(tmp_path / "run" / "verdict.json")
    assert interpretation.suggestion.criterion == "none"
    assert set(results.scores["hidden"]) == {1, 2}
