"""A pilot training: what each block would gain from training, and what it would forget, before boundaries are chosen.

Gain: squared gradients of the task's loss in the parameters that a method would train in a block, after the head alone
was warmed up (a head of random weights sends gradients that say nothing of the task). Forgetting: one plan that trains
every block is trained, and blocks are put back to what they were (``kept_from`` s: blocks below s are as before
training, the others keep all that was trained, or their biases or norms alone). Both order plans; they do not say how
good a plan becomes. That is for the race.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from analysis.abilities import Abilities
from analysis.causal import exchanged
from analysis.placed_strata import AdapterType, on_model, placed_strata
from spafit import io
from spafit.errors import DataError, OutputError, UsageError
from spafit.presets import TARGETS
from spafit.runtime import Progress, provenance
from spafit.settings import TrainSettings
from spafit.strata import LoraOptions, Outside, StrataConfig, Stratum

if TYPE_CHECKING:
    from torch import nn

    from spafit.data.training import TrainData
    from spafit.models import LoadedModel
    from spafit.stacks import Stack

#: ``quantity`` is ``parameters``, ``gradient`` (squared, of one batch), ``relative_gradient`` (of all of a block's
#: weights over five batches, as a share of the weights' norm) or ``ability`` (of one item with blocks from ``block`` on
#: as trained; ``block`` = L is the model before training). ``kept`` says what those blocks keep.
COLUMNS = ("stack", "quantity", "method", "kept", "block", "seed", "task", "item", "group", "value")
Kept = Literal["everything", "bitfit", "norm"]
#: What a block keeps of the pilot, by the method that a stratum would use there; all others keep everything.
KEPT: dict[str, Kept] = {"bitfit": "bitfit", "norm": "norm"}
_RECORD = "pilot.json"
#: Batches behind the relative gradient of a block.
NORM_BATCHES = 5


@dataclass(frozen=True)
class Pilot:
    """What a pilot measured: a view on its folder.

    Attributes:
        folder: holds ``pilot.parquet``, ``pilot.json`` and the two trainings.
        run: the record: model, stack, number of blocks, methods, unit of forgetting, parameters outside the blocks.
        table: columns :data:`COLUMNS`.
    """

    folder: Path
    run: dict[str, Any]
    table: pd.DataFrame

    @classmethod
    def load(cls, folder: str | Path) -> Pilot:
        """Read what :func:`run_pilot` wrote.

        Raises:
            DataError: there is no finished pilot.
        """
        folder = Path(folder)
        if not (folder / _RECORD).is_file() or not (folder / "pilot.parquet").is_file():
            raise DataError(f"{folder} holds no finished pilot (no {_RECORD}). Run spafit suggest with --task first.")
        return cls(folder, io.read_json(folder / _RECORD), io.read_table(folder / "pilot"))

    def save(self, folder: str | Path) -> Path:
        """Write the table and the record."""
        folder = Path(folder)
        io.write_table(folder / "pilot", self.table)
        io.write_json(folder / _RECORD, self.run)
        return folder

    def to_pandas(self) -> pd.DataFrame:
        """The table."""
        return self.table

    def relative_gradients(self) -> np.ndarray:
        """Norm of each block's gradient as a share of its weights', the mean over seeds, shape (L,)."""
        rows = self.table[self.table["quantity"] == "relative_gradient"]
        return rows.groupby("block")["value"].mean().to_numpy(float)


def run_pilot(
    model: str | None,
    data: TrainData,
    *,
    abilities: Abilities,
    out: str | Path,
    methods: Sequence[str] = ("bitfit", "lora+bitfit"),
    adapter_type: AdapterType = "I",
    settings: TrainSettings | None = None,
    warm_up: TrainSettings | None = None,
    seeds: Sequence[int] = (0, 1),
    batches: int = 16,
    device: str = "auto",
    revision: str | None = None,
    offline: bool = False,
    allow_pickle: bool = False,
    command: str | None = None,
    quiet: bool = False,
) -> Pilot:
    """Train a head and one plan on all blocks, and measure gain and forgetting by block; resumable.

    Of each seed the head alone is trained first; gradients are then taken on batches of training items, in eval mode,
    of what each method would train in each block (low-rank updates start at zero, so theirs are those of one matrix of
    the two). Then low-rank updates and every bias of all blocks are trained (norms where there is no bias), and what
    is left of the abilities is read with blocks put back from below.

    Do not trust it for what full training of many epochs forgets: the pilot sees ``settings`` and no more. Training
    part of the blocks from the start is not the same as putting blocks back afterwards.

    Args:
        model: reference of a plain model; None for the built-in default.
        data: the task that will be trained.
        abilities: what should not be forgotten.
        out: folder.
        methods: of the strata that train, such as ``bitfit``, ``norm``, ``lora+bitfit:16`` (rank 64 where none is
            named). What the last one would gain in all blocks is the unit of gain.
        adapter_type: SPAFIT's type, which says what low-rank methods update.
        settings: of the pilot training; by default one epoch.
        warm_up: of the head's training; by default one epoch at 1e-3.
        seeds: at least one.
        batches: gradients per seed.
        device: kind of torch device.
        revision: of a hub model.
        offline: never ask the hub.
        allow_pickle: accept pickle weights.
        command: how this was called.
        quiet: no progress on stderr.

    Raises:
        SpafitError: as :func:`spafit.fit`; a model with several stacks; a method that trains nothing.
    """
    from spafit.adapt import count_trainable, with_missing_pooler
    from spafit.heads import load_with_head
    from spafit.models import load_model
    from spafit.stacks import find_stacks
    from spafit.training import fit

    folder = Path(out)
    settings = settings or TrainSettings(epochs=1, select_share=0)
    warm_up = warm_up or TrainSettings(epochs=1, select_share=0, learning_rate=1e-3)
    _check(methods, seeds, batches)
    headed = load_with_head(
        model, labels=data.labels, regression=data.regression, seed=seeds[0], revision=revision, offline=offline,
        allow_pickle=allow_pickle,
    )  # fmt: skip
    stacks = find_stacks(headed.model)
    if len(stacks) != 1:
        raise UsageError(
            f"{headed.name} has {len(stacks)} stacks of blocks, and a pilot is for models with one. Suggest strata "
            "from probing runs."
        )
    stack = stacks[0]
    methods = tuple(dict.fromkeys(on_model(methods, stack.bias_roles)))
    place: dict[str, Any] = {
        "stack": stack.name, "num_blocks": stack.num_blocks, "bias_roles": stack.bias_roles, "model_id": headed.name,
        "adapter_type": adapter_type,
    }  # fmt: skip
    plans = {m: with_missing_pooler(headed.model, placed_strata([m], [], **place), headed.missing) for m in methods}
    nothing = with_missing_pooler(headed.model, placed_strata(["freeze"], [], **place), headed.missing)
    everything = with_missing_pooler(
        headed.model, _everything(methods, stack, headed.name, adapter_type), headed.missing
    )
    key = io.content_digest(
        [1, data.digest, headed.name, methods, adapter_type, settings.to_dict(), warm_up.to_dict(), tuple(seeds),
         batches, *abilities.record()]
    )  # fmt: skip
    if (folder / _RECORD).is_file():
        if io.read_json(folder / _RECORD)["key"] != key:
            raise OutputError(f"{folder} holds another pilot (other data, settings or seeds). Choose another --out.")
        if (folder / "pilot.parquet").is_file():
            return Pilot.load(folder)
    io.write_json(folder / _RECORD, {"key": key, "status": "running"})
    shared: dict[str, Any] = {
        "data": data, "seeds": tuple(seeds), "device": device, "revision": revision, "offline": offline,
        "allow_pickle": allow_pickle, "command": command, "quiet": quiet,
    }  # fmt: skip
    head = fit(model, "head", settings=warm_up, out=folder / "head", **shared)
    trained = fit(model, everything, settings=settings, out=folder / "all-blocks", method="all blocks", **shared)
    rows: list[pd.DataFrame] = []
    for method, plan in plans.items():
        rows.append(_parameters(headed.model, method, plan, stack.name))
    kept = tuple(dict.fromkeys([*(KEPT.get(m, "everything") for m in methods), "everything"]))
    steps = len(seeds) * (len(methods) * batches + len(kept) * stack.num_blocks)
    with Progress("Pilot", steps, quiet=quiet) as progress:
        for seed in seeds:
            part = folder / f"measured-seed-{seed}"
            if not part.with_name(f"{part.name}.parquet").is_file():
                gain = _gradients(
                    head.model_folder(seed), headed.tokenizer, plans, data, batches, settings, seed, progress
                )
                before = load_model(model, revision=revision, offline=offline, allow_pickle=allow_pickle)
                after = load_model(trained.model_folder(seed), offline=offline, allow_pickle=allow_pickle)
                left = _abilities(before, after, abilities, kept, progress)
                measured = pd.concat([gain, left], ignore_index=True).assign(stack=stack.name, seed=seed)
                io.write_table(part, measured.reindex(columns=list(COLUMNS)), csv=False)
            rows.append(io.read_table(part))
    table = pd.concat(rows, ignore_index=True)[list(COLUMNS)]
    run = {
        "schema_version": io.SCHEMA_VERSION, "key": key, "command": command or "analysis.run_pilot",
        "model": {"name": headed.name, "reference": headed.reference, "revision": headed.revision},
        "stack": stack.name, "blocks": stack.num_blocks, "bias_roles": sorted(stack.bias_roles),
        "methods": list(methods), "adapter_type": adapter_type, "unit": abilities.unit, "task": data.name,
        "data": data.digest, "seeds": list(seeds), "batches": batches, "settings": settings.to_dict(),
        "outside_parameters": count_trainable(headed.model, nothing), **provenance(),
    }  # fmt: skip
    Pilot(folder, run, table).save(folder)
    return Pilot.load(folder)


def _check(methods: Sequence[str], seeds: Sequence[int], batches: int) -> None:
    if not seeds or len(set(seeds)) != len(seeds) or batches < 2:
        raise UsageError(
            f"A pilot needs different seeds, at least one, and at least 2 batches; got {list(seeds)}, {batches}."
        )
    if not methods or "freeze" in methods:
        raise UsageError("A pilot measures methods that train; give at least one, and not freeze.")


def _everything(methods: Sequence[str], stack: Stack, name: str, adapter_type: AdapterType) -> StrataConfig:
    """All blocks with low-rank updates of the methods' largest rank and every bias, or norm where there is none."""
    rank = max((int(m.partition(":")[2] or 0) for m in methods), default=0) or 64
    method = "lora+bitfit" if stack.bias_roles else "lora+norm"
    stratum = Stratum(stack.name, (0, stack.num_blocks), method, LoraOptions(rank, targets=TARGETS[adapter_type]))
    outside = Outside(pooler="bitfit" if stack.bias_roles else "norm")
    return StrataConfig(name, {stack.name: stack.num_blocks}, (stratum,), outside, {"source": "pilot"})


