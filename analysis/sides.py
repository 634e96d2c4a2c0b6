"""The models of a comparison: what a reference stands for, and how the models after stand to the one before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.readings import Side
from probing.config import ProbeConfig
from probing.planning import plan_probing, timed
from probing.results import ProbeResults
from probing.shared_prefix import unchanged_hidden
from probing.tasks.base import Task
from spafit.errors import SpafitError, UsageError

if TYPE_CHECKING:
    from spafit.models import LoadedModel


def is_pair(value: Any) -> bool:
    """Whether a value is one model in memory: (module, tokenizer)."""
    from torch import nn

    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], nn.Module)


def side_labels(references: Sequence[Any], given: Sequence[str] | None) -> list[str]:
    """Names of the models after training: those given, or made from their references; all different."""
    if given is not None:
        if len(given) != len(references) or len(set(given)) < len(given) or not all(given):
            raise UsageError(f"labels must be {len(references)} different names; got {list(given)}.")
        return [g.replace("/", "-") for g in given]
    names = []
    for i, reference in enumerate(references):
        path = Path(reference) if isinstance(reference, str | Path) else None
        parts = [] if path is None else [p for p in path.parts if p != "model" and not p.startswith("seed-")]
        names.append(parts[-1] if parts else f"after-{i + 1}")
    return [n if names.count(n) == 1 else f"{n}-{i + 1}" for i, n in enumerate(names)]


def run_folder(reference: Any) -> Path | None:
    """The folder of a probing run, if that is what the reference is."""
    path = Path(reference) if isinstance(reference, str | Path) else None
    return path if path is not None and (path / "scores.parquet").is_file() else None


def _checked(reference: Any) -> Any:
    """The reference; a folder of training results is answered with what to give instead."""
    path = Path(reference) if isinstance(reference, str | Path) else None
    if path is not None and not (path / "config.json").exists():
        model = next(iter(sorted(path.glob("seed-*/model"))), None)
        if model is not None:
            raise UsageError(f"{path} is a folder of training results. Give one seed's model, such as {model}.")
    return reference


def first_side(reference: Any, config: ProbeConfig, given: Sequence[Task]) -> Side:
    """The model before training, ready to be probed, or a finished probing run of it."""
    folder = run_folder(reference)
    if folder is not None:
        return _from_run(folder, "before")
    plan = plan_probing(
        replace(config, model=named_reference(reference)), model=_checked(reference), given=given,
        only_given=bool(given) and set(config.tasks) == {t.name for t in given},
    )  # fmt: skip
    return Side(plan.loaded.name, plan, None, plan.out, unchanged=0, why="")


def named_reference(reference: Any) -> str | None:
    """What the user gave, if it is a name or a folder."""
    return str(reference) if isinstance(reference, str | Path) else None


def _from_run(folder: Path, name: str) -> Side:
    """A finished probing run, with its model where that can be loaded with the same weights."""
    results = ProbeResults.load(folder)
    content = {k: v for k, v in results.run["config"].items() if v is not None}
    config = replace(
        ProbeConfig.from_dict(content, where=str(folder)), out=str(folder), overwrite="missing", measures=()
    )
    try:
        plan = plan_probing(config)
    except SpafitError as error:
        return Side(
            name, None, results, folder, unchanged=0, why=f"{folder}: its model or tasks cannot be had ({error})"
        )
    recorded = results.run["model"]
    if (plan.loaded.weights_digest, plan.loaded.adapter_digest) != (
        recorded["weights_digest"], recorded["adapter_digest"],
    ):  # fmt: skip
        return Side(name, None, results, folder, unchanged=0, why=f"{folder}: its model has other weights now")
    return Side(plan.loaded.name if name == "before" else name, plan, None, folder, unchanged=0, why="")


def later_side(reference: Any, name: str, first: Side, folder: Path, seconds: dict[str, float]) -> Side:
    """A model after training: from its first changed hidden state on, where it can stand beside the first one.

    Args:
        reference: the model, or the folder of a probing run.
        name: its label.
        first: the model before training.
        folder: of the comparison; the probing run goes below it.
        seconds: the time spent loading is added here.

    Raises:
        UsageError: another number of blocks, or nothing to compare with.
    """
    run = run_folder(reference)
    if run is not None:
        side = _from_run(run, name)
        if side.plan is None or first.plan is None:
            return side
        loaded = side.plan.loaded
        unchanged = _unchanged(first, loaded)
        return replace(side, **_counts(first, unchanged), **_fit(first, loaded, unchanged))
    if first.plan is None:
        raise UsageError(
            f"{first.why}. Give run folders for the models after training, too, or a model before training that can be "
            "loaded."
        )
    from spafit.models import LoadedModel, load_model

    base = first.plan.config
    with timed(seconds, "load models"):
        loaded = (
            reference if isinstance(reference, LoadedModel)
            else load_model(_checked(reference), offline=base.offline, allow_pickle=base.allow_pickle)
        )  # fmt: skip
    unchanged = _unchanged(first, loaded)
    fit = _fit(first, loaded, unchanged)
    if not fit["comparable"]:
        unchanged = dict.fromkeys(unchanged, 0)
    changed = [s for s in first.plan.stacks if unchanged[s.name] <= s.num_blocks]
    if not changed:
        return Side(name, None, None, None, why="", **_counts(first, unchanged), **fit)
    several = len(first.plan.stacks) > 1
    layers = [f"{s.name}:" * several + f"{unchanged[s.name]}-{s.num_blocks}" for s in changed]
    out = folder / "after" / name
    config = replace(
        base, model=named_reference(reference), revision=None,
        controls=tuple(c for c in base.controls if c == "word-type"),
        layers="all" if not fit["comparable"] else ",".join(layers),
        stack=",".join(s.name for s in changed) if several else base.stack,
        tasks=tuple(t.name for t in first.plan.tasks), out=str(out), measures=(),
    )  # fmt: skip
    plan = plan_probing(config, model=loaded, given=first.plan.tasks, only_given=True)
    return Side(name, plan, None, out, why="", **_counts(first, unchanged), **fit)


def _unchanged(first: Side, after: LoadedModel) -> dict[str, int]:
    """Unchanged hidden states of every stack that is compared, by its name."""
    assert first.plan is not None
    before, stacks = first.plan.loaded, first.plan.stacks
    if before.tokenizer_digest != after.tokenizer_digest:
        return dict.fromkeys((s.name for s in stacks), 0)
    one = first.plan.config.stack if len(stacks) == 1 else None
    return {s.name: unchanged_hidden(before, after, stack=one if len(stacks) == 1 else s.name) for s in stacks}


def _counts(first: Side, unchanged: dict[str, int]) -> dict[str, Any]:
    assert first.plan is not None
    return {"unchanged": unchanged[first.plan.stack.name], "unchanged_by": unchanged}


def _fit(first: Side, loaded: LoadedModel, unchanged: dict[str, int]) -> dict[str, Any]:
    """Whether hidden states of one model stand beside those of the other, and what cannot be compared."""
    from probing.forward import pick_stacks

    assert first.plan is not None
    pairs = list(zip(first.plan.stacks, pick_stacks(loaded, first.plan.config.stack), strict=True))
    for old, new in pairs:
        if new.num_blocks != old.num_blocks:
            raise UsageError(
                f"{loaded.name} has {new.num_blocks} blocks and {first.plan.loaded.name} has {old.num_blocks}: no "
                "hidden state of one stands for one of the other. Compare checkpoints of one architecture; curves of "
                "different models over relative depth come from spafit-probe --model A --model B."
            )
    old, new = next(((a, b) for a, b in pairs if a.width != b.width), pairs[0])
    missing = ""
    if new.width != old.width:
        missing = f"the widths differ ({old.width} and {new.width}), so probes do not transfer; only lost is given. "
    elif loaded.tokenizer_digest != first.plan.loaded.tokenizer_digest:
        missing = "the tokenizers differ, so that part of a change may be other tokens. "
    elif _on_other_base(first.plan.loaded, loaded, max(unchanged.values())):
        missing = f"the adapter was trained on another base than {first.plan.loaded.name}, whose change counts, too. "
    return {"comparable": new.width == old.width, "missing": missing}


def _on_other_base(before: LoadedModel, after: LoadedModel, unchanged: int) -> bool:
    """Whether an adapter changed everything from the embeddings on although its base is another one.

    An adapter on what an earlier stage left shares at least the embeddings with the model before it.
    """
    return after.adapter_digest is not None and after.weights_digest != before.weights_digest and unchanged == 0
