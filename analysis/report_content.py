"""What a report says, as plain numbers and sentences: one content for the page and for the Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from probing.measure_displays import measure_rows
from probing.metrics import shown_metric
from probing.tables import (
    MISSING,
    VARIANT,
    TaskRow,
    best_words,
    bracket,
    number,
    ordered_tasks,
    overview,
    primary_split,
    reported,
    scores_word,
    short_names,
    variants,
)
from spafit import plotting

if TYPE_CHECKING:
    from analysis.run_suggestion import StackSuggestions
    from analysis.strata_suggestion import StrataSuggestion
    from probing.results import ProbeResults

_CONTROLS = {
    "none": "model",
    "random-encoder": "random encoder",
    "difference:random-encoder": "model − random",
    "word-type": "control task",
    "difference:word-type": "selectivity",
    **{
        key: words
        for control, name in (
            ("permuted-weights", "permuted weights"), ("permuted-order", "permuted word order"),
            ("bag-of-words", "bag of words"), ("tf-idf", "TF-IDF"), ("length", "length"),
            ("majority-per-word", "majority per word"),
        )
        for key, words in ((control, name), (f"difference:{control}", f"model − {name}"))
    },
}  # fmt: skip
_METRICS = {
    "r2": "R²",
    "micro_f1": "F1 over all labels",
    "accuracy": "Accuracy",
    "bits": "Bits saved per item",
    "macro_f1": "Macro-averaged F1",
    "spearman": "Rank correlation (Spearman)",
    "uuas": "Edges found (UUAS)",
    "dspr": "Rank correlation of distances (DSpr.)",
    "nspr": "Rank correlation of depths (NSpr.)",
    "root_accuracy": "Root accuracy",
}
_STATISTICS = {
    "best": "best hidden state",
    "first_within_1se": "first hidden state within 1 SE of the best",
    "emergence_cog": "emergence centre of gravity (hidden state)",
    "total_gain": "gain over the lowest hidden state (bits)",
}


def report_content(
    results: ProbeResults, *, verdict: Mapping[str, Any] | None, suggestion: StrataSuggestion | StackSuggestions | None
) -> dict[str, Any]:
    """Everything that both forms of the report show, except the figures and the item browser."""
    run, rows = results.run, overview(results.scores, results.summaries)
    names = short_names([t for _, t in ordered_tasks(results.scores)])
    return {
        "model": str(run.get("model", {}).get("name", "model")),
        "facts": _facts(run, results.scores),
        "limit": _limit(run),
        "command": run.get("command", ""),
        "score": scores_word(rows),
        "overview": [_overview_row(r, names, rows) for r in rows],
        "details": [_detail(results, task, level, names) for level, task in ordered_tasks(results.scores)],
        "failed": [
            (name, str(facts.get("error", "")))
            for name, facts in run.get("tasks", {}).items()
            if facts.get("status") == "failed"
        ],
        "measures": [] if results.measures is None else measure_rows(results.measures, results.summaries),
        "verdict": None if verdict is None else _verdict(verdict),
        "strata": None if suggestion is None else _strata(suggestion),
        "notes": [str(n) for n in run.get("warnings", [])],
        "caveats": caveats(run, results.scores, results.summaries, tested=False if suggestion is not None else None),
        "seconds": _seconds(run.get("seconds", {})),
        "versions": [(str(k), str(v)) for k, v in run.get("versions", {}).items()],
        "interval": plotting.INTERVAL,
    }


def _facts(run: Mapping[str, Any], scores: pd.DataFrame) -> list[tuple[str, str]]:
    model = run.get("model", {})
    stacks = model.get("stacks") or (
        model["blocks"]
        if isinstance(model.get("blocks"), dict)
        else {model.get("stack", "blocks"): model.get("blocks")}
    )
    blocks = ", ".join(f"{name} {n}" for name, n in stacks.items() if n is not None)
    digest = str(model.get("weights_digest") or model.get("digest") or "")
    tasks = run.get("tasks", {})
    done = scores["task"].nunique()
    probed = ", ".join(dict.fromkeys(scores["stack"].astype(str)))
    facts = [
        ("Model", " · ".join(str(x) for x in (model.get("name"), model.get("reference")) if x)),
        ("Revision", str(model.get("revision") or "")),
        ("Weights", f"SHA-256 {digest[:16]}…" if digest else ""),
        ("Blocks", f"{blocks} (probed: {probed})" if blocks else probed),
        ("Width", _thousands(model.get("width"))),
        ("Parameters", _thousands(model.get("parameters"))),
        ("Tasks", f"{done} of {max(len(tasks), done)} finished"),
        ("Texts", _thousands(run.get("texts"))),
        ("Cut at the window", f"{int(run.get('truncated') or 0):,} texts"),
        ("Pooling", ", ".join(dict.fromkeys(scores["pooling"].astype(str)))),
        ("Sites", ", ".join(dict.fromkeys(scores["site"].astype(str)))),
        ("Probe", ", ".join(dict.fromkeys(scores["probe"].astype(str)))),
        ("Seeds", ", ".join(str(s) for s in run.get("seeds", []))),
        ("Device, precision", " · ".join(str(run[k]) for k in ("device", "dtype") if run.get(k))),
        ("Date", str(run.get("created_at", ""))),
    ]
    facts += [("Limit", limit)] if (limit := _limit(run)) else []
    facts += [("Note", str(n)) for n in model.get("notes", []) if n not in run.get("warnings", [])]
    return [(k, v) for k, v in facts if v]


def _overview_row(row: TaskRow, names: Mapping[str, str], rows: Sequence[TaskRow]) -> dict[str, Any]:
    same = [r for r in rows if r.task == row.task]
    several = [i for i in range(4) if len({r.variant[i] for r in same}) > 1]
    return {
        "level": row.level,
        "task": names[row.task],
        "variant": " · ".join(row.variant[i] for i in several),
        "best": best_words(row, rows),
        "at": MISSING if row.at is None else str(row.at),
        "first": MISSING if row.first is None else str(row.first),
        "cog": bracket(row.cog, row.cog_low, row.cog_high, digits=2),
        "gap": number(row.gap, sign=True),
        "selectivity": number(row.selectivity, sign=True),
        "chance": number(row.chance),
        "n": f"{row.n:,}",
        "bars": _bars(row),
    }


def _bars(row: TaskRow) -> list[float]:
    """Heights from 0 (chance) to 1 (best) per hidden state; missing and below chance: 0."""
    x = np.asarray(row.curve, dtype=float)
    top = row.best - row.chance
    scaled = (x - row.chance) / top if np.isfinite(top) and top > 0 else np.zeros_like(x)
    return [round(float(v), 3) for v in np.clip(np.nan_to_num(scaled), 0, 1)]


def _detail(results: ProbeResults, task: str, level: str, names: Mapping[str, str]) -> dict[str, Any]:
    facts = results.run.get("tasks", {}).get(task, {})
    rows = reported(results.scores)
    rows = rows[rows["task"] == task]
    n_test = facts.get("n_test", {})
    tested = n_test if isinstance(n_test, dict) else {primary_split(rows, task): n_test}
    items = [("training", facts.get("n_train")), ("dev", facts.get("n_dev")), *tested.items()]
    about = [
        ("Level, unit", " · ".join(str(x) for x in (level, facts.get("unit")) if x)),
        ("Items", ", ".join(f"{int(v):,} {k}" for k, v in items if v is not None)),
        ("Classes", str(int(rows["n_classes"].iloc[0]) or "")),
        ("Source", str(facts.get("source") or "")),
        ("Licence", str(facts.get("licence") or "")),
        ("Citation", str(facts.get("citation") or "")),
    ]
    fits = rows.loc[rows["control"] == "none"]
    unconverged = int((~fits["converged"].astype(bool)).sum())
    return {
        "task": names[task],
        "name": task,
        "level": level,
        "description": str(facts.get("description") or ""),
        "about": [(k, v) for k, v in about if v],
        "notes": [str(n) for n in facts.get("notes", [])],
        "unconverged": unconverged,
        "tables": [t for v in variants(rows, task) for m in _METRICS for t in _score_tables(rows, v, m)],
        "summaries": _summaries(results.summaries, task),
    }


def _score_tables(rows: pd.DataFrame, variant: Sequence[str], metric: str) -> list[dict[str, Any]]:
    """The metric's table, a row per hidden state and a column per split and control; no table if there are no rows."""
    keep, shown = rows["metric"] == metric, shown_metric(rows["metric"])
    for column, value in zip(VARIANT, variant, strict=True):
        keep &= rows[column].astype(str) == value
    part = rows[keep]
    if part.empty:
        return []
    first = primary_split(part, str(part["task"].iloc[0]))
    splits = sorted(dict.fromkeys(part["split"]), key=lambda s: (s != first, s))
    columns = [
        (split, control)
        for split in splits
        for control in sorted(
            dict.fromkeys(part.loc[part["split"] == split, "control"]),
            key=lambda c: (list(_CONTROLS).index(c) if c in _CONTROLS else len(_CONTROLS), c),
        )
    ]
    hidden = sorted(int(h) for h in part["hidden"].unique())
    cells = {
        (split, control): dict(
            zip(group["hidden"], group[["value", "ci_low", "ci_high"]].to_numpy(float).tolist(), strict=True)
        )
        for (split, control), group in part.groupby(["split", "control"], sort=False)
    }

    def cell(key: tuple[str, str], h: int) -> str:
        return bracket(*cells[key][h]) if h in cells[key] else MISSING

    return [
        {
            "title": _METRICS[metric],
            "variant": " · ".join(variant),
            "splits": [(s, sum(c[0] == s for c in columns)) for s in splits],
            "columns": [(split, _CONTROLS.get(control, control)) for split, control in columns],
            "rows": [(str(h), [cell(key, h) for key in columns]) for h in hidden],
            "chance": {
                s: number(float(part.loc[part["split"] == s, "chance"].iloc[0])) for s in splits if metric == shown
            },
        }
    ]


