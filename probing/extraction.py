"""One forward pass per distinct text for every hidden state, site and pooling, into the activation store."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from probing.batching import BATCH_TOKENS, Batch, ExtractionPlan, plan_extraction, word_rows
from probing.cache import Lock, claim, lease, make_room, unclaim, write_facts
from probing.forward import Passes, pick_stacks, takes_images
from probing.patches import patch_grid
from probing.pooling import Segments
from probing.shard_runs import shards_runner
from probing.store import ActivationStore, data_path, manifest_path, shard_halvings, shard_state, write_shard
from probing.tasks.base import Text
from probing.teacher_forcing import feeding_of, reads_encoder
from spafit.errors import UsageError
from spafit.runtime import pick_device

if TYPE_CHECKING:
    import torch

    from spafit.models import LoadedModel

__all__ = ["BATCH_TOKENS", "ExtractionPlan", "extract", "extract_stacks", "plan_extraction", "seconds_per_token"]

_log = logging.getLogger(__name__)


def extract(
    loaded: LoadedModel,
    texts: Sequence[Text],
    *,
    sites: Sequence[str] = ("block",),
    word_pooling: Sequence[str] = ("mean",),
    sentence_pooling: Sequence[str] = ("mean",),
    stack: str | None = None,
    dtype: str = "float32",
    device: str | None = None,
    batch_tokens: int = BATCH_TOKENS,
    cache_dir: Path | None = None,
    shard: tuple[int, int] | None = None,
    progress: Callable[[float], None] | None = None,
) -> ActivationStore:
    """Compute the pooled states of ``texts``, or find them in the cache.

    Each distinct text (string, second segment, spans) goes through the backbone once, in batches sorted by length;
    states are pooled as they appear and streamed to shards, so memory stays bounded whatever the corpus. Finished
    shards are kept: an interrupted extraction goes on where it stopped, several processes share the work, and a shard
    whose bytes are damaged is computed again, which ``notes`` of the result and the log say.

    Args:
        loaded: the model.
        texts: what to encode: texts, or :class:`probing.tasks.base.Image` for a vision stack. Texts longer than the
            model's window are cut; words beyond it have no state.
        sites: where states are read: ``block`` (the input of block 0 and every block's output), ``attention`` and
            ``feed_forward`` (branch outputs before they are added), ``heads`` (what the attention's output projection
            reads: all heads side by side), ``final_norm``.
        word_pooling: over the sub-words of a word: ``first``, ``last``, ``mean``, ``max``.
        sentence_pooling: ``first`` ([CLS] where there is one) and ``last`` (the last token that is not padding) among
            all tokens, ``mean`` and ``max`` over the tokens of the text itself, without special tokens.
        stack: name or path of the stack, for models with several; None takes the first. A decoder that reads an
            encoder is fed as :mod:`probing.teacher_forcing` says. :func:`extract_stacks` gives several stacks at once.
        dtype: precision in which a copy of the model runs and states are stored; they are returned as float32.
        device: torch device; None takes the best there is.
        batch_tokens: padded tokens per batch.
        cache_dir: the cache; None is ``SPAFIT_CACHE`` or the user's cache folder.
        shard: ``(i, n)`` computes shards i, i + n, i + 2n, … only (i from 0); a later call without it computes what is
            still missing. Reading states of shards that are not there raises :class:`~spafit.errors.StoreError`.
        progress: called with the number of tokens that were just done, or found done.

    Returns:
        A read view; see :class:`probing.store.ActivationStore`.

    Raises:
        UsageError: an option that does not exist.
        DataError: an empty text, or a span outside its text.
        ModelError: the model, stack, site or tokenizer cannot give what was asked for.
        NumericalError: states that are NaN or infinite; names model, hidden state and text.
        StoreError: the cache cannot be written, is full, or would pass its size limit.
    """
    (store,) = extract_stacks(
        loaded, texts, stacks=stack, sites=sites, word_pooling=word_pooling, sentence_pooling=sentence_pooling,
        dtype=dtype, device=device, batch_tokens=batch_tokens, cache_dir=cache_dir, shard=shard, progress=progress,
    ).values()  # fmt: skip
    return store


def extract_stacks(
    loaded: LoadedModel,
    texts: Sequence[Text],
    *,
    stacks: str | None,
    sites: Sequence[str] = ("block",),
    word_pooling: Sequence[str] = ("mean",),
    sentence_pooling: Sequence[str] = ("mean",),
    dtype: str = "float32",
    device: str | None = None,
    batch_tokens: int = BATCH_TOKENS,
    cache_dir: Path | None = None,
    shard: tuple[int, int] | None = None,
    progress: Callable[[float], None] | None = None,
) -> dict[str, ActivationStore]:
    """:func:`extract` for several stacks: both stacks of an encoder-decoder cost one forward pass of each.

    Every stack has a store of its own, with the same bytes whether it is asked for alone or with others.

    Args:
        loaded: see :func:`extract`, and likewise the others.
        texts: see there.
        stacks: names or paths by commas, such as ``"encoder,decoder"``; None takes the first.
        sites: see there.
        word_pooling: see there.
        sentence_pooling: see there.
        dtype: see there.
        device: see there.
        batch_tokens: see there.
        cache_dir: see there.
        shard: see there.
        progress: see there; tokens of several stacks are counted once.

    Returns:
        Stores by the stack's name, in the order of ``stacks``.
    """
    if shard is not None and not 0 <= shard[0] < shard[1]:
        raise UsageError(f"shard is {shard}; it is (i, n) with 0 <= i < n.")
    plans = [
        plan_extraction(
            loaded, texts, sites=sites, word_pooling=word_pooling, sentence_pooling=sentence_pooling, stack=s.path,
            dtype=dtype, batch_tokens=batch_tokens, cache_dir=cache_dir,
        )
        for s in pick_stacks(loaded, stacks)
    ]  # fmt: skip
    together = len({tuple(p.layout.text_edges) for p in plans}) == 1
    found = {}
    for group in [plans] if together else [[p] for p in plans]:
        tell = progress if group[0] is plans[0] else None
        found.update(_extract(group, device=device, cache_dir=cache_dir, shard=shard, progress=tell))
    return found


def _extract(
    plans: Sequence[ExtractionPlan],
    *,
    device: str | None,
    cache_dir: Path | None,
    shard: tuple[int, int] | None,
    progress: Callable[[float], None] | None,
) -> dict[str, ActivationStore]:
    """Stores of plans whose batches and shards are the same."""
    held = [lease(plan.folder) for plan in plans]
    notes: list[list[str]] = [[] for _ in plans]
    mine = [k for k in range(plans[0].shards) if shard is None or k % shard[1] == shard[0]]
    todo: dict[int, list[int]] = {}
    for i, plan in enumerate(plans):
        write_facts(plan.folder, store_facts(plan))
        for k, state in zip(mine, _states(plan, mine), strict=True):
            if state == "damaged":
                # Without its manifest a shard counts as missing, for every process.
                manifest_path(plan.folder, k).unlink(missing_ok=True)
                name = f"{plan.folder.name[:12]}/{data_path(plan.folder, k).name}"
                notes[i].append(f"cache shard {name} was damaged and was recomputed")
                _log.warning("%s", notes[i][-1])
            if state != "good":
                todo.setdefault(k, []).append(i)
    for k in mine:
        if k not in todo and progress is not None:
            progress(_tokens(plans[0], k))
    begun = time.perf_counter()
    for i, plan in enumerate(plans):
        shares = [plan.layout.shard_bytes(k) for k, missing in todo.items() if i in missing]
        if shares:
            make_room(plan.folder, needed=sum(shares), cache_dir=cache_dir)
    if todo:
        _compute(plans, todo, device=pick_device(device), progress=progress)
    seconds = time.perf_counter() - begun if todo else 0.0
    found = {}
    for i, plan in enumerate(plans):
        halvings = sum(shard_halvings(plan.folder, k) for k in mine)
        if halvings:
            notes[i].append(
                f"memory ran out {halvings} time(s) while encoding and the batch was halved; a smaller batch size "
                "avoids it"
            )
        words, sentences, word_offsets, truncated = word_rows(plan)
        found[plan.stack.name] = ActivationStore(
            plan.layout,
            stack=plan.stack.name,
            num_hidden=plan.stack.num_blocks + 1,
            rows={"words": words, "sentences": sentences},
            word_offsets=word_offsets,
            truncated=truncated,
            tokens=plan.tokens,
            seconds=seconds if i == 0 else 0.0,
            halvings=halvings,
            notes=notes[i],
            lease=held[i],
        )
    return found


def seconds_per_token(
    loaded: LoadedModel, *, stack: str | None = None, dtype: str = "float32", device: str | None = None
) -> float:
    """Seconds per padded token of the forward pass alone, from two small timed batches (after one to warm up).

    A rough figure for estimates: batches of text are 32 tokens long, and real ones may be several times longer; the
    time to read images is not in it. ``stack`` names one or several.
    """
    import torch

    place = pick_device(device)
    stacks = pick_stacks(loaded, stack)
    feeding = feeding_of(loaded) if any(reads_encoder(s) for s in stacks) else None
    encoder = None if feeding is None else feeding.encoder
    passes = Passes(loaded, stacks, encoder=encoder, dtype=dtype, device=place)
    if takes_images(loaded, stacks[0]):
        grid = patch_grid(loaded, stacks[0])
        shape = (max(1, 512 // grid.tokens), grid.tokens)
        inputs = {"pixel_values": torch.zeros((shape[0], *grid.size))}
    else:
        shape = (16, min(32, loaded.max_length or 32))
        vocabulary = len(loaded.tokenizer) if loaded.tokenizer is not None else 2
        ids = torch.arange(shape[0] * shape[1]).reshape(shape) % vocabulary
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    none = Segments.of(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
    fed = None if feeding is None else {k: inputs[k] for k in ("input_ids", "attention_mask")}
    batch = Batch(inputs, none, none, none, rows=(0, shape[0]), tokens=shape[0] * shape[1], shape=shape, fed=fed)
    times = []
    with passes.reading({}) as forward:
        for _ in range(3):
            begun = time.perf_counter()
            forward(batch, [s.path for s in stacks])
            if place.startswith("cuda"):
                torch.cuda.synchronize(place)
            times.append(time.perf_counter() - begun)
    return min(times[1:]) / (shape[0] * shape[1])


def store_facts(plan: ExtractionPlan) -> dict[str, object]:
    """What a store's folder says about itself, for people who look after the cache."""
    return {
        "model": plan.loaded.name,
        "weights_digest": plan.loaded.weights_digest,
        "adapter_digest": plan.loaded.adapter_digest,
        "stack": plan.stack.name,
        "series": [s.key for s in plan.layout.series],
        "dtype": plan.layout.dtype,
        "texts": plan.texts,
        "tokens": plan.tokens,
        "shards": plan.shards,
        "bytes": plan.bytes_on_disk,
    }


def _states(plan: ExtractionPlan, shards: Sequence[int]) -> list[str]:
    # Checksums release the interpreter, so two threads read twice as fast.
    with ThreadPoolExecutor(2) as pool_of_threads:
        return list(pool_of_threads.map(lambda k: shard_state(plan.folder, k), shards))


def _tokens(plan: ExtractionPlan, shard: int) -> int:
    rows = plan.shard_rows(shard)
    offsets = plan.read.token_offsets
    return int(offsets[rows[-1][1]] - offsets[rows[0][0]])


def _compute(
    plans: Sequence[ExtractionPlan],
    todo: Mapping[int, Sequence[int]],
    *,
    device: str,
    progress: Callable[[float], None] | None,
) -> None:
    """Compute shards of several plans; one thread writes the last shard while the model runs on the next.

    ``todo`` says, by shard, which plans lack it.
    """
    # First what nobody else is computing; then the others' shards again, waiting, to take over if they died.
    queue = deque((k, False) for k in todo)
    pending: Future[None] | None = None
    with ThreadPoolExecutor(1) as writer, shards_runner(plans, device, progress) as run:
        while queue:
            shard, wait = queue.popleft()
            held = _claims(plans, todo[shard], shard, wait=wait)
            if held is None:
                queue.append((shard, True))
                continue
            missing = {}
            for i, lock in held.items():
                if shard_state(plans[i].folder, shard) == "good":
                    unclaim(lock)
                else:
                    missing[i] = lock
            if not missing:
                if progress is not None:
                    progress(_tokens(plans[0], shard))
                continue
            try:
                states, halvings = run(shard, list(missing))
                if pending is not None:
                    pending.result()
            except BaseException:
                for lock in missing.values():
                    unclaim(lock)
                raise
            pending = writer.submit(_write_all, plans, shard, states, halvings, missing)
        if pending is not None:
            pending.result()


def _claims(
    plans: Sequence[ExtractionPlan], wanted: Sequence[int], shard: int, *, wait: bool
) -> dict[int, Lock] | None:  # fmt: skip
    """Claims on one shard of several plans, or None and none of them. Every process takes them in the same order."""
    held: dict[int, Lock] = {}
    for i in sorted(wanted, key=lambda i: plans[i].folder.name):
        lock = claim(plans[i].folder, shard, wait=wait)
        if lock is None:
            for other in held.values():
                unclaim(other)
            return None
        held[i] = lock
    return held


def _write_all(
    plans: Sequence[ExtractionPlan],
    shard: int,
    states: Mapping[int, torch.Tensor],
    halvings: dict[int, int],
    held: Mapping[int, Lock],
) -> None:
    try:
        for i, lock in held.items():
            _write(plans[i], shard, states[i], halvings, lock)
    finally:
        for lock in held.values():
            unclaim(lock)


def _write(plan: ExtractionPlan, shard: int, states: torch.Tensor, halvings: dict[int, int], held: Lock) -> None:
    try:
        write_shard(plan.layout, shard, states, halvings=halvings)
    finally:
        unclaim(held)
