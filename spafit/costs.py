"""What a training step costs, by counting multiplications: what freezing saves, and what low-rank updates add."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from spafit.layout import iter_linears

if TYPE_CHECKING:
    from spafit.resolve import ResolvedPlan


def step_cost(model: Any, plan: ResolvedPlan, *, cached_prefix: bool = False, head_share: float | None = None) -> float:
    """Cost of one training step in forward passes of the whole model; full fine-tuning is 3.

    A forward pass costs 1, the gradient with respect to activations as much again for everything from the first
    trained block upward, and the gradient with respect to weights as much again for the matrices that train in full.
    Low-rank updates add their own products to all three. Biases, norms and element-wise work count nothing. With
    the outputs of the frozen prefix cached, its forward pass is saved too. With ``a`` the share of the blocks from
    the first trained one upward, SPAFIT costs 1 + a and with the cache 2a, plus its low-rank products.

    Counted are the products with weight matrices, per token: attention's products between tokens are left out (at
    sequence length n and width d they are about n/(6d) of the others), and embeddings are look-ups. The matrices of
    heads that run once per text (classifiers, poolers) count nothing; a language-model head runs once per token and
    counts.

    Args:
        model: the wrapped or plain model.
        plan: the plan that lies over it.
        cached_prefix: the frozen prefix's outputs are read, not computed.
        head_share: cost of the head relative to all blocks; by default that of a language-model head, else 0.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    forward = backward = weights = 0.0
    total = 0.0
    for stack in plan.stacks:
        first = plan.first_trained_block(stack.name)
        own = [p for p in plan.parts if p.stratum is not None and p.stratum.stack == stack.name]
        for block, path in enumerate(stack.block_paths):
            here = [p for p in own if p.stratum is not None and p.stratum.blocks[0] <= block < p.stratum.blocks[1]]
            matrix, low_rank, full = _products(base.get_submodule(path), path, here)
            total += matrix
            forward += 0.0 if cached_prefix and block < first else matrix + low_rank
            backward += matrix + low_rank if block >= first else 0.0
            weights += low_rank + full
    head = _head_products(base) if head_share is None else head_share * total
    trained = next((p for p in plan.parts if p.name == "head"), None)
    forward += head
    backward += head
    weights += head if trained is not None and trained.method == "full" else 0.0
    return (forward + backward + weights) / (total + head)


def _products(block: Any, path: str, parts: Sequence[Any]) -> tuple[float, float, float]:
    """Multiplications per token of a block's own matrices, of low-rank updates on them, and of matrices in full."""
    matrix = low_rank = whole = 0.0
    several = len(parts) > 1  # cross-attention with a method of its own
    for name, inputs, outputs in iter_linears(block):
        if ".lora_" in f".{name}" or ".original_module." in f"{name}.":
            continue
        matrix += inputs * outputs
        full = f"{path}.{name}".replace(".base_layer", "")
        part = next((p for p in parts if f"{full}.weight" in p.own), parts[0]) if several else parts[0]
        whole += inputs * outputs if part.method == "full" else 0.0
        lora = part.stratum.lora
        if lora is not None and full in part.targets and full not in part.bias_only:
            low_rank += lora.rank * (inputs + outputs)
    return matrix, low_rank, whole


def _head_products(base: Any) -> float:
    """Multiplications per token of a language-model head; 0 for heads that run once per text."""
    output = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if output is None or not hasattr(output, "weight"):
        return 0.0
    return float(output.weight.numel())
