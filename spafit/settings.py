"""How a plan is trained: every number that an optimiser, a schedule or a loop needs, with defaults per method."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from spafit.errors import UsageError

if TYPE_CHECKING:
    from spafit.strata import StrataConfig

Precision = Literal["float32", "bfloat16", "auto"]
PrefixCache = Literal["auto", "on", "off"]
TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow")


@dataclass(frozen=True)
class TrainSettings:
    """Settings of one training run; the same for every seed.

    Attributes:
        epochs: passes over the training items.
        batch_size: items per step and process.
        accumulate: steps whose gradients are added up before the optimiser moves.
        learning_rate: peak rate of parts without one of their own; None takes the method's default.
        weight_decay: AdamW's decay of parts without one of their own; biases and norms have none.
        warmup: share of the steps with a rising rate.
        schedule: rate after the warm-up.
        max_length: tokens kept of each item; longer ones are cut, counted and reported.
        group_by_length: draw batches of similar length, in an order of the seed's, so that little is padded; False
            draws them at random.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them.
        max_train: training items used, the held-out share included, stratified by label; None uses all.
        select_share: share of the training items that is held out to choose the best checkpoint and to stop early, so
            that the reported split is never selected on; 0 reports the last checkpoint.
        patience: stop after so many evaluations without a better score on the held-out share; 0 never stops early.
        class_weights: weigh classes by inverse frequency in the loss.
        precision: of training; ``auto`` is bfloat16 where the device computes in it natively (CUDA), else float32.
        prefix_cache: keep the outputs of the frozen blocks below the first trained one; ``auto`` when it pays.
        prefix_dropout: leave dropout on in the frozen prefix and the embeddings; the cache needs it off.
        checkpoint_activations: recompute the activations of trained blocks in the backward pass to save memory.
        save_steps: a checkpoint every so many steps; None: after each epoch.
        interpolate: shares of the way from the start (0) to the trained weights (1) that are scored after training, the
            head as trained; see :mod:`spafit.retain.interpolation`.
        log_steps: a row of training loss every so many steps.
        workers: processes that prepare batches.
        track: experiment trackers that the Trainer reports to, of :data:`TRACKERS`.
    """

    epochs: float = 3.0
    batch_size: int = 16
    accumulate: int = 1
    learning_rate: float | None = None
    weight_decay: float = 0.01
    warmup: float = 0.06
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    max_length: int = 128
    group_by_length: bool = True
    max_grad_norm: float = 1.0
    max_train: int | None = None
    select_share: float = 0.1
    patience: int = 0
    class_weights: bool = False
    precision: Precision = "auto"
    prefix_cache: PrefixCache = "auto"
    prefix_dropout: bool = False
    checkpoint_activations: bool = False
    save_steps: int | None = None
    interpolate: tuple[float, ...] = ()
    log_steps: int = 10
    workers: int = 0
    track: tuple[str, ...] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        """Check the values."""
        for name, low in (("epochs", 0.0), ("batch_size", 1), ("accumulate", 1), ("max_length", 2), ("log_steps", 1)):
            value = getattr(self, name)
            if not math.isfinite(value) or value < low or (name == "epochs" and value == 0):
                raise UsageError(f"{name} must be {'above 0' if name == 'epochs' else f'at least {low}'}; got {value}.")
        for name in ("learning_rate", "max_train", "save_steps"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UsageError(f"{name} must be above 0; got {value}. Leave it out for the default.")
        for name in ("weight_decay", "max_grad_norm", "patience", "workers"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise UsageError(f"{name} must not be negative; got {getattr(self, name)}.")
        if not 0 <= self.warmup < 1 or not 0 <= self.select_share < 1:
            raise UsageError(
                f"warmup and select_share are shares, at least 0 and below 1; got {self.warmup}, {self.select_share}."
            )
        if any(isinstance(s, bool) or not 0 <= s <= 1 for s in self.interpolate):
            got = ", ".join(map(str, self.interpolate))
            raise UsageError(f"interpolate holds shares between 0 (start) and 1 (trained); got {got}.")
        if self.patience and not self.select_share:
            raise UsageError(
                "patience needs items to watch: set select_share above 0 (stopping early on the reported split would "
                "select on what is reported)."
            )
        if self.prefix_cache == "on" and self.prefix_dropout:
            raise UsageError(
                "The prefix cache holds what the frozen blocks give without dropout; set prefix_dropout off, or the "
                "cache off."
            )
        unknown = [t for t in self.track if t not in TRACKERS]
        if unknown:
            raise UsageError(f"track {unknown[0]!r} is not known. Trackers: {', '.join(TRACKERS)}.")

    def check_trackers(self) -> None:
        """See that what the run reports to is installed.

        Raises:
            UsageError: a tracker's package is missing.
        """
        for tracker in self.track:
            if find_spec(tracker) is None:
                raise UsageError(f"track {tracker} needs a package that is not installed: pip install {tracker}.")

    def for_plan(self, config: StrataConfig) -> TrainSettings:
        """The same settings with the learning rate filled in from the plan's method, where none was given."""
        return self if self.learning_rate is not None else replace(self, learning_rate=default_learning_rate(config))

    def to_dict(self) -> dict[str, Any]:
        """Plain objects for run.json."""
        return asdict(self)


def default_learning_rate(config: StrataConfig) -> float:
    """A usual peak rate for the plan's most sensitive method; a starting point, not a result.

    Fully trained blocks 2e-5 (BERT's own recommendation), biases, norms and heads alone 1e-3 (the reference setting of
    BitFit's code), low-rank and other adapters, alone or beside biases, 5e-4.
    """
    methods = {p.method for s in config.strata for p in s.pieces} - {"freeze"}
    if "full" in methods or config.outside.embeddings == "full":
        return 2e-5
    if methods <= {"bitfit", "bias-added", "norm"}:
        return 1e-3
    return 5e-4
