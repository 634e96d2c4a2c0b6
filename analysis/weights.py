"""How far the weights moved in training: size, rank and direction of each parameter's change."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, Literal

import numpy as np
import pandas as pd

from spafit.errors import NumericalError, UsageError

COLUMNS = (
    "name",
    "kind",
    "shape",
    "change",
    "norm",
    "relative",
    "stable_rank",
    "energy_rank",
    "full_rank",
    "intruders",
    "reason",
)
#: Leading left singular vectors of the weight after training that are compared with the base's.
TOP = 10
#: A leading vector whose largest |cosine| with any of the base's is below this is an intruder.
THRESHOLD = 0.5
#: Share of the squared singular values that ``energy_rank`` covers.
ENERGY = 0.9


def weight_drift(before: Mapping[str, Any], after: Mapping[str, Any], *, in_out: Collection[str] = ()) -> pd.DataFrame:
    """Change of each parameter from one state dict to another, one row per name.

    Sizes are Frobenius norms, all in float64. Ranks are of the change: stable rank ‖ΔW‖²_F / ‖ΔW‖²_2, and the
    fewest singular values that hold 90 % of its energy. Intruder dimensions (Shuttleworth et al. 2024,
    arXiv 2410.21228, section 3) are counted among the ten leading left singular vectors of the weight *after*: those
    whose largest |cosine| with all left singular vectors of the base is below .5.

    Do not read a relative change as an effect on the output: a bias of norm near 0 changes by a large factor at once.
    Do not count intruders across modules of fewer than about ten outputs, where every vector has close neighbours, nor
    in nearly random weights, whose neighbouring singular vectors mix. Tied parameters appear under each of their names.

    Args:
        before: name → tensor (NumPy or torch, floating point) before training; others, such as position indices, are
            left out.
        after: the same after training, adapters merged; see :func:`low_rank_drift` for adapters that are not.
        in_out: names of matrices that are stored inputs × outputs (GPT-2's Conv1D), so that "left" stays the output.

    Returns:
        Columns :data:`COLUMNS`: ``name``; ``kind`` (``matrix``, for two or more axes; ``bias``; ``norm``, weights and
        biases of normalisation layers; ``vector``, anything else); ``shape``; ``change`` ‖ΔW‖; ``norm`` ‖W‖ before;
        ``relative``, their ratio; for matrices ``stable_rank``, ``energy_rank``, ``full_rank`` (the largest that the
        shape allows) and ``intruders`` (0 to 10), NaN where nothing changed; ``reason``, why a number is NaN.

    Raises:
        UsageError: no name is shared, or a name of ``in_out`` is not a matrix of both.
        NumericalError: a weight is not finite.
    """
    shared = [name for name in before if name in after]
    if not shared:
        raise UsageError(
            f"The two sets of weights share no name (before: {_few(before)}; after: {_few(after)}). "
            "Take both from the same class of model, adapters merged."
        )
    unknown = [name for name in in_out if name not in shared]
    if unknown:
        raise UsageError(f"in_out names {unknown[0]!r}, which is not a weight of both; some that are: {_few(shared)}.")
    rows = []
    for name in [*before, *(n for n in after if n not in before)]:
        sides = [_array(name, side[name]) for side in (before, after) if name in side]
        if any(side is None for side in sides):
            continue
        present = [side for side in sides if side is not None]
        if len(present) < 2:
            where = "before" if name in before else "after"
            rows.append(_row(name, present[0].shape, reason=f"only there {where}"))
        elif present[0].shape != present[1].shape:
            reason = f"the shape differs: {_shape(present[0].shape)} before, {_shape(present[1].shape)} after"
            rows.append(_row(name, present[0].shape, reason=reason))
        else:
            rows.append(_one(name, *present, transpose=name in in_out))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def low_rank_drift(
    name: str,
    base: Any,
    *,
    a: Any,
    b: Any,
    scale: float = 1.0,
    layout: Literal["out-in", "in-out"] = "out-in",
) -> pd.DataFrame:
    """:func:`weight_drift` of a LoRA update ΔW = scale · B·A, without forming it.

    QR of B and of Aᵀ leaves a rank × rank matrix with ΔW's singular values. The leading left vectors of W + ΔW come
    from products with W, A and B alone (implicitly restarted Lanczos); the base's come from W·Wᵀ.

    Args:
        name: the module's name.
        base: frozen weight W, outputs × inputs.
        a: LoRA's A, rank × inputs.
        b: LoRA's B, outputs × rank.
        scale: what the product is multiplied by: alpha / rank, or alpha / √rank for rsLoRA.
        layout: ``in-out`` where ``base`` is stored inputs × outputs (GPT-2's Conv1D).

    Returns:
        One row with the columns of :func:`weight_drift`.

    Raises:
        UsageError: the shapes do not fit.
        NumericalError: a weight is not finite.
    """
    arrays = [_array(name, tensor) for tensor in (base, a, b)]
    if any(array is None or array.ndim != 2 for array in arrays):
        raise UsageError(f"{name}: base, a and b must be floating-point matrices.")
    w, a, b = (np.asarray(array) for array in arrays)
    if layout == "in-out":
        w = w.T
    elif layout != "out-in":
        raise UsageError(f"The layout must be 'out-in' or 'in-out'; got {layout!r}.")
    if w.shape != (len(b), a.shape[1]) or len(a) != b.shape[1]:
        raise UsageError(
            f"{name}: W {_shape(w.shape)} (outputs × inputs), A {_shape(a.shape)} (rank × inputs) and "
            f"B {_shape(b.shape)} (outputs × rank) do not fit; for weights stored inputs × outputs give "
            "layout='in-out'."
        )
    core = np.linalg.qr(b).R @ np.linalg.qr(a.T).R.T
    singular = abs(scale) * np.linalg.svd(core, compute_uv=False)
    shape = w.T.shape if layout == "in-out" else w.shape
    row = _row(name, shape, change=float(np.linalg.norm(singular)), norm=float(np.linalg.norm(w)))
    if row["change"] == 0:
        return pd.DataFrame([{**row, "reason": "unchanged"}], columns=list(COLUMNS))
    row |= _ranks(singular**2, min(w.shape))
    row["intruders"] = _intruders(_left_vectors(w), _leading_of_sum(w, a, b, scale))
    return pd.DataFrame([row], columns=list(COLUMNS))


def _one(name: str, before: np.ndarray, after: np.ndarray, *, transpose: bool) -> dict[str, object]:
    """One row for a parameter that both sides hold in the same shape."""
    change = after - before
    row = _row(name, before.shape, change=float(np.linalg.norm(change)), norm=float(np.linalg.norm(before)))
    if row["change"] == 0:
        return {**row, "reason": "unchanged"}
    if row["kind"] != "matrix":
        return row
    w, moved, change = (m.reshape(len(m), -1) for m in (before, after, change))
    if transpose:
        w, moved, change = w.T, moved.T, change.T
    small = change @ change.T if len(change) <= change.shape[1] else change.T @ change
    energies = np.maximum(np.linalg.eigvalsh(small)[::-1], 0)
    row |= _ranks(energies, min(change.shape))
    row["intruders"] = _intruders(_left_vectors(w), _left_vectors(moved)[:, :TOP])
    return row


def _ranks(energies: np.ndarray, full: int) -> dict[str, float]:
    """Stable and energy rank from squared singular values, largest first."""
    shares = np.cumsum(energies) / energies.sum()
    return {
        "stable_rank": float(energies.sum() / energies[0]),
        "energy_rank": float(np.searchsorted(shares, ENERGY - 1e-12) + 1),
        "full_rank": float(full),
    }


def _left_vectors(w: np.ndarray) -> np.ndarray:
    """All left singular vectors (outputs, min(outputs, inputs)), strongest first."""
    if len(w) <= w.shape[1]:
        return np.linalg.eigh(w @ w.T)[1][:, ::-1]
    return np.linalg.svd(w, full_matrices=False)[0]


def _leading_of_sum(w: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """The leading left singular vectors of w + scale · b·a."""
    top, smaller = TOP, min(w.shape)
    if smaller <= 2 * top + 1:  # as small as the work space that Lanczos would need
        return _left_vectors(w + scale * (b @ a))[:, :top]
    from scipy.sparse.linalg import LinearOperator, eigsh

    def times(vectors: np.ndarray) -> np.ndarray:
        back = w.T @ vectors + scale * (a.T @ (b.T @ vectors))
        return w @ back + scale * (b @ (a @ back))

    operator = LinearOperator((len(w), len(w)), matvec=times, matmat=times, dtype=np.float64)
    start = np.random.default_rng(0).normal(size=len(w))
    return eigsh(operator, k=top, v0=start, tol=1e-10)[1][:, ::-1]


def _intruders(base: np.ndarray, leading: np.ndarray) -> float:
    """How many columns of ``leading`` have no close column in ``base``."""
    return float((np.abs(base.T @ leading).max(axis=0) < THRESHOLD).sum())


def _kind(name: str, shape: tuple[int, ...]) -> str:
    """What a parameter is, by its name and number of axes."""
    parts = name.lower().split(".")
    module = parts[-2] if len(parts) > 1 else ""
    if len(shape) < 2 and ("norm" in module or module.startswith("ln") or module in ("bn", "bn1", "bn2")):
        return "norm"
    if len(shape) < 2:
        return "bias" if "bias" in parts[-1] else "vector"
    return "matrix"


def _row(
    name: str, shape: tuple[int, ...], *, change: float = math.nan, norm: float = math.nan, reason: str = ""
) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(COLUMNS, math.nan)
    row |= {"name": name, "kind": _kind(name, shape), "shape": _shape(shape), "change": change, "norm": norm}
    row["reason"] = reason
    if norm > 0:
        row["relative"] = change / norm
    elif norm == 0:
        row["relative"] = 0.0 if change == 0 else math.nan
        row["reason"] = reason if change == 0 else "zero before: no relative change"
    return row


def _array(name: str, tensor: Any) -> np.ndarray | None:
    """A float64 array; None for what is not floating point."""
    if hasattr(tensor, "detach"):
        if not tensor.is_floating_point():
            return None
        tensor = tensor.detach().cpu().double().numpy()
    array = np.asarray(tensor)
    if array.dtype.kind != "f":
        return None
    array = array.astype(np.float64, copy=False)
    if not np.isfinite(array).all():
        raise NumericalError(f"The weight {name!r} holds NaN or infinite values; the training has diverged.")
    return array


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def _few(names: Collection[str]) -> str:
    """The first names, for a message."""
    return ", ".join(list(names)[:3]) or "none"
