"""One style for every figure: a colour per linguistic level, units in words, bands, and the shading of strata.

matplotlib and seaborn are imported inside the functions, and the style is applied inside a context only: a user's own
settings are as they were after every call. Figures are made without pyplot, so nothing is kept alive or shown unasked.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from spafit.io import atomic_write

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

#: Colour of each level on white; distinguishable with the common colour-vision deficiencies (after Okabe and Ito).
LEVEL_COLORS = {"surface": "#c87f00", "syntax": "#0072b2", "semantics": "#00855f", "other": "#a8548c"}

#: The same levels on a dark page.
LEVEL_COLORS_DARK = {"surface": "#f0b341", "syntax": "#5bb8f0", "semantics": "#3cc99a", "other": "#d96fae"}

#: Colours for several models in one panel, in order.
MODEL_COLORS = ("#0072b2", "#c87f00", "#00855f", "#a8548c", "#d1495b", "#5b6c8f", "#7a9e00", "#7b5cd6")
_MODEL_COLORS_DARK = ("#5bb8f0", "#f0b341", "#3cc99a", "#d96fae", "#f58a97", "#a3b4d6", "#b4d641", "#b39dfa")

#: Text and axes, secondary text and controls, and the page below.
INK, MUTED, PAPER = "#1d2129", "#737a85", "#fefefe"
_DARK = {INK: "#e8eaee", MUTED: "#9aa2ae", PAPER: "#15181d"}

#: How strongly a stratum's blocks are shaded: the more of a block trains, the darker. Other methods get the middle.
STRATUM_SHADE = {
    "freeze": 0.02,
    **dict.fromkeys(("bitfit", "bias-added", "norm"), 0.065),
    **dict.fromkeys(("lora", "lora+bitfit", "lora+bias-added", "lora+norm"), 0.12),
}
_OTHER_SHADE = 0.065

#: What a metric's axis says, and its short name in running text.
METRIC_LABELS = {
    "accuracy": "accuracy",
    "macro_f1": "macro-averaged F1",
    "micro_f1": "F1 over all labels",
    "r2": "R²",
    "spearman": "rank correlation",
    "uuas": "UUAS",
    "dspr": "rank correlation of distances",
    "nspr": "rank correlation of depths",
    "root_accuracy": "root accuracy",
    "bits": "bits saved per item",
}

#: What the bands and brackets of probing scores are.
INTERVAL = "95 % bootstrap interval over test items (by sentence) crossed with seeds"

_RC: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9.0,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "legend.fontsize": 8.0,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": PAPER,
    "savefig.facecolor": "auto",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "text.parse_math": False,  # a task's name may hold a dollar sign
    "svg.fonttype": "path",
    "svg.hashsalt": "spafit",
}


class StratumLike(Protocol):
    """A run of blocks of one stack and the method that trains them (``spafit.Stratum`` is one)."""

    @property
    def stack(self) -> str:
        """Name of the stack."""

    @property
    def blocks(self) -> tuple[int, int]:
        """Half-open range of blocks."""

    @property
    def method(self) -> str:
        """How the blocks train, for example ``lora+bitfit``."""


@contextmanager
def style() -> Iterator[None]:
    """Apply the project's style inside the block; matplotlib's settings are restored on exit."""
    import matplotlib

    with matplotlib.rc_context(_RC):
        yield


def new_figure(*, width: float, height: float) -> Figure:
    """An empty figure of ``width`` × ``height`` inches with constrained layout, not registered with pyplot."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def level_color(level: str) -> str:
    """Colour of a level; levels that the palette lacks share the one of ``other``."""
    return LEVEL_COLORS.get(level, LEVEL_COLORS["other"])


def stratum_shade(method: str) -> float:
    """Opacity of a stratum's shading."""
    return STRATUM_SHADE.get(method, _OTHER_SHADE)


def hidden_ticks(first: int, last: int, *, most: int = 9) -> list[int]:
    """Tick positions on hidden indices: both ends where a round step allows it, at most ``most`` ticks."""
    length = last - first
    if length < 1:
        return [first]
    steps = [s for s in (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 25, 50, 100, 200, length) if length / s <= most - 1]
    even = [s for s in steps if length % s == 0 and s <= 2 * steps[0]]
    return list(range(first, last + 1, (even or steps)[0]))