def _summaries(summaries: pd.DataFrame, task: str) -> list[dict[str, str]]:
    if summaries.empty:
        return []
    rows = summaries[summaries["task"] == task]
    found = []
    for r in rows.to_dict("records"):
        value, low, high = (float("nan") if pd.isna(r[c]) else float(r[c]) for c in ("value", "ci_low", "ci_high"))
        whole = r["statistic"] in ("best", "first_within_1se") and all(not v % 1 for v in (value, low, high))
        found.append(
            {
                "statistic": _STATISTICS.get(str(r["statistic"]), str(r["statistic"])),
                "of": _of(str(r["metric"]), str(r["control"])),
                "variant": " · ".join(str(r[c]) for c in VARIANT),
                "value": bracket(value, low, high, digits=0 if whole else 2),
                "note": "" if pd.isna(r["note"]) else str(r["note"]),
            }
        )
    return found


def _of(metric: str, control: str) -> str:
    control = control.removeprefix("difference:")
    return metric.replace("_", " ") if control == "none" else f"{metric.replace('_', ' ')} − {control}"


def _verdict(verdict: Mapping[str, Any]) -> dict[str, Any]:
    def figure(value: Any, digits: int = 2) -> str:
        return MISSING if value is None else f"{value:.2g}" if abs(value) < 0.001 else number(value, digits=digits)

    conditions = []
    for c in verdict.get("conditions", []):
        interval = c.get("interval")
        conditions.append(
            {
                "name": str(c["name"]),
                "tested": bool(c["tested"]),
                "number": figure(c.get("number")),
                "interval": MISSING if interval is None else f"[{figure(interval[0])} {figure(interval[1])}]",
                "p": figure(c.get("p"), 4),
                "smallest_p": figure(c.get("smallest_p"), 4),
                "power": figure(c.get("power")),
                "sentence": str(c.get("sentence", "")),
            }
        )
    depths = [
        {
            "task": str(t["task"]),
            "level": str(t["level"]),
            "depth": bracket(
                *(float("nan") if t.get(k) is None else t[k] for k in ("depth", "ci_low", "ci_high")), digits=2
            ),
            "used": "yes" if t.get("used") else "no",
            "note": str(t.get("note") or ""),
        }
        for t in verdict.get("tasks", [])
    ]
    return {
        "verdict": str(verdict["verdict"]),
        "sentence": str(verdict["sentence"]),
        "tested": str(verdict.get("tested", "")),
        "conditions": conditions,
        "depths": depths,
        "alpha": figure(verdict.get("alpha")),
        "delta": figure(verdict.get("delta")),
        "digest": str(verdict.get("hypothesis_digest") or "")[:16],
    }


