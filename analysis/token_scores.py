"""Log-probabilities of texts under a language model: whole windows, one masked position at a time, or minimal pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.token_trees import TokenTree, one_text, pack, visible
from spafit.errors import DataError, NumericalError

if TYPE_CHECKING:
    import torch

    from spafit.language_models import LanguageModel

#: Values of logits that are held at a time, at most.
LOGIT_VALUES = 2**25
#: Padded tokens per forward pass.
BATCH_TOKENS = 2048
#: Tokens of a row that several texts share.
ROW_TOKENS = 128


@dataclass(frozen=True)
class ScoredTokens:
    """Tokens that a model was asked for, over all texts.

    Attributes:
        text: which text each token belongs to, shape (tokens,).
        log_p: natural logarithm of its probability, float64, shape (tokens,).
        kl: KL divergence of another model's distribution from this one's at the same place, in bits, or None.
    """

    text: np.ndarray
    log_p: np.ndarray
    kl: np.ndarray | None

    def sums(self, n: int) -> np.ndarray:
        """Log-probability of each of ``n`` texts, in nats."""
        return np.bincount(self.text, weights=self.log_p, minlength=n)


def windows(language: LanguageModel, text: str, *, length: int) -> list[list[int]]:
    """Token ids of consecutive, non-overlapping windows of running text; a rest of fewer than two tokens is dropped.

    The model's own window shortens them where it is smaller.

    Raises:
        DataError: the text has fewer than two tokens.
    """
    from spafit.models import model_window

    length = min(length, model_window(language.body, language.tokenizer) or length)
    ids = language.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    start, stop = _special(language)
    room = length - len(start) - len(stop)
    found = [start + ids[i : i + room] + stop for i in range(0, len(ids), room) if len(ids[i : i + room]) > 1]
    if not found:
        raise DataError("The text has fewer than two tokens. Give running text.")
    return found


def encode_sentences(language: LanguageModel, sentences: Sequence[str]) -> list[list[int]]:
    """Token ids of sentences, with the tokens that this model begins and ends a text with.

    A causal model without such a token begins with its end-of-text token, so that the first word is scored too.
    """
    ids = language.tokenizer(list(sentences), add_special_tokens=False)["input_ids"]
    start, stop = _special(language)
    if language.kind == "causal" and not start and language.tokenizer.eos_token_id is not None:
        start = [language.tokenizer.eos_token_id]
    return [start + list(i) + stop for i in ids]


def _special(language: LanguageModel) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts before and after a text."""
    marker = language.tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = language.tokenizer("a")["input_ids"]
    at = next(i for i in range(len(whole)) if whole[i : i + len(marker)] == marker)
    start, stop = list(whole[:at]), list(whole[at + len(marker) :])
    return start, stop if language.kind == "masked" else []


