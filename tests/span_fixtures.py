"""Small files of the span formats, written by hand, that several test files read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

#: "Ian ate ice cream": a subject, a verb, an object, in three phrases below the root.
IAN: dict[str, Any] = {
    "sent_id": "s-1",
    "words": ["Ian", "ate", "ice", "cream", "up", "today"],
    "parse": ["(TOP(S(NP*)", "(VP*", "(NP*", "*)", "(PRT*)", "(NP*))))"],
    "predicates": [
        {"index": 1, "args": [["ARG0", 0, 1], ["V", 1, 2], ["ARG1", 2, 4], ["C-V", 4, 5], ["ARGM-TMP", 5, 6]]}
    ],
}
#: Two predicates; the second has its particle beside it, in the span marked V; "to warm up" is an S and a VP.
RAN: dict[str, Any] = {
    "sent_id": "s-2",
    "words": ["We", "ran", "to", "warm", "up"],
    "parse": ["(TOP(S(NP*)", "(VP*", "(S(VP*", "(VP*", "*))))))"],
    "predicates": [
        {"index": 1, "args": [["ARG0", 0, 1], ["V", 1, 2], ["ARGM-PRP", 2, 5]]},
        {"index": 3, "args": [["ARG1", 0, 1], ["V", 3, 5]]},
    ],
}

NEW_YORK = "Ann\tB-PER\nleft\tO\nNew\tB-LOC\nYork\tI-LOC\n\n"
BOB = "Bob\tB-PER\nstayed\tO\nin\tO\nRome\tB-LOC\n\n"


def json_lines(path: Path, *rows: object) -> Path:
    """Write one JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def edge(text: str, *targets: object) -> dict[str, Any]:
    """A line of edge probing's format; a target is (span1, label) or (span1, span2, label)."""
    made = []
    for target in targets:
        *spans, label = target  # type: ignore[misc]
        made.append({**{f"span{i}": list(s) for i, s in enumerate(spans, 1)}, "label": label})
    return {"text": text, "targets": made, "info": {"source": "made"}}
