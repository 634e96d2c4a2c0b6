"""Biases added to blocks that have none: exactly they train, they are biases, and the folder loads with plain PEFT."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoTokenizer

from spafit.adapt import apply_strata, canonical_parameters, plan_for
from spafit.checkpoint import WEIGHTS_FILE, load, save
from spafit.errors import ConfigError, ModelError
from spafit.strata import LoraOptions, Outside, StrataConfig, Stratum
from tests.tiny import BLOCKS, INNER, WIDTH, tiny, tiny_inputs, tiny_tokenizer

#: Outputs of Llama's linear maps: 2 heads of 8, one of them for keys and values.
OUTPUTS = {"q_proj": WIDTH, "k_proj": WIDTH // 2, "v_proj": WIDTH // 2, "o_proj": WIDTH,
           "gate_proj": INNER, "up_proj": INNER, "down_proj": WIDTH}  # fmt: skip
INPUTS = {**dict.fromkeys(OUTPUTS, WIDTH), "down_proj": INNER}
ROLE = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "attention_output": "o_proj", "output": "down_proj"}
MODULE = {"q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn"}


def llama():
    return tiny("llama", auto="AutoModelForCausalLM")


def config(*strata: Stratum) -> StrataConfig:
    return StrataConfig("tiny", {"decoder": BLOCKS}, strata, Outside(pooler="freeze", head="freeze"))


def path(block: int, layer: str) -> str:
    return f"model.layers.{block}.{MODULE.get(layer, 'mlp')}.{layer}"


def logits(model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**tiny_inputs("llama")).logits


def steps(stratified, count: int = 2) -> None:
    for _ in range(count):
        stratified.model.train()
        stratified.model(**tiny_inputs("llama")).logits.pow(2).mean().backward()
        with torch.no_grad():
            for parameter in stratified.model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.05 * parameter.grad.sign()
                    parameter.grad = None


MIXED = config(
    Stratum("decoder", (0, 1), "bias-added"),
    Stratum("decoder", (1, 2), "lora", LoraOptions(4, 8, targets=("query", "output"))),
    Stratum("decoder", (2, 3), "lora+bias-added", LoraOptions(2, targets=("query", "key")),
            bias_added=("query", "intermediate")),
)  # fmt: skip


def mixed_expected() -> dict[str, int]:
    """Names and sizes from the shapes alone."""
    found = {f"{path(0, layer)}.lora_B.bias": size for layer, size in OUTPUTS.items()}
    for block, rank, layers in ((1, 4, ("q_proj", "down_proj")), (2, 2, ("q_proj", "k_proj"))):
        for layer in layers:
            found[f"{path(block, layer)}.lora_A.weight"] = rank * INPUTS[layer]
            found[f"{path(block, layer)}.lora_B.weight"] = rank * OUTPUTS[layer]
    return found | {f"{path(2, layer)}.lora_B.bias": OUTPUTS[layer] for layer in ("q_proj", "gate_proj", "up_proj")}


def test_exactly_the_added_biases_train_counted_from_shapes():
    stratified = apply_strata(llama(), MIXED)
    assert dict(stratified.trainable) == mixed_expected()
    got = {n for n, p in stratified.model.named_parameters() if p.requires_grad}
    assert len(got) == len(mixed_expected())
    assert sum(OUTPUTS.values()) == 128
    alone = apply_strata(
        llama(), config(Stratum("decoder", (0, 2), "bias-added"), Stratum("decoder", (2, 3), "freeze"))
    )
    assert alone.trainable_parameters() == 2 * 128


def test_a_step_moves_what_trains_and_nothing_else_and_the_zeros_stay():
    stratified = apply_strata(llama(), MIXED)
    before = {n: p.detach().clone() for n, p in canonical_parameters(stratified.model).items()}
    steps(stratified)
    after = canonical_parameters(stratified.model)
    # The gradient of the last block's key bias is 0 in exact arithmetic, but no key bias trains in block 2 here.
    still = {n for n in stratified.trainable if torch.equal(after[n], before[n])}
    assert {n for n, p in after.items() if not torch.equal(p, before[n])} == set(stratified.trainable) - still
    assert still <= {f"{path(0, 'k_proj')}.lora_B.bias"}
    assert len(stratified.fixed_at_zero) == 2 * 7 + 2 + 1 + 2 * 2
    assert all(not after[n].any() for n in stratified.fixed_at_zero)


def test_zeros_have_no_gradient_even_if_something_unfreezes_them():
    """Both factors are 0, so that a plain PEFT trainer that trains the whole adapter moves the bias alone."""
    stratified = apply_strata(llama(), config(Stratum("decoder", (0, BLOCKS), "bias-added")))
    stratified.model.requires_grad_(True)
    steps(stratified)
    assert not any(canonical_parameters(stratified.model)[n].any() for n in stratified.fixed_at_zero)


def test_an_added_bias_is_the_bias_of_a_model_built_with_biases():
    """The independent check: Llama with attention_bias and mlp_bias, holding the trained values."""
    base = llama()
    stratified = apply_strata(copy.deepcopy(base), config(Stratum("decoder", (0, BLOCKS), "bias-added")))
    steps(stratified)
    biased = tiny("llama", auto="AutoModelForCausalLM", attention_bias=True, mlp_bias=True)
    state = base.state_dict()
    values = {n: p.detach() for n, p in canonical_parameters(stratified.model).items()}
    state |= {n.replace(".lora_B.bias", ".bias"): values[n] for n in stratified.trainable}
    biased.load_state_dict(state, strict=True)
    torch.testing.assert_close(logits(stratified.model), logits(biased), rtol=1e-6, atol=1e-6)
    assert (logits(stratified.model) - logits(base)).abs().max() > 1e-2


@pytest.mark.parametrize("plan", [MIXED, config(Stratum("decoder", (0, BLOCKS), "bias-added"))], ids=["mixed", "alone"])
def test_round_trip_and_base_are_exact_and_merging_is_refused(plan, tmp_path):
    base = llama()
    start = logits(base)
    stratified = apply_strata(copy.deepcopy(base), plan)
    assert torch.equal(logits(stratified.model), start)
    steps(stratified)
    after = logits(stratified.model)
    assert (after - start).abs().max() > 1e-2
    save(stratified, tmp_path)
    again = load(tmp_path, copy.deepcopy(base))
    assert torch.equal(logits(again.model), after)
    again.check()
    with stratified.base_model() as untouched:
        assert torch.equal(logits(untouched), start)
    assert torch.equal(logits(stratified.model), after)
    with pytest.raises(ModelError, match=r"trains added biases, and a plain LlamaForCausalLM has no bias .* norm in"):
        stratified.merge()


def test_a_folder_whose_zeros_are_not_zero_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    base = llama()
    save(apply_strata(copy.deepcopy(base), MIXED), tmp_path)
    state = load_file(tmp_path / WEIGHTS_FILE)
    name = next(n for n in state if "layers.0" in n and n.endswith("lora_B.weight"))
    save_file({**state, name: state[name] + 1}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(ModelError, match="1 left over"):
        load(tmp_path, base)


_PLAIN = """
import sys
sys.modules["spafit"] = None
import json, torch, transformers, warnings
from peft import PeftModel
folder, adapter = sys.argv[1:]
ids = torch.tensor([[5, 6, 7, 8]])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(folder), adapter).eval()
with torch.no_grad():
    print(json.dumps([model(input_ids=ids).logits.tolist(), [str(w.message) for w in caught]]))
