"""Training steps of stratified plans against full fine-tuning and stock LoRA, beside what arithmetic allows.

A random BERT of 24 blocks, width 512, sequences of 128, rank 64. Each variant runs in a process of its own, which takes
part in rounds of steps, so that all see the same machine; peak memory is that process's. A step is forward pass,
backward pass and AdamW. The ideal is `spafit.costs.step_cost`: products counted, low-rank ones too.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench.table import Row, print_table

BLOCKS, WIDTH, LENGTH, BATCH, RANK = 24, 512, 128, 4, 64
ROUNDS, STEPS = 5, 2
#: name: (plan, prefix cache)
VARIANTS = {
    "full": ("full", False),
    "stock LoRA": ("stock", False),
    "SPAFIT-4-9-I": ("spafit-4-9-I", False),
    "SPAFIT-4-9-I, cache": ("spafit-4-9-I", True),
    "SPAFIT-15-19-I, cache": ("spafit-15-19-I", True),
}


def _model() -> Any:
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=1000, hidden_size=WIDTH, num_hidden_layers=BLOCKS, num_attention_heads=8,
            intermediate_size=4 * WIDTH,
        )
    )  # fmt: skip


def _stepper(name: str, folder: Path) -> tuple[Callable[[], None], float]:
    """A function that does one step, and the ideal cost of it; full fine-tuning is 3."""
    import torch
    from peft import LoraConfig, get_peft_model

    from spafit.adapt import apply_strata, plan_for
    from spafit.batches import EncodedTexts
    from spafit.costs import step_cost
    from spafit.prefix import PrefixCache
    from spafit.trainer import set_training_modes

    plan, cached = VARIANTS[name]
    model = _model()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 1000, (BATCH * 4, LENGTH), generator=generator)
    labels = torch.randint(0, 2, (BATCH * 4,), generator=generator)
    cache, stratified, ideal = None, None, 3.0
    if plan == "stock":
        config = LoraConfig(
            r=RANK, lora_alpha=RANK, target_modules=["query", "key", "value"], modules_to_save=["classifier"]
        )
        trained = get_peft_model(model, config)
        ideal = step_cost(_model(), apply_strata(_model(), plan_for(_model(), "lora")).plan)
    else:
        stratified = apply_strata(model, plan_for(model, plan))
        trained = stratified.model
        ideal = step_cost(trained, stratified.plan, cached_prefix=cached)
    if cached:
        assert stratified is not None
        items = tuple({"input_ids": row.tolist(), "attention_mask": [1] * LENGTH} for row in ids)

        def collate(chosen: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            return {k: torch.tensor([c[k] for c in chosen]) for k in ("input_ids", "attention_mask", "index")}

        cache = PrefixCache.build(
            stratified, EncodedTexts(items, None, 0), collate, folder / name.replace(" ", "-"), device="cpu"
        )
    optimiser = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-5)
    trained.train()
    turn = 0

    def step() -> None:
        nonlocal turn
        rows = torch.arange(BATCH) + BATCH * (turn % 4)
        turn += 1
        mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
        inputs = {"input_ids": ids[rows], "attention_mask": mask, "labels": labels[rows]}
        if stratified is not None:
            set_training_modes(stratified)
        if cache is not None:
            with cache.attached(rows, mask):
                loss = trained(**inputs).loss
        else:
            loss = trained(**inputs).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    return step, ideal


def _serve(name: str, folder: Path) -> None:
    """One variant: steps when told to, until stdin ends; answers with seconds; last the peak memory in bytes."""
    import resource

    step, ideal = _stepper(name, folder)
    step()
    print(json.dumps({"ideal": ideal}), flush=True)
    for _ in sys.stdin:
        begun = time.perf_counter()
        for _ in range(STEPS):
            step()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": (time.perf_counter() - begun) / STEPS, "peak": peak}), flush=True)


def _apply_seconds() -> float:
    """Seconds that applying a preset to a bert-large-sized model takes beyond having it."""
    from transformers import BertConfig, BertForSequenceClassification

    from spafit.adapt import apply_strata, plan_for

    model = BertForSequenceClassification(
        BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    )
    apply_strata(_model(), plan_for(_model(), "spafit-4-9-I"))  # imports PEFT
    begun = time.perf_counter()
    apply_strata(model, plan_for(model, "spafit-4-9-I"))
    return time.perf_counter() - begun


def _dry_run_seconds(folder: Path) -> float:
    """Seconds of ``spafit train --dry-run`` on a bert-large-sized configuration beyond its imports."""
    from transformers import BertConfig

    BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096).save_pretrained(
        folder / "config"
    )
    code = (
        "import time, torch, transformers, peft, spafit.adapt, spafit.heads\n"
        "from transformers import BertForSequenceClassification\n"
        "from analysis.cli.train import describe_without_weights\n"
        "begun = time.perf_counter()\n"
        f"describe_without_weights({str(folder / 'config')!r}, 'spafit-4-9-I', labels=2, revision=None, offline=True)\n"
        "print(time.perf_counter() - begun)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> int:
    """Print the table; non-zero when a target is missed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workers = {}
        ideals: dict[str, float] = {}
        for variant in VARIANTS:
            command = [sys.executable, "-m", "tests.bench.training", "--serve", variant, str(folder)]
            workers[variant] = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            ideals[variant] = json.loads(workers[variant].stdout.readline())["ideal"]  # type: ignore[union-attr]
        seconds: dict[str, list[float]] = {v: [] for v in VARIANTS}
        peaks: dict[str, float] = {}
        for _ in range(ROUNDS):
            for variant, worker in workers.items():
                assert worker.stdin is not None
                assert worker.stdout is not None
                worker.stdin.write("go\n")
                worker.stdin.flush()
                answer = json.loads(worker.stdout.readline())
                seconds[variant].append(answer["seconds"])
                peaks[variant] = answer["peak"]
        for worker in workers.values():
            worker.communicate()
        median = {v: sorted(s)[len(s) // 2] for v, s in seconds.items()}
        apply_seconds, dry = _apply_seconds(), _dry_run_seconds(folder)

    def against(variant: str, factor: float) -> Row:
        measured, ideal = median[variant] / median["full"], ideals[variant] / ideals["full"]
        return Row(f"{variant}: step / full's step", measured, factor * ideal, "<=", f"{factor} x ideal {ideal:.3f}")

    lora = median["stock LoRA"]
    return print_table(
        f"training, {BLOCKS} blocks x {WIDTH}, {BATCH} x {LENGTH} tokens, rank {RANK}",
        [
            against("SPAFIT-4-9-I", 1.15),
            against("SPAFIT-4-9-I, cache", 1.15),
            against("SPAFIT-15-19-I, cache", 1.2),
            Row("SPAFIT-4-9-I: step / stock LoRA's", median["SPAFIT-4-9-I"] / lora, 1.0, "<=", f"LoRA {lora:.2f} s"),
            Row(
                "SPAFIT-4-9-I: peak memory / stock LoRA's", peaks["SPAFIT-4-9-I"] / peaks["stock LoRA"], 1.0, "<=",
                f"{peaks['SPAFIT-4-9-I'] / 1e9:.2f} against {peaks['stock LoRA'] / 1e9:.2f} GB; "
                f"full {peaks['full'] / 1e9:.2f}",
            ),
            Row("applying a preset to a bert-large-sized model, seconds", apply_seconds, 2.0, "<=", ""),
            Row("--dry-run of that size beyond imports, seconds", dry, 2.0, "<=", ""),
        ],
        notes=[
            f"stock LoRA / full: {lora / median['full']:.3f}, ideal {ideals['stock LoRA'] / ideals['full']:.3f}; "
            f"full {median['full']:.2f} s a step (median of {ROUNDS} rounds)"
        ],
    )  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        _serve(sys.argv[2], Path(sys.argv[3]))
    else:
        sys.exit(main())
