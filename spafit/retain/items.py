"""The items that remedies work on: tokenised, labelled as the model's head counts, chosen by step number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from spafit import io
from spafit.errors import DataError, ModelError, did_you_mean
from spafit.runtime import generator

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from spafit.adapt import StratifiedModel
    from spafit.batches import EncodedTexts
    from spafit.data.training import TrainData

    TextData = Sequence[str] | pd.DataFrame | TrainData

Output = Literal["classes", "number", "token-classes", "masked-lm", "causal-lm"]


# ---------------------------------------------------------------- model


def plain_model(stratified: StratifiedModel) -> Any:
    """The transformers model inside the wrapper, on which the adapter still works."""
    return stratified.model.get_base_model() if stratified.is_adapter else stratified.model


def output_of(model: Any) -> Output:
    """What a model's logits are.

    Raises:
        ModelError: the model has no head whose outputs are classes, numbers or next tokens of one text.
    """
    kind = type(model).__name__
    if kind.endswith("ForSequenceClassification"):
        if model.config.problem_type == "multi_label_classification":
            raise ModelError(f"{kind} gives several labels an item; remedies on texts know one class or number each.")
        return "number" if model.config.num_labels == 1 else "classes"
    if kind.endswith("ForTokenClassification"):
        return "token-classes"
    if kind.endswith("ForMaskedLM"):
        return "masked-lm"
    if kind.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal-lm"
    raise ModelError(
        f"{kind} gives no classes, number or next tokens for one text, which this remedy compares. Use l2sp, or a "
        "model with a head for sequence or token classification or causal language modelling."
    )


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Run without dropout inside the block; every module's mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


# ---------------------------------------------------------------- items


@dataclass(frozen=True)
class StepItems:
    """Items of which every training step gets a batch that depends on the step's number and the seed alone.

    Items come in a new order in every pass, each exactly once a pass, so that a resumed run sees what an
    uninterrupted one would.

    Attributes:
        encoded: the items.
        tokenizer: pads them.
        batch_size: items per step, at most all of them.
        seed: of the orders.
        device: where batches go.
    """

    encoded: EncodedTexts
    tokenizer: Any
    batch_size: int
    seed: int
    device: str

    @property
    def bytes(self) -> int:
        """Size of the token ids and masks, at 8 bytes each."""
        return sum(8 * len(values) for item in self.encoded.items for values in item.values())

    def positions(self, step: int) -> list[int]:
        """Which items belong to a step, from 0."""
        count = len(self.encoded)
        size = min(self.batch_size, count)
        drawn = range(step * size, (step + 1) * size)
        orders = {p: generator(self.seed, "remedy", p).permutation(count) for p in {k // count for k in drawn}}
        return [int(orders[k // count][k % count]) for k in drawn]

    def batch(self, positions: Sequence[int]) -> dict[str, torch.Tensor]:
        """Padded tensors of some items, on the device; with ``labels`` where the items have them."""
        from spafit.batches import Collator

        tensors = Collator(self.tokenizer)([self.encoded[p] for p in positions])
        tensors.pop("index")
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}

    def chunks(self) -> Iterator[list[int]]:
        """All positions in their own order, a batch at a time."""
        for start in range(0, len(self.encoded), self.batch_size):
            yield list(range(start, min(start + self.batch_size, len(self.encoded))))


def step_items(
    data: TextData,
    stratified: StratifiedModel,
    *,
    labelled: bool,
    tokenizer: Any,
    max_length: int,
    batch_size: int,
    seed: int,
    device: str,
) -> StepItems:
    """Tokenise what a remedy was given.

    Args:
        data: texts, a frame with the columns ``text``, optionally ``text2`` and ``label``, or a task's training split.
        stratified: the model; its configuration gives the codes of labels that are names.
        labelled: whether labels are needed and kept.
        tokenizer: the model's.
        max_length: tokens kept of each item.
        batch_size: items per step.
        seed: of the orders.
        device: where batches go.

    Raises:
        DataError: no items, no column ``text``, or labels that are not the head's.
        ModelError: the model has no tokenizer.
    """
    import pandas as pd

    from spafit.batches import encode
    from spafit.data.training import TrainData

    if tokenizer is None:
        raise ModelError("This remedy works on texts, and the model has no tokenizer. Use l2sp.")
    classes = None
    if isinstance(data, TrainData):
        frame, classes = data.frames["train"], data.labels
    else:
        frame = data if isinstance(data, pd.DataFrame) else pd.DataFrame({"text": list(data)})
    if "text" not in frame:
        raise DataError(f"A remedy's data need a column 'text'; got {', '.join(map(str, frame.columns))}.")
    if not len(frame):
        raise DataError("A remedy was given no items. Give at least one text.")
    columns = [c for c in ("text", "text2") if c in frame]
    frame = frame[[*columns, *(["label"] if "label" in frame else [])]].reset_index(drop=True)
    model = plain_model(stratified)
    labels = label_codes(frame, classes, model) if labelled else None
    frame = frame[columns].assign(label=np.nan if labels is None else labels)
    encoded = encode(frame, tokenizer, max_length=max_length, regression=output_of(model) == "number")
    return StepItems(encoded, tokenizer, batch_size, seed, device)


def data_digest(data: TextData) -> str:
    """SHA-256 over the texts and labels that a remedy was given."""
    import pandas as pd

    from spafit.data.training import TrainData

    if isinstance(data, TrainData):
        return data.digest
    if not isinstance(data, pd.DataFrame):
        return io.content_digest(["texts", *data])
    columns = [c for c in ("text", "text2", "label") if c in data]
    return io.content_digest(["table", *columns, *(value for c in columns for value in data[c])])


def label_codes(frame: pd.DataFrame, classes: Sequence[str] | None, model: Any) -> np.ndarray:
    """Labels as the model's head counts them: codes, or values for a head with one number.

    Names are looked up in the head's own; whole numbers that are no names there are codes.

    Args:
        frame: with a column ``label``.
        classes: names of the codes in the frame, where it holds codes of a named task.
        model: its configuration names the head's classes.

    Raises:
        DataError: labels are missing, no numbers for a regression, or not classes of the head.
    """
    import pandas as pd

    if "label" not in frame or frame["label"].isna().any():
        raise DataError("This remedy needs a label for every item. Add the column 'label', or use kl or labels=model.")
    given = frame["label"]
    if output_of(model) == "number":
        values = pd.to_numeric(given, errors="coerce")
        if values.isna().any():
            raise DataError(f"Label {given[values.isna()].iloc[0]!r} is not a number, which the model's head gives.")
        return values.to_numpy(dtype=np.float32)
    codes = {str(name): int(code) for name, code in (model.config.label2id or {}).items()}
    unnamed = set(codes) == {f"LABEL_{i}" for i in range(len(codes))}
    if classes is not None and not unnamed:
        given = given.astype(int).map(dict(enumerate(classes)))
    found = []
    for label in given:
        name = str(label)
        code = codes.get(name)
        if code is None and name.removesuffix(".0").isdecimal() and (unnamed or classes is None):
            code = int(name.removesuffix(".0"))
        if code is None or code >= model.config.num_labels:
            raise DataError(
                f"Label {name!r} is not a class of the model's head. Classes: {', '.join(list(codes)[:20])}."
                f"{did_you_mean(name, codes)}"
            )
        found.append(code)
    return np.array(found, dtype=np.int64)
