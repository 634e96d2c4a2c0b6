"""Wrap a model so that exactly the parameters of a plan train, with stock PEFT; asserted by name and count."""

from __future__ import annotations

import copy
import dataclasses
import html
import math
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spafit.errors import ConfigError, ModelError
from spafit.layout import is_inside, linear_size
from spafit.resolve import Part, ResolvedPlan, resolve

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from torch import nn

    from spafit.models import LoadedModel
    from spafit.strata import StrataConfig

ADAPTER = "default"


@dataclass
class Moment:
    """What holds for now in a model that a schedule moves; see :mod:`spafit.scheduling`.

    Attributes:
        bare: the model before wrapping, without weights, over which plans are laid; None without a schedule.
        plan: the plan that holds; None where that is the model's own.
        resting: canonical names of parameters that could train and do not.
    """

    bare: nn.Module | None = None
    plan: ResolvedPlan | None = None
    resting: frozenset[str] = frozenset()


@dataclass(frozen=True)
class StratifiedModel:
    """A model of which exactly the planned parameters train; made by :func:`apply_strata`.

    Attributes:
        model: what to train and call: a stock ``PeftModel``, or the model itself where every parameter trains.
        plan: the plan as it lies over the model.
        trainable: canonical name -> number of entries, of every parameter that trains. Canonical names are those of
            the model before wrapping; a PEFT layer's own tensors are named after the module that they belong to
            (``bert.encoder.layer.3.attention.self.query.lora_A.weight``).
        part_of: canonical name -> name of its part.
        base_values: the values before training of the parameters that train in place (biases; with an adapter only).
        moment: what of this holds for now, where a schedule moves it.
    """

    model: Any
    plan: ResolvedPlan
    trainable: Mapping[str, int]
    part_of: Mapping[str, str]
    base_values: Mapping[str, torch.Tensor]
    moment: Moment = field(default_factory=Moment, repr=False, compare=False)

    @property
    def config(self) -> StrataConfig:
        """The plan as written."""
        return self.plan.config

    @property
    def is_adapter(self) -> bool:
        """Whether the model is wrapped by PEFT."""
        return hasattr(self.model, "peft_config")

    def trainable_parameters(self) -> int:
        """Number of parameters that train."""
        return sum(self.trainable.values())

    def total_parameters(self) -> int:
        """Number of parameters of the model before wrapping."""
        names = {n: p for n, p in canonical_parameters(self.model).items() if n in self._base_names}
        return sum(map(_entries, names.values()))

    @property
    def _base_names(self) -> set[str]:
        return {n for part in self.plan.parts for n in part.own}

    def check(self) -> None:
        """Assert that what requires a gradient is the planned set, in names and in number of entries.

        Raises:
            ModelError: something else trains, or something planned does not.
        """
        got = {canonical_name(n): p.numel() for n, p in self.model.named_parameters() if p.requires_grad}
        planned = {n: size for n, size in self.trainable.items() if n not in self.moment.resting}
        if got != planned:
            extra, missing = sorted(set(got) - set(planned)), sorted(set(planned) - set(got))
            raise ModelError(
                f"The parameters that train are not those of the plan: {len(extra)} too many ({', '.join(extra[:3])}), "
                f"{len(missing)} missing ({', '.join(missing[:3])}). Something changed requires_grad after "
                "apply_strata; call restore_mask(), or apply the plan to a fresh model."
            )

    def restore_mask(self) -> None:
        """Set ``requires_grad`` of every parameter to what the plan says, and check it."""
        moving = set(self.trainable) - self.moment.resting
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(not _is_original(name) and canonical_name(name) in moving)
        self.check()

    def hold(self, config: StrataConfig) -> None:
        """Let only what another plan trains move; what rests keeps its values.

        Raises:
            ConfigError: the plan does not fit the model.
            ModelError: the model was not made for a schedule, or lacks something that the plan trains.
        """
        if self.moment.bare is None:
            raise ModelError("The model was made for one plan, and another cannot be held in it. Apply that plan anew.")
        plan = resolve(self.moment.bare, config, stacks=self.plan.stacks)
        moving: set[str] = set()
        for part in plan.parts:
            moving |= set(part.biases)
            moving |= {n for n in part.own if part.method == "full" or any(is_inside(n, m) for m in part.saved)}
            for target in part.targets:
                own = {n for n in self.trainable if n.startswith(f"{target}.{self.model.base_model.prefix}")}
                moving |= own or {target}
        if lacking := sorted(moving - set(self.trainable)):
            raise ModelError(f"The model has nothing that trains at {lacking[0]}, which the plan names.")
        self.moment.plan, self.moment.resting = plan, frozenset(self.trainable) - moving
        self.restore_mask()

    @contextmanager
    def base_model(self) -> Iterator[Any]:
        """The model as it was before training, exactly, inside the ``with`` block; afterwards the trained one again.

        PEFT's own ``disable_adapter`` leaves trained biases in place; here the values from before are put back too.

        Raises:
            ModelError: every parameter trains, so that nothing of the start is kept.
        """
        import torch
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        if not self.is_adapter:
            raise ModelError(
                "All parameters of this model train and none of its start is kept, so it has no base to show. Load the "
                "base again."
            )
        parameters = canonical_parameters(self.model)
        trained = {n: parameters[n].detach().clone() for n in self.base_values}
        wrapped = any(isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper) for m in self.model.modules())
        # Where biases alone train, PEFT has nothing to switch off and says that with an error.
        off = self.model.disable_adapter() if wrapped else nullcontext()
        with torch.no_grad(), _quiet_peft(), off:
            for name, value in self.base_values.items():
                parameters[name].copy_(value)
            try:
                yield self.model.get_base_model()
            finally:
                for name, value in trained.items():
                    parameters[name].copy_(value)
        self.restore_mask()

    @property
    def fixed_at_zero(self) -> tuple[str, ...]:
        """Names of the adapter's tensors that stay 0: the factors where only an added bias trains, biases elsewhere."""
        added = any(part.added for part in self.plan.parts)
        factors = [f"{t}.lora_{k}.weight" for part in self.plan.parts for t in part.bias_only for k in "AB"]
        biases = [f"{t}.lora_B.bias" for part in self.plan.parts for t in part.targets if added and t not in part.added]
        return (*factors, *biases)

    def merge(self) -> Any:
        """A plain model with the trained values in it, equal to 1e-5; this one stays as it is.

        Raises:
            ModelError: the method cannot be merged into the weights, or the base is quantised.
        """
        added = next((part for part in self.plan.parts if part.added), None)
        if added is not None:
            raise ModelError(
                f"{added.name} trains added biases, and a plain {type(self.model.get_base_model()).__name__} has no "
                "bias there to merge them into. Use the adapter on its base, as save() writes it; a plan with norm in "
                "place of bias-added can be merged."
            )
        if is_quantised(self.model):
            raise ModelError(
                "The base is quantised, and rounding its merged weights again would change what was trained. Load the "
                "saved adapter on the base in full precision, and merge there."
            )
        if not self.is_adapter:
            return copy.deepcopy(self.model)
        try:
            with _quiet_peft():
                return copy.deepcopy(self.model).merge_and_unload(safe_merge=True)
        except (NotImplementedError, AttributeError) as error:
            raise ModelError(
                f"A {self.model.peft_config[ADAPTER].peft_type.value} adapter cannot be merged ({error}). Use it as it "
                "is."
            ) from error

    def save(self, directory: str | Path) -> Path:
        """Write the adapter as a stock PEFT folder with the plan beside it; see :func:`spafit.checkpoint.save`."""
        from spafit.checkpoint import save

        return save(self, directory)

    def to_pandas(self) -> pd.DataFrame:
        """One row per part: part, method, modules, parameters, trainable, share (of the model's parameters)."""
        import pandas as pd

        sizes = {n: _entries(p) for n, p in canonical_parameters(self.model).items()}
        total = self.total_parameters()
        rows = []
        for part in self.plan.parts:
            trains = sum(n for name, n in self.trainable.items() if self.part_of[name] == part.name)
            rows.append(
                {
                    "part": part.name,
                    "method": part.method,
                    "modules": len(part.modules),
                    "parameters": sum(sizes[n] for n in part.own),
                    "trainable": trains,
                    "share": trains / total,
                }
            )
        return pd.DataFrame(rows)

    def describe(self) -> str:
        """The plan on this model as text: every part with what trains, the totals, and the expected cost of a step."""
        from spafit.costs import step_cost

        lines = [f"{'part':<22}{'method':<13}{'modules':>8}{'parameters':>14}{'trainable':>13}{'share':>9}"]
        for row in self.to_pandas().to_dict("records"):
            lines.append(
                f"{row['part']:<22}{row['method']:<13}{row['modules']:>8}{row['parameters']:>14,}"
                f"{row['trainable']:>13,}{100 * row['share']:>8.2f}%"
            )
        total, trains = self.total_parameters(), self.trainable_parameters()
        lines.append(f"{'all':<22}{'':<13}{'':>8}{total:>14,}{trains:>13,}{100 * trains / total:>8.2f}%")
        plain, cached = step_cost(self.model, self.plan), step_cost(self.model, self.plan, cached_prefix=True)
        lines.append(
            f"expected step: {plain / 3:.2f} of full fine-tuning's"
            + (f", {cached / 3:.2f} with the frozen prefix cached" if cached < plain else "")
        )
        if self.moment.plan is not None:
            held = "; ".join(f"{p.name} {p.method}" for p in self.moment.plan.parts)
            lines.append(f"a schedule moves within this; now: {held}")
        return "\n".join([*lines, *(f"note: {n}" for n in self.plan.notes)])

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.describe())}</pre>"


