"""The language model before training, its own head, and the texts that retention is measured on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.retention import retention_table
from analysis.sides import named_reference, run_folder
from probing.results import ProbeResults
from spafit.data.blimp import read_blimp
from spafit.data.text import read_text
from spafit.errors import UsageError
from spafit.language_models import LanguageModel, graft, load_language_model


@dataclass(frozen=True)
class LanguageSide:
    """What measures retention.

    Attributes:
        original: the language model before training.
        text: running text, or None.
        pairs: minimal pairs, or None.
        refit_on: other running text, on which the head is re-fitted, or None.
        lens: read every hidden state through an affine lens, too.
    """

    original: LanguageModel
    text: str | None
    pairs: pd.DataFrame | None
    refit_on: str | None
    lens: bool = False

    def measure(self, name: str, body: Any, quiet: bool) -> pd.DataFrame:
        """Retention of a tuned body under the original head."""
        after = graft(self.original, body, name=name)
        found = retention_table(
            self.original, after, text=self.text, pairs=self.pairs, refit_on=self.refit_on, lens=self.lens, quiet=quiet
        )
        return found.assign(model=name)[["model", *found.columns]]


def read_language_side(
    before: Any,
    text: str | Path | None,
    blimp: str | Path | None,
    pairs: int | None,
    refit_on: str | Path | None,
    *,
    lens: bool = False,
    offline: bool,
    allow_pickle: bool,
) -> LanguageSide | None:
    """What measures retention, with its files read and the language-model head loaded; None if nothing is asked for.

    Raises:
        UsageError: no reference that a head could be loaded from; a lens without both texts.
        DataError: a file cannot be read.
        ModelError: the model before training has no language-model head.
    """
    if lens and (text is None or refit_on is None):
        raise UsageError("A lens is fitted on one running text and read on another; give both refit_on and text.")
    if text is None and blimp is None:
        if refit_on is not None:
            raise UsageError("refit_on re-fits a head for measuring; give text or blimp, too.")
        return None
    run = run_folder(before)
    reference = ProbeResults.load(run).run["config"]["model"] if run is not None else named_reference(before)
    if reference is None:
        raise UsageError(
            "Retention needs the model before training by its name or folder, so that its language-model head can be "
            "loaded; the built-in default has none."
        )
    running, other = (None if t is None else read_text(t) for t in (text, refit_on))
    table = None if blimp is None else read_blimp(blimp, pairs=pairs)
    original = load_language_model(reference, offline=offline, allow_pickle=allow_pickle)
    return LanguageSide(original, running, table, other, lens)
