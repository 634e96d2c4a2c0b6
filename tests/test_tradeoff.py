"""Trade-offs: planted fronts, ties, noise, undefined scores, folders of training and comparison, the figure."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text
from typer.testing import CliRunner

from analysis import compare, tradeoff, tradeoff_differences, tradeoff_table
from analysis.cli.main import app
from analysis.tradeoff_displays import label_points, plot_tradeoff
from analysis.tradeoffs import tradeoff_markdown
from spafit import fit
from spafit.errors import DataError, UsageError
from spafit.plotting import lay_out, new_figure
from tests.tiny import save_tiny
from tests.training_fixtures import PLAN, QUICK, task

TASKS = [f"task-{i}" for i in range(12)]


def tables(
    points: dict[str, tuple[float, float]], *, seeds: int = 5, noise: float = 0.0, items: int = 0
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores and losses around planted means; the noise is of each method's own."""
    draw = np.random.default_rng(0)
    scores, losses = [], []
    for method, seed in itertools.product(points, range(seeds)):
        score, loss = points[method]
        value = score + noise * draw.standard_normal()
        if items:
            right = draw.permutation(items) < round(value * items)
            scores += [{"method": method, "seed": seed, "item": i, "value": float(r)} for i, r in enumerate(right)]
        else:
            scores.append({"method": method, "seed": seed, "value": value})
        losses += [
            {"method": method, "seed": seed, "task": t, "value": loss + noise * draw.standard_normal()} for t in TASKS
        ]
    return pd.DataFrame(scores), pd.DataFrame(losses)


PLANTED = {"low": (0.6, 0.00), "middle": (0.8, 0.05), "high": (0.9, 0.20), "worse": (0.7, 0.10), "worst": (0.5, 0.30)}


@pytest.mark.parametrize("items", [0, 400])
def test_a_planted_front_is_found_and_is_sure(items: int) -> None:
    table = tradeoff_table(*tables(PLANTED, noise=0.01, items=items)).set_index("method")
    assert list(table.index) == list(PLANTED)
    assert table.index[table["front"]].tolist() == ["low", "middle", "high"]
    assert table["finding"].to_dict() == {
        "low": "front", "middle": "front", "high": "front", "worse": "dominated", "worst": "dominated",
    }  # fmt: skip
    assert (table.loc[["low", "middle", "high"], "front_share"] > 0.99).all()
    assert (table.loc[["worse", "worst"], "front_share"] < 0.01).all()
    assert table.loc["worse", "dominated_by"] == "middle"
    assert (table["score_low"] < table["score"]).all()
    assert (table["forgetting_high"] > table["forgetting"]).all()


def test_the_front_is_that_of_every_pair_compared() -> None:
    draw = np.random.default_rng(3)
    points = {f"m{i}": (float(a), float(b)) for i, (a, b) in enumerate(draw.integers(0, 6, size=(25, 2)))}
    table = tradeoff_table(*tables(points, seeds=1), n_boot=10).set_index("method")
    for name, (score, loss) in points.items():
        beaten = any(
            a >= score and b <= loss and (a > score or b < loss) for other, (a, b) in points.items() if other != name
        )
        assert table.loc[name, "front"] == (not beaten)


def test_means_and_intervals_agree_with_the_closed_form() -> None:
    scores, losses = tables({"a": (0.7, 0.1)}, seeds=1, noise=0.1, items=1000)
    (row,) = tradeoff_table(scores, losses, n_boot=20_000).to_dict("records")
    assert row["score"] == pytest.approx(scores["value"].mean(), abs=1e-12)
    assert row["forgetting"] == pytest.approx(losses["value"].mean(), abs=1e-12)
    half = 1.96 * np.sqrt(row["score"] * (1 - row["score"]) / 1000)
    assert (row["score_high"] - row["score_low"]) / 2 == pytest.approx(half, rel=0.05)
    half = 1.96 * losses["value"].std(ddof=0) / np.sqrt(len(TASKS))
    assert (row["forgetting_high"] - row["forgetting_low"]) / 2 == pytest.approx(half, rel=0.05)


