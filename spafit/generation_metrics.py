"""Figures of written texts: repetition, variety, length, and exact match and ROUGE where there are references.

None of them says whether a text is right or makes sense: a text that repeats nothing may be noise, and an answer in
other words than the reference has a low ROUGE. Read them beside the texts, and beside those of another model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd

from spafit.errors import UsageError
from spafit.stats import BootstrapDraw, interval

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
#: Columns of :func:`generation_table`.
COLUMNS = ("metric", "value", "ci_low", "ci_high", "n")
#: Words that run on in :func:`repetition`, by default.
REPEATED = 4


def rouge_scores(written: Sequence[str], references: Sequence[str]) -> dict[str, np.ndarray]:
    """F-measures of ROUGE-1, -2, -L and -Lsum of each text, with stemming, by ``rouge-score``; shape (items,).

    Sentences for Lsum are lines. Words are runs of the letters a to z and digits, so other scripts score 0.

    Raises:
        UsageError: rouge-score is not installed, or not one reference per text.

    Source: Lin (2004), "ROUGE: a package for automatic evaluation of summaries".
    """
    _check_pairs(written, references)
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise UsageError('ROUGE needs rouge-score. Run pip install "spafit[generation]".') from error
    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    found = [scorer.score(r, w) for w, r in zip(written, references, strict=True)]
    return {name: np.array([f[name].fmeasure for f in found]) for name in ROUGE}


def answer_scores(written: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Exact match (after stripping), words over the references' words, and mean ROUGE where it is installed.

    Raises:
        UsageError: not one reference per text.
    """
    from importlib.util import find_spec

    _check_pairs(written, references)
    lengths = [np.array([len(t.split()) for t in texts]) for texts in (written, references)]
    scores = {
        "exact_match": float(_exact(written, references).mean()),
        "length_ratio": float(lengths[0].sum() / max(1, lengths[1].sum())),
    }
    if find_spec("rouge_score") is not None:
        scores |= {name: float(values.mean()) for name, values in rouge_scores(written, references).items()}
    return scores


def repetition(texts: Sequence[str], n: int = REPEATED) -> np.ndarray:
    """Share of each text's runs of ``n`` words that are repeats: 1 - different runs / runs; shape (texts,).

    Words are separated by white space, and case counts. NaN for a text of fewer than ``n`` words.

    Source: Welleck et al. (2020), "Neural text generation with unlikelihood training" (seq-rep-n).

    Raises:
        UsageError: ``n`` is below 1.
    """
    runs = [_runs(text, n) for text in texts]
    return np.array([1 - len(set(r)) / len(r) if r else np.nan for r in runs])


def distinct(texts: Sequence[str], n: int) -> tuple[float, float, float]:
    """Different runs of ``n`` words over all texts as a share of all runs, with a 95 % interval over texts.

    It falls with the amount of text: compare equal numbers of texts of similar length. Resampling with replacement
    would repeat texts and so lower it; the interval is therefore from the jackknife, a text left out at a time, plus
    and minus 1.96 standard errors, cut at 0 and 1.

    Source: Li et al. (2016), "A diversity-promoting objective function for neural conversation models".

    Returns:
        Value, low and high end; NaN where no text has ``n`` words, and an interval of NaN where one text alone has.

    Raises:
        UsageError: ``n`` is below 1.
    """
    counts = [Counter(runs) for text in texts if (runs := _runs(text, n))]
    if not counts:
        return np.nan, np.nan, np.nan
    owners = Counter(run for count in counts for run in count)
    total = sum(count.total() for count in counts)
    value = len(owners) / total
    if len(counts) == 1:
        return value, np.nan, np.nan
    own = np.array([sum(owners[run] == 1 for run in count) for count in counts])
    left_out = (len(owners) - own) / (total - np.array([count.total() for count in counts]))
    m = len(counts)
    error = float(np.sqrt((m - 1) / m * ((left_out - left_out.mean()) ** 2).sum()))
    return value, max(0.0, value - 1.96 * error), min(1.0, value + 1.96 * error)