"""


def test_plain_peft_gives_the_same_logits_and_misses_no_tensor(tmp_path):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    stratified = apply_strata(base, MIXED)
    steps(stratified)
    save(stratified, tmp_path / "adapter")
    stratified.model.eval()
    with torch.no_grad():
        expected = stratified.model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits
    done = subprocess.run(
        [sys.executable, "-c", _PLAIN, str(tmp_path / "base"), str(tmp_path / "adapter")],
        capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=True,
    )  # fmt: skip
    found, warned = json.loads(done.stdout)
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-6, rtol=0)
    assert not [w for w in warned if "missing" in w.lower()]


def test_layers_with_a_bias_are_refused_and_the_others_of_a_mixed_block_are_not():
    bert = tiny("bert", auto="AutoModelForSequenceClassification")
    plan = StrataConfig("t", {"encoder": BLOCKS}, (Stratum("encoder", (0, BLOCKS), "bias-added"),))
    with pytest.raises(ConfigError, match=r"'query' has a bias already in stack 'encoder'.* Write bitfit in place of"):
        apply_strata(bert, plan)
    qwen = tiny("qwen2", auto="AutoModelForCausalLM")
    some = Stratum("decoder", (0, BLOCKS), "bias-added", bias_added=("output", "query"))
    with pytest.raises(ConfigError, match=r"bias_added\[1\].*'query' has a bias already"):
        apply_strata(qwen, config(some))
    fine = config(Stratum("decoder", (0, 1), "bitfit"), Stratum("decoder", (1, BLOCKS), "bias-added",
                  bias_added=("attention_output", "output")))  # fmt: skip
    stratified = apply_strata(qwen, fine)
    expected = {f"{path(0, k)}.bias": OUTPUTS[k] for k in ("q_proj", "k_proj", "v_proj")}
    expected |= {f"{path(b, k)}.lora_B.bias": WIDTH for b in (1, 2) for k in ("o_proj", "down_proj")}
    assert dict(stratified.trainable) == expected


def test_added_biases_need_an_adapter_of_loras_kind_and_are_read_by_their_method_only():
    with pytest.raises(ConfigError, match="bias-added are one"):
        config(Stratum("decoder", (0, 1), "bias-added"), Stratum("decoder", (1, BLOCKS), "ia3"))
    with pytest.raises(ConfigError, match="does not read 'bias_added'"):
        Stratum("decoder", (0, 1), "bitfit", bias_added=("query",))
    with pytest.raises(ConfigError, match="one dropout"):
        config(
            Stratum("decoder", (0, 1), "bias-added"),
            Stratum("decoder", (1, 2), "lora", LoraOptions(2)),
            Stratum("decoder", (2, 3), "lora", LoraOptions(2, dropout=0.1)),
        )


@pytest.mark.parametrize("name", ["llama", "modernbert", "t5", "gemma2"])
def test_the_preset_writes_added_biases_in_bitfits_place_and_says_so(name):
    auto = {"modernbert": "AutoModelForSequenceClassification", "t5": "AutoModelForSeq2SeqLM"}
    model = tiny(name, auto=auto.get(name, "AutoModelForCausalLM"))
    norm, added = plan_for(model, "spafit-scaled-I"), plan_for(model, "bias-added:spafit-scaled-I")
    assert [s.blocks for s in added.strata] == [s.blocks for s in norm.strata]
    assert [s.method.replace("bias-added", "norm") for s in added.strata] == [s.method for s in norm.strata]
    assert {s.bias_added for s in added.strata if s.method == "lora+bias-added"} == {("intermediate", "output")}
    assert all("norm for" not in s for s in added.provenance["substitutions"])
    assert added.provenance["source"] == "preset bias-added:spafit-scaled-I"
    assert StrataConfig.from_yaml(added.to_yaml()) == added
    apply_strata(model, added).check()


def test_presets_with_added_biases_nest_and_are_refused_where_there_is_nothing_to_add():
    model = llama()
    turned = plan_for(model, "reversed:bias-added:spafit-scaled-I")
    assert turned.strata[0].method == "lora+bias-added"
    only = plan_for(model, "count-only:bias-added:spafit-scaled-I")
    assert {s.method for s in only.strata} <= {"freeze", "lora+bias-added"}
    with pytest.raises(ConfigError, match=r"puts nothing in BitFit's place on this model.* Write spafit-scaled-I"):
        plan_for(tiny("bert", auto="AutoModelForSequenceClassification"), "bias-added:spafit-scaled-I")
    with pytest.raises(ConfigError, match="needs a preset"):
        plan_for(model, "bias-added:")


def test_where_experts_share_a_matrix_the_third_stratum_keeps_norms():
    plan = plan_for(tiny("mixtral", auto="AutoModelForCausalLM", num_hidden_layers=6), "bias-added:spafit-scaled-I")
    assert [s.method for s in plan.strata] == ["freeze", "bias-added", "lora+norm"]
    apply_strata(tiny("mixtral", auto="AutoModelForCausalLM", num_hidden_layers=6), plan).check()


def test_what_bitfit_does_on_a_model_with_some_biases_stands_in_provenance():
    plan = plan_for(tiny("qwen2", auto="AutoModelForCausalLM", num_hidden_layers=6), "spafit-scaled-I")
    assert plan.provenance["substitutions"] == [
        "decoder [1, 3): bitfit trains the biases of query, key, value, the only ones",
        "decoder [3, 6): lora+norm for lora+bitfit, no bias in intermediate, output, output_norm",
    ]


def test_ia3_and_lora_by_rank_on_a_model_without_biases():
    ia3 = apply_strata(llama(), config(Stratum("decoder", (0, 1), "freeze"), Stratum("decoder", (1, BLOCKS), "ia3")))
    expected = {f"{path(b, k)}.ia3_l": size for b in (1, 2)
                for k, size in (("k_proj", 8), ("v_proj", 8), ("down_proj", INNER))}  # fmt: skip
    assert dict(ia3.trainable) == expected
    ranks = {0: 1, 1: 4, 2: 16}
    plan = config(
        *(Stratum("decoder", (b, b + 1), "lora", LoraOptions(r, targets=("query",))) for b, r in ranks.items())
    )
    stratified = apply_strata(llama(), plan)
    assert dict(stratified.trainable) == {
        f"{path(b, 'q_proj')}.lora_{k}.weight": r * WIDTH for b, r in ranks.items() for k in "AB"
    }
    for made in (ia3, stratified):
        base = logits(llama())
        steps(made)
        after = logits(made.model)
        assert (after - base).abs().max() > 1e-3
        torch.testing.assert_close(logits(made.merge()), after, rtol=1e-5, atol=1e-5)


def test_remedies_that_hold_weights_take_added_biases():
    from spafit.retain.weights import _low_rank_targets

    stratified = apply_strata(llama(), MIXED)
    assert _low_rank_targets(stratified) == [
        path(1, "q_proj"),
        path(1, "down_proj"),
        path(2, "q_proj"),
        path(2, "k_proj"),
    ]


def test_fit_trains_added_biases_and_what_it_writes_gives_the_scores_that_it_reports(tmp_path):
    import spafit
    from tests.training_fixtures import QUICK, task

    tiny("llama", auto="AutoModelForSequenceClassification", num_hidden_layers=6).save_pretrained(tmp_path / "base")
    tiny_tokenizer(decoder=True).save_pretrained(tmp_path / "base")
    result = spafit.fit(
        str(tmp_path / "base"), "bias-added:spafit-scaled-I", data=task(), settings=QUICK, out=tmp_path / "run",
        device="cpu", quiet=True,
    )  # fmt: skip
    stratified = load(result.model_folder())
    assert [s.method for s in stratified.config.strata] == ["freeze", "bias-added", "lora+bias-added"]
    values = canonical_parameters(stratified.model)
    moved = [n for n in stratified.trainable if n.endswith("lora_B.bias") and values[n].any()]
    assert len(moved) >= 0.8 * sum(n.endswith("lora_B.bias") for n in stratified.trainable)
    data = task().frames["validation"]
    stratified.model.eval()
    tokens = AutoTokenizer.from_pretrained(result.model_folder())
    with torch.no_grad():
        right = [
            int(stratified.model(**tokens(text, return_tensors="pt")).logits.argmax()) == label
            for text, label in zip(data["text"], data["label"], strict=True)
        ]
    (reported,) = result.runs.loc[result.runs["metric"] == "accuracy", "value"]
    assert reported == pytest.approx(sum(right) / len(right))


def test_a_search_tries_added_biases():
    from spafit.tuning.space import SearchSpace

    space = SearchSpace(
        {"decoder": 6}, {"decoder": ()}, groups=(3,), methods=("freeze", "lora+bias-added", "bias-added"), ranks=(4,)
    )
    values = {"decoder.groups": 3, "decoder.s1": 2, "decoder.fraction2": 0.5, "alpha": 1.0, "type": "I",
              "decoder.method1": "lora+bias-added", "decoder.method2": "freeze", "decoder.method3": "bias-added",
              "decoder.rank1": 4, "rate.bias": 1e-3, "rate.low-rank": 1e-4}  # fmt: skip
    plan, _ = space.decode(values)
    assert [(s.blocks, s.method, s.learning_rate) for s in plan.strata] == [
        ((0, 2), "freeze", None), ((2, 4), "bias-added", 1e-3), ((4, 6), "lora+bias-added", 1e-4),
    ]  # fmt: skip


def test_a_decay_that_a_stratum_of_added_biases_states_reaches_them(tmp_path):
    from tests.test_training import make_trainer

    tiny("llama", auto="AutoModelForSequenceClassification").save_pretrained(tmp_path / "base")
    tiny_tokenizer(decoder=True).save_pretrained(tmp_path / "base")
    plan = config(
        Stratum("decoder", (0, 1), "bias-added", weight_decay=0.2, learning_rate=1e-4),
        Stratum("decoder", (1, 2), "lora+bias-added", LoraOptions(2), weight_decay=0.3),
        Stratum("decoder", (2, 3), "freeze"),
    )
    trainer = make_trainer(tmp_path / "base", tmp_path / "run", plan, learning_rate=1.0)
    groups = trainer.create_optimizer().param_groups
    names = {id(p): n for n, p in canonical_parameters(trainer.model).items()}
    got = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert set(got) == set(trainer.stratified.trainable)
    assert got[f"{path(0, 'q_proj')}.lora_B.bias"] == (1e-4, 0.2)
    assert got[f"{path(1, 'q_proj')}.lora_B.bias"] == (1.0, 0.0)
    assert got[f"{path(1, 'q_proj')}.lora_A.weight"] == (1.0, 0.3)
