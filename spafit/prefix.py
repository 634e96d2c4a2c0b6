"""Frozen-prefix cache: outputs of the blocks below the first trained one, computed once per item and then read.

Nothing below the first trained block changes in training, so its output for an item is the same in every epoch. The
cache is exact only with embeddings and frozen blocks in eval mode (no dropout). One file holds one row per token,
without padding; a row holds the states of every cached stack side by side, in the model's own precision.

A fixed file order (longest items first) makes writing sequential; reading is random access through a memory map.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spafit import io
from spafit.errors import ModelError, NumericalError, OutputError
from spafit.layout import is_inside, iter_linears

if TYPE_CHECKING:
    import torch
    from torch import nn

    from spafit.adapt import StratifiedModel
    from spafit.batches import Collator, EncodedTexts
    from spafit.stacks import Stack

FORMAT_VERSION = 1
TOLERANCE = 1e-5
#: Nominal rates for the automatic decision only: multiply-adds in blocks per second, by kind of device, and bytes per
#: second to and from the disk. What counts is their ratio, to within a factor of a few.
PRODUCTS_PER_SECOND = {"cpu": 5e10, "mps": 1e12, "cuda": 2.5e13}
DISK_BYTES_PER_SECOND = 1e9
_INDEX, _STATES = "prefix.json", "prefix.bin"


class PrefixError(ModelError):
    """The frozen prefix of this model, or this batch, cannot be served from a cache."""


@dataclass(frozen=True)
class CachedStack:
    """One stack in the cache.

    Attributes:
        name: the stack's name.
        blocks: number of blocks whose forward pass is saved.
        width: of the residual stream.
        dtype: torch's name of the precision, such as ``float32``.
        outputs: number of values that a block returns; 0 where it returns the bare tensor.
        start: first byte of the states within a token's row.
    """

    name: str
    blocks: int
    width: int
    dtype: str
    outputs: int
    start: int

    @property
    def bytes(self) -> int:
        """Bytes of one token's state."""
        return self.width * _torch_dtype(self.dtype).itemsize


