"""One stock PEFT adapter for a resolved plan: its configuration, the parameters it must leave training, their names."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from spafit.errors import ConfigError, ModelError
from spafit.layout import linear_size
from spafit.resolve import Part, ResolvedPlan

if TYPE_CHECKING:
    from torch import nn

ADAPTER = "default"


# ---------------------------------------------------------------- names


def canonical_name(name: str) -> str:
    """A parameter's name without what PEFT's wrappers add."""
    name = name.removeprefix("module.").replace("_orig_mod.", "").replace("_fsdp_wrapped_module.", "")
    name = name.replace("_checkpoint_wrapped_module.", "").removeprefix("base_model.model.")
    for inserted in (".base_layer", f".modules_to_save.{ADAPTER}", ".original_module"):
        name = name.replace(inserted, "")
    return name.replace(f".{ADAPTER}.", ".").removesuffix(f".{ADAPTER}")


def is_original(name: str) -> bool:
    """Whether a parameter is the frozen first copy of a module that trains whole."""
    return ".original_module." in name


def canonical_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters by canonical name; of a module that trains whole, the copy that trains."""
    return {canonical_name(n): p for n, p in model.named_parameters() if not is_original(n)}


# ---------------------------------------------------------------- PEFT


def peft_config_of(model: nn.Module, plan: ResolvedPlan) -> Any:
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


def wrapped_by_peft(model: nn.Module, peft_config: Any) -> Any:
    """The model inside a ``PeftModel``, changed in place.

    Raises:
        ConfigError: PEFT refuses; says why.
    """
    from peft import get_peft_model

    with quiet_peft():
        try:
            return get_peft_model(model, peft_config, adapter_name=ADAPTER)
        except (ValueError, RuntimeError, NotImplementedError, TypeError) as error:
            raise ConfigError(
                f"PEFT cannot put {peft_config.peft_type.value} on this model: {str(error).splitlines()[0]} Choose "
                "other targets or another method."
            ) from error


def expected_parameters(wrapped: Any, plan: ResolvedPlan, peft_config: Any) -> tuple[dict[str, int], dict[str, str]]:
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
def quiet_peft() -> Iterator[None]:
    """PEFT warns of what this module takes care of: biases under disable_adapter, added ones, a name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        warnings.filterwarnings("ignore", message="`lora_bias=True` was passed but the targeted layer")
        warnings.filterwarnings("ignore", message="Careful, disabling adapter layers with bias")
        yield


def entries(parameter: nn.Parameter) -> int:
    """Number of entries; of a quantised weight that of the matrix it stands for, not of its packed bytes."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def is_quantised(model: nn.Module) -> bool:
    """Whether a model has linear maps of 4 or 8 bits, as bitsandbytes makes them."""
    return any(type(m).__name__ in ("Linear4bit", "Linear8bitLt") for m in model.modules())
