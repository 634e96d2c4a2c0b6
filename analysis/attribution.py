"""Use: how much of a classifier's decision passes through each block's attention and feed-forward branch.

Conductance (Dhamdhere et al. 2018, arXiv 1805.12233, eq. 3) is the integrated gradient from a baseline to the input
that flows through a layer's units. Over a whole residual cut it adds up to F(x) - F(x') at *every* layer, so it ranks
nothing there; what is given are the branch outputs before they are added to the residual stream, and the residual
cuts serve as the check of convergence.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pandas as pd

from spafit.errors import ModelError, UsageError, check_choice
from spafit.layout import join_path
from spafit.stats import BootstrapDraw, interval

if TYPE_CHECKING:
    import torch
    from torch import nn

COLUMNS = ("block", "hidden", "branch", "statistic", "value", "ci_low", "ci_high", "n", "n_failed")
BRANCHES = ("attention", "feed-forward", "residual")
Rule = Literal["trapezoid", "left"]


@dataclass(frozen=True)
class ItemConductance:
    """Conductance of one item.

    Attributes:
        values: branch (and ``residual``: the block's whole output) and block -> float64 array (tokens, width).
        change: F(x) - F(x').
        error: largest difference between the sum over a residual cut and ``change``, as a share of ``change``.
        steps: intervals between baseline and input.
    """

    values: dict[tuple[str, int], np.ndarray]
    change: float
    error: float
    steps: int


def conductance(
    model: nn.Module,
    items: Sequence[Sequence[int]],
    *,
    baseline_id: int | None = None,
    keep: Collection[int] = (),
    targets: Sequence[int] | None = None,
    token_types: Sequence[Sequence[int]] | None = None,
    steps: int = 32,
    most_steps: int = 256,
    tolerance: float = 0.05,
    n_boot: int = 1000,
) -> pd.DataFrame:
    """Conductance of every block's branches for the logit of one class, averaged over items.

    Each item runs alone, its steps as the batch, so no padding comes in. Steps are doubled until the sums over all
    residual cuts are within ``tolerance`` of F(x) - F(x'); items that never get there are left out and counted.

    Conductance is about the path from this baseline to this input. Do not read a large ``abs_sum`` beside a small
    ``sum`` as use: contributions of both signs cancel. It says nothing of what the model would do without the branch;
    for that see ``analysis.causal.effect(intervention="skip", part=...)``.

    Args:
        model: a sequence classifier in eval mode that takes ``inputs_embeds``.
        items: token ids.
        baseline_id: token whose embedding stands at every position of the baseline, such as the mask; None takes the
            mean of all embeddings.
        keep: ids that the baseline keeps as they are ([CLS], [SEP], beginning of text).
        targets: class whose logit F is; None takes the predicted one.
        token_types: token types of every item, for models of pairs that embed them.
        steps: intervals to begin with.
        most_steps: the limit of doubling.
        tolerance: see above.
        n_boot: bootstrap replicates over items.

    Returns:
        Columns :data:`COLUMNS`. ``branch`` is ``attention``, ``feed-forward`` or ``residual``; ``statistic`` is ``sum``
        (signed), ``abs_sum`` (Σ|·|) or ``norm`` (mean over tokens of the Euclidean norm).

    Raises:
        ModelError: the model gives no gradient for its embeddings, or its branches were not recognised.
        UsageError: no items, or as many targets as items are not given.
    """
    if not items or (targets is not None and len(targets) != len(items)):
        raise UsageError(f"Give at least one item and one target for each; got {len(items)} items.")
    kept, failed = [], 0
    for i, ids in enumerate(items):
        count = steps
        while True:
            found = item_conductance(
                model, ids, baseline_id=baseline_id, keep=keep, target=None if targets is None else targets[i],
                token_types=None if token_types is None else token_types[i], steps=count,
            )  # fmt: skip
            if found.error <= tolerance or 2 * count > most_steps:
                break
            count *= 2
        if found.error <= tolerance:
            kept.append(found)
        else:
            failed += 1
    return _table(kept, failed, n_boot=n_boot)


def item_conductance(
    model: nn.Module,
    ids: Sequence[int],
    *,
    baseline_id: int | None = None,
    keep: Collection[int] = (),
    target: int | None = None,
    token_types: Sequence[int] | None = None,
    steps: int = 32,
    rule: Rule = "trapezoid",
    alphas: Sequence[float] | None = None,
) -> ItemConductance:
    """Conductance of one item through every branch and residual cut, from one forward and one backward pass.

    Args:
        model: see :func:`conductance`.
        ids: token ids.
        baseline_id: see :func:`conductance`.
        keep: see :func:`conductance`.
        target: class; None takes the predicted one.
        token_types: see :func:`conductance`.
        steps: equal intervals from 0 to 1.
        rule: ``trapezoid`` takes the mean of the gradients at both ends of an interval, ``left`` that at its beginning,
            as captum's ``LayerConductance`` does.
        alphas: other places between 0 and 1 than equal ones.

    Raises:
        ModelError: see :func:`conductance`.
        UsageError: another rule.
    """
    import torch

    check_choice("rule", rule, get_args(Rule))
    device = next(model.parameters()).device
    tokens = torch.as_tensor([list(ids)], device=device)
    real, start = _ends(model, tokens, baseline_id, keep)
    places = torch.linspace(0, 1, steps + 1) if alphas is None else torch.as_tensor(list(alphas))
    places = places.to(device=device, dtype=real.dtype)[:, None, None]
    inputs = (start + places * (real - start)).requires_grad_()
    types = None if token_types is None else torch.as_tensor([list(token_types)], device=device)
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with torch.enable_grad():
            outputs, logits = _forward(model, inputs, types)
            with torch.no_grad():
                ends = _logits(_run(model, torch.cat([real, start]), types))
            chosen = int(ends[0].argmax()) if target is None else target
            try:
                grads = torch.autograd.grad(logits[:, chosen].sum(), list(outputs.values()))
            except RuntimeError as error:
                raise ModelError(
                    f"{type(model).__name__} gives no gradient from its logits to its blocks ({error}). Give a "
                    "classifier whose forward pass keeps gradients."
                ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    values = {}
    for key, grad in zip(outputs, grads, strict=True):
        states = outputs[key].detach().double()
        slope = grad.double()[:-1] if rule == "left" else (grad.double()[1:] + grad.double()[:-1]) / 2
        values[key] = (slope * (states[1:] - states[:-1])).sum(0).cpu().numpy()
    change = float(ends[0, chosen].double() - ends[1, chosen].double())
    gaps = [abs(float(v.sum()) - change) for (branch, _), v in values.items() if branch == "residual"]
    return ItemConductance(values, change, max(gaps) / max(abs(change), 1e-12), len(places) - 1)


def _ends(
    model: nn.Module, tokens: torch.Tensor, baseline_id: int | None, keep: Collection[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of the item and of its baseline, shape (1, tokens, width)."""
    import torch

    get: Any = getattr(model, "get_input_embeddings", None)
    embeddings: Any = None if get is None else get()
    if embeddings is None:
        raise ModelError(f"{type(model).__name__} has no token embeddings to begin a path at. Give a text classifier.")
    with torch.no_grad():
        real = embeddings(tokens)
        blank = embeddings.weight.mean(0) if baseline_id is None else embeddings(tokens.new_tensor([baseline_id]))[0]
        fixed = torch.isin(tokens, tokens.new_tensor(sorted(keep)))[..., None]
        return real, torch.where(fixed, real, blank.expand_as(real))


def _run(model: nn.Module, inputs: torch.Tensor, types: torch.Tensor | None) -> Any:
    """Run rows of embeddings that all have the same token types."""
    more = {} if types is None else {"token_type_ids": types.expand(len(inputs), -1)}
    return model(inputs_embeds=inputs, **more)


def _forward(
    model: nn.Module, inputs: torch.Tensor, types: torch.Tensor | None
) -> tuple[dict[tuple[str, int], torch.Tensor], torch.Tensor]:
    """Outputs of every branch and block, attached to the graph, and the logits."""
    from spafit.stacks import find_stacks

    stack, *others = find_stacks(model)
    if others:
        names = ", ".join(s.name for s in (stack, *others))
        raise ModelError(
            f"{type(model).__name__} has several stacks of blocks ({names}), and conductance is of models with one. "
            "Compare its stacks by probing (spafit compare --stack)."
        )
    if stack.attention_branch is None or stack.feed_forward_branch is None or stack.shared:
        name = type(model).__name__
        raise ModelError(f"The branches of the blocks of {name} were not recognised, or its blocks share weights.")
    outputs: dict[tuple[str, int], torch.Tensor] = {}

    def keep(key: tuple[str, int]) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple | list) else output
            outputs[key] = states.reshape(*inputs.shape[:2], -1) if states.dim() == 2 else states

        return hook

    with ExitStack() as undo:
        for k, path in enumerate(stack.block_paths):
            for branch, sub in zip(BRANCHES, (stack.attention_branch, stack.feed_forward_branch, ""), strict=True):
                module = model.get_submodule(join_path(path, sub))
                undo.callback(module.register_forward_hook(keep((branch, k))).remove)
        try:
            logits = _logits(_run(model, inputs, types))
        except ValueError as error:  # GPT-2 without a padding token takes one text at a time
            raise ModelError(
                f"{type(model).__name__} cannot run several texts at once ({error}). Set model.config.pad_token_id."
            ) from error
    return outputs, logits


def _logits(result: Any) -> torch.Tensor:
    logits: torch.Tensor = result.logits
    if logits.dim() != 2:
        raise ModelError("Conductance is of a classifier's logits, one row per text; this model gives another shape.")
    return logits


def _table(kept: Sequence[ItemConductance], failed: int, *, n_boot: int) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    if not kept:
        return pd.DataFrame(rows, columns=list(COLUMNS))
    draw = BootstrapDraw.make(np.arange(len(kept)), n_seeds=1, n_boot=n_boot, seed=0)
    keys = list(kept[0].values)
    statistics = {
        "sum": lambda v: v.sum(),
        "abs_sum": lambda v: np.abs(v).sum(),
        "norm": lambda v: np.linalg.norm(v, axis=1).mean(),
    }
    for statistic, measure in statistics.items():
        values = np.array([[measure(item.values[key]) for item in kept] for key in keys])
        low, high = interval(draw.means(values[None]))
        for j, (branch, block) in enumerate(keys):
            numbers = (float(values[j].mean()), float(low[j]), float(high[j]), len(kept), failed)
            rows.append(dict(zip(COLUMNS, (block, block + 1, branch, statistic, *numbers), strict=True)))
    return pd.DataFrame(rows, columns=list(COLUMNS))