def apply_strata(model: nn.Module | LoadedModel, config: StrataConfig) -> StratifiedModel:
    """Wrap a model so that exactly what the plan says trains.

    One stock PEFT adapter carries everything: PEFT layers on the targets, biases in place, norms, blocks and heads as
    ``modules_to_save``. The mask on ``requires_grad`` is ours, set by name and asserted. Where the plan trains every
    parameter there is no adapter and the model itself is returned.

    Args:
        model: a model with or without a head, on any device (the meta device gives counts without weights). It is
            changed in place, as PEFT does. A :class:`spafit.LoadedModel` is copied first.
        config: the plan; checked against the model before anything is changed.

    Raises:
        ConfigError: the plan does not fit the model.
        ModelError: the model is wrapped already.
    """
    import torch

    from spafit.models import LoadedModel

    if isinstance(model, LoadedModel):
        model = copy.deepcopy(model.model)
    if hasattr(model, "peft_config"):
        raise ModelError(
            "The model has an adapter already, and a second one would run on the first one's trained biases. Merge the "
            "first (merge()), or load the base again."
        )
    plan = resolve(model, config)
    if plan.everything_trains:
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        names = {n: p.numel() for n, p in model.named_parameters()}
        part_of = {n: part.name for part in plan.parts for n in part.own}
        whole = StratifiedModel(model, plan, names, part_of, {})
        whole.check()
        return whole
    _refuse_tied(plan)
    _refuse_quantised(model, plan)
    peft_config = _peft_config(model, plan)
    wrapped = _wrap(model, peft_config)
    trainable, part_of = _expected(wrapped, plan, peft_config)
    parameters = canonical_parameters(wrapped)
    in_place = [b for part in plan.parts for b in part.biases]
    base_values = {n: parameters[n].detach().clone() for n in in_place}
    stratified = StratifiedModel(wrapped, plan, trainable, part_of, base_values)
    with torch.no_grad():
        for name in stratified.fixed_at_zero:  # with both factors 0, no optimizer moves either: their gradients are 0
            parameters[name].zero_()
    stratified.restore_mask()
    return stratified


