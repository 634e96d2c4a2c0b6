"""Training on one task after another: what each stage did to the score of every task, and the published summaries."""

from __future__ import annotations

import math

import pandas as pd

from spafit.errors import UsageError

COLUMNS = ("stage", "task", "value")


def forgetting_matrix(scores: pd.DataFrame) -> pd.DataFrame:
    """Stages × tasks: score of each task after each stage, in the order in which they appear.

    Args:
        scores: columns :data:`COLUMNS`, one row per stage and task.

    Raises:
        UsageError: a column is missing, or a stage has a task twice.
    """
    missing = [c for c in COLUMNS if c not in scores]
    if missing:
        raise UsageError(f"Scores of a sequence need the columns {', '.join(COLUMNS)}; {missing[0]} is missing.")
    if scores.duplicated(["stage", "task"]).any():
        twice = scores[scores.duplicated(["stage", "task"])].iloc[0]
        raise UsageError(f"Stage {twice['stage']!r} has task {twice['task']!r} twice; give one score.")
    return scores.pivot_table(index="stage", columns="task", values="value", sort=False, dropna=False)


def sequence_summaries(matrix: pd.DataFrame, trained: dict[str, str]) -> dict[str, float]:
    """The two published scalars of a sequence of trainings.

    - ``backward_transfer`` (Lopez-Paz & Ranzato 2017, arXiv 1706.08840, eq. 3): mean over the tasks trained before the
      last stage of final score minus score right after their own stage; below 0 is forgetting.
    - ``average_forgetting`` (Chaudhry et al. 2018, arXiv 1801.10112, section 3): mean over the same tasks of the best
      score at any earlier stage minus the final score; above 0 is forgetting.

    Both hide which task and layer lost what; they are given because papers do.

    Args:
        matrix: as :func:`forgetting_matrix` gives it.
        trained: stage -> the task that it trained, in order.

    Returns:
        Both scalars, NaN where fewer than two stages trained a task.

    Raises:
        UsageError: a stage or task that the matrix does not have.
    """
    for stage, task in trained.items():
        if stage not in matrix.index or task not in matrix.columns:
            raise UsageError(
                f"{stage!r} → {task!r} is not in the matrix. Stages: {', '.join(map(str, matrix.index))}; tasks: "
                f"{', '.join(map(str, matrix.columns))}."
            )
    stages = [s for s in matrix.index if s in trained]
    if len(stages) < 2:
        return {"backward_transfer": math.nan, "average_forgetting": math.nan}
    final, earlier = matrix.loc[stages[-1]], matrix.loc[stages[:-1]]
    tasks = [(s, trained[s]) for s in stages[:-1]]
    backward = [float(final[t] - matrix.loc[s, t]) for s, t in tasks]
    forgotten = [float(earlier[t].max() - final[t]) for _, t in tasks]
    return {
        "backward_transfer": sum(backward) / len(backward),
        "average_forgetting": sum(forgotten) / len(forgotten),
    }
