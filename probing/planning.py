"""Everything that a probing run checks and decides before any state is computed."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probing.baselines import check_columns
from probing.config import ProbeConfig
from probing.controls import ENCODERS
from probing.earlier import check_same_run, find_run
from probing.fitting import ProbeSettings, training_rows
from probing.needed_texts import NeededTexts, needed_texts
from probing.parts import is_finished, measure_part
from probing.probes.families import check_suited, parse_probe, suits
from probing.tasks.base import ITEM_COLUMNS, SPAN_UNITS, Task
from spafit import io
from spafit.errors import DataError, OutputError, TaskError, UsageError
from spafit.runtime import pick_device, torch_dtype

if TYPE_CHECKING:
    from probing.extraction import ExtractionPlan
    from spafit.models import LoadedModel
    from spafit.stacks import Stack


#: Raised by one whenever the same inputs would give other numbers, so that older finished tasks are computed again.
NUMBERS_VERSION = 5

#: Names that the stack finder gives; anything else in ``--stack`` is the dotted path of the list of blocks.
STACK_NAMES = ("encoder", "decoder", "text", "vision")


@dataclass(frozen=True)
class ProbePlan:
    """What a run will do, known before any state is computed.

    Attributes:
        config: the options.
        loaded: the model.
        device: resolved device.
        out: output folder.
        tasks: tasks to probe.
        failed: references or tasks that cannot be probed, with the sentence that says why.
        done: names of tasks whose results are already in the folder.
        measuring: (task, measure) pairs that are asked for and not in the folder.
        stored_bytes: size of one encoder's pooled states, of all stacks.
        extractions: batches, tokens and bytes of each corpus, by corpus name; of the first stack, whose batches are
            those of all.
        needed: the texts of each corpus that are encoded.
        settings: what determines the probes' numbers.
        seconds: time spent planning, by phase.
    """

    config: ProbeConfig
    loaded: LoadedModel
    device: str
    out: Path
    tasks: tuple[Task, ...]
    failed: Mapping[str, str]
    done: frozenset[str]
    extractions: Mapping[str, ExtractionPlan]
    needed: Mapping[str, NeededTexts]
    settings: ProbeSettings
    seconds: dict[str, float] = field(default_factory=dict)
    measuring: tuple[tuple[str, str], ...] = ()
    stored_bytes: int = 0

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The stacks that are probed: those named in the options, or the first."""
        from probing.forward import pick_stacks

        return pick_stacks(self.loaded, self.config.stack)

    @property
    def stack(self) -> Stack:
        """The first stack that is probed."""
        return self.stacks[0]

    @property
    def hidden(self) -> tuple[int, ...]:
        """Hidden indices of the first stack that are probed."""
        return self.hidden_of(self.stack)

    def hidden_of(self, stack: Stack) -> tuple[int, ...]:
        """Hidden indices of one stack that are probed."""
        return tuple(self.config.hidden(stack.num_blocks + 1, stack=stack.name))

    @property
    def notes(self) -> list[str]:
        """What a reader must know of the stacks: what a decoder was fed, and what a causal one cannot know."""
        from probing.teacher_forcing import causal_words, feeding_of, reads_encoder

        found = []
        for stack in self.stacks:
            feeding = feeding_of(self.loaded) if reads_encoder(stack) else None
            found += [feeding.words] if feeding is not None else []
            found += [causal_words(stack)] if stack.causal else []
        return found

    def task_key(self, task: Task) -> str:
        """Digest of everything that the task's numbers depend on."""
        config, model = self.config, self.loaded
        data = [task.items[c].astype(str).str.cat(sep="\x1f") for c in task.items.columns if c not in ITEM_COLUMNS]
        model_parts = (
            model.weights_digest,
            model.adapter_digest,
            model.tokenizer_digest,
            model.max_length,
            *(s.path for s in self.stacks),
            *data,
        )
        if task.corpus.of_images and model.image_processor is not None:
            model_parts = (*model_parts, model.image_processor.digest)
        hidden = tuple(self.hidden_of(s) for s in self.stacks)
        settings = (
            config.sites, config.pooling, hidden[0] if len(hidden) == 1 else hidden, self.settings, config.dtype,
            config.batch_tokens,
        )  # fmt: skip
        return io.content_digest(
            (NUMBERS_VERSION, io.SCHEMA_VERSION, task.digest, task.level, *model_parts, *settings, self.device)
        )

    def measure_key(self, task: Task, measure: str) -> str:
        """Digest of everything that the numbers of one measure of a task depend on."""
        return io.content_digest((self.task_key(task), measure))

    @property
    def encoder_controls(self) -> tuple[str, ...]:
        """The controls that are encoders of their own, one per seed."""
        return tuple(c for c in self.config.controls if c in ENCODERS)

    @property
    def encoders(self) -> int:
        """Number of encoders run over the texts: the model, and one per seed for each control that is an encoder."""
        return 1 + len(self.config.seeds) * len(self.encoder_controls)

    @property
    def texts(self) -> int:
        """Distinct texts over all corpora."""
        return sum(p.texts for p in self.extractions.values())

    @property
    def bytes_on_disk(self) -> int:
        """Size of the pooled states that the cache will hold."""
        return self.encoders * self.stored_bytes

    def describe(self) -> str:
        """The plan in a few lines: model, device, blocks, tasks, texts, estimate of time and disk."""
        todo = [t for t in self.tasks if t.name not in self.done]
        tokens = sum(p.tokens for p in self.extractions.values())
        truncated = sum(p.truncated for p in self.extractions.values())
        what = "images" if all(p.of_images for p in self.extractions.values()) else "texts"
        lines = [
            f"model      {self.loaded.name}  "
            f"({'; '.join(f'{s.num_blocks} blocks × {s.width}, {s.name}' for s in self.stacks)})",
            f"device     {self.device}, {self.config.dtype}",
            f"hidden     {self._hidden_words()} "
            f"(0 = embeddings), pooling {', '.join(self.config.pooling)}, site {', '.join(self.config.sites)}, "
            f"probe {', '.join(self.config.probe)}",
            f"tasks      {len(self.tasks)}: {', '.join(t.name for t in self.tasks)}",
            f"{what:<10} {self.texts:,} distinct, {tokens:,} tokens, {self.encoders} encoder(s)"
            + (f"; {truncated:,} longer than the model's window are cut" if truncated else ""),
            f"cache      {self.bytes_on_disk / 1e6:,.0f} MB of pooled states",
            f"output     {self.out}",
        ]
        if self.done:
            lines.append(f"finished   {len(self.tasks) - len(todo)} of {len(self.tasks)} tasks are already there")
        if todo:
            lines.append(
                f"estimate   about {format_seconds(self.estimate_seconds())}, less what the cache already holds"
            )
        lines += [f"left out   {name}: {why}" for name, why in self.failed.items()]
        return "\n".join(lines)

    def _hidden_words(self) -> str:
        if self.config.layers != "all":
            return self.config.layers
        every = [f"0–{s.num_blocks}" for s in self.stacks]
        if len(set(every)) == 1:
            return every[0]
        return ", ".join(f"{s.name} {words}" for s, words in zip(self.stacks, every, strict=True))

    def estimate_seconds(self) -> float:
        """Rough time still to spend: two timed batches scaled to all tokens, plus a rate for the probes' products."""
        from probing.extraction import seconds_per_token

        todo = [t for t in self.tasks if t.name not in self.done]
        measures = self._estimate_measures()
        if not todo:
            return measures
        tokens = sum(self.extractions[c].tokens for c in {t.corpus.name for t in todo})
        per_token = seconds_per_token(self.loaded, stack=self.config.stack, device=self.device, dtype=self.config.dtype)
        products = sum(
            parse_probe(p).cost(
                len(training_rows(t, self.settings)[self.config.seeds[0]]), self.stack.width, max(len(t.labels), 1)
            )
            for t in todo
            for p in self.settings.probe
            if suits(parse_probe(p), t)
        )
        hidden = sum(len(self.hidden_of(s)) for s in self.stacks)
        fits = hidden * len(self.config.seeds) * (1 + len(self.encoder_controls))
        return self.encoders * tokens * per_token * 1.15 + fits * products / 2e10 + measures + 5.0

    def _estimate_measures(self) -> float:
        """Rough time of the measures still to take."""
        from probing.measures import cost

        named = {t.name: t for t in self.tasks}
        products = sum(
            cost(
                measure, n=len(training_rows(named[name], self.settings)[self.config.seeds[0]]), width=self.stack.width,
                classes=max(len(named[name].labels), 1), hidden=len(self.hidden),
            )
            for name, measure in self.measuring
        )  # fmt: skip
        return len(self.config.seeds) * products / 2e10


