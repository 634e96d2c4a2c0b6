"""Rows of tokens that go through a language model: texts as they are, packed as trees, or masked one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.token_trees import TokenTree, one_text, pack, visible
from spafit.errors import DataError

if TYPE_CHECKING:
    import torch

    from spafit.language_models import LanguageModel

#: Padded tokens per forward pass.
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Row:
    """One sequence of a forward pass, and what is asked for there.

    Attributes:
        ids: its tokens.
        parents: the token that each follows, where the row is a tree (:class:`analysis.token_trees.TokenTree`);
            otherwise None.
        places: where the model's prediction is read.
        asked: for each token asked for, which of ``places`` predicts it, shape (questions,).
        targets: these tokens, shape (questions,).
        text: the text of each token in the result, shape (tokens,).
        answers: which question gives it, shape (tokens,): texts that share a token share the question.
        share: texts finished with this row.
    """

    ids: Sequence[int]
    parents: Sequence[int] | None
    places: np.ndarray
    asked: np.ndarray
    targets: np.ndarray
    text: np.ndarray
    answers: np.ndarray
    share: float


@dataclass(frozen=True)
class Questions:
    """What is asked for in a batch: the rows' fields joined, with numbers that run on from row to row."""

    asked: np.ndarray
    targets: np.ndarray
    answers: np.ndarray
    text: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Questions:
        """Join the rows of a batch."""
        places = accumulate((len(r.places) for r in rows), initial=0)
        questions = accumulate((len(r.targets) for r in rows), initial=0)
        return cls(
            np.concatenate([r.asked + n for r, n in zip(rows, places, strict=False)]),
            np.concatenate([r.targets for r in rows]),
            np.concatenate([r.answers + n for r, n in zip(rows, questions, strict=False)]),
            np.concatenate([r.text for r in rows]),
        )


def causal_rows(texts: Sequence[Sequence[int]], *, size: int) -> list[Row]:
    """Texts packed into rows of at most ``size`` tokens that share beginnings, or each by itself where it is 0."""
    trees = pack(texts, size=size) if size else (one_text(i, ids) for i, ids in enumerate(texts))
    return [tree_row(tree) for tree in trees]


def tree_row(tree: TokenTree) -> Row:
    """A row that asks for every token of a tree but its root, given the tokens before it."""
    parents = np.asarray(tree.parents, dtype=np.int64)
    children = np.flatnonzero(parents >= 0)
    places, asked = np.unique(parents[children], return_inverse=True)
    question = np.zeros(len(parents), dtype=np.int64)
    question[children] = np.arange(len(children))
    return Row(
        ids=tree.ids, parents=tree.parents if len(tree.paths) > 1 else None, places=places, asked=asked,
        targets=np.asarray(tree.ids, dtype=np.int64)[children],
        text=np.concatenate([np.full(max(0, len(path) - 1), i) for i, path in tree.paths]),
        answers=np.concatenate([question[list(path[1:])] for _, path in tree.paths]),
        share=float(len(tree.paths)),
    )  # fmt: skip


def unmasked_rows(language: LanguageModel, texts: Sequence[Sequence[int]]) -> list[Row]:
    """Every text once, as it is: causal, each position but the last; masked, each token that is not special."""
    if language.kind == "causal":
        return causal_rows(texts, size=0)
    special, rows = set(language.tokenizer.all_special_ids), []
    for i, ids in enumerate(texts):
        at = np.array([k for k, token in enumerate(ids) if token not in special], dtype=np.int64)
        every = np.arange(len(at))
        rows.append(Row(ids, None, at, every, np.asarray(ids, dtype=np.int64)[at], np.full(len(at), i), every, 1.0))
    return rows


def masked_rows(language: LanguageModel, texts: Sequence[Sequence[int]]) -> list[Row]:
    """A row for each token that is not special, with the mask in its place.

    Raises:
        DataError: the tokenizer has no mask token.
    """
    mask, special = language.tokenizer.mask_token_id, set(language.tokenizer.all_special_ids)
    if mask is None:
        raise DataError(f"The tokenizer of {language.name} has no mask token, which a masked language model needs.")
    rows, zero = [], np.zeros(1, dtype=np.int64)
    for i, ids in enumerate(texts):
        places = [k for k, token in enumerate(ids) if token not in special]
        for k in places:
            masked = [*ids[:k], mask, *ids[k + 1 :]]
            asked = (np.array([k]), zero, np.array([ids[k]]), np.array([i]), zero)
            rows.append(Row(masked, None, *asked, 1 / len(places)))
    return rows


def batches(lengths: Sequence[int], *, apart: int = 0, tokens: int = BATCH_TOKENS) -> Iterator[range]:
    """Runs of at most ``tokens`` padded tokens, longest rows first; rows above ``apart`` run on their own."""
    start, long = 0, sum(n > apart for n in lengths)
    while start < len(lengths):
        stop = min(long if start < long else len(lengths), start + max(1, tokens // max(1, lengths[start])))
        yield range(start, stop)
        start = stop


def batch_tensors(language: LanguageModel, rows: Sequence[Row]) -> tuple[dict[str, Any], torch.Tensor]:
    """Padded inputs of a batch, and the flat positions that are read."""
    import torch

    like = next(language.model.parameters())
    width, pad = max(len(r.ids) for r in rows), language.tokenizer.pad_token_id or 0
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.as_tensor(list(row.ids))
        mask[i, : len(row.ids)] = 1
    at = torch.as_tensor(np.concatenate([i * width + r.places for i, r in enumerate(rows)]), device=like.device)
    if all(r.parents is None for r in rows):
        return {"input_ids": ids.to(like.device), "attention_mask": mask.to(like.device)}, at
    sees = torch.eye(width, dtype=torch.bool).repeat(len(rows), 1, 1)  # padding sees itself
    positions = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        n = len(row.ids)
        own, position = visible(range(-1, n - 1) if row.parents is None else row.parents)
        sees[i, :n, :n], positions[i, :n] = torch.as_tensor(own), torch.as_tensor(position)
    hidden = torch.zeros(sees.shape, dtype=like.dtype).masked_fill_(~sees, torch.finfo(like.dtype).min)
    inputs = {"input_ids": ids, "attention_mask": hidden[:, None], "position_ids": positions}
    return {name: value.to(like.device) for name, value in inputs.items()}, at
