"""Families of models: exactly which parameters train under a plan, from names and sizes that are written out here."""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import dataclass

import pandas as pd
import pytest
import torch

from spafit.adapt import apply_strata, canonical_name, canonical_parameters, plan_for
from spafit.checkpoint import load, save
from spafit.errors import ConfigError
from spafit.resolve import resolve
from spafit.stacks import find_stacks
from spafit.strata import Outside, StrataConfig, Stratum
from tests.families import DEPTH, FAMILIES, OTHER_WIDTH, Family, one_step, outputs
from tests.paths import ROOT
from tests.tiny import INNER, VOCABULARY, WIDTH

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own
KV, RANK = 8, 64


@dataclass(frozen=True)
class Block:
    """One stack as its authors wrote it.

    ``linears``: role -> [(module, inputs, outputs)]; ``norms``: role -> modules; ``biased``: modules with a bias.
    """

    path: str
    linears: dict[str, list[tuple[str, int, int]]]
    norms: dict[str, list[str]]
    biased: tuple[str, ...] = ()
    width: int = WIDTH

    def size(self, module: str) -> int:
        """Outputs of a linear map or width of a norm."""
        known = {m: o for maps in self.linears.values() for m, _, o in maps}
        return known.get(module, self.width)


def attention(at: str, out: str = "out_proj", *, width: int = WIDTH, kv: int | None = None,
              cross: bool = False) -> dict[str, list[tuple[str, int, int]]]:  # fmt: skip
    """Four maps with the usual names."""
    kv, prefix = kv or width, "cross_" if cross else ""
    return {
        f"{prefix}query": [(f"{at}.q_proj", width, width)],
        f"{prefix}key": [(f"{at}.k_proj", width, kv)],
        f"{prefix}value": [(f"{at}.v_proj", width, kv)],
        f"{prefix}attention_output": [(f"{at}.{out}", width, width)],
    }


def feed_forward(at: str, first: str, last: str, *, width: int = WIDTH) -> dict[str, list[tuple[str, int, int]]]:
    return {"intermediate": [(f"{at}{first}", width, INNER)], "output": [(f"{at}{last}", INNER, width)]}


ROTARY = {
    **attention("self_attn", "o_proj", kv=KV),
    "intermediate": [("mlp.gate_proj", WIDTH, INNER), ("mlp.up_proj", WIDTH, INNER)],
    "output": [("mlp.down_proj", INNER, WIDTH)],
}
PRE_NORMS = {"attention_norm": ["input_layernorm"], "output_norm": ["post_attention_layernorm"]}
SANDWICH = {
    "attention_norm": ["input_layernorm", "post_attention_layernorm"],
    "output_norm": ["pre_feedforward_layernorm", "post_feedforward_layernorm"],
}
FUSED = [("attn.c_attn", WIDTH, 3 * WIDTH)]
GPT2 = {
    "query": FUSED, "key": FUSED, "value": FUSED, "attention_output": [("attn.c_proj", WIDTH, WIDTH)],
    "intermediate": [("mlp.c_fc", WIDTH, 4 * WIDTH)], "output": [("mlp.c_proj", 4 * WIDTH, WIDTH)],
}  # fmt: skip
CLIP_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
CLIP_BIASED = (*CLIP_ATTENTION, "layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2")
CLIP_NORMS = {"attention_norm": ["layer_norm1"], "output_norm": ["layer_norm2"]}
OPT = {**attention("self_attn"), **feed_forward("", "fc1", "fc2")}
OPT_NORMS = {"attention_norm": ["self_attn_layer_norm"], "output_norm": ["final_layer_norm"]}
OPT_BIASED = (*CLIP_ATTENTION, "self_attn_layer_norm", "fc1", "fc2", "final_layer_norm")
WHISPER_BIASED = tuple(m for m in OPT_BIASED if not m.endswith("k_proj"))
CROSS_BIASED = (*(f"encoder_attn.{m}_proj" for m in ("q", "v", "out")), "encoder_attn_layer_norm")


def clip_block(path: str, width: int = WIDTH) -> Block:
    maps = {**attention("self_attn", width=width), **feed_forward("mlp.", "fc1", "fc2", width=width)}
    return Block(path, maps, CLIP_NORMS, CLIP_BIASED, width)


