"""Figures of retention: what each hidden state says of the next token, before and after training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from spafit import plotting
from spafit.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Label, colour and marker of the two curves.
CURVES = {
    "lens_error_bits": ("before: the model's prediction from the lens (error of the lens)", plotting.MUTED, "s"),
    "lens_kl_bits": ("lens before from lens after (change)", "#D55E00", "o"),
}


def plot_lens(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Change of each hidden state's prediction with its interval, and the error of the lens that shows it.

    A change is worth reading where the error is well below the dashed line, the error of a lens that sees nothing.

    Args:
        table: rows of :func:`analysis.retention.retention_table` with ``lens``, of one model; other rows are left out.
        ax: axes to draw on; new ones by default.

    Raises:
        UsageError: no rows of a lens.
    """
    rows = table[table["head"] == "lens"]
    if not len(rows):
        raise UsageError("The table has no rows of a lens. Make it with lens=True.")
    if ax is None:
        ax = plotting.new_figure(width=6.4, height=3.6).add_subplot()
    blank = rows[rows["hidden"].isna()]["value"].iloc[0]
    ax.axhline(blank, color=plotting.MUTED, linestyle="--", linewidth=1, label="error of a lens that sees nothing")
    own = rows[rows["hidden"].notna()]
    hidden = own["hidden"].astype(int)
    for measure, (label, color, marker) in CURVES.items():
        curve = own[own["measure"] == measure].sort_values("hidden")
        x = curve["hidden"].to_numpy(dtype=float)
        ax.plot(x, curve["value"], color=color, marker=marker, markersize=4, linewidth=1.3, label=label)
        plotting.band(ax, x, curve["ci_low"].to_numpy(), curve["ci_high"].to_numpy(), color=color)
    ax.set_xticks(plotting.hidden_ticks(int(hidden.min()), int(hidden.max())))
    ax.set_ylim(bottom=0)
    ax.set_xlabel("hidden state (0 = embeddings)")
    ax.set_ylabel("KL, bits per token")
    ax.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=1)
    return ax
