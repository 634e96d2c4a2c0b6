"""Tables of a comparison's page and Markdown, as texts: one dictionary per row, keys as the header."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis.sequence import forgetting_matrix
from analysis.task_tables import reverted

if TYPE_CHECKING:
    from analysis.comparison import Comparison

#: Rows of the table of weights.
MOST_WEIGHTS = 12
Rows = list[dict[str, str]]


def _number(value: float, *, factor: float = 100.0, digits: int = 1, sign: bool = True) -> str:
    if pd.isna(value):
        return "–"
    rounded = round(factor * value, digits) + 0.0  # a small negative number is not "-0.0"
    return f"{rounded:{'+' if sign else ''}.{digits}f}"


def _numbers(comparison: Comparison, *, sign: bool = True) -> Callable[[float], str]:
    """How scores and their differences are shown: accuracy in points, bits as they are."""
    factor, digits = (100.0, 1) if comparison.metric == "accuracy" else (1.0, 3)
    return lambda value: _number(value, factor=factor, digits=digits, sign=sign)


def summary_rows(comparison: Comparison) -> Rows:
    """Per model and task, at the hidden state where the task could be read best before training."""
    number, plain = _numbers(comparison), _numbers(comparison, sign=False)
    several = len(comparison.stacks) > 1
    return [
        {
            "model": r["model"], "task": r["task"], "level": r["level"], **({"stack": r["stack"]} if several else {}),
            "at": str(r["hidden"]),
            "before": plain(r["pre"]),
            "after": plain(r["recoverable"]), "lost": number(r["lost"]),
            "95 %": f"{number(r['ci_low'])} to {number(r['ci_high'])}", "p": f"{r['p_layers']:.3f}",
            "moved": number(r["moved"]), "re-encoded": number(r["re_encoded"]),
            "largest loss": f"{number(r['worst'])} at {r['worst_hidden']}",
        }
        for r in comparison.summary().to_dict("records")
    ]  # fmt: skip


def weight_rows(comparison: Comparison) -> Rows:
    """The largest changes of weights, by kind of tensor."""
    if comparison.weights is None:
        return []
    table = comparison.weights[comparison.weights["change"] > 0]
    top = table.sort_values("relative", ascending=False, kind="stable").groupby(["model", "kind"], sort=False)
    rows = top.head(MOST_WEIGHTS // 4).sort_values(["model", "kind"], kind="stable")
    return [
        {
            "model": r["model"], "name": r["name"], "kind": r["kind"],
            "relative": _number(r["relative"], factor=1, digits=3, sign=False),
            "stable rank": _number(r["stable_rank"], factor=1, sign=False),
            "rank for 90 %": _number(r["energy_rank"], factor=1, digits=0, sign=False),
            "intruders": _number(r["intruders"], factor=1, digits=0, sign=False),
        }
        for r in rows.to_dict("records")
    ]  # fmt: skip


def retention_rows(comparison: Comparison) -> Rows:
    """Retention over all and by field."""
    if comparison.retention is None:
        return []
    table = comparison.retention
    if "paradigm" in table:
        table = table[table["paradigm"] == "all"]
    rows = table.to_dict("records")
    return [{str(k): _plain(v) for k, v in r.items()} for r in rows]


def _plain(value: Any) -> str:
    if pd.isna(value):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def beside_rows(comparison: Comparison) -> Rows:
    """Forgetting, drift, cause and use of every model, stack and hidden state, one under the other."""
    if len(comparison.stacks) > 1:
        parts = {s: comparison.of_stack(s) for s in comparison.stacks}
        return [{"stack": s, **row} for s, part in parts.items() for row in beside_rows(part)]
    rows = comparison.to_pandas()
    rows = rows[rows["term"].isin(["pre", "lost", "moved", "re-encoded"])]
    mean = rows.groupby(["model", "hidden", "term"], sort=False)["value"].mean().unstack("term")
    number, plain = _numbers(comparison), _numbers(comparison, sign=False)
    found = []
    for r in mean.reset_index().to_dict("records"):
        model, hidden = r["model"], r["hidden"]
        row = {"model": str(model), "hidden": str(hidden)}
        row |= {"pre": plain(r["pre"])} | {t: number(r[t]) for t in ("lost", "moved", "re-encoded")}
        if comparison.drift is not None:
            own = comparison.drift[(comparison.drift["model"] == model) & (comparison.drift["hidden"] == hidden)]
            for measure, label in (
                ("cka", "CKA"),
                ("procrustes_r2", "Procrustes R²"),
                ("mutual_knn", "shared neighbours"),
            ):
                value = own[(own["measure"] == measure) & (own["variant"] == "z-scored")]["value"]
                row[label] = _number(value.iloc[0], factor=1, digits=3, sign=False) if len(value) else "–"
        found.append({**row, **_of_block(comparison, str(model), int(hidden) - 1)})
    return found


def _of_block(comparison: Comparison, model: str, block: int) -> dict[str, str]:
    """Cause and use of the block that made a hidden state; – for the embeddings and where nothing was measured."""
    row: dict[str, str] = {}
    if comparison.causal is not None:
        own = comparison.causal[comparison.causal["model"] == model]
        own = own[(own["blocks_start"] == block) & (own["blocks_stop"] == block + 1)]
        row["score lost, reverted"] = _lost(own, "revert", "block")
        row["score lost, skipped"] = _lost(own, "skip", "block")
    if comparison.use is not None:
        its = comparison.use[(comparison.use["model"] == model) & (comparison.use["block"] == block)]
        for branch in ("attention", "feed-forward"):
            value = its[(its["statistic"] == "abs_sum") & (its["branch"] == branch)]["value"].mean()
            row[f"conductance, {branch}"] = _number(value, factor=1, digits=2, sign=False)
    return row


def _lost(rows: pd.DataFrame, intervention: str, part: str, *, ends: bool = True, sign: int = -1) -> str:
    """Points of score lost (or gained, with ``sign=1``) by an intervention, mean over draws, with its interval."""
    own = rows[(rows["intervention"] == intervention) & (rows["part"] == part) & (rows["metric"] == "score")]
    if own.empty:
        return "–"
    text = _number(sign * own["effect"].mean())
    if not ends or len(own) > 1 or own["ci_low"].isna().any():  # several draws have no common interval
        return text
    low, high = sorted(sign * own[c].iloc[0] for c in ("ci_low", "ci_high"))
    return f"{text} [{_number(low)} {_number(high)}]"


def cause_rows(comparison: Comparison) -> Rows:
    """Per model and block, points of the trained task's score that interventions cost."""
    table = comparison.causal
    if table is None:
        return []
    texts = (table["metric"] == "bits_per_token").any()
    found = []
    for model, own in table.groupby("model", sort=False):
        single, prefix, suffix = reverted(own, "single"), reverted(own, "prefix"), reverted(own, "suffix")
        below, above = prefix.set_index("blocks_stop")["effect"], suffix.set_index("blocks_start")["effect"]
        for block in single["blocks_start"]:
            one = own[(own["blocks_start"] == block) & (own["blocks_stop"] == block + 1)]
            row = {
                "model": str(model), "block": str(block), "reverted": _lost(one, "revert", "block"),
                "with all below": _number(-below[block + 1]), "with all above": _number(-above[block]),
                "gained, transplanted": _lost(one, "transplant", "block", sign=1),
                "skipped": _lost(one, "skip", "block"),
            }  # fmt: skip
            for intervention, label in (("skip", "skipped"), ("resample", "resampled")):
                for part in ("attention", "feed-forward"):
                    row[f"{part} {label}"] = _lost(one, intervention, part, ends=False)
            row |= _interaction(comparison.interaction, str(model), block)
            if texts:
                bits = one[one["metric"] == "bits_per_token"]["effect"]
                row["bits per token, reverted"] = _number(bits.mean(), factor=1, digits=3)
            found.append({**row, "items": str(single["n"].iloc[0])})
    return found


