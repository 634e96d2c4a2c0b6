"""What works with which family of models: real runs on tiny models, their rows, and the page made from them.

    python docs/results/families/run.py run

Without ``run`` only the page, ``docs/families.md``, is made again from ``rows.csv``.
"""

# ruff: noqa: E501 - sentences of a page

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    from tests.families import Family

HERE = Path(__file__).parent
COLUMNS = ("family", "model", "stacks", "biases", "probe", "plan", "note", "train", "round_trip", "merge", "added")
WORKS = "yes"


def run() -> None:
    """Measure every family and write rows and page."""
    sys.path.insert(0, str(HERE.parents[2]))
    from tests.families import FAMILIES

    rows = [measure(family) for family in FAMILIES.values()]
    pd.DataFrame(rows, columns=list(COLUMNS)).to_csv(HERE / "rows.csv", index=False)
    (HERE.parents[1] / "families.md").write_text(page(pd.DataFrame(rows)), encoding="utf-8")


def measure(family: Family) -> dict[str, str]:
    """One row: what was found, and what each step gave."""
    import torch

    from spafit.adapt import apply_strata, canonical_name, canonical_parameters, plan_for
    from spafit.checkpoint import load, save
    from spafit.errors import ConfigError
    from spafit.stacks import find_stacks
    from tests.families import one_step, outputs

    base = family.build()
    stacks = find_stacks(base)
    row = dict.fromkeys(COLUMNS, "") | {
        "family": family.name,
        "model": type(base).__name__,
        "stacks": ", ".join(f"{s.name} of {s.num_blocks}{' (one shared module)' if s.shared else ''}" for s in stacks),
        "train": WORKS,
        "biases": "; ".join(dict.fromkeys(_biases(s) for s in stacks)),
        "probe": _probe(family, base) if family.reads_text else "reads no text",
    }
    for preset in ("spafit-scaled-I", "lora"):
        model = copy.deepcopy(base)
        try:
            stratified = apply_strata(model, plan_for(model, preset, model_id=family.name))
        except ConfigError as error:
            row["note"] += f"{preset}: {error} "
            continue
        row["plan"] = preset
        row["note"] += "; ".join([*stratified.config.provenance.get("substitutions", ()), *stratified.plan.notes])
        break
    before = {n: p.detach().clone() for n, p in canonical_parameters(stratified.model).items()}
    start = outputs(family, base)
    received = {canonical_name(n) for n in one_step(family, stratified.model)}
    one_step(family, stratified.model)
    moved = {n for n, p in canonical_parameters(stratified.model).items() if not torch.equal(p, before[n])}
    planned = set(stratified.trainable)
    for names, said in (
        (planned - received, "planned without a gradient, since nothing reads it"),
        ((received | moved) - planned, "trained without a plan"),
    ):
        if names:
            row["train"] = f"no: {', '.join(sorted(names))}: {said}"
    trained = outputs(family, stratified.model)
    assert not torch.equal(trained, start)

    def round_trip() -> bool:
        with tempfile.TemporaryDirectory() as folder:
            save(stratified, folder)
            return torch.equal(outputs(family, load(folder, copy.deepcopy(base)).model), trained)

    def merge() -> bool:
        most = max(1.0, float(trained.abs().max()))
        return float((outputs(family, stratified.merge()) - trained).abs().max()) <= 1e-5 * most

    def added() -> bool:
        model = copy.deepcopy(base)
        made = apply_strata(model, plan_for(model, f"bias-added:{row['plan']}"))
        return {canonical_name(n) for n in one_step(family, made.model)} == set(made.trainable)

    return row | {"round_trip": _tried(round_trip), "merge": _tried(merge), "added": _tried(added)}


def _tried(what: Callable[[], bool]) -> str:
    from spafit.errors import SpafitError

    try:
        return WORKS if what() else "no: other numbers"
    except SpafitError as error:
        return f"refused: {error}"


def _biases(stack: Any) -> str:
    linear = [r for r in stack.roles if not r.endswith("norm")]
    bare = [r for r in linear if r not in stack.bias_roles]
    if not stack.bias_roles:
        return "none"
    return (
        "all"
        if not bare
        else f"all but {', '.join(bare)}"
        if len(bare) < len(linear) / 2
        else ", ".join(stack.bias_roles)
    )


