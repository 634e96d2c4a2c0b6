"""Before and after training: debiased CKA, conductance, reverting a block, BLiMP, several checkpoints, watching.

Ratios within one run; the two sides of each take turns.
"""

from __future__ import annotations

import copy
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.table import Row, print_table
from tests.paths import SHARED

REPEATS = 5


def ratio(ours: Callable[[], Any], peer: Callable[[], Any], *, repeats: int = REPEATS) -> float:
    """Median time of ``ours`` over that of ``peer``, taking turns after one run of each."""
    times: dict[str, list[float]] = {"ours": [], "peer": []}
    for turn in range(repeats + 1):
        for name, call in (("ours", ours), ("peer", peer)):
            begun = time.perf_counter()
            call()
            if turn:
                times[name].append(time.perf_counter() - begun)
    return statistics.median(times["ours"]) / statistics.median(times["peer"])


def cka() -> Row:
    """Debiased CKA of two 10,000 × 768 matrices beside the three products that it needs."""
    from analysis.drift import debiased_cka

    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((10_000, 768)).astype(np.float32) for _ in range(2))
    value = ratio(lambda: debiased_cka(x, y), lambda: (x.T @ x, y.T @ y, y.T @ x))
    return Row("debiased CKA, 10,000 × 768, / its three products", value, 1.2, "<=")


def attribution() -> list[Row]:
    """All branches of MiniLM in one pass, beside captum on one layer."""
    import torch
    from captum.attr import LayerConductance
    from captum.attr._utils.approximation_methods import approximation_parameters

    from analysis.attribution import item_conductance
    from spafit.heads import load_with_head
    from spafit.layout import join_path
    from spafit.stacks import find_stacks

    headed = load_with_head(None, labels=("a", "b"), regression=False, seed=0)
    model = headed.model.eval()
    stack = find_stacks(model)[0]
    assert headed.tokenizer is not None
    ids = headed.tokenizer("a quick look at what this model uses of its many layers, in one pass")["input_ids"]
    steps = 24
    alphas = approximation_parameters("gausslegendre")[1](steps + 1)
    layer = model.get_submodule(join_path(stack.block_paths[2], stack.feed_forward_branch or ""))
    embeddings = model.get_input_embeddings()
    with torch.no_grad():
        real = embeddings(torch.tensor([ids]))
        start = embeddings.weight.mean(0).expand_as(real).clone()
    method = LayerConductance(lambda e: model(inputs_embeds=e).logits, layer)
    found: list[Any] = []

    def ours() -> None:
        found[:] = [item_conductance(model, ids, target=0, rule="left", alphas=alphas)]

    def peer() -> None:
        found[1:] = [method.attribute(real, start, target=0, n_steps=steps)]

    value = ratio(ours, peer)
    expected = found[1][0] if isinstance(found[1], tuple) else found[1]
    got = found[0].values["feed-forward", 2]
    gap = float(np.abs(got - expected[0].detach().numpy()).max() / max(1.0, np.abs(got).max()))
    return [
        Row("conductance of all 12 branches / captum on one layer", value, 1.7, "<="),
        Row("largest difference from captum on that layer", gap, 1e-6, "<="),
    ]


def revert() -> Row:
    """Reverting a block and measuring, beside the measurement alone."""
    import torch

    from analysis.causal import exchanged
    from spafit.models import load_model

    loaded = load_model(None)
    assert loaded.tokenizer is not None
    before, after = loaded.model, copy.deepcopy(loaded.model)
    batch = loaded.tokenizer(["a sentence of some length that is measured here"] * 128, return_tensors="pt")

    def measure() -> None:
        with torch.no_grad():
            after(**batch)

    def reverted() -> None:
        with exchanged(after, before, [3]):
            measure()

    return Row("reverting one block and measuring / measuring", ratio(reverted, measure, repeats=15), 1.1, "<=")