def score(
    language: LanguageModel,
    texts: Sequence[Sequence[int]],
    *,
    reference: LanguageModel | None = None,
    progress: Callable[[float], object] | None = None,
) -> ScoredTokens:
    """Log-probability of every token of every text, given those before it (causal) or all others (masked).

    Causal: each token but the first. Masked: each token that is not special, masked by itself, so a text of n tokens
    takes n passes (pseudo-log-likelihood, Salazar et al. 2020, arXiv 1910.14659, eq. 2). Rows run in batches of
    similar length; probabilities are summed in float64. Short causal texts are packed into rows in which a beginning
    that they share runs once (:mod:`analysis.token_trees`), if the model gives the same logits that way.

    Args:
        language: the model.
        texts: token ids (:func:`windows`, :func:`encode_sentences`).
        reference: the model before training, with the same tokenizer; KL(reference ‖ language) is then given, too.
        progress: called with the number of texts finished.

    Returns:
        Tokens in the order of the texts.

    Raises:
        NumericalError: a log-probability is not finite.
    """
    models = [m for m in (language, reference) if m is not None]
    if language.kind == "causal":
        found = [_reader(m, texts, trees=True) for m in models]
        # a mask of one's own overrides a model's narrow window, so longer texts stay by themselves
        size = min(ROW_TOKENS, *(getattr(m.model.config, "sliding_window", None) or ROW_TOKENS for m in models))
        size = size if all(takes_trees for _, takes_trees in found) else 0
        rows = _causal_rows(texts, size=size)
    else:
        found = [_reader(m, texts, trees=False) for m in models]
        rows, size = _masked_rows(language, texts), 0
    readers = [read for read, _ in found]
    rows = sorted(rows, key=lambda row: -len(row.ids))
    text: list[np.ndarray] = []
    log_p: list[np.ndarray] = []
    kl: list[np.ndarray] = []
    for batch in _batches([len(r.ids) for r in rows], apart=size):
        chosen = rows[batch.start : batch.stop]
        own, divergence = _score_batch(language, chosen, readers)
        text.append(np.concatenate([r.text for r in chosen]))
        log_p.append(own)
        if divergence is not None:
            kl.append(divergence)
        if progress is not None:
            progress(sum(r.share for r in chosen))
    owner = np.concatenate(text)
    by_text = np.argsort(owner, kind="stable")
    scored = ScoredTokens(owner[by_text], np.concatenate(log_p)[by_text], np.concatenate(kl)[by_text] if kl else None)
    if not np.isfinite(scored.log_p).all():
        raise NumericalError(f"{language.name} gives log-probabilities that are not finite. Check its weights.")
    return scored


@dataclass(frozen=True)
class _Row:
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
class _Questions:
    """What is asked for in a batch: the rows' fields joined, with numbers that run on from row to row."""

    asked: np.ndarray
    targets: np.ndarray
    answers: np.ndarray
    text: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[_Row]) -> _Questions:
        places = accumulate((len(r.places) for r in rows), initial=0)
        questions = accumulate((len(r.targets) for r in rows), initial=0)
        return cls(
            np.concatenate([r.asked + n for r, n in zip(rows, places, strict=False)]),
            np.concatenate([r.targets for r in rows]),
            np.concatenate([r.answers + n for r, n in zip(rows, questions, strict=False)]),
            np.concatenate([r.text for r in rows]),
        )


def _causal_rows(texts: Sequence[Sequence[int]], *, size: int) -> list[_Row]:
    trees = pack(texts, size=size) if size else (one_text(i, ids) for i, ids in enumerate(texts))
    return [_tree_row(tree) for tree in trees]


def _tree_row(tree: TokenTree) -> _Row:
    parents = np.asarray(tree.parents, dtype=np.int64)
    children = np.flatnonzero(parents >= 0)
    places, asked = np.unique(parents[children], return_inverse=True)
    question = np.zeros(len(parents), dtype=np.int64)
    question[children] = np.arange(len(children))
    return _Row(
        ids=tree.ids, parents=tree.parents if len(tree.paths) > 1 else None, places=places, asked=asked,
        targets=np.asarray(tree.ids, dtype=np.int64)[children],
        text=np.concatenate([np.full(max(0, len(path) - 1), i) for i, path in tree.paths]),
        answers=np.concatenate([question[list(path[1:])] for _, path in tree.paths]),
        share=float(len(tree.paths)),
    )  # fmt: skip


def _masked_rows(language: LanguageModel, texts: Sequence[Sequence[int]]) -> list[_Row]:
    mask, special = language.tokenizer.mask_token_id, set(language.tokenizer.all_special_ids)
    if mask is None:
        raise DataError(f"The tokenizer of {language.name} has no mask token, which a masked language model needs.")
    rows, zero = [], np.zeros(1, dtype=np.int64)
    for i, ids in enumerate(texts):
        places = [k for k, token in enumerate(ids) if token not in special]
        for k in places:
            masked = [*ids[:k], mask, *ids[k + 1 :]]
            asked = (np.array([k]), zero, np.array([ids[k]]), np.array([i]), zero)
            rows.append(_Row(masked, None, *asked, 1 / len(places)))
    return rows


