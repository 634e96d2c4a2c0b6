"""Forgetting while it happens: a few tasks probed on a small fixed set at chosen steps of a training.

The same readings as :mod:`analysis.forgetting`, fewer of them. P is fitted once on the states before training; at a
step, ``transfer`` is P's accuracy on the states of then, ``recoverable`` that of a probe fitted on them anew, and

    lost = pre - recoverable        moved+re-encoded = recoverable - transfer

with ``pre`` the accuracy of P before training (``recoverable`` at step 0). The two add up to pre - transfer. There is
no rigid map, so that moved and re-encoded are not told apart; nothing is subtracted for a control task or a
random-weight encoder, and there is one draw of items. Those belong to ``spafit compare``, which is what a claim should
rest on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.drawn_items import DrawnItems, check_watchable, rows_of, texts_of
from probing.probes.linear import LinearProbeFit, fit_linear_probes, fit_selected
from probing.repeated import RepeatedStates
from probing.shared_prefix import first_reader
from probing.tasks.base import Task
from spafit import plotting
from spafit.errors import DataError, TaskError, UsageError
from spafit.signals import Reading, Signal
from spafit.stats import jackknife

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import nn

    from spafit.fit_result import FitResult
    from spafit.models import LoadedModel

#: What is measured of each task at each hidden state; accuracies, and the standard error of ``lost``.
TERMS = ("transfer", "recoverable", "lost", "lost_se", "moved+re-encoded")
#: Columns of :func:`trajectory_table`.
COLUMNS = ("seed", "step", "epoch", "task", "hidden", "term", "value")


def forgetting_signal(
    tokenizer: Any,
    tasks: Sequence[str | Task] = ("core.tense", "core.voice"),
    *,
    train_items: int = 300,
    test_items: int = 300,
    pooling: str = "mean",
    stack: str | None = None,
    every: int | None = None,
    share: float = 0.10,
    seed: int = 0,
) -> Signal:
    """A signal for :func:`spafit.fit`: what every hidden state has lost of each task, step by step.

    All tasks are encoded in one forward pass per text; tasks of one corpus share texts. Hidden states below the first
    block that trains are encoded and probed once, and their ``lost`` is exactly 0. The rest of a measurement is that
    forward pass and one small fit per task and hidden state that changed.

    Do not trust differences of less than about two ``lost_se``, the jackknife's standard error over test sentences: it
    knows nothing of the draw of training items, and with 300 items it is one to three points. With so few items a
    probe reads less than one of ``spafit compare``: compare steps with each other, not with those numbers. Many hidden
    states and steps are looked at together, so that some stand out by chance.

    Args:
        tokenizer: the model's.
        tasks: references such as ``core.tense``, or tasks.
        train_items: training items per task; the penalty is chosen before training, on half as many dev items, and
            kept.
        test_items: scored items per task, of its first test split.
        pooling: how tokens become one state.
        stack: which stack; None takes the first.
        every: steps between two measurements; None takes a fiftieth of the training.
        share: seconds that it may take, as a share of the training's; see :class:`spafit.signals.Signal`.
        seed: draws the items.

    Returns:
        A signal that gives rows ``<term>:<task>`` by hidden index, with the terms :data:`TERMS`.

    Raises:
        SpafitError: a task that does not exist or cannot be probed, or numbers that make no sense.
    """
    if train_items < 2 or test_items < 2:
        raise UsageError(f"train_items is {train_items} and test_items {test_items}; at least 2 of each are needed.")
    found = check_watchable(tasks)
    draws = [DrawnItems.make(task, train_items, test_items, seed) for task in found.values()]
    name = f"forgetting of {', '.join(found)}"
    return Signal(name, _Watch(tokenizer, draws, pooling, stack), every=every, share=share)


@dataclass
class _Before:
    """A task before training: its items' rows and labels, the probes, and which test items they get right."""

    draw: DrawnItems
    train: np.ndarray
    test: np.ndarray
    labels: tuple[np.ndarray, np.ndarray]
    groups: np.ndarray
    probes: list[LinearProbeFit]
    right: np.ndarray

    @property
    def unit(self) -> str:
        return "words" if self.draw.task.span_columns else "sentences"


