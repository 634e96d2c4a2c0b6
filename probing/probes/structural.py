"""The structural probe: a linear map under which squared distances are tree distances, and squared lengths depths.

For the words of a sentence with states h (Hewitt & Manning 2019), the distance probe predicts the number of edges
between words i and j as ‖B(h_i − h_j)‖², the depth probe the depth of word i as ‖Bh_i‖², with B of k rows. The loss of
a sentence of n words is the sum of absolute errors over its n² pairs divided by n², or over its words divided by n; the
loss of a split is the mean over its sentences.

Columns are rescaled to unit mean square for training and the scale is folded into B afterwards, so the family of probes
is that of raw states. The distance probe sees states less their sentence's mean, which changes no distance (columns
that vary within no sentence have weight 0); the depth probe, which is not indifferent to a shift, sees them as they
are.

Adam minimises the loss of batches of shuffled sentences of similar length. After every pass (or a few, where a pass is
short) the loss on dev is taken; a probe that has no better one goes back to its best weights with a tenth of the step,
and stops when the smallest step brings nothing. All hidden states of a call start from the same weights and see the
same batches, drawn from the seed alone: a probe's numbers depend on which others are in the call by rounding only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from probing.probes.standardise import standardised_rows
from probing.trees import Tree, length_groups
from spafit.errors import NumericalError, UsageError
from spafit.runtime import generator

if TYPE_CHECKING:
    from torch import Tensor

Target = Literal["distance", "depth"]

#: Rank of B; Hewitt & Manning found no gain beyond 64 dimensions.
RANK = 64
#: Sentences per step, and batches that are cut from sentences sorted by length.
BATCH, POOL = 20, 50
#: Size of a step at first, as a share of the standard deviation of the first weights; then a tenth of it, and so on.
STEP, STEP_SIZES = 0.1, 4
#: Steps between looks at dev, at least; looks without a gain before the step shrinks; looks at most.
LOOK_STEPS, PATIENCE, MOST_LOOKS = 20, 2, 200
#: A gain on dev below this share of the loss does not count as one.
GAIN = 1e-4
#: Adam's decay rates of the mean and the mean square of the gradient, and what is added to its root.
BETAS, EPSILON = (0.9, 0.999), 1e-8
#: A column whose root mean square is below this share of its largest value holds rounding alone.
ROUNDING = 1e-6
#: Words that are predicted at a time.
SCORED_WORDS = 4096
#: Memory that the features of hidden states fitted together may take, in bytes; copying them takes it twice.
CHUNK_BYTES = 600_000_000


@dataclass(frozen=True)
class Projections:
    """The maps of one target at H hidden states.

    Attributes:
        weight: float32, (H, width, k): Bᵀ on states in their own units.
        dev_loss: float64, (H,): lowest mean loss on dev, that of these weights.
        looks: times dev was looked at, (H,).
        converged: bool, (H,): whether the probe stopped by itself.
    """

    weight: np.ndarray = field(repr=False)
    dev_loss: np.ndarray
    looks: np.ndarray
    converged: np.ndarray

    def project(self, features: np.ndarray, b: int) -> np.ndarray:
        """Bh for the words of one hidden state, float32 (words, width) -> (words, k)."""
        return features @ self.weight[b]


@dataclass(frozen=True)
class StructuralProbeFit:
    """Distance and depth probes of H hidden states, trained on the same sentences.

    Do not trust high scores without a control: a probe of high rank also fits to words what it knows of them from
    training; compare with hidden state 0, a random-weight encoder, and the linear chain.
    Nor small differences: on 1,500 sentences (UD EWT, MiniLM), first steps of 0.03 and 0.1 with a patience of 1 and 2
    moved distance losses on dev by up to 2 % and UUAS by up to 0.013, but depth losses by up to 6 % and NSpr. by up to
    0.07, the most at the last hidden state. Refit with other seeds.

    Attributes:
        distance: the maps for tree distances.
        depth: the maps for depths.
        n_sentences: training sentences.
    """

    distance: Projections
    depth: Projections
    n_sentences: int

    def distances(self, states: np.ndarray | Tensor, lengths: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Predicted numbers of edges between words.

        Args:
            states: (H, words, width), the words of all sentences one after the other.
            lengths: words of each sentence.

        Returns:
            For each sentence of n words float32 (H, n, n), symmetric, with a zero diagonal.

        Raises:
            UsageError: shapes that do not fit the probes or the lengths.
            NumericalError: states that are not finite.
        """
        out = _empty(states, lengths, self.distance, square=True)
        starts = _starts(lengths)
        for b in range(len(states)):
            projected = self.distance.project(_features(states[b], lengths, "distance", b), b)
            for n, where in length_groups(lengths):
                at_once = max(1, SCORED_WORDS // n)
                for first in range(0, len(where), at_once):
                    part = where[first : first + at_once]
                    found = _squared_distances(projected[starts[part, None] + np.arange(n)])
                    for i, position in enumerate(part):
                        out[position][b] = found[i]
        return out

    def depths(self, states: np.ndarray | Tensor, lengths: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Predicted depths of words, for each sentence float32 (H, n); arguments and errors as :meth:`distances`."""
        out = _empty(states, lengths, self.depth, square=False)
        ends = _starts(lengths)[1:]
        for b in range(len(states)):
            lengths_squared = np.square(self.depth.project(_features(states[b], lengths, "depth", b), b)).sum(1)
            for position, found in enumerate(np.split(lengths_squared, ends)):
                out[position][b] = found
        return out

    def arrays(self) -> dict[str, np.ndarray]:
        """What is worth saving: ``distance_weight`` and ``depth_weight``, both float32 (H, width, k)."""
        return {"distance_weight": self.distance.weight, "depth_weight": self.depth.weight}


def fit_structural_probes(
    x_train: np.ndarray | Tensor,
    trees: Sequence[Tree],
    x_dev: np.ndarray | Tensor,
    trees_dev: Sequence[Tree],
    *,
    rank: int = RANK,
    seed: int = 0,
    device: str = "cpu",
) -> StructuralProbeFit:
    """Fit a distance and a depth probe at every hidden state, each stopped by its own dev loss.

    Args:
        x_train: training states, (H, words, width): the words of all sentences one after the other.
        trees: trees of the training sentences, in that order.
        x_dev: dev states, (H, dev words, width).
        trees_dev: trees of the dev sentences.
        rank: rows k of B, at most the width.
        seed: draws the first weights and the order of the sentences.
        device: torch device of the products.

    Raises:
        UsageError: a rank or shapes that do not fit, or no sentence of two words in training or dev.
        NumericalError: states that are not finite; names the hidden state's position in the call.
    """
    _check(x_train, trees, "training", rank)
    _check(x_dev, trees_dev, "dev", rank)
    if (len(x_dev), x_dev.shape[2]) != (len(x_train), x_train.shape[2]):
        raise UsageError(
            f"Training states have shape {tuple(x_train.shape)} and dev states {tuple(x_dev.shape)}; both need the "
            "same hidden states and width."
        )
    words = x_train.shape[1] + x_dev.shape[1]
    step = max(1, CHUNK_BYTES // (4 * words * x_train.shape[2]))
    targets: tuple[Target, ...] = ("distance", "depth")
    found: dict[Target, list[Projections]] = {target: [] for target in targets}
    for target in targets:
        gold, gold_dev = (_Gold(t, target, device) for t in (trees, trees_dev))
        for start in range(0, len(x_train), step):
            part = slice(start, start + step)
            fitted = _fit(
                x_train[part], gold, x_dev[part], gold_dev, target, start=start, rank=rank, seed=seed, device=device
            )
            found[target].append(fitted)
    return StructuralProbeFit(_joined(found["distance"]), _joined(found["depth"]), len(trees))


def _check(x: np.ndarray | Tensor, trees: Sequence[Tree], what: str, rank: int) -> None:
    words = sum(map(len, trees))
    if x.ndim != 3 or 0 in x.shape or x.shape[1] != words:
        raise UsageError(
            f"The {what} states have shape {tuple(x.shape)} and the {what} trees {words} word(s); states must be "
            "(hidden states, words, width), one row per word of the trees."
        )
    if all(len(tree) < 2 for tree in trees):
        raise UsageError(f"No {what} sentence has two words, so there are no distances to learn. Give longer ones.")
    if not 1 <= rank <= x.shape[2]:
        raise UsageError(f"rank is {rank}; allowed are 1 to {x.shape[2]}, the width of the states.")


def _starts(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Position of each sentence's first word."""
    return np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)


def _features(x: np.ndarray | Tensor, lengths: Sequence[int] | np.ndarray, target: Target, b: int) -> np.ndarray:
    """States of one hidden state (words, width) in float32; for distances less the mean of their sentence.

    Raises:
        NumericalError: states that are not finite; ``b`` is the hidden state's position, for the message.
    """
    import torch

    zero, one = np.zeros(x.shape[1], dtype=np.float32), np.ones(x.shape[1], dtype=np.float32)
    found = torch.cat([rows for _, rows in standardised_rows(x, zero, one, b)]).numpy()
    return found if target == "depth" else _less_means(found, lengths)


def _less_means(features: np.ndarray, lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Features less the mean of their sentence."""
    means = np.add.reduceat(features, _starts(lengths)) / np.asarray(lengths)[:, None]
    return features - np.repeat(means.astype(np.float32), lengths, axis=0)


def _scale(features: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """Root mean square of each column of the features, (width,); infinite where it is nothing but rounding.

    ``largest`` holds the largest absolute value of each column of the raw states.
    """
    found = np.sqrt(np.einsum("nw,nw->w", features, features, dtype=np.float64) / len(features))
    return np.where(found > ROUNDING * largest, found, np.inf).astype(np.float32)


def _empty(
    states: np.ndarray | Tensor, lengths: Sequence[int] | np.ndarray, maps: Projections, *, square: bool
) -> list[np.ndarray]:
    hidden, width, _ = maps.weight.shape
    words = int(np.sum(lengths))
    if min(lengths) < 1:
        raise UsageError(f"A sentence has {min(lengths)} words; every length must be at least 1.")
    if states.ndim != 3 or tuple(states.shape) != (hidden, words, width):
        raise UsageError(
            f"The probes were fitted on {hidden} hidden state(s) of width {width} and the sentences have {words} "
            f"word(s); states have shape {tuple(states.shape)}, and ({hidden}, {words}, {width}) is needed."
        )
    return [np.empty((hidden, n, n) if square else (hidden, n), dtype=np.float32) for n in map(int, lengths)]


def _squared_distances(projected: np.ndarray) -> np.ndarray:
    """Squared distances between the rows of each matrix, (…, n, k) -> (…, n, n)."""
    inner = projected @ projected.swapaxes(-1, -2)
    squares = np.diagonal(inner, axis1=-2, axis2=-1)
    found = squares[..., :, None] + squares[..., None, :] - (inner + inner.swapaxes(-1, -2))
    found[..., np.arange(inner.shape[-1]), np.arange(inner.shape[-1])] = 0
    return found.clip(0)


def _joined(parts: Sequence[Projections]) -> Projections:
    return Projections(
        *(np.concatenate([getattr(p, name) for p in parts]) for name in ("weight", "dev_loss", "looks", "converged"))
    )


class _Gold:
    """Targets of all sentences in one row, from which padded batches are gathered."""

    def __init__(self, trees: Sequence[Tree], target: Target, device: str):
        import torch

        self.target = target
        self.lengths = np.array([len(tree) for tree in trees], dtype=np.int64)
        self.starts = _starts(self.lengths)
        self.offsets = _starts(self.lengths**2)
        values = [tree.distances.ravel() if target == "distance" else tree.depths for tree in trees]
        self.values = torch.from_numpy(np.concatenate(values).astype(np.float32)).to(device)

    def batch(self, sentences: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of the words, (S, T), the targets, and the weight of each in the sum of losses, both (S, T[, T])."""
        import torch

        n = self.lengths[sentences]
        word = np.arange(n.max())
        kept = word < n[:, None]
        place = np.minimum(word, n[:, None] - 1)  # padding repeats the last word, with weight 0
        rows = self.starts[sentences, None] + place
        weight = kept / n[:, None]
        if self.target == "depth":
            wanted = rows
        else:
            wanted = self.offsets[sentences, None, None] + place[:, :, None] * n[:, None, None] + place[:, None]
            weight = weight[:, :, None] * weight[:, None]
        device = self.values.device
        chosen = torch.from_numpy(wanted).to(device)
        return torch.from_numpy(rows).to(device), self.values[chosen], torch.from_numpy(weight).float().to(device)

    def shuffled(self, random: np.random.Generator) -> list[np.ndarray]:
        """Batches of one pass: random sentences, those of a batch of similar length, in random order."""
        order = random.permutation(len(self.lengths))
        batches = []
        for start in range(0, len(order), BATCH * POOL):
            pool = order[start : start + BATCH * POOL]
            pool = pool[np.argsort(self.lengths[pool], kind="stable")]
            batches += [pool[i : i + BATCH] for i in range(0, len(pool), BATCH)]
        return [batches[i] for i in random.permutation(len(batches))]

    def in_order(self) -> list[np.ndarray]:
        """Every sentence once, the shortest first, in batches of about :data:`SCORED_WORDS` words."""
        order = np.argsort(self.lengths, kind="stable")
        batches, first = [], 0
        for i in range(1, len(order) + 1):
            if i == len(order) or (i + 1 - first) * self.lengths[order[i]] > SCORED_WORDS:
                batches.append(order[first:i])
                first = i
        return batches


def _fit(
    x_train: np.ndarray | Tensor,
    gold: _Gold,
    x_dev: np.ndarray | Tensor,
    gold_dev: _Gold,
    target: Target,
    *,
    start: int,
    rank: int,
    seed: int,
    device: str,
) -> Projections:
    """Fit one target at some hidden states; ``start`` is the position of the first, for messages."""
    import torch

    train, dev, scales = [], [], []
    for b in range(len(x_train)):
        raw = _features(x_train[b], gold.lengths, "depth", start + b)  # as they are
        largest = np.abs(raw).max(0)
        found = raw if target == "depth" else _less_means(raw, gold.lengths)
        scales.append(_scale(found, largest))
        train.append(torch.from_numpy(found / scales[b]))
        dev.append(torch.from_numpy(_features(x_dev[b], gold_dev.lengths, target, start + b) / scales[b]))
    trainer = _Trainer(gold, gold_dev, len(x_train), x_train.shape[2], rank, seed=seed, device=device)
    weight, loss, looks = trainer.run(torch.stack(train).to(device), torch.stack(dev).to(device))
    if not np.isfinite(loss).all():
        b = start + int(np.flatnonzero(~np.isfinite(loss))[0])
        raise NumericalError(f"The {target} probe of hidden state {b} of the call found no finite dev loss.")
    return Projections(weight / np.stack(scales)[..., None], loss, looks, trainer.stopped.numpy())


class _Trainer:
    """Training of one target at all hidden states, each stopped by its own dev loss."""

    def __init__(self, gold: _Gold, gold_dev: _Gold, hidden: int, width: int, rank: int, *, seed: int, device: str):
        import torch

        self.gold, self.gold_dev = gold, gold_dev
        self.random = generator(seed, "structural batches", gold.target, len(gold.lengths))
        deviation = (rank * width) ** -0.5  # squared lengths of features with unit mean square are then about 1
        first = generator(seed, "structural weights", gold.target, width, rank).uniform(-1, 1, (width, rank))
        drawn = torch.from_numpy((first * 3**0.5 * deviation).astype(np.float32))
        self.weight = drawn.expand(hidden, -1, -1).contiguous().to(device)
        self.moments = [torch.zeros_like(self.weight), torch.zeros_like(self.weight)]
        self.steps = torch.zeros((hidden, 1, 1), device=device)
        self.sizes = torch.full((hidden, 1, 1), STEP * deviation, device=device)
        self.stopped = torch.zeros(hidden, dtype=torch.bool)

    def run(self, train: Tensor, dev: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Best weights (H, width, k), their dev losses and the number of looks, both (H,)."""
        import torch

        hidden = len(train)
        best = self.weight.clone()
        lowest = self._dev_losses(dev)
        idle, shrunk = torch.zeros(hidden, dtype=torch.int64), torch.zeros(hidden, dtype=torch.int64)
        looks, live = torch.zeros(hidden, dtype=torch.int64), torch.arange(hidden)
        since = 0
        while len(live) and int(looks.max()) < MOST_LOOKS:
            for sentences in self.gold.shuffled(self.random):
                self._step(train, sentences)
                since += 1
            if since < LOOK_STEPS:
                continue
            since = 0
            losses, before = self._dev_losses(dev), lowest[live]
            better = losses < before
            idle[live] = torch.where(losses < before * (1 - GAIN), 0, idle[live] + 1)
            lowest[live] = torch.where(better, losses, before)
            best[live[better].to(best.device)] = self.weight[better.to(best.device)]
            looks[live] += 1
            back = (idle[live] >= PATIENCE).nonzero().squeeze(1)
            if len(back):
                chosen, here = live[back], back.to(self.weight.device)
                shrunk[chosen] += 1
                idle[chosen] = 0
                self._go_back(here, best[chosen.to(best.device)])
                self.stopped[live] = shrunk[live] >= STEP_SIZES
                left = (~self.stopped[live]).nonzero().squeeze(1)
                if len(left) < len(live):
                    live, rows = live[left], left.to(train.device)
                    train, dev = train[rows], dev[rows]
                    self.weight, self.steps, self.sizes = self.weight[rows], self.steps[rows], self.sizes[rows]
                    self.moments = [moment[rows] for moment in self.moments]
        return best.cpu().numpy(), lowest.numpy(), looks.numpy()

    def _go_back(self, rows: Tensor, best: Tensor) -> None:
        """Start these hidden states again from their best weights with a tenth of the step."""
        self.weight[rows] = best
        self.sizes[rows] *= 0.1
        self.steps[rows] = 0
        for moment in self.moments:
            moment[rows] = 0

    def _predicted(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Projected words (H · S, T, k) of words (H, S, T, width), and what they predict, (H, S, T[, T])."""
        hidden, sentences, words, width = x.shape
        projected = (x.reshape(hidden, -1, width) @ self.weight).view(hidden * sentences, words, -1)
        squares = projected.square().sum(2)
        if self.gold.target == "depth":
            return projected, squares.view(hidden, sentences, words)
        found = squares[:, :, None] + squares[:, None] - 2 * projected @ projected.transpose(1, 2)
        return projected, found.view(hidden, sentences, words, words)

    def _step(self, train: Tensor, sentences: np.ndarray) -> None:
        """One step on a batch: the mean loss of each hidden state, its gradient, and Adam (Kingma & Ba 2015)."""
        rows, wanted, weight = self.gold.batch(sentences)
        x = train[:, rows]
        projected, predicted = self._predicted(x)
        residual = (predicted - wanted).sign_().mul_(weight / len(sentences))
        if self.gold.target == "depth":
            back = 2 * residual.view(*projected.shape[:2], 1) * projected
        else:  # pairs are counted in both orders
            flat = residual.view(len(projected), *residual.shape[2:])
            back = 4 * (flat.sum(2, keepdim=True) * projected - flat @ projected)
        hidden, width = len(x), x.shape[3]
        gradient = x.view(hidden, -1, width).transpose(1, 2) @ back.view(hidden, -1, back.shape[2])
        self.steps += 1
        mean, square = self.moments
        mean.lerp_(gradient, 1 - BETAS[0])
        square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        root = (1 - BETAS[1] ** self.steps).sqrt()
        size = self.sizes * root / (1 - BETAS[0] ** self.steps)
        self.weight -= size * mean / (square.sqrt() + EPSILON * root)

    def _dev_losses(self, dev: Tensor) -> Tensor:
        """Mean loss of each hidden state on dev, float64, (hidden,)."""
        import torch

        total = torch.zeros(len(dev), dtype=torch.float64)
        for sentences in self.gold_dev.in_order():
            rows, wanted, weight = self.gold_dev.batch(sentences)
            errors = (self._predicted(dev[:, rows])[1] - wanted).abs_() * weight
            total += errors.flatten(1).sum(1, dtype=torch.float64).cpu()
        return total / len(self.gold_dev.lengths)
