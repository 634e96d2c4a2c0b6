"""The options of ``table:`` and ``hub:`` references: which columns hold what."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import get_args

from probing.tasks.base import ITEM_COLUMNS, LEVELS, UNITS
from spafit.data.tables import Quoting
from spafit.errors import TaskError, did_you_mean

_OPTION = re.compile(r",([A-Za-z0-9_]+)=")


@dataclass(frozen=True)
class Options:
    """What may follow the path or name in a ``table:`` or ``hub:`` reference, as ``,option=value``.

    Attributes:
        text: column of the text: a string, or a list of words.
        text2: column of the second text of a pair.
        pairs: how the two texts of a pair are read: ``cross`` (as one input, so that each is seen in the light of the
            other), ``features`` (each alone; the probe gets [u; v; |u − v|; u · v] of their states) or ``target`` (in
            an encoder-decoder, the first by the encoder and the second, word by word, by the decoder).
        label: column of the label; lists, one label per word, make it a token classification.
        kind: ``classes`` (the default), or ``number`` for labels that are measurements and probed by regression.
        split: column that tells the split, in a single table.
        group: column whose value clusters items for the intervals (a document); by default equal texts form a cluster.
        keep: column kept as metadata of the items, under its own name; several between ``|``. Results can be split by
            it (``spafit breakdown``); one whose cells are all numbers can be a control (``--controls column:NAME``).
        unit: ``word`` reads both columns as whitespace-separated lists; otherwise what the columns imply.
        level: level that the task is filed under (``other``).
        name: the task's name; by default that of the file or, for ``train.tsv`` and the like, of its folder.
        header: ``yes`` or ``no``; by default ``no`` where all columns are numbers.
        quoting: ``none``, ``minimal`` or ``auto`` (none for TSV, minimal for CSV).
        train: training file, relative to the path (hub: name of the training split); likewise ``dev`` and ``test``.
        dev: see ``train``.
        test: see ``train``.
        config: hub only: configuration (subset) of the data set.
        revision: hub only: branch, tag or commit.
    """

    text: str = ""
    text2: str = ""
    pairs: str = "cross"
    label: str = ""
    kind: str = "classes"
    split: str = ""
    group: str = ""
    keep: str = ""
    unit: str = ""
    level: str = "other"
    name: str = ""
    header: str = ""
    quoting: str = "auto"
    train: str = ""
    dev: str = ""
    test: str = ""
    config: str = ""
    revision: str = ""

    @property
    def columns(self) -> dict[str, str]:
        """Option and column name of the columns that are read."""
        named = {k: getattr(self, k) for k in ("text", "text2", "label", "split", "group")}
        return {**{k: v for k, v in named.items() if v}, **{f"keep {c}": c for c in self.kept}}

    @property
    def kept(self) -> tuple[str, ...]:
        """Columns that are kept as metadata."""
        return tuple(c for c in self.keep.split("|") if c)

    @property
    def files(self) -> dict[str, str]:
        """The splits that the reference names itself."""
        return {k: v for k in ("train", "dev", "test") if (v := getattr(self, k))}


TABLE_ONLY, HUB_ONLY = ("header", "quoting"), ("config", "revision")


def parse_options(reference: str, body: str, *, forbidden: Sequence[str]) -> tuple[str, Options]:
    """Split ``PATH,option=value,…`` at the commas that an option follows, so paths and columns may hold commas.

    Raises:
        TaskError: an unknown, repeated, empty, missing or impossible option; names the reference.
    """
    allowed = [f.name for f in fields(Options) if f.name not in forbidden]
    target, *rest = _OPTION.split(body)
    given: dict[str, str] = {}
    for key, value in zip(rest[::2], rest[1::2], strict=True):
        if key not in allowed:
            raise TaskError(
                f"{reference!r}: unknown option {key!r}.{did_you_mean(key, allowed)} Use {', '.join(allowed)}."
            )
        if key in given or not value:
            raise TaskError(f"{reference!r}: option {key!r} {'is given twice' if key in given else 'has no value'}.")
        given[key] = value
    options = Options(**given)
    choices = {
        "unit": ("", *UNITS),
        "pairs": ("cross", "features", "target"),
        "kind": ("classes", "number"),
        "level": LEVELS,
        "header": ("", "yes", "no"),
        "quoting": get_args(Quoting),
    }
    for key, values in choices.items():
        if getattr(options, key) not in values:
            raise TaskError(
                f"{reference!r}: {key}={getattr(options, key)!r} is not one of {', '.join(v for v in values if v)}."
            )
    if not target or not options.text or not options.label:
        raise TaskError(f"{reference!r}: a path (or name), text=COLUMN and label=COLUMN are needed.")
    if options.pairs != "cross" and not options.text2:
        raise TaskError(f"{reference!r}: pairs={options.pairs} needs a second text; give text2=COLUMN.")
    reserved = {*ITEM_COLUMNS, "span2", "text2"}
    if clash := sorted(reserved & set(options.kept)):
        raise TaskError(f"{reference!r}: keep={clash[0]} is a name that items use themselves; rename that column.")
    if options.split and options.files:
        raise TaskError(f"{reference!r}: give either split= or train=, dev= and test=, not both.")
    return target, options
