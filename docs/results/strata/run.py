"""Pilot, suggestion, race and confirmation on real models and tasks: the runs, their rows, and the page made from them.

    python docs/results/strata/run.py run MODEL TASK DATA WORK

``MODEL`` is ``minilm`` (the built-in model) or ``mpnet=FOLDER``; ``TASK`` is ``sst2`` or ``stsb``, in GLUE's files in
``DATA``. ``WORK`` keeps what is slow: the same command goes on where it was interrupted. Without arguments only the
page is made again.
"""

# ruff: noqa: E501 - sentences of a page

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from analysis.race_result import RaceResult

HERE = Path(__file__).parent
ITEMS = 1500
SEEDS, CONFIRM = (0,), (100, 101, 102, 103, 104)
#: What should not be forgotten.
TASKS = (
    "core.previous_word", "core.next_word", "core.bigram_shift", "core.subject_number", "core.verb_number",
    "core.main_verb", "core.voice", "core.distant_subject", "core.tense", "core.odd_thing", "core.agent", "core.earlier",
    "core.denied",
)  # fmt: skip
#: Bits of a probe that may be lost, the mean over tasks, for the suggestion with a limit.
TOLERANCE = 0.02
MINUTES = {"minilm": 120.0, "mpnet": 300.0}


def run(model: str, task: str, data_folder: Path, work: Path) -> None:
    """Everything for one model and task; rows are written when the race ends, and after every stop."""
    from analysis.abilities import ProbedAbilities
    from analysis.block_evidence import BlockEvidence
    from analysis.boundary_choice import choose_boundaries
    from analysis.pilot import run_pilot
    from analysis.placed_strata import placed_strata
    from analysis.race_candidates import Candidate, standard_baselines
    from analysis.racing import race
    from spafit.adapt import count_trainable, plan_for, with_missing_pooler
    from spafit.data.training import glue_data
    from spafit.heads import load_with_head
    from spafit.settings import TrainSettings

    label, _, folder = model.partition("=")
    reference = folder or None
    place = work / f"{label}-{task}"
    data = glue_data(task, data_folder).limited(ITEMS, seed=0)
    abilities = ProbedAbilities.of(TASKS, train_items=300, test_items=300)
    pilot = run_pilot(
        reference, data, abilities=abilities, out=place / "pilot",
        settings=TrainSettings(epochs=1, batch_size=8, select_share=0),
        warm_up=TrainSettings(epochs=1, batch_size=8, select_share=0, learning_rate=1e-3), device="cpu",
    )  # fmt: skip
    headed = load_with_head(reference, labels=data.labels, regression=data.regression, seed=0)
    scaled = plan_for(headed.model, "spafit-scaled-I", missing=headed.missing)
    budget = count_trainable(headed.model, scaled)
    evidence = BlockEvidence.from_pilot(pilot)
    within = choose_boundaries(evidence, budget=budget)
    pairs = dict.fromkeys(within.short_list(3))
    pairs |= dict.fromkeys([choose_boundaries(evidence, budget=budget, tolerance=TOLERANCE).boundaries])
    probed = _from_probing(reference, place / "probing", pilot.run["blocks"])
    names = {pair: f"pilot {pair}" for pair in pairs} | ({} if probed in pairs else {probed: f"probing {probed}"})
    how = {"stack": pilot.run["stack"], "num_blocks": pilot.run["blocks"], "bias_roles": pilot.run["bias_roles"]}
    suggested = [
        Candidate(
            name,
            with_missing_pooler(headed.model, placed_strata(within.strata, pair, **how), headed.missing),
            "suggestion",
        )
        for pair, name in names.items()
    ]
    relative = pilot.table[pilot.table["quantity"] == "relative_gradient"].groupby("block")["value"].mean()
    baselines = standard_baselines(
        suggested[0].plan, headed.model, missing=headed.missing, relative_gradients=relative.to_numpy(),
        remedies=["l2sp:0.1"],
    )  # fmt: skip
    result = race(
        [*suggested, *baselines], data, model=reference, out=place / "race",
        settings=TrainSettings(epochs=3, batch_size=8, max_length=128), seeds=SEEDS, confirm_seeds=CONFIRM,
        time_budget=60 * MINUTES[label], abilities=abilities, device="cpu", command="docs/results/strata/run.py",
    )  # fmt: skip
    stem = f"{label}-{task}"
    table = within.table.assign(chosen=False)
    table.loc[within.chosen, "chosen"] = True
    table.round(4).to_csv(HERE / f"{stem}-placements.csv", index=False)
    result.trials.round(5).to_csv(HERE / f"{stem}-trials.csv", index=False)
    result.comparison.round(5).to_csv(HERE / f"{stem}-comparison.csv", index=False)
    if result.forgetting is not None:
        result.forgetting.round(5).to_csv(HERE / f"{stem}-forgetting.csv", index=False)
    from spafit import io

    io.write_json(
        HERE / f"{stem}.json",
        {"task": task, "model": label, "items": ITEMS, "budget": budget, "tolerance": TOLERANCE,
         "null": within.null, "chosen": within.boundaries, "announced": result.run["announced"],
         "spent": result.run["spent"], "verdict": result.verdict, "sentence": result.sentence,
         "suggestion": result.run["suggestion"], "data": result.run["data"], "versions": result.run["versions"]},
    )  # fmt: skip
    write_page()


