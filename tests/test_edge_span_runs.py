"""Edge-span probes in runs: which words they read, a planted word, an independent solver, files, and refusals."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from probing import Task, probe_arrays, probe_layers
from probing.config import ProbeConfig
from probing.extraction import extract
from probing.fitting import ProbeSettings
from probing.item_states import family_states, rows_of_items
from probing.needed_texts import needed_texts
from probing.planning import ProbePlan, extraction_options, plan_probing
from probing.probes.edge_span import EdgeAttention, fit_edge_attention
from probing.probes.families import EdgeMean, parse_probe
from probing.probes.span_words import SpanWords
from probing.store import ActivationStore
from probing.tasks.base import Corpus, Text
from probing.transfer import stored_probes
from spafit.errors import UsageError
from spafit.models import default_model_path, load_model
from tests.span_fixtures import edge, json_lines
from tests.test_edge_span import planted
from tests.test_running import number_task, sentence_task, word_task
from tests.test_span_states import WORDPIECE, WORDS, emoji_task, propbank_folder

EDGES = ("edge-span", "edge-span:attention")
#: Sub-words of each word of tests.test_span_states.WORDS among MiniLM's tokens, [CLS] being 0.
SUB_WORDS = ([1], [2], [3, 4, 5], [6], [7], [8, 9, 10, 11, 12, 13], [14], [15], [16], [17], [18])
CUES = ("river", "stone", "music")
OTHERS = (
    "apple", "table", "green", "seven", "house", "paper", "money", "water", "north", "horse", "chair", "glass",
    "bread", "light", "small", "early", "never", "under", "again", "while", "every", "cloud", "wheat", "heavy",
    "sugar", "brown", "large", "south", "after", "metal",
)  # fmt: skip


def span_task(rows: list[tuple[str, tuple[int, int], int, str]], labels: tuple[str, ...], name: str = "made") -> Task:
    """A task of classes from (text, span of characters, label, split), one text each."""
    table = [(f"i{k}", k, 0, label, split, f"g{k}", "") for k, (_, _, label, split) in enumerate(rows)]
    return Task(
        f"{name}.spans", "other", "span", labels, Corpus(name, tuple(Text(s, (span,)) for s, span, _, _ in rows)),
        pd.DataFrame(table, columns=["item", "text", "span", "label", "split", "group", "control"]),
    ).validate()  # fmt: skip


def cued(seed: int = 0, *, permuted: bool = False) -> Task:
    """Spans of ten to sixteen words of which one, at any place, tells the label; words outside show other cues."""
    rng = np.random.default_rng(seed)
    rows: list[tuple[str, tuple[int, int], int, str]] = []
    for split, n in (("train", 900), ("dev", 300), ("test", 400)):
        labels = rng.integers(len(CUES), size=n)
        given = rng.integers(len(CUES), size=n) if permuted else labels
        for label, shown in zip(given.tolist(), labels.tolist(), strict=True):
            inside = list(rng.choice(OTHERS, rng.integers(10, 17)))
            inside[rng.integers(len(inside))] = CUES[shown]
            before, after = rng.choice(CUES, 2)
            span = " ".join(inside)
            rows.append((f"{before} {span} {after}", (len(before) + 1, len(before) + 1 + len(span)), label, split))
    return span_task(rows, CUES)


def opened(model: Path | str, tmp_path: Path, task: Task, probe: tuple[str, ...]) -> tuple[ProbePlan, ActivationStore]:
    config = ProbeConfig(tasks=(task.name,), seeds=(0,), out=str(tmp_path / "out"), probe=probe, max_train=10**6)
    plan = plan_probing(config, model=str(model), given=[task], only_given=True)
    options = extraction_options(plan.config, plan.tasks, task.corpus.name)
    return plan, extract(plan.loaded, plan.needed[task.corpus.name].texts, **options, cache_dir=tmp_path / "cache")


# ---------------------------------------------------------------- which words are read


def test_words_of_spans_are_the_sub_words_written_down_here(tmp_path: Path) -> None:
    task = emoji_task(tmp_path, WORDPIECE)
    plan, store = opened(str(default_model_path()), tmp_path, task, EDGES)
    rows, usable = rows_of_items(plan, task, store, family=EdgeAttention())
    text, string = next((i, t.string) for i, t in enumerate(task.corpus.texts) if t.string == " ".join(WORDS))
    loaded = load_model(str(default_model_path()))
    with torch.no_grad():
        plain = loaded.model(**loaded.tokenizer(string, return_tensors="pt"), output_hidden_states=True).hidden_states
    checked = 0
    for item in np.flatnonzero((task.items["text"] == text).to_numpy()):
        assert usable[item]
        span = task.corpus.texts[text].spans[task.items["span"][item]]
        before = len(string[: span[0]].split())
        words = range(before, before + len(string[slice(*span)].split()))
        for hidden in (0, 3, 6):
            expected = np.stack([plain[hidden][0][SUB_WORDS[w]].numpy().mean(0) for w in words])
            read = family_states(EdgeAttention(), task, store, rows[[item]], pooling="mean", hidden=hidden)
            assert isinstance(read, SpanWords)
            assert read.spans.tolist() == [[[0, len(words)]]]
            scale = np.abs(expected).max()
            assert np.abs(read.words - expected).max() < 1e-5 * scale, (string[slice(*span)], hidden)
            mean = family_states(EdgeMean(), task, store, rows[[item]], pooling="mean", hidden=hidden)
            assert np.abs(mean - expected.mean(0)).max() < 1e-5 * scale
        checked += 1
    assert checked == len(WORDPIECE)


def test_words_are_added_behind_the_spans_and_only_where_a_probe_reads_them(tmp_path: Path) -> None:
    task = emoji_task(tmp_path, WORDPIECE)
    settings = ProbeSettings(seeds=(0,), max_train=10**6)
    (without,) = needed_texts([task], settings).values()
    (own,) = needed_texts([task], replace(settings, probe=("linear", *EDGES))).values()
    assert without.texts == task.corpus.texts  # so that states and numbers of other runs stay what they were
    assert not without.words.any()
    assert np.array_equal(without.spans, own.spans)
    for before, after in zip(without.texts, own.texts, strict=True):
        assert after.spans[: len(before.spans)] == before.spans
        added = after.spans[len(before.spans) :]
        assert list(added) == sorted(set(added))
    i = next(i for i, t in enumerate(own.texts) if "👩‍🚀" in t.string)
    added = [own.texts[i].string[slice(*s)] for s in own.texts[i].spans[len(without.texts[i].spans) :]]
    assert added == ["do", "n't", "👩‍🚀", "Nebuchadnezzar", "of", "New", "York", "😀"]  # no span touches the others


@pytest.mark.parametrize("probe", [("linear",), ("linear", "edge-span")])
def test_a_span_with_a_word_without_state_is_left_out(small_bert: Path, tmp_path: Path, probe: tuple[str, ...]) -> None:
    long = " ".join(["dog"] * 80)
    rows = [(f"cat {'ab'[i % 2]} dog", (0, 5), i % 2, ("train", "dev", "test")[i % 3]) for i in range(60)]
    rows += [("cat \u200b dog", (0, 9), 0, "test"), (long, (4 * 50, 4 * 70 + 3), 1, "test"), (long, (0, 7), 0, "test")]
    task = span_task([*rows], ("a", "b"))
    plan, store = opened(small_bert, tmp_path, task, probe)
    # The tokenizer drops the second word of the first; the second reaches beyond the window, the third does not.
    _, usable = rows_of_items(plan, task, store)
    assert usable[:60].all()
    assert usable[60:].tolist() == [len(probe) == 1, False, True]


# ---------------------------------------------------------------- numbers


@pytest.fixture(scope="module")
def cue_runs(small_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, pd.DataFrame]:
    """Bits on test by probe, with labels that a word tells and with permuted ones."""
    folder = tmp_path_factory.mktemp("cued")
    found = {}
    for name, permuted in (("cued", False), ("permuted", True)):
        scores = probe_layers(
            str(small_bert), [cued(permuted=permuted)], probe=EDGES, layers="0", controls=(), max_train=10**6,
            seeds=(0,), n_boot=200, out=folder / name, cache_dir=folder / "cache", quiet=True,
        ).scores  # fmt: skip
        own = scores[(scores["metric"] == "bits") & scores["seed"].isna()]
        found[name] = own.set_index("probe")
    return found


def test_attention_reads_the_word_that_decides_and_a_mean_does_so_worse(cue_runs: dict[str, pd.DataFrame]) -> None:
    own = cue_runs["cued"]
    mean, attention = (own.loc[name] for name in EDGES)
    assert attention["value"] > 1.0  # of 1.58
    assert attention["ci_low"] > mean["ci_high"] + 0.3


def test_labels_that_no_word_tells_give_no_bits(cue_runs: dict[str, pd.DataFrame]) -> None:
    own = cue_runs["permuted"]
    assert (own["value"] < 0.02).all()
    assert (own["value"] > -0.1).all()


def test_means_agree_with_an_independent_solver_on_means_of_words(small_bert: Path, tmp_path: Path, cache) -> None:
    task, l2, hidden = cued(3), 0.01, 2
    results = probe_layers(
        str(small_bert), [task], probe=["edge-span"], layers=str(hidden), controls=(), max_train=10**6, seeds=(0,),
        l2=(l2,), n_boot=100, out=tmp_path / "run", quiet=True,
    )  # fmt: skip
    (bits,) = results.scores.query("metric == 'bits' and seed.isna()", engine="python")["value"]
    loaded = load_model(str(small_bert))
    features = []
    for text in task.corpus.texts:
        encoding = loaded.tokenizer(text.string, return_tensors="pt", return_offsets_mapping=True)
        offsets = encoding.pop("offset_mapping")[0].tolist()
        with torch.no_grad():
            states = loaded.model(**encoding, output_hidden_states=True).hidden_states[hidden][0].numpy()
        words = []
        for match in re.finditer(r"\S+", text.string[slice(*text.spans[0])]):
            start = match.start() + text.spans[0][0]
            own = [i for i, (a, b) in enumerate(offsets) if a < start + len(match[0]) and b > start and b > a]
            words.append(states[own].mean(0))
        features.append(np.mean(words, 0))
    x, y, split = np.stack(features), task.items["label"].to_numpy(), task.items["split"].to_numpy()
    train, test = split == "train", split == "test"
    x = (x - x[train].mean(0)) / x[train].std(0)
    other = LogisticRegression(C=1 / (train.sum() * l2), max_iter=5000, tol=1e-8).fit(x[train], y[train])
    log_p = np.log2(other.predict_proba(x[test])[np.arange(test.sum()), y[test]])
    shares = np.log2(np.bincount(y[train]) / train.sum())
    assert bits == pytest.approx((log_p - shares[y[test]]).mean(), abs=0.01)


@pytest.mark.parametrize("spans", [1, 2])
def test_the_family_gives_what_the_fit_gives_and_its_arrays_say_the_same(spans: int) -> None:
    train, dev = planted(200, 0, spans=spans), planted(100, 1, spans=spans)
    labels = np.stack([np.where(train[2] == 1, 2, train[2]), train[2]])  # the first has no item of class 1
    labels_dev = np.stack([np.where(dev[2] == 1, 2, dev[2]), dev[2]])
    fit, l2 = fit_edge_attention(
        *train[:2], labels, *dev[:2], labels_dev, n_classes=3, l2_grid=[0.02, 0.2], max_steps=200
    )
    family = EdgeAttention().fit(
        SpanWords(*train[:2]), labels, SpanWords(*dev[:2]), labels_dev, kind="classes", n_classes=3, l2=[0.02, 0.2],
        seed=0, device="cpu",
    )  # fmt: skip
    assert (family.l2 == l2[:, None]).all()
    for m in range(2):
        expected = fit.log_probabilities(*dev[:2], label_set=m)[:, 0]
        np.testing.assert_allclose(family.log_probabilities(SpanWords(*dev[:2]), label_set=m), expected, atol=1e-5)
    with pytest.raises(UsageError, match="fitted on words of spans"):
        family.probes[0][0].outputs(dev[0][0])


# ---------------------------------------------------------------- runs


def test_a_run_with_controls_and_its_stored_probes(small_bert: Path, tmp_path: Path, cache) -> None:
    reference = f"propbank:{propbank_folder(tmp_path / 'pb')}#roles"
    options = {"seeds": 2, "n_boot": 100, "quiet": True}
    controls = ("word-type", "random-encoder", "permuted-order", "tf-idf")
    names = ("linear", *EDGES)
    found = probe_layers(str(small_bert), [reference], probe=names, controls=controls, out=tmp_path / "run", **options)
    assert found.run["status"] == "complete", found.run["tasks"]
    scores = found.scores
    assert list(dict.fromkeys(scores["probe"])) == list(names)
    for _, own in scores.groupby("probe"):
        assert {*controls, "none", "difference:random-encoder"} <= set(own["control"])
        assert own.loc[own["metric"] == "bits", ["value", "ci_low", "ci_high"]].notna().all(axis=None)
    best = scores[(scores["metric"] == "accuracy") & (scores["control"] == "none")].groupby("probe")["value"].max()
    assert (best > 0.9).all()
    config = ProbeConfig.from_dict({k: v for k, v in found.run["config"].items() if v is not None}, where="run")
    plan = plan_probing(config)
    assert plan.done == {"pb.roles"}
    (task,) = plan.tasks
    store = extract(plan.loaded, plan.needed["pb"].texts, **extraction_options(config, plan.tasks, "pb"))
    test, items = np.flatnonzero((task.items["split"] == "test").to_numpy()), found.items("pb.roles")
    for name in names:
        rows, usable = rows_of_items(plan, task, store, family=parse_probe(name))
        stored = stored_probes(plan.out, task, plan.settings, usable=usable, site="block", pooling="mean", probe=name)
        for (control, seed, hidden), probe in stored.items():
            own = items[(items["probe"] == name) & (items["control"] == control) & (items["hidden"] == hidden)]
            states = family_states(parse_probe(name), task, store, rows[test], pooling="mean", hidden=hidden)
            _, bits = probe.scores(states, test)
            np.testing.assert_allclose(bits, own.loc[own["seed"] == seed, "bits"], atol=1e-5)
            if name == "edge-span:attention":
                assert probe.fit.parameters["attention"].shape == (2, 16)
                assert probe.fit.parameters["word_mean"].shape == probe.fit.parameters["word_scale"].shape == (16,)


def test_the_linear_probe_has_the_same_numbers_beside_edge_spans(small_bert: Path, tmp_path: Path, cache) -> None:
    options = {"controls": (), "seeds": (0,), "n_boot": 100, "quiet": True, "layers": "2"}
    both = probe_layers(str(small_bert), [cued()], probe=["linear", "edge-span"], out=tmp_path / "both", **options)
    alone = probe_layers(str(small_bert), [cued()], out=tmp_path / "alone", **options).scores
    beside = both.scores[both.scores["probe"] == "linear"].reset_index(drop=True)
    np.testing.assert_allclose(beside["value"], alone["value"], atol=1e-4)
    # Every word is one sub-word here, so that the mean of the words is that of the sub-words.
    edges = both.scores[both.scores["probe"] == "edge-span"]
    np.testing.assert_allclose(edges["value"], alone["value"], atol=1e-4)


def test_labels_of_which_a_span_has_several_are_read_from_means(small_bert: Path, tmp_path: Path, cache) -> None:
    kinds = {"dog": ["alive", "pet"], "cat": ["alive", "pet"], "river": ["water"], "stone": []}
    for split, n in (("train", 80), ("dev", 40), ("test", 40)):
        chosen = [list(kinds)[i % 4] for i in range(n)]
        json_lines(
            tmp_path / f"{split}.jsonl",
            *(edge(f"the {w} of {split} {i}", ((0, 2), kinds[w])) for i, w in enumerate(chosen)),
        )
    found = probe_layers(
        str(small_bert), [f"edges:{tmp_path}"], probe=["edge-span"], out=tmp_path / "run", controls=(), seeds=(0,),
        n_boot=100, quiet=True,
    )  # fmt: skip
    items = found.items(next(iter(found.run["tasks"])))
    right = (items["label"].astype(str) == items["prediction"].astype(str)).groupby(items["hidden"]).mean()
    assert right.max() > 0.95
    with pytest.raises(UsageError, match="no task of spans with one label each"):
        probe_layers(
            str(small_bert), [f"edges:{tmp_path}"], probe=["linear", "edge-span:attention"], out=tmp_path / "no",
            quiet=True,
        )  # fmt: skip


def test_probes_of_before_are_read_on_the_words_after_training(small_bert: Path, tmp_path: Path, cache) -> None:
    from transformers import AutoModel, AutoTokenizer

    from analysis.comparing import compare

    reference = f"propbank:{propbank_folder(tmp_path / 'pb')}#roles"
    probe_layers(
        str(small_bert), [reference], probe=EDGES, controls=(), seeds=(0,), n_boot=100, out=tmp_path / "before",
        quiet=True,
    )  # fmt: skip
    model = AutoModel.from_pretrained(small_bert)
    with torch.no_grad():
        for parameter in model.encoder.layer[1].parameters():
            parameter.mul_(1.02)
    model.save_pretrained(tmp_path / "after")
    AutoTokenizer.from_pretrained(small_bert).save_pretrained(tmp_path / "after")
    found = compare(tmp_path / "before", str(tmp_path / "after"), out=tmp_path / "out", n_boot=100, quiet=True)
    rows = found.forgetting.query("metric == 'accuracy' and hidden == 3 and control == 'none'").set_index(
        ["term", "probe"]
    )
    for term in ("pre", "transfer", "aligned"):  # a small change, and the words of before are those of after
        assert (rows.loc[term, "value"].loc[list(EDGES)] > 0.9).all(), term


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", EDGES)
@pytest.mark.parametrize(
    ("make", "what"),
    [
        (word_task, "classes of words"),
        (sentence_task, "classes of sentences"),
        (number_task, "number of words"),
        (lambda: replace(cued(), kind="number", labels=()), "number of spans"),
    ],
)
def test_other_tasks_are_refused_in_one_sentence(tmp_path: Path, name: str, make, what: str) -> None:
    with pytest.raises(UsageError, match=rf"^--probe {name} fits no probe to task .* labels are {what}\. Add linear"):
        probe_layers("no-model", [make()], probe=[name], out=tmp_path / "run", quiet=True)
    with pytest.raises(UsageError, match=rf"^--probe {name}: there is no task of (labelled )?spans.*iob:PATH#spans"):
        probe_layers("no-model", [make()], probe=["linear", name], out=tmp_path / "run", quiet=True)


def test_trees_and_arrays_and_other_spellings_are_refused(tmp_path: Path) -> None:
    from tests.test_tree_tasks import treebank

    reference = f"conllu:{treebank(tmp_path)}#tree"
    with pytest.raises(UsageError, match=r"whose labels are trees\. Add structural"):
        probe_layers("no-model", [reference], probe=["edge-span"], quiet=True)
    with pytest.raises(UsageError, match="there is no task of labelled spans"):
        probe_layers("no-model", [reference], probe=["structural:4", "edge-span"], quiet=True)
    with pytest.raises(UsageError, match="edge-span probes read every word"):
        probe_arrays(np.zeros((1, 20, 4), dtype=np.float32), np.arange(20) % 2, probe="edge-span:attention")
    for text in ("edge-span:mean", "edge-span:", "edge-span,x=1"):
        with pytest.raises(UsageError, match="write edge-span or edge-span:attention"):
            parse_probe(text)
    with pytest.raises(UsageError, match=r"Did you mean 'edge-span'\?"):
        parse_probe("edgespan")
