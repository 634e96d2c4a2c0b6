"""Forgetting while it happens: planted losses at a known step and hidden state, states in memory, command, figure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from analysis.cli.main import app
from analysis.trajectory import COLUMNS, TERMS, forgetting_signal, trajectory_figure, trajectory_table
from probing.extraction import extract
from probing.probes.linear import fit_selected
from probing.repeated import RepeatedStates
from probing.tasks.base import Corpus, Task, Text
from spafit.errors import DataError, SpafitError, TaskError, UnknownTaskError, UsageError
from spafit.fit_result import FitResult
from spafit.models import load_model
from spafit.signals import Reading, Signal
from spafit.training import fit
from tests.span_fixtures import IAN, RAN, json_lines
from tests.tiny import BLOCKS, save_tiny, tiny, tiny_tokenizer
from tests.training_fixtures import PLAN, QUICK, BrokenOff, breaking_off, frame, same, task

ALL = 1000.0


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    save_tiny("bert", folder)
    return folder


def animal() -> Task:
    """Which animal a sentence begins with, which every hidden state of a random encoder tells."""
    rows = frame(300, 7)
    texts = tuple(Text(f"{t} {i}") for i, t in enumerate(rows["text"]))  # numbers make them distinct
    split = np.array(["train", "dev", "test"])[np.arange(300) % 3]
    items = pd.DataFrame(
        {
            "item": [str(i) for i in range(300)],
            "text": range(300),
            "span": -1,
            "label": rows["label"],
            "split": split,
            "group": [str(i) for i in range(300)],
            "control": "",
        }
    )
    return Task("animal", "other", "sentence", ("cat", "dog"), Corpus("pets", texts), items)


def first_word() -> Task:
    """The same question to the first word's state."""
    whole = animal()
    texts = tuple(Text.from_words(t.string.split()) for t in whole.corpus.texts)
    return replace(
        whole, name="first", unit="word", corpus=Corpus("words", texts), items=whole.items.assign(span=0)
    )  # fmt: skip


def values(rows: list[Reading], term: str, name: str = "animal") -> np.ndarray:
    return np.array([v for n, _, v in rows if n == f"{term}:{name}"])


def layer(model: Any, block: int) -> Any:
    backbone = model.get_base_model().bert if hasattr(model, "get_base_model") else model
    return backbone.encoder.layer[block]


@torch.no_grad()
def destroy(model: Any, block: int) -> None:
    """The block's output is one constant from now on."""
    layer(model, block).output.LayerNorm.weight.zero_()


# ---------------------------------------------------------------- the measurement


@pytest.mark.parametrize("make", [animal, first_word])
def test_what_nothing_changed_has_lost_nothing(make: Callable[[], Task]) -> None:
    model, one = tiny("bert"), make()
    signal = forgetting_signal(tiny_tokenizer(), [one])
    first = signal.read(model, 0)
    again = signal.read(model, 4)
    assert first == again
    assert len(first) == len(TERMS) * (BLOCKS + 1)
    for rows in (first, again):
        assert (values(rows, "lost", one.name) == 0).all()
        assert (values(rows, "lost_se", one.name) == 0).all()
        assert (values(rows, "transfer", one.name) == values(rows, "recoverable", one.name)).all()
        assert values(rows, "recoverable", one.name).min() > 0.9


@pytest.mark.parametrize("block", range(BLOCKS))
def test_a_destroyed_block_is_a_loss_from_its_hidden_state_on_and_not_before(block: int) -> None:
    model = tiny("bert")
    signal = forgetting_signal(tiny_tokenizer(), [animal()])
    before = signal.read(model, 0)
    destroy(model, block)
    after = signal.read(model, 1)
    lost = values(after, "lost")
    assert (lost[: block + 1] == 0).all()
    majority = max(animal().items.query("split == 'test'")["label"].value_counts(normalize=True))
    assert (lost[block + 1 :] > values(before, "recoverable")[block + 1 :] - majority - 0.1).all()
    assert (lost[block + 1 :] > 5 * values(after, "lost_se")[block + 1 :]).all()


