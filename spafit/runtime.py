"""Device, precision, local random generators, provenance and progress. Nothing global is touched."""

from __future__ import annotations

import hashlib
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from spafit.errors import UsageError

if TYPE_CHECKING:
    import torch
    from rich.console import Console

DTYPES = ("float32", "bfloat16", "float16")


def pick_device(name: str | None = None) -> str:
    """Return a usable torch device string: the one named, or the first available of cuda, mps, cpu.

    Raises:
        UsageError: the string names no device, or one that this machine does not have.
    """
    import torch

    if name in (None, "auto"):
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    assert name is not None
    try:
        torch.empty(1, device=torch.device(name))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(
            f"--device {name!r} cannot be used here ({str(error).splitlines()[0]}). "
            "Use 'auto', 'cpu', or a device that torch lists."
        ) from error
    return name


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype for one of ``float32``, ``bfloat16``, ``float16``."""
    import torch

    if name not in DTYPES:
        raise UsageError(f"--dtype {name!r} is not known. Use one of {', '.join(DTYPES)}.")
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def seed_sequence(seed: int, *keys: object) -> np.random.SeedSequence:
    """Seed sequence that depends on ``seed`` and on the text of ``keys``: different keys give independent streams."""
    digest = hashlib.sha256("\x1f".join(map(str, keys)).encode()).digest()
    return np.random.SeedSequence([seed, *np.frombuffer(digest, dtype=np.uint32).tolist()])


def generator(seed: int, *keys: object) -> np.random.Generator:
    """Local NumPy generator for ``seed`` and ``keys`` (see :func:`seed_sequence`)."""
    return np.random.default_rng(seed_sequence(seed, *keys))


@contextmanager
def torch_seed(seed: int, *keys: object) -> Iterator[None]:
    """Seed torch's global generators inside the block and restore their state on exit.

    Only for code that draws from the global state by itself, such as a model's own weight initialisation.
    """
    import torch

    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        torch.manual_seed(int(seed_sequence(seed, *keys).generate_state(1, np.uint32)[0]))
        yield


def provenance() -> dict[str, Any]:
    """Versions and machine facts for ``run.json``: no user, host or path is recorded."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version()}
    for package in (
        "spafit",
        "torch",
        "transformers",
        "tokenizers",
        "scikit-learn",
        "numpy",
        "pandas",
        "peft",
    ):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "versions": versions,
        "platform": platform.system(),
        "machine": platform.machine(),
        "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def stderr_console(*, quiet: bool = False) -> Console:
    """Rich console on stderr for progress and notes; plain text without a terminal; honours NO_COLOR."""
    from rich.console import Console

    return Console(file=sys.stderr, quiet=quiet, highlight=False, soft_wrap=not sys.stderr.isatty())


class Progress:
    """Progress with remaining time on stderr: a bar on a terminal, otherwise a line at most every ten seconds.

    Use as a context manager; ``advance`` takes amounts in the unit of ``total``.
    """

    def __init__(self, description: str, total: float, *, quiet: bool = False, interval_s: float = 10.0):
        self.description, self.total, self.quiet, self.interval_s = description, total, quiet, interval_s
        self.done = 0.0
        self._start = self._last = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        self._start = self._last = time.monotonic()
        if not self.quiet and sys.stderr.isatty():
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=stderr_console(),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(self.description, total=self.total)
        return self

    def advance(self, amount: float = 1.0, *, description: str | None = None) -> None:
        """Add ``amount`` of finished work; optionally change the words shown."""
        self.done += amount
        if description is not None:
            self.description = description
        if self._bar is not None:
            self._bar.update(self._task, advance=amount, description=self.description)
            return
        now = time.monotonic()
        if not self.quiet and now - self._last >= self.interval_s and self.done < self.total:
            self._last = now
            left = (now - self._start) * (self.total - self.done) / max(self.done, 1e-9)
            sys.stderr.write(
                f"{self.description}: {100 * self.done / max(self.total, 1e-9):.0f} % "
                f"({now - self._start:.0f} s, about {left:.0f} s left)\n"
            )
            sys.stderr.flush()

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()
