"""Texts as token ids for models that write: prompts, answers of which the loss is taken, and packed windows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

from spafit.errors import DataError, ModelError, check_choice

#: A label that no loss is taken of.
IGNORED = -100

#: How a decoder's prompt is put: ``chat`` by the tokenizer's chat template, ``plain`` with a line break after it,
#: ``continue`` as it stands, so that the text goes on from it; ``auto`` is chat where there is a template, else plain.
Template = Literal["auto", "chat", "plain", "continue"]


def end_of_text(tokenizer: Any) -> int:
    """Id of the token that ends a text.

    Raises:
        ModelError: the tokenizer has none.
    """
    for name in ("eos_token_id", "sep_token_id"):
        found = getattr(tokenizer, name, None)
        if found is not None:
            return int(found)
    raise ModelError(
        "The tokenizer has no token for the end of a text, so a model could never stop. Set tokenizer.eos_token."
    )


def encode_prompt(tokenizer: Any, prompt: str, *, separate: bool = False, template: Template = "auto") -> list[int]:
    """Ids after which the answer begins.

    With a chat template: the template's user turn and the start of its answer. Otherwise: what the tokenizer puts
    before a text, the prompt and, unless the text goes on from it, a line break.

    Args:
        tokenizer: of the model.
        prompt: what is read.
        separate: an encoder reads it: the tokenizer's usual encoding, whatever the template.
        template: see :data:`Template`.

    Raises:
        ModelError: ``chat``, and the tokenizer has no chat template.
        UsageError: no such template.
    """
    check_choice("template", template, get_args(Template))
    if separate:
        return list(tokenizer(prompt, verbose=False)["input_ids"])
    if _is_chat(tokenizer, template):
        messages = [{"role": "user", "content": prompt}]
        return _ids(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True))
    empty = list(tokenizer("")["input_ids"])
    begin = [empty[0]] if empty and empty[0] == tokenizer.bos_token_id else []
    text = prompt if template == "continue" else f"{prompt}\n"
    return [*begin, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]


def encode_pair(
    tokenizer: Any,
    prompt: str,
    answer: str,
    *,
    max_length: int,
    separate: bool = False,
    template: Template = "auto",
) -> tuple[dict[str, list[int]], bool]:
    """One item to train on: the loss is taken of the answer and of the token that ends it.

    Args:
        tokenizer: with a token that ends a text.
        prompt: what is read.
        answer: what is to be written.
        max_length: tokens kept: of prompt and answer together, or of each where they are ``separate``.
        separate: an encoder reads the prompt, a decoder writes the answer.
        template: how a decoder's prompt is put.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels`` (:data:`IGNORED` at the prompt; of the decoder where separate),
        and whether the answer (or a separate prompt) was cut.

    Raises:
        DataError: the prompt leaves no room for an answer.
        ModelError: no token ends a text, or there is no chat template where one is asked for.
    """
    end = end_of_text(tokenizer)
    read = encode_prompt(tokenizer, prompt, separate=separate, template=template)
    if separate:
        written = [*tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"], end]
        cut = len(read) > max_length or len(written) > max_length
        if len(read) > max_length:
            read = list(tokenizer(prompt, truncation=True, max_length=max_length)["input_ids"])
        return {"input_ids": read, "attention_mask": [1] * len(read), "labels": written[:max_length]}, cut
    written = _answer(tokenizer, prompt, answer, read, end, chat=_is_chat(tokenizer, template))
    if len(read) >= max_length:
        raise DataError(
            f"the prompt has {len(read)} tokens, and {max_length} are kept of prompt and answer together. Raise "
            "max_length, or shorten the prompt."
        )
    ids = [*read, *written][:max_length]
    labels = [*[IGNORED] * len(read), *ids[len(read) :]]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}, len(read) + len(written) > max_length


def pack(texts: Iterable[Sequence[int]], window: int, *, end: int) -> list[list[int]]:
    """All tokens of all texts, an ``end`` after each, cut into windows; the last one may be shorter."""
    stream = [token for text in texts for token in (*text, end)]
    return [stream[i : i + window] for i in range(0, len(stream), window)]


def _is_chat(tokenizer: Any, template: Template) -> bool:
    if template == "chat" and not tokenizer.chat_template:
        raise ModelError("The tokenizer has no chat template. Use the template 'plain', or set its chat_template.")
    return bool(tokenizer.chat_template) and template in ("auto", "chat")


def _answer(tokenizer: Any, prompt: str, answer: str, read: Sequence[int], end: int, *, chat: bool) -> list[int]:
    """Ids of the answer; the last one ends the text."""
    if chat:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        whole = _ids(tokenizer.apply_chat_template(messages, tokenize=True))
        if whole[: len(read)] == list(read):  # with whatever ends a turn
            written = whole[len(read) :]
            if end not in written:
                return [*written, end]
            return written[: len(written) - written[::-1].index(end)]  # nothing is written after the end
    return [*tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"], end]


def _ids(encoded: Any) -> list[int]:
    """Transformers 5 gives a mapping, 4 the ids."""
    found = encoded["input_ids"] if hasattr(encoded, "keys") else encoded
    return list(found)