def plan_probing(
    config: ProbeConfig, *, model: Any = None, given: Sequence[Task] = (), only_given: bool = False
) -> ProbePlan:
    """Check everything that can be checked before work starts, and say what the run will do.

    Args:
        config: the options.
        model: an in-memory model in place of ``config.model``.
        given: task objects, probed beside those that ``config.tasks`` names.
        only_given: do not read ``config.tasks``.

    Raises:
        SpafitError: see :func:`probe_layers`. The output folder and the tasks are checked before the model is loaded.
        OutputError: the output folder holds a run with other options, whose results would be replaced.
    """
    from probing.extraction import plan_extraction
    from probing.forward import pick_stacks
    from spafit.models import LoadedModel, load_model

    seconds: dict[str, float] = {}
    torch_dtype(config.dtype)
    if config.out is not None:
        _check_writable(Path(config.out), config.overwrite)
    with timed(seconds, "read tasks"):
        tasks, failed = _read_tasks(() if only_given else config.tasks, given=given, limit=config.limit)
    families = [parse_probe(p) for p in config.probe]

    check_suited(families, tasks)

    def check_families(*, width: int | None) -> None:
        for family in families:
            for task in (t for t in tasks if suits(family, t)):
                family.check(task, width)

    check_families(width=None)
    check_columns(config.controls, tasks)
    if (earlier := find_run(config)) is not None:
        check_same_run(earlier, config, tasks)
    device = pick_device(config.device)
    with timed(seconds, "load model"):
        reference = config.model if model is None else model
        loaded = (
            reference
            if isinstance(reference, LoadedModel)
            else load_model(
                reference,
                revision=config.revision,
                offline=config.offline,
                allow_pickle=config.allow_pickle,
                stack=_path_of(config.stack),
            )
        )
    out = Path(config.out) if config.out is not None else Path("runs") / loaded.name
    if config.out is None:
        _check_writable(out, config.overwrite)
    check_same_run(out, config, tasks, loaded=loaded)
    stacks = pick_stacks(loaded, config.stack)
    for stack in stacks:
        check_families(width=stack.width)
        config.hidden(stack.num_blocks + 1, stack=stack.name)
    settings = ProbeSettings(
        seeds=config.seeds,
        max_train=config.max_train,
        l2=config.l2,
        controls=config.controls,
        n_boot=config.n_boot,
        probe=config.probe,
    )
    with timed(seconds, "plan"):
        needed = needed_texts(tasks, settings)
        extractions, stored = {}, 0
        for name, texts in needed.items():
            options = extraction_options(config, tasks, name)
            found = [plan_extraction(loaded, texts.texts, **{**options, "stack": s.path}) for s in stacks]
            extractions[name] = found[0]
            stored += sum(p.bytes_on_disk for p in found)
    plan = ProbePlan(
        config, loaded, device, out, tuple(tasks), failed, frozenset(), extractions, needed, settings, seconds,
        stored_bytes=stored,
    )  # fmt: skip
    if config.overwrite != "always":
        done = {t.name for t in tasks if is_finished(out, t.name, plan.task_key(t))}
        plan = replace(plan, done=frozenset(done))
    measuring = tuple(
        (t.name, m) for t in tasks for m in config.measures
        if config.overwrite == "always" or not is_finished(out, measure_part(t.name, m), plan.measure_key(t, m))
    )  # fmt: skip
    return replace(plan, measuring=measuring)


