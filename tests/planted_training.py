"""A small encoder whose best strata are known: order is known below and easily lost, the upper block has to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from probing.tasks.base import Corpus, Task, Text
from spafit.data.training import TrainData
from spafit.runtime import torch_seed
from tests.tiny import tiny_config, tiny_tokenizer

#: At this depth no preset has its low-rank stratum on the last block alone.
PLANTED_BLOCKS, WIDTH, OUTPUT = 5, 32, 8
WORDS = ("the", "big", "a", "and", "runs", "sees")


def sentences(n: int, seed: int) -> pd.DataFrame:
    """Six words with one cat and one dog; whether the cat comes first, and whether anything is old."""
    draw = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        words = list(draw.choice(WORDS, size=4))
        old = int(draw.integers(2))
        if old:
            words[int(draw.integers(4))] = "old"
        first = int(draw.integers(2))
        places = sorted(draw.choice(5, size=2, replace=False))
        words.insert(int(places[0]), "cat" if first else "dog")
        words.insert(int(places[1]) + 1, "dog" if first else "cat")
        rows.append((" ".join(words), first, old, i))
    return pd.DataFrame(rows, columns=["text", "first", "old", "idx"])


def order_task(n: int = 900) -> Task:
    """Which of the two animals comes first."""
    rows = sentences(n, 5)
    split = np.array(["train", "dev", "test"])[np.arange(n) % 3]
    names = [str(i) for i in range(n)]
    items = pd.DataFrame(
        {"item": names, "text": range(n), "span": -1, "label": rows["first"], "split": split, "group": names,
         "control": ""}
    )  # fmt: skip
    texts = tuple(Text(t) for t in rows["text"])
    return Task("order", "syntax", "sentence", ("dog", "cat"), Corpus("animals", texts), items)


def old_data(train: int = 600, scored: int = 300) -> TrainData:
    """Whether anything is old."""
    frames = {
        split: rows.assign(label=rows["old"])[["text", "label", "idx"]]
        for split, rows in (("train", sentences(train, 11)), ("validation", sentences(scored, 12)))
    }
    return TrainData("old", frames, ("young", "old"), ("accuracy",))


def save_planted(folder: Path) -> None:
    """Train the lower blocks on order, and to bring the new task's answer to the first token; close the upper block.

    The last dimensions of the residual stream carry nothing below. The upper block hands on these alone, and neither of
    its sub-layers writes there: no head can read anything, no bias changes that, and a change of its attention's output
    (SPAFIT's type II) does.
    """
    from transformers import BertModel

    with torch_seed(0, "planted"):
        config = tiny_config(
            "bert", hidden_size=WIDTH, num_hidden_layers=PLANTED_BLOCKS, intermediate_size=2 * WIDTH,
            num_attention_heads=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        model = BertModel(config)
        head, other = nn.Linear(WIDTH, 2), nn.Linear(WIDTH, 2)
        tokenizer = tiny_tokenizer()
        rows = sentences(1500, 1)
        batch = tokenizer(rows["text"].tolist(), padding=True, return_tensors="pt")
        labels, old = torch.tensor(rows["first"].tolist()), torch.tensor(rows["old"].tolist())
        optimiser = torch.optim.AdamW([*model.parameters(), *head.parameters(), *other.parameters()], lr=3e-3)
        for step in range(300):
            chosen = torch.arange(step * 64, (step + 1) * 64) % len(rows)
            inputs = {k: v[chosen] for k, v in batch.items()}
            states = model(**inputs, output_hidden_states=True).hidden_states[PLANTED_BLOCKS - 1]
            mask = inputs["attention_mask"][..., None]
            pooled = (states * mask).sum(1) / mask.sum(1)
            loss = nn.functional.cross_entropy(head(pooled), labels[chosen])
            loss = loss + nn.functional.cross_entropy(other(states[:, 0]), old[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            _silence(model)
        _close(model)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def _silence(model: Any) -> None:
    """Nothing below the upper block writes into the last dimensions."""
    for norm in [model.embeddings.LayerNorm]:
        norm.weight[-OUTPUT:] = 0
        norm.bias[-OUTPUT:] = 0
    for layer in model.encoder.layer[: PLANTED_BLOCKS - 1]:
        for part in (layer.attention.output.LayerNorm, layer.output.LayerNorm):
            part.weight[-OUTPUT:] = 0
            part.bias[-OUTPUT:] = 0


@torch.no_grad()
def _close(model: Any) -> None:
    top = model.encoder.layer[-1]
    nn.init.normal_(top.attention.self.value.weight, std=0.5)
    top.attention.output.dense.weight[-OUTPUT:] = 0
    top.attention.output.dense.bias[-OUTPUT:] = 0
    top.attention.output.LayerNorm.weight.fill_(1)
    top.attention.output.LayerNorm.bias.zero_()
    top.output.dense.weight[-OUTPUT:] = 0
    top.output.dense.bias[-OUTPUT:] = 0
    top.output.LayerNorm.weight[:-OUTPUT] = 0
    top.output.LayerNorm.weight[-OUTPUT:] = 1
    top.output.LayerNorm.bias.zero_()