def _strata(suggestion: StrataSuggestion | StackSuggestions) -> dict[str, Any]:
    config = suggestion.config
    stacks: dict[str, list[dict[str, Any]]] = {}
    for s in config.strata:
        start, stop = s.blocks
        if stop > start:
            words = f"block {start}" if stop - start == 1 else f"blocks {start}–{stop - 1}"
            shade = round(100 * plotting.stratum_shade(s.method) * 1.6)
            stacks.setdefault(s.stack, []).append(
                {"method": s.method, "words": words, "blocks": stop - start, "shade": max(shade, 3)}
            )
    explanation = [line for line in suggestion.explain().split("\n") if line.strip()]
    return {"stacks": stacks, "explanation": explanation, "yaml": config.to_yaml()}


def _limit(run: Mapping[str, Any]) -> str:
    limit = (run.get("config") or {}).get("limit")
    if not limit:
        return ""
    return f"Only the first {int(limit):,} items of each split were used (--limit): no evidence, a quick look."


def _undated(summaries: pd.DataFrame) -> int:
    """Number of tasks without a date on the curves that the verdict uses: bits, above the random encoder if it ran."""
    if summaries.empty:
        return 0
    used = summaries[(summaries["statistic"] == "emergence_cog") & (summaries["metric"] == "bits")]
    used = used[used["control"] == ("random-encoder" if (used["control"] == "random-encoder").any() else "none")]
    if (used["site"] == "block").any():
        used = used[used["site"] == "block"]
    return int(used.drop_duplicates("task")["value"].isna().sum())


