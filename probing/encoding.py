"""States of every encoder of a run: the model itself, and one for each seed of a control that is an encoder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from probing.planning import ProbePlan, extraction_options
from probing.tasks.base import Task
from spafit.runtime import Progress

if TYPE_CHECKING:
    from probing.store import ActivationStore

#: States by encoder (``none``: the model itself; else the control that it is), seed, corpus and stack.
Stores = dict[tuple[str, int | None, str, str], "ActivationStore"]


def extract_states(
    plan: ProbePlan, todo: Sequence[Task], notes: list[str], seconds: dict[str, float], *, quiet: bool
) -> Stores:  # fmt: skip
    """States of the model for what is probed or measured, and of controls' encoders for what is probed."""
    stores: Stores = {}
    corpora = corpora_of(plan, todo)
    tokens = sum(plan.extractions[c].tokens for c in corpora)
    tokens += (plan.encoders - 1) * sum(plan.extractions[c].tokens for c in {t.corpus.name for t in todo})
    count = plan.encoders if todo else 1
    with Progress(f"Encoding with {count} encoder(s)", tokens, quiet=quiet) as progress:
        for control, seed, corpus, found, spent in encoders(plan, todo, shard=None, progress=progress.advance):
            stores.update({(control, seed, corpus, stack): store for stack, store in found.items()})
            name = "encode" if seed is None else f"encode ({control.replace('-', ' ')})"
            seconds[name] = seconds.get(name, 0.0) + spent
            notes += [n for store in found.values() for n in store.notes if n not in notes]
    return stores


def corpora_of(plan: ProbePlan, todo: Sequence[Task]) -> set[str]:
    """Names of the corpora whose states are needed: of the tasks to fit, and of those to measure."""
    measured = {name for name, _ in plan.measuring}
    return {t.corpus.name for t in plan.tasks if t in todo or t.name in measured}


def extract_shard(plan: ProbePlan, shard: tuple[int, int], *, quiet: bool = False) -> None:
    """Compute part ``i`` of ``n`` of the states that a plan needs, into the cache; a later full run merges them."""
    todo = [t for t in plan.tasks if t.name not in plan.done]
    total = plan.encoders * sum(p.tokens for p in plan.extractions.values()) / shard[1]
    with Progress(f"Encoding part {shard[0]} of {shard[1]}", total, quiet=quiet) as progress:
        for _ in encoders(plan, todo, shard=shard, progress=progress.advance):
            pass


def encoders(
    plan: ProbePlan, todo: Sequence[Task], *, shard: tuple[int, int] | None, progress: Callable[[float], None]
) -> Iterator[tuple[str, int | None, str, dict[str, ActivationStore], float]]:
    """Extract every corpus with the model (``none``) and with each seed's encoder of each control that is one.

    Stores are given by the stack's name.
    """
    from probing.extraction import extract_stacks
    from probing.permuted import permuted_texts
    from spafit.models import randomize_weights

    runs: list[tuple[str, int | None]] = [("none", None)]
    if todo:
        runs += [(control, seed) for control in plan.encoder_controls for seed in plan.config.seeds]
    for control, seed in runs:
        begun = time.time()
        encoder = plan.loaded
        if control == "random-encoder" and seed is not None:
            encoder = randomize_weights(plan.loaded, seed)
        elif control == "permuted-weights" and seed is not None:
            encoder = randomize_weights(plan.loaded, seed, how="permute")
        for corpus in sorted(corpora_of(plan, todo) if seed is None else {t.corpus.name for t in todo}):
            texts = plan.needed[corpus].texts
            options = extraction_options(plan.config, plan.tasks, corpus)
            stores = extract_stacks(
                encoder,
                permuted_texts(texts, seed) if control == "permuted-order" and seed is not None else texts,
                stacks=options.pop("stack"),
                **options,
                device=plan.device,
                cache_dir=None if plan.config.cache_dir is None else Path(plan.config.cache_dir),
                shard=shard,
                progress=progress,
            )
            yield control, seed, corpus, stores, time.time() - begun
            begun = time.time()
