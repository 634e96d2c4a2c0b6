"""Retention: what training left of a language model's own ability.

Bits per token and perplexity on running text, KL to the model before training, and BLiMP by field. Take a tuned
classifier's body under the original head with :func:`spafit.language_models.graft`: ``head="original"`` reads it as it
is, ``head="refitted"`` after an affine map fitted on other text, so that a rotation of the last states does not count
as a loss of ability. ``lens=True`` adds what each hidden state says of the next token (see :mod:`analysis.lens`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.affine import RIDGE, AffineFit
from analysis.token_scores import ScoredTokens, encode_sentences, score, windows
from spafit.errors import UsageError
from spafit.runtime import Progress
from spafit.stats import BootstrapDraw, interval

if TYPE_CHECKING:
    from spafit.language_models import LanguageModel

COLUMNS = ("measure", "field", "paradigm", "head", "side", "hidden", "value", "ci_low", "ci_high", "n", "reason")
#: Tokens per window of running text.
WINDOW = 256
_LN2 = math.log(2)


def perplexities(language: LanguageModel, texts: Sequence[str], *, quiet: bool = True) -> np.ndarray:
    """Perplexity of each text by itself, as a column for a table of items (``keep=`` and the control ``column:NAME``).

    2 to the mean bits of its tokens; for a masked model pseudo-perplexity, a pass for each token. Perplexities of
    models with different tokenizers do not stand beside each other.

    Args:
        language: the model.
        texts: the texts.
        quiet: no progress on stderr.

    Returns:
        float64, (texts,); NaN for a text of which the model scores no token.

    Raises:
        UsageError: no texts.
        NumericalError: a log-probability is not finite.
    """
    if not len(texts):
        raise UsageError("No texts were given to take the perplexity of; give at least one.")
    with Progress("Perplexity", len(texts), quiet=quiet) as progress:
        scored = score(language, encode_sentences(language, texts), progress=progress.advance)
    tokens = np.bincount(scored.text, minlength=len(texts))
    mean = np.divide(scored.sums(len(texts)), tokens, out=np.full(len(texts), np.nan), where=tokens > 0)
    return np.exp(-mean)


def retention_table(
    before: LanguageModel,
    after: LanguageModel,
    *,
    text: str | None = None,
    pairs: pd.DataFrame | None = None,
    refit_on: str | None = None,
    lens: bool = False,
    window: int = WINDOW,
    n_boot: int = 1000,
    quiet: bool = True,
) -> pd.DataFrame:
    """A language model's own ability before and after training, and the paired differences.

    Perplexity is that of windows of ``window`` tokens without what came before them: compare sides, not papers. For a
    masked model it is pseudo-perplexity, one masked position at a time, and costs a pass per token. With a model of
    instructions or a quantised file, absolute values say little.

    Args:
        before: the model before training.
        after: the model after it, with the same tokenizer: its own head, or the original one (see ``graft``).
        text: running text that neither model was trained on, as far as that is known.
        pairs: minimal pairs with the columns of :data:`spafit.data.blimp.COLUMNS`.
        refit_on: other running text; an affine map from the last states after to those before is fitted on it, in
            least squares, and everything after training is measured through it once more (``head = refitted``).
        lens: measure every hidden state through affine maps of the model before training, fitted on ``refit_on``; needs
            ``text``, too, and about two passes of the head per hidden state.
        window: tokens of a window.
        n_boot: bootstrap replicates: over windows, and over paradigms crossed with their pairs.
        quiet: no progress on stderr.

    Returns:
        Columns :data:`COLUMNS`. ``measure`` is ``bits_per_token``, ``perplexity`` (2 to the bits),
        ``kl_bits`` (KL(before ‖ after) per token) or ``blimp_accuracy`` (ties count half); ``field`` and ``paradigm``
        are of BLiMP, ``all`` where everything is averaged; ``side`` is ``before``, ``after`` or ``difference`` (after
        minus before, paired); ``n`` counts tokens or pairs. The mean over a field gives every paradigm one vote.
        ``hidden`` (nullable integer) is empty where a row speaks of the whole model. With ``lens``, ``head`` is
        ``lens`` in rows of ``lens_kl_bits``, KL(lens before ‖ lens after) at a hidden state, and ``lens_error_bits``,
        KL(prediction before ‖ lens before) there: how far the lens is from what the model says. ``lens_error_bits``
        with an empty ``hidden`` is that of the head on a constant state: a lens near it sees nothing.

    Raises:
        UsageError: neither ``text`` nor ``pairs``; ``lens`` without ``text`` and ``refit_on``; ``refit_on`` with fewer
            tokens than twice the width; tokenizers or kinds that differ.
        ModelError: ``lens``, and a head or stack that it cannot read.
    """
    from spafit.digests import tokenizer_digest

    if text is None and pairs is None:
        raise UsageError("Give running text, minimal pairs, or both.")
    if lens and (text is None or refit_on is None):
        raise UsageError("A lens is fitted on refit_on and read on text; give both.")
    if before.kind != after.kind or tokenizer_digest(before.tokenizer) != tokenizer_digest(after.tokenizer):
        raise UsageError(
            f"{before.name} and {after.name} differ in kind or tokenizer, so probabilities of tokens do not stand "
            "beside each other. Compare a model with what it became."
        )
    heads: dict[str, LanguageModel] = {"original": after}
    if refit_on is not None:
        heads["refitted"] = refit_head(before, after, refit_on, window=window)
    rows: list[dict[str, Any]] = []
    if text is not None:
        rows += _on_text(before, heads, text, window=window, n_boot=n_boot, quiet=quiet)
    if pairs is not None:
        rows += _on_pairs(before, heads, pairs, n_boot=n_boot, quiet=quiet)
    if lens and text is not None and refit_on is not None:
        rows += _through_lens(before, after, text, refit_on, window=window, n_boot=n_boot, quiet=quiet)
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"hidden": "Int64"})


def refit_head(
    before: LanguageModel, after: LanguageModel, text: str, *, window: int = WINDOW, ridge: float = RIDGE
) -> LanguageModel:
    """The model after training with an affine map from its last states to those before in front of the head.

    Ridge regression in closed form on every token of the text; the head itself stays the original one. Where training
    changed nothing the map is not exactly the identity: the ridge shrinks it a little.

    Raises:
        UsageError: fewer tokens than twice the width.
    """
    import torch

    from spafit.language_models import with_state_map

    fit = AffineFit()
    with torch.inference_mode():
        for ids in windows(before, text, length=window):
            inputs = {"input_ids": torch.as_tensor([ids])}
            fit.add(*(m.body(**inputs)[0][0] for m in (after, before)))
    fit.check("Re-fitting a head")
    weight, bias = fit.solve(ridge)
    dtype = next(after.model.parameters()).dtype
    return with_state_map(after, weight.to(dtype), bias.to(dtype))


def _on_text(
    before: LanguageModel, heads: dict[str, LanguageModel], text: str, *, window: int, n_boot: int, quiet: bool
) -> list[dict[str, Any]]:
    texts = windows(before, text, length=window)
    rows: list[dict[str, Any]] = []
    with Progress("Running text", len(texts) * (1 + len(heads)), quiet=quiet) as progress:
        old = score(before, texts, progress=progress.advance)
        for head, model in heads.items():
            new = score(model, texts, reference=before, progress=progress.advance)
            rows += _text_rows(old, new, len(texts), head=head, n_boot=n_boot, with_before=head == "original")
    return rows


def _text_rows(
    old: ScoredTokens, new: ScoredTokens, n: int, *, head: str, n_boot: int, with_before: bool
) -> list[dict[str, Any]]:
    draw = BootstrapDraw.make(old.text, n_seeds=1, n_boot=n_boot, seed=0)
    assert new.kl is not None
    bits = np.stack([-old.log_p, -new.log_p]) / _LN2
    values = np.stack([*bits, bits[1] - bits[0], new.kl])
    drawn, point = draw.means(values[None]), values.mean(axis=1)
    low, high = interval(drawn)
    sides = ("before", "after", "difference")
    rows = []
    for i, side in enumerate(sides):
        if side == "before" and not with_before:
            continue
        rows.append(_row("bits_per_token", head, side, point[i], low[i], high[i], len(old.log_p)))
        if side != "difference":
            powers = 2.0 ** np.array([point[i], low[i], high[i]])
            rows.append(_row("perplexity", head, side, powers[0], powers[1], powers[2], len(old.log_p)))
    both = 2.0 ** drawn[:, 1] - 2.0 ** drawn[:, 0]
    ends = interval(both)
    change = 2.0 ** point[1] - 2.0 ** point[0]
    rows.append(_row("perplexity", head, "difference", change, ends[0], ends[1], len(old.log_p)))
    rows.append(_row("kl_bits", head, "difference", point[3], low[3], high[3], len(old.log_p)))
    return rows


def _through_lens(
    before: LanguageModel, after: LanguageModel, text: str, fit_on: str, *, window: int, n_boot: int, quiet: bool
) -> list[dict[str, Any]]:
    from analysis.lens import fit_lens, lens_scores

    texts = windows(before, text, length=window)
    with Progress("Hidden states through a lens", len(texts), quiet=quiet) as progress:
        lens = fit_lens(before, windows(before, fit_on, length=window))
        found = lens_scores(before, after, lens, texts, progress=progress.advance)
    draw = BootstrapDraw.make(found.text, n_seeds=1, n_boot=n_boot, seed=0)
    rows = []
    for measure, side, values in (
        ("lens_kl_bits", "difference", found.kl),
        ("lens_error_bits", "before", np.vstack([found.error, found.constant])),
    ):
        low, high = interval(draw.means(values[None]))
        for k, value in enumerate(values.mean(axis=1)):
            hidden = k if k < len(found.kl) else None
            rows.append(_row(measure, "lens", side, value, low[k], high[k], len(found.text), hidden=hidden))
    return rows


def _on_pairs(
    before: LanguageModel, heads: dict[str, LanguageModel], pairs: pd.DataFrame, *, n_boot: int, quiet: bool
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with Progress("Minimal pairs", 2 * len(pairs) * (1 + len(heads)), quiet=quiet) as progress:
        old = pair_scores(before, pairs, progress=progress.advance)
        for head, model in heads.items():
            new = pair_scores(model, pairs, progress=progress.advance)
            rows += _pair_rows(pairs, old, new, head=head, n_boot=n_boot)
    return rows


def pair_scores(language: LanguageModel, pairs: pd.DataFrame, *, progress: Any = None) -> np.ndarray:
    """1 where the acceptable sentence has the higher (pseudo-)log-likelihood, 0 where the other, .5 for a tie.

    Sentences are compared by the sum over their tokens, as BLiMP does, so a longer one is at a disadvantage.

    Args:
        language: the model.
        pairs: minimal pairs with the columns ``good`` and ``bad``.
        progress: called with the number of sentences finished.

    Returns:
        Shape (pairs,).
    """
    sentences = [*pairs["good"], *pairs["bad"]]
    sums = score(language, encode_sentences(language, sentences), progress=progress).sums(len(sentences))
    good, bad = sums[: len(pairs)], sums[len(pairs) :]
    return np.where(good == bad, 0.5, (good > bad).astype(float))


def _pair_rows(
    pairs: pd.DataFrame, old: np.ndarray, new: np.ndarray, *, head: str, n_boot: int
) -> list[dict[str, Any]]:
    """Accuracy by paradigm (bootstrap over pairs), by field and over all (paradigms, with their pairs, resampled)."""
    sides = {"before": old, "after": new, "difference": new - old}
    rows: list[dict[str, Any]] = []
    groups: list[tuple[str, str, np.ndarray]] = [("all", "all", np.ones(len(pairs), dtype=bool))]
    groups += [(str(f), "all", (pairs["field"] == f).to_numpy()) for f in pairs["field"].unique()]
    for paradigm, own in pairs.groupby("paradigm", sort=False):
        groups.append((str(own["field"].iloc[0]), str(paradigm), (pairs["paradigm"] == paradigm).to_numpy()))
    for field, paradigm, chosen in groups:
        draws = _replicates(pairs[chosen]["paradigm"].to_numpy(), n_boot)
        for side, values in sides.items():
            if side == "before" and head != "original":
                continue
            point, drawn = draws(values[chosen])
            low, high = interval(drawn)
            rows.append(_row("blimp_accuracy", head, side, point, low, high, int(chosen.sum()), field, paradigm))
    return rows


def _replicates(paradigms: np.ndarray, n_boot: int) -> Any:
    """Mean over paradigms of their mean over pairs, and its replicates: paradigms drawn, then pairs within each."""
    from spafit.runtime import generator

    codes, names = pd.factorize(paradigms)
    members = [np.flatnonzero(codes == k) for k in range(len(names))]
    rng = generator(0, "minimal pairs")
    within = [rng.integers(len(m), size=(n_boot, len(m))) for m in members]
    between = (
        rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=n_boot) / len(names)
        if len(names) > 1 else np.ones((n_boot, 1))
    )  # fmt: skip

    def draw(values: np.ndarray) -> tuple[float, np.ndarray]:
        means = np.stack([values[m][w].mean(axis=1) for m, w in zip(members, within, strict=True)], axis=1)
        return float(np.mean([values[m].mean() for m in members])), (means * between).sum(axis=1)

    return draw


def _row(
    measure: str, head: str, side: str, value: float, low: float, high: float, n: int,
    field: str = "all", paradigm: str = "all", *, hidden: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    numbers = (hidden, float(value), float(low), float(high), n, "")
    return dict(zip(COLUMNS, (measure, field, paradigm, head, side, *numbers), strict=True))
