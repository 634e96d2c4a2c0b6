"""Tasks from a data set of the ``datasets`` library: a name on the hub, or a folder saved by the library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from probing.tasks.base import Task
from probing.tasks.columns import SPLIT_NAMES, Part, task_from_parts
from probing.tasks.reading import safe_name
from probing.tasks.table_options import TABLE_ONLY, Options, parse_options
from spafit.data.hub import ask_for_data_set
from spafit.errors import DataError, HubError, TaskError, did_you_mean

_REMEDY = (
    "Use a folder that datasets saved (save_to_disk), a table: file, or HF_HUB_OFFLINE=1 for a data set that was "
    "downloaded before."
)


def hub_tasks(body: str, *, base: Path) -> list[Task]:
    """Read the task of a reference ``hub:NAME,text=…,label=…`` (``body`` is what follows the prefix).

    ``NAME`` is a folder that ``Dataset.save_to_disk`` wrote, or a data set on the hub, with ``config=`` for its
    configuration and ``revision=`` for a commit. ``train=``, ``dev=`` and ``test=`` choose splits by name; otherwise
    those with the usual names are used. Class indices become class names. A test split without labels (-1) is passed
    over. Everything else is as in :func:`probing.tasks.columns.table_tasks`. Code from the hub is never run.

    Raises:
        HubError: the library is missing, or the hub does not answer or does not have the data set.
        DataError: a folder that the library did not write.
        TaskError: the reference or the task does not hold together.
    """
    reference = f"hub:{body}"
    name, options = parse_options(reference, body, forbidden=TABLE_ONLY)
    try:
        import datasets
    except ImportError as error:
        raise HubError(f"{reference!r} needs the library datasets: pip install 'spafit[datasets]'.") from error
    folder = base / Path(name).expanduser()
    if folder.is_dir():
        try:
            content: Any = datasets.load_from_disk(str(folder))
        except FileNotFoundError as error:
            raise DataError(
                f"{folder}: was not saved by datasets (save_to_disk). Read files in a folder with table: instead."
            ) from error
    elif name.count("/") > 1 or name.startswith(("/", ".", "~")):
        raise DataError(f"{folder}: no such folder.")
    else:
        content = _download(name, options)
    if isinstance(content, datasets.Dataset):
        content = {"": content}
    elif not isinstance(content, datasets.DatasetDict):
        raise DataError(f"{reference!r}: holds a {type(content).__name__}, which is neither a data set nor its splits.")
    parts = [
        Part(split, f"{name} ({key or 'row'})", _frame(content[key], options), optional)
        for split, key, optional in _splits(reference, content, options)
    ]
    task = task_from_parts(
        parts,
        options,
        name=options.name or safe_name(Path(name).name).lower(),
        source=f"data set {Path(name).name}" + (f" ({options.config})" if options.config else ""),
        licence=next((d.info.license for d in content.values() if d.info.license), "see the data set's page"),
    )
    return [task]


def _download(name: str, options: Options) -> Any:
    import datasets
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        ask_for_data_set(name, revision=options.revision or None, remedy=_REMEDY)
    try:
        return datasets.load_dataset(name, options.config or None, revision=options.revision or None)
    except (ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        raise HubError(f"The hub cannot be reached for data set {name!r}. {_REMEDY}") from error
    except (ValueError, RuntimeError) as error:  # an unknown configuration, or a data set that needs its own code
        raise TaskError(f"Data set {name!r} cannot be read: {str(error).splitlines()[0]}") from error


def _splits(reference: str, content: Mapping[str, Any], options: Options) -> list[tuple[str, str, bool]]:
    """Split, name in the data set, and whether it was merely found by its name."""
    if options.files:
        for split, key in options.files.items():
            if key not in content:
                raise TaskError(
                    f"{reference!r}: has no split {key!r} ({split}=).{did_you_mean(key, content)} "
                    f"It has {', '.join(content)}."
                )
        chosen = [(split, key, False) for split, key in options.files.items()]
        if "train" not in options.files and "train" in content:
            chosen.insert(0, ("train", "train", False))
        return chosen
    if options.split or len(content) == 1:
        return [("", key, False) for key in content]
    usual = [(SPLIT_NAMES[key], key, SPLIT_NAMES[key] == "test") for key in content if key in SPLIT_NAMES]
    if "train" not in {split for split, _, _ in usual}:
        raise TaskError(f"{reference!r}: has no training split; choose with train=. It has {', '.join(content)}.")
    return usual


def _frame(data: Any, options: Options) -> pd.DataFrame:
    """The columns that the task reads, class indices as names; other columns by name only."""
    wanted = set(options.columns.values())
    rows = pd.RangeIndex(1, len(data) + 1, name="line")
    content = {
        column: pd.Series(_named(data.features[column], data[column][:]), index=rows, dtype=object)
        if column in wanted
        else None
        for column in data.column_names
    }
    return pd.DataFrame(content, index=rows)


def _named(feature: Any, values: Sequence[Any]) -> list[Any]:
    """``values`` with class indices replaced by names; -1, the library's mark for a hidden label, is missing."""
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        return [None if v is None or v < 0 else feature.names[v] for v in values]
    inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) else None)
    if isinstance(inner, datasets.ClassLabel):
        return [None if v is None else [None if i < 0 else inner.names[i] for i in v] for v in values]
    return list(values)
