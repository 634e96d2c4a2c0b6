"""The style: nothing global is touched, strata stand where their blocks are, colours can be told apart."""

from __future__ import annotations

import itertools
import re
import sys
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb

from spafit import plotting
from spafit.strata import StrataConfig
from tests.report_fixtures import strata


def _figure(n: int = 1):
    with plotting.style():
        figure = plotting.new_figure(width=3.0 * n, height=3.0)
        return figure, figure.subplots(1, n, squeeze=False)[0]


def test_figures_leave_matplotlib_as_it_was(tmp_path):
    before = dict(matplotlib.rcParams)
    figure, (ax,) = _figure()
    ax.plot([0, 1], [0, 1])
    plotting.save_figure(plotting.freeze_layout(figure), tmp_path / "f.png")
    plotting.inline_svg(figure, prefix="f", title="f")
    assert dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_a_stratum_of_blocks_a_to_b_is_shaded_from_hidden_a_to_hidden_b():
    _, (ax,) = _figure()
    ax.set_xlim(0, 6)
    assert plotting.shade_strata(ax, strata(6), stack="encoder") == [(0, 1), (1, 3), (3, 6)]
    drawn = sorted((p.get_x(), p.get_x() + p.get_width()) for p in ax.patches)
    assert drawn == [(0, 1), (1, 3), (3, 6)]
    assert [t.get_text() for t in ax.texts] == ["freeze", "bitfit", "lora+bitfit"]
    alphas = [p.get_alpha() for p in ax.patches]
    assert alphas == sorted(alphas), "the more trains, the darker"


def test_strata_of_other_stacks_are_not_shaded():
    _, (ax,) = _figure()
    config = StrataConfig.preset("spafit-scaled-I", blocks={"encoder": 6, "decoder": 12})
    assert plotting.shade_strata(ax, config.strata, stack="decoder") == [(0, 3), (3, 5), (5, 12)]


@pytest.mark.parametrize(("width", "shown"), [(9.0, True), (1.2, False)])
def test_a_stratum_label_is_written_only_where_it_fits(width, shown):
    with plotting.style():
        figure = plotting.new_figure(width=width, height=3)
        ax = figure.subplots()
    ax.set_xlim(0, 6)
    plotting.shade_strata(ax, strata(6), stack="encoder")
    plotting.fit_stratum_labels(figure)
    assert ax.texts[0].get_visible() is shown
    boxes = [t.get_window_extent() for t in ax.texts if t.get_visible()]
    assert all(a.x1 <= b.x0 + 1 for a, b in itertools.pairwise(boxes)), "labels do not touch"


@pytest.mark.parametrize("last", [1, 6, 12, 24, 30, 48, 80])
def test_ticks_hold_both_ends_and_are_few(last):
    ticks = plotting.hidden_ticks(0, last)
    assert ticks[0] == 0
    assert ticks[-1] == last
    assert len(ticks) <= 9
    assert len(set(np.diff(ticks))) == 1


@pytest.mark.parametrize(("first", "last"), [(0, 0), (3, 3), (0, 23), (2, 31), (0, 997)])
def test_ticks_stay_inside_whatever_the_depth(first, last):
    ticks = plotting.hidden_ticks(first, last)
    assert first == ticks[0]
    assert ticks[-1] <= last
    assert len(ticks) <= 9


@given(st.lists(st.floats(0, 10), min_size=1, max_size=12))
def test_spread_labels_keep_their_order_and_distance(positions):
    placed = plotting.spread(positions, gap=0.5, low=0, high=10)
    order = np.argsort(positions, kind="stable")
    assert (np.diff(np.array(placed)[order]) >= 0.5 - 1e-9).all()
    assert min(placed) >= -1e-9
    assert max(placed) <= 10 + 1e-9


def test_labels_that_are_apart_already_are_not_moved():
    assert plotting.spread([3.0, 1.0, 8.0], gap=0.5, low=0, high=10) == [3.0, 1.0, 8.0]


