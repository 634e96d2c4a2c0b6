"""Names of classes, compared: the same name may be written in another case, and may stand in another place."""

from __future__ import annotations

import re
from collections.abc import Sequence


def are_placeholders(names: Sequence[str]) -> bool:
    """Whether the names are LABEL_0, LABEL_1 and so on, which transformers gives to classes without names."""
    return all(re.fullmatch(rf"LABEL_{i}", name) for i, name in enumerate(names))


def places_of(wanted: Sequence[str], names: Sequence[str]) -> list[int] | None:
    """The place in ``names`` of each of ``wanted``; None where the two are not the same set.

    Case, and spaces, hyphens and underscores, make no difference unless two names of one side differ by them alone.
    """
    plain, other = [_plain(n) for n in names], [_plain(n) for n in wanted]
    if len(set(plain)) < len(plain) or len(set(other)) < len(other):
        plain, other = list(names), list(wanted)
    if sorted(plain) != sorted(other):
        return None
    return [plain.index(n) for n in other]


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name.strip()).casefold()
