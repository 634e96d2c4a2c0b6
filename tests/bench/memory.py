"""Peak memory while probing 100,000 sentences with a bert-large-sized random model: slices, and what makes them grow.

Running 100,000 sentences through 24 blocks of width 1024 takes hours on two cores. What memory depends on is measured
apart instead, each in a process of its own: (1) the large model on two slices, both longer than the store's two
write buffers, with every word's state kept; (2) all 100,000 sentences, against 20,000, through a small model, which
shows what grows with the number of texts (ids, offsets, rows); (3) the probe fit on arrays of the full size. The
figure is the larger phase: (1) + growth per text from (2) times the missing texts; or (3).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.bench.table import Row, print_table

CORPUS = 100_000
WIDTH, BLOCKS = 1024, 24


def sentences(count: int, tokenizer: Any) -> list[Any]:
    """Sentences of 12 to 28 words from the tokenizer's own vocabulary, a span per word."""
    import numpy as np

    from probing.tasks.base import Text

    words = sorted(w for w in tokenizer.get_vocab() if w.isalpha() and len(w) > 2)
    generator = np.random.default_rng(0)
    return [
        Text.from_words([words[i] for i in generator.integers(0, len(words), generator.integers(12, 29))])
        for _ in range(count)
    ]


def _memory(field: str) -> float:
    """Resident memory of this process in MB: now (``VmRSS``) or at its peak (``VmHWM``)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {field}")


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure_extraction(count: int, *, width: int, blocks: int) -> dict[str, float]:
    """Peak beyond the loaded model while ``count`` sentences are extracted and all words of one state are read."""
    from transformers import BertConfig, BertModel

    from probing.extraction import extract
    from spafit.models import load_model

    tokenizer = load_model(None).tokenizer
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=max(width // 64, 1),
        intermediate_size=4 * width,
    )
    loaded = load_model((BertModel(config), tokenizer))
    base = _memory("VmRSS")
    _forget_peak()
    texts = sentences(count, tokenizer)
    given = _memory("VmRSS") - base
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        store = extract(loaded, texts, device="cpu", cache_dir=Path(folder))
        seconds = time.perf_counter() - begun
        extracted = _memory("VmHWM") - base
        store.sentences("mean", hidden=blocks)
        for start in range(0, len(store.word_valid), 40_000):
            store.words("mean", hidden=blocks, rows=range(start, min(start + 40_000, len(store.word_valid))))
        return {"peak": _memory("VmHWM") - base, "extracted": extracted, "texts": given, "seconds": seconds}


def measure_fit() -> dict[str, float]:
    """Peak while one sentence task over the whole corpus is fitted at states of the large model's width."""
    import numpy as np
    import pandas as pd

    from probing.fitting import ProbeSettings, fit_task
    from probing.tasks.base import Corpus, Task, Text

    generator = np.random.default_rng(0)
    split = np.repeat(["train", "dev", "test"], [70_000, 10_000, 20_000])
    label = generator.integers(0, 2, CORPUS)
    number = np.arange(CORPUS)
    items = pd.DataFrame(
        {"item": number.astype(str), "text": number, "span": -1, "label": label, "split": split}
        | {"group": number.astype(str), "control": ""}
    )
    corpus = Corpus("synthetic", tuple(Text(f"s{i}") for i in number))
    task = Task("synthetic.label", "other", "sentence", ("a", "b"), corpus, items)

    def states(hidden: int, rows: np.ndarray) -> np.ndarray:
        x = np.random.default_rng(hidden).standard_normal((len(rows), WIDTH), dtype=np.float32)
        x[:, 0] += label[rows]
        return x

    base = _memory("VmRSS")
    _forget_peak()
    begun = time.perf_counter()
    fit_task(task, ProbeSettings(seeds=(0,)), hidden=(0, 1, 2), states=states, encoders={"random-encoder": {0: states}})
    return {"peak": _memory("VmHWM") - base, "seconds": time.perf_counter() - begun}


def _in_a_process(call: str) -> dict[str, float]:
    code = f"import json; from tests.bench import memory; print(json.dumps(memory.{call}))"
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    """Print the table; non-zero when a target is missed."""
    if not Path("/proc/self/clear_refs").exists():
        print("skipped: peak memory is read from /proc, which this system does not have")
        return 0
    slices = (200, 400)
    large = [_in_a_process(f"measure_extraction({n}, width={WIDTH}, blocks={BLOCKS})") for n in slices]
    counts = (20_000, CORPUS)
    small = [_in_a_process(f"measure_extraction({n}, width=64, blocks=2)") for n in counts]
    fit = _in_a_process("measure_fit()")

    def growth(pair: list[dict[str, float]], sizes: tuple[int, int]) -> float:
        return max((pair[1]["peak"] - pair[0]["peak"]) / (sizes[1] - sizes[0]), 0.0)

    per_text = growth(small, counts)
    extraction = large[1]["peak"] + per_text * (CORPUS - slices[1])
    return print_table(
        f"memory beyond the model, {CORPUS:,} sentences, random model {BLOCKS} x {WIDTH}",
        [
            Row("extraction, all words and sentences, GB", extraction / 1024, 4.0, "<=", "slice + growth per text"),
            Row("fitting a sentence task, GB", fit["peak"] / 1024, 4.0, "<=", f"{fit['seconds']:.0f} s"),
            Row(
                "large model, longer slice / shorter slice",
                large[1]["peak"] / large[0]["peak"],
                1.15,
                "<=",
                f"{slices[0]}: {large[0]['peak']:.0f} MB, {slices[1]}: {large[1]['peak']:.0f} MB",
            ),
        ],
        notes=[
            f"growth with the corpus: {1024 * per_text:.2f} kB per sentence, the given texts included "
            f"(small model, {counts[0]:,}: {small[0]['peak']:.0f} MB, {counts[1]:,}: {small[1]['peak']:.0f} MB, of "
            f"which the texts themselves {small[1]['texts']:.0f} MB)",
            "seconds: " + ", ".join(f"{m['seconds']:.0f}" for m in (*large, *small, fit)),
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
