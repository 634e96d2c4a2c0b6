"""Plans made from another plan, to compare it with: reversed, random, count-only, and LoRA at equal parameters.

They answer what it is about a plan that helps: its order (reversed), its places (random), its boundary in the middle
(count-only), or just its number of parameters (LoRA everywhere).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from spafit.errors import ConfigError
from spafit.strata import StrataConfig
from spafit.stratum import LoraOptions, Outside, Stratum

Count = Callable[[StrataConfig], int]


def reversed_plan(plan: StrataConfig) -> StrataConfig:
    """The same strata from the last block to the first, in every stack; outside the blocks nothing changes."""
    strata = []
    for stack, n in plan.blocks.items():
        own = sorted((s for s in plan.strata if s.stack == stack), key=lambda s: -s.blocks[0])
        strata += [replace(s, blocks=(n - s.blocks[1], n - s.blocks[0])) for s in own]
    return _derived(plan, strata, f"blocks of {_source(plan)} in reverse order", "none: a comparison")


def random_plan(plan: StrataConfig, *, seed: int) -> StrataConfig:
    """As many blocks per method as in ``plan``, in random places of the same stack; equal neighbours are merged.

    Args:
        plan: the plan.
        seed: draws the places; equal seeds give equal plans.
    """
    from spafit.runtime import generator

    strata: list[Stratum] = []
    for stack, n in plan.blocks.items():
        kinds = [s for s in plan.strata if s.stack == stack for _ in range(*s.blocks)]
        for block, k in enumerate(generator(seed, "random plan", stack).permutation(n).tolist()):
            here = replace(kinds[k], blocks=(block, block + 1))
            last = strata[-1] if strata else None
            if last is not None and last.stack == stack and replace(here, blocks=last.blocks) == last:
                strata[-1] = replace(last, blocks=(last.blocks[0], block + 1))
            else:
                strata.append(here)
    return _derived(plan, strata, f"blocks of {_source(plan)} in random order, seed {seed}", "none: a comparison")


def count_only_plan(
    plan: StrataConfig,
    *,
    count: Count,
    bias_roles: Mapping[str, Collection[str]] | None = None,
    roles: Mapping[str, Collection[str]] | None = None,
) -> StrataConfig:
    """As many trained blocks per stack as in ``plan``, the last ones, all as SPAFIT's third stratum; no middle stratum.

    They train low-rank updates and the feed-forward sub-layer's biases (where there is no such bias, norms, or new
    biases where the plan adds some). Targets, dropout and the scale alpha / rank are those of the plan's first
    low-rank stratum of the stack (else of any stack, else the defaults). The rank is one for all, the nearest in
    trainable parameters; what trains outside the blocks stays. Provenance holds
    ``parameters: {wanted, got, difference}``.

    Args:
        plan: the plan.
        count: number of parameters that a plan trains on the model.
        bias_roles: per stack, the roles whose sub-layers have a bias; None means all of them have.
        roles: per stack, the roles that its blocks have; None means all.

    Raises:
        ConfigError: the plan trains no block.
    """
    from spafit.presets import three_strata_config

    trained = {
        stack: sum(s.blocks[1] - s.blocks[0] for s in plan.strata if s.stack == stack and s.is_trained)
        for stack in plan.blocks
    }
    if not any(trained.values()):
        raise ConfigError(
            f"A plan with as many trained blocks as {_source(plan)} has no rank to choose: no block trains there. "
            "Leave this comparison out."
        )
    starts = {stack: (n - trained[stack], n - trained[stack]) for stack, n in plan.blocks.items()}
    base = three_strata_config(
        starts,
        blocks=plan.blocks,
        bias_roles=bias_roles,
        model_id=plan.model_id,
        roles=roles,
        bias_free="bias-added" if any(s.adds_biases for s in plan.strata) else "norm",
    )
    options = {stack: _low_rank_options(plan, stack) for stack in plan.blocks}

    def at_rank(rank: int) -> StrataConfig:
        strata = [replace(s, lora=_at_rank(options[s.stack], rank)) if s.lora is not None else s for s in base.strata]
        return replace(base, strata=tuple(strata), outside=plan.outside)

    return _nearest(plan, at_rank, count, f"as many trained blocks as {_source(plan)}, the last ones")


def lora_matched_plan(plan: StrataConfig, *, count: Count) -> StrataConfig:
    """LoRA on query, key and value of all blocks, at the rank nearest to ``plan`` in trainable parameters.

    Embeddings, pooler and final norm are frozen; the head trains as in the plan. Provenance holds
    ``parameters: {wanted, got, difference}``: a whole rank seldom gives the exact number.

    Args:
        plan: the plan.
        count: number of parameters that a plan trains on the model.
    """

    def at_rank(rank: int) -> StrataConfig:
        strata = tuple(Stratum(stack, (0, n), "lora", LoraOptions(rank)) for stack, n in plan.blocks.items())
        outside = Outside(pooler="freeze", head=plan.outside.head)
        return StrataConfig(plan.model_id, plan.blocks, strata, outside)

    return _nearest(plan, at_rank, count, f"LoRA on all blocks, to match {_source(plan)}")


def _nearest(plan: StrataConfig, at_rank: Callable[[int], StrataConfig], count: Count, source: str) -> StrataConfig:
    """The plan at the rank whose parameters are nearest to those of ``plan``; the smaller rank where two are."""
    wanted = count(plan)
    counts = {rank: count(at_rank(rank)) for rank in (1, 2)}
    if counts[2] <= counts[1]:
        raise ConfigError(
            f"Parameters do not grow with the rank ({counts[1]:,} at rank 1, {counts[2]:,} at rank 2), so no rank "
            "matches. Give a count of trainable parameters."
        )

    def distance(rank: int) -> int:
        if rank not in counts:
            counts[rank] = count(at_rank(rank))
        return abs(counts[rank] - wanted)

    # Parameters are linear in the rank; the neighbours show whether the line held, and the walk mends where it did not.
    rank = max(1, 1 + round((wanted - counts[1]) / (counts[2] - counts[1])))
    while rank > 1 and distance(rank - 1) <= distance(rank):
        rank -= 1
    while distance(rank + 1) < distance(rank):
        rank += 1
    return at_rank(rank).with_provenance(
        {
            "source": source,
            "criterion": f"rank {rank}, the nearest in trainable parameters",
            "tested": False,
            "parameters": {"wanted": wanted, "got": counts[rank], "difference": counts[rank] - wanted},
        }
    )


def _low_rank_options(plan: StrataConfig, stack: str) -> LoraOptions:
    low_rank = [s for s in plan.strata if s.lora is not None]
    chosen = next((s.lora for s in low_rank if s.stack == stack), low_rank[0].lora if low_rank else None)
    return chosen or LoraOptions()


def _at_rank(options: LoraOptions, rank: int) -> LoraOptions:
    """The options at another rank: the same alpha / rank, or under rsLoRA, made for this, the same alpha."""
    assert options.alpha is not None
    return replace(options, rank=rank, alpha=options.alpha if options.rslora else options.alpha * rank / options.rank)


def _source(plan: StrataConfig) -> str:
    return str(plan.provenance.get("source", "another plan"))


def _derived(plan: StrataConfig, strata: list[Stratum], source: str, criterion: str) -> StrataConfig:
    provenance: dict[str, Any] = {"source": source, "criterion": criterion, "tested": False}
    if "substitutions" in plan.provenance:
        # They name blocks of the plan before its blocks moved.
        provenance["substitutions"] = [f"{_source(plan)}: {s}" for s in plan.provenance["substitutions"]]
    return replace(plan, strata=tuple(strata), provenance=provenance, origin=None)
