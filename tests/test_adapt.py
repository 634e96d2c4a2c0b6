"""A plan on a real architecture trains exactly what it says, and what it saves gives the same logits everywhere."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertForSequenceClassification, BertModel

from spafit.adapt import apply_strata, canonical_name, canonical_parameters, meta_copy, plan_for
from spafit.checkpoint import load, save
from spafit.errors import ConfigError, ModelError
from spafit.heads import load_with_head
from tests.tiny import save_tiny, tiny, tiny_inputs

#: name: (auto class, preset)
WITH_BIASES = {
    "bert": "AutoModelForSequenceClassification",
    "roberta": "AutoModelForSequenceClassification",
    "distilbert": "AutoModelForSequenceClassification",
    "electra": "AutoModelForSequenceClassification",
    "deberta-v2": "AutoModelForSequenceClassification",
    "mpnet": "AutoModelForSequenceClassification",
    "gpt2": "AutoModelForSequenceClassification",
    "bart": "AutoModelForSeq2SeqLM",
    "vit": "AutoModelForImageClassification",
}
WITHOUT_BIASES = {
    "llama": "AutoModelForCausalLM",
    "modernbert": "AutoModelForSequenceClassification",
    "t5": "AutoModelForSeq2SeqLM",
}
PARTLY = {"qwen2": "AutoModelForCausalLM"}
#: The head of these is their embedding table, which the plan's ``embeddings`` decides about.
TIED = ("bart", "t5")
ALL = {**WITH_BIASES, **WITHOUT_BIASES, **PARTLY}


def made(name: str):
    extra = {"pad_token_id": 0} if name in ("gpt2", "llama", "qwen2") else {}
    return tiny(name, auto=ALL[name], **extra)


def logits(model, name: str) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**inputs(name)).logits


def inputs(name: str):
    batch = dict(tiny_inputs(name))
    if name in ("t5", "bart"):
        batch["decoder_input_ids"] = batch["input_ids"][:, :3]
    return batch


def step(stratified, name: str, rate: float = 0.05) -> None:
    """One step of gradient descent on everything that requires a gradient."""
    stratified.model.train()
    loss = stratified.model(**inputs(name)).logits.float().pow(2).mean()
    loss.backward()
    with torch.no_grad():
        for parameter in stratified.model.parameters():
            if parameter.grad is not None:
                parameter -= rate * torch.sign(parameter.grad) + 1e-3
                parameter.grad = None


@pytest.mark.parametrize("name", ALL)
def test_a_step_changes_exactly_the_declared_tensors(name):
    model = made(name)
    stratified = apply_strata(model, plan_for(model, "spafit-scaled-II"))
    before = {n: p.detach().clone() for n, p in canonical_parameters(stratified.model).items()}
    step(stratified, name)  # the second factor of LoRA is 0 at first: the first one moves from the second step on
    step(stratified, name)
    changed = {n for n, p in canonical_parameters(stratified.model).items() if not torch.equal(p, before[n])}
    assert changed == set(stratified.trainable)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("preset", ["spafit-scaled-I", "lora", "bitfit", "norm", "last-1", "head"])
def test_saved_and_loaded_into_a_fresh_base_gives_the_same_logits(name, preset, tmp_path):
    model = made(name)
    base = copy.deepcopy(model)
    plan = plan_for(model, preset)
    if preset == "head" and name in TIED:
        with pytest.raises(ConfigError, match="trains nothing"):
            apply_strata(model, plan)
        return
    stratified = apply_strata(model, plan)
    start = logits(base, name)
    step(stratified, name)
    step(stratified, name)
    after = logits(stratified.model, name)
    assert not torch.allclose(start, after)
    save(stratified, tmp_path)
    again = load(tmp_path, copy.deepcopy(base))
    assert torch.equal(logits(again.model, name), after)
    assert again.trainable == stratified.trainable
    merged = logits(stratified.merge(), name)
    torch.testing.assert_close(merged, after, atol=1e-5 * float(after.abs().max()), rtol=0)
    with stratified.base_model() as untouched:
        assert torch.equal(logits(untouched, name), start)
    assert torch.equal(logits(stratified.model, name), after)
    stratified.check()


PRESETS = {
    "spafit-4-9-I": {2: 5_650_434, 3: 5_651_459},
    "spafit-4-9-II": {2: 7_485_442, 3: 7_486_467},
}


def bert_large(labels: int):
    config = BertConfig(
        vocab_size=28996, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    )
    config.num_labels = labels
    with torch.device("meta"):
        return BertForSequenceClassification(config), BertModel(config)


@pytest.mark.parametrize(("preset", "labels", "count"), [(p, k, n) for p, c in PRESETS.items() for k, n in c.items()])
def test_bert_large_has_the_papers_numbers_of_trainable_parameters(preset, labels, count):
    model, bare = bert_large(labels)
    assert sum(p.numel() for p in bare.parameters()) == 333_579_264
    stratified = apply_strata(model, plan_for(model, preset))
    assert stratified.trainable_parameters() == count
    assert stratified.total_parameters() == 333_579_264 + 1025 * labels


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 7), st.integers(0, 7), st.sampled_from(["I", "II"]), st.integers(1, 4))
def test_the_formula_of_trainable_parameters_holds_for_every_boundary(first, second, kind, labels):
    from spafit.presets import spafit_parameters

    n1, n2 = sorted((first, second))
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=8, num_attention_heads=2, intermediate_size=128
    )
    config.num_labels = labels
    with torch.device("meta"):
        model = BertForSequenceClassification(config)
    stratified = apply_strata(model, plan_for(model, f"spafit-{n1}-{n2}-{kind}"))
    expected = spafit_parameters(n1, n2, num_blocks=8, width=32, labels=labels, adapter_type=kind)
    assert stratified.trainable_parameters() == expected


def test_counting_on_the_meta_device_leaves_the_model_alone():
    model = tiny("bert", auto=ALL["bert"])
    before = {n: p.clone() for n, p in model.named_parameters()}
    count = apply_strata(meta_copy(model), plan_for(model, "lora")).trainable_parameters()
    assert not hasattr(model, "peft_config")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert count == apply_strata(model, plan_for(model, "lora")).trainable_parameters()


def test_shared_blocks_take_one_stratum_and_refuse_several():
    def albert():
        return tiny("albert", auto="AutoModelForSequenceClassification")

    stratified = apply_strata(albert(), plan_for(albert(), "lora"))
    assert len([n for n in stratified.trainable if n.endswith("query.lora_A.weight")]) == 1
    with pytest.raises(ConfigError, match=r"one shared module .* Write one stratum \[0, "):
        apply_strata(albert(), plan_for(albert(), "spafit-scaled-I"))


def test_a_mask_that_someone_changed_is_found_and_restored():
    model = tiny("bert", auto=ALL["bert"])
    stratified = apply_strata(model, plan_for(model, "spafit-scaled-I"))
    name, parameter = next((n, p) for n, p in stratified.model.named_parameters() if not p.requires_grad)
    parameter.requires_grad_(True)
    with pytest.raises(ModelError, match="1 too many"):
        stratified.check()
    stratified.restore_mask()
    assert not dict(stratified.model.named_parameters())[name].requires_grad
    assert canonical_name(name) not in stratified.trainable


def test_an_adapter_is_refused_on_another_base_and_a_second_adapter_on_a_wrapped_model(tmp_path):
    model = tiny("bert", auto=ALL["bert"])
    base, other = copy.deepcopy(model), copy.deepcopy(model)
    stratified = apply_strata(model, plan_for(model, "spafit-scaled-I"))
    save(stratified, tmp_path, base={"reference": "default"})
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1
    with pytest.raises(ModelError, match=r"not the one that .* Use the built-in all-MiniLM-L6-v2 with its weights"):
        load(tmp_path, other)
    biased = copy.deepcopy(base)
    with torch.no_grad():
        biased.bert.encoder.layer[1].output.dense.bias += 1
    with pytest.raises(ModelError, match="not the one that"):
        load(tmp_path, biased)
    with pytest.raises(ModelError, match="has an adapter already"):
        apply_strata(stratified.model, stratified.config)
    load(tmp_path, base)


_PLAIN = """
import sys
sys.modules["spafit"] = None
import json, torch, transformers
from peft import PeftModel
kind, folder, adapter = sys.argv[1:]
model = getattr(transformers, kind).from_pretrained(folder)
ids = torch.tensor([[5, 6, 7, 8]])
plain = PeftModel.from_pretrained(model, adapter).eval()
with torch.no_grad():
    first = plain(input_ids=ids).logits