def freeze_layout(figure: Figure) -> Figure:
    """Lay the figure out once and keep the result, so that saving it again, in any format, costs only the drawing."""
    lay_out(figure)
    figure.set_layout_engine("none")
    return figure


def lay_out(figure: Figure) -> None:
    """Run the layout now, so that positions and extents can be asked for; nothing is drawn."""
    engine = figure.get_layout_engine()
    assert engine is not None
    with style():
        engine.execute(figure)


def band(
    ax: Axes,
    x: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    *,
    color: str,
    alpha: float = 0.2,
) -> None:
    """Shade between ``low`` and ``high``; positions where either is missing are left out, not bridged."""
    known = np.isfinite(low) & np.isfinite(high)
    if known.any():
        ax.fill_between(x, low, high, where=known.tolist(), color=color, alpha=alpha, linewidth=0, zorder=1.5)


def stratum_label(stratum: StratumLike) -> str:
    """``freeze: blocks 0–4``, ``bitfit: block 5``: half-open ranges written with both ends included."""
    start, stop = stratum.blocks
    return f"{stratum.method}: block {start}" if stop - start == 1 else f"{stratum.method}: blocks {start}–{stop - 1}"


def shade_strata(
    ax: Axes, strata: Sequence[StratumLike], *, stack: str, labels: bool = True
) -> list[tuple[float, float]]:
    """Shade the blocks of each stratum behind curves over hidden states, and return the spans drawn.

    Block k turns hidden state k into hidden state k + 1, so the stratum with blocks [a, b) covers x from a to b, and a
    boundary stands exactly on the hidden state that the lower stratum hands to the upper one.

    Args:
        ax: axes whose x is the hidden index.
        strata: strata of one or more stacks; those of other stacks are skipped. Empty strata are not drawn.
        stack: the stack that the axes show.
        labels: write the methods along the top edge; a label too wide for its span is broken at its ``+``, then left
            out (a legend or caption should name all strata).
    """
    from matplotlib.transforms import blended_transform_factory

    shown = [s for s in strata if s.stack == stack and s.blocks[1] > s.blocks[0]]
    top = blended_transform_factory(ax.transData, ax.transAxes)
    for stratum in shown:
        start, stop = stratum.blocks
        ax.axvspan(start, stop, color=INK, alpha=stratum_shade(stratum.method), linewidth=0, zorder=0)
        if stratum is not shown[0]:
            ax.axvline(start, color=MUTED, linewidth=0.7, linestyle=(0, (1, 2)), zorder=1)
        if labels:
            text = ax.text(
                (start + stop) / 2, 0.985, stratum.method, transform=top, ha="center", va="top", fontsize=7.5,
                color=MUTED, linespacing=0.95, zorder=4, label="_stratum",
            )  # fmt: skip
            text.set_in_layout(False)
    return [(float(s.blocks[0]), float(s.blocks[1])) for s in shown]


def fit_stratum_labels(figure: Figure) -> None:
    """Break or hide the labels of :func:`shade_strata` that are wider than their span. Lays the figure out first."""
    lay_out(figure)
    for ax in figure.axes:
        labels = [t for t in ax.texts if t.get_label() == "_stratum"]
        spans = [p for p in ax.patches if p.get_zorder() == 0]
        for text, span in zip(labels, spans, strict=True):
            room = span.get_window_extent().width
            if text.get_window_extent().width > room - 2:
                text.set_text(text.get_text().replace("+", "+\n"))
            if text.get_window_extent().width > room - 2:
                text.set_visible(False)