def plan_for(
    model: nn.Module,
    config: StrataConfig | str,
    *,
    model_id: str = "unnamed",
    missing: Collection[str] = (),
    keep_head: bool = False,
) -> StrataConfig:
    """The plan itself, or the preset of that name made for this model (which may be on the meta device).

    Args:
        model: the model, not wrapped.
        config: a plan or a preset's name.
        model_id: the model's reference, for people.
        missing: parameters that the checkpoint lacks. What starts from random weights must train, or no saved adapter
            brings it back: a preset then trains the pooler in full and says so, a plan of the user's is refused.
        keep_head: a preset leaves the head frozen and says so, where the checkpoint has it: a language model's.

    Raises:
        ConfigError: unknown preset, one that does not fit the model, or a plan that freezes what is missing.
    """
    from spafit.stacks import find_stacks
    from spafit.strata import StrataConfig

    if isinstance(config, StrataConfig):
        plan = config
    else:
        stacks = find_stacks(model)
        plan = StrataConfig.preset(
            config,
            blocks={s.name: s.num_blocks for s in stacks},
            bias_roles={s.name: s.bias_roles for s in stacks},
            roles={s.name: tuple(s.roles) for s in stacks},
            # Both sides of a comparison at equal parameters are counted as they would be trained.
            count=lambda plan: count_trainable(model, with_missing_pooler(model, plan, missing)),
            model_id=model_id,
        )
        plan = with_missing_pooler(model, plan, missing)
        if keep_head and config != "full":
            plan = _with_head_kept(model, plan, missing)
    frozen = _frozen_parts(model, plan, missing)
    if frozen:
        place, names = next(iter(frozen.items()))
        raise ConfigError(
            f"{', '.join(names[:3])} start from random weights, since the checkpoint lacks them, and the plan leaves "
            f"them frozen, so that no saved adapter could bring them back. Train them ({place}: full), or use a "
            "checkpoint that has them."
        )
    return plan


