"""Recompute activations in the backward pass, in trained blocks only: the frozen prefix has no backward pass."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from spafit.errors import ModelError

if TYPE_CHECKING:
    from spafit.adapt import StratifiedModel


def checkpoint_trained_blocks(stratified: StratifiedModel) -> int:
    """Turn on activation checkpointing for the blocks from the first trained one upward; return how many.

    Through PEFT or the Trainer, checkpointing would make the inputs require gradients, so that the backward pass ran
    through the frozen prefix too.

    Raises:
        ModelError: the blocks do not support it.
    """
    from torch.utils.checkpoint import checkpoint

    base = stratified.model.get_base_model() if stratified.is_adapter else stratified.model
    function = partial(checkpoint, use_reentrant=False)
    done: set[str] = set()
    for stack in stratified.plan.stacks:
        for path in stack.block_paths[stratified.plan.first_trained_block(stack.name) :]:
            for block in _checkpointed(base.get_submodule(path)):
                block.gradient_checkpointing = True
                block._gradient_checkpointing_func = function
                done.add(path)
    if not done:
        raise ModelError(
            f"The blocks of {type(base).__name__} do not support activation checkpointing. Leave "
            "checkpoint_activations off."
        )
    return len(done)


def _checkpointed(block: Any) -> list[Any]:
    """The module that transformers would checkpoint: the block itself, also inside a wrapper that trains it whole."""
    return [m for m in block.modules() if hasattr(m, "gradient_checkpointing")]
