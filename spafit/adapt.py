"""Wrap a model so that exactly the parameters of a plan train, with stock PEFT; asserted by name and count."""

from __future__ import annotations

import copy
import dataclasses
import html
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spafit.errors import ConfigError, ModelError
from spafit.layout import is_inside
from spafit.peft_wrapping import (
    ADAPTER,
    canonical_name,
    canonical_parameters,
    entries,
    expected_parameters,
    is_original,
    is_quantised,
    peft_config_of,
    quiet_peft,
    wrapped_by_peft,
)
from spafit.resolve import ResolvedPlan, resolve

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from torch import nn

    from spafit.models import LoadedModel
    from spafit.strata import StrataConfig


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
        return sum(map(entries, names.values()))

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
            parameter.requires_grad_(not is_original(name) and canonical_name(name) in moving)
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
        with torch.no_grad(), quiet_peft(), off:
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
            with quiet_peft():
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

        sizes = {n: entries(p) for n, p in canonical_parameters(self.model).items()}
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
    peft_config = peft_config_of(model, plan)
    wrapped = wrapped_by_peft(model, peft_config)
    trainable, part_of = expected_parameters(wrapped, plan, peft_config)
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


def _refuse_tied(plan: ResolvedPlan) -> None:
    embeddings = next((p for p in plan.parts if p.name == "embeddings"), None)
    if embeddings is not None and embeddings.method == "full" and set(plan.tied.values()) & set(embeddings.own):
        raise ConfigError(
            "outside.embeddings: the embeddings are tied to the head, and an adapter would untie them. Write freeze, "
            "or use the preset full."
        )


def _refuse_quantised(model: nn.Module, plan: ResolvedPlan) -> None:
    for part in plan.parts:
        for path in part.saved:
            if is_quantised(model.get_submodule(path)):
                raise ConfigError(
                    f"{part.name}: {path} is quantised, and rounded weights cannot be trained in full. Write lora, "
                    "bitfit or norm there, or load the base without quantisation."
                )