def with_missing_pooler(model: nn.Module, plan: StrataConfig, missing: Collection[str]) -> StrataConfig:
    """A preset's plan with the pooler in full, where that is all that the checkpoint lacks and the plan freezes."""
    if set(_frozen_parts(model, plan, missing)) != {"pooler"}:
        return plan
    said = f"pooler: full for {plan.outside.pooler}, the checkpoint has none, so it starts from random weights"
    before = list(plan.provenance.get("substitutions", ()))
    outside = dataclasses.replace(plan.outside, pooler="full")
    return dataclasses.replace(plan, outside=outside).with_provenance({"substitutions": [*before, said]})


def _with_head_kept(model: nn.Module, plan: StrataConfig, missing: Collection[str]) -> StrataConfig:
    """A preset's plan with the head frozen, unless the checkpoint lacks it or it is tied to the embeddings."""
    own = next((p.own for p in resolve(model, plan).parts if p.name == "head"), ())
    if not own or set(own) & set(missing) or plan.outside.head == "freeze":
        return plan
    said = "head: freeze for full, the language-model head is the checkpoint's own"
    before = list(plan.provenance.get("substitutions", ()))
    outside = dataclasses.replace(plan.outside, head="freeze")
    return dataclasses.replace(plan, outside=outside).with_provenance({"substitutions": [*before, said]})


def _frozen_parts(model: nn.Module, plan: StrataConfig, missing: Collection[str]) -> dict[str, list[str]]:
    """Part -> missing parameters in it that the plan neither trains nor keeps."""
    found: dict[str, list[str]] = {}
    for part in resolve(model, plan).parts if missing else ():
        kept = {n for n in part.own if n in part.biases or any(is_inside(n, m) for m in part.saved)}
        lost = [n for n in part.own if n in missing and n not in kept]
        if lost:
            found[part.name] = lost
    return found


def count_trainable(model: nn.Module, config: StrataConfig) -> int:
    """Number of parameters that a plan trains on a model, which stays as it is."""
    return apply_strata(meta_copy(model), config).trainable_parameters()


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of a model without weights, for counting."""
    import torch

    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = torch.nn.Parameter(empty) if isinstance(tensor, torch.nn.Parameter) else empty
    return copy.deepcopy(model, memo)


# ---------------------------------------------------------------- names


def canonical_name(name: str) -> str:
    """A parameter's name without what PEFT's wrappers add."""
    name = name.removeprefix("module.").replace("_orig_mod.", "").replace("_fsdp_wrapped_module.", "")
    name = name.replace("_checkpoint_wrapped_module.", "").removeprefix("base_model.model.")
    for inserted in (".base_layer", f".modules_to_save.{ADAPTER}", ".original_module"):
        name = name.replace(inserted, "")
    return name.replace(f".{ADAPTER}.", ".").removesuffix(f".{ADAPTER}")


def _is_original(name: str) -> bool:
    """Whether a parameter is the frozen first copy of a module that trains whole."""
    return ".original_module." in name


def canonical_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters by canonical name; of a module that trains whole, the copy that trains."""
    return {canonical_name(n): p for n, p in model.named_parameters() if not _is_original(n)}


# ---------------------------------------------------------------- PEFT


