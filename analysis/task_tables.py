"""Cause and use in a trained classifier, as tables: what each block's training gave to the task, and what passes there.

Everything is measured on the same held-out labelled items, and every change of a score has a paired interval.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from analysis.causal import COLUMNS as EFFECT_COLUMNS
from analysis.causal import Part, effect, erased, exchanged, marginals, shapley_values, windows
from analysis.erasure import Eraser, fit_leace, random_eraser, variance_matched_eraser
from spafit.errors import UsageError
from spafit.runtime import Progress

if TYPE_CHECKING:
    from torch import nn

    from analysis.task_scores import TaskScore
    from spafit.language_models import LanguageModel

CAUSAL_COLUMNS = (*EFFECT_COLUMNS, "ci_low", "ci_high", "n")
INTERACTION_COLUMNS = ("block", "metric", "first", "last", "interaction", "shapley", "standard_error", "n")
ERASURE_COLUMNS = (
    "task", "hidden", "eraser", "draw", "rank", "removed_variance", "metric", "value", "reference", "effect", "ci_low",
    "ci_high", "n", "n_fit",
)  # fmt: skip
#: Random partners that a resampled branch is tried with.
RESAMPLED_DRAWS = 2
#: Random subspaces of each control of an erasure.
CONTROL_DRAWS = 3
#: Blocks up to which Shapley values are exact without being asked for: 2^8 = 256 scores.
MOST_EXACT = 8
#: Windows of running text, and tokens of each, that a language model with a reverted block is scored on.
TEXT_WINDOWS, TEXT_WINDOW = 4, 128
_BRANCHES: tuple[Part, ...] = ("attention", "feed-forward")


def causal_table(
    before: nn.Module,
    after: nn.Module,
    score: TaskScore,
    *,
    equal: TaskScore | None = None,
    branches: bool = True,
    quiet: bool = True,
) -> pd.DataFrame:
    """Effect on the task's score of reverting, transplanting, skipping and resampling blocks.

    ``revert`` stands for every single block, every prefix [0, k) and every suffix [k, L); ``transplant`` for single
    blocks in the classifier on the body before training; ``skip`` for single blocks and each of their branches;
    ``resample`` for branches, :data:`RESAMPLED_DRAWS` times.

    Args:
        before: the classifier on the body before training (:func:`analysis.task_models.on_body_before`).
        after: the trained classifier.
        score: the metric.
        equal: the metric on items of equal length, which swapping between items needs; None leaves ``resample`` out.
        branches: the blocks' attention and feed-forward branches are known.
        quiet: no progress on stderr.

    Returns:
        Columns :data:`CAUSAL_COLUMNS`; ``effect`` is ``value`` - ``reference``, and its interval resamples items.
    """
    from spafit.stacks import find_stacks

    count = find_stacks(after)[0].num_blocks
    single = windows(count, "single")
    ranges = sorted({*single, *windows(count, "prefix"), *windows(count, "suffix")})
    jobs: list[tuple[Any, list[tuple[int, int]], Part, TaskScore]] = [
        ("revert", ranges, "block", score), ("transplant", single, "block", score), ("skip", single, "block", score),
    ]  # fmt: skip
    for part in _BRANCHES if branches else ():
        jobs.append(("skip", single, part, score))
        if equal is not None:
            jobs.append(("resample", single, part, equal))
    tables = []
    for intervention, blocks, part, metric in jobs:
        metric.restart()
        table = effect(
            before, after, intervention=intervention, blocks=blocks, metric=metric, part=part, draws=RESAMPLED_DRAWS,
            quiet=quiet,
        )  # fmt: skip
        tables.append(metric.with_intervals(table))
    return pd.concat(tables, ignore_index=True)[list(CAUSAL_COLUMNS)]


def interaction_table(
    before: nn.Module,
    after: nn.Module,
    score: TaskScore,
    known: pd.DataFrame,
    *,
    permutations: int | None = None,
    quiet: bool = True,
) -> pd.DataFrame:
    """What reverting each block changes first (alone) and last (all others reverted already), and its Shapley value.

    Args:
        before: see :func:`causal_table`.
        after: see :func:`causal_table`.
        score: the metric, on the items of ``known``.
        known: rows of :func:`causal_table`; sets that are there are not scored again.
        permutations: random orders for sampled Shapley values; None gives exact ones up to :data:`MOST_EXACT` blocks
            and none above; 0 gives none.
        quiet: no progress on stderr.

    Returns:
        Columns :data:`INTERACTION_COLUMNS`; ``shapley`` and ``standard_error`` are NaN where not asked for.
    """
    own = known[known["intervention"] == "revert"]
    count = int(own["blocks_stop"].max())
    values: dict[frozenset[int], dict[str, float]] = {frozenset(): {}}
    for r in own.to_dict("records"):
        values.setdefault(frozenset(range(r["blocks_start"], r["blocks_stop"])), {})[r["metric"]] = r["value"]
        values[frozenset()][r["metric"]] = r["reference"]
    exact = permutations is None and count <= MOST_EXACT
    expected = (2**count if exact else 3 * count) - len(values)
    with Progress("interaction of blocks", max(expected, 1), quiet=quiet) as progress:

        def value(metric: str) -> Callable[[frozenset[int]], float]:
            def of(blocks: frozenset[int]) -> float:
                if blocks not in values:
                    with exchanged(after, before, sorted(blocks)):
                        values[blocks] = score(after)
                    progress.advance(1)
                return values[blocks][metric]

            return of

        rows = []
        for metric in own["metric"].unique():
            table = marginals(value(metric), count).assign(shapley=np.nan, standard_error=np.nan)
            if exact or permutations:
                found = shapley_values(value(metric), count, permutations=permutations)
                table = table.assign(shapley=found["value"], standard_error=found["standard_error"])
            rows.append(table.assign(metric=metric, n=score.n))
    return pd.concat(rows, ignore_index=True)[list(INTERACTION_COLUMNS)]


def erasure_table(
    after: nn.Module,
    score: TaskScore,
    tasks: Mapping[str, tuple[np.ndarray, Callable[[int], np.ndarray]]],
    hidden: Sequence[int],
    *,
    quiet: bool = True,
) -> pd.DataFrame:
    """Task score after a probing task's labels were erased from one hidden state of all tokens, beside two controls.

    An eraser is affine, so erasing every token and erasing the mean over tokens is the same: what is fitted on
    mean-pooled words or sentences leaves their means without a linear trace of the label. What single tokens, [CLS]
    among them, hold beyond that stays; states pooled by ``first`` erase it from that token instead.

    Args:
        after: the trained classifier.
        score: the metric.
        tasks: by name, label codes of its training items, and a reader of their states by hidden index.
        hidden: hidden indices, from 1 on.
        quiet: no progress on stderr.

    Returns:
        Columns :data:`ERASURE_COLUMNS`. ``eraser`` is ``leace``, ``random`` (a random subspace of the same rank) or
        ``equal-variance`` (the same rank and the same removed variance; left out where no subspace carries it);
        ``removed_variance`` is a share of the states' variance; ``n_fit`` counts items that it was fitted on.
    """
    reference = score.restart()(after)
    unknown = (np.nan, np.nan, score.n)
    rows: list[dict[str, Any]] = []
    repeats = 1 + 2 * CONTROL_DRAWS
    with Progress("erasing labels", len(tasks) * len(hidden) * repeats, quiet=quiet) as progress:
        for task, (labels, read) in tasks.items():
            for h in hidden:
                states = read(h).astype(np.float64)
                total = float(states.var(axis=0).sum())
                for kind, draw, eraser in _erasers(states, labels):
                    with erased(after, h, eraser):
                        found = score(after)
                    removed = eraser.removed_variance(states) / total
                    for name, value in found.items():
                        numbers = (value, reference[name], value - reference[name])
                        where = (task, h, kind, draw, eraser.rank, removed, name)
                        rows.append(dict(zip(ERASURE_COLUMNS, (*where, *numbers, *unknown, len(labels)), strict=True)))
                progress.advance(repeats)
    return score.with_intervals(pd.DataFrame(rows, columns=list(ERASURE_COLUMNS)))


def _erasers(states: np.ndarray, labels: np.ndarray) -> list[tuple[str, int, Eraser]]:
    leace = fit_leace(states, labels)
    found = [("leace", 0, leace)]
    if not leace.rank:
        return found
    found += [("random", i, random_eraser(states, rank=leace.rank, seed=i)) for i in range(CONTROL_DRAWS)]
    variance = leace.removed_variance(states)
    with suppress(UsageError):  # an oblique projection may take away more than any orthogonal one of its rank
        found += [
            ("equal-variance", i, variance_matched_eraser(states, rank=leace.rank, variance=variance, seed=i))
            for i in range(CONTROL_DRAWS)
        ]
    return found


def use_table(after: nn.Module, items: Sequence[Mapping[str, Sequence[int]]], tokenizer: Any) -> pd.DataFrame:
    """Conductance of every block's branches for the class that the model chooses (:mod:`analysis.attribution`).

    The path begins at the mask token, or where there is none at the mean of all embeddings; special tokens stay.

    Args:
        after: the trained classifier.
        items: what the tokenizer gave for each item.
        tokenizer: knows the special tokens.

    Returns:
        Columns :data:`analysis.attribution.COLUMNS`.

    Raises:
        ModelError: the classifier gives no gradient, or its branches were not recognised.
    """
    from analysis.attribution import conductance

    blank = getattr(tokenizer, "mask_token_id", None)
    keep = set(getattr(tokenizer, "all_special_ids", ())) - {blank, getattr(tokenizer, "unk_token_id", None)}
    types = [list(i["token_type_ids"]) for i in items if "token_type_ids" in i]
    return conductance(
        after, [list(i["input_ids"]) for i in items], baseline_id=blank, keep=sorted(keep),
        token_types=types if len(types) == len(items) else None,
    )  # fmt: skip


def retention_by_block(original: LanguageModel, tuned: LanguageModel, text: str, *, quiet: bool = True) -> pd.DataFrame:
    """Bits per token under the original head with each tuned block reverted, on the beginning of a text.

    Args:
        original: the language model before training.
        tuned: the original head on the tuned body.
        text: running text; :data:`TEXT_WINDOWS` windows of :data:`TEXT_WINDOW` tokens are taken.
        quiet: no progress on stderr.

    Returns:
        Columns :data:`CAUSAL_COLUMNS`, metric ``bits_per_token``; a negative ``effect`` is ability regained. So few
        tokens bear no interval (NaN); ``n`` counts them.
    """
    from analysis.token_scores import score
    from analysis.token_scores import windows as text_windows
    from spafit.stacks import find_stacks

    texts = text_windows(original, text, length=TEXT_WINDOW)[:TEXT_WINDOWS]
    tokens: list[int] = []

    def bits(model: Any) -> dict[str, float]:
        found = score(replace(tuned, model=model), texts)
        tokens.append(len(found.log_p))
        return {"bits_per_token": -float(found.log_p.mean()) / float(np.log(2))}

    blocks = windows(find_stacks(tuned.model)[0].num_blocks, "single")
    table = effect(original.model, tuned.model, intervention="revert", blocks=blocks, metric=bits, quiet=quiet)
    return table.assign(ci_low=np.nan, ci_high=np.nan, n=tokens[0])[list(CAUSAL_COLUMNS)]


#: Windows of reverted blocks, by what a row's range is.
Window = Literal["single", "prefix", "suffix"]


def reverted(table: pd.DataFrame, kind: Window, *, metric: str = "score") -> pd.DataFrame:
    """Rows of a causal table that revert single blocks, prefixes or suffixes, in the order of the blocks."""
    rows = table[(table["intervention"] == "revert") & (table["part"] == "block") & (table["metric"] == metric)]
    count = rows["blocks_stop"].max()
    chosen = {
        "single": rows["blocks_stop"] - rows["blocks_start"] == 1,
        "prefix": rows["blocks_start"] == 0,
        "suffix": rows["blocks_stop"] == count,
    }[kind]
    return rows[chosen].sort_values(["blocks_start", "blocks_stop"])