def spread(positions: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Move label positions apart until neighbours are ``gap`` from each other, staying near where they were.

    Least-squares solution with the order kept (pool adjacent violators on positions minus their rank's offset), then
    shifted into [low, high] as far as the room allows.
    """
    order = np.argsort(positions, kind="stable")
    wanted = np.asarray(positions, dtype=float)[order] - gap * np.arange(len(order))
    blocks: list[list[float]] = []
    for value in wanted:
        blocks.append([float(value), 1.0])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            v, n = blocks.pop()
            blocks[-1] = [(blocks[-1][0] * blocks[-1][1] + v * n) / (blocks[-1][1] + n), blocks[-1][1] + n]
    placed = np.repeat([b[0] for b in blocks], [int(b[1]) for b in blocks])
    placed = np.clip(placed, low, max(low, high - gap * (len(order) - 1))) + gap * np.arange(len(order))
    result = np.empty(len(order))
    result[order] = placed
    return result.tolist()


def label_line_ends(ax: Axes, ends: Sequence[tuple[float, str, str]], *, x: float, fontsize: float = 8.0) -> list[Text]:
    """Write each curve's name at its right end, moved apart where curves end close together.

    Args:
        ax: axes with final limits and size.
        ends: (y of the curve's end, name, colour).
        x: data coordinate of the curves' ends.
        fontsize: points.
    """
    height = ax.get_position().height * ax.figure.get_size_inches()[1] * 72  # type: ignore[union-attr]
    low, high = ax.get_ylim()
    unit = (high - low) / max(height, 1.0)
    gap = 1.25 * fontsize * unit
    placed = spread([e[0] for e in ends], gap=gap, low=low + gap / 2, high=high - gap / 2)
    texts: list[Text] = []
    for (y, name, color), where in zip(ends, placed, strict=True):
        texts.append(
            ax.annotate(
                name, (x, y), xytext=(x, where), textcoords=_shifted(ax, 9), fontsize=fontsize, color=color,
                ha="left", va="center", annotation_clip=False,
                arrowprops={"arrowstyle": "-", "color": color, "lw": 0.6, "shrinkA": 1, "shrinkB": 1, "alpha": 0.5},
            )
        )  # fmt: skip
    return texts


def _shifted(ax: Axes, points: float) -> Any:
    from matplotlib.transforms import ScaledTranslation

    return ax.transData + ScaledTranslation(points / 72, 0, ax.figure.dpi_scale_trans)


def save_figure(figure: Figure, path: Path, *, dpi: int = 160) -> Path:
    """Write ``path`` (``.png`` or ``.svg``) atomically; the same figure gives the same bytes. Returns the path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    def write(target: Path) -> None:
        if path.suffix == ".svg":
            target.write_text(_svg(figure), encoding="utf-8")
            return
        own = figure.dpi
        figure.dpi = dpi
        try:  # the canvas itself: savefig draws twice, the first time for a layout that these figures have already
            FigureCanvasAgg(figure).print_png(str(target))
        finally:
            figure.dpi = own

    with style():
        atomic_write(path, write)
    return path


def _svg(figure: Figure) -> str:
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    with style():
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return buffer.getvalue()


def inline_svg(figure: Figure, *, prefix: str, title: str) -> str:
    """The figure as an ``<svg>`` element for a page: transparent, scalable, following the page's light or dark colours.

    The style's colours become CSS variables with themselves as fallback: ``--ink``, ``--muted``, ``--paper``,
    ``--<level>`` and ``--model-<i>`` (values in :func:`css_variables`). Identifiers get ``prefix``, so that several
    figures can stand in one page.

    Args:
        figure: what to write.
        prefix: unique in the page; letters, digits and hyphens.
        title: what the figure shows, for readers who do not see it.
    """
    from html import escape

    page = figure.get_facecolor()
    figure.set_facecolor("none")
    try:
        svg = _svg(figure)
    finally:
        figure.set_facecolor(page)
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{prefix}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", svg)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    for name, color in _variables().items():
        svg = svg.replace(color, f"var(--{name}, {color})")
    opening = re.search(r'<svg [^>]*?width="([\d.]+)pt"[^>]*?viewBox="([^"]+)"[^>]*>', svg)
    assert opening is not None
    root = (
        f'<svg viewBox="{opening[2]}" role="img" style="width:{float(opening[1]):.0f}pt"><title>{escape(title)}</title>'
    )
    svg = root + svg[opening.end() :]
    return re.sub(r"\s*\n\s*", "\n", svg).strip()


def css_variables(scheme: str) -> str:
    """CSS declarations of the style's colours for the ``light`` or ``dark`` scheme."""
    names = _variables()
    if scheme == "dark":
        dark = {**_DARK, **{LEVEL_COLORS[k]: v for k, v in LEVEL_COLORS_DARK.items()}}
        dark |= dict(zip(MODEL_COLORS, _MODEL_COLORS_DARK, strict=True))
        names = {name: dark[color] for name, color in names.items()}
    return " ".join(f"--{name}: {color};" for name, color in names.items())


def _variables() -> dict[str, str]:
    models = {f"model-{i}": c for i, c in enumerate(MODEL_COLORS) if c not in LEVEL_COLORS.values()}
    return {"ink": INK, "muted": MUTED, "paper": PAPER, **LEVEL_COLORS, **models}
