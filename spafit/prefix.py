"""Frozen-prefix cache: outputs of the blocks below the first trained one, computed once per item and then read.

Nothing below the first trained block changes in training, so its output for an item is the same in every epoch. The
cache is exact only with embeddings and frozen blocks in eval mode (no dropout). One file holds one row per token,
without padding; a row holds the states of every cached stack side by side, in the model's own precision. Longest items
come first, so that writing is sequential; reading goes through a memory map.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spafit import io
from spafit.errors import NumericalError, OutputError
from spafit.layout import iter_linears
from spafit.prefix_forward import (
    BlockOutput,
    FrozenBlocks,
    PrefixError,
    capture,
    check_replacement,
    eval_mode,
    frozen_blocks,
    replaced,
)

if TYPE_CHECKING:
    import torch

    from spafit.adapt import StratifiedModel
    from spafit.batches import EncodedTexts

FORMAT_VERSION = 1
#: Nominal rates for the automatic decision only: multiply-adds in blocks per second, by kind of device, and bytes per
#: second to and from the disk. What counts is their ratio, to within a factor of a few.
PRODUCTS_PER_SECOND = {"cpu": 5e10, "mps": 1e12, "cuda": 2.5e13}
DISK_BYTES_PER_SECOND = 1e9
_INDEX, _STATES = "prefix.json", "prefix.bin"


@dataclass(frozen=True)
class CachedStack:
    """One stack in the cache.

    Attributes:
        name: the stack's name.
        blocks: number of blocks whose forward pass is saved.
        width: of the residual stream.
        dtype: torch's name of the precision, such as ``float32``.
        values: number of values that a block returns; 0 where it returns the bare tensor.
        start: first byte of the states within a token's row.
    """

    name: str
    blocks: int
    width: int
    dtype: str
    values: int
    start: int

    @property
    def bytes(self) -> int:
        """Bytes of one token's state."""
        return self.width * _torch_dtype(self.dtype).itemsize