@dataclass(frozen=True)
class PrefixCache:
    """States of the last frozen block of each cached stack, for every training item; made by :meth:`build`.

    Attributes:
        path: the file of states.
        stacks: what a row holds.
        notes: why other stacks are not cached.
    """

    path: Path
    stacks: tuple[CachedStack, ...]
    notes: tuple[str, ...]
    _modules: tuple[tuple[nn.Module, ...], ...] = field(repr=False, compare=False)
    _starts: np.ndarray = field(repr=False, compare=False)
    _lengths: np.ndarray = field(repr=False, compare=False)
    _maps: dict[int, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def build(
        cls,
        stratified: StratifiedModel,
        data: EncodedTexts,
        collator: Collator,
        directory: Path,
        *,
        device: str,
        batch_tokens: int = 8192,
        progress: Callable[[float], object] | None = None,
    ) -> PrefixCache:
        """Compute the states of all items, or reuse those that lie in ``directory`` for the same base and tokens.

        Batches hold items of similar length. The upper blocks do not run. Before the cache is returned, the logits of
        real items with states in place of the frozen blocks are compared with those of the model's own forward pass,
        in eval mode: equal to 1e-5 of the largest. What exists is reused when its key (base digest, digest of tokens,
        cached blocks, precision, versions) and its checksum hold, and rebuilt otherwise.

        Args:
            stratified: the model that will train. It is moved to ``device``; its training modes are restored.
            data: the training items.
            collator: pads on the right.
            directory: made if missing; holds ``prefix.json`` and ``prefix.bin``.
            device: where to compute.
            batch_tokens: padded tokens per batch, at most (a longer item runs alone).
            progress: called with the number of items that were finished.

        Raises:
            PrefixError: there is no frozen prefix, or the architecture hands more than hidden states from block to
                block.
            NumericalError: states are not finite.
            OutputError: the disk has no room, or the folder cannot be written.
        """
        chosen, notes = _cacheable(stratified)
        if not chosen or not len(data):
            raise PrefixError(f"There is nothing to cache: {'; '.join(notes) or 'no training items'}.")
        stratified.model.to(device)
        lengths = data.lengths
        order = np.argsort(-lengths, kind="stable")
        starts = np.empty_like(lengths)
        starts[order] = np.concatenate([[0], np.cumsum(lengths[order])[:-1]])
        batches = _batches(order, lengths, batch_tokens)
        with _eval_mode(stratified.model):
            # The longest and the shortest items together: a batch with padding.
            mixed = collator([data[int(i)] for i in dict.fromkeys([*order[:3], *order[-3:]])])
            states, outputs = _capture(stratified, chosen, mixed, device)
            stacks, start = [], 0
            for (stack, count), state, n in zip(chosen, states, outputs, strict=True):
                dtype = str(state.dtype).removeprefix("torch.")
                stacks.append(CachedStack(stack.name, count, state.shape[-1], dtype, n, start))
                start += stacks[-1].bytes
            path = Path(directory) / _STATES
            modules = _modules(stratified, chosen)
            cache = cls(path, tuple(stacks), tuple(notes), modules, starts, lengths)
            cache._verify(stratified, mixed, device, states=states)
            key = _key(stratified, data, stacks, device)
            if not cache._is_stored(key):
                cache._write(stratified, chosen, data, collator, batches, key, device=device, progress=progress)
                cache._verify(stratified, collator([data[int(i)] for i in batches[-1]]), device)
        return cache

    @property
    def bytes(self) -> int:
        """Size of the file of states."""
        return int(self._lengths.sum()) * self._row

    @property
    def _row(self) -> int:
        return sum(s.bytes for s in self.stacks)

    @contextmanager
    def attached(self, index: torch.Tensor, attention_mask: torch.Tensor | None) -> Iterator[None]:
        """Inside the block, the model's forward pass on this batch starts above the frozen prefix.

        The frozen blocks return the states of the items; masks, positions, later blocks and heads run as the model's
        own code does. Whatever comes before the blocks runs too, and its result is ignored.

        Args:
            index: positions of the batch's items in the data that the cache was built from, shape (items,).
            attention_mask: the batch's mask, shape (items, tokens), padded on the right. None: no padding.

        Raises:
            PrefixError: the batch is padded on the left, its lengths are not those of the items, or the batch that
                reaches the blocks is not this one.
        """
        with self._replaced(self._gather(index, attention_mask)):
            yield

    def close(self) -> None:
        """Drop the memory map; the next use opens it again."""
        self._maps.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # each process maps the file itself

    # ------------------------------------------------------------ reading

    def _rows(self) -> np.ndarray:
        if os.getpid() not in self._maps:
            self._maps.clear()
            try:
                flat = np.memmap(self.path, dtype=np.uint8, mode="r", shape=(self.bytes // self._row, self._row))
            except (OSError, ValueError) as error:
                raise PrefixError(
                    f"The prefix cache {self.path} cannot be read ({error}). Start again: it is then rebuilt."
                ) from error
            self._maps[os.getpid()] = flat
        return self._maps[os.getpid()]

    def _gather(self, index: torch.Tensor, attention_mask: torch.Tensor | None) -> list[torch.Tensor]:
        """States of the items per stack, shape (items, tokens, width), zero where the mask is 0."""
        import torch

        items = index.detach().cpu().numpy()
        if len(items) and not (items.min() >= 0 and items.max() < len(self._lengths)):
            raise PrefixError(
                f"The batch has item {items.max()}, the prefix cache holds {len(self._lengths)} items. Build the cache "
                "from the items that are trained on."
            )
        lengths = self._lengths[items]
        device = index.device if attention_mask is None else attention_mask.device
        width = int(lengths.max()) if attention_mask is None else attention_mask.shape[1]
        mask = np.ones((len(items), width)) if attention_mask is None else attention_mask.detach().cpu().numpy()
        if mask.shape[0] != len(items) or not np.array_equal(mask != 0, np.arange(width) < lengths[:, None]):
            left = mask.shape[0] == len(items) and np.array_equal((mask != 0).sum(axis=1), lengths)
            raise PrefixError(
                "The prefix cache needs batches that are padded on the right, and this one is not. Set the tokenizer's "
                "padding_side to 'right', or the cache off."
                if left
                else "The lengths of the batch are not those of the cached items: it holds other items. Build the "
                "cache from the items that are trained on."
            )
        rows, gathered = self._rows(), []
        for stack in self.stacks:
            pinned = device.type == "cuda"
            padded = torch.zeros((len(items), width, stack.bytes), dtype=torch.uint8, pin_memory=pinned)
            view = padded.numpy()
            for i, (start, length) in enumerate(zip(self._starts[items], lengths, strict=True)):
                view[i, :length] = rows[start : start + length, stack.start : stack.start + stack.bytes]
            gathered.append(padded.view(_torch_dtype(stack.dtype)).to(device, non_blocking=pinned))
        return gathered

    @contextmanager
    def _replaced(self, states: Sequence[torch.Tensor]) -> Iterator[None]:
        """The frozen blocks' forward functions replaced by ones that return ``states``."""
        with ExitStack() as undo:
            for modules, stack, state in zip(self._modules, self.stacks, states, strict=True):
                value = (state, *[None] * (stack.outputs - 1)) if stack.outputs else state
                for module in dict.fromkeys(modules):
                    undo.callback(_restore_forward, module, module.__dict__.get("forward"))
                    module.forward = _returning(value, state, stack.name)
            yield

    # ------------------------------------------------------------ writing

    def _write(
        self,
        stratified: StratifiedModel,
        chosen: Sequence[tuple[Stack, int]],
        data: EncodedTexts,
        collator: Collator,
        batches: Sequence[np.ndarray],
        key: str,
        *,
        device: str,
        progress: Callable[[float], object] | None,
    ) -> None:
        import torch

        folder = self.path.parent
        for old in (folder / _INDEX, self.path):
            old.unlink(missing_ok=True)
        free = shutil.disk_usage(_existing(folder)).free
        if free < self.bytes:
            raise OutputError(
                f"The prefix cache needs {self.bytes / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB free. Free "
                "space, choose another folder, or set the cache off."
            )

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                for batch in batches:
                    inputs = collator([data[int(i)] for i in batch])
                    states, _ = _capture(stratified, chosen, inputs, device)
                    expected = [s.dtype for s in self.stacks]
                    if [str(s.dtype).removeprefix("torch.") for s in states] != expected:
                        raise PrefixError("The precision of the frozen blocks changes from batch to batch.")
                    if not all(bool(torch.isfinite(s).all()) for s in states):
                        raise NumericalError(
                            f"The frozen blocks give values that are not finite in {expected[0]}. Train in float32."
                        )
                    raw = [s.contiguous().view(torch.uint8).cpu().numpy() for s in states]
                    for i, length in enumerate(self._lengths[batch]):
                        file.write(np.concatenate([r[i, :length] for r in raw], axis=1).tobytes())
                    if progress is not None:
                        progress(len(batch))

        io.atomic_write(self.path, write)
        digest = io.file_digest(self.path)
        io.write_json(folder / _INDEX, {"key": key, "bytes": self.bytes, "sha256": digest})

    def _is_stored(self, key: str) -> bool:
        """Whether the folder holds exactly these states, whole."""
        index = self.path.parent / _INDEX
        if not index.is_file() or not self.path.is_file() or self.path.stat().st_size != self.bytes:
            return False
        try:
            content = io.read_json(index)
        except ValueError:
            return False
        return (
            isinstance(content, dict)
            and content.get("key") == key
            and content.get("sha256") == io.file_digest(self.path)
        )

    def _verify(
        self,
        stratified: StratifiedModel,
        batch: dict[str, torch.Tensor],
        device: str,
        *,
        states: Sequence[torch.Tensor] | None = None,
    ) -> None:
        """Compare the results of a batch with and without states in place of the frozen blocks."""
        import torch

        inputs = {k: v.to(device) for k, v in batch.items() if k != "index"}
        mask = inputs.get("attention_mask")
        with torch.no_grad():
            expected = _result(stratified.model(**inputs), mask)
            try:
                if states is None:
                    states = self._gather(batch["index"].to(device), mask)
                elif mask is not None:
                    states = [s.masked_fill(mask[..., None] == 0, 0) for s in states]
                with self._replaced(states):
                    got = _result(stratified.model(**inputs), mask)
            except PrefixError:
                raise
            except (TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
                raise self._refusal(stratified, str(error).partition("\n")[0]) from error
        largest = float(expected.abs().max())
        error_size = float((got - expected).abs().max())
        if not error_size <= TOLERANCE * largest:
            raise self._refusal(stratified, f"logits differ by {error_size:.2g}, the largest is {largest:.2g}")

    def _refusal(self, stratified: StratifiedModel, reason: str) -> PrefixError:
        base = stratified.model.get_base_model() if stratified.is_adapter else stratified.model
        return PrefixError(
            f"The frozen prefix of {type(base).__name__} cannot be cached: the architecture hands more than hidden "
            f"states from block to block, such as T5's position bias ({reason}). Set the prefix cache off."
        )


# ---------------------------------------------------------------- what it costs


def prefix_bytes(stratified: StratifiedModel, data: EncodedTexts) -> int:
    """Size of the cache in bytes: tokens × width × bytes per value, over the stacks that can be cached; else 0."""
    base = stratified.model.get_base_model() if stratified.is_adapter else stratified.model
    row = 0
    for stack, _ in _cacheable(stratified)[0]:
        floats = [p.dtype for p in base.get_submodule(stack.block_paths[0]).parameters() if p.is_floating_point()]
        row += stack.width * floats[0].itemsize
    return int(data.lengths.sum()) * row if len(data) else 0


def prefix_pays(
    stratified: StratifiedModel, data: EncodedTexts, *, epochs: float, free_bytes: float, device: str = "cpu"
) -> tuple[bool, str]:
    """Whether the cache saves time over a run, by arithmetic, and one sentence that says why.

    Saved are ``epochs`` forward passes of the frozen blocks, less reading their outputs; spent are one forward pass
    and writing. Products with weight matrices are counted as in :func:`spafit.costs.step_cost`, and turned into
    seconds with :data:`PRODUCTS_PER_SECOND` and :data:`DISK_BYTES_PER_SECOND`. Do not trust it to a factor of three:
    it separates the clear cases. The cache must leave a tenth of the free space of the disk.

    Args:
        stratified: the model that will train.
        data: the training items.
        epochs: passes over them.
        free_bytes: free space where the cache would lie.
        device: where the model trains.
    """
    chosen, notes = _cacheable(stratified)
    if not chosen or not len(data):
        return False, "; ".join(notes) or "there are no training items"
    base = stratified.model.get_base_model() if stratified.is_adapter else stratified.model
    size, tokens = prefix_bytes(stratified, data), int(data.lengths.sum())
    if size > 0.9 * free_bytes:
        return False, f"it needs {size / 1e9:.2f} GB, and the disk has {free_bytes / 1e9:.2f} GB free"
    products = sum(
        inputs * outputs
        for stack, count in chosen
        for path in stack.block_paths[:count]
        for _, inputs, outputs in iter_linears(base.get_submodule(path))
    )
    forward = tokens * products / PRODUCTS_PER_SECOND[device.partition(":")[0]]
    transfer = size / DISK_BYTES_PER_SECOND
    blocks = ", ".join(f"{count} of {stack.num_blocks} {stack.name} blocks" for stack, count in chosen)
    pays = epochs * (forward - transfer) > forward + transfer
    passes = f"the forward pass of {blocks} in {epochs:g} epoch{'' if epochs == 1 else 's'}"
    if pays:
        return True, f"it saves {passes} for one pass and {size / 1e9:.2f} GB"
    return False, f"saving {passes} is less than one such pass and moving {size / 1e9:.2f} GB cost"


# ---------------------------------------------------------------- which stacks


def _cacheable(stratified: StratifiedModel) -> tuple[list[tuple[Stack, int]], list[str]]:
    """Stacks with the number of their blocks that can be cached, and a sentence for each other stack."""
    chosen, notes = [], []
    plan = stratified.plan
    for stack in plan.stacks:
        count = plan.first_trained_block(stack.name)
        others = [s for s in plan.stacks if s.name != stack.name]
        places = [p for s in others for p in (s.path, s.final_norm) if p is not None]
        if count == 0:
            notes.append(f"{stack.name}: block 0, or what comes before it, trains")
        elif stack.name.startswith("vision"):
            notes.append(f"{stack.name}: it reads images, and texts are cached")
        elif stack.cross_branch is not None and any(is_inside(n, p) for n in stratified.trainable for p in places):
            notes.append(f"{stack.name}: its blocks read from a stack that trains")
        else:
            chosen.append((stack, count))
    return chosen, notes


def _modules(stratified: StratifiedModel, chosen: Sequence[tuple[Stack, int]]) -> tuple[tuple[nn.Module, ...], ...]:
    base = stratified.model.get_base_model() if stratified.is_adapter else stratified.model
    return tuple(tuple(base.get_submodule(p) for p in stack.block_paths[:count]) for stack, count in chosen)


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


# ---------------------------------------------------------------- running the model


class _AllCaptured(Exception):
    pass


def _capture(
    stratified: StratifiedModel, chosen: Sequence[tuple[Stack, int]], batch: dict[str, torch.Tensor], device: str
) -> tuple[list[torch.Tensor], list[int]]:
    """Outputs of the last frozen block of each stack on a batch, and how many values each block returns."""
    import torch

    found: dict[str, tuple[torch.Tensor, int]] = {}
    calls: dict[str, int] = {}

    def hook(stack: Stack, needed: int) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            calls[stack.name] = calls.get(stack.name, 0) + 1
            if calls[stack.name] == needed:  # a shared block runs several times
                several = isinstance(output, tuple)
                found[stack.name] = (output[0], len(output)) if several else (output, 0)
                if len(found) == len(chosen):
                    raise _AllCaptured

        return record

    inputs = {k: v.to(device) for k, v in batch.items() if k != "index"}
    handles = []
    for (stack, count), modules in zip(chosen, _modules(stratified, chosen), strict=True):
        needed = stack.block_paths[:count].count(stack.block_paths[count - 1])
        handles.append(modules[-1].register_forward_hook(hook(stack, needed)))
    try:
        with torch.no_grad():
            stratified.model(**inputs)
    except _AllCaptured:
        pass
    finally:
        for handle in handles:
            handle.remove()
    shape = tuple(inputs["input_ids"].shape)
    for stack, _ in chosen:
        state = found.get(stack.name, (None, 0))[0]
        got = tuple(state.shape[:-1]) if isinstance(state, torch.Tensor) else None
        if got != shape:
            raise PrefixError(
                f"Stack {stack.name!r} gives states of shape {got} where one per token, {shape}, is needed, so it "
                "cannot be cached. Set the prefix cache off."
            )
    return [found[s.name][0] for s, _ in chosen], [found[s.name][1] for s, _ in chosen]


def _returning(value: Any, state: torch.Tensor, name: str) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs.get("hidden_states")
        if given is not None and given.shape[:-1] != state.shape[:-1]:
            raise PrefixError(
                f"A batch of shape {tuple(given.shape[:-1])} reached stack {name!r} where "
                f"{tuple(state.shape[:-1])} was announced. Run one process per device (torchrun), or set the prefix "
                "cache off."
            )
        return value

    return forward


def _restore_forward(module: nn.Module, before: Any) -> None:
    if before is None:
        del module.__dict__["forward"]
    else:
        module.forward = before


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _result(outputs: Any, mask: torch.Tensor | None) -> torch.Tensor:
    """Logits (else the first output) in float64, without positions that are padding."""
    result = outputs["logits"] if "logits" in outputs else outputs[0]
    if mask is not None and result.dim() == 3 and result.shape[:2] == mask.shape:
        result = result[mask != 0]
    return result.double()


def _batches(order: np.ndarray, lengths: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Consecutive items of ``order`` (longest first) with at most ``batch_tokens`` padded tokens."""
    batches, start = [], 0
    while start < len(order):
        stop = start + max(1, batch_tokens // max(1, int(lengths[order[start]])))
        batches.append(order[start:stop])
        start = stop
    return batches


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    return next(p for p in (folder, *folder.parents) if p.exists())


def _torch_dtype(name: str) -> torch.dtype:
    import torch

    return getattr(torch, name)
