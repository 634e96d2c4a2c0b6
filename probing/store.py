"""Pooled states on disk: shards of safetensors with checksums, read through memory maps, rows by text and word."""

from __future__ import annotations

import json
import math
import mmap
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from spafit.errors import OutputError, StoreError, UsageError
from spafit.io import atomic_write, read_json, write_json

if TYPE_CHECKING:
    import torch

#: Raised when the same request would be stored, or computed, differently: older folders are then left alone.
FORMAT_VERSION = 1
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# bfloat16, which NumPy lacks, is read as its 16 bits.
_READ_AS: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "bfloat16": np.dtype("<u2"),
    "float16": np.dtype("<f2"),
}

_BLOCK = 1 << 20

ShardState = Literal["good", "missing", "damaged"]


@dataclass(frozen=True)
class Series:
    """One kind of stored state: shape (hidden, rows, width) in every shard.

    Attributes:
        site: where in the blocks it was read.
        unit: ``words`` or ``sentences``.
        pooling: how tokens were reduced.
        hidden: hidden indices, ascending.
        width: size of one state.
    """

    site: str
    unit: str
    pooling: str
    hidden: tuple[int, ...]
    width: int

    @property
    def key(self) -> str:
        """Name of the tensor in a shard."""
        return f"{self.site}.{self.unit}.{self.pooling}"


