"""Train one plan on one task with one seed, on transformers' Trainer, so that exactly the plan's parameters move."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from spafit import checkpoint, io
from spafit.adapt import StratifiedModel, canonical_name, canonical_parameters
from spafit.batches import Collator, EncodedTexts, EpochOrder
from spafit.errors import ModelError, NumericalError, OutputError, UsageError
from spafit.hub import quiet
from spafit.kinds.base import Collate
from spafit.kinds.classification import classification_loss
from spafit.monitor import SELECTION, STATE_FILE, exhausted
from spafit.prefix import PrefixCache
from spafit.resolve import whole_modules
from spafit.retain import PricedRemedy
from spafit.settings import TrainSettings
from spafit.strata import StrataConfig

#: torch reports a file that cannot be written as a RuntimeError of its archive writer.
_ARCHIVE_ERRORS = ("PytorchStreamWriter", "inline_container", "iostream")

Metrics = Callable[[np.ndarray, np.ndarray], dict[str, float]]
#: Model and batch (and weights of classes) to the mean loss and each item's summary; see :mod:`spafit.kinds`.
Loss = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class _RankAllocation(TrainerCallback):
    """AdaLoRA moves ranks between matrices after each step; other methods have nothing of the kind."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        tuner = getattr(kwargs["model"], "base_model", None)
        if tuner is not None and hasattr(tuner, "update_and_allocate"):
            tuner.update_and_allocate(state.global_step + 1)