class _Watch:
    """The measurement; holds what it saw before training."""

    def __init__(self, tokenizer: Any, draws: Sequence[DrawnItems], pooling: str, stack: str | None):
        self.tokenizer, self.draws, self.pooling, self.stack = tokenizer, draws, pooling, stack
        self._tasks: list[_Before] = []
        self._states: RepeatedStates | None = None
        self._first: dict[str, np.ndarray] = {}
        self._storage: tuple[int, ...] = ()

    def __call__(self, model: nn.Module, step: int) -> list[Reading]:
        if step == 0:
            self._begin(model)
        elif not self._tasks:
            raise UsageError("What was forgotten is measured from the states before training: measure step 0 first.")
        storage = _storage(model)
        if storage != self._storage:  # another model, or one whose weights were exchanged for others
            loaded, device, _ = self._look_at(model)
            self._states = RepeatedStates(
                loaded, texts_of(self.draws, "train", "test")[0], pooling=self.pooling, stack=self.stack, device=device
            )
            self._storage = storage
        assert self._states is not None
        now = self._first if step == 0 else self._states.read()
        return [row for task in self._tasks for row in self._readings(task, now[task.unit])]

    def _look_at(self, model: nn.Module) -> tuple[LoadedModel, str, int]:
        """The model as extraction takes it (sharing its weights), its device, how many hidden states never change."""
        from probing.forward import pick_stack
        from spafit.models import load_model

        loaded = load_model((model, self.tokenizer))
        trained = {p.data_ptr() for p in model.parameters() if p.requires_grad}
        names = [n for n, p in loaded.model.named_parameters() if p.data_ptr() in trained]
        device = str(next(model.parameters()).device)
        return loaded, device, first_reader(names, pick_stack(loaded, self.stack))

    def _begin(self, model: nn.Module) -> None:
        """Encode, fit the probes, and see what they get right."""
        loaded, device, unchanged = self._look_at(model)
        texts, place = texts_of(self.draws, "train", "test")
        dev_texts, dev_place = texts_of(self.draws, "dev")
        how: dict[str, Any] = {"pooling": self.pooling, "stack": self.stack, "device": device}
        self._states = RepeatedStates(loaded, texts, unchanged=unchanged, **how)
        self._storage = _storage(model)
        self._first = self._states.read()
        for_dev = RepeatedStates(loaded, dev_texts, **how)
        dev_states = for_dev.read()
        self._tasks = []
        for draw in self.draws:
            task = draw.task
            train, test = (rows_of(self._states, task, items, place) for items in (draw.train, draw.test))
            dev = rows_of(for_dev, task, draw.dev, dev_place)
            items = {"train": (train, draw.train), "dev": (dev, draw.dev), "test": (test, draw.test)}
            for name, (rows, _) in items.items():
                if not (rows >= 0).any():
                    raise TaskError(f"Task {task.name!r}: no {name} item has a state. Use shorter texts.")
            usable = {name: (rows[rows >= 0], drawn[rows >= 0]) for name, (rows, drawn) in items.items()}
            y = {n: task.items["label"].to_numpy().astype(np.int64)[drawn] for n, (_, drawn) in usable.items()}
            unit = "words" if task.span_columns else "sentences"
            fit, _ = fit_selected(
                self._first[unit][:, usable["train"][0]], y["train"], dev_states[unit][:, usable["dev"][0]], y["dev"],
                n_classes=len(task.labels),
            )  # fmt: skip
            probes = [fit.only(h) for h in range(len(self._first[unit]))]
            x_test = self._first[unit][:, usable["test"][0]]
            right = np.stack([_right(p, x, y["test"]) for p, x in zip(probes, x_test, strict=True)])
            groups = task.items["group"].astype(str).to_numpy()[usable["test"][1]]
            self._tasks.append(
                _Before(draw, usable["train"][0], usable["test"][0], (y["train"], y["test"]), groups, probes, right)
            )

    def _readings(self, task: _Before, states: np.ndarray) -> list[Reading]:
        """Rows of one task; a hidden state that is as it was before is not fitted again."""
        transfer, recoverable = task.right.copy(), task.right.copy()
        before = self._first[task.unit]
        for h, probe in enumerate(task.probes):
            x_train, x_test = states[h][task.train], states[h][task.test]
            same = np.array_equal(x_train, before[h][task.train]) and np.array_equal(x_test, before[h][task.test])
            if same:
                continue
            transfer[h] = _right(probe, x_test, task.labels[1])
            again = fit_linear_probes(
                x_train[None], task.labels[0], n_classes=len(task.draw.task.labels), l2=probe.l2[0], warm_start=probe
            )
            recoverable[h] = _right(again, x_test, task.labels[1])
        error, _ = jackknife(task.right - recoverable, task.groups)
        means = {"pre": task.right.mean(1), "transfer": transfer.mean(1), "recoverable": recoverable.mean(1)}
        values = {
            "transfer": means["transfer"],
            "recoverable": means["recoverable"],
            "lost": means["pre"] - means["recoverable"],
            "lost_se": error,
            "moved+re-encoded": means["recoverable"] - means["transfer"],
        }
        return [(f"{term}:{task.draw.task.name}", h, float(v)) for term in TERMS for h, v in enumerate(values[term])]


