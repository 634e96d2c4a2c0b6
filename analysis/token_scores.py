"""Log-probabilities of texts under a language model: whole windows, one masked position at a time, or minimal pairs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from spafit.errors import DataError, NumericalError

if TYPE_CHECKING:
    import torch

    from spafit.language_models import LanguageModel

#: Values of logits that are held at a time, at most.
LOGIT_VALUES = 2**25
#: Padded tokens per forward pass.
BATCH_TOKENS = 2048


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
    takes n passes (pseudo-log-likelihood, Salazar et al. 2020, arXiv 1910.14659, eq. 2). Texts run in batches of
    similar length; probabilities are summed in float64.

    Args:
        language: the model.
        texts: token ids (:func:`windows`, :func:`encode_sentences`).
        reference: the model before training, with the same tokenizer; KL(reference ‖ language) is then given, too.
        progress: called with the number of texts finished.

    Raises:
        NumericalError: a log-probability is not finite.
    """
    rows = unmasked_rows(language, texts) if language.kind == "causal" else _masked_rows(language, texts)
    readers = [_reader(m, texts) for m in (language, reference) if m is not None]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))
    text: list[np.ndarray] = []
    log_p: list[np.ndarray] = []
    kl: list[np.ndarray] = []
    for batch in batches([len(rows[i].ids) for i in order]):
        chosen = [rows[order[i]] for i in batch]
        found, divergence = _score_batch(language, chosen, readers)
        text.append(np.concatenate([np.full(len(r.targets), r.text) for r in chosen]))
        log_p.append(found)
        if divergence is not None:
            kl.append(divergence)
        if progress is not None:
            progress(sum(r.share for r in chosen))
    scored = ScoredTokens(np.concatenate(text), np.concatenate(log_p), np.concatenate(kl) if kl else None)
    if not np.isfinite(scored.log_p).all():
        raise NumericalError(f"{language.name} gives log-probabilities that are not finite. Check its weights.")
    return scored


@dataclass(frozen=True)
class Row:
    """One sequence of a forward pass: its ids, and the (position read, token asked for) pairs of one text.

    Attributes:
        text: which text it belongs to.
        ids: token ids that go in.
        places: positions that are read.
        targets: tokens asked for there.
        share: the part of its text that is finished with this row.
    """

    text: int
    ids: Sequence[int]
    places: Sequence[int]
    targets: Sequence[int]
    share: float


def unmasked_rows(language: LanguageModel, texts: Sequence[Sequence[int]]) -> list[Row]:
    """Every text once, as it is: causal, each position but the last; masked, each token that is not special."""
    if language.kind == "causal":
        return [Row(i, ids, range(len(ids) - 1), ids[1:], 1.0) for i, ids in enumerate(texts)]
    special = set(language.tokenizer.all_special_ids)
    kept = [[k for k, token in enumerate(ids) if token not in special] for ids in texts]
    return [Row(i, ids, at, [ids[k] for k in at], 1.0) for i, (ids, at) in enumerate(zip(texts, kept, strict=True))]


def _masked_rows(language: LanguageModel, texts: Sequence[Sequence[int]]) -> list[Row]:
    mask, special = language.tokenizer.mask_token_id, set(language.tokenizer.all_special_ids)
    if mask is None:
        raise DataError(f"The tokenizer of {language.name} has no mask token, which a masked language model needs.")
    rows = []
    for i, ids in enumerate(texts):
        places = [k for k, token in enumerate(ids) if token not in special]
        for k in places:
            rows.append(Row(i, [*ids[:k], mask, *ids[k + 1 :]], [k], [ids[k]], 1 / len(places)))
    return rows