def _from_probing(reference: str | None, out: Path, blocks: int) -> tuple[int, int]:
    """Boundaries from probing alone (the front door's suggestion on the core tasks)."""
    from analysis.interpretation import interpret
    from probing.running import probe_layers

    results = probe_layers(reference, ["core"], seeds=1, max_train=1000, out=out, device="cpu", quiet=True)
    s1, s2 = interpret(results).suggestion.boundaries
    assert s2 <= blocks
    return s1, s2


def write_page() -> None:
    """The page from the committed rows."""
    from analysis.race_result import RaceResult
    from spafit import io

    lines = [
        "# Strata from evidence, raced", "",
        "Pilot → suggestion → race against the baselines → confirmation with fresh seeds, on real models and tasks. The suggestion "
        "may train as many parameters as SPAFIT-4-9-I, scaled to the model's depth. Rungs are scored on a fifth of the training "
        "items; the confirmation trains with seeds that chose nothing and is scored on the task's development set, which chose "
        "nothing either. *forgetting*: bits per item that probes fitted anew lost, the mean over thirteen generated tasks, each at "
        "the hidden state where it was read best before training.", "",
        "Made by `python docs/results/strata/run.py` from the CSV and JSON files beside it.",
    ]  # fmt: skip
    for record in sorted(HERE.glob("*-*.json")):
        run, stem = io.read_json(record), record.stem
        tables = {n: HERE / f"{stem}-{n}.csv" for n in ("trials", "comparison", "forgetting")}
        read = {n: pd.read_csv(p) if p.is_file() else None for n, p in tables.items()}
        assert read["trials"] is not None
        assert read["comparison"] is not None
        result = RaceResult(HERE, run, read["trials"], read["comparison"], read["forgetting"])
        mean, low, high = run["null"]
        trained = result.trials[result.trials["metric"] == "headline"]
        lines += [
            "", f"## {run['model']}, {run['task']}", "",
            f"{run['data']['train']} training items, {run['data']['held-out']} held out for the rungs; at most {run['budget']:,} "
            f"trainable parameters. The pilot chooses {tuple(run['chosen'])}: beyond strata of the same sizes anywhere in the depth it "
            f"gains {mean:+.2f} ({low:+.2f} to {high:+.2f}) of what training everything would. {len(trained)} trainings, "
            f"{run['spent']['seconds'] / 60:.0f} minutes beside other work; the rungs were announced as "
            f"{100 * run['announced']['share_of_all']:.0f} % of training every entry in full.", "",
            result.to_markdown(), "", _said(result),
        ]  # fmt: skip
    (HERE / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _said(result: RaceResult) -> str:
    """Whether data-driven boundaries beat SPAFIT's own and count-only, by how much."""
    words = []
    for name in ("spafit-scaled-I", "count-only"):
        own = result.comparison[result.comparison["baseline"] == name]
        if len(own):
            row = own.iloc[0]
            found = "beat" if row["ci_low"] > 0 else "fall short of" if row["ci_high"] < 0 else "do not differ from"
            words.append(
                f"The data-driven boundaries {found} {name} beyond noise: {row['difference']:+.3f} "
                f"({row['ci_low']:+.3f} to {row['ci_high']:+.3f})."
            )
    return " ".join(words) or "Neither SPAFIT's own boundaries nor count-only were confirmed beside the suggestion."


if __name__ == "__main__":
    if len(sys.argv) == 1:
        write_page()
    else:
        run(sys.argv[2], sys.argv[3], Path(sys.argv[4]), Path(sys.argv[5]))
