"""How often the localization test supports, refutes or stays open in simulated worlds, and what it announces.

    python docs/results/simulated_worlds/run.py 1000

takes about a quarter of an hour on one core, and goes on where it stopped. Without arguments only the page is made
again from ``rows.csv``.
"""

# ruff: noqa: E501 - sentences of a page

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

HERE = Path(__file__).parent
SIZES = ((1.0, 1.0), (1.0, 2.0), (2.0, 1.0), (2.0, 2.0))
SHARES = ((0.2, 0.1), (0.2, 0.2), (0.4, 0.1), (0.4, 0.2))
KEY = ["kind", "effects", "counts", "num_blocks", "step", "sd", "share", "share_sd"]
OUTCOMES = ("supported", "refuted", "inconclusive")
PLACED = ("smooth", "segmentation", "near segmentation", "holding", "near holding", "none")


def settings() -> list:
    """Every setting, as :class:`tests.world_rates.Setting`."""
    from tests.world_rates import Setting

    few, even = (2, 3, 5), (4, 4, 4)
    found = [Setting(kind, few, b) for b in (12, 24) for kind in ("flat", "trend", "distributed")]
    found += [Setting("distributed", even)]
    found += [Setting("planted", few, b, *s) for b in (12, 24) for s in SIZES]
    found += [Setting("planted", even, 12, *s) for s in SIZES]
    found += [Setting("planted from the first block", c, b, 2.0, 1.0) for c in (few, even) for b in (12, 24)]
    found += [Setting(None, even, 12, effects=e, share=0.4 * (e == "shuffled")) for e in ("even", "trend", "shuffled")]
    found += [Setting(None, even, b, effects="planted", share=g, share_sd=s) for b in (12, 24) for g, s in SHARES]
    found += [Setting(None, (6, 6, 6), 12, effects="planted", share=g, share_sd=s) for g, s in SHARES]
    found += [
        Setting("planted", even, 12, *s, effects="planted", share=g, share_sd=d)
        for s, (g, d) in zip(SIZES, SHARES, strict=True)
    ]
    return found


def run(n: int) -> None:
    """Simulate every setting that is not in rows.csv yet."""
    sys.path.insert(0, str(HERE.parents[2]))
    from tests.world_rates import simulate

    path = HERE / "rows.csv"
    known = pd.read_csv(path).to_dict("records") if path.is_file() else []
    rows = {tuple(str(r[k]) for k in KEY): r for r in known}
    every = []
    for setting in settings():
        own = {
            "kind": setting.kind or "no curves", "effects": setting.effects,
            "counts": "/".join(map(str, setting.counts)), "num_blocks": setting.num_blocks, "step": setting.step,
            "sd": setting.sd, "share": setting.share, "share_sd": setting.share_sd,
        }  # fmt: skip
        key = tuple(str(v) for v in own.values())
        every.append(key)
        if key in rows:
            continue
        counts = simulate(setting, n)
        rows[key] = (
            own | {"worlds": n, "announced": round(setting.announced(), 4)} | {k: counts[k] for k in OUTCOMES}
            | {k: counts[k] if setting.kind else None for k in PLACED}
        )  # fmt: skip
        _save(rows.values())
        print(rows[key], flush=True)
    _save([rows[key] for key in every])
    write_page()


def _save(rows: Iterable[dict]) -> None:
    pd.DataFrame(rows).astype(dict.fromkeys(PLACED, "Int64")).to_csv(HERE / "rows.csv", index=False)


