"""Cause and use of every trained classifier of a comparison: loaded one at a time, finished tables kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.language_side import LanguageSide
from analysis.readings import Side
from analysis.task_models import ClassifierFacts, classifier_facts, load_classifier, on_body_before
from analysis.task_scores import TaskScore
from analysis.task_tables import causal_table, erasure_table, interaction_table, retention_by_block, use_table
from probing.item_states import item_states, rows_of_items
from probing.planning import timed
from spafit import io
from spafit.errors import SpafitError, UsageError, did_you_mean
from spafit.language_models import graft

if TYPE_CHECKING:
    from spafit.data.training import TrainData

#: Raised by one whenever the same inputs would give other numbers, so that older tables are measured again.
NUMBERS_VERSION = 1
#: Tables of a comparison that are measured here.
TASK_TABLES = ("causal", "interaction", "erasure", "use")


@dataclass(frozen=True)
class TaskOptions:
    """What to measure on the task that the models after were trained on.

    Attributes:
        data: the task; its first labelled split other than the training one is scored.
        cause_items: items that interventions are scored on; 0 leaves cause out.
        use_items: items whose conductance is computed; 0 leaves use out.
        erase: probing tasks whose labels are erased from each hidden state.
        shapley: random orders for sampled Shapley values; None gives exact ones up to eight blocks; 0 gives none.
        n_boot: bootstrap replicates over items.
    """

    data: TrainData
    cause_items: int = 200
    use_items: int = 24
    erase: tuple[str, ...] = ()
    shapley: int | None = None
    n_boot: int = 1000

    @property
    def split(self) -> str:
        """The split that is scored.

        Raises:
            UsageError: there is no labelled split beside the training one.
        """
        splits = self.data.scored_splits
        if not splits:
            raise UsageError(f"{self.data.name} has no labelled items besides those of training. Give held-out ones.")
        return splits[0]

    def record(self, reasons: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        """What a run's record says: the task, its items, and what was not measured."""
        return {
            "name": self.data.name, "source": self.data.source, "split": self.split,
            "metrics": list(self.data.metrics),
            "digest": self.data.digest, "cause_items": self.cause_items, "use_items": self.use_items,
            "erase": list(self.erase), "shapley": self.shapley,
            "not_measured": {k: list(v) for k, v in reasons.items()},
        }  # fmt: skip

    def items(self, n: int) -> pd.DataFrame:
        """``n`` items of it, in the shares of the labels."""
        return self.data.limited(n, split=self.split).frames[self.split].reset_index(drop=True)


@dataclass
class TaskFindings:
    """Tables by name, each with the column ``model`` first, and why a model has none.

    Attributes:
        tables: name of :data:`TASK_TABLES` -> tables of the models.
        reasons: model -> what was not measured, in one sentence.
    """

    tables: dict[str, list[pd.DataFrame]] = field(default_factory=lambda: {n: [] for n in TASK_TABLES})
    reasons: dict[str, list[str]] = field(default_factory=dict)

    def table(self, name: str) -> pd.DataFrame | None:
        """One table over all models; None where nothing was measured."""
        found = [t for t in self.tables[name] if len(t)]
        return pd.concat(found, ignore_index=True) if found else None


def check_classifiers(
    references: Mapping[str, Any], options: TaskOptions, *, offline: bool, allow_pickle: bool
) -> dict[str, ClassifierFacts | str]:
    """What each model after training is, or why it cannot be measured, before anything is computed.

    Raises:
        UsageError: none of them is a classifier of these data, or the options do not fit.
    """
    for name, value in (("cause_items", options.cause_items), ("use_items", options.use_items)):
        if value < 0:
            raise UsageError(f"{name} must be 0 (none) or more; got {value}.")
    if options.erase and not options.cause_items:
        raise UsageError("Erasing is measured on the task's items; give cause_items more than 0.")
    _ = options.split
    found: dict[str, ClassifierFacts | str] = {}
    for label, reference in references.items():
        try:
            facts = classifier_facts(reference, offline=offline, allow_pickle=allow_pickle)
            facts.order(options.data)
            found[label] = facts
        except SpafitError as error:
            found[label] = str(error).rstrip(".")
    reasons = [f"{label}: {why}" for label, why in found.items() if isinstance(why, str)]
    if len(reasons) == len(found):
        raise UsageError(
            f"No model after training can be measured on {options.data.name} ({reasons[0]}). Give models of spafit "
            "train (…/seed-0/model) and the data that they were trained on, or leave the task out."
        )
    return found