def _path_of(names: str | None) -> str | None:
    """The dotted path of a list of blocks, if that is what ``--stack`` gives rather than names of recognised stacks."""
    if names is None or "," in names or names in STACK_NAMES:
        return None
    return names


def _read_tasks(
    references: Sequence[str], *, given: Sequence[Task], limit: int | None
) -> tuple[list[Task], dict[str, str]]:
    """Read all references; where one cannot be read, find out which, so that it does not cost the others."""
    from probing.registry import check_together, load_tasks

    failed: dict[str, str] = {}
    tasks: list[Task] = []
    if references:
        try:
            tasks = list(load_tasks(references))
        except (TaskError, DataError) as error:
            if isinstance(error, UsageError) or len(references) == 1:
                raise
            for reference in references:
                try:
                    load_tasks([reference])
                except (TaskError, DataError) as reason:
                    failed[reference] = str(reason)
            good = [r for r in references if r not in failed]
            if not failed or not good:
                raise
            tasks = list(load_tasks(good))
    tasks = list(check_together([*tasks, *(t.validate() for t in given)]))
    return [t if limit is None else _limited(t, limit) for t in tasks], failed


def _limited(task: Task, limit: int) -> Task:
    items = task.items.groupby("split", sort=False).head(limit)
    if task.kind == "tree":  # whole sentences
        sizes = task.items["group"].value_counts()
        items = items[items.groupby("group")["item"].transform("size") == items["group"].map(sizes)]
    elif task.kind != "number":  # labels that training no longer has
        positions = items["label"].astype(str).str.split(",")
        trained = {p for found in positions[items["split"] == "train"] for p in found} | {""}
        items = items[[trained.issuperset(found) for found in positions]]
    items = items.reset_index(drop=True)
    return replace(task, items=items, notes=(*task.notes, f"limited to {limit} items of each split")).validate()


