"""Named plans: SPAFIT's three strata at the paper's boundaries, or scaled to the depth of another model."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, Literal

from spafit.errors import ConfigError, did_you_mean
from spafit.strata import ROLES, LoraOptions, Outside, StrataConfig, Stratum

PRESETS = ("spafit-scaled-I", "spafit-scaled-II", "spafit-N1-N2-I", "spafit-N1-N2-II")
#: Biases that train in SPAFIT's third stratum: those of the feed-forward sub-layer, not the attention's.
THIRD_STRATUM_BIASES = ("intermediate", "output", "output_norm")
TARGETS = {"I": ("query", "key", "value"), "II": ("query", "key", "value", "attention_output")}


def scaled_boundaries(num_blocks: int) -> tuple[int, int]:
    """SPAFIT-4-9's boundaries (5 and 10 of 24) at another depth: (⌊5L/24 + ½⌋, ⌊10L/24 + ½⌋)."""
    return (10 * num_blocks + 24) // 48, (20 * num_blocks + 24) // 48


def three_strata_config(
    boundaries: Mapping[str, tuple[int, int]],
    *,
    blocks: Mapping[str, int],
    adapter_type: Literal["I", "II"] = "I",
    lora: LoraOptions | None = None,
    bias_roles: Mapping[str, Collection[str]] | None = None,
    model_id: str = "unnamed",
    provenance: Mapping[str, Any] | None = None,
) -> StrataConfig:
    """SPAFIT's three strata (Arora & Wang 2024, arXiv 2405.00201) at the boundaries (s1, s2) of each stack.

    Blocks [0, s1) are frozen, [s1, s2) train their biases, [s2, L) train low-rank updates and the feed-forward
    sub-layer's biases. Empty strata are left out. Where the blocks have no such bias, ``norm`` stands in BitFit's
    place, and provenance says so under ``substitutions``.

    Args:
        boundaries: (s1, s2) per stack, 0 ≤ s1 ≤ s2 ≤ L.
        blocks: number of blocks per stack.
        adapter_type: ``I`` puts LoRA on query, key and value, ``II`` also on the attention's output.
        lora: rank, alpha and dropout (its targets are replaced by the type's); default rank 64.
        bias_roles: per stack, the roles whose sub-layers have a bias; None means all of them have.
        model_id: the model's reference, for people.
        provenance: source, criterion and so on.

    Raises:
        ConfigError: boundaries out of order or range, an unknown type, or a stack without boundaries.
    """
    if adapter_type not in TARGETS:
        raise ConfigError(f"adapter_type {adapter_type!r} is not known. Allowed: {', '.join(TARGETS)}.")
    if set(boundaries) != set(blocks):
        raise ConfigError(
            f"Boundaries are given for {', '.join(boundaries) or 'no stack'}, the model has {', '.join(blocks)}. "
            "Give one pair per stack."
        )
    options = replace(lora or LoraOptions(), targets=TARGETS[adapter_type])
    strata: list[Stratum] = []
    substitutions: list[str] = []
    no_bias_at_all = True
    for stack, count in blocks.items():
        s1, s2 = boundaries[stack]
        if not 0 <= s1 <= s2 <= count:
            raise ConfigError(
                f"Boundaries ({s1}, {s2}) of stack {stack!r} are not allowed: 0 ≤ s1 ≤ s2 ≤ {count} must hold."
            )
        present = set(ROLES if bias_roles is None else bias_roles.get(stack, ()))
        no_bias_at_all &= not present
        upper = tuple(r for r in THIRD_STRATUM_BIASES if r in present)
        if s1 > 0:
            strata.append(Stratum(stack, (0, s1), "freeze"))
        if s2 > s1:
            strata.append(Stratum(stack, (s1, s2), "bitfit" if present else "norm"))
            if not present:
                substitutions.append(f"{stack} [{s1}, {s2}): norm for bitfit, the blocks have no bias")
        if count > s2:
            strata.append(
                Stratum(stack, (s2, count), "lora+bitfit" if upper else "lora+norm", options, bitfit=upper or None)
            )
            if not upper:
                substitutions.append(
                    f"{stack} [{s2}, {count}): lora+norm for lora+bitfit, no bias in {', '.join(THIRD_STRATUM_BIASES)}"
                )
            elif len(upper) < len(THIRD_STRATUM_BIASES):
                missing = ", ".join(r for r in THIRD_STRATUM_BIASES if r not in present)
                substitutions.append(f"{stack} [{s2}, {count}): no bias in {missing}, left out of bitfit")
    return StrataConfig(
        model_id,
        blocks,
        tuple(strata),
        outside=Outside(pooler="norm" if no_bias_at_all else "bitfit"),
        provenance={**(provenance or {}), **({"substitutions": substitutions} if substitutions else {})},
    )


def preset_config(
    name: str,
    *,
    blocks: Mapping[str, int] | int,
    bias_roles: Mapping[str, Collection[str]] | None = None,
    model_id: str = "unnamed",
) -> StrataConfig:
    """A named plan for a model.

    ``spafit-N1-N2-I`` and ``-II`` keep the paper's inclusive ends: blocks 0…N1 frozen, N1+1…N2 BitFit, the rest LoRA
    and biases, so ``spafit-4-9-I`` has its starts at (5, 10). ``spafit-scaled-I`` and ``-II`` put those starts at the
    same share of the depth. The same boundaries hold for every stack.

    Args:
        name: the preset; upper and lower case are the same.
        blocks: number of blocks per stack, or one number for a single stack named ``encoder``.
        bias_roles: per stack, the roles whose sub-layers have a bias; None means all of them have.
        model_id: the model's reference, for people.

    Raises:
        ConfigError: unknown name, N1 above N2, or a stack with too few blocks.
    """
    counts = {"encoder": blocks} if isinstance(blocks, int) else dict(blocks)
    match = re.fullmatch(r"spafit-(?:(scaled)|(\d{1,6})-(\d{1,6}))-(i{1,2})", name.lower())
    if match is None:
        raise ConfigError(
            f"Preset {name!r} is not known. Allowed: {', '.join(PRESETS)} (N1 and N2 are block numbers, as in "
            f"spafit-4-9-I).{did_you_mean(name, PRESETS)}"
        )
    scaled, first, last, roman = match.groups()
    kind: Literal["I", "II"] = "I" if roman == "i" else "II"
    if scaled:
        boundaries = {stack: scaled_boundaries(count) for stack, count in counts.items()}
        canonical = f"spafit-scaled-{kind}"
    else:
        n1, n2 = int(first), int(last)
        canonical = f"spafit-{n1}-{n2}-{kind}"
        if n1 > n2:
            raise ConfigError(f"Preset {name!r}: N1 = {n1} is above N2 = {n2}; N1 ≤ N2 must hold.")
        for stack, count in counts.items():
            if n2 >= count:
                raise ConfigError(
                    f"Preset {name!r} names block {n2}, but stack {stack!r} has {count} blocks (0 to {count - 1}). "
                    f"Lower N2, or use spafit-scaled-{kind}."
                )
        boundaries = dict.fromkeys(counts, (n1 + 1, n2 + 1))
    return three_strata_config(
        boundaries,
        blocks=counts,
        adapter_type=kind,
        bias_roles=bias_roles,
        model_id=model_id,
        provenance={"source": f"preset {canonical}", "criterion": "none: set by hand", "tested": False},
    )
