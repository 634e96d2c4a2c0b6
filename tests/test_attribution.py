"""Conductance: the law at every cut, captum's own loop, a planted use, and the gate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from analysis.attribution import COLUMNS, conductance, item_conductance
from spafit.errors import ModelError, UsageError
from tests.tiny import tiny

IDS = [2, 5, 6, 7, 8, 3]
KINDS = ("bert", "gpt2", "llama")


def classifier(kind: str, **changes: Any) -> Any:
    model = tiny(kind, auto="AutoModelForSequenceClassification", **changes).eval()
    if kind == "gpt2":
        with pytest.raises(ModelError, match="pad_token_id"):
            item_conductance(model, IDS)
        model.config.pad_token_id = 0
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_every_residual_cut_passes_the_whole_change(kind: str) -> None:
    model = classifier(kind)
    found = item_conductance(model, IDS, baseline_id=4, keep={2, 3}, target=1, steps=128)
    assert abs(found.change) > 1e-4
    for block in range(3):
        assert found.values["residual", block].sum() == pytest.approx(found.change, rel=0.02)
    branches = [found.values[b, k].sum() for b in ("attention", "feed-forward") for k in range(3)]
    assert len({round(float(b), 9) for b in branches}) == 6


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_one_pass_equals_captum_s_loop_over_layers(kind: str) -> None:
    captum = pytest.importorskip("captum.attr")
    from captum.attr._utils.approximation_methods import approximation_parameters

    from spafit.layout import join_path
    from spafit.stacks import find_stacks

    model = classifier(kind)
    steps, tokens = 12, torch.tensor([IDS])
    with torch.no_grad():
        real = model.get_input_embeddings()(tokens)
        start = model.get_input_embeddings()(torch.full_like(tokens, 4))
        fixed = torch.isin(tokens, torch.tensor([2, 3]))[..., None]
        start = torch.where(fixed, real, start)
    alphas = approximation_parameters("gausslegendre")[1](steps + 1)
    ours = item_conductance(model, IDS, baseline_id=4, keep={2, 3}, target=0, rule="left", alphas=alphas)
    stack = find_stacks(model)[0]
    for block in range(3):
        for branch, sub in (("attention", stack.attention_branch), ("feed-forward", stack.feed_forward_branch)):
            layer = model.get_submodule(join_path(stack.block_paths[block], sub or ""))
            method = captum.LayerConductance(lambda e: model(inputs_embeds=e).logits, layer)
            expected = method.attribute(real, start, target=0, n_steps=steps)
            expected = expected[0] if isinstance(expected, tuple) else expected
            scale = np.abs(ours.values[branch, block]).max()
            assert np.allclose(ours.values[branch, block], expected[0].detach().numpy(), atol=1e-6 * max(1.0, scale))


def test_a_branch_that_adds_nothing_conducts_nothing() -> None:
    model = classifier("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    table = conductance(model, [IDS, IDS[:4]], baseline_id=4, keep={2}, steps=64, n_boot=50)
    assert list(table) == list(COLUMNS)
    own = table[table["statistic"] == "abs_sum"].set_index(["branch", "block"])["value"]
    assert own["feed-forward", 1] == 0
    assert own["feed-forward", 0] > 0
    assert own["attention", 1] > 0


def test_items_that_do_not_converge_are_left_out_and_counted() -> None:
    model = classifier("bert")
    strict = conductance(model, [IDS], baseline_id=4, steps=2, most_steps=4, tolerance=1e-9, n_boot=50)
    assert strict.empty
    both = conductance(model, [IDS, [2, 9, 3]], baseline_id=4, keep={2, 3}, steps=2, most_steps=512, n_boot=50)
    assert (both["n"] + both["n_failed"] == 2).all()
    assert (both["n"] >= 1).all()


def test_modes_are_restored_and_the_mean_is_a_baseline_too() -> None:
    model = classifier("bert").train()
    found = item_conductance(model, IDS, steps=16)
    assert model.training
    assert np.isfinite(found.change)


def test_bad_input_is_one_sentence() -> None:
    with pytest.raises(UsageError, match="one target for each"):
        conductance(classifier("bert"), [IDS], targets=[0, 1])
    with pytest.raises(ModelError, match="share weights"):
        conductance(classifier("albert"), [IDS])

    class Cut(type(classifier("bert"))):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                return super().forward(*args, **kwargs)

    model = classifier("bert")
    model.__class__ = Cut
    with pytest.raises(ModelError, match="gives no gradient"):
        conductance(model, [IDS])
