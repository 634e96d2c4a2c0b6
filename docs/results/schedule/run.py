"""A static plan against plans that change while they train, on MiniLM: real runs, their rows, and the page made of them.

    python docs/results/schedule/run.py run GLUE_FOLDER WORK [METHOD …]

``WORK`` keeps the trainings, so that the same command goes on where it was interrupted; what the committed rows hold is
not made again. Without arguments only the page is made again.
"""

# ruff: noqa: E501 - sentences of a page

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from spafit.scheduling import Schedule
    from spafit.strata import StrataConfig

HERE = Path(__file__).parent
ITEMS, SEEDS, BLOCKS = 600, (0, 1, 2), 6
#: Steps between two looks, at the held-out items and at forgetting, and of a training.
EVERY, STEPS = 15, 180
#: The rules on forgetting read the first one; the second is measured of every run and read by none.
READ, UNREAD = "core.tense", "core.voice"
TOLERANCE = 0.02
METHODS = {
    "static": "every block trains by LoRA of rank 8 and biases, from the first step to the last",
    "timetable: freeze": "the lower half freezes after half of the steps",
    "timetable: rank": "rank 2 at first, 8 after a third of the steps, 4 in the last third",
    "unfreeze": "the upper two blocks at first, one more at each plateau of the held-out score",
    "freeze": "the lowest trained block freezes at each plateau of the held-out score",
    "forgetting: freeze": f"the lowest two trained blocks freeze where {READ} has lost more than {TOLERANCE} of accuracy",
    "forgetting: restore": "the same, and their values go back to those before training",
    "forgetting: slow": "the same limit; all blocks' learning rates are halved",
    "gradient: freeze": "the lowest trained block freezes where its ‖g‖/‖θ‖ is below half of the largest",
    "gradient: rates": "rates by each block's share of the largest ‖g‖/‖θ‖",
}


def schedule_of(method: str) -> Schedule | None:
    """The rules of a method."""
    from spafit.scheduling import At, OnGradient, OnPlateau, OnSignal, Schedule

    def on(do: str) -> OnSignal:
        return OnSignal(f"lost:{READ}", TOLERANCE, "rises", do=do, blocks=2, keep=2)  # type: ignore[arg-type]

    rules = {
        "timetable: freeze": (At(share=0.5, boundaries=(3, 3)),),
        "timetable: rank": (At(share=1 / 3, rank=8), At(share=2 / 3, rank=4)),
        "unfreeze": (OnPlateau("unfreeze", start=2),),
        "freeze": (OnPlateau("freeze", keep=2),),
        "forgetting: freeze": (on("freeze"),),
        "forgetting: restore": (on("restore"),),
        "forgetting: slow": (on("slow"),),
        "gradient: freeze": (OnGradient("freeze", every=EVERY, below=0.5, keep=2),),
        "gradient: rates": (OnGradient("rates", every=EVERY),),
    }
    return Schedule(rules[method], min_steps=EVERY, cool_down=2 * EVERY) if method in rules else None


def plan_of(method: str) -> StrataConfig:
    """The plan that a method begins with."""
    from spafit.strata import StrataConfig, Stratum
    from spafit.stratum import LoraOptions

    rank = 2 if method == "timetable: rank" else 8
    own = (Stratum("encoder", (0, BLOCKS), "lora+bitfit", lora=LoraOptions(rank=rank)),)
    return StrataConfig("all-MiniLM-L6-v2", {"encoder": BLOCKS}, own)


def run(glue: Path, work: Path, methods: tuple[str, ...]) -> None:
    """Train every method and seed that the rows lack, and write their rows one by one."""
    from analysis.trajectory import forgetting_signal
    from spafit.data.training import glue_data
    from spafit.heads import tokenizer_of
    from spafit.settings import TrainSettings
    from spafit.training import fit

    data = glue_data("sst2", glue).limited(ITEMS, seed=0)
    settings = TrainSettings(epochs=3, batch_size=8, select_share=0.2, save_steps=EVERY, learning_rate=1e-3)
    for method in methods or tuple(METHODS):
        for seed in SEEDS:
            rows = _rows("rows")
            if rows is not None and ((rows["method"] == method) & (rows["seed"] == seed)).any():
                continue
            rules = schedule_of(method)
            every = EVERY if rules is not None and rules.readings else STEPS  # it changes no weight
            signal = forgetting_signal(
                tokenizer_of(None), (READ, UNREAD), train_items=200, test_items=200, every=every, share=1e3
            )
            result = fit(
                None, plan_of(method), data=data, settings=settings, seeds=(seed,), signals=(signal,), device="cpu",
                out=work / method.replace(": ", "-") / str(seed), schedule=rules, method=method, quiet=True,
            )  # fmt: skip
            _add(method, seed, result)