def test_a_shift_is_moved_and_nothing_is_lost() -> None:
    model = tiny("bert")
    signal = forgetting_signal(tiny_tokenizer(), [animal()])
    before = signal.read(model, 0)
    with torch.no_grad():
        layer(model, BLOCKS - 1).output.LayerNorm.bias.add_(torch.linspace(-40, 40, 16))
    after = signal.read(model, 1)
    assert values(after, "moved+re-encoded")[-1] > 0.3
    assert abs(values(after, "lost")[-1]) <= 0.02
    assert (values(after, "transfer")[:-1] == values(before, "transfer")[:-1]).all()


def test_the_parts_add_up_and_the_numbers_are_those_of_probes_fitted_by_hand() -> None:
    """Against the ordinary extraction and probe; the standard error against sd / sqrt(n) of single items."""
    one, other, tokenizer = animal(), tiny("bert", seed=5), tiny_tokenizer()
    model = tiny("bert")
    signal = forgetting_signal(tokenizer, [one], train_items=10_000, test_items=10_000)
    first = signal.read(model, 0)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        mine.data = 0.7 * mine.data + 0.3 * theirs.data  # other storage, which must be noticed
    second = signal.read(model, 3)
    pre = values(first, "recoverable")
    np.testing.assert_allclose(
        pre - values(second, "transfer"), values(second, "lost") + values(second, "moved+re-encoded"), atol=1e-12
    )
    rows = {s: np.flatnonzero(one.items["split"] == s) for s in ("train", "dev", "test")}
    labels = one.items["label"].to_numpy().astype(np.int64)

    def states(which: Any) -> np.ndarray:
        store = extract(load_model((which, tokenizer)), one.corpus.texts, device="cpu")
        return np.stack([store.sentences("mean", hidden=h, rows=np.arange(300)) for h in range(BLOCKS + 1)])

    was, now = states(tiny("bert")), states(model)
    fitted, l2 = fit_selected(
        was[:, rows["train"]], labels[rows["train"]], was[:, rows["dev"]], labels[rows["dev"]], n_classes=2
    )
    right = fitted.log_probabilities(was[:, rows["test"]], label_set=0)[:, 0].argmax(-1) == labels[rows["test"]]
    np.testing.assert_allclose(pre, right.mean(1))
    moved = fitted.log_probabilities(now[:, rows["test"]], label_set=0)[:, 0].argmax(-1) == labels[rows["test"]]
    np.testing.assert_allclose(values(second, "transfer"), moved.mean(1), atol=0.021)
    for h in range(BLOCKS + 1):
        at = slice(h, h + 1)
        again, _ = fit_selected(
            now[at, rows["train"]], labels[rows["train"]], now[at, rows["dev"]], labels[rows["dev"]], n_classes=2,
            l2_grid=l2[at], tolerance=1e-5,
        )  # fmt: skip
        hit = again.log_probabilities(now[at, rows["test"]], label_set=0)[0, 0].argmax(-1) == labels[rows["test"]]
        assert abs(values(second, "recoverable")[h] - hit.mean()) <= 0.021  # two items of a hundred
        difference = right[h].astype(float) - hit
        expected = difference.std(ddof=1) / np.sqrt(len(difference))
        assert values(second, "lost_se")[h] == pytest.approx(expected, abs=0.012)


def test_tasks_of_one_corpus_share_their_texts(bert: Path) -> None:
    model, tokenizer = tiny("bert"), tiny_tokenizer()
    signal = forgetting_signal(tokenizer, ["core.tense", "core.voice"], train_items=40, test_items=30)
    rows = signal.read(model, 0)
    assert {n for n, _, _ in rows} == {f"{t}:core.{n}" for t in TERMS for n in ("tense", "voice")}
    assert signal.measure._states.plan.texts == 70  # type: ignore[attr-defined]


