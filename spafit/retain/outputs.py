"""Remedies on the outputs: KL to the base on given texts, and replay of an earlier task's items."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from spafit.errors import DataError, ModelError, UsageError
from spafit.retain.base import PricedRemedy
from spafit.retain.items import evaluating, output_of, plain_model, step_items

if TYPE_CHECKING:
    import torch

    from spafit.adapt import StratifiedModel
    from spafit.retain.items import TextData

#: Most that :class:`KLToBase` keeps of the base's outputs.
MAX_KEPT_BYTES = 4 * 1024**3


class KLToBase(PricedRemedy):
    """weight · T² · KL(base ‖ current) of the output distribution on given texts (Li & Hoiem 2016; Hinton et al. 2015).

    The base is the plan's (:meth:`StratifiedModel.base_model`, head as at the start), or, where every parameter
    trains, the model at ``prepare``. Its logits are computed once and kept in main memory. Classes: the mean over
    items; tokens (causal or masked language models, token classes): over unpadded positions. The current model runs
    without dropout, so that the term is 0 at the start. In nats here; :meth:`bits` reports bits. A head that starts
    from random weights has no output worth keeping.

    Args:
        weight: of the term.
        data: texts; labels are not read.
        temperature: T, by which both models' logits are divided; T² keeps the gradients' size.
        batch_size: texts per step.
        seed: of the order of the texts.

    Raises:
        UsageError: a temperature not above 0, a batch size below 1; from ``prepare``, outputs too large to keep.
        ModelError: (from ``prepare``) the model's outputs are no distribution.
    """

    name = "kl"
    _shown = ("temperature", "batch_size", "seed", "data")

    def __init__(self, weight: float, *, data: TextData, temperature: float = 1.0, batch_size: int = 16, seed: int = 0):
        if not (math.isfinite(temperature) and temperature > 0):
            raise UsageError(f"kl: the temperature must be a number above 0; got {temperature!r}.")
        super().__init__(weight)
        self.data, self.temperature, self.seed = data, temperature, seed
        self.batch_size = _positive(batch_size, self.name)

    def _set_up(self, stratified: StratifiedModel, tokenizer: Any, *, max_length: int, device: str) -> None:
        model = plain_model(stratified)
        output = output_of(model)
        if output == "number":
            raise ModelError("kl compares distributions, and this model gives one number. Use l2sp, ewc or replay.")
        self._items = step_items(
            self.data,
            stratified,
            labelled=False,
            tokenizer=tokenizer,
            max_length=max_length,
            batch_size=self.batch_size,
            seed=self.seed,
            device=device,
        )
        self._token_wise = output != "classes"
        if stratified.is_adapter:
            with stratified.base_model() as base:
                self._kept = self._logits(base)
        else:
            self._kept = self._logits(model)
        self.bytes = self._items.bytes + sum(t.numel() * t.element_size() for t in self._kept)

    def _logits(self, model: Any) -> list[torch.Tensor]:
        """Logits of every item: (classes,), or (tokens, values) without padding; float32, in main memory."""
        import torch

        kept: list[torch.Tensor] = []
        with evaluating(model), torch.no_grad():
            for positions in self._items.chunks():
                inputs = self._items.batch(positions)
                logits = model(**inputs).logits.float().cpu()
                if not kept:
                    self._refuse_too_much(logits.shape[-1])
                if self._token_wise:
                    masks = inputs["attention_mask"].bool().cpu()
                    kept += [row[mask].clone() for row, mask in zip(logits, masks, strict=True)]
                else:
                    kept += list(logits)
        return kept

    def _refuse_too_much(self, wide: int) -> None:
        lengths = self._items.encoded.lengths
        rows = int(lengths.sum()) if self._token_wise else len(lengths)
        if (size := 4 * wide * rows) > MAX_KEPT_BYTES:
            raise UsageError(
                f"kl would keep {size / 1024**3:.1f} GiB of the base's outputs ({rows} × {wide} values); at most "
                f"{MAX_KEPT_BYTES / 1024**3:.1f} GiB are kept. Give fewer texts, or a lower max_length."
            )

    def _divergence(self, stratified: StratifiedModel, positions: Sequence[int], temperature: float) -> torch.Tensor:
        """KL in nats of some items: (items,), or (unpadded positions,)."""
        import torch

        inputs = self._items.batch(positions)
        with evaluating(stratified.model):
            current = stratified.model(**inputs).logits
        rows = [self._kept[p] for p in positions]
        if self._token_wise:
            current, base = current[inputs["attention_mask"].bool()], torch.cat(rows)
        else:
            base = torch.stack(rows)
        return kl_nats(base.to(current.device), current, temperature=temperature)

    def _term(self, stratified: StratifiedModel, step: int) -> torch.Tensor:
        positions = self._items.positions(step)
        return self.temperature**2 * self._divergence(stratified, positions, self.temperature).mean()

    def bits(self, stratified: StratifiedModel) -> float:
        """Mean KL(base ‖ current) over all given texts (or their tokens) in bits, at temperature 1."""
        import torch

        if not self._ready:
            raise ModelError("kl knows nothing of the base yet. Call prepare() before training.")
        with torch.no_grad():
            parts = [self._divergence(stratified, p, 1.0).double().cpu() for p in self._items.chunks()]
        return float(torch.cat(parts).mean()) / math.log(2)


class Replay(PricedRemedy):
    """weight · the supervised loss on items of an earlier task, or of running text (Robins 1995; Rolnick et al. 2019).

    The earlier task uses the same head. Causal language models predict each text's next tokens. Dropout is as in the
    task's own step.

    Args:
        weight: of the term; 1 makes a replayed batch count like the task's own.
        data: items with labels: a frame (``text``, optionally ``text2``, ``label``) or a task's training split; texts
            for a causal language model.
        batch_size: items per step.
        seed: of the order of the items.

    Raises:
        UsageError: a batch size below 1.
        DataError: (from ``prepare``) labels are missing or not the head's, or a text has no next token.
    """

    name = "replay"
    _shown = ("batch_size", "seed", "data")

    def __init__(self, weight: float, *, data: TextData, batch_size: int = 16, seed: int = 0):
        super().__init__(weight)
        self.data, self.seed, self.batch_size = data, seed, _positive(batch_size, self.name)

    def _set_up(self, stratified: StratifiedModel, tokenizer: Any, *, max_length: int, device: str) -> None:
        model = plain_model(stratified)
        output = output_of(model)
        if output in ("masked-lm", "token-classes"):
            raise ModelError(
                f"replay has no labels for {type(model).__name__}: it replays whole texts. Use kl on the same texts."
            )
        self._causal = output == "causal-lm"
        self._items = step_items(
            self.data,
            stratified,
            labelled=not self._causal,
            tokenizer=tokenizer,
            max_length=max_length,
            batch_size=self.batch_size,
            seed=self.seed,
            device=device,
        )
        if self._causal and self._items.encoded.lengths.min() < 2:
            raise DataError("replay: a text of fewer than two tokens has no next token to learn. Leave it out.")
        self.bytes = self._items.bytes

    def _term(self, stratified: StratifiedModel, step: int) -> torch.Tensor:
        inputs = self._items.batch(self._items.positions(step))
        if self._causal:
            inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        loss: torch.Tensor = stratified.model(**inputs).loss
        return loss


def kl_nats(base: torch.Tensor, current: torch.Tensor, *, temperature: float = 1.0) -> torch.Tensor:
    """KL(base ‖ current) of the softmax of logits over the last axis, in nats; shape without that axis."""
    import torch

    p = torch.log_softmax(base.float() / temperature, dim=-1)
    q = torch.log_softmax(current.float() / temperature, dim=-1)
    return (p.exp() * (p - q)).sum(-1)


def _positive(batch_size: int, name: str) -> int:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise UsageError(f"{name}: batch_size must be a whole number of at least 1; got {batch_size!r}.")
    return batch_size
