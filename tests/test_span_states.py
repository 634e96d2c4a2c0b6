"""Spans from file to probe: hand-checked sub-words, states of pairs, what is stored, and runs."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch

from probing import probe_layers
from probing.config import ProbeConfig
from probing.extraction import extract
from probing.item_states import item_states, rows_of_items
from probing.planning import extraction_options, plan_probing
from probing.tasks.edges import edge_tasks
from spafit.models import default_model_path, load_model
from tests.paths import MODELS, needs_smollm2
from tests.span_fixtures import BOB, IAN, NEW_YORK, RAN, edge, json_lines

WORDS = ("I", "do", "n't", "know", "👩‍🚀", "Nebuchadnezzar", "of", "New", "York", "😀", "!")
#: Words of each span and the tokens that carry it: [CLS] i do n ' t know [UNK] ne ##buch ##ad ##ne ##zza ##r of new
WORDPIECE = {
    (1, 2): [2],  # do
    (2, 3): [3, 4, 5],  # n ' t
    (1, 3): [2, 3, 4, 5],  # both halves of a contraction
    (4, 5): [7],  # three code points, one unknown token
    (5, 6): [8, 9, 10, 11, 12, 13],  # six pieces
    (7, 9): [15, 16],  # New York
    (4, 9): [7, 8, 9, 10, 11, 12, 13, 14, 15, 16],
    (9, 10): [17],
}
#: I ␣do ␣n 't ␣know, eight tokens for the bytes of 👩‍🚀, ␣Neb uch ad ne zz ar ␣of ␣New ␣York, two for 😀, ␣!
BYTE_LEVEL = {
    (1, 2): [1],
    (2, 3): [2, 3],
    (1, 3): [1, 2, 3],
    (4, 5): [5, 6, 7, 8, 9, 10, 11, 12],
    (5, 6): [13, 14, 15, 16, 17, 18],
    (7, 9): [20, 21],
    (4, 9): list(range(5, 22)),
    (9, 10): [22, 23],
}


def emoji_task(tmp_path, expected):
    """An edge-probing file (its emoji escaped as surrogates) whose first line has all the spans."""
    first = edge(" ".join(WORDS), *((span, "ab"[i % 2]) for i, span in enumerate(expected)))
    path = json_lines(tmp_path / "x.jsonl", first, *(edge(f"w{i} x", ((0, 1), "ab"[i % 2])) for i in range(20)))
    assert "\\ud83d\\udc69\\u200d" in path.read_text()
    return edge_tasks(path)[0]


def check_pooled_states(loaded, task, expected, cache):
    text = next(t for t in task.corpus.texts if t.string == " ".join(WORDS))
    ranges = [(a, b) for a, b in sorted(expected)]
    assert text.words == tuple(" ".join(WORDS[a:b]) for a, b in ranges)
    store = extract(loaded, [*task.corpus.texts], word_pooling=("mean", "max", "first", "last"), cache_dir=cache)
    at = store.word_offsets[task.corpus.texts.index(text)]
    encoding = loaded.tokenizer(text.string, return_tensors="pt")
    with torch.no_grad():
        plain = loaded.model(**encoding, output_hidden_states=True).hidden_states
    for hidden in range(store.num_hidden - 1):  # the last one has the final norm of a decoder
        states = plain[hidden][0].numpy()
        scale = np.abs(states).max()
        for i, span in enumerate(ranges):
            own = states[expected[span]]
            for pooling, value in (("mean", own.mean(0)), ("max", own.max(0)), ("first", own[0]), ("last", own[-1])):
                got = store.words(pooling, hidden=hidden, rows=np.array([at + i]))[0]
                assert np.abs(got - value).max() < 1e-5 * scale, (span, pooling, hidden)


def test_spans_of_minilm_are_the_sub_words_written_down_here(tmp_path):
    loaded = load_model(str(default_model_path()))
    tokens = loaded.tokenizer(" ".join(WORDS)).encodings[0].tokens
    assert tokens[8:14] == ["ne", "##buch", "##ad", "##ne", "##zza", "##r"]
    assert tokens[3:6] == ["n", "'", "t"]
    check_pooled_states(loaded, emoji_task(tmp_path, WORDPIECE), WORDPIECE, tmp_path / "cache")


@needs_smollm2
def test_spans_of_a_byte_level_tokenizer_are_the_sub_words_written_down_here(tmp_path):
    from transformers import AutoTokenizer, LlamaConfig, LlamaModel

    folder = MODELS / "smollm2"
    (gguf,) = folder.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    loaded = load_model((LlamaModel(config).eval(), tokenizer))
    tokens = tokenizer(" ".join(WORDS)).encodings[0].tokens
    assert tokens[13:19] == ["ĠNeb", "uch", "ad", "ne", "zz", "ar"]
    assert tokens[2:4] == ["Ġn", "'t"]
    check_pooled_states(loaded, emoji_task(tmp_path, BYTE_LEVEL), BYTE_LEVEL, tmp_path / "cache")


# ---------------------------------------------------------------- what a probe reads


def propbank_folder(path):
    path.mkdir()
    for split, n in (("train", 30), ("dev", 15), ("test", 15)):
        rows = [{**row, "words": [*row["words"][:-1], f"{split}{i}"]} for i in range(n) for row in (IAN, RAN)]
        json_lines(path / f"{split}.jsonl", *rows)
    return path


def opened(model, tmp_path, *references):
    """Plan of a run, and the store of its first task's corpus."""
    plan = plan_probing(ProbeConfig(tasks=references, seeds=(0,), out=str(tmp_path / "out")), model=str(model))
    name = plan.tasks[0].corpus.name
    options = extraction_options(plan.config, plan.tasks, name)
    return plan, extract(plan.loaded, plan.needed[name].texts, **options, cache_dir=tmp_path / "cache")


