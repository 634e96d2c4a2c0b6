"""Layer mixing measured on arrays: cumulative probes, mixing weights, and their summaries with intervals.

For every hidden state l a probe reads the mix of hidden states 0 to l (:mod:`probing.probes.mixing`). The scores of
these cumulative probes, what each adds to the one below, and the weights of the mix of all layers become rows of the
tables that probing writes.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from probing.config import check_penalties, seed_numbers
from probing.curves import LayerCurve
from probing.mix_summaries import summarize_cumulative, summarize_weights
from probing.probes.linear import DEFAULT_L2
from probing.probes.mixing import MIX_TOLERANCE, MixFit, fit_mixes
from probing.scoring import SCORE_COLUMNS
from probing.summaries import SummaryRow
from spafit.errors import TaskError, UsageError
from spafit.runtime import generator
from spafit.stats import BootstrapDraw, interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Rows that are scored at a time: log probabilities of all mixes are large.
_SCORED_ROWS = 4096
_WHERE = {"stack": "arrays", "site": "block", "pooling": "given"}


@dataclass(frozen=True)
class MixDraw:
    """What one seed trains on, and the labels that its label sets give to dev and test.

    Attributes:
        seed: its number.
        x_train: training states, (layers, n, width).
        y_train: training labels, (M, n), one row per label set.
        y_dev: dev labels, (M, n_dev).
        y_test: test labels, (M, n_test).
        counts: how often each label occurs in the whole training split, (M, classes), which bits saved are counted from
            (half an item for a label that never does); those of ``y_train`` if None.
    """

    seed: int
    x_train: np.ndarray = field(repr=False)
    y_train: np.ndarray = field(repr=False)
    y_dev: np.ndarray = field(repr=False)
    y_test: np.ndarray = field(repr=False)
    counts: np.ndarray | None = field(default=None, repr=False)


@dataclass(frozen=True)
class MixResult:
    """Scores, summaries and items of scalar mixes.

    Attributes:
        scores: columns of :data:`probing.scoring.SCORE_COLUMNS`, ``probe`` is ``mix``. Metrics: ``cumulative_accuracy``
            and ``cumulative_bits`` (of the mix of hidden states 0 to ``hidden``), ``differential_bits`` (bits of 0…l
            minus those of 0…l-1, from hidden 1), ``mix_weight`` and ``mix_weight_norm`` (s and its norm-corrected
            form in the mix of all). Rows without a seed are means over seeds, with intervals over items × seeds
            (weights: over seeds alone, none with one seed).
        summaries: ``cog``, ``cog_norm``, ``kl_uniform``, ``entropy`` (metric ``mix_weight``), ``expected_layer``,
            ``expected_layer_robust``, ``headroom`` (metrics ``cumulative_bits``, ``cumulative_accuracy``).
        items: per test item, hidden state, control and seed: label, prediction and bits saved.
        fits: the frozen fits, one per seed.
    """

    scores: pd.DataFrame = field(repr=False)
    summaries: pd.DataFrame
    items: pd.DataFrame = field(repr=False)
    fits: tuple[MixFit, ...] = field(repr=False)

    def to_pandas(self) -> pd.DataFrame:
        """The scores."""
        return self.scores.copy()

    def plot(self, ax: Axes | None = None) -> Axes:
        """Bars of mixing weights with what each layer adds beside them (Tenney et al. 2019, figure 2)."""
        from probing.mix_displays import weights_and_gains

        return weights_and_gains(self.scores, self.summaries, ax=ax)

    def _repr_html_(self) -> str:
        """The summaries as an HTML table."""
        shown = self.summaries[["task", "control", "metric", "statistic", "value", "ci_low", "ci_high", "note"]]
        name = html.escape(str(self.scores["task"].iloc[0]))
        return f"<b>Scalar mix: {name}</b>" + shown.to_html(index=False, float_format="{:.3f}".format, na_rep="—")


def mix_arrays(
    x_train: np.ndarray,
    y_train: np.ndarray,
    x_dev: np.ndarray,
    y_dev: np.ndarray,
    x_test: np.ndarray,
    y_test: np.ndarray,
    *,
    groups: Sequence[Any] | np.ndarray | None = None,
    n_classes: int | None = None,
    seeds: int | Sequence[int] = (0, 1, 2),
    max_train: int | None = None,
    label_sets: Sequence[str] = ("none",),
    l2: Sequence[float] = tuple(DEFAULT_L2),
    n_boot: int = 1000,
    name: str = "task",
    device: str = "cpu",
    tolerance: float = MIX_TOLERANCE,
) -> MixResult:
    """Train scalar mixes of hidden states 0 to l for every l, and summarise them.

    Args:
        x_train: training states, (layers, n, width), layer 0 the embeddings.
        y_train: integer labels, (n,), or (M, n) where control tasks are fitted beside the task.
        x_dev: dev states, (layers, n_dev, width); they choose the penalty of each mix.
        y_dev: dev labels, shaped like ``y_train``.
        x_test: test states, (layers, n_test, width).
        y_test: test labels.
        groups: cluster of each test item for the intervals, such as the sentence of a word; each item by default.
        n_classes: number of classes; by default the largest training label plus one.
        seeds: each redraws the training items; a number n means seeds 0 to n - 1.
        max_train: training items per seed; None takes 80 % of them, at most 20,000.
        label_sets: name of each of the M label sets in the column ``control``; the first is the task's (``none``).
        l2: penalties tried.
        n_boot: bootstrap replicates.
        name: the task's name in the tables.
        device: torch device of the products; one with float64.
        tolerance: bits per item, see :data:`probing.probes.mixing.MIX_TOLERANCE`.

    Raises:
        UsageError: shapes, labels, seeds or penalties that do not fit together.
        NumericalError: states that are not finite.
        TaskError: a training draw holds one class only.
    """
    numbers = seed_numbers(seeds)
    check_penalties(tuple(l2))
    train, dev, test = (np.atleast_2d(np.asarray(y)) for y in (y_train, y_dev, y_test))
    for part, x, y in (("train", x_train, train), ("dev", x_dev, dev), ("test", x_test, test)):
        if x.ndim != 3 or y.shape != (len(label_sets), x.shape[1]):
            raise UsageError(
                f"x_{part} has shape {tuple(x.shape)} and y_{part} {y.shape}; needed are (layers, items, width) and "
                f"one label per item for each of the label sets {', '.join(label_sets)}."
            )
    if max_train is not None and max_train < 1:
        raise UsageError(f"max_train is {max_train}; at least one training item is needed.")
    n = train.shape[1]
    classes = int(train.max()) + 1 if n_classes is None else n_classes
    size = min(n, max_train) if max_train is not None else min(20_000, max(1, int(0.8 * n)))
    shares = np.stack([np.bincount(row, minlength=classes) for row in train])

    def draws() -> Iterable[MixDraw]:
        for seed in numbers if size < n else numbers[:1]:  # the same items give the same fit
            rows = np.sort(generator(seed, "mix", name).permutation(n)[:size])
            yield MixDraw(seed, x_train[:, rows], train[:, rows], dev, test, shares)

    return measure_mixes(
        draws(), x_dev, x_test, groups=groups, n_classes=classes, label_sets=label_sets, l2=l2, n_boot=n_boot,
        names={"task": name, "level": "other", "unit": "sentence", **_WHERE}, device=device, tolerance=tolerance,
    )  # fmt: skip


def measure_mixes(
    draws: Iterable[MixDraw],
    x_dev: np.ndarray,
    x_test: np.ndarray,
    *,
    n_classes: int,
    names: Mapping[str, str],
    groups: Sequence[Any] | np.ndarray | None = None,
    label_sets: Sequence[str] = ("none",),
    split: str = "test",
    l2: Sequence[float] = tuple(DEFAULT_L2),
    n_boot: int = 1000,
    device: str = "cpu",
    tolerance: float = MIX_TOLERANCE,
) -> MixResult:
    """Measure one task whose training draws are given one after the other; :func:`mix_arrays` makes them itself.

    Args:
        draws: one per seed, read once.
        x_dev: dev states, (layers, n_dev, width).
        x_test: test states, (layers, n_test, width).
        n_classes: number of classes.
        names: values of the columns ``task``, ``level``, ``unit``, ``stack``, ``site`` and ``pooling``.
        groups: cluster of each test item; each item by default.
        label_sets: name of each label set in the column ``control``, such as ``none`` and ``word-type``.
        split: value of the column ``split``.
        l2: penalties tried.
        n_boot: bootstrap replicates.
        device: torch device of the products.
        tolerance: bits per item.

    Raises:
        UsageError: no draw, or shapes that do not fit.
        NumericalError: states that are not finite.
        TaskError: a training draw holds one class only.
    """
    count = x_test.shape[1]
    if not count or not x_dev.shape[1]:
        raise UsageError(f"x_dev has {x_dev.shape[1]} items and x_test {count}; both need at least one.")
    clusters = np.arange(count) if groups is None else np.asarray(groups)
    if clusters.shape != (count,):
        raise UsageError(f"groups has shape {clusters.shape}; x_test has {count} items.")
    base = {**names, "probe": "mix", "split": split}
    fits: list[MixFit] = []
    seeds: list[int] = []
    scored: list[tuple[np.ndarray, ...]] = []
    chances: list[np.ndarray] = []
    for draw in draws:
        if len(np.unique(draw.y_train[0])) < 2:
            raise TaskError(f"Task {names['task']!r}: the training draw of seed {draw.seed} holds one class only.")
        fit = fit_mixes(
            draw.x_train, draw.y_train, x_dev, draw.y_dev, n_classes=n_classes, l2_grid=l2, device=device,
            tolerance=tolerance,
        )  # fmt: skip
        counts = draw.counts
        if counts is None:
            counts = np.stack([np.bincount(row, minlength=n_classes) for row in draw.y_train])
        prior = np.log2(np.maximum(counts, 0.5) / counts.sum(1, keepdims=True))
        fits.append(fit)
        seeds.append(draw.seed)
        scored.append(_score(fit, x_test, draw.y_test, prior))
        chances.append((draw.y_test == counts.argmax(1)[:, None]).mean(1))
    if not fits:
        raise UsageError("There is no training draw: give at least one seed.")
    labels, guesses, bits = (np.stack(v) for v in zip(*scored, strict=True))  # (seeds, [hidden,] label sets, items)
    resamples = {n: BootstrapDraw.make(clusters, n, n_boot=n_boot, seed=0) for n in {1, len(fits)}}
    every = list(range(len(fits)))
    parts: list[tuple[list[int], int | None]] = [*(([i], seeds[i]) for i in every), (every, None)]
    rows: list[dict[str, Any]] = []
    summaries: list[dict[str, Any]] = []
    for m, control in enumerate(label_sets):
        fixed = {**base, "control": control, "n": count, "n_classes": n_classes}
        own = bits[:, :, m].astype(np.float64)
        right = (guesses[:, :, m] == labels[:, None, m]).astype(np.float64)
        scores = {"cumulative_accuracy": right, "cumulative_bits": own, "differential_bits": np.diff(own, axis=1)}
        s = np.stack([fit.mix_weights[-1, m] for fit in fits])
        corrected = np.stack([fit.norm_corrected[-1, m] for fit in fits])
        for chosen, seed in parts:
            some = [fits[i] for i in chosen]
            chance = float(np.mean([chances[i][m] for i in chosen]))
            for metric, values in scores.items():
                replicates = resamples[len(chosen)].means(values[chosen])
                means = values[chosen].mean((0, 2))
                shown = {**fixed, "metric": metric, "seed": seed, "chance": chance if values is right else math.nan}
                rows += _rows(shown, means, interval(replicates), some, m, first=len(own[0]) - len(means))
                if seed is None and metric != "differential_bits" and len(means) > 1:
                    curve = LayerCurve(
                        names["task"], names["level"], np.arange(len(means)), means, replicates, metric=metric,
                        n_items=count, n_seeds=len(fits),
                    )  # fmt: skip
                    summaries += _summary_rows(base, control, metric, summarize_cumulative(curve))
            for metric, weights in (("mix_weight", s), ("mix_weight_norm", corrected)):
                ends = np.full((2, weights.shape[1]), np.nan)
                if len(chosen) > 1:
                    ends = interval(resamples[len(chosen)].seed_counts @ weights / len(chosen))
                shown = {**fixed, "metric": metric, "seed": seed, "chance": math.nan}
                rows += _rows(shown, weights[chosen].mean(0), ends, some, m, of_all=True)
        found = summarize_weights(s, corrected, seed_counts=resamples[len(fits)].seed_counts)
        summaries += _summary_rows(base, control, "mix_weight", found)
    table = pd.DataFrame(rows, columns=list(SCORE_COLUMNS))
    table = table.astype({"seed": "Int64", "hidden": "int64", "block": "int64"})
    items = _item_rows(base, label_sets, seeds, clusters, labels, guesses, bits)
    return MixResult(table, pd.DataFrame(summaries), items, tuple(fits))


def _score(fit: MixFit, x: np.ndarray, labels: np.ndarray, prior: np.ndarray) -> tuple[np.ndarray, ...]:
    """Labels (sets, items), predictions and bits saved (mixes, sets, items)."""
    mixes, sets = fit.scale.shape
    guesses = np.empty((mixes, sets, x.shape[1]), dtype=np.int32)
    bits = np.empty((mixes, sets, x.shape[1]), dtype=np.float32)
    for start in range(0, x.shape[1], _SCORED_ROWS):
        part = slice(start, start + _SCORED_ROWS)
        log_p = fit.log_probabilities(x[:, part])
        gold = labels[:, part]
        guesses[:, :, part] = log_p.argmax(-1)
        own = np.take_along_axis(log_p, gold[None, :, :, None], -1)[..., 0] / np.log(2)
        bits[:, :, part] = own - np.take_along_axis(prior, gold, 1)
    return labels, guesses, bits


def _rows(
    fixed: Mapping[str, Any], values: np.ndarray, ends: np.ndarray, fits: Sequence[MixFit], m: int, *, first: int = 0,
    of_all: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row per hidden state from ``first``; ``of_all`` where every row is about the mix of all of them."""
    rows = []
    for hidden, value, low, high in zip(range(first, first + len(values)), values, *ends, strict=True):
        at = -1 if of_all else hidden
        used = [at, at - 1] if first else [at]  # a difference needs both mixes
        penalties = {float(fit.l2[at]) for fit in fits}
        rows.append(
            {
                **fixed,
                "hidden": hidden,
                "block": hidden - 1,
                "value": float(value),
                "ci_low": float(low),
                "ci_high": float(high),
                "l2": penalties.pop() if len(penalties) == 1 else math.nan,
                "converged": all(bool(fit.converged[i, m]) for fit in fits for i in used),
                "n_train": int(np.mean([fit.n_items for fit in fits])),
                "n_seeds": len(fits),
            }
        )
    return rows


