"""Who runs in a race: suggested placements, and the plans that a suggestion has to beat."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from analysis.placed_strata import AdapterType, placed_strata
from spafit.derived_plans import count_only_plan, lora_matched_plan, random_plan, reversed_plan
from spafit.errors import ConfigError, UsageError
from spafit.strata import StrataConfig, Stratum

if TYPE_CHECKING:
    from torch import nn

    from analysis.strata_suggestion import StrataSuggestion

Role = Literal["suggestion", "baseline"]


@dataclass(frozen=True)
class Candidate:
    """A plan that takes part.

    Attributes:
        name: unique; what tables call it.
        plan: the plan.
        role: ``suggestion`` or ``baseline``.
        learning_rates: peak rates that are tried; empty takes the race's multiples of the plan's default.
        remedies: texts as in ``--retain``.
        protected: a baseline that takes part in the confirmation whatever its scores.
    """

    name: str
    plan: StrataConfig
    role: Role
    learning_rates: tuple[float, ...] = ()
    remedies: tuple[str, ...] = ()
    protected: bool = False


def suggested_candidates(
    suggestion: StrataSuggestion,
    *,
    n: int = 4,
    bias_roles: Collection[str] | None = None,
    adapter_type: AdapterType = "I",
    probing: StrataSuggestion | None = None,
) -> list[Candidate]:
    """The suggestion and further placements of its short list, and what probing alone suggests where that differs.

    Args:
        suggestion: from a pilot.
        n: placements of the pilot, the suggestion included.
        bias_roles: roles whose sub-layers have a bias; None means all.
        adapter_type: SPAFIT's type.
        probing: a suggestion for the same stack; only one that a criterion placed takes part.
    """
    choice = suggestion.choice
    if choice is None:
        return [Candidate(f"suggested {suggestion.boundaries}", suggestion.config, "suggestion")]
    found = []
    for boundaries in choice.short_list(n):
        placed = placed_strata(
            choice.strata, boundaries, stack=suggestion.stack, num_blocks=suggestion.num_blocks,
            bias_roles=bias_roles, adapter_type=adapter_type, model_id=suggestion.config.model_id,
            provenance={"source": f"pilot {boundaries}", "criterion": "short list of the pilot", "tested": False},
        )  # fmt: skip
        plan = replace(placed, outside=suggestion.config.outside)
        found.append(Candidate(f"pilot {boundaries}", plan, "suggestion"))
    if probing is not None and probing.criterion in ("segmentation", "holding"):
        plan = replace(probing.config, outside=suggestion.config.outside)
        if all(_essence(plan) != _essence(c.plan) for c in found):
            found.append(Candidate(f"probing {probing.boundaries}", plan, "suggestion"))
    return found


def standard_baselines(
    suggestion: StrataConfig,
    model: nn.Module,
    *,
    missing: Collection[str] = (),
    relative_gradients: np.ndarray | None = None,
    random: int = 5,
    remedies: Sequence[str] = (),
) -> list[Candidate]:
    """The plans that answer what it is about a suggestion that helps, each only once and none equal to it.

    Thirds; SPAFIT-4-9 scaled, types I and II; as many trained blocks, the last ones (count-only); LoRA on all blocks at
    equal parameters, and at rank 64; BitFit; full; the head alone; the last blocks in full, as many as have low-rank
    updates in the suggestion; blocks by their relative gradient, as many per method; reversed; random places. With
    ``remedies``, LoRA and the scaled plan once more with each of them.

    Args:
        suggestion: the plan that they are compared with; one stack.
        model: the model with its head, not wrapped; it is only counted on.
        missing: parameters that the checkpoint lacks.
        relative_gradients: norm of each block's gradient as a share of its weights', shape (L,); None leaves that
            baseline out.
        random: how many random placements.
        remedies: texts as in ``--retain``.

    Raises:
        UsageError: a suggestion for several stacks.
    """
    from spafit.adapt import count_trainable, plan_for, with_missing_pooler
    from spafit.stacks import find_stacks

    if len(suggestion.blocks) != 1:
        raise UsageError("A race is for models with one stack of blocks; give a plan for one.")
    ((_, blocks),) = suggestion.blocks.items()
    biases = {s.name: s.bias_roles for s in find_stacks(model)}

    def count(plan: StrataConfig) -> int:
        return count_trainable(model, with_missing_pooler(model, plan, missing))

    low_rank = sum(s.blocks[1] - s.blocks[0] for s in suggestion.strata if s.is_low_rank) or 1
    made: dict[str, Any] = {
        name: (lambda n=name: plan_for(model, n, model_id=suggestion.model_id, missing=missing))
        for name in ("spafit-scaled-I", "spafit-scaled-II", "thirds", "lora", "bitfit", "full", "head",
                     f"last-{min(low_rank, blocks)}")
    }  # fmt: skip
    made |= {
        "count-only": lambda: count_only_plan(suggestion, count=count, bias_roles=biases),
        "lora-matched": lambda: lora_matched_plan(suggestion, count=count),
        "reversed": lambda: reversed_plan(suggestion),
    }
    if relative_gradients is not None:
        made["gradient-norm"] = lambda: by_relative_gradient(suggestion, relative_gradients)
    made |= {f"random-{i}": (lambda i=i: random_plan(suggestion, seed=i)) for i in range(random)}
    known = [_essence(suggestion)]
    found: list[Candidate] = []
    for name, make in made.items():
        try:
            plan = with_missing_pooler(model, make(), missing)
        except ConfigError:  # such as a rank for a plan that trains no block
            continue
        if _essence(plan) in known:
            continue
        known.append(_essence(plan))
        found.append(Candidate(name, plan, "baseline", protected=name in ("spafit-scaled-I", "count-only")))
    by_name = {c.name: c for c in found}
    for remedy in remedies:
        for name in ("lora", "spafit-scaled-I"):
            if name in by_name:
                found.append(replace(by_name[name], name=f"{name} + {remedy}", remedies=(remedy,), protected=False))
    return found


def by_relative_gradient(plan: StrataConfig, relative: np.ndarray) -> StrataConfig:
    """As many blocks per method as in ``plan``, given out by relative gradient: the largest get the last method.

    Args:
        plan: a plan for one stack.
        relative: shape (L,).
    """
    ((_, blocks),) = plan.blocks.items()
    strata = sorted(plan.strata, key=lambda s: s.blocks)
    kinds = [s for s in strata for _ in range(*s.blocks)]
    order = np.argsort(np.asarray(relative), kind="stable")
    given: list[Stratum] = [kinds[0]] * blocks
    for kind, block in zip(kinds, order.tolist(), strict=True):
        given[block] = kind
    merged: list[Stratum] = []
    for block, kind in enumerate(given):
        here = replace(kind, blocks=(block, block + 1))
        last = merged[-1] if merged else None
        if last is not None and replace(here, blocks=last.blocks) == last:
            merged[-1] = replace(last, blocks=(last.blocks[0], block + 1))
        else:
            merged.append(here)
    provenance = {"source": "blocks by relative gradient", "criterion": "none: a comparison", "tested": False}
    return replace(plan, strata=tuple(merged), provenance=provenance, origin=None)


def _essence(plan: StrataConfig) -> dict[str, Any]:
    """What a plan trains, without where it comes from."""
    content = plan.to_dict()
    content.pop("provenance", None)
    content["strata"] = sorted(content["strata"], key=lambda s: (s["stack"], s["blocks"]))
    return content
