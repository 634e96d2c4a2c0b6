"""The activation cache as a whole: where it lies, what is in it, who uses it, and its size limit."""

from __future__ import annotations

import os
import re
import shutil
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probing.store import data_path, manifest_path, shard_state
from spafit.errors import OutputError, StoreError, UsageError
from spafit.io import read_json, write_json

try:
    import fcntl
except ImportError:  # Windows: no advisory locks; results stay right, work may be done twice
    fcntl = None  # type: ignore[assignment]

#: Default size limit in bytes; ``SPAFIT_CACHE_LIMIT`` (such as ``200GB``) overrides it.
DEFAULT_LIMIT = 50 * 10**9
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def cache_root(cache_dir: Path | None = None) -> Path:
    """The cache folder: the one given, ``SPAFIT_CACHE``, or the user's cache folder."""
    if cache_dir is not None:
        return Path(cache_dir)
    if named := os.environ.get("SPAFIT_CACHE"):
        return Path(named).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("spafit"))


def activations_folder(cache_dir: Path | None = None) -> Path:
    """Where the stores lie, one folder per content address."""
    return cache_root(cache_dir) / "activations"


def parse_size(text: str) -> int:
    """Bytes from a size such as ``50GB``, ``1.5 TB`` or ``1000000``.

    Raises:
        UsageError: it is not a size.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]?b?)\s*", text, flags=re.IGNORECASE)
    unit = found[2].upper() if found else "?"
    unit = unit if unit in _UNITS else unit + "B"
    if found is None or unit not in _UNITS:
        raise UsageError(f"{text!r} is not a size. Write bytes, or a number with KB, MB, GB or TB, such as 50GB.")
    return int(float(found[1]) * _UNITS[unit])


def cache_limit() -> int:
    """The size limit in bytes: ``SPAFIT_CACHE_LIMIT``, or :data:`DEFAULT_LIMIT` (50 GB)."""
    named = os.environ.get("SPAFIT_CACHE_LIMIT")
    return parse_size(named) if named else DEFAULT_LIMIT


# ---------------------------------------------------------------- locks


class Lock:
    """A lock held on a file until :meth:`release`, until the object is collected, or until the process dies."""

    def __init__(self, path: Path):
        self.path, self.descriptor = path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self.release = weakref.finalize(self, os.close, self.descriptor)


def lock(path: Path, *, shared: bool = False, wait: bool = True) -> Lock | None:
    """Take an advisory lock; None if others hold it and ``wait`` is False.

    Locks only save work and keep folders from being pruned under a reader: files are renamed into place, so results are
    right without them, as on file systems that have none.

    Raises:
        StoreError: the folder cannot be written.
    """
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            held = Lock(path)
        except FileNotFoundError:  # the folder was pruned between the two lines
            continue
        except OSError as error:
            raise StoreError(
                f"The activation cache at {path.parent} cannot be written: {error.strerror}. "
                "Name another place with --cache-dir or SPAFIT_CACHE."
            ) from error
        if fcntl is None:
            return held
        try:
            fcntl.flock(held.descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            held.release()
            return None
        except OSError:  # a file system without locks
            return held
        # While we waited the holder may have removed the file: then the lock guards nothing, so begin again.
        try:
            if os.path.samestat(os.fstat(held.descriptor), path.stat()):
                return held
        except FileNotFoundError:
            pass
        held.release()


def lease(folder: Path) -> Lock | None:
    """Mark a store as in use; pruning passes it by until the lock is released or collected."""
    return lock(folder / ".lease", shared=True)


def claim(folder: Path, shard: int, *, wait: bool) -> Lock | None:
    """Announce that this process computes a shard; None if another one does (and ``wait`` is False).

    The winner clears away what a killed process may have left half-written.
    """
    held = lock(folder / f".claim-{shard:05d}", wait=wait)
    if held is not None and fcntl is not None:
        for path in (data_path(folder, shard), manifest_path(folder, shard)):
            for left in folder.glob(f".{path.name}.*"):
                left.unlink(missing_ok=True)
    return held


def unclaim(held: Lock) -> None:
    """End a claim; its file goes first, so that who waits for it notices and looks again."""
    held.path.unlink(missing_ok=True)
    held.release()


# ---------------------------------------------------------------- entries


@dataclass(frozen=True)
class CacheEntry:
    """One store in the cache.

    Attributes:
        folder: where it lies; the name is its content address.
        facts: what ``store.json`` says: model, stack, series, precision, texts, tokens, shards.
        finished: shards whose manifest is there.
        bytes: size on disk.
        last_used: seconds since the epoch.
    """

    folder: Path
    facts: dict[str, Any]
    finished: int
    bytes: int
    last_used: float

    @property
    def shards(self) -> int:
        """Number of shards of the whole store."""
        return int(self.facts.get("shards", 0))


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Say in ``store.json`` what a store is, unless it does already, and mark it as used now."""
    path = folder / "store.json"
    if path.exists():
        os.utime(path)
        return
    try:
        write_json(path, facts)
    except OutputError as error:
        raise StoreError(f"The activation cache could not be written: {error}") from error