def test_bands_leave_out_positions_without_an_interval():
    _, (ax,) = _figure()
    x = np.arange(5)
    plotting.band(ax, x, np.full(5, np.nan), np.full(5, np.nan), color="#000000")
    assert not ax.collections
    plotting.band(ax, x, np.array([0, 0, np.nan, 0, 0.0]), np.ones(5), color="#000000")
    assert len(ax.collections[0].get_paths()) == 2, "not bridged over the gap"


def test_the_same_figure_gives_the_same_bytes(tmp_path):
    def draw(value: float) -> tuple[bytes, bytes, str]:
        figure, (ax,) = _figure()
        ax.plot([0, 1], [0, value])
        plotting.freeze_layout(figure)
        png, svg = (plotting.save_figure(figure, tmp_path / f"a.{s}").read_bytes() for s in ("png", "svg"))
        return png, svg, plotting.inline_svg(figure, prefix="a", title="a")

    assert draw(1.0) == draw(1.0)
    assert draw(1.0)[0] != draw(0.5)[0]


class _Ids(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name == "href":
                self.references.append(value.removeprefix("#"))
            self.references += re.findall(r"url\(#([^)]+)\)", value or "")


def test_inline_figures_can_share_a_page_follow_its_colours_and_name_nothing_outside():
    figure, (ax,) = _figure()
    ax.plot([0, 1], [0, 1], color=plotting.LEVEL_COLORS["syntax"], marker="o")
    ax.set_title("a--><script>alert(1)</script>$x$")
    one, two = (plotting.inline_svg(figure, prefix=p, title='<b>"') for p in ("one", "two"))
    first, second = _Ids(one), _Ids(two)
    assert not set(first.ids) & set(second.ids)
    assert len(first.ids) == len(set(first.ids))
    assert set(first.references) <= set(first.ids)
    assert not first.tags & {"script", "style", "image", "b"}
    assert "http" not in one
    assert "&lt;b&gt;" in one
    assert "var(--syntax, #0072b2)" in one
    assert plotting.PAPER not in one, "the page's background shows through"
    assert to_rgb(figure.get_facecolor()) == to_rgb(plotting.PAPER), "the figure itself is as it was"
    for scheme in ("light", "dark"):
        declared = set(re.findall(r"--([\w-]+):", plotting.css_variables(scheme)))
        assert set(re.findall(r"var\(--([\w-]+)", one)) <= declared


# Viénot-style dichromacy in linear RGB, severity 1 (Machado, Oliveira and Fernandes 2009, table 1).
_SIGHT = {
    "full": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
}


def _linear(color: str) -> np.ndarray:
    c = np.array(to_rgb(color))
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def _lab(rgb: np.ndarray) -> np.ndarray:
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(to_xyz @ np.clip(rgb, 0, 1) / np.array([0.9505, 1.0, 1.089]))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def _distance(a: str, b: str, sight: str) -> float:
    return float(np.linalg.norm(_lab(_SIGHT[sight] @ _linear(a)) - _lab(_SIGHT[sight] @ _linear(b))))


@pytest.mark.parametrize("sight", _SIGHT)
@pytest.mark.parametrize("palette", [plotting.LEVEL_COLORS, plotting.LEVEL_COLORS_DARK], ids=["light", "dark"])
def test_level_colours_can_be_told_apart(sight, palette):
    pairs = itertools.combinations(palette.values(), 2)
    assert min(_distance(a, b, sight) for a, b in pairs) > 15


def test_the_colour_distance_sees_a_confusable_pair():
    assert _distance("#c00000", "#5a7000", "full") > 50
    assert _distance("#c00000", "#5a5000", "protanopia") < 40


@pytest.mark.parametrize(
    ("palette", "paper"),
    [(plotting.LEVEL_COLORS, plotting.PAPER), (plotting.LEVEL_COLORS_DARK, "#15181d")],
    ids=["light", "dark"],
)
def test_level_colours_are_legible_on_the_page(palette, paper):
    def luminance(color: str) -> float:
        return float(np.array([0.2126, 0.7152, 0.0722]) @ _linear(color))

    for color in palette.values():
        low, high = sorted((luminance(color), luminance(paper)))
        assert (high + 0.05) / (low + 0.05) >= 3.0, color
