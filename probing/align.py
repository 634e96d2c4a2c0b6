"""Words and sub-words: token ids of many texts, and which tokens carry each word."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

import numpy as np

from probing.tasks.base import Text
from spafit.errors import DataError, ModelError

_CHUNK = 2048  # texts per call of the tokenizer: its own records are far larger than the ids kept here


@dataclass(frozen=True)
class EncodedTexts:
    """Token ids of many texts as flat arrays, cut at the model's window, and the tokens under each word.

    Attributes:
        ids: token ids, text after text, special tokens included, shape (tokens,).
        types: segment numbers as the model wants them, shape (tokens,); all zero if the tokenizer gives none.
        own: False for the special tokens that the tokenizer adds, shape (tokens,).
        token_offsets: where each text's tokens start, shape (texts + 1,).
        word_first: position *within the text's tokens* of each word's first token, -1 for a word without a usable
            token: dropped by the tokenizer, or not wholly inside the window. Shape (words,).
        word_last: the same for the last token (inclusive).
        word_offsets: where each text's words start, shape (texts + 1,).
        truncated: texts that were longer than the window, shape (texts,).
    """

    ids: np.ndarray
    types: np.ndarray
    own: np.ndarray
    token_offsets: np.ndarray
    word_first: np.ndarray
    word_last: np.ndarray
    word_offsets: np.ndarray
    truncated: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per text, special tokens included, shape (texts,)."""
        return np.diff(self.token_offsets)

    def take(self, order: np.ndarray) -> EncodedTexts:
        """The same for the texts at ``order``."""
        tokens, words = ragged(self.token_offsets, order), ragged(self.word_offsets, order)
        return EncodedTexts(
            ids=self.ids[tokens],
            types=self.types[tokens],
            own=self.own[tokens],
            token_offsets=_offsets(np.diff(self.token_offsets)[order]),
            word_first=self.word_first[words],
            word_last=self.word_last[words],
            word_offsets=_offsets(np.diff(self.word_offsets)[order]),
            truncated=self.truncated[order],
        )


