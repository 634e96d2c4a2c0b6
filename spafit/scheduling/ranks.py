"""Give a low-rank update B A another rank, in place, inside matrices that are as wide as its largest rank.

Of A (R × inputs) and B (outputs × R) the first r rows and columns are in use, the others are zero. Growth leaves the
product as it is; shrinking leaves the nearest product of that rank (Eckart & Young 1936), whose Frobenius distance is
the root of the sum of the squared singular values that were dropped. The product itself is never formed.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


def grow(a: torch.Tensor, b: torch.Tensor, *, old: int, new: int, draw: np.random.Generator) -> None:
    """Take directions ``old`` to ``new`` into use: rows of A drawn as PEFT draws them, columns of B zero."""
    import torch

    bound = a.shape[1] ** -0.5  # Kaiming's uniform law with a = √5, which nn.Linear and PEFT use
    rows = draw.uniform(-bound, bound, size=(new - old, a.shape[1]))
    with torch.no_grad():
        a[old:new] = torch.as_tensor(rows, dtype=a.dtype, device=a.device)
        b[:, old:new] = 0


def shrink(a: torch.Tensor, b: torch.Tensor, *, old: int, new: int) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Keep the ``new`` largest singular values of the product, from QR of both factors.

    The directions that stay are turned onto the singular vectors; rows of A keep their root mean square, so that the
    two factors go on learning at the rates that they had.

    Returns:
        The Frobenius norm of what was dropped from B A, and the maps N (new × old) and M (old × new), in float64, with
        A' = N A + what N A lacks where a singular value is zero, and B' = B M.
    """
    import torch

    with torch.no_grad():
        wide_a, wide_b = a[:old].double(), b[:, :old].double()
        q_a, r_a = torch.linalg.qr(wide_a.T)
        q_b, r_b = torch.linalg.qr(wide_b)
        u, sigma, v = torch.linalg.svd(r_b @ r_a.T)  # R_b R_aᵀ = U Σ V, of at most old × old
        kept = min(new, len(sigma))
        size = float(wide_a.norm()) / old**0.5 or 1.0
        keep_u, keep_s, keep_v = u[:, :kept], sigma[:kept], v[:kept]
        solid = keep_s > 1e-12 * sigma[0] if len(sigma) and sigma[0] > 0 else torch.zeros_like(keep_s, dtype=torch.bool)
        inverse = torch.where(solid, 1 / torch.where(solid, keep_s, 1), 0)
        n, m = a.new_zeros((new, old), dtype=torch.float64), a.new_zeros((old, new), dtype=torch.float64)
        n[:kept] = size * inverse[:, None] * (keep_u.T @ r_b)
        m[:, :kept] = r_a.T @ keep_v.T / size
        a.zero_()
        b.zero_()
        a[:kept] = (size * keep_v @ q_a.T).to(a.dtype)
        b[:, :kept] = (q_b @ (keep_u * keep_s) / size).to(b.dtype)
        return float(sigma[kept:].square().sum().sqrt()), n, m


def carry_moments(
    state_a: MutableMapping[str, Any], state_b: MutableMapping[str, Any], n: torch.Tensor, m: torch.Tensor
) -> None:
    """Turn Adam's moments with the directions: first moments exactly, as gradients turn; second ones by squares.

    ∂/∂A' = Mᵀ ∂/∂A, and ∂/∂B' = ∂/∂B Nᵀ. The second moments are those of entries whose gradients do not go together.
    """
    import torch

    new, old = n.shape
    with torch.no_grad():
        for name, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
            for state, turned in ((state_a, lambda t, p=power: (m.T**p) @ t[:old].double()),
                                  (state_b, lambda t, p=power: t[:, :old].double() @ (n.T**p))):  # fmt: skip
                if name not in state:
                    continue
                moment = state[name]
                result = turned(moment).to(moment.dtype)
                moment.zero_()
                if state is state_a:
                    moment[:new] = result
                else:
                    moment[:, :new] = result


def rows_in_use(tensor: torch.Tensor, start: int, stop: int, *, of_a: bool) -> torch.Tensor:
    """The part of A, B, or of a moment of theirs that belongs to some directions; a view."""
    return tensor[start:stop] if of_a else tensor[:, start:stop]


def as_if_begun_at(
    parameter: torch.Tensor,
    before: torch.Tensor,
    state: Mapping[str, Any],
    group: Mapping[str, Any],
    directions: tuple[int, int],
    *,
    born: float,
    of_a: bool,
) -> None:
    """Redo the last AdamW step of some directions with the bias corrections of their own age.

    AdamW counts steps by tensor. Directions that are younger than their tensor would have moments that start at zero
    and no correction for it, and so step several times too far.

    Args:
        parameter: A or B after the step.
        before: these directions before the step.
        state: of the optimiser, for the tensor, after the step.
        group: the optimiser's group, as it was for the step.
        directions: first, and one past the last.
        born: steps that the tensor had done when they were taken into use.
        of_a: whether the tensor is A.
    """
    import torch

    age = float(state["step"]) - born
    first, second = group["betas"]
    moment = rows_in_use(state["exp_avg"], *directions, of_a=of_a) / (1 - first**age)
    square = rows_in_use(state["exp_avg_sq"], *directions, of_a=of_a) / (1 - second**age)
    step = moment / (square.sqrt() + group["eps"])
    with torch.no_grad():
        value = before * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * step
        rows_in_use(parameter, *directions, of_a=of_a).copy_(value)


def age_as(state: MutableMapping[str, Any], group: Mapping[str, Any], directions: tuple[int, int], *, born: float,
           of_a: bool) -> None:  # fmt: skip
    """Scale young directions' moments to what they would be, corrected, at the tensor's own age."""
    import torch

    total = float(state["step"])
    if total <= born:
        return
    with torch.no_grad():
        for name, beta in zip(("exp_avg", "exp_avg_sq"), group["betas"], strict=True):
            factor = (1 - beta**total) / (1 - beta ** (total - born))
            rows_in_use(state[name], *directions, of_a=of_a).mul_(factor)
