"""Weights between a trained model and its start: one share, swept after training (WiSE-FT; Wortsman et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from spafit.errors import ModelError, UsageError

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from spafit.adapt import StratifiedModel

Head = Literal["interpolate", "trained"]


def snapshot(stratified: StratifiedModel) -> dict[str, torch.Tensor]:
    """Copies of the parameters that train, by canonical name: the start, for a plan in which everything trains."""
    from spafit.adapt import canonical_parameters

    parameters = canonical_parameters(stratified.model)
    return {name: parameters[name].detach().clone() for name in stratified.trainable}


@contextmanager
def interpolate(
    stratified: StratifiedModel,
    share: float,
    *,
    start: Mapping[str, torch.Tensor] | None = None,
    head: Head = "interpolate",
) -> Iterator[None]:
    """Inside the block the weights are start + share · (trained − start); afterwards the trained ones, to the bit.

    Parameters that train in place or whole move on a straight line; a LoRA update is scaled through PEFT's own factor,
    so that merged weights are start + share · ΔW. A share of 0 gives the start exactly, 1 the trained model exactly.

    Args:
        stratified: a trained model; merging and saving inside the block give the interpolated one (a saved LoRA
            adapter does not: its file has the trained factors, so merge first).
        share: from 0 (start) to 1 (trained).
        start: :func:`snapshot` from before training; needed, and read, only where every parameter trains.
        head: ``trained`` leaves the head as trained, for a head that started from random weights.

    Raises:
        UsageError: a share outside [0, 1].
        ModelError: the plan holds DoRA, IA3 or another method whose weights do not lie on a line; or every parameter
            trains and no start is given.
    """
    import torch

    from spafit.adapt import ADAPTER, canonical_parameters

    if isinstance(share, bool) or not 0 <= share <= 1:
        raise UsageError(f"The share must lie between 0 (start) and 1 (trained); got {share!r}.")
    check_line(stratified)
    origin = _origin(stratified, start)
    targets = [target for part in stratified.plan.parts for target in part.targets]
    layers = [stratified.model.get_base_model().get_submodule(t) for t in targets]
    parameters = canonical_parameters(stratified.model)
    moving = {n: t for n, t in origin.items() if head == "interpolate" or stratified.part_of[n] != "head"}
    trained = {name: parameters[name].detach().clone() for name in moving}
    factors = [layer.scaling[ADAPTER] for layer in layers]
    try:
        with torch.no_grad():
            for name, value in moving.items():
                # lerp gives both ends to the bit, which start + share · (trained − start) does not.
                parameters[name].copy_(torch.lerp(value.to(trained[name]), trained[name], share))
        for layer, factor in zip(layers, factors, strict=True):
            layer.scaling[ADAPTER] = share * factor
        yield
    finally:
        with torch.no_grad():
            for name, value in trained.items():
                parameters[name].copy_(value)
        for layer, factor in zip(layers, factors, strict=True):
            layer.scaling[ADAPTER] = factor


def check_line(stratified: StratifiedModel) -> None:
    """See that a plan's weights lie on straight lines between start and trained.

    Raises:
        ModelError: the plan holds DoRA, IA3 or another method whose weights do not.
    """
    for part in stratified.plan.parts:
        if part.targets and (part.stratum is None or part.stratum.lora is None or part.method == "dora"):
            raise ModelError(
                f"{part.name} trains with {part.method}, whose weights do not lie on a straight line between start and "
                "trained. Interpolation knows bitfit, norm, full and lora."
            )


def sweep(
    stratified: StratifiedModel,
    shares: Sequence[float],
    *,
    score: Callable[[], float],
    start: Mapping[str, torch.Tensor] | None = None,
    head: Head = "interpolate",
) -> pd.DataFrame:
    """Score the model at several shares: columns share, score. The model is left as it was.

    A share that is chosen by these scores has been selected on their items: report it on others.

    Args:
        stratified: a trained model.
        shares: from 0 (start) to 1 (trained).
        score: called without arguments while the model has the interpolated weights.
        start: see :func:`interpolate`.
        head: see :func:`interpolate`.

    Raises:
        UsageError, ModelError: see :func:`interpolate`.
    """
    import pandas as pd

    rows = []
    for share in shares:
        with interpolate(stratified, share, start=start, head=head):
            rows.append({"share": float(share), "score": float(score())})
    return pd.DataFrame(rows, columns=["share", "score"])


def _origin(stratified: StratifiedModel, start: Mapping[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
    """Start of everything that trains in place or whole, by canonical name."""
    from spafit.adapt import canonical_name

    if not stratified.is_adapter:
        if start is None or set(start) != set(stratified.trainable):
            raise ModelError(
                "Every parameter of this model trains and none of its start is kept. Call snapshot() before training "
                "and give the result as start."
            )
        return dict(start)
    first = {canonical_name(n): p.detach() for n, p in stratified.model.named_parameters() if ".original_module." in n}
    return {**stratified.base_values, **{n: t for n, t in first.items() if n in stratified.trainable}}
