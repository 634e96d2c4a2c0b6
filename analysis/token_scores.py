"""Log-probabilities of texts under a language model: whole windows, one masked position at a time, or minimal pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.language_heads import head_alone, kl_bits
from analysis.token_rows import Questions, Row, batch_tensors, batches, causal_rows, masked_rows, tree_row
from analysis.token_trees import one_text, pack
from spafit.errors import DataError, NumericalError

if TYPE_CHECKING:
    import torch

    from spafit.language_models import LanguageModel

#: Values of logits that are held at a time, at most.
LOGIT_VALUES = 2**25
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
        rows = causal_rows(texts, size=size)
    else:
        found = [_reader(m, texts, trees=False) for m in models]
        rows, size = masked_rows(language, texts), 0
    readers = [read for read, _ in found]
    rows = sorted(rows, key=lambda row: -len(row.ids))
    text: list[np.ndarray] = []
    log_p: list[np.ndarray] = []
    kl: list[np.ndarray] = []
    for batch in batches([len(r.ids) for r in rows], apart=size):
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


#: From a batch's inputs and flat positions to logits at a part of these positions.
Reader = Callable[[dict[str, Any], "torch.Tensor"], Callable[[slice], "torch.Tensor"]]


def _score_batch(
    language: LanguageModel, rows: Sequence[Row], readers: Sequence[Reader]
) -> tuple[np.ndarray, np.ndarray | None]:
    import torch

    inputs, at = batch_tensors(language, rows)
    asks = Questions.of(rows)
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
                kl[part] = kl_bits(other, own).numpy()
    return log_p[asks.answers], kl[asked[asks.answers]] if kl is not None else None


def _reader(language: LanguageModel, texts: Sequence[Sequence[int]], *, trees: bool) -> tuple[Reader, bool]:
    """Logits where they are asked for, and whether rows may be trees.

    The head runs there alone, and rows are trees, if that gives what the whole model gives for each text by itself.
    """
    import torch

    body, head = language.body, head_alone(language, texts)

    def above(inputs: dict[str, Any], at: torch.Tensor) -> Callable[[slice], torch.Tensor]:
        states = body(**inputs)[0].flatten(0, 1)[at]
        assert head is not None
        return lambda part: head(states[part])

    def whole(inputs: dict[str, Any], at: torch.Tensor) -> Callable[[slice], torch.Tensor]:
        logits = language.model(**inputs).logits.flatten(0, 1)[at]
        return lambda part: logits[part]

    trial = list(next(t for t in texts if len(t) > 1)[:16])
    pair = [trial, trial[: (len(trial) + 1) // 2] + trial[::-1]]
    apart = [tree_row(one_text(i, ids)) for i, ids in enumerate(pair)]
    together = [tree_row(tree) for tree in pack(pair, size=3 * len(trial))] if trees else apart

    def logits(read: Reader, rows: Sequence[Row]) -> torch.Tensor:
        asks = Questions.of(rows)
        by_text = np.argsort(asks.text, kind="stable")
        return read(*batch_tensors(language, rows))(slice(None))[asks.asked[asks.answers][by_text]]

    with torch.inference_mode():
        expected = logits(whole, apart)
        for read, rows in ((above, together), (above, apart), (whole, together))[0 if head is not None else 2 :]:
            try:
                got = logits(read, rows)
            except (TypeError, ValueError, AttributeError, RuntimeError, NotImplementedError):
                continue  # no such masks or positions
            if got.shape == expected.shape and torch.allclose(got, expected, atol=1e-4, rtol=1e-4):
                return read, trees and rows is together
    return whole, False
