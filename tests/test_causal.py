"""Interventions on blocks: exact ends, planted causes, no copies, and the arithmetic of interactions."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from analysis.causal import effect, erased, exchanged, marginals, resampled, shapley_values, skipped, windows
from analysis.erasure import fit_leace
from spafit.errors import ModelError, UsageError
from spafit.stacks import find_stacks
from tests.tiny import tiny

KINDS = {"bert": "AutoModelForSequenceClassification", "gpt2": "AutoModel", "llama": "AutoModel"}
IDS = torch.tensor([[2, 5, 6, 7, 8], [2, 9, 5, 6, 3], [2, 7, 7, 9, 4]])


def pair(kind: str, touched: str = "") -> tuple[Any, Any]:
    """A model and a tuned copy; only parameters whose name holds ``touched`` differ."""
    before = tiny(kind, auto=KINDS[kind]).eval().requires_grad_(False)
    after = copy.deepcopy(before)
    for i, (name, parameter) in enumerate(after.named_parameters()):
        if touched in name:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    return before, after


def output(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result = model(input_ids=IDS, **({} if "bert" in type(model).__name__.lower() else {"use_cache": False}))
    return (result.logits if hasattr(result, "logits") else result[0]).clone()


def score(model: Any) -> float:
    return float(output(model).double().pow(2).sum())


@pytest.mark.parametrize("kind", list(KINDS))
def test_reverting_all_is_the_base_and_none_is_the_tuned_model_to_the_bit(kind: str) -> None:
    before, after = pair(kind)
    tuned, base = output(after), output(before)
    assert not torch.equal(tuned, base)
    with exchanged(after, before, range(3), outside=True):
        assert torch.equal(output(after), base)
    with exchanged(after, before, []):
        assert torch.equal(output(after), tuned)
    assert torch.equal(output(after), tuned)
    with exchanged(before, after, range(3), outside=True):
        assert torch.equal(output(before), tuned)
    assert torch.equal(output(before), base)


def test_the_blocks_are_looked_for_once_and_again_where_the_model_is_built_otherwise(monkeypatch: Any) -> None:
    before, after = pair("bert")
    looked: list[Any] = []

    def counted(model: Any) -> Any:
        looked.append(model)
        return find_stacks(model)

    monkeypatch.setattr("spafit.stacks.find_stacks", counted)
    for _ in range(3):
        with exchanged(after, before, [1]):
            pass
    assert looked == [after, before]
    layers = after.get_submodule("bert.encoder.layer")
    del layers[2]
    with pytest.raises(ModelError, match=r"2 blocks and a .* of 3"), exchanged(after, before, [1]):
        pass
    assert looked == [after, before, after]
    gone = weakref.ref(before), weakref.ref(after)
    del before, after, layers
    looked.clear()
    gc.collect()
    assert [ref() for ref in gone] == [None, None]  # nothing keeps a model alive


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_tied_head_is_reverted_with_the_embeddings(kind: str) -> None:
    before = tiny(kind, auto="AutoModelForCausalLM", tie_word_embeddings=True).eval().requires_grad_(False)
    after = copy.deepcopy(before)
    assert after.get_output_embeddings().weight is after.get_input_embeddings().weight
    after.get_input_embeddings().weight.add_(0.3)
    assert not torch.equal(output(after), output(before))
    with exchanged(after, before, range(3), outside=True):
        assert torch.equal(output(after), output(before))
    assert after.get_output_embeddings().weight is after.get_input_embeddings().weight


def test_models_are_restored_after_an_error_and_nothing_is_copied() -> None:
    before, after = pair("bert")
    pointers = {n: p.data_ptr() for n, p in after.named_parameters()}
    own = dict(before.named_parameters())

    def broken(model: Any) -> float:
        shared = [n for n, p in model.named_parameters() if p.data_ptr() == own[n].data_ptr()]
        if shared:  # not on the first call, which is without an intervention
            assert all(".layer.1." in n for n in shared)
            raise RuntimeError("metric")
        return 0.0

    with pytest.raises(RuntimeError, match="metric"):
        effect(before, after, intervention="revert", blocks=[(1, 2)], metric=broken)
    assert {n: p.data_ptr() for n, p in after.named_parameters()} == pointers


@pytest.mark.parametrize("kind", list(KINDS))
def test_only_the_block_that_was_tuned_has_an_effect(kind: str) -> None:
    before, after = pair(kind, {"bert": "layer.1.", "gpt2": "h.1.", "llama": "layers.1."}[kind])
    table = effect(before, after, intervention="revert", blocks=windows(3, "single"), metric=score)
    assert table["effect"].iloc[[0, 2]].tolist() == [0.0, 0.0]
    assert table["effect"].iloc[1] == pytest.approx(score(before) - score(after))
    moved = effect(before, after, intervention="transplant", blocks=windows(3, "single"), metric=score)
    assert moved["effect"].iloc[1] == pytest.approx(score(after) - score(before))
    prefixes = effect(before, after, intervention="revert", blocks=windows(3, "prefix"), metric=score)
    assert prefixes["effect"].tolist() == pytest.approx([0.0, table["effect"].iloc[1], table["effect"].iloc[1]])


def test_attention_and_feed_forward_together_are_the_block() -> None:
    before, after = pair("bert", "layer.1.")
    with exchanged(after, before, [1], part="attention"), exchanged(after, before, [1], part="feed-forward"):
        assert torch.equal(output(after), output(before))
    with exchanged(after, before, [1], part="attention"):
        assert not torch.equal(output(after), output(before))


def test_interpolation_ends_at_both_models() -> None:
    before, after = pair("bert")
    ends = [
        effect(before, after, intervention="interpolate", blocks=[(0, 3)], metric=score, share=s)
        for s in (0.0, 0.5, 1.0)
    ]
    reverted = effect(before, after, intervention="revert", blocks=[(0, 3)], metric=score)
    assert ends[0]["effect"].iloc[0] == 0.0
    assert ends[2]["value"].iloc[0] == reverted["value"].iloc[0]
    assert ends[1]["value"].iloc[0] not in (ends[0]["value"].iloc[0], ends[2]["value"].iloc[0])


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_skipping_a_block_is_a_model_without_it(kind: str) -> None:
    before, after = pair(kind)
    with skipped(after, [1]):
        got = output(after)
    shorter = copy.deepcopy(after)
    stack = shorter.bert.encoder.layer if kind == "bert" else shorter.layers
    del stack[1]
    shorter.config.num_hidden_layers = 2
    assert torch.equal(got, output(shorter))
    with skipped(after, [0, 1, 2], part="attention"):
        assert not torch.equal(output(after), got)
    del before


def test_resampled_branches_come_from_other_items_and_seeds_differ() -> None:
    _, after = pair("llama")
    plain = output(after)
    with resampled(after, [1], seed=0):
        first = output(after)
    with resampled(after, [1], seed=0):
        assert torch.equal(output(after), first)
    assert not torch.equal(first, plain)
    alike = IDS[:1].repeat(3, 1)
    with torch.no_grad():
        expected = after(input_ids=alike)[0]
        with resampled(after, [0, 1, 2], seed=3):
            got = after(input_ids=alike)[0]
    assert torch.allclose(got, expected, atol=1e-6)  # equal items have nothing to swap


def test_an_erased_property_is_gone_from_there_on() -> None:
    _, model = pair("llama")
    rng = np.random.default_rng(0)
    ids = torch.as_tensor(rng.integers(2, 40, (400, 5)))
    labels = (ids[:, -1].numpy() % 2).astype(int)

    def states() -> np.ndarray:
        with torch.no_grad():
            found = model(input_ids=ids, output_hidden_states=True)
        return found.hidden_states[2][:, -1].numpy()

    eraser = fit_leace(states(), labels)
    seen = []
    block = model.layers[1]
    with erased(model, 2, eraser):
        hook = block.register_forward_hook(lambda _, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
        with torch.no_grad():
            model(input_ids=ids)
        hook.remove()
    left = seen[0][:, -1].numpy().astype(np.float64)
    gap = left[labels == 1].mean(0) - left[labels == 0].mean(0)
    assert np.abs(gap).max() < 1e-4 * np.abs(left).max()
    with pytest.raises(UsageError, match="hidden must be from 1"), erased(model, 0, eraser):
        pass


# ---------------------------------------------------------------- interaction


def test_shapley_values_of_an_additive_game_are_its_terms_and_of_a_pair_its_halves() -> None:
    terms = [0.5, -1.0, 2.0, 0.25]
    additive = shapley_values(lambda s: sum(terms[k] for k in s) + 7, 4)
    assert additive["value"].tolist() == pytest.approx(terms)
    both = shapley_values(lambda s: float({0, 1} <= s), 3)
    assert both["value"].tolist() == pytest.approx([0.5, 0.5, 0.0])
    rng = np.random.default_rng(0)
    game = {frozenset(s): rng.random() for n in range(6) for s in itertools.combinations(range(5), n)}
    exact = shapley_values(game.__getitem__, 5)
    total = game[frozenset(range(5))] - game[frozenset()]
    assert exact["value"].sum() == pytest.approx(total)
    sampled = shapley_values(game.__getitem__, 5, permutations=400, seed=1)
    assert sampled["value"].sum() == pytest.approx(total)
    assert (np.abs(sampled["value"] - exact["value"]) < 5 * sampled["standard_error"]).all()
    with pytest.raises(UsageError, match="too many subsets"):
        shapley_values(lambda s: 0.0, 13)


def test_marginals_tell_blocks_that_stand_in_for_each_other() -> None:
    table = marginals(lambda s: float(len(s & {0, 1}) == 2), 3)
    assert table["first"].tolist() == [0, 0, 0]
    assert table["last"].tolist() == [1, 1, 0]
    assert table["interaction"].tolist() == [1, 1, 0]


def test_bad_input_is_one_sentence() -> None:
    before, after = pair("bert")
    with pytest.raises(UsageError, match="Did you mean 'revert'"):
        effect(before, after, intervention="reverted", blocks=[(0, 1)], metric=score)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="not within"):
        effect(before, after, intervention="revert", blocks=[(2, 4)], metric=score)
    with pytest.raises(ModelError, match="not built alike"):
        effect(before, tiny("llama"), intervention="revert", blocks=[(0, 1)], metric=score)
    with pytest.raises(ModelError, match="share their weights"):
        effect(tiny("albert"), tiny("albert"), intervention="revert", blocks=[(0, 1)], metric=score)
