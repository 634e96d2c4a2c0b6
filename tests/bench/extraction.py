"""Extraction of all layers and mean-pooled words against bare forward passes, on UD EWT dev + test with MiniLM."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench.table import Row, print_table
from tests.paths import SHARED

ROUNDS = 3


def ewt_texts() -> list[Any]:
    """The 4,078 sentences of UD EWT dev and test, with one span per word."""
    from probing.tasks.base import Text

    texts, words = [], []
    for split in ("dev", "test"):
        path = SHARED / "ud" / "UD_English-EWT" / f"en_ewt-ud-{split}.conllu"
        for line in path.read_text(encoding="utf-8").splitlines():
            fields = line.split("\t")
            if fields[0].isdigit():
                words.append(fields[1])
            elif not line and words:
                texts.append(Text.from_words(words))
                words = []
    return texts


def _bare(loaded: Any, batches: list[dict[str, Any]]) -> None:
    import torch

    with torch.inference_mode():
        for batch in batches:
            loaded.model(**batch)


def _natural(loaded: Any, texts: list[Any]) -> None:
    """What a plain loop does: batches of 32 in the order of the file, padded to the longest, states of every layer."""
    import torch

    with torch.inference_mode():
        for start in range(0, len(texts), 32):
            strings = [t.string for t in texts[start : start + 32]]
            inputs = loaded.tokenizer(
                strings, padding=True, truncation=True, max_length=loaded.max_length, return_tensors="pt"
            )
            loaded.model(**inputs, output_hidden_states=True)


def _extract(loaded: Any, texts: list[Any]) -> None:
    """The whole job from strings to finished shards on disk, nothing cached."""
    import probing.batching
    from probing.extraction import extract

    probing.batching._RECENT.clear()
    with tempfile.TemporaryDirectory() as folder:
        extract(loaded, texts, sentence_pooling=(), device="cpu", cache_dir=Path(folder))


def _seconds(act: Callable[..., None], *arguments: Any) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    act(*arguments)
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> int:
    """Print the table; non-zero when a target is missed."""
    import torch

    from probing.extraction import plan_extraction
    from spafit.models import load_model

    if not SHARED.is_dir():
        print("skipped: the shared real data (../shared/data) is not here")
        return 0
    loaded, texts = load_model(None), ewt_texts()
    with tempfile.TemporaryDirectory() as folder:
        plan = plan_extraction(loaded, texts, sentence_pooling=(), cache_dir=Path(folder))
    batches = plan.encoded_batches()
    _bare(loaded, batches[-3:])
    # Interleaved, so that both meet the same neighbours on the machine; medians of ratios within a round.
    rounds = []
    for _ in range(ROUNDS):
        rounds.append((_seconds(_bare, loaded, batches), _seconds(_extract, loaded, texts)))
    natural = _seconds(_natural, loaded, texts)
    bare = statistics.median(b[0] for b, _ in rounds)
    ours = statistics.median(e[0] for _, e in rounds)
    ratios = [b[0] / e[0] for b, e in rounds]
    cpu_ratios = [b[1] / e[1] for b, e in rounds]
    return print_table(
        f"extraction, MiniLM-L6, UD EWT dev + test ({len(texts)} sentences), {torch.get_num_threads()} threads",
        [
            Row(
                "throughput / bare length-sorted forward pass",
                statistics.median(ratios),
                0.9,
                ">=",
                f"bare {bare:.1f} s, extraction {ours:.1f} s (medians of {ROUNDS})",
            ),
            Row(
                "throughput / natural order, batches of 32",
                natural[0] / ours,
                3.5,
                ">=",
                f"natural order {natural[0]:.1f} s",
            ),
        ],
        notes=[
            f"the first ratio round by round: {', '.join(f'{r:.3f}' for r in ratios)}; "
            f"the same in CPU time: {', '.join(f'{r:.3f}' for r in cpu_ratios)}; "
            f"the second in CPU time: {natural[1] / statistics.median(e[1] for _, e in rounds):.2f}",
            f"{plan.texts} distinct texts, {plan.tokens} tokens, {plan.padded_tokens} with padding, "
            f"{plan.bytes_on_disk / 1e6:.0f} MB of states",
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