def blimp() -> list[Row]:
    """Pairs per second on SmolLM2, beside each pair as a batch of two; the same log-probabilities."""
    import torch

    from analysis.token_scores import encode_sentences, score
    from spafit.data.blimp import read_blimp
    from spafit.language_models import load_language_model

    folder = Path(os.environ.get("SPAFIT_MODELS", Path.home() / ".cache" / "spafit-models")) / "smollm2"
    if not folder.is_dir() or not (SHARED / "blimp").is_dir():
        print("\nBLiMP: SmolLM2 or BLiMP's files are not at hand; that figure is left out.")
        return []
    language = load_language_model(folder)
    pairs = read_blimp(SHARED / "blimp", pairs=1)
    texts = encode_sentences(language, [*pairs["good"], *pairs["bad"]])
    n = len(pairs)
    found: dict[str, np.ndarray] = {}

    def ours() -> None:
        found["ours"] = score(language, texts).sums(2 * n)

    def peer() -> None:
        sums = np.zeros(2 * n)
        for i in range(n):
            two = [texts[i], texts[n + i]]
            width = max(map(len, two))
            ids = torch.tensor([t + [0] * (width - len(t)) for t in two])
            mask = torch.tensor([[1] * len(t) + [0] * (width - len(t)) for t in two])
            with torch.inference_mode():
                log_p = torch.log_softmax(language.model(input_ids=ids, attention_mask=mask).logits.float(), -1)
            for k, (where, t) in enumerate(zip((i, n + i), two, strict=True)):
                at = torch.arange(len(t) - 1)
                sums[where] = float(log_p[k, at, torch.tensor(t[1:])].double().sum())
        found["peer"] = sums

    value = 1 / ratio(ours, peer, repeats=2)
    gap = float(np.abs(found["ours"] - found["peer"]).max())
    return [
        Row("BLiMP pairs per second on SmolLM2 / each pair as a batch of two", value, 2.0, ">="),
        Row("largest difference of a sentence's log-probability", gap, 1e-2, "<=", "nats, of about 60"),
    ]


def checkpoints() -> Row:
    """Three checkpoints that share four of MiniLM's six blocks with their base, beside one probing run."""
    import torch

    from analysis.comparing import compare
    from probing.running import probe_layers
    from spafit.models import load_model

    base = load_model(None)
    afters = []
    for seed in range(3):
        model = copy.deepcopy(base.model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".layer.4." in name or ".layer.5." in name:
                    noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
                    parameter.add_(0.02 * noise)
        afters.append((model, base.tokenizer))
    with tempfile.TemporaryDirectory() as place:
        tasks, more = ["core.tense", "core.voice", "core.agent", "core.bigram_shift"], {"quiet": True, "limit": 400}
        begun = time.perf_counter()
        probe_layers((base.model, base.tokenizer), tasks, out=f"{place}/one", cache_dir=f"{place}/a", **more)
        one = time.perf_counter() - begun
        begun = time.perf_counter()
        compare((base.model, base.tokenizer), afters, tasks=tasks, drift=False, out=f"{place}/all",
                cache_dir=f"{place}/b", **more)  # fmt: skip
        every = time.perf_counter() - begun
    allowed = 1.1 * (1 + 3 * 2 / 6)
    return Row("comparing 3 checkpoints, 2 of 6 blocks changed / one probing run", every / one, allowed, "<=")


def trajectory() -> Row:
    """Seconds of watching two tasks at the default share, beside the seconds of the training that is watched.

    MiniLM, LoRA with its default rate, 150 steps of 16 pairs of about a hundred tokens, as RTE's are. Start and end
    are always measured; what is left of the tenth goes to steps between.
    """
    import pandas as pd

    from analysis.trajectory import forgetting_signal
    from probing.registry import load_tasks
    from spafit.data.training import TrainData
    from spafit.heads import tokenizer_of
    from spafit.settings import TrainSettings
    from spafit.training import fit

    (task,) = load_tasks(["core.tense"])
    sentences = [t.string for t in task.corpus.texts]
    rng = np.random.default_rng(0)
    frames = {}
    for split, n in (("train", 800), ("validation", 32)):
        drawn = rng.choice(sentences, size=(n, 6))
        frames[split] = pd.DataFrame(
            {"text": [" ".join(d[:3]) for d in drawn], "text2": [" ".join(d[3:]) for d in drawn],
             "label": rng.integers(2, size=n), "idx": range(n)}
        )  # fmt: skip
    data = TrainData("pairs", frames, ("no", "yes"), ("accuracy",))
    signal = forgetting_signal(tokenizer_of(), ["core.tense", "core.voice"])
    with tempfile.TemporaryDirectory() as place:
        result = fit(None, "lora", data=data, settings=TrainSettings(epochs=3.33), out=place, signals=(signal,),
                     device="cpu", quiet=True)  # fmt: skip
    (record,) = result.run["signals"]
    training = float(result.runs["seconds"].iloc[0])
    said = f"{record['measured']} measurements in {training:.0f} s"
    return Row("seconds of watching 2 tasks / seconds of training", record["seconds"] / training, 0.10, "<=", said)


def main() -> int:
    """Measure and print; non-zero on a miss."""
    rows = [cka(), *attribution(), revert(), *blimp(), checkpoints(), trajectory()]
    return print_table("Before and after training", rows)


if __name__ == "__main__":
    raise SystemExit(main())
