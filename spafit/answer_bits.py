"""Bits of given answers under a model that writes: what it would have cost the model to write them itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from spafit.errors import DataError, UsageError
from spafit.text_windows import Template, encode_pair

if TYPE_CHECKING:
    from spafit.heads import HeadedModel


def answer_bits(
    headed: HeadedModel,
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    template: Template = "auto",
    batch_size: int = 16,
) -> np.ndarray:
    """Bits and number of tokens of each answer after its prompt, the token that ends it included.

    For :func:`spafit.generation_metrics.generation_table`. Bits per token of models with different tokenizers do not
    stand beside each other.

    Args:
        headed: a causal language model or encoder-decoder, with a token to pad with.
        prompts: what is read.
        answers: the right answer of each.
        template: how a decoder's prompt is put; the one that answers are written with.
        batch_size: items at a time.

    Returns:
        float64, shape (items, 2).

    Raises:
        UsageError: not one answer per prompt.
        DataError: prompt and answer do not fit into the model's window (names the item).
        ModelError: no token ends a text, or there is no chat template where one is asked for.
    """
    from spafit.batches import EncodedTexts
    from spafit.data.training import TrainData
    from spafit.kinds.language import Answers
    from spafit.models import model_window
    from spafit.predictions import summarise

    if len(prompts) != len(answers):
        raise UsageError(f"There are {len(answers)} answers for {len(prompts)} prompts. Give one for each.")
    separate = headed.head == "seq2seq-lm"
    window = model_window(headed.model, headed.tokenizer)
    items = []
    for place, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), 1):
        try:
            item, cut = encode_pair(
                headed.tokenizer, prompt, answer, max_length=window or 2**30, separate=separate, template=template
            )
        except DataError as error:
            raise DataError(f"Item {place}: {error}") from error
        if cut:
            raise DataError(f"Item {place}: prompt and answer do not fit into the model's window of {window} tokens.")
        items.append(item)
    kind = Answers(TrainData("answers", {}, None, (), kind="answers"))
    found = summarise(
        headed.model, EncodedTexts(tuple(items), None, 0), kind.collator(headed),
        lambda model, inputs: kind.loss(model, inputs)[1], batch_size=batch_size,
    )  # fmt: skip
    return found[:, :2].astype(np.float64)