def _peft_config(model: nn.Module, plan: ResolvedPlan) -> Any:
    """The one PEFT configuration of a plan; strata of one plan agree in its kind, which StrataConfig has checked."""
    import peft
    from peft.utils.constants import DUMMY_TARGET_MODULES

    saved = [m for part in plan.parts for m in part.saved]
    targeted = [part for part in plan.parts if part.targets]
    common: dict[str, Any] = {"modules_to_save": saved or None, "task_type": _task_type(model, saved)}
    targets: Any = [t for part in targeted for t in part.targets]
    biases = any(part.biases for part in plan.parts)
    first = targeted[0].stratum if targeted else None
    if first is None or first.adapter in ("lora", "dora"):
        ranks, alphas = {}, {}
        options = None
        for part in targeted:
            assert part.stratum is not None
            options = part.stratum.lora or options
            for target in part.targets:
                low_rank = None if target in part.bias_only else part.stratum.lora
                # An added bias is that of LoRA's second factor, scaled by alpha / rank: 1.
                ranks[target], alphas[target] = (low_rank.rank, low_rank.alpha) if low_rank is not None else (1, 1)
        common_rank = max(set(ranks.values()), key=list(ranks.values()).count) if ranks else 8
        common_alpha = max(set(alphas.values()), key=list(alphas.values()).count) if alphas else 8
        return peft.LoraConfig(
            r=common_rank,
            lora_alpha=common_alpha,  # type: ignore[arg-type]
            # Anchored patterns: PEFT matches a pattern against the end of a module's name.
            rank_pattern={f"^{t}": r for t, r in ranks.items() if r != common_rank},
            alpha_pattern={f"^{t}": a for t, a in alphas.items() if a != common_alpha},
            lora_dropout=options.dropout if options is not None else 0.0,
            use_rslora=options.rslora if options is not None else False,
            use_dora=first is not None and first.method == "dora",
            fan_in_fan_out=_transposed(model, targets),
            target_modules=targets or DUMMY_TARGET_MODULES,
            bias="all" if biases else "none",
            lora_bias=any(part.added for part in targeted),
            **common,
        )
    if first.ia3 is not None:
        feed_forward = [
            t for part in targeted for s in plan.stacks if part.stratum is not None and part.stratum.stack == s.name
            for b in range(*part.stratum.blocks) for role in ("intermediate", "output")
            for t in s.role_paths(role, b) if t in part.targets
        ]  # fmt: skip
        return peft.IA3Config(
            target_modules=targets,
            feedforward_modules=feed_forward,
            fan_in_fan_out=_transposed(model, targets),
            **common,
        )
    return _named_config(plan, targeted, targets, common)


def _named_config(plan: ResolvedPlan, targeted: list[Part], targets: list[str], common: dict[str, Any]) -> Any:
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType

    first = targeted[0].stratum
    assert first is not None
    assert first.peft is not None
    known = {t.value: PEFT_TYPE_TO_CONFIG_MAPPING[t] for t in PEFT_TYPE_TO_CONFIG_MAPPING}
    if first.method.upper() not in known:
        raise ConfigError(
            f"The installed version of PEFT has no method {first.method!r}. Upgrade it: pip install -U peft."
        )
    kind = known[PeftType(first.method.upper())]
    allowed = {f.name for f in dataclasses.fields(kind)} - {"target_modules", "modules_to_save", "task_type", "bias"}
    unknown = sorted(set(first.peft.options) - allowed)
    if unknown:
        raise ConfigError(f"{kind.__name__} has no option {unknown[0]!r}. Options: {', '.join(sorted(allowed))}.")
    try:
        return kind(**{**dict(first.peft.options), "target_modules": targets, **common})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"method {first.method!r}: {error}. Correct peft.options.") from error


def _transposed(model: nn.Module, targets: list[str]) -> bool:
    """Whether the targets keep their weights as (inputs, outputs), as GPT-2's do."""
    return any(type(model.get_submodule(t)).__name__ == "Conv1D" for t in targets)


