"""Named plans: SPAFIT's three strata at the paper's boundaries or scaled to another depth, and what to compare with."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from spafit.errors import ConfigError, did_you_mean
from spafit.strata import StrataConfig
from spafit.stratum import LINEAR_ROLES, ROLES, LoraOptions, Outside, Stratum

#: All names and what they do; N1, N2 and K are numbers of blocks, SEED is a whole number, PRESET is any of these names.
PRESETS = {
    "full": "everything trains",
    "head": "only the task's head trains",
    "bitfit": "every bias trains, and the head",
    "norm": "every norm trains, and the head",
    "lora": "LoRA, rank 64, on query, key and value of every block",
    "lora-all-linear": "LoRA on every linear layer of every block",
    "last-K": "the last K blocks and what follows them train fully",
    "thirds": "SPAFIT's three methods on thirds of the depth",
    "spafit-scaled-I": "SPAFIT's boundaries 4-9 of 24 at this model's depth; LoRA on query, key, value",
    "spafit-scaled-II": "the same, LoRA on the attention's output, too",
    "spafit-N1-N2-I": "frozen up to block N1, biases up to block N2, then LoRA on query, key, value and some biases",
    "spafit-N1-N2-II": "the same, LoRA on the attention's output, too",
    "count-only:PRESET": "as many trained blocks as PRESET has, the last ones, all as its third stratum",
    "reversed:PRESET": "PRESET's strata in the opposite order of depth",
    "random:PRESET:SEED": "PRESET's blocks with their methods dealt out at random",
    "bias-added:PRESET": "PRESET with new biases, rather than norms, in blocks that have none",
    "lora-matched:PRESET": "LoRA on all blocks at the rank that comes nearest to PRESET's parameter count",
}
#: Biases that train in SPAFIT's third stratum: those of the feed-forward sub-layer, not the attention's.
THIRD_STRATUM_BIASES = ("intermediate", "output", "output_norm")
#: Sub-layers of a block whose every linear map and norm has a bias.
_USUAL_ROLES = tuple(r for r in ROLES if not r.startswith("cross"))
TARGETS = {"I": ("query", "key", "value"), "II": ("query", "key", "value", "attention_output")}


def scaled_boundaries(num_blocks: int) -> tuple[int, int]:
    """SPAFIT-4-9's boundaries (5 and 10 of 24) at another depth: (⌊5L/24 + ½⌋, ⌊10L/24 + ½⌋)."""
    return (10 * num_blocks + 24) // 48, (20 * num_blocks + 24) // 48


def third_boundaries(num_blocks: int) -> tuple[int, int]:
    """Boundaries of three strata of equal depth: (L/3, 2L/3), rounded."""
    return (2 * num_blocks + 3) // 6, (4 * num_blocks + 3) // 6


def spafit_parameters(
    n1: int,
    n2: int,
    *,
    num_blocks: int,
    width: int,
    labels: int,
    rank: int = 64,
    adapter_type: Literal["I", "II"] = "I",
    intermediate_size: int | None = None,
) -> int:
    """Trainable parameters of SPAFIT-N1-N2 on a model built like BERT, by formula.

    With L blocks of width w, intermediate size m, rank r, and k = 3 targets (type I) or 4 (II), each a w × w matrix:

    - third stratum, L − 1 − N2 blocks: low-rank updates k·2rw, and the biases of intermediate (m), output (w) and
      output_norm (w);
    - second stratum, N2 − N1 blocks: all biases, 7w + m (query, key, value, attention output, two norms, output; and
      intermediate);
    - the pooler's bias, w, and the classifier, (w + 1)·labels.

    It says nothing of models whose blocks have other sub-layers, shared blocks or missing biases; there, apply the
    plan and count. The paper's 5.65 M (4-9-I) and 7.49 M (4-9-II) on BERT-large agree (Arora & Wang 2024,
    arXiv 2405.00201).

    Args:
        n1: last frozen block.
        n2: last block of the second stratum.
        num_blocks: blocks of the model, L.
        width: size of the residual stream, w.
        labels: outputs of the classifier; 1 for regression.
        rank: rank of each update, r.
        adapter_type: ``I`` or ``II``.
        intermediate_size: size of the feed-forward sub-layer, m; None takes 4w.

    Raises:
        ConfigError: not 0 ≤ N1 ≤ N2 < L, a size below 1, or an unknown type.
    """
    if not 0 <= n1 <= n2 < num_blocks:
        raise ConfigError(f"N1 = {n1} and N2 = {n2} are not allowed: 0 ≤ N1 ≤ N2 < {num_blocks} blocks must hold.")
    middle = 4 * width if intermediate_size is None else intermediate_size
    sizes = {"width": width, "labels": labels, "rank": rank, "intermediate_size": middle}
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"{name} is {size}; it must be at least 1.")
    targets = len(TARGETS[_known_type(adapter_type)])
    third = targets * 2 * rank * width + middle + 2 * width
    second = 7 * width + middle
    return third * (num_blocks - 1 - n2) + second * (n2 - n1) + width + (width + 1) * labels