def single(loaded, tmp_path, string, start, end):
    """State of one span of one text, extracted alone."""
    from probing.tasks.base import Text

    store = extract(loaded, [Text(string, ((start, end),))], cache_dir=tmp_path / "single")
    return store.words("mean", hidden=2)[0]


def test_pairs_of_spans_are_the_states_of_both_side_by_side(small_bert, tmp_path):
    plan, store = opened(small_bert, tmp_path, f"propbank:{propbank_folder(tmp_path / 'pb')}#roles")
    (task,) = plan.tasks
    rows, usable = rows_of_items(plan, task, store)
    assert rows.shape == (len(task.items), 2)
    dev = np.flatnonzero((task.items["split"] == "dev").to_numpy())
    assert usable[dev].all()
    states = item_states(task, store, rows[dev], pooling="mean", hidden=2)
    assert states.shape == (len(dev), 32)
    for k in (0, 3, 5):
        item = task.items.iloc[dev[k]]
        text = task.corpus.texts[item["text"]]
        for part, column in ((states[k, :16], "span"), (states[k, 16:], "span2")):
            alone = single(plan.loaded, tmp_path, text.string, *text.spans[item[column]])
            assert np.allclose(part, alone, atol=1e-5)
    each = item_states(task, store, rows[dev], pooling="mean", hidden=2, each=lambda s: s[:, ::-1])
    assert np.array_equal(each[:, :16], states[:, :16][:, ::-1])
    assert np.array_equal(each[:, 16:], states[:, 16:][:, ::-1])


def test_only_spans_that_some_task_of_the_run_points_to_are_stored(small_bert, tmp_path):
    folder = propbank_folder(tmp_path / "pb")
    alone, _ = opened(small_bert, tmp_path, f"propbank:{folder}#roles")
    both, store = opened(small_bert, tmp_path, f"propbank:{folder}")
    (roles,) = alone.tasks
    first = next(iter(alone.needed.values())).texts[0]
    assert first.words == ("Ian", "ate", "ice cream", first.words[-1])
    more = next(iter(both.needed.values())).texts[0]
    assert set(first.words) < set(more.words)
    assert "ate ice cream up" in " | ".join(more.words)
    constituents = both.tasks[0]
    rows, usable = rows_of_items(both, constituents, store)
    item = int(np.flatnonzero((constituents.items["split"] == "test").to_numpy() & usable)[1])
    text = constituents.corpus.texts[constituents.items["text"][item]]
    span = text.spans[constituents.items["span"][item]]
    got = item_states(constituents, store, rows[[item]], pooling="mean", hidden=2)[0]
    assert np.allclose(got, single(both.loaded, tmp_path, text.string, *span), atol=1e-5)
    assert roles.digest == both.tasks[1].digest


