"""Summaries of scalar mixes and of cumulative probes: where the weights lie, and where each layer adds to those below.

Layers are hidden indices: 0 is the embeddings, k + 1 the output of block k. Information is in bits.
"""

from __future__ import annotations

import math

import numpy as np

from probing.curves import LayerCurve
from probing.summaries import MIN_GAIN_SE, SummaryRow, emergence, expected_layer
from spafit.errors import NumericalError, UsageError
from spafit.stats import interval

#: Weights nearer to uniform than this many bits of KL divergence say nothing about a centre.
MIN_KL = 0.05


def mix_centre(weights: np.ndarray, hidden: np.ndarray | None = None) -> np.ndarray:
    """Centre of gravity Σ l·s_l of mixing weights (Tenney et al. 2019, eq. 3), over the last axis.

    Do not trust it where :func:`kl_from_uniform` is near zero: uniform weights have their centre in the middle.

    Args:
        weights: s, (…, layers); not negative, sum one.
        hidden: hidden indices; 0, 1, 2, … if None.
    """
    s = _checked(weights)
    layers = np.arange(s.shape[-1]) if hidden is None else np.asarray(hidden)
    return s @ layers.astype(np.float64)


def mix_entropy(weights: np.ndarray) -> np.ndarray:
    """Entropy of mixing weights in bits, over the last axis; between 0 and log2 of the number of layers."""
    s = _checked(weights)
    return -(s * np.log2(np.where(s > 0, s, 1.0))).sum(-1) + 0.0


def kl_from_uniform(weights: np.ndarray) -> np.ndarray:
    """K(s) = KL(s ‖ uniform) in bits, over the last axis: log2 of the number of layers minus the entropy."""
    return np.maximum(math.log2(np.shape(weights)[-1]) - mix_entropy(weights), 0.0)


def summarize_weights(
    weights: np.ndarray,
    norm_corrected: np.ndarray | None = None,
    *,
    hidden: np.ndarray | None = None,
    seed_counts: np.ndarray | None = None,
    level: float = 0.95,
) -> list[SummaryRow]:
    """Summaries of the mixing weights of one task: means over training draws, with intervals over these draws.

    Test items have no part in weights, so an interval speaks about the choice of training items alone, and needs two
    draws or more; with few of them it is too narrow (see :class:`spafit.stats.BootstrapDraw`).

    Args:
        weights: s of the mix of all layers, (seeds, layers).
        norm_corrected: s_l · mean ‖h_l‖, renormalised, (seeds, layers); leaves out ``cog_norm`` if None.
        hidden: hidden indices; 0, 1, 2, … if None.
        seed_counts: how often each seed was drawn, (replicates, seeds); no intervals if None.
        level: nominal coverage.

    Returns:
        Rows named ``cog``, ``cog_norm``, ``kl_uniform`` and ``entropy``.

    Raises:
        UsageError: negative weights, or a sum that is not one.
        NumericalError: weights that are not finite.
    """
    s = np.atleast_2d(_checked(weights))
    near = float(kl_from_uniform(s).mean())
    vague = f"weights are near uniform (K = {near:.2f} bits): their centre says nothing" if near < MIN_KL else ""
    found = [("cog", mix_centre(s, hidden), vague)]
    if norm_corrected is not None:
        corrected = np.atleast_2d(_checked(norm_corrected))
        near = float(kl_from_uniform(corrected).mean())
        vague = f"weights are near uniform (K = {near:.2f} bits): their centre says nothing" if near < MIN_KL else ""
        found.append(("cog_norm", mix_centre(corrected, hidden), vague))
    found += [("kl_uniform", kl_from_uniform(s), ""), ("entropy", mix_entropy(s), "")]
    rows = []
    for statistic, values, note in found:
        low = high = math.nan
        if seed_counts is not None and seed_counts.shape[1] == len(values) > 1:
            low, high = interval((seed_counts @ values) / len(values), level)
        elif seed_counts is not None:
            note = "; ".join(filter(None, (note, "one training draw: no interval")))
        rows.append(SummaryRow(statistic, float(values.mean()), float(low), float(high), note))
    return rows


def summarize_cumulative(curve: LayerCurve, *, level: float = 0.95, seed: int = 0) -> list[SummaryRow]:
    """Summaries of a cumulative curve with items behind it: score of the probe on layers 0…l, for each l.

    Args:
        curve: values and paired replicates, as :class:`~probing.curves.LayerCurve` holds them.
        level: nominal coverage of the intervals.
        seed: chooses the draws of the correction.

    Returns:
        Rows named

        * ``expected_layer``: Σ l·Δ_l / Σ Δ_l as published. The note says where its denominator is within noise: value
          and interval can then lie far outside the model.
        * ``expected_layer_robust``: the same of the running maximum, corrected for what noise adds to it, and
          suppressed below four standard errors of gain (:func:`probing.summaries.emergence` on this curve).
        * ``headroom``: largest score minus the score at the lowest layer; too large on a flat curve, as any maximum.

    Raises:
        UsageError: fewer than two layers or replicates, or shapes differ.
        NumericalError: a score or replicate is not finite.
    """
    y, layers = np.asarray(curve.values, dtype=np.float64), np.asarray(curve.hidden)
    robust = emergence(curve, level=level, seed=seed)
    plain = expected_layer(y, layers)
    last = curve.replicates[:, -1] - curve.replicates[:, 0]
    each = np.diff(curve.replicates, axis=1) @ layers[1:].astype(np.float64)
    moved = last != 0
    spread = interval(each[moved] / last[moved], level) if moved.any() else (math.nan, math.nan)
    errors = float(last.std(ddof=1))
    gain = float(y[-1] - y[0])
    note = ""
    if not moved.any():
        note = "the mix of all scores what hidden state 0 scores alone: there is no gain to place"
    elif gain < MIN_GAIN_SE * errors:
        note = f"the sum of gains is {gain / errors:.1f} standard errors, below {MIN_GAIN_SE:g}: not to be trusted"
    top = int(np.argmax(y))
    low, high = interval(curve.replicates[:, top] - curve.replicates[:, 0], level)
    return [
        SummaryRow("expected_layer", plain, float(spread[0]), float(spread[1]), note),
        SummaryRow("expected_layer_robust", robust.value, robust.ci[0], robust.ci[1], robust.note),
        SummaryRow("headroom", robust.gain, float(low), float(high)),
    ]


def _checked(weights: np.ndarray) -> np.ndarray:
    s = np.asarray(weights, dtype=np.float64)
    if not np.isfinite(s).all():
        raise NumericalError("Mixing weights hold NaN or infinite values.")
    if not s.size or (s < 0).any() or (abs(s.sum(-1) - 1) > 0.01).any():
        raise UsageError(
            f"Mixing weights must not be negative and must sum to one over layers; got sums from {s.sum(-1).min():.3g} "
            f"to {s.sum(-1).max():.3g} and a smallest weight of {s.min():.3g}. Give the softmax of the logits."
            if s.size
            else "There are no mixing weights."
        )
    return s / s.sum(-1, keepdims=True)