def check_erased(first: Side, names: Sequence[str]) -> None:
    """Refuse to erase what is no task of the comparison, or what cannot be erased token by token.

    Raises:
        UsageError: an unknown task, run folders without models, or max pooling.
    """
    if not names:
        return
    if first.plan is None:
        raise UsageError(f"Erasing needs states, and {first.why}. Give a model before training that can be loaded.")
    known = [t.name for t in first.plan.tasks]
    for name in names:
        if name not in known:
            raise UsageError(f"No task {name!r} to erase; tasks: {', '.join(known)}.{did_you_mean(name, known)}")
    if first.plan.config.pooling[0] == "max":
        raise UsageError("Labels of max-pooled states cannot be erased from tokens. Name mean or first before max.")


def measure_tasks(
    first: Side,
    sides: Mapping[str, Side],
    facts: Mapping[str, ClassifierFacts | str],
    options: TaskOptions,
    *,
    folder: Path,
    language: LanguageSide | None = None,
    seconds: dict[str, float],
    quiet: bool,
) -> TaskFindings:
    """Measure every classifier; a model or table that cannot be measured is said and does not cost the others.

    Args:
        first: the model before training.
        sides: the models after training.
        facts: from :func:`check_classifiers`.
        options: what to measure.
        folder: of the comparison; tables are kept below it, by model.
        language: the language model before training; where it has running text, each reverted block is scored on it.
        seconds: time by phase is added here.
        quiet: no progress on stderr.
    """
    findings = TaskFindings()
    for name, side in sides.items():
        one = facts[name]
        why = one if isinstance(one, str) else side.why or first.why
        if isinstance(one, str) or why:
            findings.reasons[name] = [f"cause and use: {why}"]
            continue
        reasons = findings.reasons.setdefault(name, [])
        for table, found in _measure(
            first, side, one, options, folder / "task" / name, reasons, language=language, seconds=seconds, quiet=quiet
        ):
            findings.tables[table].append(found.assign(model=name)[["model", *found.columns]])
    return findings


def _measure(
    first: Side,
    side: Side,
    facts: ClassifierFacts,
    options: TaskOptions,
    folder: Path,
    reasons: list[str],
    *,
    language: LanguageSide | None,
    seconds: dict[str, float],
    quiet: bool,
) -> Iterator[tuple[str, pd.DataFrame]]:
    """Tables of one model by name; what cannot be measured is added to ``reasons``."""
    try:
        with timed(seconds, "load classifiers"):
            job = _Job(first, side, facts, options, folder, quiet)
    except SpafitError as error:
        reasons.append(f"cause and use: {str(error).rstrip('.')}")
        return
    steps: list[tuple[str, str, Callable[[], pd.DataFrame | None]]] = [
        ("causal", "cause", job.causal), ("interaction", "cause", job.interaction), ("erasure", "erase", job.erasure),
        ("use", "use", job.use),
    ]  # fmt: skip
    if language is not None and language.text is not None and options.cause_items:
        steps.append(("causal", "cause, running text", partial(job.retention, language, language.text)))
    for table, phase, measure in steps:
        try:
            with timed(seconds, phase):
                found = measure()
        except SpafitError as error:
            reasons.append(f"{table}: {str(error).rstrip('.')}")
            continue
        if found is not None and found.empty:
            reasons.append(f"{table}: none of the {options.use_items} items converged")
        elif found is not None:
            yield table, found
    reasons += job.notes


