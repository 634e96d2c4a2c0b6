"""Encoder-decoders from end to end: both stacks probed, compared before and after training, strata for each."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from typer.testing import CliRunner

from analysis.cli.main import app
from analysis.comparing import compare
from analysis.comparison import Comparison
from analysis.comparison_report import write_comparison_report
from analysis.evidence import read_evidence
from analysis.hypothesis import default_hypothesis
from analysis.run_suggestion import suggest_from_runs
from probing.config import ProbeConfig
from probing.extraction import extract, extract_stacks
from probing.results import ProbeResults
from probing.running import probe_layers
from probing.shared_prefix import unchanged_hidden
from probing.tasks.base import Text
from spafit.adapt import apply_strata
from spafit.errors import ModelError, UsageError
from spafit.language_models import load_language_model
from spafit.models import default_model_path, load_model
from spafit.strata import StrataConfig
from tests.test_comparing import table_of
from tests.tiny import save_tiny, tiny, tiny_encoder_decoder, tiny_tokenizer

SMALL: dict[str, Any] = {"seeds": 2, "n_boot": 100, "quiet": True}


@pytest.fixture(scope="module")
def model() -> tuple[Any, Any]:
    return tiny("bart"), tiny_tokenizer()


@pytest.fixture(scope="module")
def both(model: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> ProbeResults:
    folder = tmp_path_factory.mktemp("both")
    return probe_layers(
        model, [table_of(folder)], stack="encoder,decoder", out=folder / "run", cache_dir=folder / "cache", **SMALL
    )


def test_a_run_of_both_stacks_holds_what_runs_of_each_hold(model, both, tmp_path):
    assert both.stacks == ("encoder", "decoder")
    assert both.run["model"]["probed"]["decoder"]["cross_attention"]
    for stack, last in (("encoder", 2), ("decoder", 3)):
        alone = probe_layers(
            model, [table_of(tmp_path)], stack=stack, out=tmp_path / stack, cache_dir=tmp_path / "cache", **SMALL
        )
        own = both.of_stack(stack)
        assert int(own.scores["hidden"].max()) == last
        for name in ("scores", "summaries"):
            one, two = (
                getattr(r, name).astype({c: str for c in ("stack", "site", "pooling", "probe")}).reset_index(drop=True)
                for r in (own, alone)
            )
            pd.testing.assert_frame_equal(one, two, check_dtype=False, check_categorical=False)
        assert own.run["model"]["blocks"] == alone.run["model"]["blocks"] == last
        np.testing.assert_array_equal(own.items(own.tasks[0])["bits"], alone.items(own.tasks[0])["bits"])
        np.testing.assert_array_equal(own.curves(n_boot=100)[0].values, alone.curves(n_boot=100)[0].values)


def test_a_run_says_what_the_decoder_was_fed_and_what_a_causal_stack_cannot_know(both):
    fed, causal = both.run["warnings"][-2:]
    assert fed.startswith("stack 'decoder' was fed under teacher forcing: [CLS], then the text itself")
    assert causal.startswith("stack 'decoder' is causal")
    assert "word-final" in causal


def test_a_decoder_only_model_has_the_causal_note_once_and_an_encoder_none(tmp_path):
    for name, count in (("gpt2", 1), ("bert", 0)):
        loaded = (tiny(name), tiny_tokenizer(decoder=name == "gpt2"))
        found = probe_layers(
            loaded, [table_of(tmp_path)], controls=(), out=tmp_path / name, cache_dir=tmp_path / "c", **SMALL
        )
        assert sum("is causal" in n for n in found.run["warnings"]) == count
        assert not any("teacher forcing" in n for n in found.run["warnings"])


def test_word_final_is_another_name_of_last_and_layers_may_be_named_by_stack():
    config = ProbeConfig(pooling=("word-final",), layers="encoder:0-2,decoder:1,3", stack="encoder,decoder")
    assert config.pooling == ("last",)
    assert config.hidden(4, stack="encoder") == [0, 1, 2]
    assert config.hidden(4, stack="decoder") == [1, 3]
    with pytest.raises(UsageError, match="names no hidden state of stack 'text'"):
        config.hidden(4, stack="text")
    with pytest.raises(UsageError, match="names one twice"):
        ProbeConfig(pooling=("last", "word-final"))


def test_strata_of_a_run_cover_both_stacks_and_apply_to_the_model(model, both):
    from analysis.interpretation import interpret

    found = interpret(both)
    assert set(found.suggestions.by_stack) == {"encoder", "decoder"}
    assert set(found.verdict["stacks"]) == {"encoder", "decoder"}
    assert both.folder is not None
    plan = StrataConfig.load(both.folder / "strata.yaml")
    assert dict(plan.blocks) == {"encoder": 2, "decoder": 3}
    apply_strata(copy.deepcopy(model[0]), plan).check()
    report = (both.folder / "report.html").read_text(encoding="utf-8")
    assert "fed under teacher forcing" in report
    assert {"layers.png", "layers-decoder-block.png"} <= {p.name for p in (both.folder / "figures").iterdir()}
    assert dict(suggest_from_runs([both])["decoder"].config.blocks) == {"decoder": 3}


def test_of_one_stack_the_written_strata_leave_the_other_frozen(model, tmp_path):
    from analysis.interpretation import interpret

    found = probe_layers(
        model, [table_of(tmp_path)], stack="decoder", out=tmp_path / "run", cache_dir=tmp_path / "c", controls=(),
        **SMALL,
    )  # fmt: skip
    interpret(found)
    plan = StrataConfig.load(tmp_path / "run" / "strata.yaml")
    assert [s.method for s in plan.strata if s.stack == "encoder"] == ["freeze"]
    assert plan.provenance["not_probed"] == ["encoder"]


# ---------------------------------------------------------------- before and after training


def changed(model: torch.nn.Module, *patterns: str) -> torch.nn.Module:
    new = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in new.named_parameters():
            if any(p in name for p in patterns):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return new


@pytest.mark.parametrize(
    ("name", "patterns", "shared"),
    [
        ("bart", ["decoder.layers.1."], (3, 2)),
        ("bart", ["encoder.layers.1."], (2, 1)),  # the decoder's embeddings do not read the encoder
        ("bart", ["shared."], (0, 0)),
        ("t5", ["decoder.final_layer_norm"], (3, 4)),
        ("t5", ["encoder.final_layer_norm"], (3, 1)),
        ("encoder-decoder", ["decoder.cls."], (4, 3)),
        ("encoder-decoder", ["crossattention.self.query"], (4, 1)),
        ("widths", ["enc_to_dec_proj"], (4, 1)),
    ],
)
def test_hidden_states_that_training_left_alone_are_told_by_stack(name, patterns, shared):
    made = {"encoder-decoder": tiny_encoder_decoder, "widths": lambda: tiny_encoder_decoder(hidden_size=24)}
    base = made.get(name, lambda: tiny(name))()
    old, new = (load_model((m, tiny_tokenizer())) for m in (base, changed(base, *patterns)))
    assert tuple(unchanged_hidden(old, new, stack=s) for s in ("encoder", "decoder")) == shared
    # What is called the same is the same, and the next hidden state is not.
    texts = [Text("the cat sees a big dog"), Text("old dogs and a cat")]
    for stack, count in zip(("encoder", "decoder"), shared, strict=True):
        one, two = (_states(loaded, texts, stack) for loaded in (old, new))
        assert all(np.array_equal(a, b) for a, b in zip(one[:count], two[:count], strict=True))
        if count < len(one):
            assert not np.array_equal(one[count], two[count])


def _states(loaded, texts, stack: str) -> list[np.ndarray]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        store = extract(loaded, texts, stack=stack, cache_dir=Path(folder))
        return [store.sentences("mean", hidden=h) for h in range(store.num_hidden)]


@pytest.fixture(scope="module")
def found(model: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    folder = tmp_path_factory.mktemp("compare")
    after = [(changed(model[0], p), model[1]) for p in ("decoder.layers.1.", "encoder.layers.1.")]
    return compare(
        model, after, labels=["decoder-tuned", "encoder-tuned"], tasks=[table_of(folder)], stack="encoder,decoder",
        controls=("word-type",), out=folder / "out", cache_dir=folder / "cache", **SMALL,
    )  # fmt: skip


def test_forgetting_is_by_stack_and_zero_where_nothing_changed(found):
    lost = found.forgetting.query("term == 'lost' and metric == 'accuracy' and control == 'none'")
    lost = lost.set_index(["model", "stack", "hidden"])["value"].sort_index()
    assert (lost.loc["decoder-tuned", "encoder"] == 0).all()
    assert (lost.loc["decoder-tuned", "decoder"].loc[:1] == 0).all()
    assert lost.loc["decoder-tuned", "decoder"].loc[2:].abs().max() > 0
    assert (lost.loc["encoder-tuned", "encoder"].loc[:1] == 0).all()
    assert lost.loc["encoder-tuned", "decoder"].loc[0] == 0
    assert list(lost.loc["encoder-tuned", "encoder"].index) == [0, 1, 2]
    assert list(lost.loc["encoder-tuned", "decoder"].index) == [0, 1, 2, 3]
    assert found.run["models"]["decoder-tuned"]["unchanged_by_stack"] == {"encoder": 3, "decoder": 2}


def test_before_and_after_in_a_comparison_are_the_runs_own_numbers(found):
    """The score after training is that of a run on the tuned model alone; transfer uses the same stack's probes."""
    run = ProbeResults.load(found.folder / "after" / "decoder-tuned")
    assert run.stacks == ("decoder",)
    own = run.scores[run.scores["seed"].isna() & (run.scores["control"] == "none")]
    own = own[(own["metric"] == "accuracy")].set_index("hidden")["value"]
    rows = found.forgetting.query("model == 'decoder-tuned' and stack == 'decoder' and control == 'none'")
    after = rows.query("term == 'recoverable' and metric == 'accuracy'").set_index("hidden")["value"]
    np.testing.assert_allclose(after.loc[2:], own.loc[2:], atol=1e-9)
    transfer = rows.query("term == 'transfer' and metric == 'accuracy'").set_index("hidden")["value"]
    assert transfer.notna().all()