def entries(cache_dir: Path | None = None) -> list[CacheEntry]:
    """Every store in the cache, least recently used first."""
    root = activations_folder(cache_dir)
    found = []
    for folder in root.iterdir() if root.is_dir() else ():
        try:
            sizes = [p.stat().st_size for p in folder.iterdir()]
            facts_path = folder / "store.json"
            facts = read_json(facts_path) if facts_path.exists() else {}
            used = (facts_path if facts else folder).stat().st_mtime
        except (FileNotFoundError, NotADirectoryError):  # pruned meanwhile, or a stray file
            continue
        except ValueError:  # an unreadable store.json: listed, so that it can be pruned
            facts, used = {}, folder.stat().st_mtime
        finished = len(list(folder.glob("shard-*.json")))
        found.append(CacheEntry(folder, facts, finished, sum(sizes), used))
    return sorted(found, key=lambda e: (e.last_used, e.folder.name))


def damaged_shards(entry: CacheEntry) -> list[int]:
    """Shards of a store whose bytes are not what was written."""
    numbers = sorted(int(p.stem.partition("-")[2]) for p in entry.folder.glob("shard-*.json"))
    return [n for n in numbers if shard_state(entry.folder, n, again=True) == "damaged"]


def remove(entry: CacheEntry) -> bool:
    """Delete a store unless it is in use; True if it is gone."""
    held = lock(entry.folder / ".lease", wait=False)
    if held is None:
        return False
    try:
        shutil.rmtree(entry.folder, ignore_errors=True)
    finally:
        held.release()
    return not entry.folder.exists()


def prune(
    cache_dir: Path | None = None, *, limit: int, keep: Path | None = None, unused_days: float | None = None
) -> list[CacheEntry]:
    """Delete stores, least recently used first, until the cache is within ``limit`` bytes.

    Args:
        cache_dir: the cache.
        limit: bytes that may stay.
        keep: a store that stays whatever its age.
        unused_days: also delete every store that was not used for so many days.

    Returns:
        What was deleted. Stores in use by any process are passed by.
    """
    present = entries(cache_dir)
    total = sum(e.bytes for e in present)
    oldest = -1.0 if unused_days is None else time.time() - 86400 * unused_days
    gone = []
    for entry in present:
        if entry.folder == keep or (total <= limit and entry.last_used >= oldest):
            continue
        if remove(entry):
            gone.append(entry)
            total -= entry.bytes
    return gone


def make_room(folder: Path, *, needed: int, cache_dir: Path | None = None) -> None:
    """Prune so that ``needed`` more bytes in the store at ``folder`` keep the cache within its limit and the disk.

    Raises:
        StoreError: the limit or the disk is too small even without every store that is not in use.
    """
    limit = cache_limit()
    prune(cache_dir, limit=max(limit - needed, 0), keep=folder)
    remaining = sum(e.bytes for e in entries(cache_dir))
    if remaining + needed > limit:
        raise StoreError(
            f"The states need {needed / 1e9:.2f} GB more, and with what is in use the cache at {cache_root(cache_dir)} "
            f"would pass its limit of {limit / 1e9:.2f} GB. Raise SPAFIT_CACHE_LIMIT, or extract less: fewer texts, "
            "words, poolings or sites, or --dtype bfloat16."
        )
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StoreError(
            f"The states need {needed / 1e9:.2f} GB, and the disk of {cache_root(cache_dir)} has {free / 1e9:.2f} GB "
            "free. Free space, or name another place with --cache-dir or SPAFIT_CACHE."
        )
