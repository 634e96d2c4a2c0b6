"""Plans with given methods at given boundaries; methods are written ``freeze``, ``bitfit``, ``lora+bitfit:16``."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from spafit.errors import UsageError, did_you_mean
from spafit.presets import TARGETS, THIRD_STRATUM_BIASES
from spafit.strata import LoraOptions, Outside, StrataConfig, Stratum
from spafit.stratum import METHODS, ROLES

AdapterType = Literal["I", "II"]


def on_model(methods: Sequence[str], bias_roles: Collection[str] | None, *, rank: int = 64) -> tuple[str, ...]:
    """Methods in full: low-rank ones with their rank, and norms in place of biases where the blocks have none.

    Args:
        methods: such as ``bitfit``, ``lora+bitfit`` (of rank ``rank``), ``lora+bitfit:16``.
        bias_roles: roles whose sub-layers have a bias; None means all.
        rank: of low-rank methods that name none.

    Raises:
        UsageError: an unknown method, or a rank where there is none.
    """
    found = []
    for given in methods:
        method, colon, own = given.partition(":")
        if method not in METHODS:
            raise UsageError(
                f"The method {given!r} is not known. Methods: {', '.join(METHODS)}; low-rank ones take a rank, as in "
                f"lora:16.{did_you_mean(method, METHODS)}"
            )
        low_rank = method.startswith("lora") or method == "dora"
        if colon and not (low_rank and own.isdigit() and int(own) > 0):
            what = "a rank is a whole number above 0" if low_rank else f"{method} has no rank"
            raise UsageError(f"The method {given!r} cannot be used: {what}.")
        if bias_roles is not None and not set(THIRD_STRATUM_BIASES) & set(bias_roles) and method == "lora+bitfit":
            method = "lora+norm"
        if bias_roles is not None and not bias_roles and method == "bitfit":
            method = "norm"
        found.append(f"{method}:{own or rank}" if low_rank else method)
    return tuple(found)


def placed_strata(
    methods: Sequence[str],
    boundaries: Sequence[int],
    *,
    stack: str,
    num_blocks: int,
    bias_roles: Collection[str] | None = None,
    adapter_type: AdapterType = "I",
    model_id: str = "unnamed",
    provenance: Mapping[str, Any] | None = None,
) -> StrataConfig:
    """A plan with ``methods`` from the first block up, each from its boundary on; empty strata are left out.

    Low-rank methods update query, key and value (type II: also the attention's output), and ``lora+bitfit`` trains the
    feed-forward sub-layer's biases beside them, as SPAFIT's third stratum does. The pooler trains its bias (its norm in
    models without biases), the head in full.

    Args:
        methods: from :func:`on_model`.
        boundaries: first block of the second and further methods, ascending.
        stack: the stack.
        num_blocks: L.
        bias_roles: roles whose sub-layers have a bias; None means all.
        adapter_type: SPAFIT's type.
        model_id: the model's reference.
        provenance: source and so on.

    Raises:
        ConfigError: methods that do not fit into one PEFT adapter.
    """
    ends = [0, *boundaries, num_blocks]
    present = set(ROLES if bias_roles is None else bias_roles)
    strata = []
    for given, start, stop in zip(methods, ends, ends[1:], strict=False):
        if stop <= start:
            continue
        method, _, rank = given.partition(":")
        lora = LoraOptions(int(rank), targets=TARGETS[adapter_type]) if rank else None
        upper = tuple(r for r in THIRD_STRATUM_BIASES if r in present) if method == "lora+bitfit" else None
        strata.append(Stratum(stack, (start, stop), method, lora, bitfit=upper))
    pooler = "bitfit" if present else "norm"
    return StrataConfig(model_id, {stack: num_blocks}, tuple(strata), Outside(pooler=pooler), dict(provenance or {}))
