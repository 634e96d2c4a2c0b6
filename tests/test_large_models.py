"""What is done for models larger than memory, on small ones: bfloat16, modules on disk, weights of 4 bits."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from spafit.adapt import apply_strata, canonical_name, canonical_parameters, is_quantised, plan_for
from spafit.checkpoint import load, save
from spafit.errors import ConfigError, ModelError
from spafit.heads import load_with_head
from spafit.quantise import outside_blocks
from tests.families import FAMILIES
from tests.tiny import tiny, tiny_tokenizer

DEPTH = 6
#: The CPU kernels of bitsandbytes need outputs in multiples of 32.
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2, "num_hidden_layers": DEPTH}
HAS_4BIT = importlib.util.find_spec("bitsandbytes") is not None
needs_4bit = pytest.mark.skipif(not HAS_4BIT, reason="bitsandbytes is not installed")
IDS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])


def folder(path, **changes):
    model = tiny("llama", auto="AutoModelForSequenceClassification", **{**WIDE, **changes})
    model.save_pretrained(path)
    tiny_tokenizer(decoder=True).save_pretrained(path)
    return str(path)


def logits(model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def step(stratified, rate: float = 0.05) -> set[str]:
    stratified.model.train()
    stratified.model(input_ids=IDS).logits.float().pow(2).mean().backward()
    received = {canonical_name(n) for n, p in stratified.model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        for parameter in stratified.model.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad.sign()
                parameter.grad = None
    return received


@pytest.mark.parametrize("plan", ["spafit-scaled-I", "bias-added:spafit-scaled-I"])
def test_a_model_in_bfloat16_trains_what_it_trains_in_float32_and_round_trips(plan, tmp_path):
    place = folder(tmp_path / "base")
    headed = load_with_head(place, dtype="bfloat16")
    assert {p.dtype for p in headed.model.parameters()} == {torch.bfloat16}
    full = load_with_head(place)
    stratified = apply_strata(headed.model, plan_for(headed.model, plan))
    assert stratified.trainable == apply_strata(full.model, plan_for(full.model, plan)).trainable
    before = {n: p.detach().clone() for n, p in canonical_parameters(stratified.model).items()}
    assert step(stratified) == set(stratified.trainable)
    step(stratified)
    changed = {n for n, p in canonical_parameters(stratified.model).items() if not torch.equal(p, before[n])}
    assert changed <= set(stratified.trainable)
    assert set(stratified.trainable) - changed <= {n for n in stratified.trainable if ".k_proj.lora_B.bias" in n}
    got = logits(stratified.model)
    save(stratified, tmp_path / "adapter")
    again = load(tmp_path / "adapter", load_with_head(place, dtype="bfloat16").model)
    assert torch.equal(logits(again.model), got)


def test_blocks_on_disk_give_the_same_logits(tmp_path):
    place = folder(tmp_path / "base")
    expected = logits(load_with_head(place).model)
    where = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "score": "cpu"}
    where |= {f"model.layers.{b}": "disk" if b < 4 else "cpu" for b in range(DEPTH)}
    model = load_with_head(place, device_map=where, offload_folder=tmp_path / "disk").model
    assert model.model.layers[0].self_attn.q_proj.weight.is_meta
    assert not model.model.layers[5].self_attn.q_proj.weight.is_meta
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)
    stratified = apply_strata(model, plan_for(model, "spafit-scaled-I"))
    with pytest.raises(ModelError, match=r"is not in memory.* without modules on disk"):
        save(stratified, tmp_path / "adapter")


@pytest.mark.skipif(HAS_4BIT, reason="bitsandbytes is installed")
def test_without_bitsandbytes_the_command_that_installs_it_is_said(tmp_path):
    with pytest.raises(ModelError, match=r"not installed: pip install bitsandbytes\."):
        load_with_head(folder(tmp_path), quantize="4bit")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Llama", ["model.embed_tokens", "model.norm", "lm_head"]),
        ("BERT", ["bert.embeddings", "bert.pooler", "classifier"]),
        ("LLaVA", [
            "model.vision_tower.embeddings", "model.vision_tower.pre_layrnorm", "model.vision_tower.post_layernorm",
            "model.multi_modal_projector", "model.language_model.embed_tokens", "model.language_model.norm", "lm_head",
        ]),
    ],
)  # fmt: skip
def test_what_is_not_quantised_is_everything_outside_the_blocks(name, expected):
    assert outside_blocks(FAMILIES[name].build()) == expected


@needs_4bit
@pytest.mark.parametrize("plan", ["spafit-scaled-I", "bias-added:spafit-scaled-I", "bitfit"])
def test_a_quantised_base_trains_the_same_names_and_its_adapter_round_trips(plan, tmp_path):
    changes = {"attention_bias": True, "mlp_bias": True} if plan == "bitfit" else {}
    place = folder(tmp_path / "base", **changes)
    model, full = load_with_head(place, quantize="4bit").model, load_with_head(place).model
    assert is_quantised(model.model.layers)
    assert not is_quantised(model.score)
    assert {model.score.weight.dtype, model.model.norm.weight.dtype} == {torch.float32}
    stratified, plain = (apply_strata(m, plan_for(m, plan)) for m in (model, full))
    assert stratified.trainable == plain.trainable
    assert stratified.total_parameters() == plain.total_parameters()
    before = {n: p.detach().clone() for n, p in canonical_parameters(stratified.model).items()}
    assert step(stratified) == set(stratified.trainable)
    step(stratified)
    after = canonical_parameters(stratified.model)
    assert {n for n, p in after.items() if not torch.equal(p, before[n])} <= set(stratified.trainable)
    got = logits(stratified.model)
    save(stratified, tmp_path / "adapter")
    again = load(tmp_path / "adapter", load_with_head(place, quantize="4bit").model)
    torch.testing.assert_close(logits(again.model), got)
    with pytest.raises(ModelError, match=r"quantised|added biases"):
        stratified.merge()


@needs_4bit
def test_quantised_blocks_are_not_trained_in_full(tmp_path):
    model = load_with_head(folder(tmp_path), quantize="4bit").model
    with pytest.raises(ConfigError, match=r"model\.layers\.5 is quantised, .* Write lora, bitfit or norm there"):
        apply_strata(model, plan_for(model, "last-1"))


def test_a_gguf_file_is_not_quantised_again(tmp_path):
    from types import SimpleNamespace

    from spafit.quantise import four_bit_settings

    found = SimpleNamespace(kind="gguf", label="x.gguf", folder=tmp_path)
    with pytest.raises(ModelError, match="GGUF file"):
        four_bit_settings(None, found)
