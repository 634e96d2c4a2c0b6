"""Two processes give what one does with twice the batch; one of them writes; the mask holds in both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from spafit import io
from spafit.errors import OutputError
from spafit.fit_result import FitResult
from spafit.retain import parse_remedy
from spafit.settings import TrainSettings
from spafit.training import fit
from tests.tiny import save_tiny
from tests.training_fixtures import PLAN, is_key_bias, same, task, weights

STILL = TrainSettings(
    epochs=2, batch_size=8, learning_rate=1e-2, max_length=16, prefix_cache="off", select_share=0.0, log_steps=1,
    save_steps=2,
)  # fmt: skip
#: Without the dropout of the LoRA.
STILL_PLAN = replace(PLAN, strata=tuple(replace(s, lora=s.lora and replace(s.lora, dropout=0.0)) for s in PLAN.strata))
#: What differs from STILL; ``n`` training items, ``plan`` and ``remedies`` are arguments of ``fit``.
VARIANTS: dict[str, dict[str, Any]] = {
    "random order": {"group_by_length": False},
    "prefix cached": {"prefix_cache": "on", "select_share": 0.25, "epochs": 3, "n": 64},
    "class weights": {"class_weights": True},
    "accumulated": {"accumulate": 2},
    "full": {"plan": "full", "learning_rate": 1e-4},
    "remedy": {"remedies": ["l2sp:1"], "learning_rate": 1e-3},
    "activations recomputed": {"checkpoint_activations": True},
}
PLANS: dict[str, Any] = {"still": STILL_PLAN, "dropout": PLAN, "full": "full"}

_SCRIPT = """
import json, os, signal, sys
sys.path.insert(0, sys.argv[1])
from tests.test_distributed import record_writes, run, shard_on_the_cpu
from spafit import seed_run
from spafit.errors import UsageError
from spafit.trainer import StratifiedTrainer

bert, folder, jobs, kill = sys.argv[2], sys.argv[3], json.loads(sys.argv[4]), int(sys.argv[5])
if sys.argv[6] == "sharded":
    shard_on_the_cpu()
rank = int(os.environ["RANK"])
written, checked = record_writes(), []
train, step = seed_run._run, StratifiedTrainer.training_step

def watched(job, kind, stratified, *args):
    found = train(job, kind, stratified, *args)
    stratified.check()
    checked[:] = sorted(stratified.trainable)
    return found

def training_step(self, *args, **kwargs):
    loss = step(self, *args, **kwargs)
    if self.state.global_step + 1 == kill:
        os.kill(os.getpid(), signal.SIGKILL)
    return loss

seed_run._run, StratifiedTrainer.training_step = watched, training_step
for name, options in jobs.items():
    written.clear()
    try:
        result = run(bert, os.path.join(folder, name), {**options, "batch_size": 4})
    except UsageError as error:
        with open(os.path.join(folder, f"{name}-{rank}.json"), "w") as file:
            json.dump({"error": str(error)}, file)
        continue
    seen = {"written": written, "checked": checked, "scores": result.runs["value"].tolist(),
            "processes": result.run["processes"]}
    with open(os.path.join(folder, f"{name}-{rank}.json"), "w") as file:
        json.dump(seen, file)