@dataclass(frozen=True)
class PrefixCache:
    """Outputs of the last frozen block of each cached stack, for every training item; made by :meth:`build`.

    Attributes:
        path: the file of states.
        stacks: what a row holds.
        notes: why other stacks are not cached.
        reused: whether the file was there already.
    """

    path: Path
    stacks: tuple[CachedStack, ...]
    notes: tuple[str, ...]
    reused: bool
    _prefixes: tuple[FrozenBlocks, ...] = field(repr=False, compare=False)
    _starts: np.ndarray = field(repr=False, compare=False)
    _lengths: np.ndarray = field(repr=False, compare=False)

    @classmethod
    def build(
        cls,
        stratified: StratifiedModel,
        data: EncodedTexts,
        collator: Callable[[Sequence[Mapping[str, Any]]], dict[str, torch.Tensor]],
        directory: Path,
        *,
        device: str,
        shared: bool = False,
        batch_tokens: int = 8192,
        progress: Callable[[float], object] | None = None,
    ) -> PrefixCache:
        """Compute the states of all items, or reuse those that lie in ``directory`` for the same base and tokens.

        Before anything is written, the logits of a padded batch of real items with states in place of the frozen
        blocks are compared with the model's own, per stack, in eval mode (equal to 1e-5 of the largest); after
        writing, once more with what was stored. Batches hold items of similar length, and the upper blocks do not
        run. What exists is reused when its key (base digest, digest of the tokens, cached blocks, precision, versions)
        and its checksum hold, and rebuilt otherwise. Under autocast the states are what autocast gives.

        Args:
            stratified: the model that will train. It is moved to ``device``; its training modes are restored.
            data: the training items.
            collator: pads on the right.
            directory: made if missing; holds ``prefix.json`` and ``prefix.bin``.
            device: where to compute.
            shared: the directory holds the caches of several plans and data, each in a folder named after its key.
            batch_tokens: padded tokens per batch, at most (a longer item runs alone).
            progress: called with the number of items that were finished.

        Raises:
            PrefixError: no stack has a frozen prefix that can be cached; the sentence says why.
            NumericalError: states are not finite.
            OutputError: the disk has no room, or the folder cannot be written.
        """
        prefixes, notes = frozen_blocks(stratified)
        lengths = data.lengths
        order = np.argsort(-lengths, kind="stable")
        starts = np.empty_like(lengths)
        starts[order] = np.cumsum(lengths[order]) - lengths[order]
        model = stratified.model.to(device)

        def inputs(items: Sequence[int] | np.ndarray) -> dict[str, torch.Tensor]:
            batch = collator([data[int(i)] for i in items])
            return {k: v.to(device) for k, v in batch.items() if k != "index"}

        with eval_mode(model):
            # The longest and the shortest items together: a batch with padding.
            mixed = inputs([*order[:3], *order[3:][-3:]]) if prefixes and len(data) else {}
            kept, stacks, start = [], [], 0
            for prefix in prefixes if mixed else ():
                (output,) = capture(model, [prefix], mixed)
                unpadded = output.states.masked_fill(mixed["attention_mask"][..., None] == 0, 0)
                try:
                    check_replacement(stratified, [prefix], [BlockOutput(unpadded, output.values)], mixed)
                except PrefixError as error:
                    notes.append(str(error))
                    continue
                kept.append(prefix)
                width, dtype = output.states.shape[-1], str(output.states.dtype).removeprefix("torch.")
                stacks.append(CachedStack(prefix.stack.name, prefix.count, width, dtype, output.values, start))
                start += stacks[-1].bytes
            if not kept:
                raise PrefixError(
                    f"There is no frozen prefix to cache: {'; '.join(notes) or 'there are no training items'}. Set "
                    "the prefix cache off."
                )
            key = _key(stratified, data, stacks, device)
            path = Path(directory) / (key[:16] if shared else "") / _STATES
            row = sum(s.bytes for s in stacks)
            reused = _is_stored(path, key, size=int(lengths.sum()) * row)
            cache = cls(path, tuple(stacks), tuple(notes), reused, tuple(kept), starts, lengths)
            if not reused:
                batches = _batches(order, lengths, batch_tokens)
                cache._write(key, batches, lambda batch: capture(model, kept, inputs(batch)), progress)
                # A batch as it was computed: its states come out the same again, in any precision.
                last = inputs(batches[-1])
                check_replacement(stratified, kept, cache._gather(batches[-1], last["attention_mask"]), last)
        return cache

    @property
    def bytes(self) -> int:
        """Size of the file of states."""
        return int(self._lengths.sum()) * sum(s.bytes for s in self.stacks)

    @contextmanager
    def attached(self, index: torch.Tensor, attention_mask: torch.Tensor | None) -> Iterator[None]:
        """Inside the block, the model's forward pass on this batch starts above the frozen prefix.

        The frozen blocks return the stored states of the items, zero at padding; masks, positions, later blocks and
        heads run as the model's own code does. Embeddings run too, and what they give is not used.

        Args:
            index: positions of the batch's items in the data that the cache was built from, shape (items,).
            attention_mask: the batch's mask, shape (items, tokens), padded on the right. None: no padding.

        Raises:
            PrefixError: the batch is padded on the left, its lengths are not those of the items, or the batch that
                reaches the blocks is not this one.
        """
        import torch

        items = index.detach().cpu().numpy()
        if attention_mask is None:
            width = int(self._lengths[items].max(initial=0))
            attention_mask = torch.ones((len(items), width), dtype=torch.uint8, device=index.device)
        with replaced(self._prefixes, self._gather(items, attention_mask)):
            yield

    def close(self) -> None:
        """Drop the memory map; the next use opens it again."""
        self.__dict__.pop("_rows", None)

    @cached_property
    def _rows(self) -> np.ndarray:
        row = sum(s.bytes for s in self.stacks)
        try:
            return np.memmap(self.path, dtype=np.uint8, mode="r", shape=(int(self._lengths.sum()), row))
        except (OSError, ValueError) as error:
            raise PrefixError(
                f"The prefix cache {self.path} cannot be read ({error}). Start again: it is then rebuilt."
            ) from error

    def _gather(self, items: np.ndarray, attention_mask: torch.Tensor) -> list[BlockOutput]:
        """Stored states of items per stack, padded to the mask, on the mask's device."""
        import torch

        if len(items) and not (items.min() >= 0 and items.max() < len(self._lengths)):
            raise PrefixError(
                f"The batch has item {items.max()}, the prefix cache holds {len(self._lengths)} items. Build the cache "
                "from the items that are trained on."
            )
        lengths, mask = self._lengths[items], attention_mask.detach().cpu().numpy() != 0
        if len(mask) != len(items) or not np.array_equal(mask, np.arange(mask.shape[1]) < lengths[:, None]):
            if len(mask) == len(items) and np.array_equal(mask.sum(axis=1), lengths):
                raise PrefixError(
                    "The prefix cache needs batches that are padded on the right, and this one is not. Set the "
                    "tokenizer's padding_side to 'right', or the cache off."
                )
            raise PrefixError(
                "The lengths of the batch are not those of the cached items: it holds other items. Build the cache "
                "from the items that are trained on."
            )
        device, gathered = attention_mask.device, []
        pinned = device.type == "cuda"
        for stack in self.stacks:
            padded = torch.zeros((*mask.shape, stack.bytes), dtype=torch.uint8, pin_memory=pinned)
            view, columns = padded.numpy(), slice(stack.start, stack.start + stack.bytes)
            for i, (start, length) in enumerate(zip(self._starts[items], lengths, strict=True)):
                view[i, :length] = self._rows[start : start + length, columns]
            states = padded.view(_torch_dtype(stack.dtype)).to(device, non_blocking=pinned)
            gathered.append(BlockOutput(states, stack.values))
        return gathered

    def _write(
        self,
        key: str,
        batches: Sequence[np.ndarray],
        compute: Callable[[np.ndarray], list[BlockOutput]],
        progress: Callable[[float], object] | None,
    ) -> None:
        import torch

        folder = self.path.parent
        for old in (folder / _INDEX, self.path):
            old.unlink(missing_ok=True)
        free = shutil.disk_usage(next(p for p in folder.absolute().joinpath("-").parents if p.exists())).free
        if free < self.bytes:
            raise OutputError(
                f"The prefix cache needs {self.bytes / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB free. Free "
                "space, choose another folder, or set the cache off."
            )

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                for batch in batches:
                    states = [o.states.contiguous() for o in compute(batch)]
                    if not all(bool(torch.isfinite(s).all()) for s in states):
                        raise NumericalError(
                            f"The frozen blocks give values that are not finite in {self.stacks[0].dtype}. Train in "
                            "float32."
                        )
                    raw = [s.view(torch.uint8).cpu().numpy() for s in states]
                    for i, length in enumerate(self._lengths[batch]):
                        file.write(np.concatenate([r[i, :length] for r in raw], axis=1).data)
                    if progress is not None:
                        progress(len(batch))

        io.atomic_write(self.path, write)
        io.write_json(folder / _INDEX, {"key": key, "sha256": io.file_digest(self.path)})


