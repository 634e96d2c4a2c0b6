"""Strata of encoder-decoders: what each stack and cross-attention train, by exact name."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import pytest
import torch

from spafit.adapt import apply_strata, canonical_parameters
from spafit.checkpoint import load, save
from spafit.errors import ConfigError
from spafit.settings import default_learning_rate
from spafit.stacks import find_stacks
from spafit.strata import StrataConfig
from spafit.stratum import CrossOptions, LoraOptions, Outside, Stratum
from tests.tiny import tiny, tiny_encoder_decoder, tiny_inputs

FAMILIES = ("t5", "bart", "encoder-decoder")
#: What cross-attention's parameters are called.
CROSS = {"t5": r"decoder\.block\.\d\.layer\.1\.", "bart": r"decoder\.layers\.\d\.encoder_attn",
         "encoder-decoder": r"decoder\.bert\.encoder\.layer\.\d\.crossattention\."}  # fmt: skip
FROZEN = Outside(pooler="freeze", head="freeze")


def made(name: str) -> torch.nn.Module:
    return tiny_encoder_decoder() if name == "encoder-decoder" else tiny(name, auto="AutoModelForSeq2SeqLM")


def plan(model: torch.nn.Module, *decoder: Stratum, encoder: Stratum | None = None) -> StrataConfig:
    blocks = {s.name: s.num_blocks for s in find_stacks(model)}
    first = encoder or Stratum("encoder", (0, blocks["encoder"]), "freeze")
    return StrataConfig("tiny", blocks, (first, *decoder), FROZEN)


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = tiny_inputs("bart")["input_ids"]
    with torch.no_grad():
        return model.eval()(input_ids=ids, decoder_input_ids=ids.flip(1)).logits


def of_blocks(model: torch.nn.Module, pattern: str, blocks: range) -> set[str]:
    """Names of parameters of the decoder's blocks that match."""
    decoder = next(s for s in find_stacks(model) if s.name == "decoder")
    inside = tuple(f"{decoder.block_paths[b]}." for b in blocks)
    return {n for n, _ in model.named_parameters() if n.startswith(inside) and re.search(pattern, n)}


@pytest.mark.parametrize("name", FAMILIES)
def test_lora_on_cross_roles_is_on_the_decoder_s_cross_attention_alone(name):
    model = made(name)
    targets = ("cross_query", "cross_value")
    count = next(s.num_blocks for s in find_stacks(model) if s.name == "decoder")
    config = plan(model, Stratum("decoder", (0, count), "lora", lora=LoraOptions(2, targets=targets)))
    trained = set(apply_strata(copy.deepcopy(model), config).trainable)
    decoder = next(s for s in find_stacks(model) if s.name == "decoder")
    paths = [p for role in targets for b in range(count) for p in decoder.role_paths(role, b)]
    assert trained == {f"{p}.lora_{k}.weight" for p in paths for k in "AB"}
    assert all(re.search(CROSS[name], p) for p in paths)
    assert len(paths) == 2 * count


