"""Tasks by reference: registered names and groups, files of the known formats, and YAML files that group them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pandas as pd

from probing.tasks.base import LEVELS, Level, Task
from spafit.errors import ConfigError, SpafitError, TaskError, UnknownTaskError, UsageError, did_you_mean

if TYPE_CHECKING:
    from probing.tasks.spans import SpanSource
    from probing.tasks.treebank import Treebank

TaskFactory = Callable[[], Task | Sequence[Task]]

#: Prefixes of references that read files or data sets.
PREFIXES = ("conllu:", "senteval:", "table:", "hub:", "edges:", "iob:", "propbank:", "images:")
#: Columns of :func:`list_tasks`.
LIST_COLUMNS = ("name", "kind", "level", "unit", "classes", "train", "dev", "test", "description", "licence")

_ENTRY_POINTS = "spafit.tasks"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
_registered: dict[str, TaskFactory] = {}
_built: dict[str, tuple[Task, ...]] = {}


def register_task(name: str, factory: TaskFactory) -> None:
    """Make a task, or a group of tasks, available under a name in this process.

    Packages register for good with an entry point in the group ``spafit.tasks`` whose value is such a factory.

    Args:
        name: letters, digits, ``_`` and ``-``.
        factory: called once, when the name is first used. It returns one task called ``name``, or several called
            ``<name>.<something>``, which are then a group.

    Raises:
        TaskError: the name is taken, or is no name.
    """
    if not _NAME.fullmatch(name):
        raise TaskError(f"Task name {name!r} cannot be registered: use letters, digits, '_' and '-'.")
    if name in _factories():
        raise TaskError(f"Task name {name!r} is registered already; choose another.")
    _registered[name] = factory


def list_tasks() -> pd.DataFrame:
    """All registered groups and tasks, one row each, with the columns of :data:`LIST_COLUMNS`.

    ``kind`` is ``group`` or ``task``; a group's row is followed by its tasks. ``train``, ``dev`` and ``test`` count
    items, all test splits together. A plug-in that cannot be loaded is listed with the reason as its description.
    """
    rows: list[tuple[object, ...]] = []
    for name in sorted(_factories()):
        try:
            tasks = _build(name)
        except SpafitError as error:
            rows.append((name, "group", "", "", 0, 0, 0, 0, f"cannot be loaded: {error}", ""))
            continue
        if tasks[0].name != name:
            sizes = [sum(s) for s in zip(*(_sizes(t) for t in tasks), strict=True)]
            rows.append((name, "group", "", "", 0, *sizes, f"{len(tasks)} tasks", ""))
        rows += [(t.name, "task", t.level, t.unit, len(t.labels), *_sizes(t), t.description, t.licence) for t in tasks]
    return pd.DataFrame(rows, columns=list(LIST_COLUMNS))


def _sizes(task: Task) -> tuple[int, int, int]:
    counts = task.items["split"].value_counts()
    train, dev = int(counts.get("train", 0)), int(counts.get("dev", 0))
    return train, dev, len(task.items) - train - dev


def load_tasks(references: Sequence[str], *, levels: Mapping[str, str] | Path | None = None) -> tuple[Task, ...]:
    """Read the tasks that references name, in their order.

    A reference is one of

    * a registered name (``core.tense``) or group (``core``); :func:`list_tasks` has them;
    * ``conllu:PATH#upos,deprel``: a treebank folder or file (:func:`probing.tasks.conllu.treebank_tasks`);
    * ``senteval:PATH#name,name``: a SentEval file or folder (:func:`probing.tasks.senteval.senteval_tasks`);
    * ``table:PATH,text=…,label=…``: TSV, CSV, JSON lines or parquet (:func:`probing.tasks.columns.table_tasks`);
    * ``hub:NAME,text=…,label=…``: a data set of the ``datasets`` library (:func:`probing.tasks.hub.hub_tasks`);
    * ``edges:PATH``: labelled spans in edge probing's JSON lines (:func:`probing.tasks.edges.edge_tasks`);
    * ``iob:PATH#spans,tags``: entities or other chunks in IOB2 (:func:`probing.tasks.iob.iob_tasks`);
    * ``propbank:PATH#constituents,roles``: parsed sentences with predicates
      (:func:`probing.tasks.propbank.propbank_tasks`);
    * ``images:PATH#class,intensity``: a folder of labelled images, a table of image files, or a saved data set
      (:func:`probing.tasks.images.image_tasks`);
    * a ``.yaml`` file that maps levels to lists of references, ``surface: [core.length, …]``, and files their tasks
      under those levels. Paths in it are relative to its folder.

    Args:
        references: the references; :func:`split_references` cuts a comma-separated list.
        levels: regroups the tasks: level per task name, or a YAML file that maps levels to lists of task names.

    Returns:
        Validated tasks with unique names. Tasks of one source share their corpus. A task that is named twice, in
        the same way, is there once.

    Raises:
        UnknownTaskError: an unknown reference.
        TaskError: a task that cannot be probed, or two tasks of one name.
        DataError: a malformed data file (names file and line).
        ConfigError: a YAML file that does not hold together.
    """
    loader = _Loader()
    tasks: dict[str, Task] = {}
    for reference in references:
        for task in loader.load(reference, base=Path()):
            known = tasks.setdefault(task.name, task)
            if known is not task and (known.level != task.level or known.digest != task.digest):
                raise TaskError(
                    f"Two different tasks are called {task.name!r} (the second from {reference!r}). "
                    "Load them in separate runs, or name one otherwise (name= in table: and hub: references)."
                )
    if levels is not None:
        tasks = _regrouped(tasks, levels)
    return tuple(task.validate() for task in check_together(tasks.values()))


def check_together(tasks: Iterable[Task]) -> tuple[Task, ...]:
    """Return the tasks if they can be probed in one run.

    Raises:
        TaskError: two tasks have one name, or two corpora have one name but different texts.
    """
    tasks = tuple(tasks)
    names = [task.name for task in tasks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise TaskError(f"Two tasks are called {twice[0]!r}. Name one otherwise, or probe them in separate runs.")
    corpora: dict[str, str] = {}
    for task in tasks:
        if corpora.setdefault(task.corpus.name, task.corpus.digest) != task.corpus.digest:
            raise TaskError(
                f"Two sources are called {task.corpus.name!r} but hold different texts. Rename one file or folder."
            )
    return tasks


def split_references(text: str) -> list[str]:
    """Cut a comma-separated list of references where a new one begins.

    After a registered name or a YAML file every comma separates. The references with a prefix have commas of their own:
    there a comma separates only if a known prefix, a registered name or a ``.yaml`` file follows, so
    ``core,conllu:PATH#upos,deprel`` is two references. A file whose name would be misread is named by itself.

    Raises:
        UsageError: an empty piece between two commas, or at an end.
    """
    references: list[str] = []
    for piece in text.split(","):
        stripped = piece.strip()
        if not stripped:
            raise UsageError(f"Empty task name in {text!r}: two commas in a row, or one at the end.")
        if references and references[-1].startswith(PREFIXES) and not _starts_reference(stripped):
            references[-1] += f",{piece}"
        else:
            references.append(stripped)
    return [reference.strip() for reference in references]


def _starts_reference(piece: str) -> bool:
    if piece.startswith(PREFIXES):
        return True
    if "=" in piece:  # an option of the reference before it, even if its value ends like a file
        return False
    return piece.endswith((".yaml", ".yml")) or piece.partition(".")[0] in _factories()


class _Loader:
    """Resolves references; what several of them name is read once."""

    def __init__(self) -> None:
        self._treebanks: dict[Path, Treebank] = {}
        self._spans: dict[tuple[str, Path], SpanSource] = {}

    def load(self, reference: str, *, base: Path) -> list[Task]:
        prefix, colon, body = reference.partition(":")
        if f"{prefix}:" in PREFIXES:
            if not body:
                raise TaskError(f"{reference!r}: what to read is missing after the colon.")
            readers: dict[str, Callable[[str, Path], list[Task]]] = {
                "conllu": self._conllu, "senteval": self._senteval, "table": self._table, "hub": self._hub,
                "edges": self._edges, "iob": self._iob, "propbank": self._propbank, "images": self._images,
            }  # fmt: skip
            return readers[prefix](body, base)
        if reference.endswith((".yaml", ".yml")):
            return self._grouped(base / Path(reference).expanduser())
        if colon and _NAME.fullmatch(prefix):
            raise UnknownTaskError(
                f"Unknown kind of task {prefix + ':'!r} in {reference!r}.{did_you_mean(prefix + ':', PREFIXES)} "
                f"Use {', '.join(PREFIXES)} or a registered name."
            )
        return _find(reference)

    def _conllu(self, body: str, base: Path) -> list[Task]:
        from probing.tasks.conllu import treebank_tasks
        from probing.tasks.treebank import read_treebank

        path, names = _path_and_names(body, base)
        key = path.resolve()
        if key not in self._treebanks:
            self._treebanks[key] = read_treebank(path)
        return treebank_tasks(self._treebanks[key], names)

    def _senteval(self, body: str, base: Path) -> list[Task]:
        from probing.tasks.senteval import senteval_tasks

        return senteval_tasks(*_path_and_names(body, base))

    def _table(self, body: str, base: Path) -> list[Task]:
        from probing.tasks.columns import table_tasks

        return table_tasks(body, base=base)

    def _hub(self, body: str, base: Path) -> list[Task]:
        from probing.tasks.hub import hub_tasks

        return hub_tasks(body, base=base)

    def _edges(self, body: str, base: Path) -> list[Task]:
        from probing.tasks.edges import edge_tasks

        return edge_tasks(base / Path(body).expanduser())

    def _iob(self, body: str, base: Path) -> list[Task]:
        from probing.tasks.iob import iob_tasks, read_iob

        path, names = _path_and_names(body, base)
        return iob_tasks(self._read_once("iob", path, read_iob), names)

    def _propbank(self, body: str, base: Path) -> list[Task]:
        from probing.tasks.propbank import propbank_tasks, read_propbank

        path, names = _path_and_names(body, base)
        return propbank_tasks(self._read_once("propbank", path, read_propbank), names)

    def _images(self, body: str, base: Path) -> list[Task]:
        from probing.tasks.images import image_tasks

        return image_tasks(body, base=base)

    def _read_once(self, prefix: str, path: Path, read: Callable[[Path], SpanSource]) -> SpanSource:
        key = prefix, path.resolve()
        if key not in self._spans:
            self._spans[key] = read(path)
        return self._spans[key]

    def _grouped(self, path: Path) -> list[Task]:
        """Tasks of a YAML file, each under the level that it stands below."""
        tasks = []
        for level, references in _read_levels(path).items():
            for reference in references:
                if reference.endswith((".yaml", ".yml")):
                    raise ConfigError(f"{path}: {level}: {reference!r}: a file of groups cannot name another one.")
                tasks += [task.regroup(level) for task in self.load(reference, base=path.parent)]
        return tasks


def _path_and_names(body: str, base: Path) -> tuple[Path, list[str] | None]:
    """Path and the names after ``#``; a path that exists as a whole may itself hold a ``#``."""
    whole = base / Path(body).expanduser()
    if "#" not in body or whole.exists():
        return whole, None
    path, _, fragment = body.rpartition("#")
    names = [name.strip() for name in fragment.split(",")]
    if not path or not all(names):
        raise TaskError(f"{body!r}: give PATH#name,name, with a path before '#' and names after it.")
    return base / Path(path).expanduser(), names