def generation_table(
    written: pd.DataFrame,
    *,
    references: Sequence[str] | None = None,
    bits: np.ndarray | None = None,
    n_boot: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Figures of written texts with 95 % intervals over texts.

    ================= ==================================================================================================
    tokens            mean number of tokens written
    ended             share that ended by themselves rather than at the allowed length
    seq_rep_4         mean :func:`repetition` of runs of four words, over the texts that have four
    distinct_1, 2, 3  :func:`distinct`
    exact_match       share equal to their reference up to white space at the ends
    length_ratio      words written over words of the references
    rouge1, 2, L, Lsum mean :func:`rouge_scores`; left out where rouge-score is not installed
    bits_per_token    of the references under the model, over all tokens; ``perplexity`` is 2 to it
    ================= ==================================================================================================

    Args:
        written: columns ``text``, ``tokens`` and ``ended``, as :func:`spafit.generating.generate` gives.
        references: the right text of each, for the figures that compare.
        bits: bits and number of the reference's predicted tokens, shape (texts, 2), for those of the model.
        n_boot: bootstrap replicates.
        seed: of the bootstrap.

    Returns:
        Columns :data:`COLUMNS`; ``n`` counts the texts behind a value. Intervals of fewer than about twenty texts are
        too narrow.

    Raises:
        UsageError: no texts, or not one reference or row of bits per text.
    """
    from importlib.util import find_spec

    texts = written["text"].astype(str).tolist()
    if not texts:
        raise UsageError("There are no written texts to take figures of. Give at least one prompt.")
    draw = BootstrapDraw.make(np.arange(len(texts)), n_seeds=1, n_boot=n_boot, seed=seed)
    rows: list[tuple[str, float, float, float, int]] = []

    def add(name: str, values: np.ndarray, over: np.ndarray | None = None) -> None:
        """The mean of values, or the sum of values as a share of another sum."""
        below = np.ones(len(values)) if over is None else over
        drawn = draw.means(np.stack([values, below])[None])
        share = np.divide(drawn[:, 0], drawn[:, 1], out=np.full(len(drawn), np.nan), where=drawn[:, 1] > 0)
        total = below.sum()
        value = float(values.sum() / total) if total else np.nan
        low, high = interval(share[np.isfinite(share)]) if total else (np.nan, np.nan)
        rows.append((name, value, float(low), float(high), int((below > 0).sum())))

    add("tokens", written["tokens"].to_numpy(dtype=float))
    add("ended", written["ended"].to_numpy(dtype=float))
    repeated = repetition(texts)
    known = np.isfinite(repeated)
    add(f"seq_rep_{REPEATED}", np.where(known, repeated, 0.0), known.astype(float))
    for n in (1, 2, 3):
        rows.append((f"distinct_{n}", *distinct(texts, n), sum(len(t.split()) >= n for t in texts)))
    if references is not None:
        _check_pairs(texts, references)
        add("exact_match", _exact(texts, references))
        add("length_ratio", *(np.array([len(t.split()) for t in side], dtype=float) for side in (texts, references)))
        if find_spec("rouge_score") is not None:
            for name, values in rouge_scores(texts, references).items():
                add(name, values)
    if bits is not None:
        if np.shape(bits) != (len(texts), 2):
            raise UsageError(f"bits have the shape {np.shape(bits)}; ({len(texts)}, 2) is needed: bits and tokens.")
        add("bits_per_token", *np.asarray(bits, dtype=float).T)
        value, low, high = (float(2.0 ** np.minimum(v, 1000.0)) for v in rows[-1][1:4])
        rows.append(("perplexity", value, low, high, rows[-1][4]))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _runs(text: str, n: int) -> list[tuple[str, ...]]:
    if n < 1:
        raise UsageError(f"Runs of {n} words were asked for; give 1 or more.")
    words = text.split()
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def _exact(written: Sequence[str], references: Sequence[str]) -> np.ndarray:
    return np.array([w.strip() == r.strip() for w, r in zip(written, references, strict=True)], dtype=float)


def _check_pairs(written: Sequence[str], references: Sequence[str]) -> None:
    if len(written) != len(references):
        raise UsageError(f"There are {len(references)} references for {len(written)} texts. Give one for each.")
