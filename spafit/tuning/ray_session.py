"""A local Ray for the time of a search: nothing on stdout, and the process is left as it was found."""

from __future__ import annotations

import logging
import os
import random
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from spafit.errors import UsageError
from spafit.runtime import seed_sequence

#: What Ray and Tune read while they run here; what stood there before is put back.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # each trial has one core
    "RAY_AIR_NEW_OUTPUT": "0",  # the newer one prints even when it is told not to
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean the same inside a trial
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # an interruption ends the search, as everywhere
}
_SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))


@contextmanager
def quiet_tune(*, seed: int) -> Iterator[Any]:
    """Give the module ``ray.tune``, and put back afterwards what it, its import and its runs change in this process.

    That is environment, warning filters, global random states, signal handlers, exception hook, and the level of Ray's
    and Optuna's loggers. Ray keeps its own logs in its temporary folder, and its token in the user's.

    Args:
        seed: of the global generators, from which some of Tune's schedulers draw.

    Raises:
        UsageError: Ray Tune is not installed.
    """
    environment, hook = dict(os.environ), sys.excepthook
    main = threading.current_thread() is threading.main_thread()
    handlers = {s: signal.getsignal(s) for s in _SIGNALS}
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 (Tune's generators)
    levels = {name: logging.getLogger(name).level for name in ("ray", "optuna")}
    with warnings.catch_warnings():
        try:
            os.environ.update(_ENVIRONMENT)
            tune = import_tune()
            draw = int(seed_sequence(seed, "ray").generate_state(1, np.uint32)[0])
            random.seed(draw)
            np.random.seed(draw)  # noqa: NPY002
            for name in levels:
                logging.getLogger(name).setLevel(logging.ERROR)
            yield tune
        finally:
            os.environ.clear()
            os.environ.update(environment)
            sys.excepthook = hook
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
            for number, handler in handlers.items():
                if main and handler is not None:
                    signal.signal(number, handler)


@contextmanager
def local_ray(workers: int, scratch: Path) -> Iterator[None]:
    """Run Ray on this machine with one core per worker, unless the caller has started one: that is used and left on.

    Args:
        workers: cores that a Ray started here has.
        scratch: folder for Tune's own state; emptied before, removed afterwards.
    """
    import ray

    shutil.rmtree(scratch, ignore_errors=True)
    started = not ray.is_initialized()
    if started:
        ray.init(
            num_cpus=workers, include_dashboard=False, log_to_driver=False, ignore_reinit_error=True,
            configure_logging=False,
        )  # fmt: skip
    try:
        yield
    finally:
        if started:
            ray.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)


def import_tune() -> Any:
    """The module ``ray.tune``, without the warnings and filters that come with its import.

    Raises:
        UsageError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            from ray import tune
    except ImportError as error:
        raise UsageError('This search needs Ray Tune. Install it with pip install "spafit[ray]".') from error
    return tune


def trial_resources(workers: int, *, all_cores: bool = False) -> dict[str, float]:
    """What a trial asks Ray for: one core and an equal share of the GPUs.

    Args:
        workers: trials that run at the same time.
        all_cores: share the cores among them, too, so that no more than these run at the same time.
    """
    import ray

    here = ray.cluster_resources()
    gpus = here.get("GPU", 0.0) / workers
    cores = max(1, int(here.get("CPU", 1.0) / workers)) if all_cores else 1
    return {"cpu": cores, **({"gpu": gpus if gpus < 1 else int(gpus)} if gpus else {})}


def one_thread() -> None:
    """Keep torch, where the objective brought it in, to one thread."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
