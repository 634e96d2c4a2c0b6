"""Strata from a pilot, with what probing alone would have said beside them."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from analysis.block_evidence import BlockEvidence
from analysis.boundary_choice import choose_boundaries
from analysis.pilot import Pilot
from analysis.placed_strata import placed_strata
from analysis.strata_suggestion import StrataSuggestion, choice_sentences
from analysis.suggestion import suggest_strata
from spafit.errors import UsageError, did_you_mean
from spafit.strata import StrataConfig

_UNITS = ("bits", "points", "perplexity")


def suggest_from_pilot(
    pilot: Pilot | str | Path,
    *,
    strata: Sequence[str] = (),
    budget: int | None = None,
    tolerance: float | None = None,
    model_id: str | None = None,
    missing_pooler: bool = False,
    probing: StrataSuggestion | None = None,
    n_boot: int = 1000,
    seed: int = 0,
) -> StrataSuggestion:
    """Choose boundaries by what a pilot says of gain and forgetting, within limits.

    See :func:`analysis.boundary_choice.choose_boundaries` for how, and :func:`analysis.pilot.run_pilot` for what the
    evidence is and when not to trust it. Untested until raced.

    Args:
        pilot: a pilot or its folder.
        strata: two to five methods from the first block up; by default freeze and then the pilot's, in its order.
        budget: most trainable parameters, head included.
        tolerance: most forgetting, in the pilot's unit (see :func:`tolerance_in`).
        model_id: the model's reference; by default the pilot's.
        missing_pooler: the checkpoint has no pooler, so that it must train in full.
        probing: a suggestion for the same model and stack from probing alone, whose criteria are reported beside it.
        n_boot: bootstrap draws.
        seed: of the bootstrap.

    Raises:
        UsageError: strata that the pilot did not measure, limits that nothing keeps, or a suggestion for another stack.
    """
    pilot = pilot if isinstance(pilot, Pilot) else Pilot.load(pilot)
    run = pilot.run
    stack, blocks, name = str(run["stack"]), int(run["blocks"]), model_id or str(run["model"]["name"])
    if probing is not None and dict(probing.config.blocks) != {stack: blocks}:
        raise UsageError(
            f"The pilot is of {blocks} blocks of stack {stack!r}, and the probing evidence of "
            f"{probing.num_blocks} of {probing.stack!r}: evidence from two different models. Give runs of one model."
        )
    evidence = BlockEvidence.from_pilot(pilot, n_boot=n_boot, seed=seed)
    choice = choose_boundaries(evidence, strata=strata, budget=budget, tolerance=tolerance)
    roles: Collection[str] = tuple(run["bias_roles"])
    row = choice.table.iloc[choice.chosen]
    sentences = choice_sentences(choice)
    placed = placed_strata(
        choice.strata, choice.boundaries, stack=stack, num_blocks=blocks, bias_roles=roles,
        adapter_type=run["adapter_type"], model_id=name,
    )  # fmt: skip
    if missing_pooler:
        placed = replace(placed, outside=replace(placed.outside, pooler="full"))
    provenance: dict[str, Any] = {
        "source": f"pilot on {run['task']}", "criterion": "most gain within limits, ties to fewer parameters",
        "tested": False, "evidence": "strata" if choice.beats_null else "smooth", "reason": " ".join(sentences[:3]),
        "parameters": int(row["parameters"]), "budget": budget,
        "gain": [round(float(row[c]), 4) for c in ("gain", "gain_low", "gain_high")],
        "forgetting": [round(float(row[c]), 4) for c in ("forgetting", "forgetting_low", "forgetting_high")],
        "unit": evidence.unit, "tolerance": tolerance, "p_optimal": round(float(row["p_optimal"]), 4),
        "regret": round(float(row["regret"]), 4), "beyond_anywhere": [round(v, 4) for v in choice.null],
        "alternatives": [list(p) for p in choice.short_list(4) if p != choice.boundaries],
        "kept": list(evidence.tasks), "seeds": list(run["seeds"]), "data": run["data"],
    }  # fmt: skip
    config: StrataConfig = placed.with_provenance(provenance)
    base = probing or suggest_strata([], num_blocks=blocks, stack=stack, bias_roles=roles)
    notes = dict(base.notes) if probing is not None else {}
    return replace(
        base, config=config, criterion="pilot", evidence="strata" if choice.beats_null else "smooth",
        reason=f"A pilot on {run['task']} places them.", choice=choice, notes=notes, moved="",
    )  # fmt: skip


def tolerance_in(text: str, *, unit: str, before: float) -> float:
    """A tolerance that a person wrote, in the unit of a pilot's abilities.

    Args:
        text: a number, alone (in ``unit``) or with a unit: ``0.02bits``, ``2points``, ``1.5perplexity``. Perplexity is
            that of running text: how much it may rise.
        unit: ``bits`` or ``points``.
        before: ability before training, in bits the mean log2 of a token's probability.

    Raises:
        UsageError: no such number or unit, or one that does not fit what was read.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][-+]?\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None:
        raise UsageError(f"--tolerance {text!r} is not a number with a unit, such as 0.02bits or 2points.")
    value, given = float(match[1]), match[2].lower() or unit
    given = {"bit": "bits", "point": "points", "ppl": "perplexity"}.get(given, given)
    if given not in _UNITS:
        raise UsageError(f"--tolerance {text!r}: the unit can be {', '.join(_UNITS)}.{did_you_mean(given, _UNITS)}")
    if given == "perplexity" and unit == "bits":
        return math.log2((2.0**-before + value) / 2.0**-before)
    if given != unit:
        raise UsageError(
            f"--tolerance {text!r} is in {given}, and what is kept was read in {unit}. Give {unit}, or keep "
            f"{'minimal pairs' if given == 'points' else 'running text' if given == 'perplexity' else 'probing tasks'}."
        )
    return value
