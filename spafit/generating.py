"""Let a language model write: greedy, beams or draws, in batches, the same as one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spafit.errors import DataError, UsageError
from spafit.runtime import Progress, seed_sequence
from spafit.text_windows import Template, encode_prompt, end_of_text

if TYPE_CHECKING:
    from spafit.image_processing import ImageProcessor

#: What :func:`generate` gives of each prompt.
COLUMNS = ("prompt", "text", "tokens", "ended")


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Any],
    *,
    max_new_tokens: int = 64,
    num_beams: int = 1,
    sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    template: Template = "auto",
    image_processor: ImageProcessor | None = None,
    quiet: bool = False,
) -> pd.DataFrame:
    """Write an answer to each prompt, or a caption to each image.

    Greedy and beam search give the same texts in any batch size, up to ties within rounding; draws depend on the batch.

    Args:
        model: causal language model or encoder-decoder, in any mode, which is put back.
        tokenizer: its tokenizer, with a token that ends a text.
        prompts: what is read, see :func:`spafit.text_windows.encode_prompt`; with an ``image_processor`` images.
        max_new_tokens: tokens written, at most.
        num_beams: beams; 1 is greedy.
        sample: draw tokens instead of taking the most probable ones.
        temperature: of draws, above 0.
        top_p: draws are from the most probable tokens that have this probability together.
        seed: of draws; the global generator is put back.
        batch_size: prompts at a time.
        template: how a decoder's prompt is put (:data:`spafit.text_windows.Template`).
        image_processor: of a model that reads images (paths or bytes in ``prompts``) and writes texts.
        quiet: no progress on stderr.

    Returns:
        Columns ``prompt``, ``text`` (without special tokens), ``tokens`` (written, the end included) and ``ended``
        (with the token that ends a text, rather than at ``max_new_tokens``), in the order of the prompts.

    Raises:
        UsageError: options that do not go together.
        DataError: an empty prompt, or one that leaves no room in the model's window.
        ModelError: the tokenizer has no token that ends a text, or no chat template where one is asked for.
    """
    import torch

    from spafit.models import model_window
    from spafit.prefix_forward import eval_mode

    if temperature <= 0 or not 0 < top_p <= 1 or max_new_tokens < 1 or num_beams < 1 or batch_size < 1:
        raise UsageError(
            "temperature is above 0, top_p above 0 and at most 1, and the numbers of tokens, beams and prompts at a "
            f"time are at least 1; got {temperature}, {top_p}, {max_new_tokens}, {num_beams}, {batch_size}."
        )
    if not sample and (temperature != 1.0 or top_p != 1.0):
        raise UsageError("temperature and top_p are of draws. Set sample, or leave them out.")
    end = end_of_text(tokenizer)
    separate = bool(model.config.is_encoder_decoder)
    seen = image_processor
    encoded = [[0] if seen else encode_prompt(tokenizer, p, separate=separate, template=template) for p in prompts]
    if empty := [i for i, p in enumerate(prompts) if not encoded[i] or (isinstance(p, str) and not p.strip())]:
        raise DataError(f"Prompt {empty[0] + 1} is empty ({len(empty)} in all). Give at least a word to go on from.")
    room = decoder_room(model)
    if separate and room is not None and max_new_tokens > room:
        raise UsageError(f"The decoder has places for {room} tokens, and {max_new_tokens} are asked for. Write fewer.")
    window = None if seen else model_window(model, tokenizer)
    for i, ids in enumerate(encoded):
        needed = len(ids) + (0 if separate else max_new_tokens)
        if window is not None and needed > window:
            raise DataError(
                f"Prompt {i + 1} has {len(ids)} tokens, and {max_new_tokens} more do not fit into the model's window "
                f"of {window}. Shorten the prompt, or write fewer tokens."
            )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
    device = next(model.parameters()).device
    drawn: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": 0} if sample else {}
    if separate and getattr(model.config, "decoder_start_token_id", None) is not None:
        drawn["decoder_start_token_id"] = model.config.decoder_start_token_id
    order = np.argsort([len(ids) for ids in encoded], kind="stable")
    found: list[tuple[str, int, bool]] = [("", 0, False)] * len(prompts)
    devices = list(range(torch.cuda.device_count()))
    with (
        torch.random.fork_rng(devices=devices),
        eval_mode(model),
        Progress("Writing", len(prompts), quiet=quiet) as bar,
    ):
        torch.manual_seed(int(seed_sequence(seed, "generate").generate_state(1, np.uint32)[0]))
        for begin in range(0, len(order), batch_size):
            part = order[begin : begin + batch_size]
            longest = max(len(encoded[i]) for i in part)
            # A decoder goes on from the last column, so its padding is on the left; an encoder's place is the right.
            rows = [_padded(encoded[i], longest, pad, left=not separate) for i in part]
            columns = [torch.tensor(column, device=device) for column in zip(*rows, strict=True)]
            read = {"input_ids": columns[0], "attention_mask": columns[1]}
            if seen is not None:
                read = {"pixel_values": seen([prompts[i] for i in part]).to(device)}
            with torch.inference_mode():
                output = model.generate(
                    **read, max_new_tokens=max_new_tokens, num_beams=num_beams,
                    do_sample=sample, pad_token_id=pad, eos_token_id=_ends(model, end), **drawn,
                )  # fmt: skip
            written = output[:, 1:] if separate else output[:, longest:]  # after the decoder's first token
            for i, row in zip(part, written.tolist(), strict=True):
                ends = [place for place, token in enumerate(row) if token in _ends(model, end)]
                kept = row[: ends[0] + 1] if ends else row
                found[i] = (tokenizer.decode(kept, skip_special_tokens=True).strip(), len(kept), bool(ends))
            bar.advance(len(part))
    table = pd.DataFrame(found, columns=list(COLUMNS[1:]))
    table.insert(0, "prompt", [p if isinstance(p, str) else "" for p in prompts])
    return table


def decoder_room(model: Any) -> int | None:
    """Tokens that the decoder of an encoder-decoder can write; None where nothing limits it."""
    config = getattr(model.config, "decoder", None) or model.config
    positions = getattr(config, "max_position_embeddings", None)
    return None if positions is None else int(positions) - 1  # one place is the token that it starts with


def _ends(model: Any, end: int) -> list[int]:
    """Tokens at which writing stops: the tokenizer's, and those of the model's own configuration."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return sorted({end, *([] if own is None else [own] if isinstance(own, int) else own)})


def _padded(ids: list[int], longest: int, pad: int, *, left: bool) -> tuple[list[int], list[int]]:
    missing = longest - len(ids)
    if left:
        return [pad] * missing + ids, [0] * missing + [1] * len(ids)
    return ids + [pad] * missing, [1] * len(ids) + [0] * missing
