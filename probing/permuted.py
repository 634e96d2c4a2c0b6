"""Texts whose words stand in another order: the control for what a model reads from word order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from probing.tasks.base import Text
from spafit.io import content_digest
from spafit.runtime import generator


def permuted_texts(texts: Sequence[Text], seed: int) -> tuple[Text, ...]:
    """Each text with its words in an order drawn from ``seed`` and its own content.

    Words are what stands between white space, so that punctuation stays where it is attached. Spans move with their
    words and keep their place in ``spans``. Words that one span covers move together, so a text that a single span
    covers stays as it is. Both segments of a pair, and a target, are permuted, each alone.
    """
    return tuple(_permuted(text, seed) for text in texts)


def _permuted(text: Text, seed: int) -> Text:
    pieces = _pieces(text.string, text.spans)
    digest = content_digest(text.content)
    string, starts = _joined(text.string, pieces, generator(seed, "word order", digest))
    spans = []
    for start, stop in text.spans:
        piece = next(i for i, (a, b) in enumerate(pieces) if a <= start < b)
        shift = starts[piece] - pieces[piece][0]
        spans.append((start + shift, stop + shift))

    def alone(other: str | None, name: str) -> str | None:
        if other is None:
            return None
        return _joined(other, _pieces(other, ()), generator(seed, "word order", digest, name))[0]

    return replace(
        text, string=string, spans=tuple(spans), second=alone(text.second, "second"),
        target=alone(text.target, "target"),
    )  # fmt: skip


def _pieces(string: str, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Character ranges of words, joined where a span reaches from one to the next."""
    pieces: list[tuple[int, int]] = []
    edges, at, reach = sorted(spans), 0, 0  # reach: where the last span that began before the word ends
    for word in re.finditer(r"\S+", string):
        start, stop = word.span()
        if start < reach:
            pieces[-1] = (pieces[-1][0], stop)
        else:
            pieces.append((start, stop))
        while at < len(edges) and edges[at][0] < stop:
            reach = max(reach, edges[at][1])
            at += 1
    return pieces


def _joined(
    string: str, pieces: Sequence[tuple[int, int]], random: np.random.Generator
) -> tuple[str, dict[int, int]]:  # fmt: skip
    """The pieces in a new order between single spaces, and where each begins."""
    starts, parts, at = {}, [], 0
    for i in random.permutation(len(pieces)):
        a, b = pieces[i]
        starts[int(i)] = at
        parts.append(string[a:b])
        at += b - a + 1
    return " ".join(parts), starts
