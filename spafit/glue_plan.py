"""What `spafit glue` runs: tasks × methods × seeds from one YAML file, checked line by line before anything trains."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files as resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from spafit.data.glue_tasks import GLUE_TASKS, glue_task
from spafit.errors import ConfigError, SpafitError, UsageError, did_you_mean
from spafit.fields import FieldError, FieldPath, choice, integer, number, text
from spafit.presets import preset_config
from spafit.settings import TrainSettings
from spafit.strata import StrataConfig
from spafit.stratum import LINEAR_ROLES
from spafit.yaml_fields import entries, mapping, read_fields

if TYPE_CHECKING:
    from spafit.retain import PricedRemedy

SCHEMA_VERSION = 1
#: The tasks of the benchmark's average, in the benchmark's order. AX is answered by the model of ``mnli``.
NINE_TASKS = tuple(name for name in GLUE_TASKS if name != "ax")
_FIELDS = (
    "schema_version", "description", "model", "revision", "data", "tasks", "seeds", "settings", "task_settings",
    "files", "on_bad_rows",
)  # fmt: skip
_NAME = re.compile(r"[A-Za-z0-9][\w.:+-]*")


@dataclass(frozen=True)
class GlueMethod:
    """One row of the table.

    Attributes:
        name: what the table and the folders call it.
        strata: a preset's name, or a plan from a file.
        settings: fields of :class:`TrainSettings` that this method sets.
        task_settings: the same by task.
        retain: remedies against forgetting, as :func:`spafit.retain.parse_remedy` reads them.
        place: what their files are relative to.
    """

    name: str
    strata: StrataConfig | str
    settings: Mapping[str, Any] = field(default_factory=dict)
    task_settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    retain: tuple[str, ...] = ()
    place: Path = Path()

    @property
    def folder(self) -> str:
        """The name as a folder."""
        return self.name.replace(":", "-")

    def remedies(self) -> list[PricedRemedy]:
        """Fresh remedies for one run."""
        from spafit.retain import parse_remedy

        return [parse_remedy(text, folder=self.place) for text in self.retain]


@dataclass(frozen=True)
class GluePlan:
    """Tasks × methods × seeds on one model.

    Attributes:
        name: the file's name without its ending.
        model: hub id, folder or GGUF file; None for the built-in default.
        revision: branch, tag or commit of a hub model.
        data: folder of GLUE files, ``hub`` or ``hub:NAME``; None where the caller must name it.
        tasks: of :data:`NINE_TASKS`.
        methods: rows of the table.
        seeds: one run each.
        settings: fields of :class:`TrainSettings` for every run.
        task_settings: the same by task.
        files: task -> split -> file name, for GLUE files of other names.
        on_bad_rows: what to do about malformed lines, as :func:`spafit.data.glue.read_glue` takes it.
        description: one sentence.
    """

    name: str
    model: str | None
    revision: str | None
    data: str | None
    tasks: tuple[str, ...]
    methods: tuple[GlueMethod, ...]
    seeds: tuple[int, ...] = (0,)
    settings: Mapping[str, Any] = field(default_factory=dict)
    task_settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    files: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    on_bad_rows: Literal["error", "skip"] = "error"
    description: str = ""

    @classmethod
    def load(cls, source: str | Path) -> GluePlan:
        """Read a plan file, or the shipped plan of that name.

        Raises:
            ConfigError: there is no such file or plan, or it does not hold together; names file, line and field.
        """
        path = Path(source)
        shipped = shipped_plans()
        if not path.is_file() and str(source) in shipped:
            path = shipped[str(source)]
        try:
            return parse(path.read_bytes().decode("utf-8-sig"), file=str(path), folder=path.parent, name=path.stem)
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
        except OSError as error:
            hint = did_you_mean(str(source), shipped)
            raise ConfigError(
                f"Plan {str(source)!r} is neither a file that can be read ({error.strerror}) nor a shipped plan "
                f"({', '.join(shipped)}).{hint}"
            ) from error

    def settings_of(self, method: GlueMethod, task: str) -> TrainSettings:
        """Settings of one cell: the plan's, over them the task's, the method's, and the method's for the task."""
        layers = (self.settings, self.task_settings.get(task, {}), method.settings, method.task_settings.get(task, {}))
        return TrainSettings(**{name: value for layer in layers for name, value in layer.items()})

    def narrowed(
        self,
        *,
        tasks: Sequence[str] | None = None,
        methods: Sequence[str] | None = None,
        seeds: int | None = None,
    ) -> GluePlan:
        """The same plan with some of its tasks and methods, or with the seeds 0 … ``seeds`` − 1.

        Raises:
            UsageError: the plan has no such task or method.
        """
        known = [m.name for m in self.methods]
        for what, asked, present in (("task", tasks, self.tasks), ("method", methods, known)):
            for name in asked or ():
                if name not in present:
                    raise UsageError(
                        f"The plan {self.name} has no {what} {name!r}. It has {', '.join(present)}."
                        f"{did_you_mean(name, present)}"
                    )
        return replace(
            self,
            tasks=self.tasks if not tasks else tuple(t for t in self.tasks if t in tasks),
            methods=self.methods if not methods else tuple(m for m in self.methods if m.name in methods),
            seeds=self.seeds if seeds is None else tuple(range(seeds)),
        )


def shipped_plans() -> dict[str, Path]:
    """Name and file of every plan that comes with the package."""
    folder = Path(str(resources("spafit") / "plans"))
    return {p.stem: p for p in sorted(folder.glob("*.yaml"))}


def parse(source: str, *, file: str, folder: Path, name: str) -> GluePlan:
    """Read a plan from text; paths in it are relative to ``folder``.

    Raises:
        ConfigError: ``file``, line, field, what was got, what is allowed, and the remedy.
    """
    return read_fields(source, file=file, what="a plan", build=lambda content, _: _from_plain(content, folder, name))


def _from_plain(content: Any, folder: Path, name: str) -> GluePlan:
    top = mapping(content, (), ("methods",), _FIELDS, None)
    if integer(top.get("schema_version", SCHEMA_VERSION), ("schema_version",), minimum=1) > SCHEMA_VERSION:
        raise FieldError(
            ("schema_version",), f"{top['schema_version']} is newer than this package's {SCHEMA_VERSION}. Upgrade."
        )
    given = {k: None if top.get(k) is None else text(top[k], (k,)) for k in ("model", "revision", "data")}
    model, data = given["model"], given["data"]
    if model is not None and (folder / model).exists():
        model = str(folder / model)
    if data is not None and data.partition(":")[0] != "hub":
        data = str(folder / Path(data).expanduser())
    if given["revision"] is not None and model is None:
        raise FieldError(("revision",), "a revision needs a model. Add model: the hub's name.")
    plan = GluePlan(
        name,
        model,
        given["revision"],
        data,
        _tasks(top.get("tasks", "all")),
        tuple(_method(m, ("methods", i), folder) for i, m in enumerate(entries(top["methods"], ("methods",)))),
        _seeds(top.get("seeds", 1)),
        _settings(top.get("settings", {}), ("settings",)),
        _by_task(top.get("task_settings", {}), ("task_settings",)),
        _files(top.get("files", {})),
        choice(top.get("on_bad_rows", "error"), ("on_bad_rows",), ("error", "skip"), "way with bad rows"),  # type: ignore[arg-type]
        str(top.get("description", "")),
    )
    if not plan.methods:
        raise FieldError(("methods",), "the list is empty. Name a preset or a strata.yaml.")
    folders: dict[str, str] = {}
    for i, method in enumerate(plan.methods):
        if method.folder.lower() in folders:
            raise FieldError(
                ("methods", i),
                f"{method.name!r} goes by the same folder as {folders[method.folder.lower()]!r}. Give it another name.",
            )
        folders[method.folder.lower()] = method.name
        for task in plan.tasks:
            try:
                plan.settings_of(method, task)
            except UsageError as error:
                raise FieldError(("methods", i), f"settings for {task} together: {error}") from None
    return plan


def _method(entry: Any, path: FieldPath, folder: Path) -> GlueMethod:
    if isinstance(entry, str):
        entry = {"strata": entry}
        strata_path = path
    else:
        strata_path = (*path, "strata")
    got = mapping(entry, path, ("strata",), ("name", "settings", "task_settings", "retain"), None)
    wanted = text(got["strata"], strata_path)
    strata: StrataConfig | str = wanted
    if wanted.endswith((".yaml", ".yml", ".json")):
        file = folder / Path(wanted).expanduser()
        if not file.is_file():
            raise FieldError(strata_path, f"{wanted!r}: no such file ({file}). Paths are relative to the plan file.")
        strata = StrataConfig.load(file)
    else:
        _check_preset(wanted, strata_path)
    name = text(got.get("name", Path(wanted).stem if not isinstance(strata, str) else wanted), (*path, "name"))
    if not _NAME.fullmatch(name):
        raise FieldError(
            (*path, "name"), f"{name!r} names a folder: letters, digits, and . _ : + - after the first one."
        )
    texts = entries(got.get("retain", []), (*path, "retain"))
    method = GlueMethod(
        name,
        strata,
        _settings(got.get("settings", {}), (*path, "settings")),
        _by_task(got.get("task_settings", {}), (*path, "task_settings")),
        tuple(text(t, (*path, "retain", i)) for i, t in enumerate(texts)),
        folder,
    )
    try:
        method.remedies()
    except SpafitError as error:
        raise FieldError((*path, "retain"), str(error)) from None
    return method


def _check_preset(name: str, path: FieldPath) -> None:
    """Whether there is such a preset; whether it fits a model shows on the model, so any depth is taken here."""

    def growing(plan: StrataConfig) -> int:
        return sum((s.blocks[1] - s.blocks[0]) * s.lora.rank for s in plan.strata if s.lora is not None)

    try:
        preset_config(name, blocks=1000, roles={"encoder": LINEAR_ROLES}, count=growing)
    except ConfigError as error:
        raise FieldError(path, str(error)) from None


def _tasks(value: Any) -> tuple[str, ...]:
    if value == "all":
        return NINE_TASKS
    names: list[str] = []
    for i, given in enumerate(entries(value, ("tasks",))):
        path: FieldPath = ("tasks", i)
        name = _task(given, path, NINE_TASKS)
        if name in names:
            raise FieldError(path, f"{name!r} stands here twice. Remove one.")
        names.append(name)
    if not names:
        raise FieldError(("tasks",), "the list is empty. Name tasks, or write all.")
    return tuple(n for n in NINE_TASKS if n in names)


def _task(given: Any, path: FieldPath, allowed: Sequence[str]) -> str:
    try:
        name = glue_task(text(given, path)).name
    except UsageError as error:
        if isinstance(error, FieldError):
            raise
        short = given.lower().replace("-", "").replace("_", "")
        raise FieldError(
            path, f"{given!r} is no task of GLUE. Allowed: {', '.join(allowed)}.{did_you_mean(short, allowed)}"
        ) from None
    if name not in allowed:
        raise FieldError(path, "ax has no training split; the model of mnli answers it. Leave it out.")
    return name


def _seeds(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        return tuple(range(integer(value, ("seeds",), minimum=1)))
    seeds = [integer(seed, ("seeds", i), minimum=0) for i, seed in enumerate(value)]
    if not seeds or len(set(seeds)) != len(seeds):
        raise FieldError(("seeds",), f"got {value}; write different whole numbers, or how many seeds.")
    return tuple(seeds)


@cache
def _setting_types() -> dict[str, Any]:
    return get_type_hints(TrainSettings)


def _settings(content: Any, path: FieldPath) -> dict[str, Any]:
    """Fields of :class:`TrainSettings`, each of its type and in its range."""
    got = mapping(content, path, (), tuple(_setting_types()), None)
    settings = {k: _value(v, (*path, k), _setting_types()[k]) for k, v in got.items()}
    for name, value in settings.items():
        try:
            TrainSettings(**{name: value})
        except UsageError as error:
            raise FieldError((*path, name), str(error)) from None
    return settings


def _value(value: Any, path: FieldPath, kind: Any) -> Any:
    options = get_args(kind)
    if get_origin(kind) is Literal:
        if isinstance(value, bool) and "on" in options:  # YAML reads a bare on or off as true or false
            value = "on" if value else "off"
        return choice(value, path, options, str(path[-1]))
    if get_origin(kind) is tuple:
        items = [(v, (*path, i)) for i, v in enumerate(entries(value, path))]
        return tuple(text(v, p) if options[0] is str else float(number(v, p)) for v, p in items)
    if type(None) in options:
        return None if value is None else _value(value, path, next(o for o in options if o is not type(None)))
    if kind is bool:
        if not isinstance(value, bool):
            raise FieldError(path, f"got {value!r}; write true or false.")
        return value
    return integer(value, path, minimum=0) if kind is int else float(number(value, path))


def _by_task(content: Any, path: FieldPath) -> dict[str, dict[str, Any]]:
    if not isinstance(content, dict):
        raise FieldError(path, f"got {content!r}; write a mapping from task to settings.")
    return {_task(t, (*path, t), NINE_TASKS): _settings(v, (*path, t)) for t, v in content.items()}


def _files(content: Any) -> dict[str, dict[str, str]]:
    if not isinstance(content, dict):
        raise FieldError(("files",), f"got {content!r}; write a mapping: {{wnli: {{train: train.rebuilt.tsv}}}}.")
    files: dict[str, dict[str, str]] = {}
    for given, names in content.items():
        task = _task(given, ("files", given), tuple(GLUE_TASKS))
        got = mapping(names, ("files", given), (), tuple(GLUE_TASKS[task].splits), None)
        files[task] = {split: text(file, ("files", given, split)) for split, file in got.items()}
    return files
