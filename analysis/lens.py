"""What each hidden state says about the next token, read through an affine lens, before and after training.

For every hidden state of the model before training an affine map is fitted that leads to the states that its head
gets; the head on the mapped states is that hidden state's prediction. Where the stack ends in a norm, the map starts
from the hidden state under that norm, so that the last hidden state's map is the identity but for the ridge. The idea
is the tuned lens (Belrose et al. 2023, arXiv 2303.08112); theirs is trained to predict what the model predicts, with
the map below the norm, this one is least squares on states, in closed form, and predicts somewhat worse.

The model after training is read through the same maps, the same norm and the same head, so a difference says that the
hidden state moved in directions that the head would notice; a rotation that later blocks undo counts, too. It says
little at hidden states where the lens itself is poor: look at its error beside it.

In a masked model the text is not masked: each position's state is read in one pass, with its own token in sight, and
the prediction is mostly that token. What differs is how the state encodes a token in its context, not how well the
model guesses hidden words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.affine import RIDGE, AffineFit
from analysis.language_heads import head_alone, kl_bits
from analysis.token_rows import BATCH_TOKENS, Row, batch_tensors, batches, unmasked_rows
from analysis.token_scores import LOGIT_VALUES
from spafit.errors import ModelError

if TYPE_CHECKING:
    import torch

    from spafit.language_models import LanguageModel

#: Values of hidden states that are held at a time for one model, at most.
STATE_VALUES = 2**26


@dataclass(frozen=True)
class Lens:
    """Affine maps from a model's hidden states (under its final norm) to the states that its head gets.

    Attributes:
        weight: shape (hidden states, width, width of the head's input), in the model's precision.
        bias: shape (hidden states, width of the head's input).
        constant: mean of the states that the head gets: the lens of someone who sees no hidden state.
        tokens: how many tokens it was fitted on.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    constant: torch.Tensor
    tokens: int


@dataclass(frozen=True)
class LensScores:
    """Divergences at every token, in bits.

    Attributes:
        text: which text each token belongs to, shape (tokens,).
        kl: KL(lens before ‖ lens after), shape (hidden states, tokens).
        error: KL(the model's own prediction before ‖ lens before), shape (hidden states, tokens).
        constant: KL(the model's own prediction before ‖ the head on a constant state), shape (tokens,).
    """

    text: np.ndarray
    kl: np.ndarray
    error: np.ndarray
    constant: np.ndarray


def fit_lens(language: LanguageModel, texts: Sequence[Sequence[int]], *, ridge: float = RIDGE) -> Lens:
    """Fit the maps of every hidden state on texts (:func:`analysis.token_scores.windows`), from one pass.

    Holds two matrices of width × width in float64 per hidden state.

    Raises:
        UsageError: fewer tokens than twice the width.
        ModelError: no stack of blocks that runs on text alone.
    """
    import torch

    states = _States(language)
    fits = [AffineFit() for _ in range(states.count)]
    total: Any = 0.0
    for rows in _in_batches(language, texts, states):
        inputs, at = batch_tensors(language, rows)
        hidden, last = states(inputs, at)
        total = total + last.double().sum(0)
        for fit, x in zip(fits, hidden, strict=True):
            fit.add(states.norm(x), last)
    fits[0].check("A lens")
    solved = [fit.solve(ridge) for fit in fits]
    dtype = next(language.model.parameters()).dtype
    weight, bias = (torch.stack([s[i] for s in solved]).to(dtype) for i in (0, 1))
    return Lens(weight, bias, (total / fits[0].n).to(dtype), fits[0].n)


def lens_scores(
    before: LanguageModel,
    after: LanguageModel,
    lens: Lens,
    texts: Sequence[Sequence[int]],
    *,
    progress: Callable[[float], object] | None = None,
) -> LensScores:
    """Read both models through the lens of the first, at every token that is scored elsewhere.

    Causal: each position but the last. Masked: each token that is not special, unmasked. Costs two passes of the head
    per hidden state and token, one where the states before and after are equal to the bit; the divergence there is
    exactly 0.

    Args:
        before: the model before training, which the lens was fitted on.
        after: the model after it, of the same build; its own head is not asked.
        lens: of :func:`fit_lens`.
        texts: token ids, not those that the lens was fitted on.
        progress: called with the number of texts finished.

    Raises:
        ModelError: the head needs more than states, or the stacks differ.
    """
    import torch

    first, second = _States(before), _States(after)
    if first.count != second.count:
        raise ModelError(f"{before.name} has {first.count} hidden states and {after.name} {second.count}.")
    head = head_alone(before, texts)
    if head is None:
        raise ModelError(f"The head of {before.name} needs more than the last states, so no lens can be put under it.")
    text, kl, error, constant = [], [], [], []
    size = max(1, LOGIT_VALUES // int(before.model.config.vocab_size))
    for rows in _in_batches(before, texts, first):
        inputs, at = batch_tensors(before, rows)
        (old, last), (new, _) = first(inputs, at), second(inputs, at)
        changed = [not torch.equal(a, b) for a, b in zip(old, new, strict=True)]

        def said(states: torch.Tensor, hidden: int, part: slice) -> torch.Tensor:
            mapped = first.norm(states[part]) @ lens.weight[hidden] + lens.bias[hidden]
            return torch.log_softmax(head(mapped).float(), dim=-1)

        with torch.inference_mode():
            blank = torch.log_softmax(head(lens.constant[None]).float(), dim=-1)
            for start in range(0, len(at), size):
                part = slice(start, start + size)
                final = torch.log_softmax(head(last[part]).float(), dim=-1)
                constant.append(kl_bits(final, blank))
                errors, divergences = [], []
                for hidden in range(first.count):
                    before_here = said(old[hidden], hidden, part)
                    errors.append(kl_bits(final, before_here))
                    divergences.append(
                        kl_bits(before_here, said(new[hidden], hidden, part))
                        if changed[hidden] else torch.zeros_like(errors[-1])
                    )  # fmt: skip
                error.append(torch.stack(errors))
                kl.append(torch.stack(divergences))
        text.append(np.concatenate([np.repeat(r.text[:1], len(r.places)) for r in rows]))
        if progress is not None:
            progress(len(rows))
    return LensScores(
        np.concatenate(text), torch.cat(kl, 1).numpy(), torch.cat(error, 1).numpy(), torch.cat(constant).numpy()
    )


class _States:
    """A model's hidden states, and the states that its head gets, at given places of a batch.

    Attributes:
        count: number of hidden states, the embeddings included.
        norm: the norm after the last block, or the identity.
    """

    def __init__(self, language: LanguageModel):
        from torch import nn

        from probing.forward import Backbone, pick_stack, site_states
        from spafit.models import load_model

        loaded = load_model((language.body, language.tokenizer))
        stack = pick_stack(loaded, None)
        first = next(language.model.parameters())
        self.backbone = Backbone(
            loaded, stack, dtype=str(first.dtype).removeprefix("torch."), device=str(first.device)
        )  # fmt: skip
        self.sites = site_states(loaded, stack, ("block",))
        self.count, self.width = stack.num_blocks + 1, stack.width
        self.norm = nn.Identity() if stack.final_norm is None else self.backbone.submodule(stack.final_norm)

    def __call__(self, inputs: dict[str, torch.Tensor], at: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Every hidden state, and the head's input, each of shape (places, width)."""
        found: dict[int, torch.Tensor] = {}
        last: list[torch.Tensor] = []

        def receive(site: str, hidden: int, states: torch.Tensor) -> None:
            found[hidden] = states.flatten(0, 1)[at]

        handle = self.backbone.module.register_forward_hook(lambda _, args, out: last.append(out[0].flatten(0, 1)[at]))
        try:
            with self.backbone.reading(self.sites, receive) as run:
                run(inputs)
        finally:
            handle.remove()
        return [found[k] for k in range(self.count)], last[0]


def _in_batches(language: LanguageModel, texts: Sequence[Sequence[int]], states: _States) -> Iterator[list[Row]]:
    rows = sorted(unmasked_rows(language, texts), key=lambda r: -len(r.ids))
    most = min(BATCH_TOKENS, max(1, STATE_VALUES // (states.count * states.width)))
    for batch in batches([len(r.ids) for r in rows], tokens=most):
        yield [rows[i] for i in batch]
