"""Cause: what a model's score becomes when blocks are reverted, transplanted, mixed, skipped, or swapped between items.

Parameters are exchanged by reference, so an intervention costs no copy of a model, and is undone exactly. Both models
are plain modules of one class: merge adapters first (``StratifiedModel.merge``), and give the model before training
the head of the tuned one where the score is that of its task.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import pandas as pd

from spafit.errors import ModelError, UsageError, check_choice, did_you_mean
from spafit.layout import is_inside, join_path
from spafit.runtime import Progress, generator

if TYPE_CHECKING:
    import torch
    from torch import nn

    from spafit.stacks import Stack

Intervention = Literal["revert", "transplant", "interpolate", "skip", "resample"]
Part = Literal["block", "attention", "feed-forward"]
Metric = Callable[[Any], float | Mapping[str, float]]

INTERVENTIONS: tuple[Intervention, ...] = ("revert", "transplant", "interpolate", "skip", "resample")
COLUMNS = (
    "intervention", "blocks_start", "blocks_stop", "part", "share", "draw", "metric", "value", "reference", "effect",
    "seconds",
)  # fmt: skip
_ATTENTION = ("query", "key", "value", "attention_output", "attention_norm")
_FEED_FORWARD = ("intermediate", "output", "output_norm")
#: The stack of each model that an intervention was made in, with the names and classes of its modules at that time.
_STACKS: WeakKeyDictionary[nn.Module, tuple[tuple[tuple[str, type], ...], Stack]] = WeakKeyDictionary()


def windows(num_blocks: int, kind: Literal["single", "prefix", "suffix"]) -> list[tuple[int, int]]:
    """Half-open ranges of blocks: each alone, the first 1 … L, or the last 1 … L.

    Raises:
        UsageError: another kind.
    """
    check_choice("kind", kind, ("single", "prefix", "suffix"))
    if kind == "single":
        return [(k, k + 1) for k in range(num_blocks)]
    if kind == "prefix":
        return [(0, k + 1) for k in range(num_blocks)]
    return [(k, num_blocks) for k in reversed(range(num_blocks))]


def effect(
    before: nn.Module,
    after: nn.Module,
    *,
    intervention: Intervention,
    blocks: Sequence[tuple[int, int]],
    metric: Metric,
    part: Part = "block",
    share: float = 1.0,
    draws: int = 1,
    seed: int = 0,
    quiet: bool = True,
) -> pd.DataFrame:
    """Score of a model with an intervention on each range of blocks, beside its score without one.

    - ``revert``: the tuned model with these blocks as they were before training.
    - ``transplant``: the model before training with these blocks of the tuned one.
    - ``interpolate``: the tuned model with these blocks ``share`` of the way back (makes one copy of those blocks).
    - ``skip``: the tuned model without these blocks, or their branch.
    - ``resample``: what these blocks' branches add is taken from another item of the batch, at random, ``draws`` times.

    A fall of the score says that the tuned blocks matter given all others, not that they alone carry the skill: look at
    prefixes and suffixes, too, and at :func:`shapley_values`.

    Args:
        before: the model before training.
        after: the tuned model.
        intervention: see above.
        blocks: half-open ranges; :func:`windows` makes the usual ones.
        metric: called with the model as it is meanwhile; gives a score, or several by name.
        part: whole blocks, or their attention or feed-forward sub-layer (with its norm).
        share: for ``interpolate``: 0 leaves the tuned block, 1 reverts it.
        draws: for ``resample``.
        seed: chooses who is swapped with whom.
        quiet: no progress on stderr.

    Returns:
        Columns :data:`COLUMNS`; ``reference`` is the score without the intervention, ``effect`` value minus reference.

    Raises:
        UsageError: an unknown intervention or range.
        ModelError: models of different build, or no such part.
    """
    if intervention not in INTERVENTIONS:
        hint = did_you_mean(intervention, INTERVENTIONS)
        raise UsageError(f"intervention must be one of {', '.join(INTERVENTIONS)}; got {intervention!r}.{hint}")
    stack = shared_stack(before, after)
    for start, stop in blocks:
        if not 0 <= start < stop <= stack.num_blocks:
            raise UsageError(f"Blocks [{start}, {stop}) are not within [0, {stack.num_blocks}).")
    if not 0 <= share <= 1:
        raise UsageError(f"share must be from 0 to 1; got {share}.")
    target, source = (before, after) if intervention == "transplant" else (after, before)
    reference = _scores(metric, target)
    rows: list[dict[str, Any]] = []
    repeats = draws if intervention == "resample" else 1
    with Progress(f"{intervention} blocks", len(blocks) * repeats, quiet=quiet) as progress:
        for start, stop in blocks:
            chosen = range(start, stop)
            for draw in range(repeats):
                begun = time.perf_counter()
                if intervention in ("revert", "transplant", "interpolate"):
                    context = exchanged(target, source, chosen, part=part, share=share)
                elif intervention == "skip":
                    context = skipped(target, chosen, part=part)
                else:
                    context = resampled(target, chosen, part=part, seed=seed + draw)
                with context:
                    found = _scores(metric, target)
                spent = time.perf_counter() - begun
                for name, value in found.items():
                    numbers = (value, reference[name], value - reference[name], spent)
                    where = (intervention, start, stop, part, share, draw, name)
                    rows.append(dict(zip(COLUMNS, (*where, *numbers), strict=True)))
                progress.advance(1)
    return pd.DataFrame(rows, columns=list(COLUMNS))


@contextmanager
def exchanged(
    target: nn.Module,
    source: nn.Module,
    blocks: Sequence[int],
    *,
    part: Part = "block",
    share: float = 1.0,
    outside: bool = False,
) -> Iterator[None]:
    """Within the block, ``target`` runs with ``source``'s parameters in these blocks; then its own are back.

    Args:
        target: the model that is run.
        source: a model of the same class.
        blocks: block numbers.
        part: see :func:`effect`.
        share: below 1, a mixture: (1 - share) · target + share · source.
        outside: also everything outside the blocks that both models have (embeddings, final norm, head).
    """
    stack = shared_stack(target, source)
    every = [n for n, _ in target.named_parameters(remove_duplicate=False)]  # a tied head under its own name, too
    names = [n for n in every if _belongs(n, stack, set(blocks), part)]
    if outside:
        names += [n for n in every if not is_inside(n, stack.path)]
    names += [n for n, _ in target.named_buffers() if _belongs(n, stack, set(blocks), part)]
    with ExitStack() as undo:
        for name in names:
            parent, _, leaf = name.rpartition(".")
            ours, theirs = target.get_submodule(parent), source.get_submodule(parent)
            store = "_parameters" if leaf in ours._parameters else "_buffers"
            own, new = getattr(ours, store)[leaf], getattr(theirs, store)[leaf]
            if own is None or new is None or own.shape != new.shape:
                raise ModelError(f"{name} is not the same kind of tensor in both models. Compare one architecture.")
            undo.callback(getattr(ours, store).__setitem__, leaf, own)
            getattr(ours, store)[leaf] = new if share == 1 else _mixed(own, new, share)
        yield


@contextmanager
def skipped(model: nn.Module, blocks: Sequence[int], *, part: Part = "block") -> Iterator[None]:
    """Within the block, these blocks hand on what they get; or their branch adds nothing."""
    stack = _stack_of(model)
    with ExitStack() as undo:
        for k in blocks:
            if part == "block":
                block = model.get_submodule(stack.block_paths[k])
                hook = block.register_forward_hook(_identity, with_kwargs=True)
            else:
                hook = _branch(model, stack, k, part).register_forward_hook(lambda _, args, out: _replace(out, 0.0))
            undo.callback(hook.remove)
        yield


@contextmanager
def resampled(model: nn.Module, blocks: Sequence[int], *, part: Part = "block", seed: int = 0) -> Iterator[None]:
    """Within the block, the branches of these blocks give each item what they computed for another one of its batch.

    Items are shifted by a random step, so none keeps its own; a batch of one stays as it is. Positions are matched as
    they stand: with padding, batches of equal length are needed.
    """
    stack = _stack_of(model)
    random = generator(seed, "resampled items")

    def swap(_: Any, args: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        if len(states) < 2:
            return output
        return _replace(output, states.roll(int(random.integers(1, len(states))), dims=0))

    parts: tuple[Part, ...] = ("attention", "feed-forward") if part == "block" else (part,)
    with ExitStack() as undo:
        for k in blocks:
            for one in parts:
                undo.callback(_branch(model, stack, k, one).register_forward_hook(swap).remove)
        yield


@contextmanager
def erased(model: nn.Module, hidden: int, eraser: Any) -> Iterator[None]:
    """Within the block, an :class:`analysis.erasure.Eraser` is applied to one hidden state (at least 1), and the rest
    of the model runs on what is left.
    """  # noqa: D205
    import torch

    stack = _stack_of(model)
    if not 1 <= hidden <= stack.num_blocks:
        raise UsageError(f"hidden must be from 1 to {stack.num_blocks}; got {hidden}.")
    block = model.get_submodule(stack.block_paths[hidden - 1])
    device = next(model.parameters()).device
    mean, left, right = (torch.as_tensor(a, dtype=torch.float32, device=device) for a in (
        eraser.mean, eraser.left, eraser.right,
    ))  # fmt: skip

    def erase(_: Any, args: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        return _replace(output, states - ((states - mean) @ left) @ right.T)

    hook = block.register_forward_hook(erase)
    try:
        yield
    finally:
        hook.remove()


# ---------------------------------------------------------------- interaction


def marginals(value: Callable[[frozenset[int]], float], num_blocks: int) -> pd.DataFrame:
    """What reverting each block changes first and last: alone, and when all others are reverted already.

    Args:
        value: score with a set of blocks reverted.
        num_blocks: number of blocks L; 2L + 2 scores are asked for.

    Returns:
        Columns block, first (v({k}) - v(∅)), last (v(all) - v(all but k)), interaction (last - first). An interaction
        of 0 for every block says that blocks add up; a block whose ``first`` is small and ``last`` large stands in for
        others.
    """
    every = frozenset(range(num_blocks))
    none, full = value(frozenset()), value(every)
    rows = []
    for k in range(num_blocks):
        first, last = value(frozenset({k})) - none, full - value(every - {k})
        rows.append({"block": k, "first": first, "last": last, "interaction": last - first})
    return pd.DataFrame(rows)


def shapley_values(
    value: Callable[[frozenset[int]], float], num_blocks: int, *, permutations: int | None = None, seed: int = 0
) -> pd.DataFrame:
    """Shapley value of each block's reversion: its mean marginal over orders (Shapley 1953).

    Args:
        value: score with a set of blocks reverted; each set is asked for once.
        num_blocks: number of blocks L.
        permutations: random orders, each also backwards; None enumerates all 2^L sets (L at most 12).
        seed: draws the orders.

    Returns:
        Columns block, value, standard_error (0 where exact). Values sum to v(all) - v(∅), sampled ones too.

    Raises:
        UsageError: too many blocks to enumerate.
    """
    import math

    import numpy as np

    known: dict[frozenset[int], float] = {}

    def v(chosen: frozenset[int]) -> float:
        if chosen not in known:
            known[chosen] = float(value(chosen))
        return known[chosen]

    if permutations is None:
        if num_blocks > 12:
            raise UsageError(f"{num_blocks} blocks have too many subsets to enumerate. Give permutations=, such as 20.")
        totals = np.zeros(num_blocks)
        for code in range(2**num_blocks):
            chosen = frozenset(k for k in range(num_blocks) if code >> k & 1)
            weight = math.factorial(len(chosen)) * math.factorial(num_blocks - len(chosen) - 1) if (
                len(chosen) < num_blocks
            ) else 0  # fmt: skip
            for k in set(range(num_blocks)) - chosen:
                totals[k] += weight / math.factorial(num_blocks) * (v(chosen | {k}) - v(chosen))
        return pd.DataFrame({"block": range(num_blocks), "value": totals, "standard_error": 0.0})
    random = generator(seed, "orders")
    samples = []
    for _ in range(permutations):
        order = random.permutation(num_blocks)
        pair = np.zeros(num_blocks)
        for direction in (order, order[::-1]):
            chosen = frozenset[int]()
            for k in direction.tolist():
                pair[k] += (v(chosen | {k}) - v(chosen)) / 2
                chosen |= {k}
        samples.append(pair)
    drawn = np.array(samples)
    error = drawn.std(axis=0, ddof=1) / math.sqrt(len(drawn)) if len(drawn) > 1 else np.full(num_blocks, math.nan)
    return pd.DataFrame({"block": range(num_blocks), "value": drawn.mean(axis=0), "standard_error": error})


# ---------------------------------------------------------------- parts of a model


def _scores(metric: Metric, model: nn.Module) -> dict[str, float]:
    found = metric(model)
    return {str(k): float(v) for k, v in found.items()} if isinstance(found, Mapping) else {"score": float(found)}


def _stack_of(model: nn.Module) -> Stack:
    """The one stack that interventions work on; looked for again only where the model is built otherwise now."""
    from spafit.stacks import find_stacks

    build = tuple((name, type(module)) for name, module in model.named_modules())
    known = _STACKS.get(model)
    if known is not None and known[0] == build:
        return known[1]
    stacks = find_stacks(model)
    if len(stacks) != 1:
        raise ModelError(
            f"{type(model).__name__} has {len(stacks)} stacks of blocks ({', '.join(s.name for s in stacks)}); "
            "interventions are for models with one. Compare its stacks by probing (spafit compare --stack)."
        )
    if len(set(stacks[0].block_paths)) < stacks[0].num_blocks:
        raise ModelError(
            f"The blocks of {type(model).__name__} share their weights: none of them can be changed alone."
        )
    _STACKS[model] = build, stacks[0]
    return stacks[0]


def shared_stack(a: nn.Module, b: nn.Module) -> Stack:
    """The one stack of two models that are built alike.

    Raises:
        ModelError: they are not, or have several.
    """
    first, second = _stack_of(a), _stack_of(b)
    if type(a) is not type(b) or first.block_paths != second.block_paths:
        raise ModelError(
            f"A {type(a).__name__} of {first.num_blocks} blocks and a {type(b).__name__} of {second.num_blocks} are "
            "not built alike. Merge adapters, and give both with the same kind of head."
        )
    return first


def _belongs(name: str, stack: Stack, blocks: set[int], part: Part) -> bool:
    for k in blocks:
        if is_inside(name, stack.block_paths[k]):
            roles = {"block": None, "attention": _ATTENTION, "feed-forward": _FEED_FORWARD}[part]
            if roles is None:
                return True
            return any(is_inside(name, p) for r in roles for p in stack.role_paths(r, k))
    return False


def _branch(model: nn.Module, stack: Stack, block: int, part: Part) -> nn.Module:
    path = stack.attention_branch if part == "attention" else stack.feed_forward_branch
    if path is None:
        raise ModelError(f"No {part} branch was recognised in {type(model).__name__}.")
    return model.get_submodule(join_path(stack.block_paths[block], path))


def _mixed(own: torch.Tensor, new: torch.Tensor, share: float) -> Any:
    import torch

    mixed = torch.lerp(own.detach(), new.detach(), share) if own.is_floating_point() else own
    return torch.nn.Parameter(mixed, requires_grad=False) if isinstance(own, torch.nn.Parameter) else mixed


def _identity(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    given = args[0] if args else kwargs["hidden_states"]
    return (given, *output[1:]) if isinstance(output, tuple) else given


def _replace(output: Any, states: Any) -> Any:
    first = output[0] if isinstance(output, tuple) else output
    new = first * 0 if isinstance(states, float) else states
    return (new, *output[1:]) if isinstance(output, tuple) else new