def _probe(family: Family, model: Any) -> str:
    """Extract the states of a few texts, and compare the last ones with a pass over one text alone."""
    import numpy as np

    from probing.extraction import extract
    from probing.tasks.base import Text
    from spafit import load_model
    from spafit.errors import SpafitError
    from tests.tiny import tiny_tokenizer

    texts = [Text.from_words(w.split()) for w in ("the cat sees a dog", "a big old dog runs and runs", "dogs")]
    found = []
    backbone = getattr(model, "base_model", model)
    try:
        loaded = load_model(
            (backbone, tiny_tokenizer(decoder=family.output == "logits" and "LM" in type(model).__name__))
        )
    except SpafitError as error:
        return f"refused: {error}"
    for stack in loaded.stacks:
        if stack.name == "vision":
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                together = extract(loaded, texts, stack=stack.name, cache_dir=Path(folder))
                alone = extract(loaded, texts[:1], stack=stack.name, cache_dir=Path(folder) / "one")
            except (SpafitError, TypeError, ValueError) as error:
                found.append(f"{stack.name}: refused: {str(error).splitlines()[0].replace('; ', ', ')}")
                continue
            states = [s.sentences("mean", hidden=stack.num_blocks)[0] for s in (together, alone)]
            right = (
                np.isfinite(states[0]).all() and np.abs(states[0] - states[1]).max() <= 1e-5 * np.abs(states[1]).max()
            )
            found.append(f"{stack.name}: {WORKS if right and together.num_hidden == stack.num_blocks + 1 else 'no'}")
    return found[0].partition(": ")[2] if len(loaded.stacks) == 1 else "; ".join(found)


def page(rows: pd.DataFrame) -> str:
    """The page's text."""
    rows = rows.fillna("")
    reasons: dict[str, int] = {}

    def cell(text: str) -> str:
        """Short text, with a number that leads to the reason where it did not work."""
        parts = []
        for part in str(text).split("; "):
            place, said, reason = part.partition("refused: ")
            if not said:
                place, said, reason = part.partition("no: ")
            if said:
                parts.append(f"{place}{said.strip(': ')} [{reasons.setdefault(reason, len(reasons) + 1)}]")
            else:
                parts.append(part)
        return "; ".join(parts)

    lines = [
        "# Families of models",
        "",
        "Each row was run on a tiny model of the family with random weights (six blocks, width 16), made from its configuration. That says that the structure is understood and that exactly the planned tensors train, not how well a trained model of the family does. Made by `python docs/results/families/run.py run`.",
        "",
        "- *probe*: the states of texts, extracted in a batch, are finite, one per block and one for the embeddings, and the last ones equal those of a text alone to 1e-5.",
        "- *plan*: the preset that applies. *train*: one step through plain torch gives gradients to exactly the planned tensors, and two steps move no other.",
        "- *save, load*: a stock PEFT folder, loaded on a fresh base, gives equal outputs to the bit. *merge*: the merged plain model gives them to 1e-5.",
        "- *added biases*: the same with `bias-added:` before the preset's name, which gives blocks without biases new ones.",
        "",
        "| family | model | stacks | linear maps with a bias | probe | plan | train | save, load | merge | added biases |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows.to_dict("records"):
        cells = [r["family"], f"`{r['model']}`", r["stacks"], r["biases"], cell(r["probe"]), f"`{r['plan']}`"]
        cells += [cell(r[c]) for c in ("train", "round_trip", "merge", "added")]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Reasons", ""]
    lines += [f"{number}. {reason}" for reason, number in reasons.items()]
    lines += ["", "## What the plans say of themselves", ""]
    lines += [f"- {r['family']}: {r['note'].strip()}" for r in rows.to_dict("records") if r["note"]]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["run"]:
        run()
    else:
        made = page(pd.read_csv(HERE / "rows.csv", keep_default_na=False))
        (HERE.parents[1] / "families.md").write_text(made, encoding="utf-8")