def prefix_bytes(stratified: StratifiedModel, data: EncodedTexts) -> int:
    """Size of the cache in bytes: tokens × width × bytes per value, over the stacks with a frozen prefix; else 0.

    An upper bound where :meth:`PrefixCache.build` then finds that a stack cannot be cached.
    """
    row = 0
    for prefix in frozen_blocks(stratified)[0]:
        dtypes = [p.dtype for p in prefix.modules[0].parameters() if p.is_floating_point()]
        row += prefix.stack.width * dtypes[0].itemsize
    return int(data.lengths.sum()) * row


def prefix_pays(
    stratified: StratifiedModel, data: EncodedTexts, *, epochs: float, free_bytes: float, device: str = "cpu"
) -> tuple[bool, str]:
    """Whether the cache saves time over a run, by arithmetic, and a phrase that says why.

    Saved are ``epochs`` forward passes of the frozen blocks, less reading their outputs; spent are one forward pass
    and writing. Products with weight matrices are counted as in :func:`spafit.costs.step_cost`, and turned into
    seconds with :data:`PRODUCTS_PER_SECOND` and :data:`DISK_BYTES_PER_SECOND`. Do not trust it to a factor of three:
    it separates the clear cases. The cache must leave a tenth of the disk's free space.

    Args:
        stratified: the model that will train.
        data: the training items.
        epochs: passes over them.
        free_bytes: free space where the cache would lie.
        device: where the model trains.
    """
    prefixes, notes = frozen_blocks(stratified)
    if not prefixes or not len(data):
        return False, "; ".join(notes) or "there are no training items"
    size = prefix_bytes(stratified, data)
    if size > 0.9 * free_bytes:
        return False, f"it needs {size / 1e9:.2f} GB, and the disk has {free_bytes / 1e9:.2f} GB free"
    products = sum(n * m for p in prefixes for module in p.modules for _, n, m in iter_linears(module))
    forward = int(data.lengths.sum()) * products / PRODUCTS_PER_SECOND[device.partition(":")[0]]
    transfer = size / DISK_BYTES_PER_SECOND
    blocks = ", ".join(f"{p.count} of {p.stack.num_blocks} {p.stack.name} blocks" for p in prefixes)
    passes = f"the forward pass of {blocks} in {epochs:g} epoch{'' if epochs == 1 else 's'}"
    if epochs * (forward - transfer) > forward + transfer:
        return True, f"it saves {passes}, for one such pass and {size / 1e9:.2f} GB"
    return False, f"saving {passes} is worth less than one such pass and moving {size / 1e9:.2f} GB"


def _is_stored(path: Path, key: str, *, size: int) -> bool:
    """Whether the states under ``path`` are there, whole, and those that belong to ``key``."""
    index = path.parent / _INDEX
    if not index.is_file() or not path.is_file() or path.stat().st_size != size:
        return False
    try:
        content: Any = io.read_json(index)
    except ValueError:
        return False
    return content == {"key": key, "sha256": io.file_digest(path)}


def _key(stratified: StratifiedModel, data: EncodedTexts, stacks: Sequence[CachedStack], device: str) -> str:
    import torch
    import transformers

    from spafit.checkpoint import base_digest

    tokens = hashlib.sha256()
    for item in data.items:
        for name in sorted(item):
            tokens.update(f"\x1f{name}\x1f{len(item[name])}\x1f".encode())
            tokens.update(np.asarray(item[name], dtype=np.int64).tobytes())
    kind = torch.device(device).type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    versions = FORMAT_VERSION, transformers.__version__
    return io.content_digest([base_digest(stratified), tokens.hexdigest(), *stacks, autocast, *versions])


def _batches(order: np.ndarray, lengths: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Consecutive items of ``order`` (longest first) with at most ``batch_tokens`` padded tokens."""
    batches, start = [], 0
    while start < len(order):
        stop = start + max(1, batch_tokens // max(1, int(lengths[order[start]])))
        batches.append(order[start:stop])
        start = stop
    return batches


def _torch_dtype(name: str) -> torch.dtype:
    import torch

    return getattr(torch, name)