def _parameters(model: nn.Module, method: str, plan: StrataConfig, stack: str) -> pd.DataFrame:
    """Trainable parameters of each block under a method."""
    from spafit.adapt import apply_strata, meta_copy

    stratified = apply_strata(meta_copy(model), plan)
    counts = _by_block(stratified, {n: float(size) for n, size in stratified.trainable.items()})
    return pd.DataFrame(
        {"stack": stack, "quantity": "parameters", "method": method, "block": range(len(counts)), "value": counts}
    ).reindex(columns=list(COLUMNS))


def _by_block(stratified: Any, values: Mapping[str, float]) -> np.ndarray:
    """Sums of values over the parameters of each block, by canonical name; others are left out."""
    from spafit.layout import is_inside

    paths = stratified.plan.stacks[0].block_paths
    sums = np.zeros(len(paths))
    for name, value in values.items():
        for k, path in enumerate(paths):
            if is_inside(name, path):
                sums[k] += value
    return sums


def _gradients(
    head: Path, tokenizer: Any, plans: Mapping[str, StrataConfig], data: TrainData, batches: int,
    settings: TrainSettings, seed: int, progress: Progress,
) -> pd.DataFrame:  # fmt: skip
    """Squared gradients by method, block and batch, at the warmed-up head."""
    from spafit import checkpoint
    from spafit.adapt import apply_strata, canonical_name
    from spafit.batches import Collator, encode
    from spafit.runtime import generator, torch_seed

    items = data.frames["train"]
    if len(items) < batches:
        raise UsageError(f"{data.name} has {len(items)} training items; a pilot with {batches} batches needs as many.")
    plain = checkpoint.load(head).merge()
    size = min(settings.batch_size, len(items) // batches)
    drawn = items.iloc[generator(seed, "pilot batches").permutation(len(items))[: size * batches]]
    encoded = encode(drawn, tokenizer, max_length=settings.max_length, regression=data.regression)
    collate, rows = Collator(tokenizer), []
    for method, plan in plans.items():
        with torch_seed(seed, "pilot adapter"):
            stratified = apply_strata(copy.deepcopy(plain), plan)
        stratified.model.eval()
        for b in range(batches):
            batch = collate([encoded[i] for i in range(b * size, (b + 1) * size)])
            batch.pop("index")
            stratified.model.zero_grad(set_to_none=True)
            stratified.model(**batch).loss.backward()
            squares = {
                canonical_name(n): float(p.grad.double().square().sum())
                for n, p in stratified.model.named_parameters()
                if p.requires_grad and p.grad is not None
            }
            gain = _by_block(stratified, squares)
            what = {"quantity": "gradient", "method": method, "item": b, "block": range(len(gain))}
            rows.append(pd.DataFrame({**what, "value": gain}))
            progress.advance()
    norms = _relative_gradients(plain, encoded, collate, min(batches, NORM_BATCHES), size)
    rows.append(pd.DataFrame({"quantity": "relative_gradient", "block": range(len(norms)), "value": norms}))
    return pd.concat(rows, ignore_index=True)


def _relative_gradients(plain: nn.Module, encoded: Any, collate: Any, batches: int, size: int) -> np.ndarray:
    """Norm of the mean gradient of all weights of a block, divided by the norm of the weights, shape (L,)."""
    import torch

    from spafit.stacks import find_stacks

    plain.eval().requires_grad_(True)
    plain.zero_grad(set_to_none=True)
    for b in range(batches):
        batch = collate([encoded[i] for i in range(b * size, (b + 1) * size)])
        batch.pop("index")
        (plain(**batch).loss / batches).backward()
    found = []
    for path in find_stacks(plain)[0].block_paths:
        own = list(plain.get_submodule(path).parameters())
        squares = [
            sum(float(t.detach().double().square().sum()) for t in tensors)
            for tensors in ((p.grad if p.grad is not None else torch.zeros(()) for p in own), own)
        ]
        found.append((squares[0] / squares[1]) ** 0.5)
    return np.array(found)


def _abilities(
    before: LoadedModel, after: LoadedModel, abilities: Abilities, kinds: Sequence[Kept], progress: Progress
) -> pd.DataFrame:
    """Abilities with blocks below each s as they were before training, by what the others keep."""
    read = abilities.reader(after)
    count = after.stacks[0].num_blocks
    rows = []

    def note(kept: str, block: int) -> None:
        for task, ability in read().items():
            what = {"quantity": "ability", "kept": kept, "block": block, "task": task, "group": ability.groups}
            rows.append(pd.DataFrame({**what, "item": range(len(ability.values)), "value": ability.values}))

    with exchanged(after.model, before.model, range(count), outside=True):
        note("nothing", count)
    for kept in kinds:
        with nullcontext() if kept == "everything" else reduced(after.model, before.model, kept):
            for block in reversed(range(count)):
                with exchanged(after.model, before.model, range(block)):
                    note(kept, block)
                progress.advance()
    return pd.concat(rows, ignore_index=True)


@contextmanager
def reduced(after: nn.Module, before: nn.Module, kept: Literal["bitfit", "norm"]) -> Iterator[None]:
    """Within the block, the tuned model keeps of its blocks' training the biases (or the norms) alone.

    Args:
        after: the tuned model, merged.
        before: the same model before training.
        kept: ``bitfit``: every bias of the blocks; ``norm``: weights and biases of the blocks' norms.
    """
    from analysis.causal import shared_stack
    from spafit.layout import is_inside

    stack = shared_stack(after, before)
    norms = {p for role in ("attention_norm", "output_norm") for k in range(stack.num_blocks)
             for p in stack.role_paths(role, k)}  # fmt: skip
    with ExitStack() as undo:
        for name, _ in list(after.named_parameters(remove_duplicate=False)):
            if not is_inside(name, stack.path):
                continue
            keep = name.endswith("bias") if kept == "bitfit" else any(is_inside(name, p) for p in norms)
            if keep:
                continue
            parent, _, leaf = name.rpartition(".")
            ours, theirs = after.get_submodule(parent), before.get_submodule(parent)
            undo.callback(ours._parameters.__setitem__, leaf, ours._parameters[leaf])
            ours._parameters[leaf] = theirs._parameters[leaf]
        yield