again = getattr(transformers, kind).from_pretrained(folder)
again.load_adapter(adapter)
again.eval()
with torch.no_grad():
    second = again(input_ids=ids).logits
print(json.dumps([first.tolist(), second.tolist()]))
"""


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_plain_peft_and_plain_transformers_give_the_same_logits_where_this_package_cannot_be_imported(name, tmp_path):
    kind = {"bert": "AutoModelForSequenceClassification"}.get(name, "AutoModelForCausalLM")
    model = tiny(name, auto=kind)
    model.save_pretrained(tmp_path / "base")
    stratified = apply_strata(model, plan_for(model, "spafit-scaled-II"))
    for _ in range(2):
        stratified.model.train()
        stratified.model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits.pow(2).mean().backward()
        with torch.no_grad():
            for p in stratified.model.parameters():
                if p.grad is not None:
                    p -= 0.05 * p.grad.sign()
                    p.grad = None
    stratified.model.eval()
    with torch.no_grad():
        expected = stratified.model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits
    save(stratified, tmp_path / "adapter")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _PLAIN, kind, str(tmp_path / "base"), str(tmp_path / "adapter")],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    for found in json.loads(done.stdout):
        torch.testing.assert_close(torch.tensor(found), expected, atol=1e-6, rtol=0)


def test_a_pooler_that_the_checkpoint_lacks_is_trained_and_saved_or_the_plan_is_refused():
    missing = ("bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias")
    model = tiny("bert", auto=ALL["bert"])
    plan = plan_for(model, "spafit-scaled-I", missing=missing)
    assert plan.outside.pooler == "full"
    assert "pooler: full for bitfit" in plan.provenance["substitutions"][-1]
    assert set(missing) <= set(apply_strata(model, plan).trainable)
    own = plan_for(tiny("bert", auto=ALL["bert"]), "spafit-scaled-I")
    assert own.outside.pooler == "bitfit"
    with pytest.raises(ConfigError, match=r"bert\.pooler\.dense\.weight start from random weights"):
        plan_for(tiny("bert", auto=ALL["bert"]), own, missing=missing)


@pytest.mark.parametrize("inner", ["spafit-scaled-I", "lora", "last-1", "reversed:spafit-scaled-I"])
@pytest.mark.parametrize("kind", ["lora-matched", "count-only"])
def test_parameters_are_matched_as_they_train_where_the_checkpoint_has_no_pooler(kind, inner, tmp_path):
    save_tiny("bert", tmp_path)
    BertModel.from_pretrained(tmp_path, add_pooling_layer=False).save_pretrained(tmp_path)

    def planned(preset):
        headed = load_with_head(str(tmp_path), labels=("cat", "dog"))
        assert "bert.pooler.dense.weight" in headed.missing
        plan = plan_for(headed.model, preset, missing=headed.missing)
        return plan, apply_strata(headed.model, plan).trainable_parameters()

    plan, got = planned(f"{kind}:{inner}")
    _, wanted = planned(inner)
    assert plan.provenance["parameters"] == {"wanted": wanted, "got": got, "difference": got - wanted}
    assert plan.outside.pooler == "full"
    rank = plan.strata[-1].lora.rank
    for other in (rank - 1, rank + 1):  # no other rank is nearer
        strata = [replace(s, lora=replace(s.lora, rank=max(other, 1))) if s.lora else s for s in plan.strata]
        model = load_with_head(str(tmp_path), labels=("cat", "dog")).model
        beside = apply_strata(model, replace(plan, strata=tuple(strata)))
        assert abs(beside.trainable_parameters() - wanted) >= abs(got - wanted)
