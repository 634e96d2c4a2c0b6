"""Several models with a common bottom: their shared hidden states are computed once, each model's own ones from there.

Fine-tuning that freezes the first blocks leaves their outputs as they were. What is written is the ordinary store of
each model, byte for byte what its own full forward pass gives, so that everything else finds it in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from probing.batching import ExtractionPlan, plan_extraction
from probing.cache import claim, lease, make_room, unclaim, write_facts
from probing.extraction import store_facts
from probing.forward import Backbone, backbone_path, pick_stack
from probing.shard_runs import shard_runner
from probing.store import shard_state, stored_bytes, write_shard
from probing.tasks.base import Text
from probing.teacher_forcing import reads_encoder
from spafit.digests import settings_digest
from spafit.errors import ModelError
from spafit.layout import is_inside
from spafit.prefix_forward import BlockOutput, FrozenBlocks, capture, replaced

if TYPE_CHECKING:
    import torch

    from spafit.models import LoadedModel
    from spafit.stacks import Stack


def unchanged_hidden(before: LoadedModel, after: LoadedModel, *, stack: str | None = None) -> int:
    """How many hidden states, from the embeddings on, two models compute with bitwise the same weights.

    0: the embeddings differ. k + 1: embeddings and blocks [0, k) are equal, so hidden states 0 … k are. Poolers, heads
    and the norm after the last block do not count.

    Models that are built differently share nothing.
    """
    import torch

    stacks = [pick_stack(m, stack) for m in (before, after)]
    same_build = settings_digest(before.model) == settings_digest(after.model)
    if not same_build or stacks[0].block_paths != stacks[1].block_paths:
        return 0
    states = [m.model.state_dict() for m in (before, after)]
    if {n: (t.shape, t.dtype) for n, t in states[0].items()} != {n: (t.shape, t.dtype) for n, t in states[1].items()}:
        return 0
    changed = [n for n in states[0] if not torch.equal(states[0][n], states[1][n].to(states[0][n].device))]
    if any(reads_encoder(s) for s in before.stacks):
        return _first_reader_of_two(changed, before, stacks[0])
    return first_reader(changed, stacks[0])


def _first_reader_of_two(changed: Sequence[str], loaded: LoadedModel, stack: Stack) -> int:
    """:func:`first_reader` for one stack of an encoder-decoder, whose changed tensors are named under every tied name.

    An encoder reads what is in its own part of the model. A decoder reads its own part, and from block 0 on the
    encoder's states; its embeddings do not.
    """
    homes = {s.path: backbone_path(loaded.model, s)[0] for s in loaded.stacks}
    own = first_reader([n for n in changed if is_inside(n, homes[stack.path])], stack)
    if not reads_encoder(stack):
        return own
    feeds = [homes[s.path] for s in loaded.stacks if not reads_encoder(s)]
    if any(is_inside(n, f) for n in changed for f in (*feeds, "enc_to_dec_proj")):
        return min(own, 1)
    return own


def first_reader(changed: Sequence[str], stack: Stack) -> int:
    """Hidden states that come before any of the changed tensors is read."""
    first = stack.num_blocks + 1
    for name in changed:
        block = next((k for k, path in enumerate(stack.block_paths) if is_inside(name, path)), None)
        after_blocks = (stack.final_norm is not None and is_inside(name, stack.final_norm)) or "pool" in name
        if block is not None:
            first = min(first, block + 1)
        elif not after_blocks:
            return 0
    return first


def extract_sharing(
    before: LoadedModel,
    after: Mapping[str, tuple[LoadedModel, int]],
    texts: Sequence[Text],
    *,
    options: Mapping[str, Any],
    device: str,
    cache_dir: Path | None = None,
    progress: Callable[[float], None] | None = None,
) -> None:
    """Fill the stores of a model and of others that share its first hidden states, without computing those twice.

    For each shard the first model runs in full where its states are missing, otherwise up to the highest shared block;
    every other model then runs from its first changed block on. Stores end up as :func:`probing.extraction.extract`
    writes them; shards that another process computes at the moment are left to it. A model that cannot be run from the
    middle (T5 hands its position bias on from block to block) is left out: ``extract`` computes it in full.

    Args:
        before: the model whose bottom the others share.
        after: by any name, each other model and how many hidden states it shares (:func:`unchanged_hidden`).
        texts: what to encode.
        options: keyword arguments of :func:`probing.batching.plan_extraction`; only the site ``block`` and
            ``final_norm`` can be shared, with others nothing is done.
        device: torch device.
        cache_dir: as in ``extract``.
        progress: called with the number of tokens that one model has finished.
    """
    if not {"block", "final_norm"} >= set(options.get("sites", ("block",))):
        return
    own = plan_extraction(before, texts, cache_dir=cache_dir, **options)
    if reads_encoder(own.stack):  # its blocks need the encoder's states, which are not kept
        return
    plans = {}
    for name, (model, shared) in after.items():
        plan = plan_extraction(model, texts, cache_dir=cache_dir, **options)
        alike = np.array_equal(plan.layout.text_edges, own.layout.text_edges) and np.array_equal(
            plan.encoded.ids, own.encoded.ids
        )
        if own.of_images:
            alike &= model.image_processor == before.image_processor
        if shared >= 2 and alike and plan.folder != own.folder:  # hidden state 0 alone is not worth a pass
            plans[name] = plan, min(shared, plan.stack.num_blocks)
    if not plans:
        return
    held = [lease(p.folder) for p in (own, *(p for p, _ in plans.values()))]
    for plan in (own, *(p for p, _ in plans.values())):
        write_facts(plan.folder, store_facts(plan))
        missing = [k for k in range(plan.shards) if shard_state(plan.folder, k) != "good"]
        make_room(plan.folder, needed=sum(plan.layout.shard_bytes(k) for k in missing), cache_dir=cache_dir)
    with ExitStack() as stack:
        bottom = Bottom(own, sorted({shared - 1 for _, shared in plans.values()}), device)
        run_own = stack.enter_context(shard_runner(own, device, progress, around=bottom.recorded))
        runs = {}
        for name, (plan, shared) in plans.items():
            top = Top(plan, shared - 1, device)
            if not bottom.fits(top):
                continue
            around = attached(bottom, top)
            runs[name] = plan, shared, stack.enter_context(shard_runner(plan, device, progress, around=around))
        for shard in range(own.shards) if runs else ():
            bottom.states.clear()
            if shard_state(own.folder, shard) != "good":
                _claimed(own, shard, run_own, shared=0, bottom=own)
            for plan, shared, run in runs.values():
                if shard_state(plan.folder, shard) != "good" and shard_state(own.folder, shard) == "good":
                    _claimed(plan, shard, run, shared=shared, bottom=own)
    del held


def _claimed(plan: ExtractionPlan, shard: int, run: Callable[..., Any], *, shared: int, bottom: ExtractionPlan) -> None:
    """Compute and write one shard unless another process has it; the shared hidden states come from ``bottom``."""
    lock = claim(plan.folder, shard, wait=False)
    if lock is None:
        return
    try:
        memory, halvings = run(shard)
        if shared:
            theirs = bottom.layout.tensors(shard, stored_bytes(bottom.layout, shard))
            for key, states in plan.layout.tensors(shard, memory).items():
                series = next(s for s in plan.layout.series if s.key == key)
                for i, hidden in enumerate(series.hidden):
                    if series.site == "block" and hidden < shared:
                        states[i] = theirs[key][i]
        write_shard(plan.layout, shard, memory, halvings=halvings)
    finally:
        unclaim(lock)


class Bottom:
    """The shared model: outputs of its blocks at given depths, kept for one shard, or computed when they are wanted."""

    def __init__(self, plan: ExtractionPlan, depths: Sequence[int], device: str):
        self.plan, self.device = plan, device
        self.backbone = Backbone(plan.loaded, plan.stack, dtype=plan.layout.dtype, device=device)
        self.prefixes = {d: _frozen(self.backbone, plan.stack, d) for d in depths}
        self.states: dict[tuple[tuple[int, int], int], BlockOutput] = {}

    @contextmanager
    def recorded(self, rows: tuple[int, int]) -> Iterator[None]:
        """Keep what the blocks give while a batch runs in full."""
        with ExitStack() as undo:
            for depth, prefix in self.prefixes.items():
                calls, last = [0], prefix.modules[-1]
                needed = prefix.modules.count(last)

                def keep(
                    module: Any, args: Any, output: Any, calls: list[int] = calls, key: Any = (rows, depth),
                    needed: int = needed,
                ) -> None:  # fmt: skip
                    calls[0] += 1
                    if calls[0] == needed:
                        several = isinstance(output, tuple)
                        self.states[key] = BlockOutput(output[0] if several else output, len(output) * several)

                undo.callback(last.register_forward_hook(keep).remove)
            yield

    def at(self, rows: tuple[int, int], depth: int) -> BlockOutput:
        """Output of block ``depth`` - 1 for a batch; the blocks below run once for all that ask."""
        if (rows, depth) not in self.states:
            deepest = max(self.prefixes)
            inputs = self.backbone.inputs(self.plan.batch(rows, device=self.device).inputs)
            with self.recorded(rows):
                self.states[rows, deepest] = capture(self.backbone.module, [self.prefixes[deepest]], inputs)[0]
        return self.states[rows, depth]

    def fits(self, top: Top) -> bool:
        """Whether a model gives the same from the middle as in full, on the first batch; bitwise."""
        import torch

        rows = self.plan.shard_rows(self.plan.shards - 1)[-1]
        inputs = top.backbone.inputs(top.plan.batch(rows, device=self.device).inputs)
        try:
            with attached(self, top)(rows), torch.no_grad():
                got = top.backbone.module(**inputs)[0]
        except (TypeError, ValueError, AttributeError, IndexError, ModelError):
            return False  # it hands more than hidden states from block to block
        with torch.no_grad():
            return bool(torch.equal(got, top.backbone.module(**inputs)[0]))


class Top:
    """A model that runs from the middle."""

    def __init__(self, plan: ExtractionPlan, depth: int, device: str):
        self.plan, self.depth = plan, depth
        self.backbone = Backbone(plan.loaded, plan.stack, dtype=plan.layout.dtype, device=device)
        self.prefix = _frozen(self.backbone, plan.stack, depth)


def attached(bottom: Bottom, top: Top) -> Callable[[tuple[int, int]], AbstractContextManager[None]]:
    """For one batch, the shared blocks' outputs in place of the model's own blocks."""
    return lambda rows: replaced([top.prefix], [bottom.at(rows, top.depth)])


def _frozen(backbone: Backbone, stack: Stack, depth: int) -> FrozenBlocks:
    modules: tuple[torch.nn.Module, ...] = tuple(backbone.submodule(p) for p in stack.block_paths[:depth])
    return FrozenBlocks(stack, depth, modules)