def _read_levels(path: Path) -> dict[Level, list[str]]:
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        content: Any = yaml.safe_load(text)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: is not YAML ({getattr(error, 'problem', None) or error}).") from error
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{path}: must map levels ({', '.join(LEVELS)}) to lists of tasks.")
    keys = [key for key, _ in node.value] if node else []
    twice = [key for i, key in enumerate(keys) if key.value in {k.value for k in keys[:i]}]
    if twice:
        raise ConfigError(
            f"{path}:{twice[0].start_mark.line + 1}: {twice[0].value!r} stands there twice; merge the lists."
        )
    for level, references in content.items():
        if level not in LEVELS:
            raise ConfigError(
                f"{path}: {level!r} is not a level.{did_you_mean(str(level), LEVELS)} Use {', '.join(LEVELS)}."
            )
        if not isinstance(references, list) or not all(isinstance(r, str) for r in references):
            raise ConfigError(f"{path}: {level}: must be a list of task references.")
    return content


def _regrouped(tasks: dict[str, Task], levels: Mapping[str, str] | Path) -> dict[str, Task]:
    if isinstance(levels, Path):
        levels = {name: level for level, names in _read_levels(levels).items() for name in names}
    found = dict(tasks)
    for name, level in levels.items():
        if name not in tasks:
            raise TaskError(
                f"The levels name {name!r}, which is not among the tasks loaded.{did_you_mean(name, tasks)} "
                f"They are {', '.join(tasks)}."
            )
        if level not in LEVELS:
            raise TaskError(f"Level {level!r} of task {name!r} is not one of {', '.join(LEVELS)}.")
        found[name] = tasks[name].regroup(cast(Level, level))
    return found


