"""WikiText's files (Merity et al. 2016, arXiv 1609.07843): articles, and pairs of a section's opening and heading."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from spafit.data.text import read_text
from spafit.errors import DataError

#: Words of an opening, at most.
OPENING_WORDS = 80

_HEADING = re.compile(r"^ ?((?:= )+)(\S.*?)((?: =)+) ?$")
_JOINED = ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."))


def heading_of(line: str) -> tuple[int, str] | None:
    """Level (1 for an article's title) and text of a heading (`` = = Description = = ``); None for other lines."""
    found = _HEADING.match(line)
    if found is None or found[1].count("=") != found[3].count("="):
        return None
    return found[1].count("="), found[2]


def articles(text: str) -> list[str]:
    """The articles of a text in WikiText's format, headings and line breaks included; none for any other text."""
    lines = text.splitlines()
    starts = [i for i, line in enumerate(lines) if (heading_of(line) or (0,))[0] == 1]
    if not starts:
        return []
    ends = [*starts[1:], len(lines)]
    found = ["\n".join(lines[a:b]).strip() for a, b in zip([0, *starts[1:]], ends, strict=True)]
    return [article for article in found if article]


def as_written(text: str) -> str:
    """Text with its tokens put together as people write it: no space before a comma, in a number or within brackets.

    Quotation marks open and close in turn.
    """
    for split, joined in _JOINED:
        text = text.replace(split, joined)
    text = re.sub(r'" (.*?) "', r'"\1"', text)
    text = re.sub(r" ([,.;:!?%)\]]|'(?:s|t|re|ve|ll|d|m)\b)", r"\1", text)
    return re.sub(r"([(\[]) ", r"\1", text).strip()


def heading_pairs(path: str | Path) -> pd.DataFrame:
    """Openings of sections with their headings: what a section begins with, and what it is called.

    The opening is the first paragraph, from its beginning to the last sentence that ends within :data:`OPENING_WORDS`
    words (a longer first sentence is cut there). Sections that begin with a heading of their own, and headings with
    ``<unk>`` in them, are left out; a pair that occurs twice is given once.

    Args:
        path: a file in WikiText's format.

    Returns:
        Columns ``prompt`` (opening), ``answer`` (heading), ``level`` (1 for an article's title) and ``idx`` (the
        heading's line, from 0). Tokens are put together again (:func:`as_written`).

    Raises:
        DataError: the file cannot be read, or has no such sections.
    """
    lines = read_text(path).splitlines()
    rows, seen = [], set()
    for place, line in enumerate(lines):
        heading = heading_of(line)
        following = next((text for text in lines[place + 1 :] if text.strip()), "")
        if heading is None or "<unk>" in heading[1] or not following or heading_of(following):
            continue
        pair = as_written(_opening(following)), as_written(heading[1])
        if pair not in seen:
            seen.add(pair)
            rows.append((*pair, heading[0], place))
    if not rows:
        raise DataError(f"{path}: no headings in WikiText's form (' = Title = ') with text below them.")
    return pd.DataFrame(rows, columns=["prompt", "answer", "level", "idx"])


def _opening(paragraph: str) -> str:
    words = paragraph.split()
    if len(words) <= OPENING_WORDS:
        return " ".join(words)
    ends = [i + 1 for i, word in enumerate(words[:OPENING_WORDS]) if word in (".", "?", "!")]
    return " ".join(words[: ends[-1] if ends else OPENING_WORDS])