LAYOUTS: dict[str, dict[str, Block]] = {
    **{n: {"decoder": Block("model.layers", ROTARY, PRE_NORMS)} for n in ("Llama", "Mistral", "Gemma", "Qwen3")},
    **{n: {"decoder": Block("model.layers", ROTARY, SANDWICH)} for n in ("Gemma 2", "Gemma 3 (text)")},
    "Qwen2": {
        "decoder": Block("model.layers", ROTARY, PRE_NORMS, CLIP_ATTENTION[:3])
    },
    "GPT-2": {
        "decoder": Block("transformer.h", GPT2, {"attention_norm": ["ln_1"], "output_norm": ["ln_2"]},
                         ("attn.c_attn", "attn.c_proj", "ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj"))
    },
    "OPT": {
        "decoder": Block("model.decoder.layers", OPT, OPT_NORMS, OPT_BIASED)
    },
    "Whisper": {
        "encoder": Block("model.encoder.layers", OPT, OPT_NORMS, WHISPER_BIASED),
        "decoder": Block(
            "model.decoder.layers",
            {**OPT, **attention("encoder_attn", cross=True)},
            {**OPT_NORMS, "cross_attention_norm": ["encoder_attn_layer_norm"]},
            WHISPER_BIASED + CROSS_BIASED,
        ),
    },
    "ViT": {
        "vision": Block(
            "vit.layers",
            {**attention("attention", "o_proj"), **feed_forward("mlp.", "fc1", "fc2")},
            {"attention_norm": ["layernorm_before"], "output_norm": ["layernorm_after"]},
            (*(f"attention.{m}_proj" for m in "qkvo"), "layernorm_before", "layernorm_after", "mlp.fc1", "mlp.fc2"),
        )
    },
    "CLIP": {
        "text": clip_block("text_model.encoder.layers"),
        "vision": clip_block("vision_model.encoder.layers"),
    },
    "LLaVA": {
        "vision": clip_block("model.vision_tower.encoder.layers", OTHER_WIDTH),
        "text": Block("model.language_model.layers", ROTARY, PRE_NORMS),
    },
}  # fmt: skip
#: What trains outside the blocks under SPAFIT's presets; a head that is tied to the embeddings is frozen with them.
HEADS = {
    **{n: {} for n in ("GPT-2", "OPT", "Gemma", "Gemma 2", "Gemma 3 (text)", "Whisper")},
    **{n: {"lm_head.weight": VOCABULARY * WIDTH} for n in ("Llama", "Mistral", "Qwen2", "Qwen3", "LLaVA")},
    "ViT": {"classifier.weight": 2 * WIDTH, "classifier.bias": 2},
    "CLIP": {"visual_projection.weight": 8 * WIDTH, "text_projection.weight": 8 * WIDTH},
}
#: Where only the attention has biases the third stratum has none to train, and neither has a model without any.
ATTENTION_ONLY = ("Qwen2",)


def low_rank(block: Block, b: int, roles: tuple[str, ...], rank: int = RANK) -> dict[str, int]:
    found = {}
    for module, size_in, size_out in (m for role in roles for m in block.linears[role]):
        at = f"{block.path}.{b}.{module}"
        found |= {f"{at}.lora_A.weight": rank * size_in, f"{at}.lora_B.weight": rank * size_out}
    return found


def biases(block: Block, b: int, modules: tuple[str, ...] | list[str]) -> dict[str, int]:
    return {f"{block.path}.{b}.{m}.bias": block.size(m) for m in modules if m in block.biased}


def norms(block: Block, b: int) -> dict[str, int]:
    return {f"{block.path}.{b}.{m}.weight": block.width for modules in block.norms.values() for m in modules}


def spafit_mask(name: str, *, added: bool = False) -> dict[str, int]:
    """SPAFIT's strata [0, 1), [1, 3), [3, 6) of six blocks, by hand."""
    found = dict(HEADS[name])
    for block in LAYOUTS[name].values():
        third = [m for role in ("intermediate", "output") for m, *_ in block.linears[role]]
        for b in (1, 2):
            if block.biased:
                found |= biases(block, b, block.biased)
            elif added:
                maps = {m: o for role in block.linears.values() for m, _, o in role}
                found |= {f"{block.path}.{b}.{m}.lora_B.bias": o for m, o in maps.items()}
            else:
                found |= norms(block, b)
        for b in (3, 4, 5):
            found |= low_rank(block, b, ("query", "key", "value"))
            if block.biased and name not in ATTENTION_ONLY:
                found |= biases(block, b, [*third, *block.norms["output_norm"]])
            elif added:
                found |= {f"{block.path}.{b}.{m}.lora_B.bias": block.size(m) for m in third}
            else:
                found |= norms(block, b)
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_stacks_and_roles_are_those_of_the_architecture(name):
    stacks = find_stacks(FAMILIES[name].build())
    assert [s.name for s in stacks] == list(LAYOUTS[name])
    for stack, block in zip(stacks, LAYOUTS[name].values(), strict=True):
        assert stack.path == block.path
        assert stack.block_paths == tuple(f"{block.path}.{b}" for b in range(DEPTH))
        expected = {role: tuple(m for m, *_ in maps) for role, maps in block.linears.items()}
        expected |= {role: tuple(modules) for role, modules in block.norms.items()}
        assert dict(stack.roles) == expected
        assert set(stack.bias_roles) == {r for r, modules in expected.items() if set(modules) & set(block.biased)}
        assert stack.has_biases == bool(block.biased)