def test_what_methods_share_is_no_difference_between_them() -> None:
    # Two methods vary together over tasks and seeds far more than they differ.
    scores, losses = tables({"a": (0.8, 0.1)}, noise=0.2)
    better = scores.assign(method="b", value=scores["value"] + 0.001)
    less = losses.assign(method="b", value=losses["value"] - 0.001)
    table = tradeoff_table(pd.concat([scores, better]), pd.concat([losses, less])).set_index("method")
    assert table.loc["a", "finding"] == "dominated"
    assert table.loc["a", "dominated_share"] == 1
    assert table.loc["b", "finding"] == "front"
    other_seeds = better.assign(seed=better["seed"] + 10), less.assign(seed=less["seed"] + 10)
    table = tradeoff_table(pd.concat([scores, other_seeds[0]]), pd.concat([losses, other_seeds[1]]))
    assert table["finding"].tolist() == ["within noise"] * 2


def test_differences_are_paired_and_have_the_closed_form() -> None:
    scores, losses = tables({"a": (0.8, 0.1)}, noise=0.2)
    draw = np.random.default_rng(1)
    by_task = dict(zip(TASKS, 0.1 * draw.standard_normal(len(TASKS)), strict=True))
    other = losses.assign(method="b", value=losses["value"] + losses["task"].map(by_task))
    both = pd.concat([scores, scores.assign(method="b", value=scores["value"] + 0.01)]), pd.concat([losses, other])
    (row,) = tradeoff_differences(*both, against="a", n_boot=20_000).to_dict("records")
    assert row["method"] == "b"
    for end in ("score", "score_low", "score_high"):
        assert row[end] == pytest.approx(0.01, abs=1e-9)
    values = np.array(list(by_task.values()))
    assert row["forgetting"] == pytest.approx(values.mean())
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert (row["forgetting_high"] - row["forgetting_low"]) / 2 == pytest.approx(half, rel=0.05)
    one = [t[t["seed"] == 0] for t in both]
    assert tradeoff_differences(*one, against="a")[["score_low", "score_high"]].isna().all(axis=None)
    with pytest.raises(UsageError, match=r"No method 'c' with a score. Methods: a, b"):
        tradeoff_differences(*both, against="c")


def test_identical_methods_are_all_within_noise() -> None:
    scores, losses = tables({"a": (0.8, 0.1)}, noise=0.05)
    same = [t.assign(method=m) for t in (scores, losses) for m in "abcd"]
    table = tradeoff_table(pd.concat(same[:4]), pd.concat(same[4:]))
    assert table["front"].all()
    assert (table["finding"] == "within noise").all()
    assert (table["dominated_by"] == "").all()


def test_methods_that_differ_by_noise_alone_are_seldom_found_to_differ() -> None:
    found = []
    for seed in range(20):
        draw = np.random.default_rng(seed)
        scores, losses = tables(dict.fromkeys("abc", (0.8, 0.1)))
        scores["value"] += 0.02 * draw.standard_normal(len(scores))
        losses["value"] += 0.02 * draw.standard_normal(len(losses))
        found += tradeoff_table(scores, losses, n_boot=400)["finding"].tolist()
    assert found.count("within noise") >= 45


def test_a_tie_in_one_is_decided_by_the_other() -> None:
    points = {"a": (0.8, 0.1), "b": (0.8, 0.2), "c": (0.7, 0.1)}
    table = tradeoff_table(*tables(points)).set_index("method")
    assert table["front"].to_dict() == {"a": True, "b": False, "c": False}
    assert table["dominated_by"].to_dict() == {"a": "", "b": "a", "c": "a"}


def test_one_seed_says_so_and_has_no_interval_of_the_score() -> None:
    table = tradeoff_table(*tables(PLANTED, seeds=1, noise=0.01))
    assert table[["score_sd", "score_low", "score_high"]].isna().all(axis=None)
    assert table["forgetting_low"].notna().all()
    assert (table["note"] == "one seed: intervals and shares are over tasks alone").all()
    with_items = tradeoff_table(*tables(PLANTED, seeds=1, items=100))
    assert with_items["score_low"].notna().all()
    assert with_items["note"].str.contains("test items and tasks alone").all()