def _interaction(table: pd.DataFrame | None, model: str, block: int) -> dict[str, str]:
    """Points lost when a block is reverted after all others, and its Shapley value."""
    if table is None:
        return {}
    own = table[(table["model"] == model) & (table["metric"] == "score") & (table["block"] == block)]
    return {"reverted last": _number(-own["last"].mean()), "Shapley": _number(-own["shapley"].mean())}


def erasure_rows(comparison: Comparison) -> Rows:
    """Per model, erased task and hidden state, points of the trained task's score that erasing costs."""
    if comparison.erasure is None:
        return []
    table = comparison.erasure[comparison.erasure["metric"] == "score"]
    found = []
    for (model, task, hidden), own in table.groupby(["model", "task", "hidden"], sort=False):
        row = {"model": str(model), "erased": str(task), "hidden": str(hidden)}
        for eraser, label in (("leace", "LEACE"), ("random", "random, same rank"), ("equal-variance", "same variance")):
            its = own[own["eraser"] == eraser]
            row[label] = "–" if its.empty else _number(-its["effect"].mean())
            if eraser == "leace":
                first = its.iloc[0]
                row[label] += f" [{_number(-first['ci_high'])} {_number(-first['ci_low'])}]"
        first = own.iloc[0]
        found.append({
            **row, "rank": str(first["rank"]), "variance, %": _number(first["removed_variance"], sign=False),
            "items": str(first["n"]), "fitted on": str(first["n_fit"]),
        })  # fmt: skip
    return found


def use_rows(comparison: Comparison) -> Rows:
    """Per model and block, conductance of both branches."""
    if comparison.use is None:
        return []
    found = []
    for (model, block), own in comparison.use.groupby(["model", "block"], sort=False):
        row = {"model": str(model), "block": str(block)}
        for branch in ("attention", "feed-forward"):
            its = {r["statistic"]: r for r in own[own["branch"] == branch].to_dict("records")}
            value, low, high = (
                _number(its["abs_sum"][c], factor=1, digits=2, sign=False) for c in ("value", "ci_low", "ci_high")
            )
            row[f"{branch} Σ|·|"] = f"{value} [{low} {high}]"
            row[f"{branch} Σ"] = _number(its["sum"]["value"], factor=1, digits=3)
            row[f"{branch} norm"] = _number(its["norm"]["value"], factor=1, digits=4, sign=False)
        first = own.iloc[0]
        found.append({**row, "items": str(first["n"]), "not converged": str(first["n_failed"])})
    return found


def sequence_rows(comparison: Comparison) -> Rows:
    """Stages × tasks: best accuracy (%) over hidden states after each stage; * marks what the stage trained."""
    if comparison.sequence is None:
        return []
    matrix, trained = forgetting_matrix(comparison.sequence), comparison.run["sequence"]["trained"]
    number = _numbers(comparison, sign=False)
    return [
        {"stage": str(stage)}
        | {str(t): number(v) + "*" * (trained.get(stage) == t) for t, v in matrix.loc[stage].items()}
        for stage in matrix.index
    ]


def markdown(rows: Rows) -> str:
    """Rows as a table that pastes; "" without rows."""
    if not rows:
        return ""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(r.values()) for r in rows)]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
