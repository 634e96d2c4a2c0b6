"""The head of a language model by itself, and divergences of what it says."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from analysis.token_rows import batch_tensors, causal_rows

if TYPE_CHECKING:
    import torch

    from spafit.language_models import LanguageModel


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
    inputs, _ = batch_tensors(language, causal_rows([trial], size=0))
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
