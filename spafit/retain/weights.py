"""Remedies on the weights: L2-SP and elastic weight consolidation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from spafit.errors import ModelError, UsageError
from spafit.retain.base import PricedRemedy, trained_parameters
from spafit.retain.items import Output, StepItems, evaluating, output_of, plain_model, step_items

if TYPE_CHECKING:
    import torch

    from spafit.adapt import StratifiedModel
    from spafit.retain.items import TextData


class L2SP(PricedRemedy):
    """½ · weight · the squared distance of what trains from the start (L2-SP; Li, Grandvalet, Davoine 2018, eq. 3).

    The distance is taken between parameters that train in place or whole, and between the updates BA of LoRA as dense
    matrices (never formed). Of DoRA and other PEFT methods it is between the adapter's own tensors: that holds the
    adapter, not the weights that it yields.

    Do not expect it to help where the new task can only be learnt in what the old one needs: see :class:`EWC`.

    Args:
        weight: α of the paper, which tries 0.001 to 1.
        heads: ``leave`` the head alone, which often starts from random weights that are nothing to hold to, or
            ``hold`` it like the rest.

    Raises:
        ModelError: (from ``prepare``) nothing but the head trains, and it is left alone.
    """

    name = "l2sp"
    _shown = ("heads",)

    def __init__(self, weight: float, *, heads: Literal["leave", "hold"] = "leave"):
        if heads not in ("leave", "hold"):
            raise UsageError(f"l2sp: heads {heads!r} is not known. Allowed: leave, hold.")
        super().__init__(weight)
        self.heads = heads

    def _set_up(self, stratified: StratifiedModel, tokenizer: Any, *, max_length: int, device: str) -> None:
        held = {
            name: parameter
            for name, parameter in trained_parameters(stratified).items()
            if self.heads == "hold" or stratified.part_of[name] != "head"
        }
        if not held:
            raise ModelError("l2sp has nothing to hold: only the head trains. Use heads=hold, or another remedy.")
        self._start = {name: parameter.detach().clone() for name, parameter in held.items()}
        self._targets = _low_rank_targets(stratified)
        factors = _factors(self._targets)
        self._own = [name for name in held if name not in factors]
        self.bytes = sum(t.numel() * t.element_size() for t in self._start.values())

    def _term(self, stratified: StratifiedModel, step: int) -> torch.Tensor:
        import torch

        from spafit.adapt import ADAPTER

        now = trained_parameters(stratified)
        terms = [((now[name].float() - self._start[name].float()) ** 2).sum() for name in self._own]
        for target in self._targets:
            names = f"{target}.lora_A.weight", f"{target}.lora_B.weight"
            scale = plain_model(stratified).get_submodule(target).scaling[ADAPTER]
            terms.append(
                update_distance((now[names[0]], now[names[1]]), (self._start[names[0]], self._start[names[1]]), scale)
            )
        return 0.5 * torch.stack(terms).sum()


class EWC(PricedRemedy):
    """½ · weight · Σᵢ Fᵢ (θᵢ − θᵢ*)², elastic weight consolidation (Kirkpatrick et al. 2017, eq. 3).

    F is the diagonal Fisher information of the start θ* on the given items, over every parameter that trains, heads
    included. The items go through one at a time, once, before training. A weight under LoRA is held itself, not its
    factors: F is that of the dense weight W, and the distance that of the update, s·(BA − B₀A₀). (The factors' own
    Fisher information says nothing there: at B = 0 that of A is zero, and that of B is about an A that then moves.)
    That keeps two dense float32 matrices per target. Of DoRA and other PEFT methods the adapter's own tensors are held.
    Where the start does well on the items, F is nearly 0 and needs a large weight.

    Remedies on the weights hold the old task where the new one can be learnt elsewhere in what trains. On this
    project's planted conflict L2-SP and EWC kept the first task beside the second when everything trained, and with
    LoRA when the embeddings trained too; with LoRA over frozen embeddings L2-SP did at no weight, and EWC within a
    factor of two of one. KL and replay did in all three: prefer them where they can be had.

    Args:
        weight: λ of the paper; depends on the scale of F, so try powers of ten.
        data: items of what is to be kept: texts, a frame (``text``, optionally ``text2``, ``label``), or a task.
        labels: ``model`` draws them from the start's own distribution, which is the Fisher information; ``given``
            takes the items' own, which is called empirical and differs where the model is wrong or unsure (Kunstner
            et al. 2019).
        seed: of the drawn labels.
    """

    name = "ewc"
    _shown = ("labels", "seed", "data")

    def __init__(self, weight: float, *, data: TextData, labels: Literal["model", "given"] = "model", seed: int = 0):
        if labels not in ("model", "given"):
            raise UsageError(f"ewc: labels {labels!r} is not known. Allowed: model, given.")
        super().__init__(weight)
        self.data, self.labels, self.seed = data, labels, seed

    def _set_up(self, stratified: StratifiedModel, tokenizer: Any, *, max_length: int, device: str) -> None:
        import torch

        model = plain_model(stratified)
        output = output_of(model)
        if output == "masked-lm" or (output == "token-classes" and self.labels == "given"):
            raise ModelError(
                f"ewc cannot take {self.labels} labels of {type(model).__name__}. Use kl, or labels=model for token "
                "classes."
            )
        items = step_items(
            self.data,
            stratified,
            labelled=self.labels == "given" and output != "causal-lm",
            tokenizer=tokenizer,
            max_length=max_length,
            batch_size=1,
            seed=self.seed,
            device=device,
        )
        self._targets = _low_rank_targets(stratified)
        factors = _factors(self._targets)
        parameters = {n: p for n, p in trained_parameters(stratified).items() if n not in factors}
        dense = {t: model.get_submodule(t).base_layer.weight for t in self._targets}
        sampler = torch.Generator().manual_seed(self.seed) if self.labels == "model" else None
        with evaluating(stratified.model), _with_gradient(dense.values()):
            self.fisher = diagonal_fisher(model, output, items, {**parameters, **dense}, sampler=sampler)
        self._start = {name: p.detach().clone() for name, p in parameters.items()}
        self._start |= {t: _update(model, t).detach().clone() for t in self._targets}
        kept = [*self.fisher.values(), *self._start.values()]
        self.bytes = sum(t.numel() * t.element_size() for t in kept)

    def _term(self, stratified: StratifiedModel, step: int) -> torch.Tensor:
        import torch

        model, now = plain_model(stratified), trained_parameters(stratified)
        terms = [
            (f * ((_update(model, n) if n in self._targets else now[n]).float() - self._start[n].float()) ** 2).sum()
            for n, f in self.fisher.items()
        ]
        return 0.5 * torch.stack(terms).sum()


# ---------------------------------------------------------------- terms


def _low_rank_targets(stratified: StratifiedModel) -> list[str]:
    """Modules whose weight W becomes W + s·BA."""
    return [
        target
        for part in stratified.plan.parts
        if part.stratum is not None and part.stratum.lora is not None and part.stratum.method != "dora"
        for target in part.targets
        if target not in part.bias_only
    ]


def _factors(targets: Iterable[str]) -> set[str]:
    return {f"{target}.lora_{side}.weight" for target in targets for side in "AB"}


def _update(model: Any, target: str) -> torch.Tensor:
    """s·BA in the layout of the dense weight, by PEFT's own arithmetic; gradients flow."""
    from spafit.adapt import ADAPTER

    found: torch.Tensor = model.get_submodule(target).get_delta_weight(ADAPTER)
    return found


