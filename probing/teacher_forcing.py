"""What a decoder that reads an encoder is fed while it is probed: the text itself, shifted right (teacher forcing).

The encoder reads a text x. The decoder's input is its start token followed by x without the closing special token, if
the tokenizer adds one: what training on the pair (x, x) feeds it. Position t of the decoder then holds the token at
position t - 1 of x, and a word's states are taken at the positions *whose inputs are the word's own tokens*: its last
state is that of the position whose input is its last sub-word. That state has read the word and everything to its
left, but nothing to its right in the decoder; cross-attention shows it the whole text through the encoder. A text with
a target (:class:`probing.tasks.base.Text`) is read by the encoder, and the decoder is fed the target in place of x.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from probing.align import EncodedTexts, encode_texts
from probing.forward import backbone_path
from probing.tasks.base import Text
from spafit.errors import ModelError
from spafit.models import model_window

if TYPE_CHECKING:
    from spafit.models import LoadedModel
    from spafit.stacks import Stack


@dataclass(frozen=True)
class Feeding:
    """How a model's decoder is fed.

    Attributes:
        encoder: the stack whose output the decoder reads.
        decoder: the stack that is fed.
        start: token id at its first position.
        start_token: the same as a string.
        guessed: the model names no start token, so the tokenizer's first special token stands for it.
        window: tokens that the decoder takes; None where nothing limits it.
    """

    encoder: Stack
    decoder: Stack
    start: int
    start_token: str
    guessed: bool
    window: int | None

    @property
    def words(self) -> str:
        """One sentence for reports."""
        guess = ", which stands for the start token that the model does not name" if self.guessed else ""
        return (
            f"stack {self.decoder.name!r} was fed under teacher forcing: {self.start_token}{guess}, then the text "
            f"itself (its target, where it has one), while the {self.encoder.name} read the text; a word's states are "
            "those of the positions whose inputs are its own tokens"
        )


def reads_encoder(stack: Stack) -> bool:
    """Whether a stack has cross-attention."""
    return stack.cross_branch is not None


def causal_words(stack: Stack) -> str:
    """What a report says of a causal stack, in one sentence."""
    through = " except through what the encoder read" if reads_encoder(stack) else ""
    return (
        f"stack {stack.name!r} is causal: a state knows nothing of what stands to its right{through}. A word's state "
        "is that of its sub-words alone and what precedes them (--pooling word-final takes the last of them, which has "
        "read the whole word); a sentence pooled by 'first' has read one token, by 'last' all of it"
    )


def feeding_of(loaded: LoadedModel) -> Feeding | None:
    """How the decoder of an encoder-decoder is fed; None for other models.

    Raises:
        ModelError: several encoders, one that does not read texts, a decoder with a vocabulary of its own, or no token
            to start with.
    """
    crossed = [s for s in loaded.stacks if reads_encoder(s)]
    if not crossed:
        return None
    encoders = [s for s in loaded.stacks if not reads_encoder(s)]
    what = f"Stack {crossed[0].name!r} of {loaded.name} reads an encoder"
    if len(crossed) > 1 or len(encoders) != 1:
        raise ModelError(
            f"{what}, and {len(encoders)} encoder(s) and {len(crossed)} such decoder(s) were found where one of each "
            "is needed. Name the stack of blocks to probe by its path, or give its states to probing.probe_arrays."
        )
    config = getattr(loaded.model, "config", None)
    if encoders[0].name.startswith("vision") or getattr(loaded.model, "main_input_name", "input_ids") != "input_ids":
        raise ModelError(f"{what} that does not read texts. Compute its states, and give them to probing.probe_arrays.")
    sizes = [getattr(getattr(config, part, None), "vocab_size", None) for part in ("encoder", "decoder")]
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"{what}, and its vocabulary of {sizes[1]} tokens is not the encoder's of {sizes[0]}, so the text cannot "
            "be fed to it with one tokenizer. Probe the encoder (--stack encoder)."
        )
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise ModelError(f"{what}, and the model has no tokenizer. Give one with the model.")
    start, guessed = _start(loaded, tokenizer)
    path = _home(loaded.model, crossed[0])
    return Feeding(
        encoders[0], crossed[0], start, str(tokenizer.convert_ids_to_tokens(start)), guessed,
        model_window(loaded.model.get_submodule(path), loaded.tokenizer),
    )  # fmt: skip


def _start(loaded: LoadedModel, tokenizer: Any) -> tuple[int, bool]:
    config: Any = getattr(loaded.model, "config", None)
    generation = getattr(loaded.model, "generation_config", None)
    for place in (config, generation):
        token = getattr(place, "decoder_start_token_id", None)
        if isinstance(token, int):
            return token, False
    for token in (getattr(config, "bos_token_id", None), tokenizer.bos_token_id, tokenizer.cls_token_id):
        if isinstance(token, int):
            return token, True
    raise ModelError(
        f"{loaded.name} names no token that its decoder starts with, and its tokenizer has neither [CLS] nor a begin "
        "token. Set decoder_start_token_id in its config.json, or probe the encoder (--stack encoder)."
    )


def _home(model: Any, stack: Stack) -> str:
    """Path of the part of the model that runs the decoder alone."""
    place, _ = backbone_path(model, stack)
    if {"input_ids", "encoder_hidden_states"} <= set(inspect.signature(model.get_submodule(place).forward).parameters):
        return place
    raise ModelError(
        f"No part of {type(model).__name__} around stack {stack.name!r} takes input_ids and encoder_hidden_states, so "
        "its decoder cannot be fed. Probe the encoder (--stack encoder)."
    )


def fed_texts(
    feeding: Feeding, tokenizer: Any, texts: Sequence[Text], encoded: EncodedTexts, *, numbers: np.ndarray | None = None
) -> EncodedTexts:
    """What the decoder is fed for each text.

    Args:
        feeding: start token and window.
        tokenizer: of the model.
        texts: the texts.
        encoded: what the encoder reads.
        numbers: what errors call each text.

    Returns:
        Tokens with the same words as ``encoded``, each one position later; a word that the decoder's window cuts, or
        of a text with a target, has none (-1).
    """
    targeted = np.flatnonzero([t.target is not None for t in texts])
    own = shifted_right(encoded, start=feeding.start, window=feeding.window)
    if not len(targeted):
        return own
    numbers = np.arange(len(texts)) if numbers is None else numbers
    targets = [Text(str(texts[int(i)].target)) for i in targeted]
    read = encode_texts(tokenizer, targets, max_length=feeding.window, numbers=numbers[targeted])
    read = shifted_right(read, start=feeding.start, window=feeding.window)
    return _replaced(own, targeted, read)


def shifted_right(encoded: EncodedTexts, *, start: int, window: int | None) -> EncodedTexts:
    """Every text behind a start token, without its closing special token, cut at the window."""
    lengths = encoded.lengths
    closing = ~encoded.own[encoded.token_offsets[1:] - 1]
    room = lengths + 1 - closing
    cut = room if window is None else np.minimum(room, window)
    offsets = np.concatenate([[0], np.cumsum(cut)]).astype(np.int64)
    text = np.repeat(np.arange(len(cut)), cut)
    within = np.arange(offsets[-1]) - offsets[text]
    source = encoded.token_offsets[text] + np.maximum(within - 1, 0)
    first = within == 0
    words = np.repeat(np.arange(len(cut)), np.diff(encoded.word_offsets))
    kept = (encoded.word_last >= 0) & (encoded.word_last + 1 < cut[words])
    return EncodedTexts(
        ids=np.where(first, start, encoded.ids[source]).astype(np.int32),
        types=np.zeros(len(source), dtype=np.int8),
        own=encoded.own[source] & ~first,
        token_offsets=offsets,
        word_first=np.where(kept, encoded.word_first + 1, -1).astype(np.int32),
        word_last=np.where(kept, encoded.word_last + 1, -1).astype(np.int32),
        word_offsets=encoded.word_offsets,
        truncated=encoded.truncated | (cut < room),
    )


def _replaced(encoded: EncodedTexts, at: np.ndarray, other: EncodedTexts) -> EncodedTexts:
    """The texts at ``at`` replaced by those of ``other``; their words have no token."""
    parts = {name: np.split(getattr(encoded, name), encoded.token_offsets[1:-1]) for name in ("ids", "types", "own")}
    news = {name: np.split(getattr(other, name), other.token_offsets[1:-1]) for name in parts}
    for k, i in enumerate(at):
        for name, pieces in parts.items():
            pieces[i] = news[name][k]
    lengths = [len(p) for p in parts["ids"]]
    words = np.repeat(np.isin(np.arange(len(lengths)), at), np.diff(encoded.word_offsets))
    truncated = encoded.truncated.copy()
    truncated[at] = other.truncated
    return replace(
        encoded,
        **{name: np.concatenate(pieces) for name, pieces in parts.items()},
        token_offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        word_first=np.where(words, -1, encoded.word_first),
        word_last=np.where(words, -1, encoded.word_last),
        truncated=truncated,
    )