def _task_type(model: nn.Module, saved: list[str]) -> str | None:
    """The task that lets PEFT's Auto classes load the adapter: only where it adds no module of its own."""
    kind = type(model).__name__
    for suffix, task, head in (
        ("ForSequenceClassification", "SEQ_CLS", ("classifier", "score")),
        ("ForTokenClassification", "TOKEN_CLS", ("classifier", "score")),
    ):
        if kind.endswith(suffix) and any(h in saved for h in head):
            return task
    return "CAUSAL_LM" if kind.endswith(("ForCausalLM", "LMHeadModel")) else None


def _wrap(model: nn.Module, peft_config: Any) -> Any:
    from peft import get_peft_model

    with _quiet_peft():
        try:
            return get_peft_model(model, peft_config, adapter_name=ADAPTER)
        except (ValueError, RuntimeError, NotImplementedError, TypeError) as error:
            raise ConfigError(
                f"PEFT cannot put {peft_config.peft_type.value} on this model: {str(error).splitlines()[0]} Choose "
                "other targets or another method."
            ) from error


def _expected(wrapped: Any, plan: ResolvedPlan, peft_config: Any) -> tuple[dict[str, int], dict[str, str]]:
    """Names and sizes that must train, from the plan and the sizes of the base's modules, and whose part they are.

    LoRA's tensors and added biases are counted from rank and shape, independently of what PEFT made; other
    methods' tensors are those that PEFT put on the targets, and on nothing else.
    """
    sizes = {n: p for n, p in canonical_parameters(wrapped).items()}
    expected: dict[str, int] = {}
    part_of: dict[str, str] = {}
    prefix = wrapped.base_model.prefix
    for part in plan.parts:
        names = list(part.biases)
        names += [n for n in part.own if any(n.startswith(m + ".") for m in part.saved)]
        found = {n: sizes[n].numel() for n in names}
        for target in part.targets:
            own = {n: p for n, p in sizes.items() if n.startswith(f"{target}.{prefix}")}
            if part.stratum is not None and part.stratum.adapter in ("lora", "dora"):
                inputs, outputs = _shape(wrapped, target)
                if part.stratum.lora is not None and target not in part.bias_only:
                    rank = part.stratum.lora.rank
                    found |= {f"{target}.lora_A.weight": rank * inputs, f"{target}.lora_B.weight": rank * outputs}
                if target in part.added:
                    found[f"{target}.lora_B.bias"] = outputs
                if part.stratum.method == "dora":
                    found[f"{target}.lora_magnitude_vector.weight"] = outputs
            else:
                found |= {n: p.numel() for n, p in own.items()}
                if not own:
                    raise ModelError(f"PEFT put nothing on {target}, which the plan names.")
        expected |= found
        part_of |= dict.fromkeys(found, part.name)
    return expected, part_of


def _shape(wrapped: Any, target: str) -> tuple[int, int]:
    """(inputs, outputs) of a target's own weight, which may be quantised."""
    size = linear_size(wrapped.get_base_model().get_submodule(target).get_base_layer())
    assert size is not None
    return size


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """PEFT warns of what this module takes care of: biases under disable_adapter, added ones, a name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        warnings.filterwarnings("ignore", message="`lora_bias=True` was passed but the targeted layer")
        warnings.filterwarnings("ignore", message="Careful, disabling adapter layers with bias")
        yield


def _refuse_tied(plan: ResolvedPlan) -> None:
    embeddings = next((p for p in plan.parts if p.name == "embeddings"), None)
    if embeddings is not None and embeddings.method == "full" and set(plan.tied.values()) & set(embeddings.own):
        raise ConfigError(
            "outside.embeddings: the embeddings are tied to the head, and an adapter would untie them. Write freeze, "
            "or use the preset full."
        )


def _entries(parameter: nn.Parameter) -> int:
    """Number of entries; of a quantised weight that of the matrix it stands for, not of its packed bytes."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def is_quantised(model: nn.Module) -> bool:
    """Whether a model has linear maps of 4 or 8 bits, as bitsandbytes makes them."""
    return any(type(m).__name__ in ("Linear4bit", "Linear8bitLt") for m in model.modules())


def _refuse_quantised(model: nn.Module, plan: ResolvedPlan) -> None:
    for part in plan.parts:
        for path in part.saved:
            if is_quantised(model.get_submodule(path)):
                raise ConfigError(
                    f"{part.name}: {path} is quantised, and rounded weights cannot be trained in full. Write lora, "
                    "bitfit or norm there, or load the base without quantisation."
                )