def batches(lengths: Sequence[int], *, tokens: int = BATCH_TOKENS) -> Iterator[range]:
    """Runs of rows, longest first, of at most ``tokens`` padded tokens, or of one row."""
    start = 0
    while start < len(lengths):
        stop = min(len(lengths), start + max(1, tokens // max(1, lengths[start])))
        yield range(start, stop)
        start = stop


#: From a batch's inputs and flat positions to logits at a part of these positions.
Reader = Callable[[dict[str, Any], "torch.Tensor"], Callable[[slice], "torch.Tensor"]]


def _score_batch(
    language: LanguageModel, rows: Sequence[Row], readers: Sequence[Reader]
) -> tuple[np.ndarray, np.ndarray | None]:
    import torch

    inputs, at, targets = batch_tensors(language, rows)
    size = max(1, LOGIT_VALUES // int(language.model.config.vocab_size))
    log_p, kl = [], []
    with torch.inference_mode():
        logits = [read(inputs, at) for read in readers]
        for start in range(0, len(at), size):
            part = slice(start, start + size)
            own = torch.log_softmax(logits[0](part).float(), dim=-1)
            log_p.append(own.gather(1, targets[part, None])[:, 0].double().cpu())
            if len(logits) > 1:
                other = torch.log_softmax(logits[1](part).float(), dim=-1)
                kl.append(kl_bits(other, own))
    return torch.cat(log_p).numpy(), torch.cat(kl).numpy() if kl else None


def batch_tensors(language: LanguageModel, rows: Sequence[Row]) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    """Padded inputs of a batch, flat positions that are read, and the tokens asked for there."""
    import torch

    device = next(language.model.parameters()).device
    width, pad = max(len(r.ids) for r in rows), language.tokenizer.pad_token_id or 0
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.as_tensor(list(row.ids))
        mask[i, : len(row.ids)] = 1
    at = torch.as_tensor([i * width + k for i, r in enumerate(rows) for k in r.places])
    targets = torch.as_tensor([t for r in rows for t in r.targets])
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}, at.to(device), targets.to(device)


def kl_bits(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p ‖ q) in bits from natural log-probabilities of shape (places, vocabulary); float64, on the CPU."""
    import torch

    return (p.exp() * (p - q)).sum(1, dtype=torch.float64).cpu() / math.log(2)


def head_alone(
    language: LanguageModel, texts: Sequence[Sequence[int]]
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The head as a function from last states (places, width) to logits, if that gives what the whole model gives.

    The model runs with a body that answers with the states given. It is tried on the beginning of a text; None where
    the head takes more than the last states from its body.
    """
    import torch
    from torch import nn

    trial = next(t for t in texts if len(t) > 1)[:16]
    inputs, _, _ = batch_tensors(language, [Row(0, trial, range(len(trial)), trial, 1.0)])
    device = inputs["input_ids"].device

    class Given(nn.Module):
        def __init__(self, output: type):
            super().__init__()
            self.output = output
            self.states: Any = None

        @property
        def decoder(self) -> nn.Module:
            """OPT and BART call the decoder in their body."""
            return self

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.output(last_hidden_state=self.states)

    def head(states: torch.Tensor) -> torch.Tensor:
        given.states = states[None]
        try:
            return model(input_ids=torch.zeros((1, len(states)), dtype=torch.long, device=device)).logits[0]
        finally:
            given.states = None

    with torch.inference_mode():
        expected = language.model(**inputs).logits[0]
        outputs = language.body(**inputs)
        given = Given(type(outputs))
        model = copy.copy(language.model)
        model._modules = {**language.model._modules, language.model.base_model_prefix: given}
        try:
            got = head(outputs[0][0])
        except (TypeError, ValueError, AttributeError, RuntimeError, NotImplementedError):
            return None
    same = got.shape == expected.shape and torch.allclose(got, expected, atol=1e-4, rtol=1e-4)
    return head if same else None


def _reader(language: LanguageModel, texts: Sequence[Sequence[int]]) -> Reader:
    """Logits where they are asked for: by running the head there alone where that is possible."""
    head = head_alone(language, texts)

    def read(inputs: dict[str, Any], at: torch.Tensor) -> Callable[[slice], torch.Tensor]:
        if head is None:
            logits = language.model(**inputs).logits.flatten(0, 1)[at]
            return lambda part: logits[part]
        states = language.body(**inputs)[0].flatten(0, 1)[at]
        return lambda part: head(states[part])

    return read