# ---------------------------------------------------------------- states in memory


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("unchanged", [0, 1, 2, 3])
def test_states_from_the_middle_are_those_of_a_full_pass(cache: Path, name: str, unchanged: int) -> None:
    tokenizer = tiny_tokenizer(decoder=name == "gpt2")
    texts = first_word().corpus.texts
    loaded = load_model((tiny(name), tokenizer))
    path = loaded.stacks[0].block_paths
    if unchanged > len(path):
        pytest.skip("this model has fewer blocks")
    kept = RepeatedStates(loaded, texts, unchanged=unchanged)
    first = kept.read()
    with torch.no_grad():
        for parameter in loaded.model.get_submodule(path[max(unchanged, 1) - 1]).parameters():
            parameter.add_(0.05)
    second = kept.read()
    full = RepeatedStates(loaded, texts).read()
    assert set(second) == {"words", "sentences"}
    for unit in second:
        np.testing.assert_array_equal(second[unit], full[unit])
        assert not np.array_equal(second[unit][-1], first[unit][-1])
        assert np.array_equal(second[unit][: max(unchanged, 1)], first[unit][: max(unchanged, 1)])
    store = extract(load_model((loaded.model, tokenizer)), texts, device="cpu")
    for hidden in range(store.num_hidden):
        np.testing.assert_array_equal(
            second["sentences"][hidden][kept._sentences], store.sentences("mean", hidden=hidden)
        )


def test_the_frozen_prefix_runs_only_once() -> None:
    model = load_model((tiny("bert"), tiny_tokenizer()))
    kept = RepeatedStates(model, animal().corpus.texts, unchanged=3)
    counts = [0, 0, 0]
    for k in range(3):
        layer(model.model, k).attention.register_forward_hook(
            lambda *_, k=k: counts.__setitem__(k, counts[k] + 1)  # type: ignore[misc]
        )
    kept.read()
    once = list(counts)
    kept.read()
    # the check that the middle is a place to begin runs one batch in full
    assert counts[0] - once[0] == 1
    assert counts[1] - once[1] == 1
    assert counts[2] - once[2] > once[2]


# ---------------------------------------------------------------- in training


def run(bert: Path, out: Path, *signals: Signal, **changes: Any) -> FitResult:
    settings = replace(QUICK, **changes)
    return fit(
        str(bert), PLAN, data=task(), settings=settings, out=out, device="cpu", quiet=True, signals=signals
    )  # fmt: skip


def vandal(step_of: int, block: int) -> Signal:
    """Breaks its promise: destroys a block at one step."""

    def measure(model: Any, step: int) -> dict[str, float]:
        if step == step_of:
            destroy(model, block)
        return {}

    return Signal("vandal", measure, every=1, share=ALL)


def test_a_loss_is_seen_at_its_step_and_hidden_state_and_training_is_the_same(bert: Path, tmp_path: Path) -> None:
    watched = forgetting_signal(tiny_tokenizer(), [animal()], every=2, share=ALL)
    quiet = run(bert, tmp_path / "watched", watched)
    assert same(quiet.model_folder(), run(bert, tmp_path / "without").model_folder())
    broken = run(bert, tmp_path / "broken", vandal(7, 2), watched)
    lost = {}
    for name, result in (("quiet", quiet), ("broken", broken)):
        assert result.signals is not None
        table = trajectory_table(result.signals)
        assert list(table.columns) == list(COLUMNS)
        lost[name] = table[table["term"] == "lost"].pivot_table(index="step", columns="hidden", values="value")
        assert list(lost[name].index) == [0, 2, 4, 6, 8, 10, 12]
        assert (lost[name][[0, 1]] == 0).all(axis=None)  # the plan trains from block 1 on
    pd.testing.assert_frame_equal(lost["quiet"].loc[:6], lost["broken"].loc[:6])
    assert lost["broken"].loc[8:, 3].min() > 0.3
    assert lost["broken"].loc[:6, 3].abs().max() < 0.1
    assert lost["broken"][2].abs().max() < 0.1
    assert lost["quiet"].abs().max(axis=None) < 0.1