class _NewOrder(TrainerCallback):
    """Tells the order of the items which epoch begins; a loader that skips the start of an epoch would not."""

    def __init__(self, trainer: StratifiedTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.order.epoch = int(state.epoch or 0)


class StratifiedTrainer(Trainer):
    """Transformers' Trainer with the plan's mask, rates, checkpoints and losses.

    What differs: parameter groups follow the plan's parts; the frozen prefix runs without dropout, or is read from
    a cache; remedies add to the loss; the loss of a step is the mean over its items, however they are spread over
    micro-batches, and weights of classes leave it one; the order of the items depends on seed and epoch alone; a
    loss that is not finite stops the run; checkpoints hold what trained, and never weights that are not finite.
    """

    def __init__(
        self,
        stratified: StratifiedModel,
        settings: TrainSettings,
        arguments: TrainingArguments,
        *,
        train: EncodedTexts,
        tokenizer: Any,
        select: EncodedTexts | None = None,
        metrics: Metrics | None = None,
        collate: Collate | None = None,
        loss: Loss | None = None,
        units: Callable[[Mapping[str, Any]], int] = lambda batch: len(batch["index"]),
        cache: PrefixCache | None = None,
        remedies: Sequence[PricedRemedy] = (),
        weights: torch.Tensor | None = None,
        base: Mapping[str, Any] | None = None,
        rated: Mapping[str, str] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        self.stratified, self.settings, self.base = stratified, settings, dict(base or {})
        self.cache, self.remedies, self.class_weights = cache, tuple(remedies), weights
        self.loss_of, self.units = loss or classification_loss, units
        self.rated = dict(rated or {})  # canonical name -> what gets a learning rate of its own
        self.tokenizer_to_save, self.folder = tokenizer, Path(str(arguments.output_dir))
        self.remedy_losses: dict[str, list[torch.Tensor]] = {}
        total = settings.batch_size * settings.accumulate * arguments.world_size
        self.order = EpochOrder(train.lengths, batch_size=total, seed=arguments.seed, grouped=settings.group_by_length)
        super().__init__(
            model=stratified.model,
            args=arguments,
            data_collator=collate or Collator(tokenizer),
            train_dataset=train,
            eval_dataset=select if select is not None and len(select) else None,
            compute_metrics=None
            if metrics is None
            else lambda p: metrics(np.asarray(p.predictions), np.asarray(p.label_ids)),
            callbacks=list(callbacks),
        )
        self.add_callback(_NewOrder(self))
        self.add_callback(_RankAllocation())
        self.remove_callback(PrinterCallback)  # it writes to stdout, which is for results
        self.model_accepts_loss_kwargs = False
        self._units_per_batch = 0.0  # the mean over the micro-batches of the step
        if self.is_fsdp_enabled and self.remedies:
            raise UsageError(
                f"{self.remedies[0].name} compares whole parameters with the start, and FSDP gives each process a "
                "share of them. Use several processes without FSDP (DDP), or leave the remedy off."
            )
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise UsageError(
                "FSDP's first version flattens parameters, so that trained and frozen ones cannot be told apart. Set "
                "fsdp_version: 2 in accelerate's configuration."
            )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW with one group per rate and decay.

        Biases and norms have no decay, unless a part that trains nothing else states one of its own.
        """
        if self.optimizer is None:
            self.stratified.check()
            settings = self.settings
            assert settings.learning_rate is not None
            groups: dict[tuple[float, float, str], list[Any]] = {}
            parts = {p.name: p for p in self.stratified.plan.parts}
            decayed = set(map(canonical_name, self.get_decay_parameter_names(self.stratified.model)))
            for canonical, parameter in canonical_parameters(model or self.stratified.model).items():
                if canonical not in self.stratified.trainable:
                    continue
                part = parts[self.stratified.part_of[canonical]]
                rate = settings.learning_rate if part.learning_rate is None else part.learning_rate
                decay = settings.weight_decay if part.weight_decay is None else part.weight_decay
                stated = part.weight_decay is not None and part.method in ("bitfit", "bias-added", "norm")
                decay = decay if stated or canonical in decayed else 0.0
                groups.setdefault((rate, decay, self.rated.get(canonical, "")), []).append(parameter)
            self.optimizer = torch.optim.AdamW(
                [{"params": p, "lr": lr, "weight_decay": wd} for (lr, wd, _), p in groups.items()],
                lr=settings.learning_rate,
            )
        return self.optimizer

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The task's loss, plus what the remedies add while training."""
        inputs = dict(inputs)
        index = inputs.pop("index", None)
        training = model.training
        if training and not self.settings.prefix_dropout:
            set_training_modes(self.stratified)
        served: AbstractContextManager[None] = nullcontext()
        if training and self.cache is not None and index is not None:
            served = self.cache.attached(index, inputs.get("attention_mask"))
        with served:
            loss, summary = self.loss_of(model, inputs, weights=self.class_weights)
        if training:
            if index is not None and self._units_per_batch:
                # The Trainer averages over micro-batches; an epoch's last one is shorter, and its items weigh no more.
                loss = loss * (self.units({**inputs, "index": index}) / self._units_per_batch)
            for remedy in self.remedies:
                extra = remedy.loss(self.stratified, self.state.global_step)
                self.remedy_losses.setdefault(remedy.name, []).append(extra.detach())
                loss = loss + extra
            if not torch.isfinite(loss.detach()):
                step = self.state.global_step + 1
                raise self._diverged(f"The loss is not finite ({float(loss.detach())}) at step {step}")
        return (loss, {"loss": loss, "logits": summary}) if return_outputs else loss

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The micro-batches of one step; the mean number of items (or tokens) among them is noted for the loss."""
        batches, counted = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._units_per_batch = float(np.mean([self.units(b) for b in batches])) if batches else 0.0
        return batches, counted

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean of each remedy's term since the last row to a row of training loss."""
        if "loss" in logs:
            logs |= {name: float(torch.stack(terms).mean()) for name, terms in self.remedy_losses.items()}
            self.remedy_losses.clear()
        super().log(logs, start_time)

    def restore(self, folder: Path) -> None:
        """Take over what a checkpoint at the end of training holds, its best weights and log, without a step."""
        self.state = self._found_state(TrainerState.load_from_json(str(folder / STATE_FILE)))
        load_weights(self.stratified, Path(self.state.best_model_checkpoint or folder))

    def _diverged(self, what: str) -> NumericalError:
        last = last_checkpoint(self.folder)
        kept = "There was no checkpoint yet." if last is None else f"The last good checkpoint is kept: {last}."
        return NumericalError(
            f"{what} of {self.state.max_steps}. {kept} Lower the learning rate, or train in float32, and start over "
            "with another output folder."
        )

    def _found_state(self, state: TrainerState) -> TrainerState:
        """A checkpoint's state with the best checkpoint where it lies now: the folder may have moved."""
        best = self.folder / f"checkpoint-{state.best_global_step}"
        state.best_model_checkpoint = str(best) if best.is_dir() else None
        return state

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        found = super()._init_training_state(*args, **kwargs)
        self._found_state(self.state)
        return found

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.order

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return np.argsort(eval_dataset.lengths, kind="stable").tolist()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        for name, parameter in canonical_parameters(self.stratified.model).items():
            if name in self.stratified.trainable and not torch.isfinite(parameter.detach()).all():
                raise self._diverged(f"The weights ({name}) are not finite after step {self.state.global_step}")
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not any(w in str(error) for w in _ARCHIVE_ERRORS):
                raise
            half = self.folder / f"checkpoint-{self.state.global_step}"
            shutil.rmtree(half, ignore_errors=True)
            raise OutputError(
                f"The checkpoint {half} cannot be written ({str(error).splitlines()[0]}). Free space; the same command "
                "then goes on from the checkpoint before."
            ) from error

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save what trains; every process takes part, since it may hold a share of it, and one writes."""
        folder = Path(output_dir or self.folder)
        checkpoint.save(self.stratified, folder, base=self.base, write=self.args.should_save)
        if self.args.should_save:
            self.tokenizer_to_save.save_pretrained(str(folder))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_weights(self.stratified, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        load_weights(self.stratified, Path(self.state.best_model_checkpoint))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole (its trainer state is written last), or None."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]), reverse=True):
        try:
            io.read_json(path / STATE_FILE)
        except (OSError, ValueError):  # its writing, or its removal, was interrupted
            continue
        if (path / checkpoint.CONFIG_FILE).is_file():
            return path
    return None


def is_finished(folder: Path, patience: int) -> bool:
    """Whether nothing is left to train after a checkpoint: all steps are done, or early stopping has ended them."""
    state = io.read_json(folder / STATE_FILE)
    return state["global_step"] >= state["max_steps"] or exhausted(state["log_history"], patience)


def load_weights(stratified: StratifiedModel, folder: Path) -> None:
    """Put the weights of a checkpoint into a wrapped model, exactly.

    Raises:
        ModelError: the checkpoint belongs to another plan, or is not whole.
    """
    from safetensors.torch import load_file

    content = checkpoint.read_config(folder)
    if content.get("holds") is not None and stratified.moment.bare is not None:
        stratified.hold(StrataConfig.from_dict(content["holds"]))
    if content["trainable"] != dict(stratified.trainable):
        raise ModelError(
            f"The checkpoint {folder.name} was written by another plan ({len(content['trainable'])} tensors train "
            f"there, {len(stratified.trainable)} here). Resume with the plan that it was started with, or choose "
            "another --out."
        )
    if stratified.is_adapter:
        checkpoint.load_state(stratified, load_file(str(folder / checkpoint.WEIGHTS_FILE)))
        return
    state: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        state |= load_file(str(file))
    model = stratified.model
    own = model.state_dict()
    if set(state) - set(own):  # transformers saves some models under names of older versions
        with quiet():
            state = type(model).from_pretrained(str(folder), local_files_only=True, dtype=model.dtype).state_dict()
    state = {n: checkpoint.sharded_like(t, own[n]) if n in own else t for n, t in state.items()}
    result = model.load_state_dict(state, strict=False)
    untied = set(result.missing_keys) - set(stratified.plan.tied)
    if untied or result.unexpected_keys:
        raise ModelError(f"The checkpoint {folder.name} does not fit the model ({sorted(untied)[:3]}).")


def set_training_modes(stratified: StratifiedModel) -> None:
    """Leave in training mode only what gradients pass through: no dropout in the embeddings and the frozen prefix.

    Dropout that belongs to no parameter, such as GPT-2's after its embeddings, is off with them.
    """
    base = stratified.model.get_base_model() if stratified.is_adapter else stratified.model
    plan = stratified.moment.plan or stratified.plan
    if any(p.name == "embeddings" and p.method != "freeze" for p in plan.parts):
        return
    backbone = getattr(base, "base_model", base)
    backbone.eval()
    active = [p for s in plan.stacks for p in s.block_paths[plan.first_trained_block(s.name) :]]
    active += [s.final_norm for s in plan.stacks if s.final_norm is not None]
    active += [m for part in plan.parts if part.name in ("pooler", "head") for m in whole_modules(base, part.own)]
    for path in active:
        base.get_submodule(path).train()


def training_arguments(
    settings: TrainSettings,
    folder: Path,
    *,
    seed: int,
    device: str,
    select: bool,
) -> TrainingArguments:
    """Translate :class:`TrainSettings` for transformers.

    Args:
        settings: with a learning rate.
        folder: where checkpoints go.
        seed: of order and dropout.
        device: torch device of this process.
        select: whether there are held-out items to evaluate and select on.
    """
    assert settings.learning_rate is not None
    saves = "steps" if settings.save_steps else "epoch"
    precision = settings.precision
    if precision == "auto":
        precision = "bfloat16" if device.startswith("cuda") and torch.cuda.is_bf16_supported() else "float32"
    arguments = TrainingArguments(
        output_dir=str(folder.absolute()),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=4 * settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        warmup_steps=settings.warmup,
        lr_scheduler_type=settings.schedule,
        bf16=precision == "bfloat16",
        use_cpu=device == "cpu",
        seed=seed,
        data_seed=seed,
        eval_strategy=saves if select else "no",
        eval_steps=settings.save_steps,
        save_strategy=saves,
        save_steps=settings.save_steps or 500,
        save_total_limit=2,
        load_best_model_at_end=select,
        metric_for_best_model=SELECTION if select else None,
        greater_is_better=True if select else None,
        logging_strategy="steps",
        logging_steps=settings.log_steps,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        label_names=["index"],  # an evaluation is told which items it has seen, and gathers nothing else
        dataloader_num_workers=settings.workers,
        dataloader_pin_memory=device.startswith("cuda"),
        report_to=list(settings.track) or "none",
        disable_tqdm=True,
        log_level="error",
        ddp_find_unused_parameters=False,
    )
    if arguments.n_gpu > 1:  # several GPUs are used by several processes, never by replicas inside one
        arguments._n_gpu = 1
    return arguments
