"""Tasks of trees: read from a treebank, drawn in whole sentences, fitted at every layer, scored with controls."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from probing import ProbeResults, probe_layers
from probing.fitting import ProbeSettings
from probing.planning import _limited
from probing.probes.families import parse_probe
from probing.tasks.base import Corpus, Task, Text
from probing.tasks.conllu import treebank_tasks
from probing.tasks.treebank import read_treebank
from probing.tree_fitting import fit_trees, order_words, tree_curve, tree_item_table, tree_score_table
from probing.tree_scores import METRICS, linear_chain, structural_arrays, tree_table
from probing.trees import Tree, item_trees
from spafit.errors import DataError, SpafitError, UsageError
from tests.structural_fixtures import planted_tree_states, random_trees
from tests.test_conllu import A, B, conllu

WHERE = {"stack": "encoder", "site": "block", "pooling": "mean", "probe": "structural:12"}
SIZES = {"train": 150, "dev": 30, "test": 60}


def treebank(tmp_path: Path, *, train: int = 30, other: int = 10) -> Path:
    """A treebank whose sentences differ in their words and come in two shapes."""
    folder = tmp_path / "made"
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    nouns, verbs = ("dogs", "cats", "birds", "trains"), ("bark", "sleep", "run", "sing")
    for split, n in (("train", train), ("dev", other), ("test", other)):
        trees = []
        for i in range(n):
            noun, verb = rng.choice(nouns), rng.choice(verbs)
            full = f"{noun}/NOUN/2/nsubj {verb}/VERB/0/root loudly/ADV/2/advmod n{split}{i}/NOUN/3/obl ./PUNCT/2/punct"
            trees.append(full if i % 2 else f"the/DET/2/det {noun}/NOUN/3/nsubj {verb}/VERB/0/root n{split}{i}/X/3/obj")
        (folder / f"made-ud-{split}.conllu").write_text(conllu(*trees, ids=split))
    return folder


@pytest.fixture(scope="module")
def planted() -> tuple[Task, dict[str, list[Tree]], np.ndarray]:
    """A task of trees, and states: noise at hidden 0, the trees themselves at 1, half of both at 2."""
    trees = {split: random_trees(n, 12, seed=split, shortest=4) for split, n in SIZES.items()}
    rows, texts, found = [], [], []
    for split, own in trees.items():
        for i, tree in enumerate(own):
            name = f"{split}{i}"
            texts.append(Text.from_words([f"w{j}" for j in range(len(tree))]))
            rows += [
                (f"{name}:{j}", len(texts) - 1, j, int(head), split, name, "", False, "ab"[i % 2])
                for j, head in enumerate(tree.heads)
            ]
        exact = planted_tree_states(own, 12, seed=split)
        noise = np.random.default_rng(len(own)).standard_normal(exact.shape).astype(np.float32)
        found.append(np.stack([noise, exact, exact + noise]))
    columns = ["item", "text", "span", "label", "split", "group", "control", "punctuation", "genre"]
    task = Task(
        "made.tree",
        "syntax",
        "word",
        (),
        Corpus("made", tuple(texts)),
        pd.DataFrame(rows, columns=columns),
        kind="tree",
    )
    return task.validate(), trees, np.concatenate(found, axis=1)


def test_a_treebank_gives_its_trees(tmp_path: Path) -> None:
    (task,) = treebank_tasks(read_treebank(treebank(tmp_path)), ["tree"])
    assert task.kind == "tree"
    first = task.items[task.items["group"] == "train0"]
    assert first["label"].tolist() == [2, 3, 0, 3]
    second = task.items[task.items["group"] == "train1"]
    assert second["punctuation"].tolist() == [False] * 4 + [True]
    tree = item_trees(second)[0]
    assert tree.depths.tolist() == [1, 0, 1, 2, 1]
    assert tree.distances[0].tolist() == [0, 1, 2, 3, 2]


@pytest.mark.parametrize(
    ("heads", "said"),
    [("2 0 0", "2 roots"), ("2 1 2", "cycle"), ("2 0 99", "head 99")],
    ids=["roots", "cycle", "range"],
)
def test_a_malformed_tree_is_named(planted, heads: str, said: str) -> None:
    task = planted[0]
    items = task.items.copy()
    group = items["group"] == "dev3"
    labels = items.loc[group, "label"].to_numpy().copy()
    labels[:3] = [int(h) for h in heads.split()]
    labels[3:] = 1
    items.loc[group, "label"] = labels
    if heads != "2 0 99":
        items = items[~group | (items["span"] < 3)]
    with pytest.raises(DataError, match=rf"'dev3'.*{said}"):
        replace(task, items=items).validate()


def test_a_sentence_in_two_places_is_refused(planted) -> None:
    task = planted[0]
    items = task.items
    moved = pd.concat([items.iloc[1:], items.iloc[:1]], ignore_index=True)
    with pytest.raises(DataError, match="two places"):
        replace(task, items=moved).validate()


def test_draws_and_limits_keep_sentences_whole(planted) -> None:
    task = planted[0]
    for limit in (1, 50, 333):
        rows = task.training_draw(0, limit)
        drawn = task.items.iloc[rows]
        whole = task.items[task.items["group"].isin(drawn["group"].unique())]
        assert len(drawn) == len(whole)
        assert len(rows) <= limit or drawn["group"].nunique() == 1
    assert not np.array_equal(task.training_draw(0, 333), task.training_draw(1, 333))
    limited = _limited(task, 100)
    kept = limited.items.groupby("group", sort=False).size()
    assert (kept == task.items.groupby("group", sort=False).size().reindex(kept.index)).all()
    assert (limited.items.groupby("split").size() <= 100).all()


def test_planted_trees_are_found_where_they_are(planted) -> None:
    task, trees, states = planted
    settings = ProbeSettings(seeds=(0, 1), max_train=600, n_boot=200)
    noise = np.random.default_rng(9).standard_normal(states.shape).astype(np.float32)
    reader = {s: lambda h, rows: noise[h, rows] for s in (0, 1)}
    fit = fit_trees(
        task, settings, hidden=[0, 1, 2], states=lambda h, rows: states[h, rows], encoders={"random-encoder": reader},
        rank=12,
    )  # fmt: skip
    table = tree_score_table(task, fit, settings, where=WHERE)
    mean = table[table["seed"].isna()].set_index(["control", "metric", "hidden"]).sort_index()
    assert mean.loc[("none", "uuas", 1), "value"] > 0.9
    assert mean.loc[("none", "uuas", 0), "ci_high"] < 0.4  # negative control: no tree in these states
    assert mean.loc[("random-encoder", "uuas", 1), "ci_high"] < 0.4
    assert mean.loc[("difference:random-encoder", "uuas", 1), "ci_low"] > 0.5
    assert abs(mean.loc[("difference:random-encoder", "uuas", 0), "value"]) < 0.1
    chain = linear_chain(trees["test"]).means("uuas", np.ones((1, SIZES["test"])))[0, 0]
    assert mean.loc[("none", "uuas", 1), "chance"] == pytest.approx(chain)
    assert mean.loc[("none", "dspr", 1), "n"] == sum(5 <= len(t) <= 50 for t in trees["test"])
    assert (mean.loc[("none", "uuas")]["n_seeds"] == 2).all()
    assert set(table["metric"]) == set(METRICS)
    assert "hidden 1" in order_words(table, blocks=2)

    items = tree_item_table(task, fit, where=WHERE)
    assert len(items) == SIZES["test"] * 3 * 2 * 2
    assert set(items["genre"]) == {"a", "b"}
    for control in (None, "random-encoder"):
        curve = tree_curve(items, task="t", level="syntax", metric="uuas", adjusted_by=control, n_boot=200)
        wanted = mean.loc["none" if control is None else "difference:random-encoder", "uuas"]
        np.testing.assert_allclose(curve.values, wanted["value"])
        np.testing.assert_allclose(np.quantile(curve.replicates, 0.025, axis=0), wanted["ci_low"], atol=1e-12)


def test_one_seed_agrees_with_the_arrays(planted) -> None:
    task, trees, states = planted
    settings = ProbeSettings(seeds=(3,), max_train=10**6, n_boot=100)
    fit = fit_trees(task, settings, hidden=[0, 1], states=lambda h, rows: states[h, rows], encoders={}, rank=12)
    table = tree_score_table(task, fit, settings, where=WHERE)
    split = task.items["split"].to_numpy()
    parts = {name: states[:2, split == name] for name in SIZES}
    direct = structural_arrays(parts, trees, rank=12, seed=3, n_boot=100)
    resampled = tree_table(fit.controls["none"][3], linear_chain(trees["test"]), hidden=[0, 1], n_boot=100, seed=0)
    own = table[table["seed"].isna()].sort_values(["hidden", "metric"])
    direct, resampled = (t.sort_values(["hidden", "metric"]) for t in (direct, resampled))
    np.testing.assert_allclose(own["value"], direct["value"], atol=1e-12)
    for column in ("ci_low", "ci_high"):  # of the same resample
        np.testing.assert_allclose(own[column], resampled[column], atol=1e-12)


def test_a_sentence_with_a_word_without_state_is_left_out(planted) -> None:
    task, _, states = planted
    settings = ProbeSettings(seeds=(0,), max_train=300, n_boot=100)
    usable = np.ones(len(task.items), dtype=bool)
    usable[np.flatnonzero(task.items["split"] == "test")[1]] = False
    fit = fit_trees(
        task, settings, hidden=[1], states=lambda h, rows: states[h, rows], encoders={}, rank=4, usable=usable
    )
    assert len(fit.trees) == SIZES["test"] - 1


def test_a_run_of_trees_and_classes(tmp_path: Path, small_bert: Path, cache: Path) -> None:
    results = probe_layers(
        str(small_bert), [f"conllu:{treebank(tmp_path)}#upos,tree"], probe=["linear", "structural:8"], max_train=100,
        seeds=2, n_boot=100, controls=("word-type", "random-encoder", "tf-idf"), out=tmp_path / "run", quiet=True,
    )  # fmt: skip
    probes = results.scores.groupby("task")["probe"].unique().map(list)
    assert probes["made.tree"] == ["structural:8"]
    assert probes["made.upos"] == ["linear"]
    loaded = ProbeResults.load(tmp_path / "run")
    curve = loaded.curve("made.tree", metric="dspr", adjusted_by=None)
    rows = loaded.scores.query("task == 'made.tree' and metric == 'dspr' and control == 'none' and split == 'test'")
    np.testing.assert_allclose(curve.values, rows[rows["seed"].isna()]["value"])
    assert [c.task for c in loaded.curves()] == ["made.upos"]
    assert "uuas" in set(loaded.summaries.query("task == 'made.tree'")["metric"])
    notes = results.run["tasks"]["made.tree"]["notes"]
    assert any("tf-idf" in n for n in notes)
    assert any("(block, mean, structural:8)" in n and "Hewitt & Manning 2019" in n for n in notes)
    assert "UUAS" in loaded.to_markdown()
    with pytest.raises(UsageError, match="no metric 'bits'"):
        loaded.curve("made.tree")


def test_a_run_of_trees_alone_has_a_page(tmp_path: Path, small_bert: Path, cache: Path) -> None:
    from analysis.interpretation import interpret

    results = probe_layers(
        str(small_bert), [f"conllu:{treebank(tmp_path)}#tree"], probe=["structural:4"], max_train=100, seeds=1,
        n_boot=100, out=tmp_path / "run", quiet=True,
    )  # fmt: skip
    found = interpret(results)
    assert found.verdict["verdict"] == "inconclusive"
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "linear chain" in page
    assert "DSpr." in page


@pytest.mark.parametrize(
    ("tasks", "probe", "said"),
    [
        ("tree", "linear", "Add structural"),
        ("upos", "linear,structural", "conllu:PATH#tree"),
        ("upos", "structural", "Add linear"),
        ("tree", "structural:99", "above the states' width"),
    ],
)
def test_probes_and_tasks_that_do_not_suit(tmp_path, small_bert, cache, tasks: str, probe: str, said: str) -> None:
    with pytest.raises(SpafitError, match=said):
        probe_layers(
            str(small_bert), [f"conllu:{treebank(tmp_path)}#{tasks}"], probe=probe.split(","), seeds=1,
            out=tmp_path / "run", quiet=True,
        )  # fmt: skip


@pytest.mark.parametrize("text", ["structural:0", "structural:x", "structural:4,dropout=1", "structurel"])
def test_spellings_that_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="structural"):
        parse_probe(text)


def test_a_sentence_without_all_heads_is_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "gaps"
    folder.mkdir()
    for split in ("train", "dev", "test"):
        (folder / f"gaps-ud-{split}.conllu").write_text(conllu(A, B, "dogs/NOUN/_/_ bark/VERB/0/root", ids=split))
    (task,) = treebank_tasks(read_treebank(folder), ["tree"])
    assert task.items["group"].nunique() == 6
    assert any("3 sentence(s)" in n for n in task.notes)


def test_comparing_runs_leaves_trees_out_and_says_so(tmp_path: Path, small_bert: Path, cache: Path) -> None:
    from analysis.comparing import compare

    folders = []
    for name in ("one", "two"):
        folders.append(tmp_path / name)
        probe_layers(
            str(small_bert), [f"conllu:{treebank(tmp_path)}#upos,tree"], probe=["linear", "structural:4"], seeds=1,
            controls=["word-type", "random-encoder", "permuted-order", "tf-idf"], max_train=100, n_boot=100,
            out=folders[-1], quiet=True,
        )  # fmt: skip
    found = compare(str(folders[0]), str(folders[1]), drift=False, n_boot=100, out=tmp_path / "both", quiet=True)
    assert set(found.forgetting["task"]) == {"made.upos"}
    assert any("made.tree" in n for n in found.run["notes"])


def test_rows_of_trees_are_shown(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from analysis.cli.main import app

    shown = CliRunner().invoke(app, ["tasks", "rows", f"conllu:{treebank(tmp_path)}#tree"])
    assert shown.exit_code == 0, shown.output
    assert "root" in shown.output
    assert "head 3" in shown.output
    described = CliRunner().invoke(app, ["tasks", "show", f"conllu:{tmp_path / 'made'}#tree"])
    assert described.exit_code == 0, described.output


def test_progress_counts_the_fits_that_are_made(tmp_path, small_bert, cache, monkeypatch) -> None:
    import probing.running

    totals, advanced = [], []

    class Counted(probing.running.Progress):
        def __init__(self, description: str, total: float, **options: object) -> None:
            totals.append((description, total))
            super().__init__(description, total, **options)

        def advance(self, amount: float, description: str | None = None) -> None:
            advanced.append((totals[-1][0], amount))
            super().advance(amount, description=description)

    monkeypatch.setattr(probing.running, "Progress", Counted)
    probe_layers(
        str(small_bert), [f"conllu:{treebank(tmp_path)}#upos,tree"], probe=["linear", "structural:4"], max_train=100,
        seeds=2, n_boot=100, out=tmp_path / "run", quiet=True,
    )  # fmt: skip
    wanted = dict(totals)["Probing"]
    assert sum(amount for name, amount in advanced if name == "Probing") == wanted
