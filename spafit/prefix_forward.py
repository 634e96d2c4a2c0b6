"""Run a model up to its frozen prefix, or from there on: outputs of frozen blocks taken out, or put in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spafit.errors import ModelError
from spafit.layout import is_inside

if TYPE_CHECKING:
    import torch
    from torch import nn

    from spafit.adapt import StratifiedModel
    from spafit.stacks import Stack

TOLERANCE = 1e-5


class PrefixError(ModelError):
    """The frozen prefix of this model, or this batch, cannot be served from a cache."""


@dataclass(frozen=True)
class FrozenBlocks:
    """The blocks of one stack below the first trained one.

    Attributes:
        stack: the stack.
        count: number of frozen blocks, virtual ones included.
        modules: the blocks; a shared one is repeated.
    """

    stack: Stack
    count: int
    modules: tuple[nn.Module, ...]


@dataclass(frozen=True)
class BlockOutput:
    """What the last frozen block of a stack returns for a batch.

    Attributes:
        states: hidden states, shape (items, tokens, width).
        values: number of values that the block returns; 0 where it returns the bare tensor.
    """

    states: torch.Tensor
    values: int


def frozen_blocks(stratified: StratifiedModel) -> tuple[list[FrozenBlocks], list[str]]:
    """The frozen bottom of each stack whose outputs stay the same in training, and a sentence for each other stack."""
    plan = stratified.plan
    base = stratified.model.get_base_model() if stratified.is_adapter else stratified.model
    found, notes = [], []
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
            modules = tuple(base.get_submodule(p) for p in stack.block_paths[:count])
            found.append(FrozenBlocks(stack, count, modules))
    return found, notes


class _AllCaptured(Exception):
    """Ends a forward pass once everything that was wanted is there."""


def capture(
    model: nn.Module, prefixes: Sequence[FrozenBlocks], inputs: Mapping[str, torch.Tensor]
) -> list[BlockOutput]:
    """Outputs of the last frozen block of each stack on one batch, without gradients; later blocks do not run.

    Raises:
        PrefixError: a stack does not run on this batch, or does not give one state per token.
    """
    import torch

    found: dict[str, BlockOutput] = {}
    calls: dict[str, int] = {}

    def hook(name: str, needed: int) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            if calls[name] == needed:
                several = isinstance(output, tuple)
                found[name] = BlockOutput(output[0], len(output)) if several else BlockOutput(output, 0)
                if len(found) == len(prefixes):
                    raise _AllCaptured

        return record

    with ExitStack() as undo:
        for prefix in prefixes:
            needed = prefix.modules.count(prefix.modules[-1])  # a shared block runs several times
            undo.callback(prefix.modules[-1].register_forward_hook(hook(prefix.stack.name, needed)).remove)
        try:
            with torch.no_grad():
                model(**inputs)
        except _AllCaptured:
            pass
    for prefix in prefixes:
        output = found.get(prefix.stack.name)
        got = None if output is None else tuple(output.states.shape[:-1])
        if "input_ids" in inputs:
            shape = tuple(inputs["input_ids"].shape)
        else:  # images, of which the model makes the tokens
            shape = (len(inputs["pixel_values"]), *(got or ())[1:])
        if got != shape:
            raise PrefixError(
                f"Stack {prefix.stack.name!r} gives states of shape {got} where one per token, {shape}, is needed, so "
                "it cannot be cached. Set the prefix cache off."
            )
    return [found[p.stack.name] for p in prefixes]


@contextmanager
def replaced(prefixes: Sequence[FrozenBlocks], outputs: Sequence[BlockOutput]) -> Iterator[None]:
    """Inside the block, frozen blocks do not compute: each returns the given output of the last one.

    Further values that a block returns become None. Hooks on the blocks themselves still run.
    """
    with ExitStack() as undo:
        for prefix, output in zip(prefixes, outputs, strict=True):
            for module in dict.fromkeys(prefix.modules):
                undo.callback(_restore_forward, module, module.__dict__.get("forward"))
                module.forward = _returning(output, prefix.stack.name)
        yield


def _returning(output: BlockOutput, name: str) -> Callable[..., Any]:
    states = output.states
    value = (states, *[None] * (output.values - 1)) if output.values else states

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs.get("hidden_states")
        if given is not None and given.shape[:-1] != states.shape[:-1]:
            raise PrefixError(
                f"A batch of shape {tuple(given.shape[:-1])} reached stack {name!r} where {tuple(states.shape[:-1])} "
                "was announced. Run one process per device (torchrun), or set the prefix cache off."
            )
        return value

    return forward


def _restore_forward(module: nn.Module, before: Any) -> None:
    if before is None:
        del module.__dict__["forward"]
    else:
        module.forward = before


def check_replacement(
    stratified: StratifiedModel,
    prefixes: Sequence[FrozenBlocks],
    outputs: Sequence[BlockOutput],
    inputs: Mapping[str, torch.Tensor],
) -> None:
    """Compare the logits of a batch with ``outputs`` in place of the frozen blocks with the model's own.

    Raises:
        PrefixError: they differ by more than 1e-5 of the largest, or the later blocks need more than hidden states.
    """
    import torch

    mask = inputs.get("attention_mask")
    with torch.no_grad():
        expected = _result(stratified.model(**inputs), mask)
        try:
            with replaced(prefixes, outputs):
                got = _result(stratified.model(**inputs), mask)
        except torch.cuda.OutOfMemoryError:
            raise
        except (TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            reason, same = str(error).partition("\n")[0], False
        else:
            largest, difference = float(expected.abs().max()), float((got - expected).abs().max())
            reason = f"logits differ by {difference:.2g}, the largest is {largest:.2g}"
            same = difference <= TOLERANCE * largest
    if not same:
        base = stratified.model.get_base_model() if stratified.is_adapter else stratified.model
        names = " and ".join(p.stack.name for p in prefixes)
        raise PrefixError(
            f"{names}: {type(base).__name__} hands more than hidden states from block to block, such as T5's position "
            f"bias, so outputs of its frozen blocks cannot be cached ({reason})"
        )


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The whole model in eval mode; every module's own mode is restored."""
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