@pytest.mark.parametrize("name", FAMILIES)
def test_each_stack_has_its_own_strata(name):
    """The encoder's last block whole, the decoder's first one by norms: nothing else trains."""
    model = made(name)
    stacks = {s.name: s for s in find_stacks(model)}
    (e, d) = (stacks[k].num_blocks for k in ("encoder", "decoder"))
    config = StrataConfig(
        "tiny", {"encoder": e, "decoder": d},
        (Stratum("encoder", (0, e - 1), "freeze"), Stratum("encoder", (e - 1, e), "full"),
         Stratum("decoder", (0, 1), "norm"), Stratum("decoder", (1, d), "freeze")), FROZEN,
    )  # fmt: skip
    trained = set(apply_strata(copy.deepcopy(model), config).trainable)
    last = {n for n, _ in model.named_parameters() if n.startswith(f"{stacks['encoder'].block_paths[e - 1]}.")}
    norms = of_blocks(model, r"(?i)norm", range(1))
    assert len(norms) == (3 if name == "t5" else 6)  # three norms; T5's have no bias
    assert trained == last | norms


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", ["freeze", "full", "norm", "lora"])
def test_cross_attention_has_a_method_of_its_own(name, method, tmp_path):
    model = made(name)
    base = copy.deepcopy(model)
    count = next(s.num_blocks for s in find_stacks(model) if s.name == "decoder")
    lora = LoraOptions(2, targets=("cross_key", "cross_value")) if method == "lora" else None
    own = "norm" if name == "t5" else "bitfit"
    stratum = Stratum("decoder", (1, count), own, cross=CrossOptions(method, lora))
    config = plan(model, Stratum("decoder", (0, 1), "freeze"), stratum)
    stratified = apply_strata(model, config)
    blocks = range(1, count)
    crossed = of_blocks(base, CROSS[name], blocks)
    wanted = of_blocks(base, r"norm\.weight|layer_norm" if own == "norm" else r"\.bias$", blocks) - crossed
    if method == "full":
        wanted |= crossed
    elif method == "norm":
        wanted |= {n for n in crossed if re.search(r"(?i)norm", n)}
    elif method == "lora":
        decoder = next(s for s in find_stacks(base) if s.name == "decoder")
        paths = [p for r in ("cross_key", "cross_value") for b in blocks for p in decoder.role_paths(r, b)]
        wanted |= {f"{p}.lora_{k}.weight" for p in paths for k in "AB"}
    assert set(stratified.trainable) == wanted
    parts = {p.name: p.method for p in stratified.plan.parts if p.stratum is not None}
    assert parts[f"decoder [1, {count}) cross"] == method
    assert parts[f"decoder [1, {count})"] == own
    assert not set.intersection(*(set(p.own) for p in stratified.plan.parts if p.name.startswith("decoder [1")))
    with torch.no_grad():
        for parameter in stratified.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    after = logits(stratified.model)
    assert not torch.allclose(after, logits(base))
    save(stratified, tmp_path)
    again = load(tmp_path, copy.deepcopy(base))
    assert torch.equal(logits(again.model), after)
    assert again.config.strata == config.strata
    merged = logits(stratified.merge())
    torch.testing.assert_close(merged, after, atol=1e-5 * float(after.abs().max()), rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_rest_trains_in_full_around_frozen_cross_attention(name):
    model = made(name)
    base = copy.deepcopy(model)
    count = next(s.num_blocks for s in find_stacks(model) if s.name == "decoder")
    stratum = Stratum("decoder", (0, count), "full", cross=CrossOptions("freeze"))
    trained = set(apply_strata(model, plan(model, stratum)).trainable)
    every, crossed = of_blocks(base, "", range(count)), of_blocks(base, CROSS[name], range(count))
    assert crossed
    assert trained == every - crossed
    values = canonical_parameters(model)
    assert {n for n in crossed if values[n].requires_grad} == set()


def test_a_plan_with_cross_attention_of_its_own_survives_yaml_and_says_what_trains():
    text = """
schema_version: 1
model: {id: tiny, blocks: {encoder: 2, decoder: 3}}
strata:
  - {stack: encoder, blocks: [0, 2], method: freeze}
  - {stack: decoder, blocks: [0, 1], method: freeze, cross: {method: full}}
  - stack: decoder
    blocks: [1, 3]
    method: lora
    lora: {rank: 4}
    cross: {method: lora, lora: {rank: 8}}
"""
    config = StrataConfig.from_yaml(text)
    assert config.strata[2].cross == CrossOptions(
        "lora", LoraOptions(8, targets=("cross_query", "cross_key", "cross_value"))
    )
    assert StrataConfig.from_yaml(config.to_yaml()) == config
    assert config.strata[2].trains.endswith("cross-attention: LoRA rank 8 on cross_query, cross_key, cross_value")
    assert config.strata[1].trains == "cross-attention: everything"
    assert config.boundaries("decoder") == (0, 0)
    assert default_learning_rate(config) == 2e-5  # what trains in full decides
    frozen = replace(config, strata=tuple(replace(s, cross=None) for s in config.strata))
    assert default_learning_rate(frozen) == 5e-4


@pytest.mark.parametrize(
    ("stratum", "message"),
    [
        ({"method": "lora", "lora": LoraOptions(2, targets=("cross_query",)), "cross": CrossOptions("full")},
         "'cross_query' stands here, and the field 'cross' says"),
        ({"method": "bitfit", "bitfit": ("cross_value",), "cross": CrossOptions("full")}, "'cross_value' stands here"),
        ({"method": "bitfit", "cross": "lora"}, "write a method"),
        ({"method": "freeze", "cross": CrossOptions("freeze"), "learning_rate": 1e-3}, "does not read 'learning_rate'"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused(stratum, message):
    with pytest.raises(ConfigError, match=message):
        Stratum("decoder", (0, 1), **stratum)


def test_what_is_no_cross_attention_is_refused():
    with pytest.raises(ConfigError, match="'query' is no role of cross-attention"):
        CrossOptions("lora", LoraOptions(2))
    with pytest.raises(ConfigError, match="does not read 'lora'"):
        CrossOptions("full", LoraOptions(2))
    with pytest.raises(ConfigError, match="'ia3'"):
        CrossOptions("ia3")
    bert = tiny("bert")
    config = StrataConfig(
        "b", {"encoder": 3}, (Stratum("encoder", (0, 3), "norm", cross=CrossOptions("full")),), FROZEN
    )
    with pytest.raises(ConfigError, match="no cross-attention that was recognised"):
        apply_strata(bert, config)
    t5 = made("t5")
    with pytest.raises(ConfigError, match="trains biases, and the blocks of stack 'decoder' have none"):
        apply_strata(t5, plan(t5, Stratum("decoder", (0, 3), "norm", cross=CrossOptions("bitfit"))))
    with pytest.raises(ConfigError, match="one PEFT adapter, of one"):
        plan(t5, Stratum("decoder", (0, 3), "ia3", cross=CrossOptions("lora")))


def test_own_rates_hold_for_cross_attention_too():
    stratum = Stratum("decoder", (0, 3), "freeze", cross=CrossOptions("full"), learning_rate=1e-3)
    assert stratum.is_trained
    assert stratum.pieces[1].learning_rate == 1e-3
    model = made("bart")
    stratified = apply_strata(model, plan(model, stratum))
    part = next(p for p in stratified.plan.parts if p.name == "decoder [0, 3) cross")
    assert part.learning_rate == 1e-3
    assert stratified.plan.first_trained_block("decoder") == 0
    assert "decoder [0, 3) cross" in stratified.describe()
