"""The language model's own ability: against transformers' losses and naive loops; grafting; exact zeros."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from analysis import token_scores
from analysis.retention import pair_scores, perplexities, refit_head, retention_table
from analysis.token_scores import encode_sentences, score, windows
from analysis.token_trees import one_text, pack, visible
from spafit.data.blimp import read_blimp
from spafit.errors import DataError, ModelError, UsageError
from spafit.language_models import LanguageModel, graft, load_language_model
from tests.paths import SHARED, needs_shared
from tests.tiny import save_tiny, tiny, tiny_tokenizer

TEXT = " ".join(["the cat sees a big dog and the dog runs", "a big cat walked and dogs see the cat"] * 8)
# fmt: off
AUTO = {"bert": "AutoModelForMaskedLM", "roberta": "AutoModelForMaskedLM", "distilbert": "AutoModelForMaskedLM",
        "modernbert": "AutoModelForMaskedLM", "gpt2": "AutoModelForCausalLM", "llama": "AutoModelForCausalLM"}
# fmt: on
CAUSAL = ("gpt2", "llama")


def language(kind: str) -> LanguageModel:
    model = tiny(kind, auto=AUTO[kind]).eval().requires_grad_(False)
    tokenizer = tiny_tokenizer(decoder=kind in CAUSAL)
    return LanguageModel(model, tokenizer, "causal" if kind in CAUSAL else "masked", kind)


def tuned(original: LanguageModel, by: float = 0.05) -> torch.nn.Module:
    """A copy of the body with other weights."""
    body = copy.deepcopy(getattr(original.model, original.model.base_model_prefix))
    with torch.no_grad():
        for i, parameter in enumerate(body.parameters()):
            parameter.add_(by * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    return body


@pytest.mark.parametrize("kind", CAUSAL)
def test_causal_bits_are_transformers_own_loss(kind: str) -> None:
    own = language(kind)
    texts = windows(own, TEXT, length=20)
    found = score(own, texts)
    losses = []
    for ids in texts:
        batch = torch.tensor([ids])
        losses.append(float(own.model(input_ids=batch, labels=batch).loss) * (len(ids) - 1))
    assert found.log_p.sum() == pytest.approx(-sum(losses), rel=1e-5)
    assert len(found.log_p) == sum(len(t) - 1 for t in texts)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_perplexity_of_each_text_is_that_of_its_tokens(kind: str) -> None:
    own = language(kind)
    texts = ["the cat sees a dog", "dogs walked and the big cat runs", "the cat sees a dog"]
    found = perplexities(own, texts)
    scored = score(own, encode_sentences(own, texts))
    wanted = [math.exp(-scored.log_p[scored.text == i].mean()) for i in range(3)]
    np.testing.assert_allclose(found, wanted)
    assert found[0] == pytest.approx(found[2])
    assert found[0] != pytest.approx(found[1])
    with pytest.raises(UsageError, match="No texts"):
        perplexities(own, [])


def by_itself(own: LanguageModel, ids: list[int]) -> list[float]:
    """Log-probability of each token but the first, from a pass of this text alone."""
    log_p = torch.log_softmax(own.model(input_ids=torch.tensor([ids])).logits[0].double(), -1)
    return [float(log_p[k, token]) for k, token in enumerate(ids[1:])]


#: One beginning with three ends, a text twice, a text that begins another, no common word, and one token alone.
ALIKE = [[1, 5, 6, 7, 8], [1, 5, 6, 9], [1, 5, 7], [2, 5, 6, 7], [1, 5, 6, 7, 8], [1, 5, 6], [3], [9, 8, 7, 6, 5, 4, 3]]


def test_rows_hold_every_text_and_what_texts_share_once() -> None:
    long = list(range(20))
    rows = list(pack([*ALIKE, long], size=18))
    for tree in rows:
        for number, path in tree.paths:
            assert [tree.ids[k] for k in path] == [*ALIKE, long][number]
            assert [tree.parents[k] for k in path] == [-1, *path[:-1]]
            sees, position = visible(tree.parents)
            assert np.flatnonzero(sees[path[-1]]).tolist() == sorted(path)
            assert position[list(path)].tolist() == list(range(len(path)))
    assert sorted(number for tree in rows for number, _ in tree.paths) == list(range(9))
    beginnings = {tuple(t[: k + 1]) for t in ALIKE for k in range(len(t))}
    assert sorted(len(tree.ids) for tree in rows) == [7, len(beginnings) - 7, 20]  # the text of 7 needs a new row
    assert all(len(tree.ids) <= 18 or len(tree.paths) == 1 for tree in rows)
    sees, position = visible(one_text(0, [4, 4, 4]).parents)
    assert np.array_equal(sees, np.tri(3, dtype=bool))
    assert position.tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_texts_in_shared_rows_score_as_each_by_itself(kind: str, attention: str, monkeypatch: Any) -> None:
    own = language(kind)
    own.model.set_attn_implementation(attention)
    monkeypatch.setattr(token_scores, "ROW_TOKENS", 18)
    widths: list[int] = []  # tokens of each pass
    own.model.get_input_embeddings().register_forward_hook(lambda _, args, output: widths.append(args[0].numel()))
    texts = [*ALIKE, [1, 5, 6, 7, 8, 9, 2, 3, 4] * 3]
    got = score(own, texts)
    assert got.text.tolist() == [i for i, t in enumerate(texts) for _ in t[1:]]
    assert widths[-2:] == [27, 24]  # the long text, and two rows of 12 and 7 tokens in place of seven of up to 7
    assert got.log_p == pytest.approx([p for t in texts for p in by_itself(own, t)], rel=1e-5)
    sums = got.sums(len(texts))
    assert sums[0] == sums[4]  # equal texts tie exactly
    assert sums[6] == 0


def test_a_model_that_ignores_masks_or_positions_gets_no_shared_rows(monkeypatch: Any) -> None:
    """Negative control: with such a model shared rows would be wrong, and are found to be."""
    for lost in ("attention_mask", "position_ids"):
        own = language("gpt2")
        body = own.body
        plain = type(body).forward

        def forward(self: Any, *args: Any, lost: str = lost, plain: Any = plain, **kwargs: Any) -> Any:
            if kwargs.get("position_ids") is not None:
                kwargs[lost] = None
            return plain(self, *args, **kwargs)

        monkeypatch.setattr(body, "forward", forward.__get__(body))
        got = score(own, ALIKE)
        assert got.log_p == pytest.approx([p for t in ALIKE for p in by_itself(own, t)], rel=1e-5)
        monkeypatch.setattr(torch, "allclose", lambda *_, **__: True)
        wrong = score(own, ALIKE)
        monkeypatch.undo()
        assert np.abs(wrong.log_p - got.log_p).max() > 1e-4


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "modernbert"])
def test_pseudo_log_likelihood_is_that_of_a_loop_over_positions(kind: str) -> None:
    own = language(kind)
    texts = encode_sentences(own, ["the cat sees a big dog", "dogs walked"])
    got = score(own, texts).sums(2)
    special = set(own.tokenizer.all_special_ids)
    for ids, value in zip(texts, got, strict=True):
        total = 0.0
        for k, token in enumerate(ids):
            if token in special:
                continue
            masked = torch.tensor([[*ids[:k], own.tokenizer.mask_token_id, *ids[k + 1 :]]])
            total += float(torch.log_softmax(own.model(input_ids=masked).logits[0, k].double(), -1)[token])
        assert value == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_equal_models_differ_by_exactly_nothing(kind: str) -> None:
    own = language(kind)
    pairs = pd.DataFrame({"field": "syntax", "paradigm": ["x", "x", "y"], "good": ["the cat", "a dog", "dogs ran"],
                          "bad": ["cat the", "dog a", "ran dogs"]})  # fmt: skip
    table = retention_table(own, own, text=TEXT, pairs=pairs, window=20, n_boot=50)
    difference = table[table["side"] == "difference"]
    assert (difference[["value", "ci_low", "ci_high"]] == 0).all(axis=None)
    assert set(table["measure"]) == {"bits_per_token", "perplexity", "kl_bits", "blimp_accuracy"}


def test_kl_is_that_of_the_two_distributions() -> None:
    own = language("llama")
    other = graft(own, tuned(own))
    texts = windows(own, TEXT, length=20)
    got = score(other, texts, reference=own).kl
    assert got is not None
    expected = []
    for ids in texts:
        p, q = (
            torch.log_softmax(m.model(input_ids=torch.tensor([ids])).logits[0, :-1].double(), -1) for m in (own, other)
        )
        expected.append((p.exp() * (p - q)).sum(-1) / math.log(2))
    assert got.sum() == pytest.approx(float(torch.cat(expected).sum()), rel=1e-4)
    assert got.min() > -1e-6


@pytest.mark.parametrize("kind", list(AUTO))
def test_a_grafted_head_is_the_original_one_and_tied_to_nothing(kind: str) -> None:
    own = language(kind)
    inputs = {"input_ids": torch.tensor(windows(own, TEXT, length=12)[:2])}
    prefix = own.model.base_model_prefix
    body = copy.deepcopy(getattr(own.model, prefix))
    before = own.model(**inputs).logits
    grafted = graft(own, body)
    assert torch.equal(grafted.model(**inputs).logits, before)
    head = grafted.model.get_output_embeddings().weight
    kept = head.clone()
    with torch.no_grad():
        body.get_input_embeddings().weight.add_(1.0)
    assert torch.equal(head, kept)
    assert torch.equal(own.model(**inputs).logits, before)
    assert not torch.equal(grafted.model(**inputs).logits, before)
    if own.model.config.tie_word_embeddings:  # what transformers itself does: the head follows the embeddings
        tied = copy.deepcopy(own.model)
        with torch.no_grad():
            tied.get_input_embeddings().weight.add_(1.0)
        assert not torch.equal(tied.get_output_embeddings().weight, kept)


def test_a_refitted_head_undoes_a_rotation_that_the_original_one_cannot_read() -> None:
    own = language("gpt2")
    width = own.model.config.hidden_size
    q = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(0)))[0]

    class Rotated(type(own.model.transformer)):  # type: ignore[misc]
        def forward(self, *args: object, **kwargs: object) -> object:
            outputs = super().forward(*args, **kwargs)
            outputs["last_hidden_state"] = outputs[0] @ q
            return outputs

    body = copy.deepcopy(own.model.transformer)
    body.__class__ = Rotated
    after = LanguageModel(copy.copy(own.model), own.tokenizer, "causal", "rotated")
    after.model._modules = {**own.model._modules, "transformer": body}
    other = " ".join(["big dogs see the cat and a cat walked", "the dog sees dogs"] * 12)
    table = retention_table(own, after, text=TEXT, refit_on=other, window=20, n_boot=50)
    wide = table[(table["measure"] == "kl_bits")].set_index("head")["value"]
    assert wide["original"] > 0.01
    assert wide["refitted"] < 0.02 * wide["original"]
    with pytest.raises(UsageError, match="at least"):
        refit_head(own, after, "the cat sees")


def test_pairs_count_ties_half_and_give_every_paradigm_one_vote() -> None:
    own = language("llama")
    pairs = pd.DataFrame({"field": ["a", "a", "a", "b"], "paradigm": ["p", "p", "p", "q"],
                          "good": ["the cat sees", "dogs walked", "a big dog", "the cat"],
                          "bad": ["sees the cat", "dogs walked", "dog big a", "cat the"]})  # fmt: skip
    got = pair_scores(own, pairs)
    assert got[1] == 0.5
    table = retention_table(own, own, pairs=pairs, n_boot=50)
    overall = table[(table["field"] == "all") & (table["side"] == "before")]["value"].iloc[0]
    assert overall == pytest.approx((got[:3].mean() + got[3]) / 2)


def test_blimp_files_are_read_and_bad_lines_named(tmp_path: Path) -> None:
    good = {"sentence_good": "a b", "sentence_bad": "b a", "field": "syntax", "linguistics_term": "t", "UID": "p"}
    (tmp_path / "p.jsonl").write_text("\n".join([json.dumps(good)] * 3))
    table = read_blimp(tmp_path, pairs=2)
    assert len(table) == 2
    assert table["good"].iloc[0] == "a b"
    (tmp_path / "q.jsonl").write_text(json.dumps(good) + '\n{"sentence_good": "a"}\n')
    with pytest.raises(DataError, match=r"q\.jsonl, line 2"):
        read_blimp(tmp_path)
    with pytest.raises(DataError, match="no BLiMP files"):
        read_blimp(tmp_path / "none")


@needs_shared
def test_all_of_blimp_is_there() -> None:
    table = read_blimp(SHARED / "blimp", pairs=1)
    assert table["paradigm"].nunique() == 67
    assert set(table["field"]) == {"morphology", "syntax", "semantics", "syntax_semantics"}


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    own = language("llama")
    with pytest.raises(UsageError, match="running text, minimal pairs"):
        retention_table(own, own)
    with pytest.raises(UsageError, match="differ in kind or tokenizer"):
        retention_table(own, language("bert"), text=TEXT)
    with pytest.raises(ModelError, match="a BertModel and the original head belongs to a LlamaModel"):
        graft(own, tiny("bert"))
    save_tiny("bert", tmp_path / "bert")
    with pytest.raises(ModelError, match="without a language-model head"):
        load_language_model(tmp_path / "bert")
    save_tiny("llama", tmp_path / "llama", auto="AutoModelForCausalLM")
    loaded = load_language_model(tmp_path / "llama")
    assert loaded.kind == "causal"
    assert np.isfinite(score(loaded, windows(loaded, TEXT, length=20)).log_p).all()
