"""A tiny model, small tables and a run that is broken off, for the tests of training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file

from spafit.data.training import TrainData
from spafit.settings import TrainSettings
from spafit.strata import Outside, StrataConfig, Stratum
from spafit.stratum import LoraOptions

#: Three blocks: frozen, biases, LoRA with dropout and biases.
PLAN = StrataConfig(
    model_id="tiny",
    blocks={"encoder": 3},
    strata=(
        Stratum("encoder", (0, 1), "freeze"),
        Stratum("encoder", (1, 2), "bitfit"),
        Stratum("encoder", (2, 3), "lora+bitfit", lora=LoraOptions(rank=2, dropout=0.2)),
    ),
    outside=Outside(pooler="bitfit"),
)
QUICK = TrainSettings(
    epochs=2, batch_size=4, learning_rate=1e-2, max_length=16, prefix_cache="off", select_share=0.0, log_steps=2
)
_WORDS = ("the", "big", "old", "a", "sees", "runs", "and")


def frame(n: int, seed: int, *, pairs: bool = False, regression: bool = False, share: float = 0.5) -> pd.DataFrame:
    """Texts of different lengths that name a cat (0) or a dog (1); ``share`` of them a dog."""
    draw = np.random.default_rng(seed)
    labels = (np.arange(n) < round(share * n)).astype(int)
    draw.shuffle(labels)
    fillers = [" ".join(draw.choice(_WORDS, size=draw.integers(0, 7))) for _ in range(n)]
    texts = [f"{'dog' if label else 'cat'} {words}".strip() for label, words in zip(labels, fillers, strict=True)]
    table = pd.DataFrame({"text": texts, "label": labels.astype(float) if regression else labels, "idx": range(n)})
    if pairs:
        table.insert(1, "text2", [" ".join(draw.choice(_WORDS, size=3)) for _ in range(n)])
    return table


def task(
    n: int = 24, *, pairs: bool = False, regression: bool = False, share: float = 0.5, scored: int = 12
) -> TrainData:
    """A task of ``n`` training items and ``scored`` validation items."""
    options: dict[str, Any] = {"pairs": pairs, "regression": regression, "share": share}
    return TrainData(
        "pets",
        {"train": frame(n, 1, **options), "validation": frame(scored, 2, **options)},
        None if regression else ("cat", "dog"),
        ("pearson",) if regression else ("accuracy", "macro_f1"),
    )


def weights(folder: Path) -> dict[str, Any]:
    """All saved tensors of a seed's model folder."""
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def same(first: Path, second: Path) -> bool:
    """Whether two model folders hold the same tensors, to the bit."""
    one, two = weights(first), weights(second)
    return set(one) == set(two) and all(one[n].equal(two[n]) for n in one)


def is_key_bias(name: str) -> bool:
    """Whether a parameter's gradient is rounding alone, which AdamW divides by its own size.

    A key's bias adds the same to all scores of a query, and softmax takes that away.
    """
    return "attention.self.key." in name and name.endswith("bias")


class BrokenOff(BaseException):
    """Ends a process's work at once, as far as a test inside the process can."""


def breaking_off(monkeypatch: pytest.MonkeyPatch, step: int) -> Callable[[], None]:
    """Break training off in the middle of a step; call the result to let it run again."""
    from spafit.trainer import StratifiedTrainer

    original = StratifiedTrainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, *args, **kwargs)
        if self.state.global_step + 1 == step:
            raise BrokenOff
        return loss

    monkeypatch.setattr(StratifiedTrainer, "training_step", training_step)
    return lambda: monkeypatch.setattr(StratifiedTrainer, "training_step", original)