def test_drift_page_words_and_pictures_are_by_stack(found):
    assert found.drift is not None
    assert set(found.drift["stack"]) == {"encoder", "decoder"}
    same = found.drift.query("model == 'decoder-tuned' and stack == 'encoder' and measure == 'cka'")["value"]
    np.testing.assert_allclose(same, 1.0)
    paths = write_comparison_report(found)
    names = {p.name for p in paths}
    assert {"forgetting.png", "forgetting-decoder.png", "loss_map-decoder.png", "drift-0-decoder.png"} <= names
    words = found.paragraphs()[0]
    assert "Encoder: no hidden state differs" in words
    assert "Decoder: hidden states 2 to 3 changed, 0 to 1 are as before" in words
    assert found.to_markdown().splitlines()[0].startswith("| model | task | stack | at |")
    assert list(found.summary()["stack"]) == ["encoder", "decoder", "encoder", "decoder"]
    names = [e.name for e in read_evidence(found.folder, default_hypothesis())]
    assert sum("(decoder)" in n for n in names) == 2
    with pytest.raises(UsageError, match="No stack 'vision' was compared"):
        found.of_stack("vision")


# ---------------------------------------------------------------- targets


def pairs_of(folder: Path, n: int = 420) -> Path:
    """Source and target whose first animals agree or not: what neither text says alone."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(n):
        one, two = rng.choice(["cat", "dog"], 2)
        words = " ".join(rng.choice(["big", "old", "runs", "sees", "and"], 4))
        rows.append((f"the {one} {words}", f"a {two} walked", "same" if one == two else "other"))
    pd.DataFrame(rows, columns=["source", "target", "label"]).to_csv(folder / "pairs.tsv", sep="\t", index=False)
    return folder / "pairs.tsv"


def test_a_pair_s_target_is_what_the_decoder_reads(tmp_path):
    loaded = load_model((tiny("t5"), tiny_tokenizer()))
    reference = f"table:{pairs_of(tmp_path)},text=source,text2=target,label=label,pairs=target"
    found = probe_layers(
        loaded, [reference], stack="encoder,decoder", pooling=("last",), controls=(), out=tmp_path / "run",
        cache_dir=tmp_path / "cache", **SMALL,
    )  # fmt: skip
    items = found.items(found.tasks[0])
    assert items["text"].iloc[0].count(" ⏐ ") == 1
    with pytest.raises(ModelError, match="no decoder that could read them"):
        extract(load_model((tiny("bert"), tiny_tokenizer())), [Text("a cat", target="a dog")], cache_dir=tmp_path)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_what_is_of_one_stack_is_refused_in_one_sentence(name, both, tmp_path):
    from analysis.attribution import conductance
    from analysis.causal import exchanged, skipped
    from analysis.sensitivity import sensitivity

    made = tiny(name, auto="AutoModelForSeq2SeqLM")
    with pytest.raises(ModelError, match=r"2 stacks of blocks \(encoder, decoder\); interventions are for"):
        skipped(made, [0]).__enter__()
    with pytest.raises(ModelError, match="interventions are for models with one"):
        exchanged(made, copy.deepcopy(made), [0]).__enter__()
    with pytest.raises(ModelError, match="several stacks of blocks"):
        conductance(made, [[2, 7, 8, 3]], baseline_id=0)
    save_tiny(name, tmp_path, auto="AutoModelForSeq2SeqLM")
    with pytest.raises(ModelError, match="is an encoder-decoder, whose head continues"):
        load_language_model(tmp_path)
    with pytest.raises(UsageError, match="sensitivity is of one"):
        sensitivity(both)


# ---------------------------------------------------------------- a real model


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model on both sides of an encoder-decoder, cross-attention new."""
    if default_model_path() is None:
        pytest.skip("the built-in default model is not installed (extra demo)")
    import transformers

    from spafit.hub import quiet
    from spafit.runtime import torch_seed

    source, folder = str(default_model_path()), tmp_path_factory.mktemp("minilm2minilm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    with torch_seed(0, "cross-attention"), quiet():
        warm = transformers.EncoderDecoderModel.from_encoder_decoder_pretrained(source, source)
    warm.config.decoder_start_token_id, warm.config.pad_token_id = tokenizer.cls_token_id, tokenizer.pad_token_id
    warm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_folder_of_an_encoder_decoder_model_loads_whole_and_its_encoder_is_the_built_in_model(minilm, tmp_path):
    loaded = load_model(minilm)
    assert {s.name: s.num_blocks for s in loaded.stacks} == {"encoder": 6, "decoder": 6}
    assert loaded.max_length == 512
    assert loaded.tokenizer.cls_token == "[CLS]"
    texts = [Text.from_words(["the", "old", "cat", "sees", "two", "dogs"]), Text.from_words(["they", "walked"])]
    stores = extract_stacks(loaded, texts, stacks="encoder,decoder", cache_dir=tmp_path)
    plain = extract(load_model(None), texts, cache_dir=tmp_path)
    for hidden in range(7):
        np.testing.assert_allclose(
            stores["encoder"].words("mean", hidden=hidden), plain.words("mean", hidden=hidden), atol=1e-5
        )
    # Words are embedded alike; their positions, one later, are not.
    one, two = (s.words("mean", hidden=0) for s in (stores["decoder"], plain))
    assert 0.7 < np.corrcoef(one.ravel(), two.ravel())[0, 1] < 0.9999


def test_the_command_probes_both_stacks_of_a_real_model_and_suggests_strata_for_each(minilm, tmp_path):
    run = CliRunner()
    arguments = ["--tasks", "core.previous_word,core.next_word", "--limit", "200", "--seeds", "1", "--n-boot", "100"]
    done = run.invoke(
        app,
        ["probe", "--model", str(minilm), "--stack", "encoder,decoder", *arguments, "--out", str(tmp_path / "run"),
         "--pooling", "word-final", "--cache-dir", str(tmp_path / "cache"), "-q"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert done.output.count("is causal") == 1
    assert "Stack decoder:" in done.output
    scores = pd.read_csv(tmp_path / "run" / "scores.csv")
    assert set(scores["stack"]) == {"encoder", "decoder"}
    assert set(scores["pooling"]) == {"last"}
    best = scores.query("metric == 'accuracy' and control == 'none' and split == 'seen'")
    best = best.groupby(["stack", "task"])["value"].max()
    assert best["encoder", "core.previous_word"] > 0.85
    assert best["decoder", "core.previous_word"] > 0.7
    assert best["decoder", "core.next_word"] < best["decoder", "core.previous_word"] - 0.1  # it stands to the right
    done = run.invoke(app, ["suggest", str(tmp_path / "run"), "--out", str(tmp_path / "suggested")])
    assert done.exit_code == 0, done.output
    plan = yaml.safe_load((tmp_path / "suggested" / "strata.yaml").read_text(encoding="utf-8"))
    assert plan["model"]["blocks"] == {"encoder": 6, "decoder": 6}
    assert {p.name for p in (tmp_path / "suggested").iterdir()} >= {"suggestion-encoder.png", "suggestion-decoder.png"}
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert record["model"]["probed"]["decoder"]["causal"]
