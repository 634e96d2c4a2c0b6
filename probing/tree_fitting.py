"""Structural probes of one task of trees: fitted at every hidden state, for all seeds and encoders, and scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from probing.curves import LayerCurve
from probing.fitting import ProbeSettings, States, hidden_chunks, training_rows
from probing.probes.structural import StructuralProbeFit, fit_structural_probes
from probing.scoring import SCORE_COLUMNS
from probing.tasks.base import Task
from probing.tree_scores import METRICS, TreeScores, linear_chain, score_trees
from probing.trees import Tree, item_trees
from spafit.errors import TaskError
from spafit.stats import BootstrapDraw, interval

#: What Hewitt & Manning (2019, tables 1 and 2) report for the Penn Treebank.
PUBLISHED = (
    "Published for the Penn Treebank (Hewitt & Manning 2019; other data: compare shapes, not digits): BERT-base best "
    "at hidden 7 of 12 (UUAS .798, DSpr. .85), BERT-large at 15 of 24 (.825, .86), linear chain .489."
)
#: Columns of a sentence's scores among the items, as :class:`probing.tree_scores.TreeScores` names them.
SENTENCE_COLUMNS = ("gold_edges", "right_edges", "distance_spearman", "depth_spearman", "has_root", "right_root")
#: Columns of items that say where they come from; the others are the sentence's metadata.
_KEYS = ("item", "group", "text", "split", "length", "stack", "site", "pooling", "probe", "hidden", "control", "seed")


@dataclass(frozen=True)
class TreeFit:
    """All structural probes of one task at one site and pooling.

    Attributes:
        hidden: hidden indices, ascending.
        test: positions in ``task.items`` of each scored sentence's first word, (sentences,).
        trees: gold trees of the scored sentences.
        controls: scores by control (``none`` for the task itself) and seed.
        converged: whether both probes stopped by themselves, by control and seed, bool (hidden,).
        n_train: training words per fit.
        weights: maps of the model's own probes, ``none/<seed>/<hidden>/<distance_weight or depth_weight>``.
    """

    hidden: tuple[int, ...]
    test: np.ndarray
    trees: tuple[Tree, ...] = field(repr=False)
    controls: Mapping[str, Mapping[int, TreeScores]] = field(repr=False)
    converged: Mapping[str, Mapping[int, np.ndarray]] = field(repr=False)
    n_train: int = 0
    weights: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)


def fit_trees(
    task: Task,
    settings: ProbeSettings,
    *,
    hidden: Sequence[int],
    states: States,
    encoders: Mapping[str, Mapping[int, States]],
    rank: int,
    usable: np.ndarray | None = None,
    device: str = "cpu",
    progress: Callable[[float], None] | None = None,
) -> TreeFit:
    """Fit and score structural probes for every hidden state, seed and encoder of one task of trees.

    Args:
        task: a validated task of kind ``tree``.
        settings: seeds and training items.
        hidden: hidden indices to probe.
        states: reads the model's states.
        encoders: for each control that is an encoder of its own, and each seed, reads that encoder's states.
        rank: rank of the probes, at most the width.
        usable: words whose states exist, (items,); a sentence with others is left out.
        device: torch device of the products.
        progress: called with the number of (hidden, seed, encoder) fits just finished.

    Raises:
        TaskError: no training, dev or test sentence of two words is left.
        UsageError: a rank above the width.
    """
    items = task.items
    usable = np.ones(len(items), dtype=bool) if usable is None else usable
    whole = pd.Series(usable).groupby(items["group"].to_numpy(), sort=False).transform("all").to_numpy(dtype=bool)
    split = items["split"].to_numpy()
    draws = {seed: rows[whole[rows]] for seed, rows in training_rows(task, settings).items()}
    dev = np.flatnonzero((split == "dev") & whole)
    test = np.flatnonzero(~np.isin(split, ("train", "dev")) & whole)
    trees: dict[str, list[Tree]] = {}
    for name, rows in {"dev": dev, "test": test, **{f"training (seed {s})": r for s, r in draws.items()}}.items():
        trees[name] = item_trees(items.iloc[rows]) if len(rows) else []
        if all(len(tree) < 2 for tree in trees[name]):
            raise TaskError(f"Task {task.name!r}: no {name} sentence of two words has states. Use more sentences.")
    lengths = [len(tree) for tree in trees["test"]]
    controls: dict[str, dict[int, TreeScores]] = {}
    converged: dict[str, dict[int, np.ndarray]] = {}
    weights: dict[str, np.ndarray] = {}
    for seed in settings.seeds:
        train, gold = draws[seed], trees[f"training (seed {seed})"]
        for control, read in {"none": states, **{name: own[seed] for name, own in encoders.items()}}.items():
            scores, met = [], []
            for k in hidden_chunks(hidden, len(train) + len(dev) + len(test), read(hidden[0], train[:1]).shape[1]):
                chosen = [hidden[j] for j in range(*k.indices(len(hidden)))]
                x_train, x_dev, x_test = (np.stack([read(h, rows) for h in chosen]) for rows in (train, dev, test))
                fit = fit_structural_probes(x_train, gold, x_dev, trees["dev"], rank=rank, seed=seed, device=device)
                predicted = fit.distances(x_test, lengths), fit.depths(x_test, lengths)
                scores.append(score_trees(*predicted, trees["test"]))
                met.append(fit.distance.converged & fit.depth.converged)
                if control == "none":
                    weights.update(_weights(fit, seed, chosen))
                if progress is not None:
                    progress(len(chosen))
            controls.setdefault(control, {})[seed] = _joined(scores)
            converged.setdefault(control, {})[seed] = np.concatenate(met)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    n_train = int(np.mean([len(r) for r in draws.values()]))
    return TreeFit(tuple(hidden), test[starts], tuple(trees["test"]), controls, converged, n_train, weights)


def _weights(fit: StructuralProbeFit, seed: int, hidden: Sequence[int]) -> dict[str, np.ndarray]:
    return {f"none/{seed}/{h}/{name}": v[i] for name, v in fit.arrays().items() for i, h in enumerate(hidden)}


def _joined(parts: Sequence[TreeScores]) -> TreeScores:
    """Scores of the same sentences at more hidden states."""
    per_hidden = ("right_edges", "distance_spearman", "depth_spearman", "right_root")
    return replace(parts[0], **{name: np.concatenate([getattr(p, name) for p in parts]) for name in per_hidden})


# ---------------------------------------------------------------- tables


def tree_score_table(task: Task, fit: TreeFit, settings: ProbeSettings, *, where: Mapping[str, str]) -> pd.DataFrame:
    """One row per (hidden state, control, seed, test split, metric), with the columns of a run's scores.

    Metrics are those of :mod:`probing.tree_scores`; ``n`` counts sentences, and ``chance`` is the linear chain's value
    on them. Rows whose ``seed`` is missing are means over seeds, with intervals that cross sentences with seeds; rows
    of ``difference:<control>`` are the task's own score minus the control's, paired.
    """
    rows: list[dict[str, Any]] = []
    items = task.items.iloc[fit.test]
    chain = linear_chain(fit.trees)
    for split in task.test_splits:
        chosen = (items["split"] == split).to_numpy()
        if not chosen.any():
            continue
        base = {
            "task": task.name, "level": task.level, "unit": task.unit, **where, "split": split, "n_classes": 0,
            "n_train": fit.n_train, "l2": np.nan,
        }  # fmt: skip
        draws = {n: _draw(chosen, n, settings.n_boot) for n in {1, len(settings.seeds)}}
        for metric in METRICS:
            row = {
                **base, "metric": metric, "n": chain.of(chosen).counted(metric),
                "chance": float(chain.of(chosen).means(metric, np.ones((1, int(chosen.sum()))))[0, 0]),
            }  # fmt: skip
            spread: dict[str, tuple[np.ndarray, np.ndarray]] = {}
            for control, by_seed in fit.controls.items():
                scores = {seed: s.of(chosen) for seed, s in by_seed.items()}
                for seed, one in scores.items():
                    values, replicates = _values([one], metric, draws[1])
                    rows += _rows(fit, {**row, "control": control, "n_seeds": 1}, seed, values, replicates)
                spread[control] = _values(list(scores.values()), metric, draws[len(settings.seeds)])
                rows += _rows(fit, {**row, "control": control, "n_seeds": len(scores)}, None, *spread[control])
            for control in [c for c in spread if c != "none"]:
                values, replicates = (a - b for a, b in zip(spread["none"], spread[control], strict=True))
                more = {"control": f"difference:{control}", "n_seeds": len(settings.seeds), "chance": np.nan}
                rows += _rows(fit, {**row, **more}, None, values, replicates)
    table = pd.DataFrame(rows, columns=list(SCORE_COLUMNS))
    return table.astype({"seed": "Int64", "hidden": "int64", "block": "int64"})


def order_words(scores: pd.DataFrame, *, blocks: int) -> str:
    """A sentence on where distances and depths are read best, beside the published places.

    Args:
        scores: rows of :func:`tree_score_table`, of one stack, site, pooling and probe.
        blocks: depth of the stack.
    """
    own = scores[(scores["control"] == "none") & scores["seed"].isna()]
    own = own[own["split"] == own["split"].iloc[0]]
    found = []
    for metric, words in (("uuas", "edges (UUAS)"), ("dspr", "distances (DSpr.)"), ("nspr", "depths (NSpr.)")):
        part = own[(own["metric"] == metric) & own["value"].notna()]
        if len(part):
            best = part.loc[part["value"].idxmax()]
            found.append(f"{words} {best['value']:.3f} at hidden {best['hidden']}")
    place = ", ".join(str(own[c].iloc[0]) for c in ("site", "pooling", "probe"))
    return f"Best of {blocks} blocks ({place}): {', '.join(found)}. {PUBLISHED}"


def _draw(chosen: np.ndarray, n_seeds: int, n_boot: int) -> BootstrapDraw:
    return BootstrapDraw.make(np.arange(int(chosen.sum())), n_seeds, n_boot=n_boot, seed=0)


def _values(scores: Sequence[TreeScores], metric: str, draw: BootstrapDraw) -> tuple[np.ndarray, np.ndarray]:
    """Mean over seeds at each hidden state, and replicates (n_boot, hidden); NaN where a resample counts nothing."""
    once = np.ones((1, len(scores[0].lengths)))
    values = np.mean([s.means(metric, once)[0] for s in scores], 0)
    each = np.stack([s.means(metric, draw.cluster_counts) for s in scores], 1)
    return values, np.einsum("bs,bsh->bh", draw.seed_counts / len(scores), each)


def _rows(
    fit: TreeFit, row: Mapping[str, Any], seed: int | None, values: np.ndarray, replicates: np.ndarray
) -> list[dict[str, Any]]:  # fmt: skip
    kept = replicates[~np.isnan(replicates).any(1)]
    low, high = interval(kept) if len(kept) > 1 else np.full((2, len(values)), np.nan)
    control = str(row["control"]).removeprefix("difference:")
    seeds = fit.converged[control] if seed is None else {seed: fit.converged[control][seed]}
    met = np.all(list(seeds.values()), 0)
    return [
        {
            **row, "hidden": h, "block": h - 1, "seed": seed, "value": float(values[k]), "ci_low": float(low[k]),
            "ci_high": float(high[k]), "converged": bool(met[k]),
        }
        for k, h in enumerate(fit.hidden)
    ]  # fmt: skip


def tree_item_table(task: Task, fit: TreeFit, *, where: Mapping[str, str]) -> pd.DataFrame:
    """One row per (test sentence, hidden state, control, seed).

    Columns: item and group (the sentence's id), text, split, length (words), stack, site, hidden, pooling, probe,
    control, seed, :data:`SENTENCE_COLUMNS` and the sentence's metadata.
    """
    first = task.items.iloc[fit.test]
    texts = [task.corpus.texts[i].string for i in first["text"]]
    lengths = [len(tree) for tree in fit.trees]
    fixed = {"item": first["group"].astype(str), "group": first["group"].astype(str), "text": texts,
             "split": first["split"], "length": lengths}  # fmt: skip
    used = {*_KEYS, *SENTENCE_COLUMNS, "span", "label", "punctuation"}
    fixed |= {c: first[c] for c in first.columns if c not in used}
    tables = []
    for control, by_seed in fit.controls.items():
        for seed, scores in by_seed.items():
            for k, h in enumerate(fit.hidden):
                found = {name: getattr(scores, name) for name in SENTENCE_COLUMNS}
                columns = {name: v[k] if v.ndim == 2 else v for name, v in found.items()}
                tables.append(
                    pd.DataFrame({n: np.asarray(v) for n, v in fixed.items()}).assign(
                        hidden=h, control=control, seed=seed, **columns
                    )
                )
    table = pd.concat(tables, ignore_index=True).assign(**where)
    names = ["item", "group", "text", "split", "control", *where, *(n for n in fixed if table[n].dtype == object)]
    return table.astype({name: "category" for name in dict.fromkeys(names)})


def is_tree_items(items: pd.DataFrame) -> bool:
    """Whether items are sentences of :func:`tree_item_table`."""
    return set(SENTENCE_COLUMNS) <= set(items.columns)


def tree_curve(
    items: pd.DataFrame, *, task: str, level: str, metric: str, adjusted_by: str | None, n_boot: int = 1000
) -> LayerCurve:
    """A layer curve of one of the tree metrics, with replicates that cross sentences with seeds.

    Args:
        items: rows of one test split and of one stack, site, pooling and probe.
        task: the task's name.
        level: its level.
        metric: of :data:`probing.tree_scores.METRICS`.
        adjusted_by: control whose score is subtracted at each hidden state; where there is none, nothing is.
        n_boot: bootstrap replicates.
    """
    own = _scores_of_items(items, "none")
    other = None
    if adjusted_by is not None and (items["control"] == adjusted_by).any():
        other = _scores_of_items(items, adjusted_by)
    draw = BootstrapDraw.make(np.arange(len(own[0].lengths)), len(own), n_boot=n_boot, seed=0)
    values, replicates = _values(own, metric, draw)
    if other is not None:
        values, replicates = (a - b for a, b in zip((values, replicates), _values(other, metric, draw), strict=True))
    return LayerCurve(
        task, level, np.sort(items["hidden"].unique()), values, replicates[~np.isnan(replicates).any(1)], metric,
        "none" if other is None else str(adjusted_by), own[0].counted(metric), len(own),
    )  # fmt: skip


def _scores_of_items(items: pd.DataFrame, control: str) -> list[TreeScores]:
    """The scores that some items hold, one for each seed."""
    part = items[items["control"] == control]
    found = []
    for _, one in part.groupby("seed", sort=True):
        one = one.sort_values("hidden", kind="stable")
        shape = (one["hidden"].nunique(), -1)
        values = {name: one[name].to_numpy().reshape(shape) for name in (*SENTENCE_COLUMNS, "length")}
        fixed = {name: values[name][0] for name in ("gold_edges", "has_root")}
        varied = {name: values[name] for name in SENTENCE_COLUMNS if name not in fixed}
        found.append(TreeScores(lengths=values["length"][0], **fixed, **varied))
    return found
