"""A trade-off from folders: what models lost, from comparisons, and their scores, from the training beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from analysis.comparison import Comparison
from analysis.tradeoffs import tradeoff_table
from spafit import io
from spafit.errors import DataError, UsageError, did_you_mean


def tradeoff(
    comparisons: Sequence[Comparison | str | Path],
    *,
    tasks: Sequence[str] | None = None,
    split: str | None = None,
    metric: str = "headline",
    control: Literal["word-type", "none"] = "word-type",
    n_boot: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Score against forgetting of trained models that were compared with one model before.

    Every compared model is one that ``spafit train`` wrote: its score is read beside it. The seeds of one training
    folder are one method. Forgetting is the accuracy lost at the hidden state where each task could be read best
    before training; that state is chosen on the same test items, which raises every method's loss alike.

    Args:
        comparisons: results or folders of ``spafit compare``, all with the same model before.
        tasks: probing tasks that forgetting is the mean of; all by default. Leave out what the models were trained on.
        split: reported split of the training; the first one by default.
        metric: of the training. Where it is the accuracy, test items are resampled, too.
        control: ``word-type`` subtracts the control task where there is one.
        n_boot: bootstrap draws.
        seed: chooses the draws.

    Returns:
        The table of :func:`analysis.tradeoffs.tradeoff_table`, which also says when not to trust it.

    Raises:
        UsageError: an unknown task, split or metric.
        DataError: a model without its training, trainings on different tasks, or comparisons with different models
            before.
    """
    found = [c if isinstance(c, Comparison) else Comparison.load(c) for c in comparisons]
    if not found:
        raise UsageError("Give at least one comparison.")
    if len({c.stacks for c in found}) > 1 or len(found[0].stacks) > 1:
        raise UsageError(
            f"A trade-off has one number of forgetting per task, and these comparisons are of the stacks "
            f"{', '.join(dict.fromkeys(s for c in found for s in c.stacks))}. Compare with one --stack."
        )
    _check_same_start(found)
    names = sorted({t for c in found for t in c.tasks})
    for task in tasks or ():
        if task not in names:
            raise UsageError(f"No task {task!r} was compared. Tasks: {', '.join(names)}.{did_you_mean(task, names)}")
    folders = {(i, m): _seed_folder(c, m) for i, c in enumerate(found) for m in c.models}
    named = _names([f.parent for f in folders.values()])
    scores, losses, trained_on = [], [], dict[str, Path]()
    for i, comparison in enumerate(found):
        column = "lost" if control == "word-type" else "lost_alone"
        summary = comparison.summary().rename(columns={column: "value"})[["model", "task", "value"]]
        for model in comparison.models:
            folder = folders[i, model]
            own = _scores(folder, split, metric)
            trained_on.setdefault(own.attrs["task"], folder)
            what = {"method": named[folder.parent], "seed": own.attrs["seed"]}
            scores.append(own.assign(**what))
            losses.append(summary[summary["model"] == model].assign(**what))
    if len(trained_on) > 1:
        said = " and ".join(f"{task} ({folder})" for task, folder in list(trained_on.items())[:2])
        raise DataError(f"The models were trained on different tasks, {said}. Give comparisons of one task.")
    score, lost = pd.concat(scores, ignore_index=True), pd.concat(losses, ignore_index=True)
    keys = [c for c in ("method", "seed", "item") if c in score]
    return tradeoff_table(
        score.drop_duplicates(keys), lost if tasks is None else lost[lost["task"].isin(list(tasks))], n_boot=n_boot,
        seed=seed,
    )  # fmt: skip


def _seed_folder(comparison: Comparison, model: str) -> Path:
    """Folder of the training seed that a compared model belongs to."""
    reference = comparison.run["models"][model]["reference"]
    folder = None if reference is None else Path(reference).expanduser().parent
    if folder is None or not (folder / "runs.parquet").is_file():
        raise DataError(
            f"{comparison.folder}: the score of {model} ({reference or 'a model without a folder'}) cannot be found, "
            "for there is no runs.parquet beside it. Compare the folder seed-…/model that spafit train wrote, run this "
            "from the same working folder, or give scores and losses to tradeoff_table."
        )
    return folder


def _names(folders: Sequence[Path]) -> dict[Path, str]:
    """What each training folder is called: its method, with the folder's own name where two share a method."""
    said = {f: str(io.read_json(f / "run.json")["method"]) for f in dict.fromkeys(folders)}
    twice = {m for m in said.values() if list(said.values()).count(m) > 1}
    return {f: f"{m} ({f.name})" if m in twice else m for f, m in said.items()}


def _scores(folder: Path, split: str | None, metric: str) -> pd.DataFrame:
    """A seed's score as one row, or as one for each test item where it is the accuracy; task and seed in ``attrs``."""
    runs = io.read_table(folder / "runs")
    splits = list(dict.fromkeys(runs["split"]))
    chosen = splits[0] if split is None else split
    own = runs[runs["split"] == chosen]
    for what, value, allowed in (("split", chosen, splits), ("metric", metric, list(dict.fromkeys(runs["metric"])))):
        if value not in allowed:
            raise UsageError(
                f"{folder} was not scored with the {what} {value!r}. It has: {', '.join(allowed)}."
                f"{did_you_mean(value, allowed)}"
            )
    is_accuracy = metric == "accuracy" or (metric == "headline" and set(own["metric"]) == {"accuracy", "headline"})
    if is_accuracy:
        items = io.read_table(folder / f"predictions-{chosen}")
        right = (items["label"] == items["prediction"]).astype(float)
        table = pd.DataFrame({"item": items["idx"], "value": right})
    else:
        table = own.loc[own["metric"] == metric, ["value"]].reset_index(drop=True)
    table.attrs = {"task": str(own["task"].iloc[0]), "seed": int(own["seed"].iloc[0])}
    return table


def _check_same_start(comparisons: Sequence[Comparison]) -> None:
    """The same model before gives the same scores before, to the bit, on the tasks that two comparisons share."""
    key = ["task", "split", "metric", "hidden", "pooling", "probe"]
    first: pd.Series | None = None
    for comparison in comparisons:
        rows = comparison.forgetting
        rows = rows[(rows["term"] == "pre") & (rows["control"] == "none")].drop_duplicates(key)
        own = rows.set_index(key)["value"]
        if first is not None:
            shared = own.index.intersection(first.index)
            if not np.allclose(own.loc[shared], first.loc[shared], rtol=0, atol=1e-9):
                raise DataError(
                    f"{comparisons[0].folder} and {comparison.folder} differ in the scores before training: another "
                    "model before, or other items or seeds. Compare all with the same model and the same options."
                )
            own = pd.concat([first, own.loc[own.index.difference(first.index)]])
        first = own
