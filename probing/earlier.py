"""The run that an output folder already holds: whether a new one may go on in it, and its removal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probing.config import ProbeConfig
from probing.parts import part_files
from spafit import io
from spafit.errors import OutputError

if TYPE_CHECKING:
    from probing.tasks.base import Task
    from spafit.models import LoadedModel

#: Options that say where and how a run is carried out; any other one that differs would replace finished results.
#: The tasks are compared one by one, and measures are added.
_HOW = ("tasks", "measures", "device", "cache_dir", "offline", "allow_pickle", "out", "overwrite")

#: What a run writes beside its tasks' files.
_OWN_FILES = (
    *(f"{table}{suffix}" for table in ("scores", "summaries", "measures") for suffix in (".parquet", ".csv")),
    *("verdict.json", "strata.yaml", "report.html", "report.md", "figures/written.json", "run.json", "models.csv"),
    *("sensitivity.*", "breakdown.*", "breakdown_summaries.*", "complexity.*"),
    *(
        f"figures/{figure}*.png"
        for figure in (
            "layers",
            "tasks",
            "heatmap",
            "mix",
            "online-code",
            "variational-code",
            "conditional",
            "sensitivity",
            "breakdown",
            "complexity",
            "relative_depth",
        )
    ),
)


def find_run(config: ProbeConfig) -> Path | None:
    """Folder of the earlier run that ``config`` would write into, as far as that is known without the model.

    Without ``out`` the folder is named after the model; then it is that of a run on the same model reference.
    """
    if config.out is not None:
        return Path(config.out)
    for file in sorted(Path("runs").glob("*/run.json")):
        try:
            earlier = _read(file.parent)["config"]
        except OutputError:  # another folder's damage is no matter of this run; its own is found once its name is known
            continue
        if earlier.get("model") == config.model and earlier.get("out") is None:
            return file.parent
    return None


def check_same_run(out: Path, config: ProbeConfig, tasks: Sequence[Task], *, loaded: LoadedModel | None = None) -> None:
    """Refuse a folder whose finished results a run with these options would replace.

    The same options go on with the run; more tasks than before are added to it. A task counts as the same if its name,
    level and items are.

    Args:
        out: the output folder.
        config: the options of the new run.
        tasks: its tasks.
        loaded: its model, if that has been loaded; the weights are compared too.

    Raises:
        OutputError: names the options that differ, and the remedy.
    """
    if not (out / "run.json").exists() or config.overwrite == "always":
        return
    earlier = _read(out)
    if not earlier["config"]:
        different = ["it was not made by spafit-probe or probing.probe_layers"]
    else:
        now, default = io.plain(config.to_dict()), io.plain(ProbeConfig().to_dict())
        before = {f.name: earlier["config"].get(f.name, default[f.name]) for f in fields(ProbeConfig)}
        different = [
            f"--{name.replace('_', '-')} ({_words(before[name])} there, {_words(now[name])} here)"
            for name in before
            if name not in _HOW and before[name] != now[name]
        ]
        finished = {name: t for name, t in earlier["tasks"].items() if (out / "parts" / f"{name}.json").exists()}
        different += _tasks_that_differ(finished, tasks, limited=before["limit"] != now["limit"])
        if loaded is not None and not different and finished:
            different += _weights_that_differ(earlier.get("model", {}), loaded)
    if different:
        raise OutputError(
            f"--out {out} holds a run with other options, whose results would be replaced: {'; '.join(different)}. "
            "Choose another --out, give the same options, or replace that run with --overwrite always."
        )


def clear_run(out: Path) -> None:
    """Remove the files of the run that ``out`` holds, if any, and the folders that this empties; nothing else.

    Runs of ``spafit sensitivity`` below it, each of which differs from it in one choice, go with it.
    """
    if not (out / "run.json").exists():
        return
    for further in (out / "sensitivity").glob("*"):
        clear_run(further)
        if further.is_dir() and not any(further.iterdir()):
            further.rmdir()
    names = {p.stem for p in (out / "parts").glob("*.json")}
    files = [out / f for name in names for f in (*part_files(name), f"parts/{name}.json")]
    files += [f for pattern in _OWN_FILES for f in out.glob(pattern)]
    for file in files:
        file.unlink(missing_ok=True)
    for folder in ("items", "probes", "parts", "figures", "sensitivity"):
        if (out / folder).is_dir() and not any((out / folder).iterdir()):
            (out / folder).rmdir()


def _read(out: Path) -> dict[str, Any]:
    """Content of run.json, with ``config`` and ``tasks`` as mappings (empty where they are missing)."""
    try:
        content = io.read_json(out / "run.json")
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{out / 'run.json'} cannot be read ({error}). Choose another --out, or replace what is there with "
            "--overwrite always."
        ) from error
    content = content if isinstance(content, dict) else {}
    mappings: dict[str, Any] = {
        key: content.get(key) if isinstance(content.get(key), dict) else {} for key in ("config", "tasks")
    }
    return {**content, **mappings}


def _tasks_that_differ(finished: Mapping[str, Any], tasks: Sequence[Task], *, limited: bool) -> list[str]:
    now = {t.name: t for t in tasks}
    absent = [name for name in finished if name not in now]
    found = [f"--tasks (without {_listed(absent)}, finished there)"] if absent else []
    both = [name for name in finished if name in now]
    if levels := [name for name in both if finished[name].get("level") != now[name].level]:
        found.append(f"the level of {_listed(levels)}")
    if items := [name for name in both if not limited and finished[name].get("digest") != now[name].digest]:
        found.append(f"the data of {_listed(items)}")
    return found


def _weights_that_differ(model: Mapping[str, Any], loaded: LoadedModel) -> list[str]:
    digests = ("weights_digest", "adapter_digest", "tokenizer_digest")
    same = all(model.get(name) == getattr(loaded, name) for name in digests)
    return [] if same else [f"the weights or tokenizer of --model {model.get('name')}"]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) < 4 else f"{', '.join(names[:2])} and {len(names) - 2} more"


def _words(value: Any) -> str:
    if value is None:
        return "default"
    return ",".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