def _summary_rows(
    base: Mapping[str, str], control: str, metric: str, found: Sequence[SummaryRow]
) -> list[dict[str, Any]]:
    fixed = {k: base[k] for k in ("task", "level", "stack", "site", "pooling", "probe")}
    return [{**fixed, "control": control, "metric": metric, **asdict(row)} for row in found]


def _item_rows(
    base: Mapping[str, str], label_sets: Sequence[str], seeds: Sequence[int], clusters: np.ndarray,
    labels: np.ndarray, guesses: np.ndarray, bits: np.ndarray,
) -> pd.DataFrame:  # fmt: skip
    """One row per test item, hidden state, control and seed."""
    count, mixes = labels.shape[-1], guesses.shape[1]
    keys = [(i, m, k) for m in range(len(label_sets)) for i in range(len(seeds)) for k in range(mixes)]
    columns: dict[str, Any] = {
        "item": np.tile(np.arange(count), len(keys)),
        "group": np.tile(clusters, len(keys)),
        "split": pd.Categorical([base["split"]]).repeat(count * len(keys)),
        "label": np.concatenate([labels[i, m] for i, m, _ in keys]),
        **{c: pd.Categorical([base[c]]).repeat(count * len(keys)) for c in ("stack", "site", "pooling", "probe")},
        "hidden": np.repeat(np.array([k for _, _, k in keys], dtype=np.int16), count),
        "control": pd.Categorical(np.repeat([label_sets[m] for _, m, _ in keys], count)),
        "seed": np.repeat(np.array([seeds[i] for i, _, _ in keys], dtype=np.int32), count),
        "prediction": np.concatenate([guesses[i, k, m] for i, m, k in keys]),
        "bits": np.concatenate([bits[i, k, m] for i, m, k in keys]),
    }
    return pd.DataFrame(columns)