def _factories() -> dict[str, TaskFactory | EntryPoint]:
    """Names that are registered here or by installed packages; nothing is imported."""
    return {**_installed(), **_registered}


@cache
def _installed() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=_ENTRY_POINTS):
        other = found.get(point.name)
        if other and other.value != point.value:
            raise TaskError(
                f"Two installed packages register the task name {point.name!r} ({other.value}, {point.value}). "
                "Uninstall one of them."
            )
        found[point.name] = point
    return found


def _build(name: str) -> tuple[Task, ...]:
    """The tasks of a registered name, built on first use."""
    if name not in _built:
        factory = _factories()[name]
        if isinstance(factory, EntryPoint):
            try:
                factory = cast(TaskFactory, factory.load())
            except (ImportError, AttributeError) as error:
                raise TaskError(
                    f"Tasks {name!r} come from an installed package that cannot be imported ({error})."
                ) from error
        made = factory()
        tasks = (made,) if isinstance(made, Task) else tuple(made)
        wrong = [t.name for t in tasks if not (t.name.startswith(f"{name}.") or (t.name == name and len(tasks) == 1))]
        if not tasks or wrong or len({t.name for t in tasks}) < len(tasks):
            raise TaskError(
                f"The factory of tasks {name!r} must return a task of that name, or differently named tasks "
                f"'{name}.…'; got {', '.join(t.name for t in tasks) or 'none'}."
            )
        _built[name] = tuple(task.validate() for task in tasks)
    return _built[name]


def _find(name: str) -> list[Task]:
    factories = _factories()
    group = name.partition(".")[0]
    if name in factories:
        return list(_build(name))
    options = [*factories, *PREFIXES]
    if group in factories:
        tasks = _build(group)
        found = [t for t in tasks if t.name == name]
        if found:
            return found
        options = [t.name for t in tasks]
    raise UnknownTaskError(
        f"Unknown task {name!r}.{did_you_mean(name, options)} See 'spafit tasks' for the registered ones; "
        f"files are named with {', '.join(PREFIXES)}."
    )
