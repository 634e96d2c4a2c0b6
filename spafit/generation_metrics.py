"""Scores of written texts against references: exact match and ROUGE."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def rouge_scores(written: Sequence[str], references: Sequence[str]) -> dict[str, np.ndarray]:
    """F-measures of ROUGE-1, -2, -L and -Lsum of each text, with stemming, by ``rouge-score``; shape (items,).

    Sentences for Lsum are lines.

    Raises:
        UsageError: rouge-score is not installed.

    Source: Lin (2004), "ROUGE: a package for automatic evaluation of summaries".
    """
    from spafit.errors import UsageError

    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise UsageError('ROUGE needs rouge-score. Run pip install "spafit[generation]".') from error
    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    found = [scorer.score(r, w) for w, r in zip(written, references, strict=True)]
    return {name: np.array([f[name].fmeasure for f in found]) for name in ROUGE}


def answer_scores(written: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Exact match (after stripping), words over the references' words, and mean ROUGE where it is installed."""
    from importlib.util import find_spec

    same = [w.strip() == r.strip() for w, r in zip(written, references, strict=True)]
    words = sum(len(w.split()) for w in written) / max(1, sum(len(r.split()) for r in references))
    scores = {"exact_match": float(np.mean(same)), "length_ratio": float(words)}
    if find_spec("rouge_score") is not None:
        scores |= {name: float(values.mean()) for name, values in rouge_scores(written, references).items()}
    return scores