def test_an_interrupted_run_compares_with_the_states_before_training(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = forgetting_signal(tiny_tokenizer(), [animal()], every=3, share=ALL)
    whole = run(bert, tmp_path / "whole", watched, save_steps=4)
    repair = breaking_off(monkeypatch, 9)
    with pytest.raises(BrokenOff):
        run(bert, tmp_path / "run", watched, save_steps=4)
    repair()
    again = forgetting_signal(tiny_tokenizer(), [animal()], every=3, share=ALL)
    resumed = run(bert, tmp_path / "run", again, save_steps=4)
    pd.testing.assert_frame_equal(resumed.signals, whole.signals)  # type: ignore[arg-type]


def test_the_command_watches_draws_and_says_where(bert: Path, tmp_path: Path) -> None:
    table = frame(48, 1).assign(label=lambda t: t["label"].map({0: "cat", 1: "dog"}))
    table.to_csv(tmp_path / "train.tsv", sep="\t", index=False)
    out = tmp_path / "out"
    arguments = ["train", "--model", bert, "--train", tmp_path / "train.tsv", "--strata", "bitfit", "--out", out,
                 "--epochs", "2", "--batch-size", "8", "--max-length", "16", "--device", "cpu", "--quiet"]  # fmt: skip
    plain = CliRunner().invoke(app, [str(a) for a in arguments])
    assert plain.exit_code == 0, plain.output
    assert "trajectory" not in plain.output
    arguments += ["--watch", "core.tense,core.voice", "--watch-every", "3", "--watch-share", "1000"]
    kept = CliRunner().invoke(app, [str(a) for a in arguments])
    assert kept.exit_code == 0, kept.output
    assert "nothing was watched: the run had finished before" in kept.output
    result = CliRunner().invoke(app, [str(a) for a in [*arguments, "--no-resume"]])
    assert result.exit_code == 0, result.output
    assert str(out / "trajectory.png") in result.output
    assert str(out / "signals.csv") in result.output
    assert "forgetting of core.tense, core.voice measured at" in result.output
    assert (out / "trajectory.png").stat().st_size > 10_000
    found = trajectory_table(pd.read_csv(out / "signals.csv"))
    assert set(found["task"]) == {"core.tense", "core.voice"}
    assert set(found["term"]) == set(TERMS)
    figure = trajectory_figure(FitResult.load(out))
    upper = figure.axes[0]
    assert len(upper.get_lines()) == BLOCKS + 1


# ---------------------------------------------------------------- errors


def test_bad_input_is_one_sentence(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownTaskError, match=r"core\.tence.*core\.tense"):
        forgetting_signal(tiny_tokenizer(), ["core.tence"])
    with pytest.raises(UsageError, match="train_items is 1"):
        forgetting_signal(tiny_tokenizer(), train_items=1)
    whole = animal()
    numbers = replace(whole, kind="number", labels=(), items=whole.items.assign(label=np.linspace(0, 1, 300)))
    with pytest.raises(TaskError, match="cannot be watched"):
        forgetting_signal(tiny_tokenizer(), [numbers])
    with pytest.raises(UsageError, match="No task to watch"):
        forgetting_signal(tiny_tokenizer(), [])
    with pytest.raises(UsageError, match="step 0 first"):
        forgetting_signal(tiny_tokenizer(), [animal()]).read(tiny("bert"), 3)
    with pytest.raises(SpafitError, match="no stack 'decoder'"):
        forgetting_signal(tiny_tokenizer(), [animal()], stack="decoder").read(tiny("bert"), 0)
    with pytest.raises(DataError, match="no forgetting was watched"):
        trajectory_figure(run(bert, tmp_path / "run"))


def test_the_command_refuses_what_does_not_fit(bert: Path) -> None:
    for more, words in (
        (["--watch-every", "3"], "Name tasks with --watch"),
        (["--watch", "core.tence"], "core.tense"),
        (["--watch", "core.tense", "--watch-every", "0"], "at least 1"),
    ):
        result = CliRunner().invoke(app, ["train", "--model", str(bert), "--train", "none.tsv", *more])
        assert result.exit_code != 0
        assert words in str(result.exception)


def test_tasks_of_pairs_of_spans_are_refused_in_a_sentence(tmp_path):
    for split in ("train", "dev", "test"):
        json_lines(tmp_path / f"{split}.jsonl", IAN, RAN)
    with pytest.raises(TaskError, match=r"roles' .classes, span-pair. cannot be watched"):
        forgetting_signal(None, [f"propbank:{tmp_path}#roles"])
    forgetting_signal(None, [f"propbank:{tmp_path}#constituents"])