def test_undefined_scores_are_left_out_in_words() -> None:
    scores, losses = tables(PLANTED, seeds=3)
    scores.loc[(scores["method"] == "middle") & (scores["seed"] == 1), "value"] = np.nan
    scores.loc[scores["method"] == "high", "value"] = np.nan
    table = tradeoff_table(scores, losses).set_index("method")
    assert table.loc["middle", ["n_seeds", "note"]].tolist() == [2, "1 of 3 scores are undefined and left out"]
    assert table.loc["middle", "score"] == pytest.approx(0.8)
    assert table.loc["high", ["n_seeds", "front", "finding"]].tolist() == [0, False, "undefined"]
    assert table.loc["high", "note"] == "3 of 3 scores are undefined and left out"
    assert np.isnan(table.loc["high", "front_share"])
    text = tradeoff_markdown(table.reset_index())
    assert "| high | – | – | 0 |  | – | undefined |" in text
    assert "high: 3 of 3 scores are undefined and left out." in text
    ax = plot_tradeoff(table.reset_index())
    assert ax.get_title() == "1 method without a defined score left out"
    assert "high" not in [t.get_text() for t in ax.texts]
    with pytest.raises(DataError, match=r"No method has a defined score"):
        plot_tradeoff(table.reset_index().iloc[2:3])


def test_a_seed_that_was_not_compared_is_left_out_in_words() -> None:
    scores, losses = tables(PLANTED, seeds=3)
    table = tradeoff_table(scores, losses[losses["seed"] < 2])
    assert (table["n_seeds"] == 2).all()
    assert (table["note"] == "1 of 3 seeds were not compared and are left out").all()


def test_the_same_tables_give_the_same_numbers_in_any_order() -> None:
    scores, losses = tables(PLANTED, noise=0.05, items=50)
    one = tradeoff_table(scores, losses, n_boot=50)
    shuffled = tradeoff_table(scores, losses.sample(frac=1, random_state=0), n_boot=50)
    pd.testing.assert_frame_equal(one, shuffled)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda s, lost: (s.drop(columns="seed"), lost), UsageError, "seed is missing"),
        (lambda s, lost: (s.iloc[:0], lost), UsageError, "every row is missing"),
        (lambda s, lost: (pd.concat([s, s]), lost), UsageError, "method low, seed 0 twice"),
        (lambda s, lost: (s, lost.iloc[1:]), DataError, "low, seed 0, was not compared on task-0"),
        (lambda s, lost: (s, lost.assign(value=np.nan)), DataError, "task-0 lost under low is no number"),
    ],
)
def test_tables_that_do_not_fit_are_refused(change: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        tradeoff_table(*change(*tables(PLANTED)))


def test_methods_scored_on_other_items_are_refused() -> None:
    scores, losses = tables(PLANTED, items=30)
    with pytest.raises(DataError, match="low, seed 0, was scored on 29 of 30 test items"):
        tradeoff_table(scores.iloc[1:], losses)


# ---------------------------------------------------------------- figure


def test_names_in_a_crowd_do_not_overlap() -> None:
    draw = np.random.default_rng(0)
    x, y = 0.5 + 0.04 * draw.standard_normal(14), 0.5 + 0.04 * draw.standard_normal(14)
    ax = new_figure(width=6.8, height=4.6).add_subplot()
    ax.plot(x, y, "o", markersize=6)
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1)
    label_points(ax, x, y, [f"lora + ewc 1e+0{i}" for i in range(14)])
    for text in ax.texts:
        text.get_window_extent()  # puts the name where the annotation says
    boxes = [Text.get_window_extent(t) for t in ax.texts]  # without the lines
    assert len(boxes) == 14
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    for i, box in enumerate(boxes):
        for k, point in enumerate(ax.transData.transform(np.column_stack([x, y]))):
            assert i == k or not box.contains(*point)


def test_the_figure_shows_every_method_and_the_front_as_steps() -> None:
    table = tradeoff_table(*tables(PLANTED, noise=0.01))
    ax = plot_tradeoff(table)
    figure = ax.get_figure(root=True)
    assert figure is not None
    lay_out(figure)
    assert sorted(t.get_text() for t in ax.texts) == sorted(PLANTED)
    (front,) = [line for line in ax.lines if line.get_drawstyle() == "steps-post"]
    expected = table[table["front"]].sort_values("forgetting")
    np.testing.assert_allclose(front.get_xdata(), 100 * expected["forgetting"])
    np.testing.assert_allclose(front.get_ydata(), expected["score"])
    assert "← less" in ax.get_xlabel()
    assert ax.get_ylim()[1] > table["score"].max()