def _seconds(seconds: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(str(k), f"{float(v):.1f}") for k, v in seconds.items() if v is not None]


def _thousands(value: Any) -> str:
    return "" if value is None else f"{int(value):,}"


def caveats(
    run: Mapping[str, Any], scores: pd.DataFrame, summaries: pd.DataFrame, *, tested: bool | None = None
) -> list[str]:
    """When not to trust these results: what this run's design and numbers leave open, most specific first.

    Args:
        run: content of ``run.json``.
        scores: table of scores.
        summaries: table of summaries.
        tested: whether the strata were compared with baselines by training; None if there are none.
    """
    rows = reported(scores)
    own = rows[rows["control"] == "none"]
    found = []
    if limit := _limit(run):
        found.append(limit)
    if int(own["n_seeds"].max()) == 1:
        found.append("One fit per point: the intervals leave out the variation between training draws. Use more seeds.")
    if "random-encoder" not in set(rows["control"]):
        found.append(
            "No random-weight encoder was run, so what the architecture gives without training is not subtracted, and "
            "a rising curve may be no sign of learnt knowledge."
        )
    if bad := int((~own["converged"].astype(bool)).sum()):
        found.append(f"{bad:,} of {len(own):,} rows rest on fits that did not converge; their scores may be too low.")
    if empty := _undated(summaries):
        found.append(
            f"The depth of emergence is suppressed for {empty} task{'s' if empty > 1 else ''}: the score is never "
            "above its control, or its gain over layers is within noise, and says nothing about order."
        )
    if own["pooling"].nunique() == 1:
        found.append(
            f"One pooling was used ({own['pooling'].iloc[0]}). Another can move curves by several layers "
            "(Niu et al. 2022)."
        )
    found += [
        "A probe shows what can be read from a state, not what the model uses (Elazar et al. 2021).",
        "Which task stands for which level is an assumption; regroup the tasks and look whether the verdict stays.",
        "The best hidden state of a flat curve is noise: read the first within one standard error, or the emergence "
        "centre of gravity, with its interval.",
        "The numbers are about this checkpoint. A claim about a method or a family needs several trained models.",
    ]
    if tested is False:
        found.append(
            "Where knowledge sits does not by itself tell where to tune (Hase et al. 2023). The strata are untested "
            "until training runs compare them with baselines."
        )
    return found
