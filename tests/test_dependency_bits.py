"""Bits by dependency distance: of tokens against transformers' own loss, of tables against planted curves."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from analysis.dependency_bits import dependency_bits, distance_table
from spafit.data.conllu import Sentence, read_sentences
from spafit.errors import DataError, UsageError
from spafit.language_models import LanguageModel
from tests.paths import SHARED, needs_shared
from tests.tiny import tiny, tiny_tokenizer

FILE = """\
1	The	the	DET	_	_	3	det	_	_
2	old	old	ADJ	_	_	3	amod	_	_
3	cats	cat	NOUN	_	_	5	nsubj	_	_
4-5	don't	_	_	_	_	_	_	_	SpaceAfter=No
4	do	do	AUX	_	_	5	aux	_	_
5	n't	not	PART	_	_	0	root	_	_
6	.	.	PUNCT	_	_	5	punct	_	_

1	dogs	dog	NOUN	_	_	0	root	_	_
2	running	run	VERB	_	_	1	acl	_	_

"""


@pytest.fixture
def sentences(tmp_path: Path) -> list[Sentence]:
    (tmp_path / "t.conllu").write_text(FILE)
    return list(read_sentences(tmp_path / "t.conllu"))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_tokens_have_their_words_and_the_models_own_bits(kind: str, sentences: list[Sentence]) -> None:
    causal = kind != "bert"
    model = tiny(kind, auto="AutoModelForCausalLM" if causal else "AutoModelForMaskedLM")
    tokenizer = tiny_tokenizer(decoder=causal)
    found = dependency_bits(LanguageModel(model, tokenizer, "causal" if causal else "masked", kind), sentences)
    first = 1 if causal else 0  # the first token of a text is not predicted where nothing stands before it
    # the old cat ##s d ##o ##n ' t .   dog ##s r ##u ##n ##n ##ing   (d, o | n, ', t)
    by_hand = [[0, 1, 2, 2, 3, 3, 4, 4, 4, 5], [0, 0, 1, 1, 1, 1, 1]]
    away = [[2, 1, 2, 1, 0, -1], [0, -1]]
    for i, sentence in enumerate(sentences):
        own = found[found["sentence"] == i]
        ids = tokenizer(sentence.text(), add_special_tokens=False)["input_ids"]
        assert own["word"].tolist() == by_hand[i][first:]
        assert own["distance"].tolist() == [away[i][word] for word in by_hand[i][first:]]
        assert own["relation"].tolist() == [sentence.deprels[word] for word in by_hand[i][first:]]
        if causal:
            batch = torch.tensor([ids])
            loss = float(model(input_ids=batch, labels=batch).loss) * (len(ids) - 1)
            assert own["bits"].sum() == pytest.approx(loss / math.log(2), rel=1e-4)


def test_a_planted_curve_comes_back_and_a_flat_one_is_flat() -> None:
    draw = np.random.default_rng(0)
    groups = np.repeat(np.arange(400), 10)
    distance = draw.choice([-12, -7, -4, -3, -2, -1, 0, 1, 2, 5], size=4000)
    noise = draw.normal(size=4000) + draw.normal(size=400)[groups]
    planted = 2 + 0.5 * np.log2(1 + np.abs(distance)) * (distance < 0)
    table = distance_table(planted + noise, distance, groups).set_index(["direction", "distance"])
    assert set(table.index.get_level_values("distance")) == {"all", "root", "1", "2", "3", "4-5", "6-9", "10+"}
    for name, away in (("1", 1), ("2", 2), ("3", 3), ("4-5", 4), ("6-9", 7), ("10+", 12)):
        row = table.loc[("left", name)]
        assert row["n"] == (distance == -away).sum()
        assert row["value"] == pytest.approx((planted + noise)[distance == -away].mean())
        assert row["ci_low"] < 2 + 0.5 * math.log2(1 + away) < row["ci_high"]
    assert table.loc[("right", "4-5")]["value"] == pytest.approx((planted + noise)[distance == 5].mean())
    assert ("right", "10+") not in table.index
    assert table.loc[("either", "all")]["n"] == 4000
    # of two models that differ by noise alone, the paired difference is zero within its interval
    other = planted + noise + draw.normal(scale=0.1, size=4000)
    flat = distance_table(other - planted - noise, distance, groups)
    assert ((flat["ci_low"] < 0.02) & (flat["ci_high"] > -0.02)).all()
    assert (flat["ci_high"] - flat["ci_low"]).max() < 0.1


def test_the_interval_is_that_of_the_ratio_over_sentences() -> None:
    """Where every sentence has as many tokens in a class, the standard error is that of the sentences' means."""
    draw = np.random.default_rng(1)
    means = draw.normal(size=200)
    groups, distance = np.repeat(np.arange(200), 4), np.tile([1, 1, -1, -1], 200)
    table = distance_table(np.repeat(means, 4), distance, groups, n_boot=4000)
    error = means.std(ddof=1) / math.sqrt(200)
    for row in table.itertuples():
        assert (row.ci_high - row.ci_low) / (2 * 1.96) == pytest.approx(error, rel=0.06)


def test_what_cannot_be_scored_is_refused_in_a_sentence(sentences: list[Sentence], tmp_path: Path) -> None:
    own = LanguageModel(tiny("gpt2", auto="AutoModelForCausalLM"), tiny_tokenizer(decoder=True), "causal", "gpt2")
    with pytest.raises(UsageError, match="No sentences"):
        dependency_bits(own, [])
    (tmp_path / "t.conllu").write_text(FILE.replace("\t0\troot", "\t_\t_", 1))
    with pytest.raises(DataError, match="has a word without a head"):
        dependency_bits(own, list(read_sentences(tmp_path / "t.conllu")))
    with pytest.raises(UsageError, match=r"shapes \(2,\) and \(3,\)"):
        distance_table(np.ones(2), np.ones(3), [0, 0])


@needs_shared
def test_every_letter_of_the_treebank_has_its_word() -> None:
    from analysis.dependency_bits import _word_at

    for sentence in read_sentences(SHARED / "ud/UD_English-EWT/en_ewt-ud-test.conllu"):
        text, at = sentence.text(), _word_at(sentence)
        for k, word in enumerate(sentence.words):
            letters = "".join(c for c, owner in zip(text, at, strict=False) if owner == k)
            assert letters.rstrip(" ") == word
