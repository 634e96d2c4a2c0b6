"""The processes of one training run, as torchrun or accelerate launch start them: who writes, and who waits."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from spafit.errors import UsageError
from spafit.runtime import pick_device


@dataclass(frozen=True)
class Processes:
    """This process among those that train together.

    Attributes:
        rank: number of this process, from 0; 0 alone writes files.
        count: how many processes there are.
        device: torch device of this process.
    """

    rank: int
    count: int
    device: str

    @property
    def first(self) -> bool:
        """Whether this process writes files and progress."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until every process is here; at once where there is one."""
        if self.count > 1:
            from torch import distributed

            distributed.barrier()

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """The block runs in the first process, and then in all others at once."""
        if not self.first:
            self.wait()
        try:
            yield
        finally:
            if self.first:
                self.wait()


def joined(device: str) -> Processes:
    """The processes that a launcher started (environment variables ``WORLD_SIZE``, ``RANK``, ``LOCAL_RANK``), or this.

    The process group is opened through accelerate (NCCL on CUDA, gloo on the CPU) unless there is one, and left open
    for further runs until the process ends.

    Args:
        device: ``auto``, or a kind of torch device; each process gets its own of that kind.

    Raises:
        UsageError: the device does not exist, or is another than the first GPU.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    kind, _, index = pick_device(device).partition(":")
    if kind == "cuda" and index not in ("", "0"):
        raise UsageError(
            f"--device {device}: training runs on the first GPU that it sees. Choose one with CUDA_VISIBLE_DEVICES="
            f"{index} and --device cuda."
        )
    if count <= 1:
        return Processes(0, 1, kind)
    from accelerate import PartialState
    from torch import distributed

    if not distributed.is_initialized():
        PartialState(cpu=kind == "cpu")
        atexit.register(_close)
    local = int(os.environ.get("LOCAL_RANK", "0"))
    return Processes(distributed.get_rank(), distributed.get_world_size(), f"cuda:{local}" if kind == "cuda" else kind)


def _close() -> None:
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()
