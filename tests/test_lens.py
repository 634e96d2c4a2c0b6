"""The lens: its maps against scikit-learn, its divergences against a naive reading, exact zeros, planted blocks."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import Ridge

from analysis import lens as lens_module
from analysis.affine import AffineFit
from analysis.lens import Lens, fit_lens, lens_scores
from analysis.retention import COLUMNS, retention_table
from analysis.retention_displays import plot_lens
from analysis.token_scores import windows
from spafit import io
from spafit.errors import ModelError, UsageError
from spafit.language_models import LanguageModel, graft
from spafit.runtime import generator
from tests.test_retention import AUTO, language, tuned
from tests.tiny import BLOCKS

NORMS = {"gpt2": "ln_f", "llama": "norm", "bert": None, "modernbert": "final_norm"}
BLOCK = {"gpt2": "h.1.", "llama": "layers.1.", "bert": "encoder.layer.1.", "modernbert": "layers.1."}


def running_text(seed: int, words: int) -> str:
    known = ["the", "cat", "dog", "sees", "a", "big", "and", "runs", "old", "dogs", "walked", "seeing", "x", "q", "."]
    return " ".join(generator(seed, "running text").choice(known, size=words))


FIT, HELD_OUT = running_text(0, 900), running_text(1, 120)


def ids(own: LanguageModel, text: str) -> list[list[int]]:
    return windows(own, text, length=20)


def naive(own: LanguageModel, texts: list[list[int]], kind: str) -> tuple[list[np.ndarray], np.ndarray]:
    """Hidden states under the final norm and last states, from transformers' own lists, one text at a time."""
    found: list[list[np.ndarray]] = [[] for _ in range(BLOCKS + 1)]
    last = []
    special = set(own.tokenizer.all_special_ids)
    for text in texts:
        blocks: list[torch.Tensor] = []
        module = own.body.get_submodule(BLOCK[kind].removesuffix("1.") + str(BLOCKS - 1))
        handle = module.register_forward_hook(
            lambda _, args, out, blocks=blocks: blocks.append(out[0] if isinstance(out, tuple) else out)
        )
        out = own.body(input_ids=torch.tensor([text]), output_hidden_states=True)
        handle.remove()
        at = list(range(len(text) - 1)) if own.kind == "causal" else [k for k, t in enumerate(text) if t not in special]
        norm = own.body.get_submodule(NORMS[kind]) if NORMS[kind] else torch.nn.Identity()
        for k, states in enumerate([*out.hidden_states[:BLOCKS], blocks[0]]):
            found[k].append(norm(states)[0, at].double().numpy())
        last.append(out[0][0, at].double().numpy())
    return [np.concatenate(f) for f in found], np.concatenate(last)


def test_a_fit_is_that_of_scikit_learn_whatever_the_pieces() -> None:
    rng = generator(0, "fit")
    x = rng.normal(size=(300, 7)) * np.array([1, 5, 0.1, 2, 1, 1, 30]) + 4
    y = x @ rng.normal(size=(7, 3)) + rng.normal(size=(300, 3)) - 2
    fit = AffineFit()
    for piece in np.array_split(np.arange(300), 7):
        fit.add(torch.as_tensor(x[piece]), torch.as_tensor(y[piece]))
    weight, bias = fit.solve(0.05)
    other = Ridge(alpha=0.05 * ((x - x.mean(0)) ** 2).sum(0).mean()).fit(x, y)
    assert weight.numpy() == pytest.approx(other.coef_.T, rel=1e-9)
    assert bias.numpy() == pytest.approx(other.intercept_, rel=1e-9)
    exact = np.linalg.lstsq(np.c_[x, np.ones(300)], y, rcond=None)[0]
    assert fit.solve(0.0)[0].numpy() == pytest.approx(exact[:-1], rel=1e-8)


