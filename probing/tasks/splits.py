"""Missing splits of a table: carved from training, deterministically, with equal texts kept together."""

from __future__ import annotations

from collections.abc import Sequence

from spafit.runtime import generator

#: Share of the training texts that a missing dev (or test) split gets.
HELD_OUT = 0.1


def with_all_splits(
    given: Sequence[str], texts: Sequence[int], labels: Sequence[Sequence[str]], *, stratify: bool
) -> tuple[list[str], list[str]]:
    """Complete the splits of some rows.

    Args:
        given: the split of each row; empty strings throughout if the data bring none.
        texts: number of each row's text; rows of one text are moved together.
        labels: the label (or the words' labels) of each row. No label is taken out of training altogether.
        stratify: whether to carve label by label, which needs one label per row.

    Returns:
        The split of each row, and notes on what was done.
    """
    splits = [split or "train" for split in given]
    if not any(given):
        _carve(splits, texts, labels, HELD_OUT, "test", stratify)
        _carve(splits, texts, labels, HELD_OUT / (1 - HELD_OUT), "dev", stratify)
        return splits, ["The data bring no splits: split 80/10/10 by text, deterministically."]
    notes, share = [], HELD_OUT
    if not set(splits) - {"train", "dev"}:
        if "dev" in splits:
            splits = ["test" if split == "dev" else split for split in splits]
            notes.append("There is no test split: the dev split is used as test.")
        else:
            count = _carve(splits, texts, labels, HELD_OUT, "test", stratify)
            share = HELD_OUT / (1 - HELD_OUT)
            notes.append(f"There is no test split: {count} training row(s) (10 % of the texts) are used as test.")
    if "dev" not in splits:
        count = _carve(splits, texts, labels, share, "dev", stratify)
        notes.append(f"There is no dev split: {count} training row(s) (10 % of the texts) are used as dev.")
    return splits, notes


def _carve(
    splits: list[str], texts: Sequence[int], labels: Sequence[Sequence[str]], share: float, into: str, stratify: bool
) -> int:
    """Move a ``share`` of the training texts to split ``into``, label by label, in place; the number of rows moved."""
    rows_of: dict[int, list[int]] = {}
    for i, split in enumerate(splits):
        if split == "train":
            rows_of.setdefault(texts[i], []).append(i)
    strata: dict[str, list[int]] = {}
    for text, rows in rows_of.items():
        strata.setdefault(labels[rows[0]][0] if stratify else "", []).append(text)
    left: dict[str, int] = {}  # texts per label that remain in training: no label may leave it altogether
    for rows in rows_of.values():
        for label in {label for i in rows for label in labels[i]}:
            left[label] = left.get(label, 0) + 1
    moved = 0
    for stratum, members in sorted(strata.items()):
        wanted = max(round(share * len(members)), 1 if len(members) >= 4 else 0)
        for k in generator(0, "table split", into, stratum, len(members)).permutation(len(members)):
            if wanted == 0:
                break
            found = {label for i in rows_of[members[k]] for label in labels[i]}
            if all(left[label] > 1 for label in found):
                for label in found:
                    left[label] -= 1
                for i in rows_of[members[k]]:
                    splits[i] = into
                moved += len(rows_of[members[k]])
                wanted -= 1
    return moved
