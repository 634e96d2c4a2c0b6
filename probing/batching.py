"""What an extraction will do, known before any forward pass: distinct texts, batches, shards, bytes, address."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from probing.align import EncodedTexts, encode_texts, excerpt, ragged
from probing.forward import SiteStates, pick_stack, site_states, takes_images
from probing.patches import check_kind, encode_images, patch_grid, pixel_values
from probing.pooling import POOLINGS, Segments
from probing.store import FORMAT_VERSION, ITEM_BYTES, Layout, Series
from probing.tasks.base import Image, Text
from probing.teacher_forcing import Feeding, fed_texts, feeding_of, reads_encoder
from spafit.errors import ModelError, UsageError, did_you_mean
from spafit.io import content_digest
from spafit.runtime import torch_dtype

if TYPE_CHECKING:
    import torch

    from spafit.models import LoadedModel
    from spafit.stacks import Stack

#: Padded tokens per batch. Measured on two CPU cores (MiniLM-L6): 512 to 4,096 are alike, larger batches leave the
#: processor's cache and are slower. Accelerators may like more.
BATCH_TOKENS = 2048
#: A batch's pooled states stay below this whatever the model, so that memory is bounded.
BATCH_BYTES = 512 * 2**20
#: A shard is closed when it reaches either: the unit of resuming and of splitting over jobs.
SHARD_BYTES = 64 * 2**20
SHARD_TOKENS = 32_768


@dataclass(frozen=True)
class Batch:
    """One forward pass: the texts at ``rows`` (positions in the batched order), padded on the right.

    Attributes:
        inputs: ``input_ids``, ``attention_mask``, ``token_type_ids``, each of shape (texts, tokens); or
            ``pixel_values`` of shape (images, channels, height, width).
        shape: (texts, tokens), padding included.
        fed: ``input_ids`` and ``attention_mask`` of the decoder, for a plan of a decoder that reads an encoder: what
            the segments below speak of. None for other stacks.
        words: tokens of each usable word.
        whole: all tokens of each text, special ones included: what ``first`` and ``last`` of a sentence take.
        own: the tokens of each text without the special ones: what ``mean`` and ``max`` of a sentence take.
        rows: positions in the batched order, half-open.
        tokens: real tokens, padding not counted.
    """

    inputs: Mapping[str, torch.Tensor]
    words: Segments
    whole: Segments
    own: Segments
    rows: tuple[int, int]
    tokens: int
    shape: tuple[int, int]
    fed: Mapping[str, torch.Tensor] | None = None


@dataclass(frozen=True)
class ExtractionPlan:
    """What an extraction will do; nothing has been computed or written yet.

    Attributes:
        folder: where the states will lie; its name is the content address.
        texts: distinct texts (one forward pass each).
        tokens: their tokens, special ones included, after truncation.
        padded_tokens: the same with padding: what the model really computes.
        batches: number of forward passes.
        shards: number of files.
        truncated: distinct texts that are longer than the model's window.
        words: distinct words that were asked for.
        words_dropped: of these, the ones without a usable token (beyond the window, or dropped by the tokenizer).
        bytes_on_disk: size of the finished states.
        batch_tokens: padded tokens per batch.
        layout: how the states lie in files.
        sites: what is read.
        of_images: whether the texts are images.
        feeding: how the decoder of an encoder-decoder is fed; None for other models, and where only the encoder can be
            probed.
    """

    folder: Path
    texts: int
    tokens: int
    padded_tokens: int
    batches: int
    shards: int
    truncated: int
    words: int
    words_dropped: int
    bytes_on_disk: int
    batch_tokens: int
    loaded: LoadedModel = field(repr=False)
    stack: Stack = field(repr=False)
    layout: Layout = field(repr=False)
    sites: tuple[SiteStates, ...] = field(repr=False)
    encoded: EncodedTexts = field(repr=False)
    batch_offsets: np.ndarray = field(repr=False)
    shard_batches: np.ndarray = field(repr=False)
    given: np.ndarray = field(repr=False)
    order: np.ndarray = field(repr=False)
    unique: np.ndarray = field(repr=False)
    source: Sequence[Text] = field(repr=False)
    of_images: bool
    feeding: Feeding | None = None
    fed: EncodedTexts | None = field(default=None, repr=False)

    @property
    def read(self) -> EncodedTexts:
        """Tokens whose states are kept: what the stack itself reads."""
        return self.encoded if self.fed is None or not reads_encoder(self.stack) else self.fed

    @cached_property
    def _words_before(self) -> np.ndarray:
        """Usable words before each text in batched order, shape (texts + 1,)."""
        usable = np.concatenate([[0], np.cumsum(self.read.word_first >= 0)])
        return usable[self.read.word_offsets]

    def _padded(self, encoded: EncodedTexts, rows: tuple[int, int]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Padded arrays of the texts at ``rows``, each (texts, tokens), and where each real token lies when flat."""
        a, b = rows
        lengths = encoded.lengths[a:b]
        width, n = int(lengths.max()), b - a
        at = slice(encoded.token_offsets[a], encoded.token_offsets[b])
        text = np.repeat(np.arange(n), lengths)
        flat = text * width + np.arange(len(text)) - np.repeat(encoded.token_offsets[a:b] - at.start, lengths)
        pad = getattr(self.loaded.tokenizer, "pad_token_id", None) or 0  # any id will do where the mask hides it
        ids = np.full(n * width, pad, dtype=np.int64)
        mask, types = np.zeros(n * width, dtype=np.int64), np.zeros(n * width, dtype=np.int64)
        ids[flat], mask[flat], types[flat] = encoded.ids[at], 1, encoded.types[at]
        named = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        return {k: v.reshape(n, width) for k, v in named.items()}, flat

    def batch(self, rows: tuple[int, int], *, device: str = "cpu") -> Batch:
        """Tensors for the texts at ``rows`` of the batched order; ``device`` is where the segments go."""
        import torch

        encoded, (a, b), n = self.read, rows, rows[1] - rows[0]
        named, flat = self._padded(encoded, rows)
        fed = None
        if encoded is not self.encoded:
            fed = {k: torch.from_numpy(named[k]) for k in ("input_ids", "attention_mask")}
            named, _ = self._padded(self.encoded, rows)
        lengths = encoded.lengths[a:b]
        width = int(lengths.max())
        at = slice(encoded.token_offsets[a], encoded.token_offsets[b])
        text = np.repeat(np.arange(n), lengths)

        inputs = {k: torch.from_numpy(v) for k, v in named.items()}
        if self.of_images:
            inputs = pixel_values(self.loaded, [self.source[i] for i in self.unique[self.order[a:b]]])

        spans = slice(encoded.word_offsets[a], encoded.word_offsets[b])
        first, last = encoded.word_first[spans].astype(np.int64), encoded.word_last[spans].astype(np.int64)
        usable = first >= 0
        start = (np.repeat(np.arange(n), np.diff(encoded.word_offsets[a : b + 1])) * width + first)[usable]
        counts = (last - first + 1)[usable]
        words = np.repeat(start - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
        own = encoded.own[at]
        return Batch(
            inputs=inputs,
            words=Segments.of(words, counts, device=device),
            whole=Segments.of(flat, lengths, device=device),
            own=Segments.of(flat[own], np.bincount(text[own], minlength=n), device=device),
            rows=rows,
            tokens=len(flat),
            shape=next(iter(named.values())).shape,
            fed=fed,
        )

    def words_in(self, rows: tuple[int, int]) -> int:
        """Usable words of the texts at ``rows``."""
        return int(self._words_before[rows[1]] - self._words_before[rows[0]])

    def shard_rows(self, shard: int) -> list[tuple[int, int]]:
        """The batches of one shard, as half-open rows of the batched order."""
        edges = self.batch_offsets[self.shard_batches[shard] : self.shard_batches[shard + 1] + 1]
        return [(int(a), int(b)) for a, b in pairwise(edges)]

    def name_of(self, row: int) -> str:
        """What a message calls the text at ``row`` of the batched order."""
        given = int(self.unique[self.order[row]])
        what = "image" if self.of_images else "text"
        return f"{what} {given} ({excerpt(self.source[given].string)})"

    def encoded_batches(self) -> list[dict[str, torch.Tensor]]:
        """Keyword arguments of every forward pass in order, for running the bare model over the same batches."""
        from probing.forward import Backbone

        rows = [r for s in range(self.shards) for r in self.shard_rows(s)]
        if self.feeding is not None and reads_encoder(self.stack):
            encoder, batches = Backbone(self.loaded, self.feeding.encoder), [self.batch(r) for r in rows]
            return [
                {**encoder.inputs(b.inputs), **{f"decoder_{k}": v for k, v in (b.fed or {}).items()}} for b in batches
            ]
        backbone = Backbone(self.loaded, self.stack)
        return [backbone.inputs(self.batch(r).inputs) for r in rows]


def plan_extraction(
    loaded: LoadedModel,
    texts: Sequence[Text],
    *,
    sites: Sequence[str] = ("block",),
    word_pooling: Sequence[str] = ("mean",),
    sentence_pooling: Sequence[str] = ("mean",),
    stack: str | None = None,
    dtype: str = "float32",
    batch_tokens: int = BATCH_TOKENS,
    cache_dir: Path | None = None,
) -> ExtractionPlan:
    """Tokenise the texts and lay out batches, shards and their address, without running the model.

    Batches are filled in order of falling length (ties by content) up to ``batch_tokens`` padded tokens, so their
    composition depends on the set of texts and these options alone: not on the order of the texts, the device, the
    cache or the share of a job. See :func:`probing.extraction.extract` for the arguments and errors.
    """
    from probing.cache import activations_folder

    _check_options(sites, word_pooling, sentence_pooling, dtype, batch_tokens)
    if isinstance(texts, str) or not all(isinstance(t, Text) for t in texts):
        raise UsageError("Texts must be a sequence of probing.Text, such as [Text('A sentence.')].")
    chosen = pick_stack(loaded, stack)
    of_images = check_kind(loaded, chosen, texts, takes_images=takes_images(loaded, chosen))
    if loaded.tokenizer is None and not of_images:
        raise ModelError(f"{loaded.name} has no tokenizer, so texts cannot be encoded. Give one with the model.")
    offered = site_states(loaded, chosen, sites)
    unique, given, digest = _distinct(texts)
    chosen_texts = [texts[i] for i in unique]
    reader = loaded.tokenizer_digest, loaded.max_length
    feeding, fed = None, None
    if of_images:
        grid = patch_grid(loaded, chosen)
        encoded = encode_images([t for t in chosen_texts if isinstance(t, Image)], grid, numbers=unique)
        reader = loaded.image_processor.digest if loaded.image_processor is not None else "", grid.tokens
    else:
        encoded, feeding = _encode(loaded, chosen_texts, digest, numbers=unique), _feeding(loaded, chosen)
        if feeding is None and any(t.target is not None for t in chosen_texts):
            raise ModelError(
                f"The texts have targets, and {loaded.name} has no decoder that could read them beside its encoder. "
                "Read both texts as one (pairs=cross), or each alone (pairs=features)."
            )
    lengths = encoded.lengths
    if feeding is not None:
        fed = fed_texts(feeding, loaded.tokenizer, chosen_texts, encoded, numbers=unique)
        lengths = np.maximum(lengths, fed.lengths)
    order = np.argsort(-lengths, kind="stable")
    encoded, lengths, fed = encoded.take(order), lengths[order], None if fed is None else fed.take(order)
    read = encoded if fed is None or not reads_encoder(chosen) else fed

    with_words = bool(encoded.word_offsets[-1])
    series = tuple(
        Series(site.site, unit, pooling, site.hidden, site.width)
        for site in offered
        for unit, poolings in (("words", word_pooling if with_words else ()), ("sentences", sentence_pooling))
        for pooling in poolings
    )
    if not series:
        raise UsageError("Nothing would be stored: no sentence pooling, and no text has word spans. Add one of them.")
    per_word, per_text = (
        sum(len(s.hidden) * s.width for s in series if s.unit == unit) * ITEM_BYTES[dtype]
        for unit in ("words", "sentences")
    )
    usable = np.concatenate([[0], np.cumsum(read.word_first >= 0)])[read.word_offsets]
    row_bytes = np.diff(usable) * per_word + per_text
    # Stacks that one pass gives together fill the same batches and shards, whichever of them are asked for.
    batched = row_bytes if feeding is None else _bytes_of_both(feeding, encoded, series, dtype)
    batch_offsets = _fill_batches(lengths, batched, batch_tokens)
    batch_tokens_real = np.add.reduceat(lengths, batch_offsets[:-1])
    batch_bytes = np.add.reduceat(batched, batch_offsets[:-1])
    shard_batches = _fill_shards(batch_tokens_real, batch_bytes)
    text_edges = batch_offsets[shard_batches]

    address = content_digest(
        (
            FORMAT_VERSION,
            loaded.weights_digest,
            loaded.adapter_digest,
            *reader,
            chosen.path,
            *((s.key, s.hidden, s.width) for s in series),
            dtype,
            batch_tokens,
            digest,
            *(() if feeding is None else ("teacher forcing", feeding.start, feeding.window)),
        )
    )
    layout = Layout(
        folder=activations_folder(cache_dir) / address[:40],
        series=series,
        dtype=dtype,
        word_edges=usable[text_edges],
        text_edges=text_edges,
    )
    return ExtractionPlan(
        folder=layout.folder,
        texts=len(unique),
        tokens=int(read.lengths.sum()),
        padded_tokens=int((lengths[batch_offsets[:-1]] * np.diff(batch_offsets)).sum()),
        batches=len(batch_offsets) - 1,
        shards=len(shard_batches) - 1,
        truncated=int(read.truncated.sum()),
        words=len(read.word_first),
        words_dropped=int((read.word_first < 0).sum()),
        bytes_on_disk=int(row_bytes.sum()),
        batch_tokens=batch_tokens,
        loaded=loaded,
        stack=chosen,
        layout=layout,
        sites=offered,
        encoded=encoded,
        batch_offsets=batch_offsets,
        shard_batches=shard_batches,
        given=given,
        order=order,
        unique=unique,
        source=texts,
        of_images=of_images,
        feeding=feeding,
        fed=fed,
    )


def _feeding(loaded: LoadedModel, stack: Stack) -> Feeding | None:
    """How the model's decoder is fed; a decoder that cannot be fed matters only where it is asked for."""
    try:
        return feeding_of(loaded)
    except ModelError:
        if reads_encoder(stack):
            raise
        return None


def _bytes_of_both(feeding: Feeding, encoded: EncodedTexts, series: Sequence[Series], dtype: str) -> np.ndarray:
    """Bytes that both stacks' states of each text take, told alike by the series of either."""
    states = sum((s.num_blocks + 1) * s.width for s in (feeding.encoder, feeding.decoder)) * ITEM_BYTES[dtype]
    words = sum(1 for s in series if s.unit == "words") * np.diff(encoded.word_offsets)
    return states * (words + sum(1 for s in series if s.unit == "sentences"))


def _check_options(
    sites: Sequence[str],
    word_pooling: Sequence[str],
    sentence_pooling: Sequence[str],
    dtype: str,
    batch_tokens: int,
) -> None:
    torch_dtype(dtype)
    for name, values in (("sites", sites), ("word_pooling", word_pooling), ("sentence_pooling", sentence_pooling)):
        if isinstance(values, str):
            raise UsageError(f"{name} is {values!r}; give a list, such as [{values!r}].")
        if len(set(values)) < len(values):
            raise UsageError(f"{name} names one twice: {', '.join(values)}.")
    for pooling in (*word_pooling, *sentence_pooling):
        if pooling not in POOLINGS:
            raise UsageError(
                f"Pooling {pooling!r} is not one of {', '.join(POOLINGS)}.{did_you_mean(pooling, POOLINGS)}"
            )
    if batch_tokens < 1:
        raise UsageError(f"batch_tokens is {batch_tokens}; it must be at least 1.")


def _distinct(texts: Sequence[Text]) -> tuple[np.ndarray, np.ndarray, str]:
    """Where each distinct text first stands, in an order that depends on content alone; which of them each text is."""
    digests = [content_digest(t.content) for t in texts]
    first = {d: i for i, d in reversed(list(enumerate(digests)))}
    ordered = sorted(first)
    position = {d: i for i, d in enumerate(ordered)}
    given = np.fromiter((position[d] for d in digests), dtype=np.int64, count=len(digests))
    return np.array([first[d] for d in ordered], dtype=np.int64), given, content_digest(ordered)


# The same texts are planned, extracted, and extracted again with random encoders: tokenising them once is enough.
_RECENT: OrderedDict[tuple[str, int | None, str], EncodedTexts] = OrderedDict()
_RECENT_LOCK = threading.Lock()
_RECENT_SIZE = 4


def _encode(loaded: LoadedModel, unique: Sequence[Text], digest: str, *, numbers: np.ndarray) -> EncodedTexts:
    key = (loaded.tokenizer_digest, loaded.max_length, digest)
    with _RECENT_LOCK:
        encoded = _RECENT.get(key)
        if encoded is not None:
            _RECENT.move_to_end(key)
            return encoded
    encoded = encode_texts(loaded.tokenizer, unique, max_length=loaded.max_length, numbers=numbers)
    with _RECENT_LOCK:
        _RECENT[key] = encoded
        while len(_RECENT) > _RECENT_SIZE:
            _RECENT.popitem(last=False)
    return encoded


def _fill_batches(lengths: np.ndarray, row_bytes: np.ndarray, batch_tokens: int) -> np.ndarray:
    """Edges of greedy batches over texts of falling length; a text longer than the budget is a batch of its own.

    A batch that is a quarter full also ends where the length falls: less padding (4 % of the tokens of UD EWT) for
    more, smaller passes that are no slower per token.
    """
    edges, size = [0], 0
    for i, (length, extra) in enumerate(zip(lengths.tolist(), row_bytes.tolist(), strict=True)):
        count, longest = i - edges[-1], int(lengths[edges[-1]])
        full = (count + 1) * longest > batch_tokens or size + extra > BATCH_BYTES
        shorter = length < lengths[i - 1] and 4 * count * longest >= batch_tokens
        if count and (full or shorter):
            edges.append(i)
            size = 0
        size += extra
    return np.array([*edges, len(lengths)], dtype=np.int64)


def _fill_shards(tokens: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Edges, in batches, of shards that are closed once they hold SHARD_BYTES or SHARD_TOKENS."""
    edges, held, seen = [0], 0, 0
    for i, (size, count) in enumerate(zip(sizes.tolist(), tokens.tolist(), strict=True)):
        if held >= SHARD_BYTES or seen >= SHARD_TOKENS:
            edges.append(i)
            held = seen = 0
        held, seen = held + size, seen + count
    return np.array([*edges, len(sizes)], dtype=np.int64)


def word_rows(plan: ExtractionPlan) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Row in the store of each given text's words (-1: none) and of each given text; word offsets; truncated texts."""
    place = np.empty(len(plan.order), dtype=np.int64)
    place[plan.order] = np.arange(len(plan.order))
    texts = place[plan.given]
    usable = plan.read.word_first >= 0
    row = np.where(usable, np.cumsum(usable) - 1, -1)
    words = row[ragged(plan.read.word_offsets, texts)]
    counts = np.diff(plan.read.word_offsets)[texts]
    return words, texts, np.concatenate([[0], np.cumsum(counts)]), plan.read.truncated[texts]