@contextlib.contextmanager
def _with_gradient(parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """Frozen parameters have gradients inside the block."""
    changed = [p for p in parameters if not p.requires_grad]
    for parameter in changed:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(False)


def update_distance(
    now: tuple[torch.Tensor, torch.Tensor], start: tuple[torch.Tensor, torch.Tensor], scale: float
) -> torch.Tensor:
    """‖s·(BA − B₀A₀)‖²_F of a low-rank update without forming it, in float32.

    With P = [B − B₀, B₀] and Q = [A; A − A₀] the difference is PQ, and ‖PQ‖² = Σ (PᵀP) ∘ (QQᵀ): two Gram matrices of
    twice the rank. Written so, nothing cancels when the update has hardly moved.

    Args:
        now: A of shape (rank, inputs) and B of shape (outputs, rank).
        start: the same before training; where B₀ = 0 the second half falls away.
        scale: PEFT's factor on the update.
    """
    import torch

    a, b = (t.float() for t in now)
    a0, b0 = (t.float() for t in start)
    left, right = b, a
    if bool(b0.any()):
        left, right = torch.cat([b - b0, b0], dim=1), torch.cat([a, a - a0], dim=0)
    return scale**2 * ((left.T @ left) * (right @ right.T)).sum()


def log_likelihood(
    model: Any, output: Output, inputs: Mapping[str, torch.Tensor], *, sampler: torch.Generator | None
) -> torch.Tensor:
    """Log-likelihood log p(y | item) of one item in nats, summed over its tokens for token-wise outputs.

    Args:
        model: what to call.
        output: what its logits are.
        inputs: one item without padding, with ``labels`` where they are given.
        sampler: draws y from the model's own distribution; None takes the given labels (of a causal language model,
            the text's own next tokens). One number has a normal distribution of unit variance.
    """
    import torch

    fed = {k: v for k, v in inputs.items() if k != "labels"}
    logits = model(**fed).logits[0].float()
    if output == "number":
        value = logits.reshape(())
        if sampler is None:
            target = inputs["labels"].reshape(()).to(value)
        else:
            target = value.detach() + torch.randn((), generator=sampler).to(value)
        return -0.5 * (target - value) ** 2
    if output == "causal-lm":
        logits, given = logits[:-1], inputs["input_ids"][0, 1:]
    else:
        logits = logits if output == "token-classes" else logits[None]
        given = inputs.get("labels", torch.empty(0))
    if sampler is None:
        target = given
    else:
        shares = torch.softmax(logits.detach(), dim=-1).cpu()
        target = torch.multinomial(shares, 1, generator=sampler)[:, 0].to(logits.device)
    return torch.log_softmax(logits, dim=-1).gather(1, target[:, None]).sum()


def diagonal_fisher(
    model: Any,
    output: Output,
    items: StepItems,
    parameters: Mapping[str, torch.nn.Parameter],
    *,
    sampler: torch.Generator | None,
) -> dict[str, torch.Tensor]:
    """Diagonal of the Fisher information: the mean over items of (∂ log p(y | item) / ∂θ)², one item at a time.

    Args:
        model: in eval mode.
        output: what its logits are.
        items: what to average over.
        parameters: for which; one that the output does not depend on gets zeros.
        sampler: as in :func:`log_likelihood`.
    """
    import torch

    fisher = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    for position in range(len(items.encoded)):
        value = log_likelihood(model, output, items.batch([position]), sampler=sampler)
        gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                fisher[name] += gradient.float() ** 2
    return {name: total / len(items.encoded) for name, total in fisher.items()}