def ragged(offsets: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Flat positions of the elements of ``rows``, row after row, where row r holds ``offsets[r]:offsets[r + 1]``."""
    starts, lengths = offsets[rows], offsets[np.asarray(rows) + 1] - offsets[rows]
    return np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())


def encode_texts(
    tokenizer: Any, texts: Sequence[Text], *, max_length: int | None, numbers: np.ndarray | None = None
) -> EncodedTexts:
    """Tokenise ``texts`` and align their spans by character offsets.

    A word owns the tokens of the first segment whose characters overlap its span, from the first such token to the
    last. Overlap makes tokens that include the space before a word (GPT-2, Llama) fall to that word alone; a token that
    reaches over two words belongs to both. Texts longer than ``max_length`` tokens lose tokens at their end (of the
    longer segment first, in pairs); a word that lost any token is dropped. The tokenizer's own truncation and padding
    settings are ignored and left as they were.

    Args:
        tokenizer: a transformers tokenizer; a fast one if any text has spans.
        texts: the texts.
        max_length: tokens that the model takes, special tokens included; None is no limit.
        numbers: what errors call each text; by default its position.

    Raises:
        ModelError: spans were asked for and the tokenizer is a slow one, which knows no character offsets.
        DataError: a text without any token of its own, or a span outside its text.
    """
    numbers = np.arange(len(texts)) if numbers is None else numbers
    for i, text in zip(numbers, texts, strict=True):
        if any(not 0 <= a < b <= len(text.string) for a, b in text.spans):
            raise DataError(f"Text {i} ({excerpt(text.string)}) has a span outside its {len(text.string)} characters.")
    if not getattr(tokenizer, "is_fast", False) and any(t.spans for t in texts):
        raise ModelError(
            f"The tokenizer {type(tokenizer).__name__} is a slow one and does not say which characters a token covers, "
            "so words cannot be aligned. Use a model with a fast tokenizer (tokenizer.json), or sentence tasks only."
        )
    # A call of the tokenizer takes single texts or pairs, not both.
    paired = np.array([t.second is not None for t in texts], dtype=bool)
    groups = [g for g in (np.flatnonzero(~paired), np.flatnonzero(paired)) if len(g)]
    parts: list[EncodedTexts] = []
    with _settings_restored(tokenizer):
        for group in groups:
            for start in range(0, len(group), _CHUNK):
                chunk = group[start : start + _CHUNK]
                parts.append(_encode_chunk(tokenizer, [texts[i] for i in chunk], numbers[chunk], max_length))
    encoded = _joined(parts)
    return encoded if len(groups) < 2 else encoded.take(np.argsort(np.concatenate(groups)))


@contextmanager
def _settings_restored(tokenizer: Any) -> Iterator[None]:
    """A call of a fast tokenizer sets truncation and padding on its backend; put the user's back afterwards."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        yield
        return
    truncation, padding = backend.truncation, backend.padding
    try:
        yield
    finally:
        if truncation is None:
            backend.no_truncation()
        else:
            backend.enable_truncation(**truncation)
        if padding is None:
            backend.no_padding()
        else:
            backend.enable_padding(**padding)


def _encode_chunk(tokenizer: Any, texts: Sequence[Text], where: np.ndarray, max_length: int | None) -> EncodedTexts:
    strings = [t.string for t in texts]
    seconds = None if texts[0].second is None else [t.second for t in texts]
    batch = tokenizer(strings, seconds, truncation=False, padding=False, return_special_tokens_mask=True, verbose=False)
    lengths = np.array([len(x) for x in batch["input_ids"]], dtype=np.int64)
    offsets = _offsets(lengths)
    ids = _flat(batch["input_ids"])
    types = _flat(batch["token_type_ids"]) if "token_type_ids" in batch else np.zeros_like(ids)
    own = _flat(batch["special_tokens_mask"]) == 0
    text_of = np.repeat(np.arange(len(texts)), lengths)
    for i in np.flatnonzero(np.bincount(text_of[own], minlength=len(texts)) == 0).tolist():
        raise DataError(
            f"Text {where[i]} ({excerpt(texts[i].string)}) is empty for the tokenizer: it has no token of its own. "
            "Remove it from the data."
        )
    if seconds is None:
        first_segment = own
    elif getattr(tokenizer, "is_fast", False):
        sequences = chain.from_iterable(e.sequence_ids for e in batch.encodings)
        first_segment = np.fromiter((s == 0 for s in sequences), dtype=bool, count=len(ids))
    else:
        alone = [len(x) for x in tokenizer(strings, add_special_tokens=False, verbose=False)["input_ids"]]
        first_segment = own & (_rank(own, offsets) < np.array(alone)[text_of])

    word_offsets = _offsets(np.array([len(t.spans) for t in texts], dtype=np.int64))
    word_first, word_last = _align(batch, texts, offsets, first_segment, word_offsets)
    kept, truncated = _cut(own, first_segment, offsets, max_length)
    # Positions before the cut do not move: only tokens to the right of what is kept of a segment go.
    lost = np.zeros(len(word_last), dtype=bool)
    present = word_last >= 0
    word_text = np.repeat(np.arange(len(texts)), np.diff(word_offsets))
    lost[present] = ~kept[offsets[word_text[present]] + word_last[present]]
    word_first[lost], word_last[lost] = -1, -1
    return EncodedTexts(
        ids=ids[kept].astype(np.int32),
        types=types[kept].astype(np.int8),
        own=own[kept],
        token_offsets=_offsets(np.bincount(text_of[kept], minlength=len(texts))),
        word_first=word_first.astype(np.int32),
        word_last=word_last.astype(np.int32),
        word_offsets=word_offsets,
        truncated=truncated,
    )


def _align(
    batch: Any, texts: Sequence[Text], offsets: np.ndarray, first_segment: np.ndarray, word_offsets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """First and last token (position within the text) that overlaps each span; -1 where none does."""
    first = np.full(int(word_offsets[-1]), -1, dtype=np.int64)
    last = first.copy()
    if not len(first):
        return first, last
    characters = np.fromiter(
        chain.from_iterable(chain.from_iterable(e.offsets for e in batch.encodings)), dtype=np.int64
    ).reshape(-1, 2)
    # All texts on one axis of characters, one apart, so that one sorted search serves the chunk.
    base = _offsets(np.array([len(t.string) + 1 for t in texts], dtype=np.int64))
    text_of = np.repeat(np.arange(len(texts)), np.diff(offsets))
    tokens = np.flatnonzero(first_segment & (characters[:, 1] > characters[:, 0]))
    begin, end = (characters[tokens] + base[text_of[tokens], None]).T
    spans = np.fromiter(chain.from_iterable(chain.from_iterable(t.spans for t in texts)), dtype=np.int64).reshape(-1, 2)
    word_text = np.repeat(np.arange(len(texts)), np.diff(word_offsets))
    a, b = (spans + base[word_text, None]).T
    # Running extremes make the searches exact even where a normaliser has reordered characters.
    i = np.searchsorted(np.maximum.accumulate(end), a, side="right")
    j = np.searchsorted(np.minimum.accumulate(begin[::-1])[::-1], b, side="left") - 1
    found = i <= j
    first[found] = tokens[i[found]] - offsets[word_text[found]]
    last[found] = tokens[j[found]] - offsets[word_text[found]]
    return first, last


def _cut(
    own: np.ndarray, first_segment: np.ndarray, offsets: np.ndarray, max_length: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens stay (the special ones always, of each segment its beginning), and which texts lost some."""
    kept = np.ones(len(own), dtype=bool)
    truncated = np.diff(offsets) > (len(own) if max_length is None else max_length)
    for text in np.flatnonzero(truncated):
        part = slice(offsets[text], offsets[text + 1])
        one = first_segment[part]
        two = own[part] & ~one
        assert max_length is not None
        budget = max_length - int((~own[part]).sum())
        if budget < 1:
            raise ModelError(f"A window of {max_length} tokens has no room beside the tokenizer's special tokens.")
        shorter = min(one.sum(), two.sum(), budget // 2)
        room_one, room_two = (budget - shorter, shorter) if one.sum() > two.sum() else (shorter, budget - shorter)
        kept[part] = ~own[part] | (one & (np.cumsum(one) <= room_one)) | (two & (np.cumsum(two) <= room_two))
    return kept, truncated


def _joined(parts: Sequence[EncodedTexts]) -> EncodedTexts:
    def column(name: str) -> np.ndarray:
        values = [getattr(p, name) for p in parts]
        if not name.endswith("_offsets"):
            return np.concatenate(values)
        return _offsets(np.concatenate([np.diff(v) for v in values]))

    if not parts:
        raise DataError("There are no texts to encode. Give at least one.")
    return EncodedTexts(**{f.name: column(f.name) for f in fields(EncodedTexts)})


def _rank(mask: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Number of True before each element within its row."""
    before = np.concatenate([[0], np.cumsum(mask)])
    return before[:-1] - np.repeat(before[offsets[:-1]], np.diff(offsets))


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _flat(rows: Sequence[Sequence[int]]) -> np.ndarray:
    return np.fromiter(chain.from_iterable(rows), dtype=np.int64)


def excerpt(string: str) -> str:
    """A string, quoted and shortened for a message."""
    return repr(string if len(string) <= 60 else string[:57] + "…")