def _storage(model: nn.Module) -> tuple[int, ...]:
    return tuple(p.data_ptr() for p in model.parameters())


def _right(fit: LinearProbeFit, x: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether each prediction is right, float64, shape (items,)."""
    return (fit.log_probabilities(x[None], label_set=0)[0, 0].argmax(1) == labels).astype(np.float64)


# ---------------------------------------------------------------- what came out


def trajectory_table(signals: pd.DataFrame) -> pd.DataFrame:
    """What :func:`forgetting_signal` gave in a table of signals, term and task apart; columns :data:`COLUMNS`."""
    parts = signals["signal"].str.split(":", n=1, expand=True).reindex(columns=[0, 1])
    table = signals.assign(term=parts[0], task=parts[1])
    return table.loc[table["term"].isin(TERMS) & table["hidden"].notna(), list(COLUMNS)].reset_index(drop=True)


def trajectory_figure(result: FitResult) -> Figure:
    """What each hidden state lost by step, a panel per task; below it the held-out score and the loss of the training.

    The mean over seeds, interpolated where they were measured at different steps. Grey: 1.96 standard errors of a
    ``lost`` of 0 to either side, at the median over hidden states; a line inside it has not been shown to lose
    anything. What :func:`forgetting_signal` says about trust holds.

    Raises:
        DataError: nothing was watched in this training.
    """
    table = pd.DataFrame() if result.signals is None else trajectory_table(result.signals)
    if table.empty:
        raise DataError(f"{result.folder}: no forgetting was watched in this training. Train with --watch TASKS.")
    import matplotlib as mpl
    from matplotlib.colors import Normalize

    tasks = list(dict.fromkeys(table["task"]))
    last = int(table["hidden"].max())
    colours, norm = mpl.colormaps["viridis_r"], Normalize(0, last)
    figure = plotting.new_figure(width=max(5.4, 1.2 + 3.5 * len(tasks)), height=5.0)
    axes = figure.subplots(2, len(tasks), sharex=True, sharey="row", squeeze=False, height_ratios=(2, 1))
    for column, task in enumerate(tasks):
        own, upper, lower = table[table["task"] == task], axes[0, column], axes[1, column]
        lost = _over_seeds(own[own["term"] == "lost"])
        error = _over_seeds(own[own["term"] == "lost_se"])
        changed = error.loc[:, (error > 0).any()]
        if changed.shape[1]:
            around = 196 * changed.median(axis=1)
            label = "± 1.96 standard errors" if column == 0 else None
            upper.fill_between(around.index, -around, around, color="#000000", alpha=0.10, linewidth=0, label=label)
        for hidden in lost.columns:
            upper.plot(lost.index, 100 * lost[hidden], ".-", color=colours(norm(hidden)), linewidth=1.3, markersize=5)
        upper.set_title(task)
        _training_curves(lower, result)
        lower.set_xlabel("step")
    if axes[0, 0].get_legend_handles_labels()[0]:
        axes[0, 0].legend(frameon=False, fontsize=8, loc="upper left")
    axes[0, 0].set_ylabel("lost, points of accuracy")
    axes[1, 0].set_ylabel("held-out score\n(grey: loss)")
    figure.suptitle(f"{result.run['task']}, {result.run['method']}", fontsize=10)
    bar = figure.colorbar(mpl.cm.ScalarMappable(norm, colours), ax=list(axes.flat), shrink=0.8)
    bar.set_label("hidden state (0 = embeddings)")
    bar.set_ticks(plotting.hidden_ticks(0, last))
    return figure


def _over_seeds(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds of lines through the measured steps; step × hidden."""
    wide = [r.pivot_table(index="step", columns="hidden", values="value") for _, r in rows.groupby("seed")]
    steps = sorted({s for w in wide for s in w.index})
    lines = [w.reindex(steps).interpolate("index", limit_area="inside") for w in wide]
    return pd.concat(lines).groupby(level=0).mean()


def _training_curves(ax: Axes, result: FitResult) -> None:
    """The held-out headline, a line per seed, and the training loss in grey on its own scale."""
    metrics = result.metrics
    loss = metrics[(metrics["split"] == "train") & (metrics["metric"] == "loss")]
    scored = metrics[(metrics["split"] == "select") & (metrics["metric"] == "headline")]
    other = ax.twinx()
    for _, rows in loss.groupby("seed"):
        other.plot(rows["step"], rows["value"], "-", color="#999999", linewidth=1)
    other.set_yticks([])
    for _, rows in scored.groupby("seed"):
        ax.plot(rows["step"], rows["value"], "o-", color="#0072B2", linewidth=1.2, markersize=3)