def _add(method: str, seed: int, result: object) -> None:
    from spafit import io
    from spafit.fit_result import FitResult

    assert isinstance(result, FitResult)
    assert result.signals is not None
    run = io.read_json(result.folder / f"seed-{seed}" / "run.json")
    runs = result.runs.set_index("metric")["value"]
    lost = {
        task: result.signals[result.signals["signal"] == f"lost:{task}"].groupby("step")["value"].mean()
        for task in (READ, UNREAD)
    }
    last = max(lost[READ].index)
    row = {
        "method": method, "seed": seed, "accuracy": runs["accuracy"], "best_step": run["best_step"],
        **{f"{what}_{when}": lost[task].loc[step] for what, task in (("read", READ), ("unread", UNREAD))
           for when, step in (("kept", run["best_step"]), ("last", last))},
        "changes": 0 if result.schedule is None else result.schedule["step"][result.schedule["rule"] != "start"].nunique(),
    }  # fmt: skip
    tables = {"rows": pd.DataFrame([row]).round(4)}
    if result.schedule is not None and len(result.schedule):
        own = result.schedule.drop(columns=["label"]).assign(method=method)
        tables["changes"] = own[["method", *own.columns[:-1]]]
    for name in reversed(tables):  # the row last, since it says that all is there
        before = _rows(name)
        table = tables[name] if before is None else pd.concat([before, tables[name]], ignore_index=True)
        table.to_csv(HERE / f"{name}.csv", index=False)


def _rows(name: str) -> pd.DataFrame | None:
    file = HERE / f"{name}.csv"
    return pd.read_csv(file) if file.is_file() else None


# ---------------------------------------------------------------- the page


def write_page() -> None:
    """The page from the committed rows."""
    rows, changes = _rows("rows"), _rows("changes")
    assert rows is not None
    lines = [
        "# Plans that change while they train", "",
        f"The built-in MiniLM ({BLOCKS} blocks) on {ITEMS} items of SST-2, a fifth of them held out, three epochs of batches of 8, "
        f"seeds {', '.join(map(str, SEEDS))}. Each method's plan lets every block train by LoRA and biases at a rate of 1e-3; "
        "the checkpoint is chosen on the held-out items, and the accuracy is that of SST-2's development set (872 items: one "
        "standard error is 1.4 points). *lost*: accuracy of fresh probes on a task's hidden states before training minus "
        f"that at a step, the mean over hidden states, on 200 items. Rules on forgetting read {READ}; {UNREAD} is read by none. "
        "*kept*: of the checkpoint that was chosen; *last*: after the last step.", "",
        "Made by `python docs/results/schedule/run.py` from the CSV files beside it.", "",
        f"| method | accuracy | against static | {READ} lost, kept | last | {UNREAD} lost, kept | last | changes |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    static = rows[rows["method"] == "static"].set_index("seed")["accuracy"]
    for method in METHODS:
        own = rows[rows["method"] == method].set_index("seed").sort_index()
        if not len(own):
            continue
        gains = 100 * (own["accuracy"] - static).dropna()
        against = "" if method == "static" else ", ".join(f"{g:+.1f}" for g in gains)
        cells = [_spread(own[c]) for c in ("accuracy", "read_kept", "read_last", "unread_kept", "unread_last")]
        lines.append(
            f"| {method} | {cells[0]} | {against} | {' | '.join(cells[1:])} | {', '.join(map(str, own['changes']))} |"
        )
    lines += [
        "",
        "Mean ± standard deviation over seeds; points against the static plan, and numbers of changes, seed by seed.",
        "",
    ]
    lines += [f"- {method}: {what}." for method, what in METHODS.items() if method in set(rows["method"])]
    missing = [m for m in METHODS if (rows["method"] == m).sum() < len(SEEDS)]
    if missing:
        lines += ["", f"Not run yet, or not with every seed: {', '.join(missing)}."]
    lines += ["", "## What is in these numbers, and what is not", "", *_said(rows)]
    if changes is not None:
        lines += [
            "",
            f"## What changed, seed {SEEDS[0]}",
            "",
            "| method | step | what | before | after | reason |",
            "|---|---|---|---|---|---|",
        ]
        for row in changes[(changes["seed"] == SEEDS[0]) & (changes["rule"] != "start")].to_dict("records"):
            cells = [str(row[c]).replace("|", "/") for c in ("method", "step", "what", "before", "after", "reason")]
            lines.append(f"| {' | '.join(cells)} |")
    from spafit.io import write_text

    write_text(HERE / "README.md", "\n".join([*lines, ""]))


def _said(rows: pd.DataFrame) -> list[str]:
    """Sentences that follow from the rows: what every seed agrees on, and what none of this shows."""
    static = rows[rows["method"] == "static"].set_index("seed")
    found = []
    for column, what in (("accuracy", "accuracy"), ("read_last", f"{READ} lost"), ("unread_last", f"{UNREAD} lost")):
        better = {"accuracy": 1}.get(column, -1)
        signs: dict[str, list[str]] = {"better": [], "worse": []}
        for method in METHODS:
            own = rows[rows["method"] == method].set_index("seed")[column]
            gains = better * (own - static[column]).dropna()
            if method != "static" and len(gains) == len(SEEDS):
                signs["better"] += [method] * bool((gains > 0).all())
                signs["worse"] += [method] * bool((gains < 0).all())
        said = "; ".join(f"{k} with every seed: {', '.join(v) or 'none'}" for k, v in signs.items())
        found.append(f"- {what}{'' if column == 'accuracy' else ', last'}, against the static plan: {said}.")
    found.append(
        f"- With {len(SEEDS)} seeds, agreement of all has a chance of one in four for a method that changes nothing, and "
        "all methods are compared with the same three static runs, so that these lists are hints and no results. One model, one task, one learning rate: that of the static plan."
    )
    return found


def _spread(values: pd.Series) -> str:
    return f"{values.mean():.3f} ± {values.std():.3f}" if len(values) > 1 else f"{values.mean():.3f}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        run(Path(sys.argv[2]), Path(sys.argv[3]), tuple(sys.argv[4:]))
    write_page()