def check_trains(
    family: Family, config: StrataConfig | str, expected: dict[str, int], tmp_path, *, merges: bool = True
):
    """The mask, gradients, two steps, a round trip and merging of one plan."""
    base = family.build()
    model = copy.deepcopy(base)
    start = outputs(family, base)
    stratified = apply_strata(model, plan_for(model, config))
    assert dict(stratified.trainable) == expected
    before = {n: p.detach().clone() for n, p in canonical_parameters(stratified.model).items()}
    received = one_step(family, stratified.model)
    assert {canonical_name(n) for n in received} == set(expected)
    one_step(family, stratified.model)  # LoRA's first factor has no gradient while the second is 0
    after = canonical_parameters(stratified.model)
    assert {n for n, p in after.items() if not torch.equal(p, before[n])} <= set(expected)
    still = {n for n in expected if torch.equal(after[n], before[n])}
    # The gradient of a key's bias is 0 but for rounding: it shifts every score of a query alike.
    assert all(".k_proj." in n and n.endswith("bias") for n in still), still
    got = outputs(family, stratified.model)
    assert (got - start).abs().max() > 1e-3
    save(stratified, tmp_path)
    assert torch.equal(outputs(family, load(tmp_path, copy.deepcopy(base)).model), got)
    with stratified.base_model() as untouched:
        assert torch.equal(outputs(family, untouched), start)
    if merges:
        merged = outputs(family, stratified.merge())
        torch.testing.assert_close(merged, got, atol=1e-5 * max(float(got.abs().max()), 1.0), rtol=0)
    return stratified


@pytest.mark.parametrize("name", LAYOUTS)
def test_spafit_trains_exactly_its_strata_saves_and_merges(name, tmp_path):
    check_trains(FAMILIES[name], "spafit-scaled-I", spafit_mask(name), tmp_path)


BIAS_FREE = ("Llama", "Mistral", "Gemma", "Gemma 2", "Gemma 3 (text)", "Qwen3")


@pytest.mark.parametrize("name", [*BIAS_FREE, "LLaVA"])
def test_spafit_with_added_biases_trains_exactly_them(name, tmp_path):
    check_trains(FAMILIES[name], "bias-added:spafit-scaled-I", spafit_mask(name, added=True), tmp_path, merges=False)


@pytest.mark.parametrize("name", ["Qwen2", "Whisper"])
def test_provenance_says_which_biases_there_are(name):
    model = FAMILIES[name].build()
    said = plan_for(model, "spafit-scaled-I").provenance["substitutions"]
    if name == "Qwen2":
        assert said == [
            "decoder [1, 3): bitfit trains the biases of query, key, value, the only ones",
            "decoder [3, 6): lora+norm for lora+bitfit, no bias in intermediate, output, output_norm",
        ]
    else:
        own = "query, value, attention_output"
        cross = ", cross_query, cross_value, cross_attention_output"
        assert said == [
            f"encoder [1, 3): bitfit trains the biases of {own}, intermediate, output, attention_norm, output_norm, "
            "the only ones",
            f"decoder [1, 3): bitfit trains the biases of {own}, intermediate, output{cross}, attention_norm, "
            "output_norm, cross_attention_norm, the only ones",
        ]


# -- a plan for each stack --------------------------------------------------------------------------------------------


def read(text: str, blocks: dict[str, int]) -> StrataConfig:
    stacks = ", ".join(f"{s}: {n}" for s, n in blocks.items())
    config = StrataConfig.from_yaml(f"schema_version: 1\nmodel: {{id: m, blocks: {{{stacks}}}}}\n{text}")
    assert StrataConfig.from_yaml(config.to_yaml()) == config
    return config


def test_whisper_bitfit_in_the_encoder_and_lora_with_biases_in_the_decoder(tmp_path):
    config = read(
        """\
strata:
  - {stack: encoder, blocks: [0, 4], method: freeze}
  - {stack: encoder, blocks: [4, 6], method: bitfit}
  - {stack: decoder, blocks: [0, 5], method: freeze}
  - stack: decoder
    blocks: [5, 6]
    method: lora+bitfit
    lora: {rank: 2, targets: [query, cross_query, cross_value]}
    bitfit: [cross_attention_output, output_norm]
""",
        {"encoder": DEPTH, "decoder": DEPTH},
    )
    encoder, decoder = LAYOUTS["Whisper"].values()
    expected: dict[str, int] = {}
    for b in (4, 5):
        expected |= biases(encoder, b, encoder.biased)
    expected |= low_rank(decoder, 5, ("query", "cross_query", "cross_value"), 2)
    expected |= biases(decoder, 5, ["encoder_attn.out_proj", "final_layer_norm"])
    assert sum(expected.values()) == 2 * (6 * WIDTH + INNER) + 3 * 2 * 2 * WIDTH + 2 * WIDTH
    stratified = check_trains(FAMILIES["Whisper"], config, expected, tmp_path)
    assert stratified.plan.first_trained_block("encoder") == 4
    assert stratified.plan.first_trained_block("decoder") == 0  # it reads the encoder's states, which change