def test_a_run_over_span_tasks_and_the_same_numbers_in_other_company(small_bert, tmp_path, cache):
    folder = propbank_folder(tmp_path / "pb")
    entities = tmp_path / "ner"
    entities.mkdir()
    for split, n in (("train", 40), ("dev", 20), ("test", 20)):
        rows = ((NEW_YORK + BOB).replace("left", f"{split}{i}").replace("stayed", f"{split}{i}") for i in range(n))
        (entities / f"{split}.iob2").write_text("".join(rows))
    options = {"seeds": (0,), "n_boot": 100, "quiet": True}
    references = [f"iob:{entities}", f"propbank:{folder}"]
    found = probe_layers(str(small_bert), references, out=tmp_path / "run", **options)
    assert found.run["status"] == "complete", found.run["tasks"]
    scores = found.scores
    best = scores[(scores["metric"] == "accuracy") & (scores["control"] == "none")].groupby("task")["value"].max()
    assert (best > 0.9).all()  # words tell everything here
    assert set(scores["unit"]) == {"span", "word", "span-pair"}
    assert set(scores.loc[scores["control"] == "word-type", "task"]) == {"ner.spans", "ner.tags", "pb.roles"}
    items = found.items("pb.roles")
    assert "span2" not in items
    first = items.iloc[0]
    assert (first["text"], first["target"]) == ("Ian ate ice cream up test0", "ate ⏐ Ian")
    alone = probe_layers(str(small_bert), [f"propbank:{folder}#roles"], out=tmp_path / "alone", **options).scores
    same = scores[scores["task"] == "pb.roles"].reset_index(drop=True)
    assert alone.equals(same)


def test_edges_with_several_labels_are_probed(small_bert, tmp_path, cache):
    names = ("dog", "cat", "river", "stone")
    kinds = {"dog": ["alive", "pet"], "cat": ["alive", "pet"], "river": ["water"], "stone": []}
    for split, n in (("train", 80), ("dev", 40), ("test", 40)):
        rows = (edge(f"the {names[i % 4]} of {split} {i}", ((0, 2), kinds[names[i % 4]])) for i in range(n))
        json_lines(tmp_path / f"{split}.jsonl", *rows)
    found = probe_layers(
        str(small_bert), [f"edges:{tmp_path}"], out=tmp_path / "run", controls=(), seeds=(0,), n_boot=100, quiet=True
    )
    (name,) = found.run["tasks"]
    assert found.run["tasks"][name]["kind"] == "multilabel"
    items = found.items(name)
    right = (items["label"].astype(str) == items["prediction"].astype(str)).groupby(items["hidden"]).mean()
    assert right.max() > 0.95


def test_texts_of_a_pair_alone_give_four_features(small_bert, tmp_path, cache):
    rng = np.random.default_rng(0)
    lines = ["a\tb\ty\tsplit"]
    for i in range(120):
        one, two = (("dog", "cat", "river", "stone")[rng.integers(4)] for _ in range(2))
        split = "train" if i < 70 else "dev" if i < 95 else "test"
        lines.append(
            f"the {one} number {i % 30}\tthe {two} number {i % 30}\t{'same' if one == two else 'other'}\t{split}"
        )
    (tmp_path / "p.tsv").write_text("\n".join(lines))
    reference = f"table:{tmp_path}/p.tsv,text=a,text2=b,label=y,split=split"
    plan, store = opened(small_bert, tmp_path, f"{reference},pairs=features")
    (task,) = plan.tasks
    assert task.unit == "pair"
    assert all(t.second is None for t in task.corpus.texts)
    rows, usable = rows_of_items(plan, task, store)
    rows = rows[usable][-9:]
    states = item_states(task, store, rows, pooling="mean", hidden=2)
    u, v = (store.sentences("mean", hidden=2, rows=rows[:, i]) for i in (0, 1))
    assert np.array_equal(states, np.concatenate([u, v, np.abs(u - v), u * v], axis=1))
    items = task.items.iloc[np.flatnonzero(usable)[-1]]
    assert task.corpus.texts[items["text2"]].string == lines[-1].split("\t")[1]
    found = {}
    for pairs in ("cross", "features"):
        out = tmp_path / pairs
        scores = probe_layers(
            str(small_bert), [f"{reference},pairs={pairs}"], out=out, controls=(), seeds=(0,), n_boot=100, quiet=True
        ).scores
        found[pairs] = scores[scores["metric"] == "accuracy"]["value"].max()
    assert found["features"] > 0.9  # equal words have |u - v| near zero: linear in the features
    shown = pd.read_parquet(tmp_path / "features" / "items" / "p.parquet").iloc[-1]
    assert shown["text"] == lines[-1].split("\t")[0] + " ⏐ " + lines[-1].split("\t")[1]
    run = json.loads((tmp_path / "features" / "run.json").read_text())
    assert run["texts"] < len(lines) - 1  # 120 pairs of fewer than 120 texts


@pytest.mark.parametrize("pairs", ["features", "both"])
def test_pairs_need_a_second_text_and_a_way_that_exists(tmp_path, pairs):
    from probing.registry import load_tasks
    from spafit.errors import TaskError

    (tmp_path / "p.tsv").write_text("a\ty\nx\t1\n")
    with pytest.raises(TaskError, match="needs a second text" if pairs == "features" else "is not one of cross, featu"):
        load_tasks([f"table:{tmp_path}/p.tsv,text=a,label=y,pairs={pairs}"])
