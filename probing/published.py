"""Replay published curves: read scores or mixing weights per layer from a CSV file, and summarise them as our own.

Three layouts are understood. Any further columns of text (``model``, ``pooling``) tell curves apart.

* long: ``task,layer,f1`` (or another single column of scores), one row per task and layer;
* wide: ``layer`` and one column of scores per task;
* weights: ``task,layer,softmax_weight``, one row per task and layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from probing.curves import LayerCurve
from probing.mix_summaries import summarize_weights
from probing.summaries import MIN_GAIN_SE, SummaryRow, curve_noise, expected_layer, expected_layer_robust
from spafit.errors import DataError

#: What the numbers of a curve are: of probes on layers 0…l together, on layer l alone, or mixing weights.
Kind = Literal["cumulative", "single", "weights"]

WEIGHT_COLUMN = "softmax_weight"
#: What one curve's row in a table of :func:`summarize_published` is told apart by, beside the text columns of the file.
SUMMARY_COLUMNS = ("task", "kind", "statistic", "value", "note")


@dataclass(frozen=True)
class PublishedCurve:
    """One published curve.

    Attributes:
        keys: the text columns that tell it apart, such as ``{"model": "bert-base-uncased"}``.
        kind: what the numbers are.
        curve: the numbers; without replicates.
    """

    keys: dict[str, str]
    kind: Kind
    curve: LayerCurve


def read_published(path: str | Path, *, scores: Literal["cumulative", "single"] | None = None) -> list[PublishedCurve]:
    """Read every curve of a CSV file.

    Args:
        path: the file; see the module's text for the layouts.
        scores: what scores are of. By default cumulative in a long file, as Tenney et al. 2019 publish them, and of
            single layers in a wide one, as SentEval tables are; mixing weights are known by their column's name.

    Returns:
        Curves in the file's order, layers ascending.

    Raises:
        DataError: no such file, a column that is missing, a value that is not a number, layers with a gap, a row that
            is there twice, weights that are negative or do not sum to one.
    """
    path = Path(path)
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as CSV: {error}") from error
    if "layer" not in table.columns:
        raise DataError(f"{path}: no column 'layer'; it has {', '.join(table.columns)}. Layers are hidden indices.")
    if table.empty:
        raise DataError(f"{path} has a header and no rows.")
    numeric = [c for c in table.columns if c not in ("layer", "task") and _looks_numeric(table[c])]
    texts = [c for c in table.columns if c not in ("layer", "task", *numeric)]
    if not numeric:
        raise DataError(f"{path}: no column of numbers beside 'layer'; it has {', '.join(table.columns)}.")
    if "task" in table.columns:
        if len(numeric) > 1:
            raise DataError(
                f"{path}: a file with the column 'task' needs one column of numbers; got {', '.join(numeric)}. Leave "
                "the others out."
            )
        kind: Kind = "weights" if numeric == [WEIGHT_COLUMN] else scores or "cumulative"
        long = table.rename(columns={numeric[0]: "value"}).assign(line=np.arange(len(table)) + 2)
        metric = numeric[0]
    else:
        kind, metric = scores or "single", "score"
        numbered = table.assign(line=np.arange(len(table)) + 2)
        long = numbered.melt(id_vars=[*texts, "layer", "line"], value_vars=numeric, var_name="task")
    long["value"] = _numbers(path, long, "value", "a finite number")
    long["layer"] = _numbers(path, long, "layer", "a whole number from 0")
    bad = long[(long["layer"] < 0) | (long["layer"] % 1 != 0)]
    if len(bad):
        raise DataError(
            f"{path}, line {bad['line'].iloc[0]}: layer {bad['layer'].iloc[0]:g} is no whole number from 0."
        )
    curves = []
    for key, rows in long.groupby([*texts, "task"], sort=False):
        keys = dict(zip([*texts, "task"], map(str, key), strict=True))
        curves.append(_curve(path, keys, rows.sort_values("layer", kind="stable"), kind, metric))
    return curves


def summarize_published(curves: Sequence[PublishedCurve]) -> pd.DataFrame:
    """Summaries of published curves, one row per curve and statistic.

    There are no items behind a published curve, so there are no intervals. Noise is the standard deviation of
    successive differences over the upper half of the layers, divided by √2.

    Returns:
        The curves' text columns, then those of :data:`SUMMARY_COLUMNS`. Statistics of scores: ``best`` (layer of the
        largest), ``first_within_noise`` (lowest layer within one noise of it), ``headroom`` (largest minus lowest
        layer's, in the file's unit); of cumulative scores also ``expected_layer`` and ``expected_layer_robust``; of
        single layers ``emergence_cog`` (the centre of the running maximum's rises, not corrected for bias). Of weights
        ``cog``, ``kl_uniform`` and ``entropy`` (bits). ``note`` says why a value is missing.
    """
    rows = []
    for published in curves:
        found = _of_weights(published) if published.kind == "weights" else _of_scores(published)
        for row in found:
            values = (published.curve.task, published.kind, row.statistic, row.value, row.note)
            rows.append({**published.keys, **dict(zip(SUMMARY_COLUMNS, values, strict=True))})
    return pd.DataFrame(rows)


def _of_weights(published: PublishedCurve) -> list[SummaryRow]:
    return summarize_weights(published.curve.values, hidden=published.curve.hidden)


def _of_scores(published: PublishedCurve) -> list[SummaryRow]:
    y, layers = published.curve.values, published.curve.hidden
    noise, top = curve_noise(y), int(np.argmax(y))
    gain = float(y[top] - y[0])
    robust = expected_layer_robust(y, layers)
    note = ""
    if math.isnan(robust):
        note = f"no layer scores above layer {layers[0]}"
        if gain > 0:
            note = f"gain {gain:.2f} is {gain / noise:.1f} × noise ({noise:.2f}), below {MIN_GAIN_SE:g}"
    first = int(np.argmax(y >= y[top] - noise))
    found = [("best", float(layers[top]), ""), ("first_within_noise", float(layers[first]), "")]
    if published.kind == "cumulative":
        plain = expected_layer(y, layers)
        found += [("expected_layer", plain, ""), ("expected_layer_robust", robust, note)]
    else:
        found.append(("emergence_cog", robust, note))
    found.append(("headroom", gain, ""))
    return [SummaryRow(name, value, math.nan, math.nan, why) for name, value, why in found]


def _looks_numeric(column: pd.Series) -> bool:
    """Whether a column is meant to hold numbers: most of its entries are."""
    return bool(pd.to_numeric(column, errors="coerce").notna().mean() > 0.5) or column.name == WEIGHT_COLUMN


def _numbers(path: Path, long: pd.DataFrame, column: str, wanted: str) -> pd.Series:
    values = pd.to_numeric(long[column], errors="coerce")
    bad = long[~np.isfinite(values)]
    if len(bad):
        first = bad.iloc[0]
        name = f"{column} of task {first['task']!r}" if column == "value" else column
        raise DataError(
            f"{path}, line {first['line']}: {name} is {first[column]!r}; {wanted} is needed. Leave the whole curve out "
            "where a score is missing."
        )
    return values


def _curve(path: Path, keys: dict[str, str], rows: pd.DataFrame, kind: Kind, metric: str) -> PublishedCurve:
    words = ", ".join(f"{k} {v!r}" for k, v in keys.items())
    layers = rows["layer"].to_numpy().astype(np.int64)
    twice = layers[1:][np.diff(layers) == 0]
    if len(twice):
        lines = rows.loc[rows["layer"] == twice[0], "line"].tolist()
        raise DataError(
            f"{path}: {words} has layer {twice[0]} more than once (lines {', '.join(map(str, lines))}). Keep one, or "
            "add a column that tells the curves apart."
        )
    gaps = np.flatnonzero(np.diff(layers) > 1)
    if len(gaps):
        raise DataError(f"{path}: {words} has layers {layers[gaps[0]]} and {layers[gaps[0] + 1]} with a gap between.")
    if len(layers) < 2:
        raise DataError(f"{path}: {words} has layer {layers[0]} only; a curve needs two or more.")
    if kind != "single" and layers[0] != 0:
        raise DataError(
            f"{path}: {words} begins at layer {layers[0]}; {'weights' if kind == 'weights' else 'cumulative scores'} "
            "begin at 0, the embeddings." + ("" if kind == "weights" else " Are these scores of single layers?")
        )
    values = rows["value"].to_numpy(dtype=np.float64)
    if kind == "weights" and ((values < 0).any() or abs(values.sum() - 1) > 0.01):
        raise DataError(
            f"{path}: the weights of {words} sum to {values.sum():.4g}, the smallest is {values.min():.4g}; a softmax "
            "sums to one and has no negative weight."
        )
    task = keys["task"]
    curve = LayerCurve(task, "other", layers, values, np.empty((0, len(layers))), metric=metric)
    return PublishedCurve({k: v for k, v in keys.items() if k != "task"}, kind, curve)