PER_MODALITY = """\
strata:
  - {stack: vision, blocks: [0, 4], method: freeze}
  - {stack: vision, blocks: [4, 6], method: bitfit}
  - stack: text
    blocks: [0, 6]
    method: lora
    lora: {rank: 4, targets: [query, value]}
outside: {head: freeze, pooler: freeze, projector: %s}
"""
PROJECTOR = {
    "model.multi_modal_projector.linear_1.weight": OTHER_WIDTH * WIDTH,
    "model.multi_modal_projector.linear_1.bias": WIDTH,
    "model.multi_modal_projector.linear_2.weight": WIDTH * WIDTH,
    "model.multi_modal_projector.linear_2.bias": WIDTH,
}


@pytest.mark.parametrize("projector", ["freeze", "bitfit", "full"])
def test_a_plan_per_modality_with_the_projector_frozen_or_trained(projector, tmp_path):
    config = read(PER_MODALITY % projector, {"vision": DEPTH, "text": DEPTH})
    vision, text = LAYOUTS["LLaVA"].values()
    expected: dict[str, int] = {}
    for b in (4, 5):
        expected |= biases(vision, b, vision.biased)
    for b in range(DEPTH):
        expected |= low_rank(text, b, ("query", "value"), 4)
    wanted = {"freeze": (), "bitfit": ("bias",), "full": ("bias", "weight")}[projector]
    expected |= {n: size for n, size in PROJECTOR.items() if n.endswith(wanted)}
    assert ("projector" in config.to_yaml()) == (projector != "freeze")
    check_trains(FAMILIES["LLaVA"], config, expected, tmp_path)


def places(model) -> dict[str, tuple[str, ...]]:
    stacks = find_stacks(model)
    strata = tuple(Stratum(s.name, (0, s.num_blocks), "freeze") for s in stacks)
    outside = Outside("full", "full", "full", "full", "full")
    plan = resolve(model, StrataConfig("m", {s.name: s.num_blocks for s in stacks}, strata, outside))
    return {p.name: p.own for p in plan.parts if p.stratum is None}


def test_what_leads_from_one_stack_to_another_is_the_projector():
    llava = FAMILIES["LLaVA"].build()
    assert set(places(llava)["projector"]) == set(PROJECTOR)
    assert set(places(llava.model)["projector"]) == {n.removeprefix("model.") for n in PROJECTOR}
    pair = places(FAMILIES["EncoderDecoder (BERT and BERT)"].build())
    assert pair["projector"] == ("enc_to_dec_proj.weight", "enc_to_dec_proj.bias")
    assert {n.partition(".predictions")[0] for n in pair["head"]} == {"decoder.cls"}
    # Controls: tables that stacks share, and what leads out of both of CLIP's towers.
    clip = places(FAMILIES["CLIP"].build())
    assert set(clip["head"]) == {"logit_scale", "visual_projection.weight", "text_projection.weight"}
    for name in ("T5", "BART", "CLIP", "BERT", "Whisper", "ViT"):
        assert "projector" not in places(FAMILIES[name].build()), name
    assert "shared.weight" in places(FAMILIES["T5"].build())["embeddings"]


def test_clips_temperature_stays_frozen_and_the_plan_says_so():
    model = FAMILIES["CLIP"].build()
    plan = apply_strata(model, plan_for(model, "spafit-scaled-I"))
    assert "logit_scale" not in plan.trainable
    assert "head: logit_scale cannot be kept in an adapter and stays frozen" in plan.plan.notes


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="runs in a checkout, not beside a wheel")
def test_the_committed_page_is_made_of_its_rows_and_a_row_can_be_made_again():
    place = ROOT / "docs" / "results" / "families"
    spec = importlib.util.spec_from_file_location("families_run", place / "run.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    rows = pd.read_csv(place / "rows.csv", keep_default_na=False)
    assert script.page(rows) == (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert set(rows["family"]) == set(FAMILIES)
    for name in ("Qwen2", "LLaVA"):
        (row,) = rows[rows["family"] == name].to_dict("records")
        assert script.measure(FAMILIES[name]) == row


def test_a_projector_is_refused_a_method_that_is_none():
    with pytest.raises(ConfigError, match=r"projector"):
        Outside(projector="lora")
