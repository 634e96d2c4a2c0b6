"""How surprising words are to a language model by how far they stand from the word that they depend on.

A model that keeps track of a sentence is surprised little more by words whose head is far away. Long dependencies join
other words than short ones, however (a subject and its verb rather than an article and its noun), so a curve by itself
says little: set models beside each other on the same sentences, or one before and after training.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import pandas as pd

from analysis.token_scores import encode_sentences, score
from spafit.errors import DataError, UsageError
from spafit.runtime import Progress
from spafit.stats import BootstrapDraw, interval

if TYPE_CHECKING:
    from spafit.data.conllu import Sentence
    from spafit.language_models import LanguageModel

#: Columns of :func:`distance_table`.
COLUMNS = ("direction", "distance", "value", "ci_low", "ci_high", "n")
Direction = Literal["either", "left", "right"]
_CLASSES = (("1", 1, 1), ("2", 2, 2), ("3", 3, 3), ("4-5", 4, 5), ("6-9", 6, 9), ("10+", 10, None))


def dependency_bits(language: LanguageModel, sentences: Sequence[Sentence], *, quiet: bool = True) -> pd.DataFrame:
    """Bits of every token of treebank sentences, with the dependency distance of its word.

    A causal model reads what stands before a token, a masked one all other tokens of the sentence (a pass for each). A
    token belongs to the word of its last letter; each sentence is read by itself, as it was written.

    Args:
        language: the model.
        sentences: with heads (:func:`spafit.data.conllu.read_sentences`).
        quiet: no progress on stderr.

    Returns:
        One row per scored token: ``sentence`` and ``word`` (positions from 0), ``distance`` (position of the head minus
        that of the word: below 0 the head stands to the left; 0 for the root), ``relation`` (``punct`` is best left
        out: a full stop is easy, and its head is far) and ``bits``.

    Raises:
        UsageError: no sentences.
        DataError: a word without a head, or a tokenizer that does not say where its tokens stand.
        NumericalError: a log-probability is not finite.
    """
    if not len(sentences):
        raise UsageError("No sentences were given to score; give at least one.")
    for sentence in sentences:
        if min(sentence.heads) < 0:
            raise DataError(f"Sentence {sentence.id!r} has a word without a head, so it has no distance to it.")
    if not language.tokenizer.is_fast:
        raise DataError(f"The tokenizer of {language.name} does not say where its tokens stand. Use a fast one.")
    texts = [s.text() for s in sentences]
    places = language.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = encode_sentences(language, texts)
    special = set(language.tokenizer.all_special_ids)
    owner, word, distance, relation = [], [], [], []
    for i, sentence in enumerate(sentences):
        at = _word_at(sentence)
        plain = places["input_ids"][i]
        if language.kind == "masked":
            scored = [k for k, token in enumerate(plain) if token not in special]
        else:  # the first of all tokens is not predicted
            scored = list(range(1 if len(ids[i]) == len(plain) else 0, len(plain)))
        words = np.array([at[max(stop - 1, 0)] for _, stop in (places["offset_mapping"][i][k] for k in scored)], int)
        owner.append(np.full(len(words), i))
        word.append(words)
        roots = np.array([head == 0 for head in sentence.heads])
        to_head = np.where(roots, 0, np.array(sentence.heads) - 1 - np.arange(len(sentence.heads)))
        distance.append(to_head[words])
        relation += [sentence.deprels[k] for k in words]
    with Progress("Words by distance", len(texts), quiet=quiet) as progress:
        found = score(language, ids, progress=progress.advance)
    table = pd.DataFrame({"sentence": np.concatenate(owner), "word": np.concatenate(word)})
    assert np.array_equal(table["sentence"], found.text)
    return table.assign(distance=np.concatenate(distance), relation=relation, bits=-found.log_p / math.log(2))


def distance_table(
    bits: np.ndarray,
    distance: np.ndarray,
    groups: Sequence[Hashable] | np.ndarray,
    *,
    n_boot: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Mean bits per token by dependency distance, with 95 % intervals over sentences.

    Give the differences of two models' bits (after minus before) for paired differences.

    Args:
        bits: of each token, shape (tokens,).
        distance: of each token's word: position of its head minus its own; 0 for roots, shape (tokens,).
        groups: sentence of each token, shape (tokens,).
        n_boot: bootstrap replicates; all rows share them.
        seed: of the bootstrap.

    Returns:
        Columns :data:`COLUMNS`: ``direction`` is where the head stands (``left`` of the word, which a causal model has
        read by then; ``right``; ``either``), ``distance`` a class in words, ``root`` or ``all``, and ``n`` counts
        tokens. Classes without tokens are left out; roots count under ``all`` alone and by themselves. An interval of
        a class in few sentences is too narrow.

    Raises:
        UsageError: shapes that do not fit, or no tokens.
        NumericalError: bits that are not finite.
    """
    bits, distance = np.asarray(bits, dtype=float), np.asarray(distance)
    if bits.ndim != 1 or bits.shape != distance.shape or len(groups) != len(bits) or not len(bits):
        raise UsageError(
            f"Bits and distances have the shapes {bits.shape} and {distance.shape}, and there are {len(groups)} "
            "sentence labels; one of each per token is needed."
        )
    cells: list[tuple[str, str, np.ndarray]] = [("either", "all", np.ones(len(bits), dtype=bool))]
    cells.append(("either", "root", distance == 0))
    for direction in get_args(Direction):
        side = {"either": distance != 0, "left": distance < 0, "right": distance > 0}[direction]
        for name, low, high in _CLASSES:
            away = np.abs(distance)
            cells.append((direction, name, side & (away >= low) & (away <= (np.inf if high is None else high))))
    cells = [cell for cell in cells if cell[2].any()]
    inside = np.stack([cell[2] for cell in cells]).astype(float)
    draw = BootstrapDraw.make(groups, n_seeds=1, n_boot=n_boot, seed=seed)
    drawn = draw.means(np.concatenate([inside * bits, inside])[None])
    sums, counts = drawn[:, : len(cells)], drawn[:, len(cells) :]
    rows = []
    for k, (direction, name, chosen) in enumerate(cells):
        known = counts[:, k] > 0
        low, high = interval(sums[known, k] / counts[known, k])
        rows.append((direction, name, float(bits[chosen].mean()), float(low), float(high), int(chosen.sum())))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _word_at(sentence: Sentence) -> np.ndarray:
    """The word that each character of the sentence belongs to; spaces belong to the word before them."""
    sizes = [len(w) + space for w, space in zip(sentence.words, sentence.spaces, strict=True)]
    return np.repeat(np.arange(len(sizes)), sizes)