"""


def run(bert: str, out: str | Path, options: dict[str, Any]) -> FitResult:
    """``fit`` with some options."""
    settings = dict(options)
    n, plan, remedies = settings.pop("n", 48), PLANS[settings.pop("plan", "still")], settings.pop("remedies", [])
    return fit(
        bert, plan, data=task(n), settings=replace(STILL, **settings), remedies=[parse_remedy(r) for r in remedies],
        out=out, device="cpu", quiet=True,
    )  # fmt: skip


def record_writes() -> list[str]:
    """Names of the files that this process writes from now on through this package's writer or the Trainer's."""
    from transformers import Trainer

    names: list[str] = []
    write, state = io.atomic_write, Trainer._save_optimizer_and_scheduler

    def recording(path: Path, *args: Any) -> None:
        names.append(path.name)
        write(path, *args)

    def saving(self: Any, folder: str) -> None:
        if self.args.should_save:
            names.append("optimizer.pt")
        state(self, folder)

    io.atomic_write = recording
    Trainer._save_optimizer_and_scheduler = saving
    return names


def shard_on_the_cpu() -> None:
    """Put accelerate's FSDP2 plugin in place by hand: from its configuration it takes it for accelerators only."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["BertLayer"],
        cpu_ram_efficient_loading=False, state_dict_type="FULL_STATE_DICT", reshard_after_forward=True,
    )  # fmt: skip
    original = AcceleratorState.__init__

    def begin(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin

    AcceleratorState.__init__ = begin


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny BERT without dropout."""
    folder = tmp_path_factory.mktemp("bert")
    save_tiny("bert", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def launch(bert: Path, folder: Path, jobs: dict[str, dict[str, Any]], *, kill: int = 0, sharded: bool = False) -> int:
    """Run jobs one after the other in two gloo processes under torchrun; return its exit status."""
    script = folder / "script.py"
    script.write_text(_SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    arguments = [str(Path(__file__).parent.parent), str(bert), str(folder), json.dumps(jobs), str(kill)]
    arguments.append("sharded" if sharded else "replicated")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command + arguments, capture_output=True, text=True, env=environment, check=False)
    assert kill or done.returncode == 0, done.stderr[-3000:]
    return done.returncode


@pytest.fixture(scope="module")
def pairs(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every variant, trained by two processes."""
    folder = tmp_path_factory.mktemp("two")
    launch(bert, folder, VARIANTS)
    return folder


SHARDED = ("random order", "prefix cached", "full")


@pytest.fixture(scope="module")
def shards(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some variants, trained by two processes of which each holds half of every parameter (FSDP2)."""
    folder = tmp_path_factory.mktemp("shards")
    launch(bert, folder, {name: VARIANTS[name] for name in (*SHARDED, "remedy")}, sharded=True)
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_give_what_one_gives_with_twice_the_batch(
    bert: Path, pairs: Path, tmp_path: Path, variant: str
) -> None:
    check_equal(run(str(bert), tmp_path, VARIANTS[variant]), pairs / variant)


@pytest.mark.slow
@pytest.mark.parametrize("variant", SHARDED)
def test_two_processes_with_a_half_each_give_it_too(bert: Path, shards: Path, tmp_path: Path, variant: str) -> None:
    check_equal(run(str(bert), tmp_path, VARIANTS[variant]), shards / variant)
    second = json.loads((shards / f"{variant}-1.json").read_text())
    assert second["checked"]
    assert second["written"] == []


@pytest.mark.slow
def test_a_remedy_on_shares_of_parameters_is_refused_by_each_process(shards: Path) -> None:
    for rank in (0, 1):
        assert "without FSDP" in json.loads((shards / f"remedy-{rank}.json").read_text())["error"]


def check_equal(one: FitResult, folder: Path) -> None:
    ours, theirs = weights(folder / "seed-0" / "model"), weights(one.model_folder())
    apart = {k: float((ours[k] - theirs[k]).abs().max()) for k in theirs}
    keys = {k for k in apart if is_key_bias(k)}
    assert max(v for k, v in apart.items() if k not in keys) < 1e-5
    assert max((apart[k] for k in keys), default=0.0) < one.run["settings"]["learning_rate"]
    index = ["split", "metric", "step"]
    curves = [io.read_table(f / "metrics").set_index(index)["value"] for f in (one.folder, folder)]
    pd.testing.assert_series_equal(*curves, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_first_process_alone_writes_and_both_return_the_same(pairs: Path, variant: str) -> None:
    first, second = (json.loads((pairs / f"{variant}-{rank}.json").read_text()) for rank in (0, 1))
    assert first["checked"] == second["checked"] != []
    assert first["scores"] == second["scores"] != []
    assert first["processes"] == second["processes"] == 2
    assert {"run.json", "optimizer.pt", "README.md", "results.md", "learning_curve.png"} <= set(first["written"])
    assert second["written"] == []
    assert not list((pairs / variant).rglob("checkpoint-*"))


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_that_were_killed_go_on_to_the_same_weights(bert: Path, tmp_path: Path, sharded: bool) -> None:
    """The plan's LoRA has dropout here, of which each process draws its own."""
    options = {"plan": "dropout", "prefix_cache": "on"}
    launch(bert, tmp_path, {"whole": options}, sharded=sharded)
    assert launch(bert, tmp_path, {"killed": options}, kill=9, sharded=sharded)
    killed = tmp_path / "killed" / "seed-0"
    assert sorted(p.name for p in killed.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
    assert {p.name for p in (killed / "checkpoint-8").glob("rng*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    with pytest.raises(OutputError, match="number of processes"):
        run(str(bert), tmp_path / "killed", {**options, "batch_size": 4})
    launch(bert, tmp_path, {"killed": options}, sharded=sharded)
    assert same(killed / "model", tmp_path / "whole" / "seed-0" / "model")
