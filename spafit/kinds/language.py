"""Texts that a model learns to write: running text, and answers to prompts; decoders and encoder-decoders."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from spafit import io
from spafit.errors import DataError, ModelError, UsageError
from spafit.heads import Head, HeadedModel, language_head, load_with_head
from spafit.kinds.base import Collate, TaskKind
from spafit.models import model_window
from spafit.text_windows import IGNORED, encode_pair, encode_prompt, end_of_text, pack

if TYPE_CHECKING:
    import torch

    from spafit.batches import EncodedTexts
    from spafit.settings import TrainSettings


#: Items of a scored split for which the trained model writes an answer; `spafit generate` writes more.
WRITTEN = 100


@dataclass(frozen=True)
class _Language(TaskKind):
    """A summary is (bits, tokens predicted, tokens whose most probable one was right)."""

    keeps_head: ClassVar[bool] = True
    #: Columns of texts, none of which may be empty.
    texts: ClassVar[tuple[str, ...]] = ()

    def check(self, settings: TrainSettings) -> None:
        """No classes, no metrics of classes; every text has something in it.

        Raises:
            UsageError: settings for classes.
            DataError: an empty text.
        """
        if settings.class_weights:
            raise UsageError("class_weights are for classes, and this task writes text. Leave them off.")
        if self.data.labels is not None or self.data.metrics:
            raise UsageError("A task that writes text has no labels or metrics of classes. Leave them out.")
        for split, frame in self.data.frames.items():
            for column in self.texts:
                empty = np.flatnonzero(frame[column].astype(str).str.strip() == "")
                if len(empty):
                    raise DataError(
                        f"{self.data.name}, {split}: row {empty[0] + 1} has an empty {column} ({len(empty)} in all). "
                        "Remove such rows."
                    )

    def load(
        self, reference: str | None, *, seed: int, revision: str | None, offline: bool, allow_pickle: bool
    ) -> HeadedModel:
        """The model with its language-model head, ready to pad.

        Raises:
            ModelError: it has no language-model head, or no token for padding or for the end of a text.
        """
        headed = load_with_head(
            reference, head=self.head(reference, revision=revision, offline=offline), seed=seed, revision=revision,
            offline=offline, allow_pickle=allow_pickle,
        )  # fmt: skip
        prefix = f"{headed.model.base_model_prefix}."
        head = [n for n in headed.missing if not n.startswith(prefix) and "cross" not in n.lower()]
        if head and headed.head == "causal-lm":
            raise ModelError(
                f"{headed.name} has no language-model head ({head[0]} is missing). Give a model that was trained to "
                "write text."
            )
        return ready_to_pad(headed)

    def collator(self, headed: HeadedModel) -> Collate:
        """Padding on the right; no loss is taken of it."""
        start = None
        if headed.head != "causal-lm":
            start = int(headed.model.config.decoder_start_token_id)  # type: ignore[union-attr, arg-type]
        return PaddedText(int(headed.tokenizer.pad_token_id), start)  # type: ignore[union-attr]

    def loss(
        self, model: Any, inputs: dict[str, Any], *, weights: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean cross-entropy of the predicted tokens in nats, and the items' summaries, shape (items, 3)."""
        import torch

        labels = inputs["labels"]
        logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
        if "decoder_input_ids" not in inputs:
            logits, labels = logits[:, :-1], labels[:, 1:]
        each = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]).float(), labels.reshape(-1), ignore_index=IGNORED, reduction="none"
        ).reshape(labels.shape)
        kept = labels != IGNORED
        with torch.no_grad():
            right = (logits.argmax(-1) == labels) & kept
            summary = torch.stack([each.sum(1) / math.log(2), kept.sum(1).to(each), right.sum(1).to(each)], dim=1)
        return each.sum() / kept.sum().clamp(min=1), summary

    def units(self, batch: Mapping[str, Any]) -> int:
        """Predicted tokens."""
        shifted = batch["labels"] if "decoder_input_ids" in batch else batch["labels"][:, 1:]
        return int((shifted != IGNORED).sum())

    def score(self, summaries: np.ndarray, items: EncodedTexts) -> dict[str, float]:
        """Bits per token, perplexity, token accuracy; the headline is minus the bits per token."""
        bits, tokens, right = summaries.astype(np.float64).sum(axis=0)
        rate = bits / max(tokens, 1)
        return {
            "bits_per_token": rate, "perplexity": 2.0 ** min(rate, 1000.0), "token_accuracy": right / max(tokens, 1),
            "headline": -rate, "loss": rate * math.log(2),
        }  # fmt: skip

    def write(self, stem: Path, frame: pd.DataFrame, summaries: np.ndarray, texts: pd.DataFrame | None) -> None:
        """Bits and predicted tokens of each item, and what was written, where something was."""
        table = pd.DataFrame({"bits": summaries[:, 0], "tokens": summaries[:, 1].astype(int)})
        if len(table) == len(frame) and "idx" in frame:
            table.insert(0, "idx", frame["idx"].to_numpy())
        if texts is not None:
            table = table.join(texts)
        io.write_table(stem, table)