def _batches(lengths: Sequence[int], *, apart: int) -> Iterator[range]:
    """Runs of at most :data:`BATCH_TOKENS` padded tokens, longest rows first; rows above ``apart`` run on their own."""
    start, long = 0, sum(n > apart for n in lengths)
    while start < len(lengths):
        stop = min(long if start < long else len(lengths), start + max(1, BATCH_TOKENS // max(1, lengths[start])))
        yield range(start, stop)
        start = stop


#: From a batch's inputs and flat positions to logits at a part of these positions.
Reader = Callable[[dict[str, Any], "torch.Tensor"], Callable[[slice], "torch.Tensor"]]


def _score_batch(
    language: LanguageModel, rows: Sequence[_Row], readers: Sequence[Reader]
) -> tuple[np.ndarray, np.ndarray | None]:
    import torch

    inputs, at = _tensors(language, rows)
    asks = _Questions.of(rows)
    asked, targets = asks.asked, asks.targets
    order = np.argsort(asked, kind="stable")
    log_p, kl = np.empty(len(asked)), np.empty(len(at)) if len(readers) > 1 else None
    size = max(1, LOGIT_VALUES // int(language.model.config.vocab_size))
    with torch.inference_mode():
        logits = [read(inputs, at) for read in readers]
        for start in range(0, len(at), size):
            part = slice(start, start + size)
            here = order[slice(*np.searchsorted(asked[order], [start, start + size]))]
            own = torch.log_softmax(logits[0](part).float(), dim=-1)
            chosen = (torch.as_tensor(a, device=own.device) for a in (asked[here] - start, targets[here]))
            log_p[here] = own[tuple(chosen)].double().cpu().numpy()
            if kl is not None:
                other = torch.log_softmax(logits[1](part).float(), dim=-1)
                divergence = (other.exp() * (other - own)).sum(1, dtype=torch.float64).cpu() / math.log(2)
                kl[part] = divergence.numpy()
    return log_p[asks.answers], kl[asked[asks.answers]] if kl is not None else None


def _tensors(language: LanguageModel, rows: Sequence[_Row]) -> tuple[dict[str, Any], torch.Tensor]:
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


def _reader(language: LanguageModel, texts: Sequence[Sequence[int]], *, trees: bool) -> tuple[Reader, bool]:
    """Logits where they are asked for, and whether rows may be trees.

    The head runs there alone, and rows are trees, if that gives what the whole model gives for each text by itself.
    """
    import torch

    body = language.body
    head = [m for m in language.model.children() if m is not body]

    def above(inputs: dict[str, Any], at: torch.Tensor) -> Callable[[slice], torch.Tensor]:
        states = body(**inputs)[0].flatten(0, 1)[at]

        def read(part: slice) -> torch.Tensor:
            logits = states[None, part]
            for module in head:
                logits = module(logits)
            return logits[0]

        return read

    def whole(inputs: dict[str, Any], at: torch.Tensor) -> Callable[[slice], torch.Tensor]:
        logits = language.model(**inputs).logits.flatten(0, 1)[at]
        return lambda part: logits[part]

    trial = list(next(t for t in texts if len(t) > 1)[:16])
    pair = [trial, trial[: (len(trial) + 1) // 2] + trial[::-1]]
    apart = [_tree_row(one_text(i, ids)) for i, ids in enumerate(pair)]
    together = [_tree_row(tree) for tree in pack(pair, size=3 * len(trial))] if trees else apart

    def logits(read: Reader, rows: Sequence[_Row]) -> torch.Tensor:
        asks = _Questions.of(rows)
        by_text = np.argsort(asks.text, kind="stable")
        return read(*_tensors(language, rows))(slice(None))[asks.asked[asks.answers][by_text]]

    with torch.inference_mode():
        expected = logits(whole, apart)
        for read, rows in ((above, together), (above, apart), (whole, together)):
            try:
                got = logits(read, rows)
            except (TypeError, ValueError, AttributeError, RuntimeError, NotImplementedError):
                continue  # heads of several branches, or with more inputs; no such masks or positions
            if got.shape == expected.shape and torch.allclose(got, expected, atol=1e-4, rtol=1e-4):
                return read, trees and rows is together
    return whole, False
