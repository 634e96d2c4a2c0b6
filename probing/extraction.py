"""One forward pass per distinct text for every hidden state, site and pooling, into the activation store."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from probing.batching import BATCH_TOKENS, Batch, ExtractionPlan, plan_extraction, word_rows
from probing.cache import Lock, claim, lease, make_room, unclaim, write_facts
from probing.forward import Backbone, pick_stack, takes_images
from probing.patches import patch_grid
from probing.pooling import pool
from probing.store import ActivationStore, Series, data_path, manifest_path, shard_halvings, shard_state, write_shard
from probing.tasks.base import Text
from spafit.errors import ModelError, NumericalError, UsageError
from spafit.runtime import pick_device

if TYPE_CHECKING:
    import torch

    from spafit.models import LoadedModel

__all__ = ["BATCH_TOKENS", "ExtractionPlan", "extract", "plan_extraction", "seconds_per_token"]

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
        stack: name or path of the stack, for models with several; None takes the first.
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
    if shard is not None and not 0 <= shard[0] < shard[1]:
        raise UsageError(f"shard is {shard}; it is (i, n) with 0 <= i < n.")
    plan = plan_extraction(
        loaded,
        texts,
        sites=sites,
        word_pooling=word_pooling,
        sentence_pooling=sentence_pooling,
        stack=stack,
        dtype=dtype,
        batch_tokens=batch_tokens,
        cache_dir=cache_dir,
    )
    held = lease(plan.folder)
    write_facts(plan.folder, store_facts(plan))
    notes: list[str] = []
    mine = [k for k in range(plan.shards) if shard is None or k % shard[1] == shard[0]]
    todo = []
    for k, state in zip(mine, _states(plan, mine), strict=True):
        if state == "damaged":
            # Without its manifest a shard counts as missing, for every process.
            manifest_path(plan.folder, k).unlink(missing_ok=True)
            name = f"{plan.folder.name[:12]}/{data_path(plan.folder, k).name}"
            notes.append(f"cache shard {name} was damaged and was recomputed")
            _log.warning("%s", notes[-1])
        if state != "good":
            todo.append(k)
        elif progress is not None:
            progress(_tokens(plan, k))
    begun = time.perf_counter()
    if todo:
        shares = [plan.layout.shard_bytes(k) for k in todo]
        make_room(plan.folder, needed=sum(shares), cache_dir=cache_dir)
        _compute(plan, todo, device=pick_device(device), progress=progress)
    seconds = time.perf_counter() - begun if todo else 0.0
    halvings = sum(shard_halvings(plan.folder, k) for k in mine)
    if halvings:
        notes.append(
            f"memory ran out {halvings} time(s) while encoding and the batch was halved; a smaller batch size avoids it"
        )
    words, sentences, word_offsets, truncated = word_rows(plan)
    return ActivationStore(
        plan.layout,
        stack=plan.stack.name,
        num_hidden=plan.stack.num_blocks + 1,
        rows={"words": words, "sentences": sentences},
        word_offsets=word_offsets,
        truncated=truncated,
        tokens=plan.tokens,
        seconds=seconds,
        halvings=halvings,
        notes=notes,
        lease=held,
    )


def seconds_per_token(
    loaded: LoadedModel, *, stack: str | None = None, dtype: str = "float32", device: str | None = None
) -> float:
    """Seconds per padded token of the forward pass alone, from two small timed batches (after one to warm up).

    A rough figure for estimates: batches of text are 32 tokens long, and real ones may be several times longer; the
    time to read images is not in it.
    """
    import torch

    place = pick_device(device)
    chosen = pick_stack(loaded, stack)
    backbone = Backbone(loaded, chosen, dtype=dtype, device=place)
    if takes_images(loaded, chosen):
        grid = patch_grid(loaded, chosen)
        shape = (max(1, 512 // grid.tokens), grid.tokens)
        batch = {"pixel_values": torch.zeros((shape[0], *grid.size))}
    else:
        shape = (16, min(32, loaded.max_length or 32))
        vocabulary = len(loaded.tokenizer) if loaded.tokenizer is not None else 2
        ids = torch.arange(shape[0] * shape[1]).reshape(shape) % vocabulary
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    times = []
    with backbone.reading((), lambda site, hidden, states: None) as forward:
        for _ in range(3):
            begun = time.perf_counter()
            forward(batch, shape)
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
    offsets = plan.encoded.token_offsets
    return int(offsets[rows[-1][1]] - offsets[rows[0][0]])


def _compute(
    plan: ExtractionPlan, todo: Sequence[int], *, device: str, progress: Callable[[float], None] | None
) -> None:
    """Compute shards; one thread writes the last shard while the model runs on the next."""
    # First what nobody else is computing; then the others' shards again, waiting, to take over if they died.
    queue = deque((k, False) for k in todo)
    pending: Future[None] | None = None
    with ThreadPoolExecutor(1) as writer, shard_runner(plan, device, progress) as run:
        while queue:
            shard, wait = queue.popleft()
            held = claim(plan.folder, shard, wait=wait)
            if held is None:
                queue.append((shard, True))
                continue
            if shard_state(plan.folder, shard) == "good":
                unclaim(held)
                if progress is not None:
                    progress(_tokens(plan, shard))
                continue
            try:
                states, halvings = run(shard)
                if pending is not None:
                    pending.result()
            except BaseException:
                unclaim(held)
                raise
            pending = writer.submit(_write, plan, shard, states, halvings, held)
        if pending is not None:
            pending.result()


def _write(plan: ExtractionPlan, shard: int, states: torch.Tensor, halvings: dict[int, int], held: Lock) -> None:
    try:
        write_shard(plan.layout, shard, states, halvings=halvings)
    finally:
        unclaim(held)


Shard = tuple["torch.Tensor", dict[int, int]]


@contextmanager
def shard_runner(
    plan: ExtractionPlan,
    device: str,
    progress: Callable[[float], None] | None,
    *,
    around: Callable[[tuple[int, int]], AbstractContextManager[None]] | None = None,
) -> Iterator[Callable[[int], Shard]]:
    """Within the block, the callable yielded computes one shard: its bytes, and halvings by batch number.

    The bytes are valid until the call after next. Each forward pass runs inside ``around(rows)``, where it is given.
    """
    import torch

    backbone = Backbone(plan.loaded, plan.stack, dtype=plan.layout.dtype, device=device)
    of_site: dict[str, list[Series]] = {}
    for series in plan.layout.series:
        of_site.setdefault(series.site, []).append(series)
    batch: Batch
    tensors: dict[str, torch.Tensor] = {}
    first_text = 0
    memory = deque([torch.empty(0, dtype=torch.uint8) for _ in range(2)])

    def place(series: Series) -> slice:
        rows = batch.rows
        if series.unit == "sentences":
            return slice(rows[0] - first_text, rows[1] - first_text)
        before = plan.words_in((first_text, rows[0]))
        return slice(before, before + plan.words_in(rows))

    def receive(site: str, hidden: int, states: torch.Tensor) -> None:
        flat = states.reshape(-1, states.shape[-1])
        for series in of_site[site]:
            if flat.shape[1] != series.width:
                raise ModelError(
                    f"Site {site!r} of {plan.loaded.name} is {flat.shape[1]} wide at hidden state {hidden}, and "
                    f"{series.width} wide elsewhere. Leave that site out."
                )
            if series.unit == "words":
                segments = batch.words
            else:
                segments = batch.own if series.pooling in ("mean", "max") else batch.whole
            target = tensors[series.key][series.hidden.index(hidden), place(series)]
            pool(flat, segments, series.pooling, out=target)

    with backbone.reading(plan.sites, receive) as forward:

        def run_rows(rows: tuple[int, int]) -> int:
            """Run the texts at ``rows``, in halves where memory runs out; returns how often it did."""
            nonlocal batch
            try:
                batch = plan.batch(rows, device=device)
                with nullcontext() if around is None else around(rows):
                    forward(batch.inputs, batch.shape)
                _check_finite(plan, batch, tensors, place)
                return 0
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                if rows[1] - rows[0] == 1:
                    raise ModelError(
                        f"{plan.loaded.name} runs out of memory on {device} with {plan.name_of(rows[0])} alone. "
                        "Use a larger device, or --dtype bfloat16."
                    ) from error
            # Outside the handler: the error's frames hold on to the tensors of the failed pass.
            if device.startswith("cuda"):
                torch.cuda.empty_cache()
            middle = (rows[0] + rows[1]) // 2
            return 1 + run_rows((rows[0], middle)) + run_rows((middle, rows[1]))

        def run(shard: int) -> Shard:
            nonlocal first_text, tensors
            rows = plan.shard_rows(shard)
            # Two pieces of memory take turns: one is being written while the next is filled.
            memory.rotate()
            if len(memory[0]) < plan.layout.shard_bytes(shard):
                memory[0] = torch.empty(plan.layout.shard_bytes(shard), dtype=torch.uint8)
            filled = memory[0][: plan.layout.shard_bytes(shard)]
            first_text, tensors = rows[0][0], plan.layout.tensors(shard, filled)
            halvings = {}
            for number, batch_rows in enumerate(rows, int(plan.shard_batches[shard])):
                if halved := run_rows(batch_rows):
                    halvings[number] = halved
                if progress is not None:
                    offsets = plan.encoded.token_offsets
                    progress(int(offsets[batch_rows[1]] - offsets[batch_rows[0]]))
            return filled, halvings

        yield run


def _is_out_of_memory(error: RuntimeError) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _check_finite(
    plan: ExtractionPlan, batch: Batch, tensors: Mapping[str, torch.Tensor], place: Callable[[Series], slice]
) -> None:
    """Raise NumericalError if a pooled state of the batch is NaN or infinite."""
    import torch

    for series in plan.layout.series:
        states = tensors[series.key][:, place(series)]
        # One sum tells in a single fast pass that all is well; only where it does not are elements looked at.
        if bool(torch.isfinite(states.sum(dtype=torch.float32))) or bool(torch.isfinite(states).all()):
            continue
        at, row = (int(x[0]) for x in torch.nonzero(~torch.isfinite(states).all(dim=2), as_tuple=True))
        if series.unit == "words":
            edges = np.cumsum([plan.words_in((r, r + 1)) for r in range(*batch.rows)])
            row = int(np.searchsorted(edges, row, side="right"))
        remedy = "Use float32 or bfloat16." if plan.layout.dtype == "float16" else "Check the model's weights."
        raise NumericalError(
            f"{plan.loaded.name} gives NaN or infinite activations at hidden state {series.hidden[at]} (site "
            f"{series.site!r}) for {plan.name_of(batch.rows[0] + row)}. {remedy}"
        )