# ---------------------------------------------------------------- folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model, two plans trained on it over two seeds each, and what each lost."""
    base = tmp_path_factory.mktemp("tradeoff")
    model = base / "model"
    save_tiny("bert", model)
    table = task(240).frames["train"]
    (base / "pets").mkdir()
    table.to_csv(base / "pets" / "train.tsv", sep="\t", index=False)
    task(80).frames["train"].to_csv(base / "pets" / "test.tsv", sep="\t", index=False)
    compared = []
    for plan, name in ((PLAN, "strata"), ("head", "head")):
        result = fit(
            str(model), plan, data=task(), settings=QUICK, seeds=(0, 1), out=base / name, method=name, device="cpu",
            quiet=True,
        )  # fmt: skip
        compared += [str(result.model_folder(seed)) for seed in (0, 1)]
    compare(
        str(model), compared, labels=["a", "b", "c", "d"], tasks=[f"table:{base / 'pets'},text=text,label=label"],
        controls=(), seeds=1, n_boot=100, drift=False, out=base / "compared", cache_dir=base / "cache", device="cpu",
        quiet=True,
    )  # fmt: skip
    return {"base": base, "compared": base / "compared"}


def test_folders_of_training_and_comparison_give_the_table(folders: dict[str, Path]) -> None:
    table = tradeoff([folders["compared"]]).set_index("method")
    assert table.index.tolist() == ["strata", "head"]
    assert (table["n_seeds"] == 2).all()
    assert table["n_tasks"].tolist() == [1, 1]
    for name in table.index:
        runs = pd.read_parquet(folders["base"] / name / "runs.parquet")
        expected = runs[runs["metric"] == "headline"]["value"].mean()
        by_headline = tradeoff([folders["compared"]], metric="headline").set_index("method")
        assert by_headline.loc[name, "score"] == pytest.approx(expected)
        accuracy = runs[runs["metric"] == "accuracy"]["value"].mean()
        by_items = tradeoff([folders["compared"]], metric="accuracy").set_index("method")
        assert by_items.loc[name, "score"] == pytest.approx(accuracy)
        assert by_items.loc[name, "n_items"] == 12
    assert table.loc["head", ["forgetting", "forgetting_low", "forgetting_high"]].tolist() == [0, 0, 0]


def test_the_command_writes_table_and_figure(folders: dict[str, Path], tmp_path: Path) -> None:
    command = ["tradeoff", str(folders["compared"]), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0
    assert "| strata |" in done.stdout
    assert (tmp_path / "out" / "tradeoff.png").read_bytes()[:4] == b"\x89PNG"
    written = pd.read_parquet(tmp_path / "out" / "tradeoff.parquet")
    assert written["method"].tolist() == ["strata", "head"]
    done = CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False)
    assert [r["method"] for r in json.loads(done.stdout)["table"]] == ["strata", "head"]


def test_what_folders_lack_is_said(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"No task 'pet' was compared. Tasks: pets. Did you mean 'pets'"):
        tradeoff([folders["compared"]], tasks=["pet"])
    with pytest.raises(UsageError, match=r"not scored with the split 'test'. It has: validation"):
        tradeoff([folders["compared"]], split="test")
    with pytest.raises(UsageError, match=r"the metric 'acuracy'.*Did you mean 'accuracy'"):
        tradeoff([folders["compared"]], metric="acuracy")
    with pytest.raises(UsageError, match="at least one comparison"):
        tradeoff([])
    other = tmp_path / "other"
    compare(
        str(folders["base"] / "strata" / "seed-0" / "model"), [str(folders["base"] / "strata" / "seed-1" / "model")],
        tasks=[f"table:{folders['base'] / 'pets'},text=text,label=label"], controls=(), seeds=1, n_boot=100,
        drift=False, out=other, cache_dir=folders["base"] / "cache", device="cpu", quiet=True,
    )  # fmt: skip
    with pytest.raises(DataError, match="differ in the scores before training"):
        tradeoff([folders["compared"], other])
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in folders["compared"].glob("*.*"):
        (moved / file.name).write_bytes(file.read_bytes())
    run = json.loads((moved / "run.json").read_text())
    run["models"]["a"]["reference"] = str(tmp_path / "gone" / "model")
    (moved / "run.json").write_text(json.dumps(run))
    with pytest.raises(DataError, match=r"the score of a .* cannot be found"):
        tradeoff([moved])


def test_means_that_differ_by_rounding_are_a_tie():
    from analysis.tradeoffs import at_least_as_good

    third = np.array([1 / 3, 1 / 3 + 1e-16 * 4])
    assert at_least_as_good(third, third[::-1]).all()
    assert not at_least_as_good(np.array([0.3, 0.301]), np.zeros(2))[0, 1]