@pytest.mark.parametrize("kind", list(NORMS))
def test_maps_start_under_the_final_norm_and_lead_to_what_the_head_gets(kind: str) -> None:
    own = language(kind)
    texts = ids(own, FIT)
    lens = fit_lens(own, texts)
    states, last = naive(own, texts, kind)
    assert lens.tokens == len(last)
    for hidden, x in enumerate(states):
        alpha = 1e-3 * ((x - x.mean(0)) ** 2).sum(0).mean()
        other = Ridge(alpha=alpha).fit(x, last)
        got = x @ lens.weight[hidden].double().numpy() + lens.bias[hidden].double().numpy()
        assert got == pytest.approx(other.predict(x), abs=2e-4)
    assert lens.constant.numpy() == pytest.approx(last.mean(0), abs=1e-5)


@pytest.mark.parametrize("kind", list(NORMS))
def test_divergences_are_those_of_a_naive_reading(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = language(kind)
    after = graft(own, tuned(own))
    lens = fit_lens(own, ids(own, FIT))
    texts = ids(own, HELD_OUT)
    found = lens_scores(own, after, lens, texts)
    monkeypatch.setattr(lens_module, "LOGIT_VALUES", 5 * own.model.config.vocab_size)  # five positions at a time
    monkeypatch.setattr(lens_module, "STATE_VALUES", 1)  # one text at a time
    pieces = lens_scores(own, after, lens, texts)
    for name in ("kl", "error", "constant"):
        assert getattr(pieces, name) == pytest.approx(getattr(found, name), abs=1e-5)
    assert pieces.text.tolist() == found.text.tolist()

    head = [m for m in own.model.children() if m is not own.body]

    def said(states: np.ndarray) -> torch.Tensor:
        logits = torch.as_tensor(states, dtype=torch.float32)[None]
        for module in head:
            logits = module(logits)
        return torch.log_softmax(logits[0].double(), -1)

    def kl(p: torch.Tensor, q: torch.Tensor) -> float:
        return float((p.exp() * (p - q)).sum(-1).mean()) / math.log(2)

    (old, last), (new, _) = naive(own, texts, kind), naive(after, texts, kind)
    if NORMS[kind]:  # the norm of the model before reads both
        own_norm, new_norm = (m.body.get_submodule(NORMS[kind]).state_dict() for m in (own, after))
        restored = copy.deepcopy(after.body)
        restored.get_submodule(NORMS[kind]).load_state_dict(own_norm)
        assert any(not torch.equal(a, b) for a, b in zip(own_norm.values(), new_norm.values(), strict=True))
        new, _ = naive(graft(own, restored), texts, kind)
    for hidden in range(BLOCKS + 1):
        weight, bias = lens.weight[hidden].double().numpy(), lens.bias[hidden].double().numpy()
        before_here, after_here = (said(s[hidden] @ weight + bias) for s in (old, new))
        assert found.kl[hidden].mean() == pytest.approx(kl(before_here, after_here), rel=1e-3, abs=1e-6)
        assert found.error[hidden].mean() == pytest.approx(kl(said(last), before_here), rel=1e-3, abs=1e-6)
    assert found.constant.mean() == pytest.approx(kl(said(last), said(lens.constant.numpy()[None])), rel=1e-3)
    assert found.kl.min() > -1e-6


@pytest.mark.parametrize("kind", list(AUTO))
def test_the_last_hidden_states_lens_is_the_models_own_prediction(kind: str) -> None:
    own = language(kind)
    found = lens_scores(own, own, fit_lens(own, ids(own, FIT)), ids(own, HELD_OUT))
    error = found.error.mean(1)
    assert error[-1] < 2e-3 * found.constant.mean()
    assert error[0] > 20 * error[-1]  # the others are not, so this is no property of any map
    assert (found.kl == 0).all()


@pytest.mark.parametrize("kind", list(BLOCK))
def test_hidden_states_below_the_first_changed_block_do_not_differ_at_all(kind: str) -> None:
    own = language(kind)
    body = copy.deepcopy(own.body)
    with torch.no_grad():
        for name, parameter in body.named_parameters():
            if name.startswith(BLOCK[kind]):
                parameter.mul_(1.3)
    found = lens_scores(own, graft(own, body), fit_lens(own, ids(own, FIT)), ids(own, HELD_OUT))
    assert (found.kl[:2] == 0).all()
    assert (found.kl[2:].mean(1) > 1e-4).all()


def test_a_block_that_adds_nothing_changes_no_prediction() -> None:
    own = language("gpt2")
    last = own.body.h[BLOCKS - 1]
    with torch.no_grad():
        for module in (last.attn.c_proj, last.mlp.c_proj):
            module.weight.zero_()
            module.bias.zero_()
    found = lens_scores(own, own, fit_lens(own, ids(own, FIT)), ids(own, HELD_OUT))
    assert found.error[BLOCKS - 1] == pytest.approx(found.error[BLOCKS], abs=1e-9)
    assert found.error[BLOCKS - 2].mean() > 20 * found.error[BLOCKS].mean()


def test_rows_of_a_lens_stand_in_the_table_and_survive_the_file(tmp_path: Path) -> None:
    own = language("llama")
    after = graft(own, tuned(own))
    table = retention_table(own, after, text=HELD_OUT, refit_on=FIT, lens=True, window=20, n_boot=50)
    assert list(table.columns) == list(COLUMNS)
    assert str(table["hidden"].dtype) == "Int64"
    rows = table[table["head"] == "lens"]
    assert rows[rows["measure"] == "lens_kl_bits"]["hidden"].tolist() == list(range(BLOCKS + 1))
    assert table[table["head"] != "lens"]["hidden"].isna().all()
    texts = ids(own, HELD_OUT)
    found = lens_scores(own, after, fit_lens(own, ids(own, FIT)), texts)
    kl = rows[rows["measure"] == "lens_kl_bits"]
    assert kl["value"].to_numpy() == pytest.approx(found.kl.mean(1))
    assert (kl["ci_low"] <= kl["value"]).all()
    assert (kl["value"] <= kl["ci_high"]).all()
    assert (kl["n"] == sum(len(t) - 1 for t in texts)).all()
    blank = rows[rows["hidden"].isna()]
    assert blank["value"].tolist() == pytest.approx([found.constant.mean()])
    io.write_table(tmp_path / "retention", table)
    pd.testing.assert_frame_equal(io.read_table(tmp_path / "retention"), table)
    plain = retention_table(own, after, text=HELD_OUT, refit_on=FIT, window=20, n_boot=50)
    pd.testing.assert_frame_equal(plain, table[table["head"] != "lens"])

    ax = plot_lens(table)
    drawn = {str(line.get_label()): np.asarray(line.get_ydata(), dtype=float) for line in ax.lines}
    assert any(len(y) == BLOCKS + 1 and y == pytest.approx(kl["value"].to_numpy()) for y in drawn.values())
    assert len(drawn) == 3
    with pytest.raises(UsageError, match="no rows of a lens"):
        plot_lens(plain)


def test_bad_input_is_one_sentence() -> None:
    own = language("llama")
    with pytest.raises(UsageError, match="fitted on refit_on and read on text"):
        retention_table(own, own, text=HELD_OUT, lens=True)
    with pytest.raises(UsageError, match="A lens of width 16 needs at least 32 tokens"):
        fit_lens(own, ids(own, "the cat sees"))
    lens = fit_lens(own, ids(own, FIT))
    assert isinstance(lens, Lens)
    shorter = LanguageModel(copy.copy(own.model), own.tokenizer, "causal", "shorter")
    body = copy.deepcopy(own.body)
    body.layers = body.layers[:2]
    shorter.model._modules = {**own.model._modules, "model": body}
    with pytest.raises(ModelError, match="4 hidden states and shorter 3"):
        lens_scores(own, shorter, lens, ids(own, HELD_OUT))
