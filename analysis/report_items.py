"""The items of a report's browser: a fixed sample of test items, and at which hidden states each is right."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from probing.tables import VARIANT, ordered_tasks, primary_split, short_names, variants
from spafit.runtime import generator

if TYPE_CHECKING:
    from probing.results import ProbeResults

MAX_ITEMS = 200
MAX_TEXT = 320


def browsable_items(results: ProbeResults, *, budget: int) -> list[dict[str, Any]]:
    """For each task and (stack, site, pooling, probe): labels, hidden indices and sampled items with predictions.

    Predictions are those of the probe on the model (no control) at the run's first seed, on the primary test split. The
    sample is the same for the same items. Fewer items are taken, never fewer than ten a task, where their JSON would
    exceed ``budget`` bytes; long texts are cut. Tasks of numbers and of trees are left out: a
    prediction of one is never just right.

    Returns:
        Entries with ``task``, ``variant``, ``level``, ``split``, ``seed``, ``total`` (items the sample is from),
        ``labels``, ``hidden`` and ``items``: lists of [text, word, label, predicted label per hidden
        state], labels as indices.
    """
    names = short_names([t for _, t in ordered_tasks(results.scores)])
    several = {c for c in VARIANT if results.scores.groupby("task")[c].nunique().max() > 1}
    entries = []
    for level, task in ordered_tasks(results.scores):
        table = results.items(task)
        split = primary_split(results.scores, task)
        table = table[(table["control"].astype(str) == "none") & (table["split"].astype(str) == split)]
        if table.empty or "label" not in table or pd.api.types.is_float_dtype(table["label"]):
            continue
        table = table[table["seed"] == table["seed"].min()]
        for variant in variants(results.scores, task):
            part = table
            for column, value in zip(VARIANT, variant, strict=True):
                part = part[part[column].astype(str) == value]
            if part.empty:
                continue
            words = " · ".join(v for c, v in zip(VARIANT, variant, strict=True) if c in several)
            entry = _entry(part, key=task)
            entries.append({"task": names[task], "variant": words, "level": level, "split": split, **entry})
    size = len(json.dumps(entries, ensure_ascii=False).encode())
    if size > budget and entries:
        share = budget / size
        for entry in entries:
            entry["items"] = entry["items"][: max(10, int(share * len(entry["items"])))]
    for entry in entries:
        entry["items"] = [item for _, item in sorted(entry["items"])]
    return entries


def _entry(part: pd.DataFrame, *, key: str) -> dict[str, Any]:
    hidden = sorted(int(h) for h in part["hidden"].unique())
    first = part[part["hidden"] == hidden[0]]
    drawn = generator(0, "report items", key).permutation(len(first))[:MAX_ITEMS]
    ids = first["item"].astype(str).to_numpy()[drawn]
    chosen = part[part["item"].astype(str).isin(set(ids))]
    chosen = chosen.assign(item=chosen["item"].astype(str), prediction=chosen["prediction"].astype(str))
    predicted = chosen.pivot(index="item", columns="hidden", values="prediction").reindex(index=ids, columns=hidden)
    gold = first.iloc[drawn]
    labels = sorted(set(gold["label"].astype(str)) | set(np.unique(predicted.to_numpy(dtype=str))))
    index = {name: i for i, name in enumerate(labels)}
    rows = zip(
        drawn.tolist(),
        gold["text"].astype(str),
        gold["target"].astype(str),
        gold["label"].astype(str),
        predicted.to_numpy(dtype=str),
        strict=True,
    )
    items = [[n, [_cut(text, word), word, index[y], [index[p] for p in ps]]] for n, text, word, y, ps in rows]
    seed = int(part["seed"].iloc[0])
    return {"seed": seed, "total": len(first), "labels": labels, "hidden": hidden, "items": items}


def _cut(text: str, word: str) -> str:
    """At most ``MAX_TEXT`` characters, around the word if there is one."""
    if len(text) <= MAX_TEXT:
        return text
    at = max(text.find(word), 0) if word else 0
    start = max(0, min(at - MAX_TEXT // 2, len(text) - MAX_TEXT))
    return ("…" if start else "") + text[start : start + MAX_TEXT] + ("…" if start + MAX_TEXT < len(text) else "")


def json_for_script(content: Any) -> str:
    """JSON that can stand inside a ``<script>`` element: no character in it can end the element or start markup."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
