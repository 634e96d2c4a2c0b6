"""The states of one shard: a forward pass per batch, states pooled into their place as they appear."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import numpy as np

from probing.batching import Batch, ExtractionPlan
from probing.forward import Passes
from probing.pooling import pool
from probing.store import Series
from spafit.errors import ModelError, NumericalError

if TYPE_CHECKING:
    import torch

Shard = tuple["torch.Tensor", dict[int, int]]
Shards = tuple[dict[int, "torch.Tensor"], dict[int, int]]


@contextmanager
def shard_runner(
    plan: ExtractionPlan,
    device: str,
    progress: Callable[[float], None] | None,
    *,
    around: Callable[[tuple[int, int]], AbstractContextManager[None]] | None = None,
) -> Iterator[Callable[[int], Shard]]:
    """Within the block, the callable yielded computes one shard: its bytes, and halvings by batch number.

    The bytes are valid until the call after next. Each forward pass runs inside ``around(rows)``, where it is given.
    """
    with shards_runner([plan], device, progress, around=around) as run:

        def one(shard: int) -> Shard:
            states, halvings = run(shard, [0])
            return states[0], halvings

        yield one


class _Filling:
    """The states of one plan's shard while its batches run."""

    def __init__(self, plan: ExtractionPlan):
        import torch

        self.plan = plan
        self.of_site: dict[str, list[Series]] = {}
        for series in plan.layout.series:
            self.of_site.setdefault(series.site, []).append(series)
        # Two pieces of memory take turns: one is being written while the next is filled.
        self.memory = deque([torch.empty(0, dtype=torch.uint8) for _ in range(2)])
        self.tensors: dict[str, torch.Tensor] = {}
        self.batch: Batch | None = None  # None while this plan's states are there and its stack runs for another's
        self.first_text = 0

    def begin(self, shard: int) -> torch.Tensor:
        """Make room for a shard; returns its bytes, which :meth:`receive` fills."""
        import torch

        size = self.plan.layout.shard_bytes(shard)
        self.memory.rotate()
        if len(self.memory[0]) < size:
            self.memory[0] = torch.empty(size, dtype=torch.uint8)
        filled = self.memory[0][:size]
        self.first_text = self.plan.shard_rows(shard)[0][0]
        self.tensors = self.plan.layout.tensors(shard, filled)
        return filled

    def place(self, series: Series) -> slice:
        """Where the rows of the batch lie in the shard."""
        assert self.batch is not None
        rows = self.batch.rows
        if series.unit == "sentences":
            return slice(rows[0] - self.first_text, rows[1] - self.first_text)
        before = self.plan.words_in((self.first_text, rows[0]))
        return slice(before, before + self.plan.words_in(rows))

    def receive(self, site: str, hidden: int, states: torch.Tensor) -> None:
        """Pool the states of one site and hidden state into their place."""
        if self.batch is None:
            return
        flat = states.reshape(-1, states.shape[-1])
        for series in self.of_site[site]:
            if flat.shape[1] != series.width:
                raise ModelError(
                    f"Site {site!r} of {self.plan.loaded.name} is {flat.shape[1]} wide at hidden state {hidden}, and "
                    f"{series.width} wide elsewhere. Leave that site out."
                )
            if series.unit == "words":
                segments = self.batch.words
            else:
                segments = self.batch.own if series.pooling in ("mean", "max") else self.batch.whole
            target = self.tensors[series.key][series.hidden.index(hidden), self.place(series)]
            pool(flat, segments, series.pooling, out=target)


@contextmanager
def shards_runner(
    plans: Sequence[ExtractionPlan],
    device: str,
    progress: Callable[[float], None] | None,
    *,
    around: Callable[[tuple[int, int]], AbstractContextManager[None]] | None = None,
) -> Iterator[Callable[[int, Sequence[int]], Shards]]:
    """:func:`shard_runner` for plans of several stacks with the same batches: one pass gives the states of all.

    The callable yielded takes a shard and the numbers of the plans that lack it.
    """
    import torch

    first, dtype = plans[0], plans[0].layout.dtype
    fillings = [_Filling(plan) for plan in plans]
    stacks = [plan.stack for plan in plans]
    passes = Passes(
        first.loaded, stacks, encoder=None if first.feeding is None else first.feeding.encoder, dtype=dtype,
        device=device,
    )  # fmt: skip
    readers = {f.plan.stack.path: (f.plan.sites, f.receive) for f in fillings}
    chosen: list[_Filling] = fillings
    with passes.reading(readers) as forward:

        def run_rows(rows: tuple[int, int]) -> int:
            """Run the texts at ``rows``, in halves where memory runs out; returns how often it did."""
            try:
                batches = [(f, f.plan.batch(rows, device=device)) for f in chosen]
                for filling, batch in batches:
                    filling.batch = batch
                with nullcontext() if around is None else around(rows):
                    # What the decoder is fed stands in its own plan's batch.
                    forward(max((b for _, b in batches), key=lambda b: b.fed is not None), paths)
                for filling, batch in batches:
                    _check_finite(filling.plan, batch, filling.tensors, filling.place)
                return 0
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                if rows[1] - rows[0] == 1:
                    raise ModelError(
                        f"{first.loaded.name} runs out of memory on {device} with {first.name_of(rows[0])} alone. "
                        "Use a larger device, or --dtype bfloat16."
                    ) from error
            # Outside the handler: the error's frames hold on to the tensors of the failed pass.
            if device.startswith("cuda"):
                torch.cuda.empty_cache()
            middle = (rows[0] + rows[1]) // 2
            return 1 + run_rows((rows[0], middle)) + run_rows((middle, rows[1]))

        paths: list[str] = []

        def run(shard: int, wanted: Sequence[int]) -> Shards:
            nonlocal chosen, paths
            chosen = [fillings[i] for i in wanted]
            for filling in fillings:
                filling.batch = None
            paths = [f.plan.stack.path for f in chosen]
            filled = {i: fillings[i].begin(shard) for i in wanted}
            halvings = {}
            for number, batch_rows in enumerate(first.shard_rows(shard), int(first.shard_batches[shard])):
                if halved := run_rows(batch_rows):
                    halvings[number] = halved
                if progress is not None:
                    offsets = first.read.token_offsets
                    progress(int(offsets[batch_rows[1]] - offsets[batch_rows[0]]))
            return filled, halvings

        yield run


def _is_out_of_memory(error: RuntimeError) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _check_finite(
    plan: ExtractionPlan, batch: Batch, tensors: Mapping[str, torch.Tensor], place: Callable[[Series], slice]
) -> None:
    """Raise NumericalError if a pooled state of the batch is NaN or infinite."""
    import torch

    for series in plan.layout.series:
        states = tensors[series.key][:, place(series)]
        # One sum tells in a single fast pass that all is well; only where it does not are elements looked at.
        if bool(torch.isfinite(states.sum(dtype=torch.float32))) or bool(torch.isfinite(states).all()):
            continue
        at, row = (int(x[0]) for x in torch.nonzero(~torch.isfinite(states).all(dim=2), as_tuple=True))
        if series.unit == "words":
            edges = np.cumsum([plan.words_in((r, r + 1)) for r in range(*batch.rows)])
            row = int(np.searchsorted(edges, row, side="right"))
        remedy = "Use float32 or bfloat16." if plan.layout.dtype == "float16" else "Check the model's weights."
        raise NumericalError(
            f"{plan.loaded.name} gives NaN or infinite activations at hidden state {series.hidden[at]} (site "
            f"{series.site!r}) for {plan.name_of(batch.rows[0] + row)}. {remedy}"
        )