def three_strata_config(
    boundaries: Mapping[str, tuple[int, int]],
    *,
    blocks: Mapping[str, int],
    adapter_type: Literal["I", "II"] = "I",
    lora: LoraOptions | None = None,
    bias_roles: Mapping[str, Collection[str]] | None = None,
    model_id: str = "unnamed",
    provenance: Mapping[str, Any] | None = None,
    bias_free: Literal["norm", "bias-added"] = "norm",
    roles: Mapping[str, Collection[str]] | None = None,
) -> StrataConfig:
    """SPAFIT's three strata (Arora & Wang 2024, arXiv 2405.00201) at the boundaries (s1, s2) of each stack.

    Blocks [0, s1) are frozen, [s1, s2) train their biases, [s2, L) train low-rank updates and the feed-forward
    sub-layer's biases. Empty strata are left out. Where the blocks have no such bias, ``bias_free`` stands in BitFit's
    place, and provenance says so under ``substitutions``; there it also stands which biases BitFit trains where only
    some sub-layers have one.

    Args:
        boundaries: (s1, s2) per stack, 0 ≤ s1 ≤ s2 ≤ L.
        blocks: number of blocks per stack.
        adapter_type: ``I`` puts LoRA on query, key and value, ``II`` also on the attention's output.
        lora: rank, alpha and dropout (its targets are replaced by the type's); default rank 64.
        bias_roles: per stack, the roles whose sub-layers have a bias; None means all of them have.
        model_id: the model's reference, for people.
        provenance: source, criterion and so on.
        bias_free: what stands in BitFit's place: ``norm`` trains the blocks' norms, ``bias-added`` gives the linear
            maps that would train a bias a new one.
        roles: per stack, the roles that its blocks have; None means all. Where the feed-forward sub-layer has no linear
            map (experts that share one matrix), ``norm`` stays in the third stratum.

    Raises:
        ConfigError: boundaries out of order or range, an unknown type, or a stack without boundaries.
    """
    _known_type(adapter_type)
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
            strata.append(Stratum(stack, (s1, s2), "bitfit" if present else bias_free))
            substitutions += _said_of_bitfit(stack, (s1, s2), present, bias_free)
        if count > s2:
            there = LINEAR_ROLES if roles is None else roles.get(stack, ())
            maps = tuple(r for r in THIRD_STRATUM_BIASES if r in LINEAR_ROLES and r in there)
            method = "lora+bitfit" if upper else f"lora+{bias_free if maps else 'norm'}"
            added = maps if method == "lora+bias-added" else None
            strata.append(Stratum(stack, (s2, count), method, options, bitfit=upper or None, bias_added=added))
            if not upper:
                to = f" to {', '.join(added)}" if added else ""
                substitutions.append(
                    f"{stack} [{s2}, {count}): {method} for lora+bitfit{to}, no bias in "
                    f"{', '.join(THIRD_STRATUM_BIASES)}"
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


def _said_of_bitfit(stack: str, blocks: tuple[int, int], present: Collection[str], bias_free: str) -> list[str]:
    """What provenance says of a stratum of BitFit: what stands in its place, or which biases are the only ones."""
    where = f"{stack} [{blocks[0]}, {blocks[1]})"
    if not present:
        return [f"{where}: {bias_free} for bitfit, the blocks have no bias"]
    if set(_USUAL_ROLES) <= set(present):
        return []
    return [f"{where}: bitfit trains the biases of {', '.join(r for r in ROLES if r in present)}, the only ones"]


def preset_config(
    name: str,
    *,
    blocks: Mapping[str, int] | int,
    bias_roles: Mapping[str, Collection[str]] | None = None,
    model_id: str = "unnamed",
    roles: Mapping[str, Collection[str]] | None = None,
    count: Callable[[StrataConfig], int] | None = None,
) -> StrataConfig:
    """A named plan for a model. Every stack is treated alike; the head always trains in full.

    SPAFIT (head in full, the pooler's bias, embeddings frozen):

    - ``spafit-N1-N2-I`` and ``-II`` keep the paper's inclusive ends: blocks 0…N1 frozen, N1+1…N2 BitFit, the rest
      LoRA and biases, so ``spafit-4-9-I`` has its starts at (5, 10).
    - ``spafit-scaled-I`` and ``-II`` put those starts at the same share of the depth; ``thirds`` puts them at thirds.

    One method for all blocks:

    - ``full``: every parameter. ``head``: the head alone.
    - ``bitfit``: every bias of the model. ``norm``: every norm.
    - ``lora``: rank 64 on query, key and value. ``lora-all-linear``: on every linear map of the blocks.
    - ``last-K``: the last K blocks and what follows them in full.

    What to compare another plan with (names nest, as in ``reversed:spafit-4-9-I``):

    - ``count-only:PRESET``, ``reversed:PRESET``, ``random:PRESET:SEED``, ``lora-matched:PRESET``: see
      :mod:`spafit.derived_plans`.

    Where blocks have no bias, ``norm`` stands in BitFit's place, and provenance says so under ``substitutions``.
    ``bias-added:PRESET`` gives those blocks new biases in its place: all linear maps of a BitFit stratum, those of
    the feed-forward sub-layer in SPAFIT's third.

    Args:
        name: the preset; upper and lower case are the same.
        blocks: number of blocks per stack, or one number for a single stack named ``encoder``.
        bias_roles: per stack, the roles whose sub-layers have a bias; None means all of them have.
        model_id: the model's reference, for people.
        roles: per stack, the roles that its blocks have; ``lora-all-linear`` needs it.
        count: number of parameters that a plan trains on the model; ``count-only`` and ``lora-matched`` need it.

    Raises:
        ConfigError: unknown name, numbers that do not fit the model's depth, or a preset that needs ``roles`` or
            ``count`` without it.
    """
    counts = {"encoder": blocks} if isinstance(blocks, int) else dict(blocks)
    model = _Model(counts, bias_roles, model_id, roles, count)
    return _named(name, model, whole=name)


@dataclass(frozen=True)
class _Model:
    """What presets know of a model; fields as the arguments of :func:`preset_config`."""

    blocks: Mapping[str, int]
    bias_roles: Mapping[str, Collection[str]] | None
    model_id: str
    roles: Mapping[str, Collection[str]] | None
    count: Callable[[StrataConfig], int] | None
    bias_free: Literal["norm", "bias-added"] = "norm"

    def every_block(
        self, name: str, method: str, outside: Outside, *, lora: Mapping[str, LoraOptions] | None = None
    ) -> StrataConfig:
        """One method for all blocks; ``lora`` holds each stack's options."""
        options = lora or {}
        strata = [Stratum(stack, (0, n), method, options.get(stack)) for stack, n in self.blocks.items()]
        return self.config(name, strata, outside)

    def config(
        self, name: str, strata: list[Stratum], outside: Outside, *, substitutions: list[str] | None = None
    ) -> StrataConfig:
        provenance = _provenance(name) | ({"substitutions": substitutions} if substitutions else {})
        return StrataConfig(self.model_id, self.blocks, tuple(strata), outside, provenance)


def _provenance(name: str) -> dict[str, Any]:
    return {"source": f"preset {name}", "criterion": "none: set by hand", "tested": False}


def _named(name: str, model: _Model, *, whole: str) -> StrataConfig:
    """The plan ``name``, a part of the name ``whole`` that the user wrote."""
    wanted = name.lower()
    prefix, colon, inner = wanted.partition(":")
    if colon and prefix == "bias-added":
        return _bias_added(inner, model, whole=whole)
    if colon and prefix in _DERIVED:
        return _derived(prefix, inner, model, whole=whole)
    if wanted in _PLAIN:
        return _PLAIN[wanted](model)
    if match := re.fullmatch(r"last-(\d{1,6})", wanted):
        return _last(int(match[1]), model)
    if match := re.fullmatch(r"spafit-(?:scaled|(\d{1,6})-(\d{1,6}))-(i{1,2})", wanted):
        kind: Literal["I", "II"] = "I" if match[3] == "i" else "II"
        if match[1] is None:
            return _spafit(f"spafit-scaled-{kind}", scaled_boundaries, model, kind)
        return _spafit_n1_n2(int(match[1]), int(match[2]), model, kind)
    inside = f" in {whole!r}" if whole != name else ""
    hint = did_you_mean(prefix, ("bias-added", *_DERIVED)) if colon else did_you_mean(wanted, PRESETS)
    raise ConfigError(
        f"Preset {name!r}{inside} is not known. Allowed: {', '.join(PRESETS)} (N1, N2, K and SEED are whole numbers, "
        f"PRESET is a preset, as in spafit-4-9-I and reversed:last-3).{hint}"
    )


def _spafit(
    name: str, boundaries: Callable[[int], tuple[int, int]], model: _Model, kind: Literal["I", "II"] = "I"
) -> StrataConfig:
    return three_strata_config(
        {stack: boundaries(n) for stack, n in model.blocks.items()},
        blocks=model.blocks,
        adapter_type=kind,
        bias_roles=model.bias_roles,
        model_id=model.model_id,
        provenance=_provenance(name),
        bias_free=model.bias_free,
        roles=model.roles,
    )


def _bias_added(inner: str, model: _Model, *, whole: str) -> StrataConfig:
    """The plan ``inner`` with new biases where it would have norms in BitFit's place."""
    if not inner:
        raise ConfigError(f"Preset {whole!r}: bias-added needs a preset, as in bias-added:spafit-scaled-I.")
    plan = _named(inner, replace(model, bias_free="bias-added"), whole=whole)
    source = str(plan.provenance["source"]).removeprefix("preset ")
    if not any(s.adds_biases for s in plan.strata):
        raise ConfigError(
            f"Preset {whole!r}: {source} puts nothing in BitFit's place on this model, so there is no bias to add. "
            f"Write {source}."
        )
    return plan.with_provenance({"source": f"preset bias-added:{source}"})


def _spafit_n1_n2(n1: int, n2: int, model: _Model, kind: Literal["I", "II"]) -> StrataConfig:
    name = f"spafit-{n1}-{n2}-{kind}"
    if n1 > n2:
        raise ConfigError(f"Preset {name!r}: N1 = {n1} is above N2 = {n2}; N1 ≤ N2 must hold.")
    for stack, n in model.blocks.items():
        if n2 >= n:
            raise ConfigError(
                f"Preset {name!r} names block {n2}, but stack {stack!r} has {n} blocks (0 to {n - 1}). Lower N2, or "
                f"use spafit-scaled-{kind}."
            )
    return _spafit(name, lambda _: (n1 + 1, n2 + 1), model, kind)


def _last(k: int, model: _Model) -> StrataConfig:
    name = f"last-{k}"
    if k < 1:
        raise ConfigError(f"Preset {name!r} trains no block. Use head, or a K of at least 1.")
    strata = []
    for stack, n in model.blocks.items():
        if k > n:
            raise ConfigError(f"Preset {name!r}: stack {stack!r} has {n} blocks. Lower K, or use full.")
        if k < n:
            strata.append(Stratum(stack, (0, n - k), "freeze"))
        strata.append(Stratum(stack, (n - k, n), "full"))
    return model.config(name, strata, Outside(pooler="full", final_norm="full"))


def _bitfit(model: _Model) -> StrataConfig:
    """BitFit trains every bias of the model (Ben Zaken et al. 2022, arXiv 2106.10199)."""
    present = {s: model.bias_roles is None or bool(model.bias_roles.get(s)) for s in model.blocks}
    strata = [Stratum(s, (0, n), "bitfit" if present[s] else model.bias_free) for s, n in model.blocks.items()]
    substitutions = []
    for s, n in model.blocks.items():
        roles = ROLES if model.bias_roles is None else model.bias_roles.get(s, ())
        substitutions += _said_of_bitfit(s, (0, n), roles, model.bias_free)
    around = "bitfit" if any(present.values()) else "norm"
    outside = Outside(embeddings=around, pooler=around, final_norm=around, projector=around)
    return model.config("bitfit", strata, outside, substitutions=substitutions)


def _lora_all_linear(model: _Model) -> StrataConfig:
    if model.roles is None:
        raise ConfigError(
            "Preset 'lora-all-linear' needs to know which linear maps the blocks have. Apply it to a model, or give "
            "roles."
        )
    options = {}
    for stack in model.blocks:
        targets = tuple(r for r in LINEAR_ROLES if r in model.roles.get(stack, ()))
        if not targets:
            raise ConfigError(
                f"Preset 'lora-all-linear': no linear map is known in the blocks of stack {stack!r}. Write a plan with "
                "another method for this stack."
            )
        options[stack] = LoraOptions(targets=targets)
    return model.every_block("lora-all-linear", "lora", Outside(pooler="freeze"), lora=options)


_PLAIN: dict[str, Callable[[_Model], StrataConfig]] = {
    "full": lambda m: m.every_block("full", "full", Outside("full", "full", "full", "full", "full")),
    "head": lambda m: m.every_block("head", "freeze", Outside(pooler="freeze")),
    "norm": lambda m: m.every_block("norm", "norm", Outside("norm", "norm", "full", "norm", "norm")),
    "lora": lambda m: m.every_block("lora", "lora", Outside(pooler="freeze")),
    "lora-all-linear": _lora_all_linear,
    "bitfit": _bitfit,
    "thirds": lambda m: _spafit("thirds", third_boundaries, m),
}
_DERIVED = ("count-only", "reversed", "random", "lora-matched")


def _derived(prefix: str, inner: str, model: _Model, *, whole: str) -> StrataConfig:
    from spafit.derived_plans import count_only_plan, lora_matched_plan, random_plan, reversed_plan

    seed = 0
    if prefix == "random":
        inner, _, last = inner.rpartition(":")
        if not inner or not re.fullmatch(r"\d{1,18}", last):
            raise ConfigError(f"Preset {whole!r}: random needs a preset and a seed, as in random:spafit-scaled-I:0.")
        seed = int(last)
    elif not inner:
        raise ConfigError(f"Preset {whole!r}: {prefix} needs a preset, as in {prefix}:spafit-scaled-I.")
    plan = _named(inner, model, whole=whole)
    canonical = f"{prefix}:{plan.provenance['source'].removeprefix('preset ')}"
    if prefix == "reversed":
        derived = reversed_plan(plan)
    elif prefix == "random":
        derived, canonical = random_plan(plan, seed=seed), f"{canonical}:{seed}"
    elif model.count is None:
        raise ConfigError(
            f"Preset {whole!r} looks for the rank with the nearest number of trainable parameters, which only a model "
            "tells. Apply it to a model, or give count."
        )
    elif prefix == "lora-matched":
        derived = lora_matched_plan(plan, count=model.count)
    else:
        derived = count_only_plan(plan, count=model.count, bias_roles=model.bias_roles, roles=model.roles)
    return derived.with_provenance({"source": f"preset {canonical}"})


def _known_type(adapter_type: str) -> str:
    if adapter_type not in TARGETS:
        raise ConfigError(f"adapter_type {adapter_type!r} is not known. Allowed: {', '.join(TARGETS)}.")
    return adapter_type
