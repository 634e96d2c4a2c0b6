"""The parts of a plan: one stratum and its options, and what trains outside the blocks. Checked when made; no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from spafit.fields import FieldError, FieldPath, choice, integer, name_list, number, plain, text

METHODS = (
    "freeze",
    "bitfit",
    "bias-added",
    "norm",
    "lora",
    "lora+bitfit",
    "lora+bias-added",
    "lora+norm",
    "ia3",
    "dora",
    "full",
)
#: Methods of PEFT that put tensors of their own on each target module, by PEFT's names in lower case. Not listed are
#: those whose tensors several modules share (VB-LoRA, Uni-LoRA, TinyLoRA), since no stratum would own them.
PEFT_METHODS = (
    "adalora",
    "boft",
    "c3a",
    "delora",
    "fourierft",
    "gralora",
    "hira",
    "hra",
    "loha",
    "lokr",
    "miss",
    "oft",
    "randlora",
    "road",
    "shira",
    "vera",
    "waveft",
)
OUTSIDE_METHODS = ("freeze", "bitfit", "norm", "full")
#: The places outside the blocks.
PLACES = ("embeddings", "pooler", "head", "final_norm", "projector")
#: Roles that are linear maps: what LoRA, DoRA, IA3 and PEFT's other methods can target.
LINEAR_ROLES = (
    "query",
    "key",
    "value",
    "attention_output",
    "intermediate",
    "output",
    "cross_query",
    "cross_key",
    "cross_value",
    "cross_attention_output",
)
NORM_ROLES = ("attention_norm", "output_norm", "cross_attention_norm")
#: What cross-attention may have as a method of its own (:class:`CrossOptions`).
CROSS_METHODS = ("freeze", "bitfit", "norm", "lora", "lora+bitfit", "lora+norm", "full")
CROSS_TARGETS = ("cross_query", "cross_key", "cross_value")
ROLES = LINEAR_ROLES + NORM_ROLES
#: Fields of PEFT's configurations that the plan itself decides.
_DECIDED_BY_THE_PLAN = (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "bias",
    "fan_in_fan_out",
    "task_type",
    "peft_type",
    "peft_version",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
)


@dataclass(frozen=True)
class LoraOptions:
    """Options of the low-rank methods (``lora``, ``lora+…``, ``dora``).

    The SPAFIT paper's rank is 64; its alpha and dropout are not known: alpha = rank and no dropout are this
    project's defaults. Rank, alpha and targets may differ from stratum to stratum; dropout and rsLoRA hold for the
    whole plan, since a PEFT adapter has one of each.

    Attributes:
        rank: rank of each update, at least 1.
        alpha: numerator of the update's scale; None takes the rank.
        dropout: dropout on the update's input, in [0, 1).
        targets: roles of the linear maps that get an update.
        rslora: scale by alpha / √rank (Kalajdzievski 2023) rather than alpha / rank.
    """

    rank: int = 64
    alpha: float | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] = ("query", "key", "value")
    rslora: bool = False

    def __post_init__(self) -> None:
        integer(self.rank, ("rank",), minimum=1)
        object.__setattr__(self, "alpha", number(self.rank if self.alpha is None else self.alpha, ("alpha",)))
        if self.alpha is None or self.alpha <= 0:
            raise FieldError(("alpha",), f"got {self.alpha}; alpha must be above 0. Equal to the rank is our default.")
        object.__setattr__(self, "dropout", float(number(self.dropout, ("dropout",))))
        if not 0 <= self.dropout < 1:
            raise FieldError(("dropout",), f"got {self.dropout}; allowed: at least 0 and below 1.")
        object.__setattr__(self, "targets", name_list(self.targets, ("targets",), LINEAR_ROLES, "role of a linear map"))
        if not isinstance(self.rslora, bool):
            raise FieldError(("rslora",), f"got {self.rslora!r}; write true or false.")


@dataclass(frozen=True)
class PeftOptions:
    """Options of the methods in :data:`PEFT_METHODS`.

    Attributes:
        targets: roles of the linear maps that get the method's tensors; may differ from stratum to stratum.
        options: fields of PEFT's own configuration class and their values (JSON-like), such as ``{r: 8}``. They hold
            for the whole plan. Their names and values are checked when the plan is applied, since PEFT is not loaded
            here; what the plan decides itself (``target_modules``, ``bias``, …) is refused at once.
    """

    targets: tuple[str, ...] = ("query", "key", "value")
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", name_list(self.targets, ("targets",), LINEAR_ROLES, "role of a linear map"))
        if not isinstance(self.options, Mapping):
            raise FieldError(("options",), f"got {self.options!r}; write a mapping of PEFT's option names: {{r: 8}}.")
        for name, value in self.options.items():
            if not isinstance(name, str) or not name.isidentifier():
                raise FieldError(("options",), f"{name!r} is not the name of a PEFT option. Write names such as r.")
            if name in _DECIDED_BY_THE_PLAN:
                raise FieldError(
                    ("options", name),
                    f"{name!r} follows from the plan. Remove it; blocks, targets and methods say what trains.",
                )
            _finite(value, ("options", name))
        object.__setattr__(self, "options", plain(self.options, ("options",)))


@dataclass(frozen=True)
class CrossOptions:
    """How the cross-attention of a stratum's blocks trains, where that differs from the rest of these blocks.

    Cross-attention is what reads the encoder in a decoder's block: its projections, its norm and its biases.

    Attributes:
        method: one of :data:`CROSS_METHODS`; ``full`` suits cross-attention that starts from random weights.
        lora: options of the low-rank methods, with ``cross_…`` roles as targets; None for other methods. By default
            an update on :data:`CROSS_TARGETS`.
    """

    method: str
    lora: LoraOptions | None = None

    def __post_init__(self) -> None:
        choice(self.method, ("method",), CROSS_METHODS, "method of cross-attention")
        low_rank = self.method.startswith("lora")
        if self.lora is not None and not low_rank:
            raise FieldError(
                ("lora",), f"method {self.method!r} does not read 'lora'. Remove it, or change the method."
            )
        if low_rank and self.lora is None:
            object.__setattr__(self, "lora", LoraOptions(targets=CROSS_TARGETS))
        for role in self.lora.targets if self.lora is not None else ():
            if not role.startswith("cross_"):
                raise FieldError(
                    ("lora", "targets"),
                    f"{role!r} is no role of cross-attention. Write it among the stratum's own targets; here stand "
                    f"{', '.join(r for r in LINEAR_ROLES if r.startswith('cross_'))}.",
                )


@dataclass(frozen=True)
class Stratum:
    """One contiguous range of blocks and the method that trains it.

    Attributes:
        stack: name of the block stack (``encoder``, ``decoder``, …).
        blocks: half-open range ``(start, stop)``; block 0 follows the embeddings.
        method: one of :data:`METHODS` or :data:`PEFT_METHODS`. ``norm`` trains the weights (and biases) of the
            block's norms. ``bias-added`` gives linear maps that have no bias one that starts at 0 and is kept in the
            adapter; under ``lora+bias-added`` the added bias of a LoRA target is scaled with its update, by
            alpha / rank.
        lora: options of the low-rank methods; None for other methods (defaults are filled in where needed).
        bitfit: roles whose biases train under ``bitfit`` and ``lora+bitfit``; None means every bias of the block.
        bias_added: roles that get a new bias under ``bias-added`` and ``lora+bias-added``; None means every linear map
            of the block. Those that have a bias already are refused: ``bitfit`` trains them.
        ia3: roles scaled under ``ia3``; None means key, value and output, as its authors do.
        peft: options of the methods in :data:`PEFT_METHODS`; None for other methods.
        learning_rate: of this stratum, above 0; None takes the run's.
        weight_decay: of this stratum, at least 0; None takes the run's.
        cross: how the blocks' cross-attention trains, where that differs; the rest of this then speaks of the other
            sub-layers. None: like the rest.

    Raises:
        ConfigError: empty range, unknown method or role, an option the method does not read, nothing to train.
    """

    stack: str
    blocks: tuple[int, int]
    method: str
    lora: LoraOptions | None = None
    bitfit: tuple[str, ...] | None = None
    ia3: tuple[str, ...] | None = None
    peft: PeftOptions | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    bias_added: tuple[str, ...] | None = None
    cross: CrossOptions | None = None

    def __post_init__(self) -> None:
        text(self.stack, ("stack",))
        if isinstance(self.blocks, str) or not isinstance(self.blocks, Sequence) or len(self.blocks) != 2:
            raise FieldError(
                ("blocks",), f"got {self.blocks!r}; write two whole numbers, first and one past the last: [0, 5]."
            )
        start, stop = (integer(b, ("blocks", i), minimum=0) for i, b in enumerate(self.blocks))
        if stop <= start:
            raise FieldError(
                ("blocks",),
                f"the range [{start}, {stop}) holds no block; ranges are half-open, so the stop must be above the "
                "start. Remove the stratum or widen it.",
            )
        object.__setattr__(self, "blocks", (start, stop))
        choice(self.method, ("method",), METHODS + PEFT_METHODS, "method")
        by_name = self.method in PEFT_METHODS
        for option, used in (
            ("lora", self.is_low_rank),
            ("bitfit", "bitfit" in self.method),
            ("bias_added", self.adds_biases),
            ("ia3", self.method == "ia3"),
            ("peft", by_name),
            ("learning_rate", self.is_trained),
            ("weight_decay", self.is_trained),
        ):
            if getattr(self, option) is not None and not used:
                raise FieldError(
                    (option,), f"method {self.method!r} does not read {option!r}. Remove it, or change the method."
                )
        if self.is_low_rank and self.lora is None:
            object.__setattr__(self, "lora", LoraOptions())
        if by_name and self.peft is None:
            object.__setattr__(self, "peft", PeftOptions())
        if self.bitfit is not None:
            object.__setattr__(self, "bitfit", name_list(self.bitfit, ("bitfit",), ROLES, "role"))
        if self.bias_added is not None:
            roles = name_list(self.bias_added, ("bias_added",), LINEAR_ROLES, "role of a linear map")
            object.__setattr__(self, "bias_added", roles)
        if self.method == "ia3":
            wanted = ("key", "value", "output") if self.ia3 is None else self.ia3
            object.__setattr__(self, "ia3", name_list(wanted, ("ia3",), LINEAR_ROLES, "role of a linear map"))
        _check_optimizer(self)
        if self.cross is not None:
            _check_cross(self)

    @property
    def is_trained(self) -> bool:
        """Whether anything in the blocks trains, cross-attention with a method of its own included."""
        return self.method != "freeze" or (self.cross is not None and self.cross.method != "freeze")

    @property
    def pieces(self) -> tuple[Stratum, ...]:
        """This stratum, and a second one for its cross-attention where that has a method of its own."""
        if self.cross is None:
            return (self,)
        trains = self.cross.method != "freeze"
        return (
            self,
            Stratum(
                self.stack, self.blocks, self.cross.method, lora=self.cross.lora,
                learning_rate=self.learning_rate if trains else None,
                weight_decay=self.weight_decay if trains else None,
            ),
        )  # fmt: skip

    @property
    def is_low_rank(self) -> bool:
        """Whether the method reads ``lora`` options."""
        return self.method.startswith("lora") or self.method == "dora"

    @property
    def adds_biases(self) -> bool:
        """Whether the method gives linear maps a new bias."""
        return "bias-added" in self.method

    @property
    def adapter(self) -> str | None:
        """Kind of PEFT adapter on the stratum's linear maps: lora, dora, ia3 or a name of PEFT; None without one.

        An added bias is that of a LoRA layer.
        """
        if self.method.startswith("lora") or self.adds_biases:
            return "lora"
        return self.method if self.method in ("dora", "ia3", *PEFT_METHODS) else None

    @property
    def trains(self) -> str:
        """What trains, in words."""
        parts = []
        if self.lora is not None:
            name = "DoRA" if self.method == "dora" else "LoRA"
            scale = " (rsLoRA)" if self.lora.rslora else ""
            parts.append(f"{name} rank {self.lora.rank}{scale} on {', '.join(self.lora.targets)}")
        if "bitfit" in self.method:
            parts.append("every bias" if self.bitfit is None else f"biases of {', '.join(self.bitfit)}")
        if self.adds_biases:
            where = "every linear map" if self.bias_added is None else ", ".join(self.bias_added)
            parts.append(f"added biases of {where}")
        if "norm" in self.method:
            parts.append("norm weights")
        if self.ia3 is not None:
            parts.append(f"IA3 on {', '.join(self.ia3)}")
        if self.peft is not None:
            values = "".join(f", {k} {v}" for k, v in self.peft.options.items())
            parts.append(f"{self.method} on {', '.join(self.peft.targets)}{values}")
        if self.method == "full":
            parts.append("everything" if self.cross is None else "everything else")
        if self.cross is not None:
            parts.append(f"cross-attention: {replace(self.pieces[1], learning_rate=None, weight_decay=None).trains}")
        return "; ".join([*parts, *optimizer_words(self)]) or "nothing"


@dataclass(frozen=True)
class Outside:
    """What trains outside the blocks; each place one of :data:`OUTSIDE_METHODS`. Defaults are SPAFIT's.

    Attributes:
        embeddings: the embedding tables and their norm.
        pooler: the pooler between the last block and the head, where there is one.
        head: the classifier or language-model head.
        final_norm: the norm after the last block of pre-norm models.
        projector: what leads from one stack to another: from images to text, or an encoder's states to a decoder of
            another width.
        learning_rate: of all of these, above 0; None takes the run's.
        weight_decay: of all of these, at least 0; None takes the run's.
    """

    embeddings: str = "freeze"
    pooler: str = "bitfit"
    head: str = "full"
    final_norm: str = "freeze"
    projector: str = "freeze"
    learning_rate: float | None = None
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        for name in PLACES:
            choice(getattr(self, name), (name,), OUTSIDE_METHODS, "method outside the blocks")
        for option in ("learning_rate", "weight_decay"):
            if getattr(self, option) is not None and all(getattr(self, place) == "freeze" for place in PLACES):
                raise FieldError(
                    (option,), f"everything outside the blocks is frozen, so nothing reads {option!r}. Remove it."
                )
        _check_optimizer(self)


def optimizer_words(part: Stratum | Outside) -> list[str]:
    """The part's own learning rate and weight decay in words; empty where it takes the run's."""
    words = []
    if part.learning_rate is not None:
        words.append(f"learning rate {part.learning_rate:g}")
    if part.weight_decay is not None:
        words.append(f"weight decay {part.weight_decay:g}")
    return words


def _check_optimizer(part: Stratum | Outside) -> None:
    if part.learning_rate is not None:
        object.__setattr__(part, "learning_rate", float(number(part.learning_rate, ("learning_rate",))))
        if part.learning_rate <= 0:
            raise FieldError(
                ("learning_rate",), f"got {part.learning_rate}; it must be above 0. To train nothing, write freeze."
            )
    if part.weight_decay is not None:
        object.__setattr__(part, "weight_decay", float(number(part.weight_decay, ("weight_decay",))))
        if part.weight_decay < 0:
            raise FieldError(("weight_decay",), f"got {part.weight_decay}; it must be at least 0.")


def _check_cross(stratum: Stratum) -> None:
    """Refuse what would say twice how cross-attention trains, and an adapter that the plan cannot hold beside it."""
    if not isinstance(stratum.cross, CrossOptions):
        raise FieldError(("cross",), f"got {stratum.cross!r}; write a method: {{method: lora}}.")
    named = {
        ("lora", "targets"): stratum.lora.targets if stratum.lora is not None else (),
        ("peft", "targets"): stratum.peft.targets if stratum.peft is not None else (),
        ("bitfit",): stratum.bitfit or (), ("bias_added",): stratum.bias_added or (), ("ia3",): stratum.ia3 or (),
    }  # fmt: skip
    for path, roles in named.items():
        for role in roles:
            if role.startswith("cross_"):
                raise FieldError(
                    path, f"{role!r} stands here, and the field 'cross' says how cross-attention trains. Remove one."
                )


def _finite(value: Any, path: FieldPath) -> None:
    """Refuse numbers that are not finite, which would be written as null."""
    if isinstance(value, float) and not math.isfinite(value):
        raise FieldError(path, f"got {value}; write a finite number.")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _finite(inner, (*path, str(key)))
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            _finite(inner, (*path, i))