def write_page() -> None:
    """README.md and power.png from rows.csv."""
    table = pd.read_csv(HERE / "rows.csv")
    table["error"] = [_error(s / n, n) for s, n in zip(table["supported"], table["worlds"], strict=True)]
    planted = table[table["announced"].notna()]
    nothing = table[table["announced"].isna()]
    away = (planted["supported"] / planted["worlds"] - planted["announced"]).abs()
    n = int(table["worlds"].min())
    most = nothing.loc[(nothing["supported"] / nothing["worlds"]).idxmax()]
    _draw(planted)
    lines = [
        "# The localization test in simulated worlds",
        "",
        f"The shipped hypothesis (level .05, margin 10 % of the depth, tasks as units) on at least {n:,} worlds of each setting. *No structure*: flat curves, or one smooth trend (linear, quadratic or saturating) that all tasks share. *Distributed*: each task enters at one to three depths of its own, anywhere, whatever its type; or interventions harm each task elsewhere, whatever its type. *Planted*: tasks emerge around their type's depth (so many layers between successive types, tasks of one type scattering by so many), or a share of an intervention's effect falls in a type's own third beside what falls evenly. Measured bits have a standard error of .03, a task's largest bits lie between .5 and 1.5. Made by `python docs/results/simulated_worlds/run.py` from `rows.csv`; worlds are in `tests/worlds.py`.",
        "",
        "![Announced power and the share of supported verdicts](power.png)",
        "",
        "## Where nothing is planted",
        "",
        "| world | interventions | tasks | blocks | supported | refuted | inconclusive | no strata |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in nothing.to_dict("records"):
        lines.append(f"| {_start(row)} | {_outcomes(row)} | {_share(row, 'smooth')} |")
    lines += [
        "",
        "Tasks: surface/syntax/semantics. ± is one binomial standard error. No strata: three segments do not predict left-out tasks better than every smooth depth profile.",
        "",
        "## Where localization is planted",
        "",
        "*Announced* is what `spafit localize --dry-run` prints for the verdict *supported*: with curves and interventions, that L1, L2 and L3 hold in one world and none is refuted.",
        "",
        "| world | interventions | tasks | blocks | layers, sd | share, sd | announced | supported | refuted | inconclusive |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in planted.to_dict("records"):
        layers = f"{row['step']:g}, {row['sd']:g}" if row["step"] else "—"
        share = f"{row['share']:g}, {row['share_sd']:g}" if row["share"] else "—"
        lines.append(f"| {_start(row)} | {layers} | {share} | {row['announced']:.3f} | {_outcomes(row)} |")
    lines += [
        "",
        "## Boundaries from probing alone",
        "",
        "What places the boundaries, and in how many of these worlds both are within one block of the true ones. Segmentation: where the second and the third type begin, in worlds whose first type the first block writes; else half-way between the types' depths, where that is a whole block. Holding rule: where the curves without noise hold 95 % of what the basic types, and semantics, ever reach. Too weak: an interval spans more than a third of the depth, and a preset is written with that reason.",
        "",
        "| world | tasks | blocks | layers, sd | announced | no strata | segmentation | within one block | holding rule | within one block | too weak | within one block, of all |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    strata = table[(table["step"] > 0) & (table["effects"] == "none")]
    for row in strata.to_dict("records"):
        known = row["step"] == 2 or "first block" in row["kind"]
        near = _of(row, "near segmentation", "segmentation") if known else "—", _of(row, "near holding", "holding")
        every = f"{(row['near segmentation'] + row['near holding']) / row['worlds']:.3f}" if known else "—"
        lines.append(
            f"| {row['kind']} | {row['counts']} | {row['num_blocks']} | {row['step']:g}, {row['sd']:g} | {row['announced']:.3f} | {_share(row, 'smooth')} | {row['segmentation']:.0f} | {near[0]} | {row['holding']:.0f} | {near[1]} | {row['none']:.0f} | {every} |"
        )
    strong = strata[strata["announced"] >= 0.9]
    placed = strong["segmentation"] + strong["holding"]
    within = strong["near segmentation"] + strong["near holding"]
    three = strong[strong["kind"] == "planted"]
    lowest = strong.loc[(within / strong["worlds"]).idxmin()]
    lines += [
        "",
        "## What this shows, and what it does not",
        "",
        f"- Where nothing is planted, *supported* came up in {_rate(most)} of the worlds at most ({most['kind']}{'' if most['effects'] == 'none' else ', effects ' + most['effects']}, {most['counts']} tasks, {most['num_blocks']} blocks).",
        f"- Announced power and the share of *supported* differ by {away.max():.3f} at most, {away.mean():.3f} on average, over {len(planted)} settings. The simulation behind the announced power has a standard error of .011 at most of its own.",
        "- The announced power is that of tasks that scatter as assumed and can all be dated. Tasks that cannot be dated lower it; L4 is no part of it.",
        "- The segmentation asks for places that tasks share. Tasks that scatter by a layer or two around their type's depth make a smooth profile together, so three segments seldom win although each type has a depth of its own, and the holding rule places the boundaries.",
        f"- Where the announced power is .9 or more and a criterion places the boundaries, both are within one block of the true ones in {within.sum() / placed.sum():.3f} of the worlds ({(within / placed).min():.3f} in the setting with the fewest). Worlds in which the evidence is called too weak to place them count against it in the last column: there it is {within.sum() / strong['worlds'].sum():.3f}, and {(within / strong['worlds']).min():.3f} in the lowest ({lowest['kind']}, {lowest['counts']} tasks, {lowest['num_blocks']} blocks).",
        f"- Where all three types rise above the first block, two cuts have to stand for three rises: where the segmentation wins there (announced power .9 or more), it is within one block of the places half-way between types in {three['near segmentation'].sum():.0f} of {three['segmentation'].sum():.0f} worlds only.",
        "- With 24 blocks and one layer between types, the last type lies two layers above the first, which is less than the margin of 2.4: some such worlds are refuted, rightly.",
        "",
    ]
    (HERE / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _error(rate: float, n: int) -> float:
    return math.sqrt(rate * (1 - rate) / n)


def _rate(row: dict | pd.Series) -> str:
    return f"{row['supported'] / row['worlds']:.3f} ± {_error(row['supported'] / row['worlds'], row['worlds']):.3f}"


def _start(row: dict) -> str:
    return f"{row['kind']} | {row['effects']} | {row['counts']} | {row['num_blocks']}"


def _outcomes(row: dict) -> str:
    return " | ".join([_rate(row), *(f"{row[k] / row['worlds']:.3f}" for k in OUTCOMES[1:])])


def _share(row: dict, column: str) -> str:
    return "—" if row[column] != row[column] else f"{row[column] / row['worlds']:.3f}"


def _of(row: dict, part: str, whole: str) -> str:
    return "—" if not row[whole] else f"{row[part] / row[whole]:.3f}"


def _draw(planted: pd.DataFrame) -> None:
    from spafit import plotting

    groups = {
        "order (L1)": planted["effects"] == "none",
        "ranges and dissociation (L2, L3)": planted["kind"] == "no curves",
        "all three": (planted["effects"] != "none") & (planted["kind"] != "no curves"),
    }
    with plotting.style():
        figure = plotting.new_figure(width=4.6, height=4.4)
        ax = figure.add_subplot()
        ax.fill_between([0, 1], [-0.05, 0.95], [0.05, 1.05], color=plotting.MUTED, alpha=0.15, linewidth=0)
        ax.plot([0, 1], [0, 1], color=plotting.MUTED, linewidth=1)
        for (label, own), color, marker in zip(groups.items(), plotting.MODEL_COLORS, "os^", strict=False):
            part = planted[own]
            ax.errorbar(
                part["announced"], part["supported"] / part["worlds"], yerr=1.96 * part["error"], fmt=marker,
                color=color, markersize=4.5, linewidth=1, label=f"{label}: {len(part)} settings",
            )  # fmt: skip
        ax.set(xlabel="announced power", ylabel="share of worlds called supported", xlim=(-0.03, 1.03))
        ax.set_ylim(-0.03, 1.03)
        ax.legend(loc="upper left", title="band: ± .05; bars: 95 %", title_fontsize=8)
    plotting.save_figure(figure, HERE / "power.png", dpi=110)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run(int(sys.argv[1]))
    else:
        write_page()