def extraction_options(config: ProbeConfig, tasks: Sequence[Task], corpus: str) -> dict[str, Any]:
    """What extraction and its plan must agree on for one corpus; ``stack`` may name several."""
    units = {t.unit in SPAN_UNITS for t in tasks if t.corpus.name == corpus}
    options: dict[str, Any] = {
        "sites": config.sites,
        "word_pooling": config.pooling if True in units else (),
        "sentence_pooling": config.pooling if False in units else (),
        "stack": config.stack,
        "dtype": config.dtype,
    }
    return options if config.batch_tokens is None else {**options, "batch_tokens": config.batch_tokens}


def _check_writable(out: Path, overwrite: str) -> None:
    """Find out before the model is loaded that the folder can be written and may be; leaves nothing behind."""
    new = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
        for folder in new:
            folder.rmdir()
    except OSError as error:
        raise OutputError(
            f"--out {out} cannot be written: {error.strerror}. Choose another folder with --out."
        ) from error
    if overwrite == "never" and (out / "run.json").exists():
        raise OutputError(f"--out {out} holds a run already and --overwrite is 'never'. Choose another folder.")


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the wall seconds of the block to ``seconds[phase]``."""
    begun = time.perf_counter()
    try:
        yield
    finally:
        seconds[phase] = round(seconds.get(phase, 0.0) + time.perf_counter() - begun, 3)


def format_seconds(seconds: float) -> str:
    """``45 s``, ``2 min 10 s``, ``1 h 05 min``."""
    s = round(seconds)
    if s < 90:
        return f"{s} s"
    return f"{s // 60} min {s % 60:02d} s" if s < 3600 else f"{s // 3600} h {s % 3600 // 60:02d} min"
