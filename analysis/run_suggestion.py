"""Strata from the folders of probing runs: one plan per stack, from runs of one model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from analysis.placed_strata import AdapterType
from analysis.strata_suggestion import StrataSuggestion
from analysis.suggestion import SPAFIT, suggest_strata
from probing.results import ProbeResults
from spafit.errors import UsageError
from spafit.strata import StrataConfig


def suggest_from_runs(
    runs: Sequence[ProbeResults],
    *,
    strata: Sequence[str] = SPAFIT,
    share: float = 0.95,
    basic_levels: Sequence[str] = ("surface", "syntax"),
    adapter_type: AdapterType = "I",
    budget: int | None = None,
    count: Callable[[StrataConfig], int] | None = None,
    n_boot: int = 1000,
    seed: int = 0,
) -> dict[str, StrataSuggestion]:
    """One suggestion per stack that was probed; runs of one stack are taken together.

    Args:
        runs: of one model, each of one stack or several; their tasks must differ where they are of the same stack.
        strata: see :func:`analysis.suggest_strata`, and likewise the others.
        share: q of the holding rule.
        basic_levels: levels that place s1.
        adapter_type: SPAFIT's type.
        budget: most trainable parameters; for a single stack.
        count: number of parameters that a plan trains on the model.
        n_boot: bootstrap draws.
        seed: of the bootstrap.

    Raises:
        UsageError: no run, runs of different models, or a budget for several stacks.
    """
    if not runs:
        raise UsageError("There is no probing run to suggest strata from. Name a folder of spafit-probe.")
    first = runs[0].run["model"]
    for run in runs[1:]:
        own = run.run["model"]
        if any(own.get(k) != first.get(k) for k in ("weights_digest", "adapter_digest")):
            raise UsageError(
                f"The evidence is from two different models: {runs[0].folder} is of {first['name']}, {run.folder} of "
                f"{own['name']} (other weights). Give runs of one model."
            )
    by_stack: dict[str, list[ProbeResults]] = {}
    for run in runs:
        for stack in run.stacks:
            by_stack.setdefault(stack, []).append(run.of_stack(stack))
    if budget is not None and len(by_stack) > 1:
        raise UsageError(f"A budget is for one stack, and the runs are of {', '.join(by_stack)}. Give runs of one.")
    return {
        stack: suggest_strata(
            [c for run in own for c in run.curves(adjusted_by="random-encoder")],
            num_blocks=own[0].run["model"]["blocks"], stack=stack, model_id=first["name"],
            bias_roles=tuple(own[0].run["model"]["bias_roles"]), share=share, basic_levels=basic_levels,
            adapter_type=adapter_type, strata=strata, budget=budget, count=count, n_boot=n_boot, seed=seed,
        )
        for stack, own in by_stack.items()
    }  # fmt: skip


@dataclass(frozen=True)
class StackSuggestions:
    """Suggestions for the stacks of one model, together.

    Attributes:
        by_stack: the suggestion of each stack that was probed, by its name.
        config: one plan for all stacks of the model (:func:`merged_config`).
    """

    by_stack: dict[str, StrataSuggestion]
    config: StrataConfig

    def explain(self) -> str:
        """What :meth:`StrataSuggestion.explain` says of each stack, behind its name where there are several."""
        if len(self.by_stack) == 1:
            return next(iter(self.by_stack.values())).explain()
        return "\n".join(f"Stack {stack}: {one.explain()}" for stack, one in self.by_stack.items())


def merged_config(suggestions: dict[str, StrataSuggestion], *, blocks: dict[str, int] | None = None) -> StrataConfig:
    """One plan for all stacks; a stack of the model that was not probed stays frozen, which its provenance says.

    Args:
        suggestions: by stack.
        blocks: number of blocks of every stack of the model; by default of the probed ones.
    """
    from spafit.strata import Stratum

    first = next(iter(suggestions.values())).config
    if len(suggestions) == 1 and (blocks is None or len(blocks) == 1):
        return first
    counts = dict(blocks or {}) | {s: g.num_blocks for s, g in suggestions.items()}
    strata = [s for g in suggestions.values() for s in g.config.strata]
    left = [name for name in counts if name not in suggestions]
    strata += [Stratum(name, (0, counts[name]), "freeze") for name in left]
    provenance: dict[str, Any] = {
        "source": "probing evidence by stack", "criterion": "by stack", "tested": False,
        "stacks": {s: dict(g.config.provenance) for s, g in suggestions.items()},
    }  # fmt: skip
    if left:
        provenance["not_probed"] = left
    return replace(first, blocks=counts, strata=tuple(strata), provenance=provenance)