class _Job:
    """One classifier with its items; each table is read if the same one was measured before."""

    def __init__(
        self, first: Side, side: Side, facts: ClassifierFacts, options: TaskOptions, folder: Path, quiet: bool
    ):
        from spafit.batches import encode
        from spafit.digests import model_digest, tokenizer_digest

        assert first.plan is not None
        self.first, self.side, self.options, self.folder, self.quiet = first, side, options, folder, quiet
        self.notes: list[str] = []
        plan = first.plan
        self.after, self.tokenizer = load_classifier(
            facts, offline=plan.config.offline, allow_pickle=plan.config.allow_pickle, device=plan.device
        )
        if self.tokenizer is None:
            raise UsageError("it has no tokenizer")
        self.before = on_body_before(self.after, plan.loaded.model)
        data = options.data
        self.encoded = {
            n: encode(options.items(n), self.tokenizer, max_length=facts.max_length, regression=data.regression)
            for n in {options.cause_items, options.use_items} - {0}
        }
        self.order = facts.order(data)
        self.keys = io.read_json(folder / "keys.json") if (folder / "keys.json").is_file() else {}
        self.digest = io.content_digest(
            [NUMBERS_VERSION, model_digest(self.before), model_digest(self.after), tokenizer_digest(self.tokenizer),
             data.digest, facts.max_length, options.n_boot]
        )  # fmt: skip

    def kept(self, name: str, parts: Sequence[object], make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """The table as an earlier call left it, or made now and kept."""
        key = io.content_digest([self.digest, *parts])
        if self.keys.get(name) == key and (self.folder / f"{name}.parquet").is_file():
            return io.read_table(self.folder / name)
        table = make()
        io.write_table(self.folder / name, table, csv=False)
        self.keys[name] = key
        io.write_json(self.folder / "keys.json", self.keys)
        return table

    def score(self, *, equal_lengths: bool = False) -> TaskScore:
        """The metric on the items of cause."""
        data = self.options.data
        return TaskScore(
            self.encoded[self.options.cause_items], self.tokenizer, metrics=data.metrics, order=self.order,
            regression=data.regression, equal_lengths=equal_lengths, n_boot=self.options.n_boot,
        )  # fmt: skip

    def causal(self) -> pd.DataFrame | None:
        """Interventions on blocks."""
        from spafit.stacks import find_stacks

        if not self.options.cause_items:
            return None
        stack = find_stacks(self.after)[0]
        branches = stack.attention_branch is not None and stack.feed_forward_branch is not None
        if not branches:
            self.notes.append("cause by branch: the branches of its blocks were not recognised")
        try:
            equal = self.score(equal_lengths=True) if branches else None
        except UsageError as error:
            equal = None
            self.notes.append(f"resampling: {str(error).rstrip('.')}")
        return self.kept(
            "causal", [self.options.cause_items],
            lambda: causal_table(
                self.before, self.after, self.score(), equal=equal, branches=branches, quiet=self.quiet
            ),
        )  # fmt: skip

    def interaction(self) -> pd.DataFrame | None:
        """Marginals and Shapley values, from the reverted sets that are known already and those that are not."""
        if not self.options.cause_items:
            return None
        known = self.causal()
        assert known is not None
        return self.kept(
            "interaction", [self.options.cause_items, self.options.shapley],
            lambda: interaction_table(
                self.before, self.after, self.score(), known, permutations=self.options.shapley, quiet=self.quiet
            ),
        )  # fmt: skip

    def retention(self, language: LanguageSide, text: str) -> pd.DataFrame:
        """Bits per token under the original head with each block reverted."""
        plan = self.side.plan or self.first.plan  # a side without a plan is the model before training
        assert plan is not None
        tuned = graft(language.original, plan.loaded.model, name=self.side.name)
        return self.kept(
            "causal-text", [text], lambda: retention_by_block(language.original, tuned, text, quiet=self.quiet)
        )  # fmt: skip

    def erasure(self) -> pd.DataFrame | None:
        """The labels of probing tasks erased."""
        if not self.options.erase or not self.options.cause_items:
            return None
        plan = self.first.plan
        assert plan is not None
        chosen = [t for t in plan.tasks if t.name in self.options.erase]
        keys = [plan.task_key(t) for t in chosen]
        return self.kept(
            "erasure", [self.options.cause_items, *keys, self.side.unchanged],
            lambda: erasure_table(
                self.after, self.score(), {t.name: self._states(t) for t in chosen},
                range(1, plan.stack.num_blocks + 1), quiet=self.quiet,
            ),
        )  # fmt: skip

    def _states(self, task: Any) -> tuple[np.ndarray, Callable[[int], np.ndarray]]:
        """Labels of a probing task's training items, and the tuned model's states of them by hidden index."""
        plan = self.first.plan
        assert plan is not None
        stores = (
            self.first.store(task.corpus.name),
            (self.side if self.side.plan else self.first).store(task.corpus.name),
        )
        rows, usable = rows_of_items(self.side.plan or plan, task, stores[1])
        chosen = np.flatnonzero((task.items["split"] == "train").to_numpy() & usable)
        labels = task.items["label"].to_numpy()[chosen].astype(np.int64)
        pooling = plan.config.pooling[0]

        def read(hidden: int) -> np.ndarray:
            store = stores[0] if hidden < self.side.unchanged else stores[1]
            return item_states(task, store, rows[chosen], pooling=pooling, hidden=hidden)

        return labels, read

    def use(self) -> pd.DataFrame | None:
        """Conductance."""
        n = self.options.use_items
        if not n:
            return None
        return self.kept("use", [n], lambda: use_table(self.after, self.encoded[n].items, self.tokenizer))