@dataclass(frozen=True)
class RunningText(_Language):
    """Running text in packed windows, every token of which is predicted but the first."""

    columns: ClassVar[tuple[str, ...]] = ("text",)
    texts: ClassVar[tuple[str, ...]] = columns

    def head(self, reference: str | None, *, revision: str | None, offline: bool) -> Head:
        """A causal language model.

        Raises:
            ModelError: an encoder-decoder, which reads one text and writes another.
        """
        head = language_head(reference, revision=revision, offline=offline)
        if head != "causal-lm":
            raise ModelError(
                f"{reference} is an encoder-decoder, and running text is for decoders. Give pairs of prompt and answer."
            )
        return head

    def encode(self, frame: pd.DataFrame, headed: HeadedModel, *, max_length: int) -> EncodedTexts:
        """Windows of ``max_length`` tokens over all texts, an end-of-text token after each text; nothing is cut."""
        from spafit.batches import EncodedTexts

        tokenizer = headed.tokenizer
        assert tokenizer is not None
        texts = [tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"] for t in frame["text"]]
        windows = pack(texts, max_length, end=end_of_text(tokenizer))
        items = [{"input_ids": w, "attention_mask": [1] * len(w), "labels": w} for w in windows if len(w) > 1]
        return EncodedTexts(tuple(items), None, 0, max_length)


@dataclass(frozen=True)
class Answers(_Language):
    """Answers to prompts: the loss is taken of the answer alone."""

    columns: ClassVar[tuple[str, ...]] = ("prompt", "answer")
    texts: ClassVar[tuple[str, ...]] = columns

    def head(self, reference: str | None, *, revision: str | None, offline: bool) -> Head:
        """A causal language model or an encoder-decoder, whichever the model is."""
        return language_head(reference, revision=revision, offline=offline)

    def encode(self, frame: pd.DataFrame, headed: HeadedModel, *, max_length: int) -> EncodedTexts:
        """Prompts and answers; an answer that does not fit beside its prompt is cut, and counted.

        Raises:
            DataError: a prompt that leaves no room for an answer.
        """
        from spafit.batches import EncodedTexts

        tokenizer = headed.tokenizer
        assert tokenizer is not None
        items, cut = [], 0
        for place, (prompt, answer) in enumerate(zip(frame["prompt"], frame["answer"], strict=True)):
            try:
                item, shortened = encode_pair(
                    tokenizer, str(prompt), str(answer), max_length=max_length, separate=headed.head == "seq2seq-lm"
                )
            except DataError as error:
                raise DataError(f"{self.data.name}, row {place + 1}: {error}") from error
            items.append(item)
            cut += shortened
        return EncodedTexts(tuple(items), None, cut, max_length)

    def generated(
        self, model: Any, headed: HeadedModel, frame: pd.DataFrame, settings: TrainSettings
    ) -> tuple[dict[str, float], pd.DataFrame | None]:
        """Greedy answers to :data:`WRITTEN` items drawn evenly, exact match, and ROUGE where rouge-score is installed.

        As long as the longest training answer and 8 tokens more, at most. Items whose prompt leaves no room for that in
        the model's window are passed over.
        """
        from spafit.data.sampling import stratified_subset
        from spafit.generating import decoder_room, generate
        from spafit.generation_metrics import answer_scores

        assert headed.tokenizer is not None
        longest = headed.tokenizer(self.data.frames["train"]["answer"].astype(str).tolist(), verbose=False)["input_ids"]
        most = min(settings.max_length, 8 + max(map(len, longest)))
        frame = frame.reset_index(drop=True)
        if headed.head != "causal-lm":
            most = min(most, decoder_room(headed.model) or most)
        else:
            window = model_window(headed.model, headed.tokenizer) or math.inf
            lengths = np.array([len(encode_prompt(headed.tokenizer, str(p))) for p in frame["prompt"]])
            frame = frame[lengths + most <= window]
        if not len(frame):
            return {}, pd.DataFrame(columns=["answer", "written"])
        kept = stratified_subset(frame[[*self.columns]], min(WRITTEN, len(frame)), seed=0)
        written = generate(
            model, headed.tokenizer, **self._read(headed, kept), quiet=True, max_new_tokens=most,
            batch_size=4 * settings.batch_size,
        )  # fmt: skip
        texts = pd.DataFrame({"answer": kept["answer"], "written": written["text"].to_numpy()}, index=kept.index)
        return answer_scores(list(texts["written"]), list(texts["answer"])), texts

    def _read(self, headed: HeadedModel, frame: pd.DataFrame) -> dict[str, Any]:
        """What :func:`spafit.generating.generate` reads of a frame."""
        return {"prompts": frame["prompt"].astype(str).tolist()}


@dataclass(frozen=True)
class PaddedText:
    """Pads token ids on the right, and labels with :data:`IGNORED`.

    Attributes:
        pad: id of the padding.
        start: of an encoder-decoder: id with which its decoder starts; its input is the labels, one place later.
    """

    pad: int
    start: int | None = None

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """``input_ids``, ``attention_mask``, ``labels``, ``index``, and ``decoder_input_ids`` of encoder-decoders."""
        import torch

        def padded(name: str, value: int) -> torch.Tensor:
            longest = max(len(item[name]) for item in items)
            return torch.tensor([[*item[name], *[value] * (longest - len(item[name]))] for item in items])

        batch = {}
        if "input_ids" in items[0]:  # not of images
            batch = {"input_ids": padded("input_ids", self.pad), "attention_mask": padded("attention_mask", 0)}
        batch["labels"] = padded("labels", IGNORED)
        if self.start is not None:
            shifted = batch["labels"].roll(1, dims=1)
            shifted[:, 0] = self.start
            batch["decoder_input_ids"] = shifted.masked_fill(shifted == IGNORED, self.pad)
        batch["index"] = torch.as_tensor([item["index"] for item in items])
        return batch


def ready_to_pad(headed: HeadedModel) -> HeadedModel:
    """The same model with a token for padding and, of an encoder-decoder, one with which its decoder starts; noted.

    Raises:
        ModelError: nothing can stand in for one of them.
    """
    tokenizer, config, notes = headed.tokenizer, headed.model.config, list(headed.notes)
    assert tokenizer is not None
    if tokenizer.pad_token_id is None:
        end = tokenizer.eos_token
        if end is None:
            raise ModelError(f"{headed.name}: the tokenizer has no token to pad with. Set tokenizer.pad_token.")
        tokenizer.pad_token = end
        notes.append(f"padded with {end!r}, since the tokenizer has no token for that; no loss is taken of padding")
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id  # type: ignore[union-attr]
    if headed.head != "causal-lm" and getattr(config, "decoder_start_token_id", None) is None:
        start = next((i for i in (tokenizer.bos_token_id, tokenizer.cls_token_id) if i is not None), None)
        if start is None:
            raise ModelError(
                f"{headed.name}: nothing says with which token its decoder starts. Set decoder_start_token_id."
            )
        config.decoder_start_token_id = start  # type: ignore[union-attr]
        notes.append(f"the decoder starts with {tokenizer.convert_ids_to_tokens(start)!r}")
    return replace(headed, notes=tuple(notes))