@dataclass(frozen=True)
class Layout:
    """Which rows lie in which shard of a folder.

    Attributes:
        folder: where the shards lie.
        series: what each shard holds.
        dtype: precision of the stored states.
        word_edges: first word row of each shard, and the number of words, shape (shards + 1,).
        text_edges: the same for texts.
    """

    folder: Path
    series: tuple[Series, ...]
    dtype: str
    word_edges: np.ndarray = field(repr=False)
    text_edges: np.ndarray = field(repr=False)

    @property
    def shards(self) -> int:
        """Number of shards."""
        return len(self.text_edges) - 1

    def edges(self, unit: str) -> np.ndarray:
        """First row of each shard for ``words`` or ``sentences``."""
        return self.word_edges if unit == "words" else self.text_edges

    def shape(self, series: Series, shard: int) -> tuple[int, int, int]:
        """Shape of a series in one shard: (hidden, rows, width)."""
        edges = self.edges(series.unit)
        return len(series.hidden), int(edges[shard + 1] - edges[shard]), series.width

    def places(self, shard: int) -> dict[str, tuple[int, int]]:
        """Begin and end in bytes of each series, by key, in the states of one shard."""
        ends = np.cumsum([0, *(math.prod(self.shape(s, shard)) for s in self.series)]) * ITEM_BYTES[self.dtype]
        return {s.key: (int(a), int(b)) for s, (a, b) in zip(self.series, pairwise(ends), strict=True)}

    def shard_bytes(self, shard: int) -> int:
        """Size of one shard's states."""
        return max(end for _, end in self.places(shard).values())

    def header(self, shard: int) -> bytes:
        """What stands before the states in a shard's file: length and JSON, as the safetensors format has them."""
        places = self.places(shard)
        kind = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[self.dtype]
        content = {
            s.key: {"dtype": kind, "shape": self.shape(s, shard), "data_offsets": places[s.key]} for s in self.series
        }
        text = json.dumps(content).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def tensors(self, shard: int, memory: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views by series key on bytes that hold, or will hold, the states of one shard."""
        import torch

        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[self.dtype]
        places = self.places(shard)
        return {s.key: memory[slice(*places[s.key])].view(dtype).view(self.shape(s, shard)) for s in self.series}


# ---------------------------------------------------------------- shard files


def data_path(folder: Path, shard: int) -> Path:
    """The states of one shard."""
    return folder / f"shard-{shard:05d}.safetensors"


def manifest_path(folder: Path, shard: int) -> Path:
    """Size and checksum of one shard; written last, so a shard without it is not finished."""
    return folder / f"shard-{shard:05d}.json"


def write_shard(layout: Layout, shard: int, memory: torch.Tensor, *, halvings: Mapping[int, int]) -> None:
    """Write one finished shard: data first, then its manifest, each atomically.

    The file is an ordinary safetensors file, written here straight from memory with the checksum taken on the way:
    the library's writer first copies everything, which is a tenth of the time that extraction may cost.

    Args:
        layout: where, and what.
        shard: its number.
        memory: the states as bytes (see :meth:`Layout.tensors`), shape (``layout.shard_bytes(shard)``,), uint8.
        halvings: how often a batch (by number) was halved because memory ran out.

    Raises:
        StoreError: the disk is full or cannot be written; shards finished before are kept.
    """
    folder = layout.folder
    states = memory.numpy()
    size, checksum = 0, 0

    def write(path: Path) -> None:
        nonlocal size, checksum
        with path.open("wb") as f:
            blocks: list[Any] = [layout.header(shard), *(states[i : i + _BLOCK] for i in range(0, len(states), _BLOCK))]
            for block in blocks:
                checksum = zlib.crc32(block, checksum)
                size += f.write(block)

    try:
        atomic_write(data_path(folder, shard), write)
        content = {"format": FORMAT_VERSION, "bytes": size, "crc32": f"{checksum:08x}"}
        halved = {"halvings": {str(k): v for k, v in sorted(halvings.items())}} if halvings else {}
        write_json(manifest_path(folder, shard), {**content, **halved})
    except OutputError as error:
        raise StoreError(
            f"The activation cache could not be written ({error.__cause__ or error}) at {folder}. Free space, or name "
            "another place with --cache-dir or SPAFIT_CACHE; finished shards are kept and not computed again."
        ) from error
    data = data_path(folder, shard)
    _VERIFIED[str(data)] = _stamp(data)


def stored_bytes(layout: Layout, shard: int) -> torch.Tensor:
    """The states of a finished shard as bytes, for :meth:`Layout.tensors`; read into memory."""
    import torch

    path, begin = data_path(layout.folder, shard), len(layout.header(shard))
    return torch.from_numpy(np.fromfile(path, dtype=np.uint8, offset=begin))


# Shards whose checksum this process has seen to be right, with the time and size they had then.
_VERIFIED: dict[str, tuple[int, int]] = {}


def shard_state(folder: Path, shard: int, *, again: bool = False) -> ShardState:
    """Whether a shard is finished and its bytes are what was written; the checksum is read once per process.

    Args:
        folder: the store's folder.
        shard: its number.
        again: read the bytes even if this process has done so before.
    """
    data = data_path(folder, shard)
    try:
        manifest = read_json(manifest_path(folder, shard))
    except FileNotFoundError:
        return "missing"
    except (OSError, ValueError):
        return "damaged"
    try:
        stamp = _stamp(data)
        if not again and _VERIFIED.get(str(data)) == stamp:
            return "good"
        right = stamp[1] == manifest["bytes"] and f"{_checksum(data):08x}" == manifest["crc32"]
    except (OSError, KeyError, TypeError):
        return "damaged"
    if not right:
        return "damaged"
    _VERIFIED[str(data)] = stamp
    return "good"


def shard_halvings(folder: Path, shard: int) -> int:
    """How many times a batch of this shard was halved when it was computed."""
    return sum(read_json(manifest_path(folder, shard)).get("halvings", {}).values())


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def _checksum(path: Path) -> int:
    # CRC-32 finds every flipped bit and every burst of 32, at 2.4 times the speed of SHA-256 (measured: 2.5 GB/s
    # against 1.0); deliberate forgery of one's own cache is not what it guards against.
    total = 0
    with path.open("rb") as f:
        while block := f.read(_BLOCK):
            total = zlib.crc32(block, total)
    return total


# ---------------------------------------------------------------- reading


class ActivationStore:
    """Read view on the pooled states of a list of texts.

    Rows are numbered over the texts *as given*, repeated texts included: text ``t`` is sentence row ``t``, and its
    ``s``-th span is word row ``word_offsets[t] + s``. Hidden index 0 is the input of block 0, k + 1 the output of
    block k. The folder is protected from pruning as long as this object lives.

    Attributes:
        folder: where the states lie.
        stack: name of the stack they were read from.
        sites: what was read.
        num_hidden: blocks + 1.
        word_offsets: first word row of each text, shape (texts + 1,).
        word_valid: False for words that have no state: cut off at the model's window, or without a token, (words,).
        truncated: texts that were cut at the model's window, shape (texts,).
        seconds: wall time that this call spent computing states (0 if all were in the cache).
        tokens: tokens of the distinct texts.
        halvings: how often a batch was halved because memory ran out.
        notes: what a user should be told: damaged shards that were recomputed, halvings.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        stack: str,
        num_hidden: int,
        rows: Mapping[str, np.ndarray],
        word_offsets: np.ndarray,
        truncated: np.ndarray,
        tokens: int,
        seconds: float = 0.0,
        halvings: int = 0,
        notes: Sequence[str] = (),
        lease: Any = None,
    ):
        self.folder, self.stack, self.num_hidden = layout.folder, stack, num_hidden
        self.sites = tuple(dict.fromkeys(s.site for s in layout.series))
        self.word_offsets, self.truncated = word_offsets, truncated
        self.word_valid = rows["words"] >= 0
        self.seconds, self.tokens, self.halvings, self.notes = seconds, tokens, halvings, tuple(notes)
        self._layout, self._rows, self._lease = layout, rows, lease

    def __repr__(self) -> str:
        stored = ", ".join(s.key for s in self._layout.series)
        return (
            f"ActivationStore({len(self._rows['sentences'])} texts, {len(self.word_valid)} words, "
            f"{self.num_hidden} hidden states; {stored})"
        )

    def width(self, site: str = "block") -> int:
        """Size of one state of a site."""
        return self._of_site(site)[0].width

    def hidden_of(self, site: str = "block") -> tuple[int, ...]:
        """Hidden indices that a site has: 0 … blocks, 1 … blocks inside blocks, one for the final norm."""
        return self._of_site(site)[0].hidden

    def words(self, pooling: str, *, hidden: int, site: str = "block", rows: np.ndarray | None = None) -> np.ndarray:
        """States of words, float32, shape (rows, width).

        Args:
            pooling: how sub-words were reduced.
            hidden: hidden index.
            site: where in the blocks.
            rows: word rows (``word_offsets[text] + span``), or None for all. Rows that
                ``word_valid`` rules out are NaN.

        Raises:
            UsageError: the pooling, site or hidden state was not extracted, or a row does not exist.
            StoreError: a shard is missing (only a part of a job was run) or was removed meanwhile.
        """
        return self._read("words", pooling, hidden, site, rows)

    def sentences(
        self, pooling: str, *, hidden: int, site: str = "block", rows: np.ndarray | None = None
    ) -> np.ndarray:
        """States of whole texts, float32, shape (rows, width); ``rows`` are positions of texts. See :meth:`words`."""
        return self._read("sentences", pooling, hidden, site, rows)

    def _of_site(self, site: str) -> list[Series]:
        found = [s for s in self._layout.series if s.site == site]
        if not found:
            raise UsageError(f"Site {site!r} was not extracted; there are {', '.join(self.sites)}.")
        return found

    def _read(self, unit: str, pooling: str, hidden: int, site: str, rows: np.ndarray | None) -> np.ndarray:
        series = next((s for s in self._of_site(site) if (s.unit, s.pooling) == (unit, pooling)), None)
        if series is None:
            stored = [f"{s.unit} by {s.pooling}" for s in self._of_site(site)]
            raise UsageError(f"No {unit} pooled by {pooling!r} at site {site!r}; there are {', '.join(stored)}.")
        if hidden not in series.hidden:
            raise UsageError(
                f"Site {site!r} has no hidden state {hidden}, only {series.hidden[0]} to {series.hidden[-1]}."
            )
        known = self._rows[unit]
        if rows is not None:
            rows = np.asarray(rows)
            if rows.size and (rows.min() < 0 or rows.max() >= len(known)):
                raise UsageError(f"Rows of {unit} go from 0 to {len(known) - 1}; got {rows.min()} to {rows.max()}.")
            known = known[rows]
        edges = self._layout.edges(unit)
        out = np.empty((len(known), series.width), dtype=np.float32)
        out[known < 0] = np.nan
        shards = np.searchsorted(edges, known, side="right") - 1
        # Shard by shard, so that no more than one is mapped at a time.
        order = np.argsort(shards, kind="stable")
        present = np.unique(shards[known >= 0])
        begins = np.searchsorted(shards[order], present, side="left")
        ends = np.searchsorted(shards[order], present, side="right")
        for shard, begin, end in zip(present.tolist(), begins, ends, strict=True):
            at = order[begin:end]
            out[at] = self._gather(shard, series, series.hidden.index(hidden), known[at] - edges[shard])
        return out

    def _gather(self, shard: int, series: Series, state: int, rows: np.ndarray) -> np.ndarray:
        layout, kind = self._layout, _READ_AS[self._layout.dtype]
        _, count, width = layout.shape(series, shard)
        begin = len(layout.header(shard)) + layout.places(shard)[series.key][0] + state * count * width * kind.itemsize
        path = data_path(self.folder, shard)
        try:
            with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as view:
                states = np.frombuffer(view, dtype=kind, count=count * width, offset=begin)
                taken = states.reshape(count, width)[rows]
                del states  # a map cannot be closed while an array looks into it
        except (OSError, ValueError) as error:
            raise StoreError(
                f"Shard {shard} of the activation store at {self.folder} is not there or was cut short. "
                "If only a share of a job has run (--shard), run the others, then extract again without it."
            ) from error
        if self._layout.dtype == "bfloat16":
            return (taken.astype(np.uint32) << 16).view(np.float32)
        return taken.astype(np.float32, copy=False)
