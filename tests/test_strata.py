"""StrataConfig: exact round trips, presets against the published definition, and errors that name line and field."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spafit.errors import ConfigError
from spafit.layout import ROLES as LAYOUT_ROLES
from spafit.presets import scaled_boundaries
from spafit.strata import (
    LINEAR_ROLES,
    METHODS,
    OUTSIDE_METHODS,
    PEFT_METHODS,
    ROLES,
    LoraOptions,
    Outside,
    PeftOptions,
    StrataConfig,
    Stratum,
)

PAPER = """\
schema_version: 1
model: {id: bert-large-cased, blocks: {encoder: 24}}
strata:
  - {stack: encoder, blocks: [0, 5],   method: freeze}
  - {stack: encoder, blocks: [5, 10],  method: bitfit}
  - stack: encoder
    blocks: [10, 24]
    method: lora+bitfit
    lora: {rank: 64, alpha: 64, dropout: 0.0, targets: [query, key, value]}   # alpha and dropout: our defaults
    bitfit: [intermediate, output, output_norm]
outside: {embeddings: freeze, pooler: bitfit, head: full}
provenance: {source: by hand, criterion: none, tested: false, created_at: 2024-05-01T12:00:00Z}
"""

# -- round trips ------------------------------------------------------------------------------------------------------

json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)


def role_lists(allowed: tuple[str, ...]) -> st.SearchStrategy:
    return st.lists(st.sampled_from(allowed), min_size=1, unique=True).map(tuple)


learning_rates = st.none() | st.floats(min_value=0, exclude_min=True, max_value=10)
weight_decays = st.none() | st.floats(0, 10)


@st.composite
def configs(draw: st.DrawFn) -> StrataConfig:
    stacks = draw(st.dictionaries(st.text(min_size=1, max_size=8), st.integers(1, 40), min_size=1, max_size=3))
    # One plan is one adapter: what holds for all of its strata is drawn once.
    kind = draw(st.sampled_from(["lora", "dora", "ia3", *PEFT_METHODS]))
    kinds = ("dora", "ia3", "lora", "bias-added")
    allowed = [m for m in METHODS if not m.startswith(kinds) or m.startswith(kind)]
    allowed += ["bias-added"] * (kind == "lora")
    allowed += [kind] * (kind in PEFT_METHODS)
    if kind not in ("lora", "dora"):
        allowed.remove("bitfit")
    dropout, rslora = draw(st.floats(0, 1, exclude_max=True)), draw(st.booleans())
    options = draw(st.dictionaries(st.from_regex("[a-z_]{1,8}", fullmatch=True), json_like, max_size=3))
    strata = []
    for stack, count in stacks.items():
        cuts = draw(st.sets(st.integers(1, count), max_size=5)) | {0, count}
        ends = sorted(cuts)
        for start, stop in itertools.pairwise(ends):
            method = draw(st.sampled_from(allowed))
            lora = LoraOptions(
                draw(st.integers(1, 512)),
                draw(st.none() | st.floats(1e-6, 1e6)),
                dropout,
                draw(role_lists(LINEAR_ROLES)),
                rslora,
            )
            strata.append(
                Stratum(
                    stack,
                    (start, stop),
                    method,
                    lora if method.startswith("lora") or method == "dora" else None,
                    draw(st.none() | role_lists(ROLES)) if "bitfit" in method else None,
                    draw(st.none() | role_lists(LINEAR_ROLES)) if method == "ia3" else None,
                    PeftOptions(draw(role_lists(LINEAR_ROLES)), options) if method in PEFT_METHODS else None,
                    draw(learning_rates) if method != "freeze" else None,
                    draw(weight_decays) if method != "freeze" else None,
                    draw(st.none() | role_lists(LINEAR_ROLES)) if "bias-added" in method else None,
                )
            )
    places = [m for m in OUTSIDE_METHODS if m != "bitfit" or kind in ("lora", "dora")]
    methods = [draw(st.sampled_from(places)) for _ in range(5)]
    frozen = set(methods) == {"freeze"}
    outside = Outside(
        *methods,
        learning_rate=None if frozen else draw(learning_rates),
        weight_decay=None if frozen else draw(weight_decays),
    )
    provenance = draw(st.dictionaries(st.text(max_size=12), json_like, max_size=4))
    return StrataConfig(draw(st.text(min_size=1, max_size=20)), stacks, tuple(strata), outside, provenance)


@given(configs())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_plan_reads_back_equal_from_its_yaml_and_json(config):
    assert StrataConfig.from_yaml(config.to_yaml()) == config
    assert StrataConfig.from_yaml(config.to_json()) == config
    assert StrataConfig.from_dict(json.loads(config.to_json())) == config
    assert StrataConfig.from_yaml(config.to_yaml()).to_yaml() == config.to_yaml()


@pytest.mark.parametrize("name", ["strata.yaml", "strata.json"])
def test_a_saved_file_loads_equal(tmp_path, name):
    config = StrataConfig.preset("spafit-scaled-II", blocks={"encoder": 12, "decoder": 6}, model_id="é–模型")
    assert StrataConfig.load(config.save(tmp_path / name)) == config


def test_json_written_by_other_tools_reads_with_tabs_and_escapes(tmp_path):
    config = StrataConfig.preset("spafit-scaled-I", blocks=6, model_id="😀 a\tb")
    path = tmp_path / "strata.json"
    path.write_text(json.dumps(config.to_dict(), indent="\t"), encoding="utf-8")
    assert StrataConfig.load(path) == config


def test_the_design_example_reads_as_spafit_4_9_and_is_written_the_same_way():
    config = StrataConfig.from_yaml(PAPER)
    assert config.boundaries("encoder") == config.boundaries() == (5, 10)
    assert config.provenance["created_at"] == "2024-05-01T12:00:00Z"
    preset = StrataConfig.preset("SPAFIT-4-9-I", blocks={"encoder": 24}, model_id="bert-large-cased")
    assert config.strata == preset.strata
    assert config.outside == preset.outside
    for line in (
        "model: {id: bert-large-cased, blocks: {encoder: 24}}",
        "  - {stack: encoder, blocks: [0, 5], method: freeze}",
        "    lora: {rank: 64, alpha: 64, dropout: 0.0, targets: [query, key, value]}",
        "    bitfit: [intermediate, output, output_norm]",
        "outside: {embeddings: freeze, pooler: bitfit, head: full}",
    ):
        assert line in preset.to_yaml().splitlines()


# -- presets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "ranges"),
    [
        (1, [(0, 1)]),
        (2, [(0, 1), (1, 2)]),
        (3, [(0, 1), (1, 3)]),
        (6, [(0, 1), (1, 3), (3, 6)]),
        (12, [(0, 3), (3, 5), (5, 12)]),
        (24, [(0, 5), (5, 10), (10, 24)]),
        (30, [(0, 6), (6, 13), (13, 30)]),
    ],
)
def test_scaled_preset_has_the_published_boundaries_and_drops_empty_strata(blocks, ranges):
    assert [s.blocks for s in StrataConfig.preset("spafit-scaled-I", blocks=blocks).strata] == ranges


@given(st.integers(1, 10_000))
def test_scaled_boundaries_follow_the_formula(blocks):
    assert scaled_boundaries(blocks) == (math.floor(5 * blocks / 24 + 0.5), math.floor(10 * blocks / 24 + 0.5))


@given(st.integers(1, 60), st.data())
def test_n1_n2_presets_keep_the_papers_inclusive_ends(blocks, data):
    n2 = data.draw(st.integers(0, blocks - 1))
    n1 = data.draw(st.integers(0, n2))
    config = StrataConfig.preset(f"spafit-{n1}-{n2}-II", blocks={"decoder": blocks})
    method = {b: s for s in config.strata for b in range(*s.blocks)}
    assert [method[b].method for b in range(blocks)] == ["freeze"] * (n1 + 1) + ["bitfit"] * (n2 - n1) + [
        "lora+bitfit"
    ] * (blocks - n2 - 1)
    for stratum in config.strata:
        if stratum.lora is not None:
            assert stratum.lora.targets == ("query", "key", "value", "attention_output")
            assert stratum.bitfit == ("intermediate", "output", "output_norm")
    assert config.boundaries() == (n1 + 1, n2 + 1)


def test_blocks_without_biases_get_norm_in_bitfits_place_and_provenance_says_so():
    config = StrataConfig.preset("spafit-scaled-I", blocks={"decoder": 30}, bias_roles={"decoder": ()})
    assert [s.method for s in config.strata] == ["freeze", "norm", "lora+norm"]
    assert config.outside.pooler == "norm"
    assert len(config.provenance["substitutions"]) == 2
    assert config.check_model({"decoder": 30}, bias_roles={"decoder": ()}) is config
    # Control: with biases everywhere nothing is replaced.
    assert "substitutions" not in StrataConfig.preset("spafit-scaled-I", blocks={"decoder": 30}).provenance


def test_biases_on_query_key_value_alone_keep_bitfit_in_the_middle_only():
    roles = {"decoder": ("query", "key", "value")}
    config = StrataConfig.preset("spafit-scaled-I", blocks={"decoder": 24}, bias_roles=roles)
    assert [s.method for s in config.strata] == ["freeze", "bitfit", "lora+norm"]
    assert config.provenance["substitutions"] == [
        "decoder [5, 10): bitfit trains the biases of query, key, value, the only ones",
        "decoder [10, 24): lora+norm for lora+bitfit, no bias in intermediate, output, output_norm",
    ]
    config.check_model({"decoder": 24}, bias_roles=roles)


def test_third_stratum_leaves_out_roles_without_a_bias_and_says_so():
    roles = {"encoder": ("query", "intermediate", "output")}
    config = StrataConfig.preset("spafit-scaled-I", blocks={"encoder": 24}, bias_roles=roles)
    assert config.strata[2].bitfit == ("intermediate", "output")
    assert config.provenance["substitutions"] == [
        "encoder [5, 10): bitfit trains the biases of query, intermediate, output, the only ones",
        "encoder [10, 24): no bias in output_norm, left out of bitfit",
    ]
    config.check_model({"encoder": 24}, bias_roles=roles)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("spafit-scald-I", "Did you mean 'spafit-scaled-I'"),
        ("spafit-9-4-I", "N1 = 9 is above N2 = 4"),
        ("spafit-4-24-I", "has 24 blocks (0 to 23)"),
        ("lorra", "Did you mean 'lora'"),
    ],
)
def test_unusable_preset_names_are_refused_with_the_remedy(name, words):
    with pytest.raises(ConfigError, match=words.replace("(", r"\(").replace(")", r"\)")):
        StrataConfig.preset(name, blocks=24)


def test_boundaries_of_plans_without_a_middle_or_an_end():
    def plan(*strata: tuple[int, int, str]) -> StrataConfig:
        return StrataConfig("m", {"encoder": 4}, tuple(Stratum("encoder", (a, b), m) for a, b, m in strata))

    assert plan((0, 2, "freeze"), (2, 4, "lora")).boundaries() == (2, 2)
    assert plan((0, 4, "freeze")).boundaries() == (4, 4)
    assert plan((0, 4, "bitfit")).boundaries() == (0, 4)
    assert plan((2, 4, "full"), (0, 2, "norm")).boundaries() == (0, 2)
    with pytest.raises(ConfigError, match="Did you mean 'encoder'"):
        plan((0, 4, "freeze")).boundaries("encodr")


def test_boundaries_of_two_stacks_need_the_stack_named():
    config = StrataConfig.preset("spafit-scaled-I", blocks={"encoder": 12, "decoder": 6})
    assert config.boundaries("decoder") == (1, 3)
    with pytest.raises(ConfigError, match="name the one"):
        config.boundaries()


# -- errors -----------------------------------------------------------------------------------------------------------

BROKEN = {
    "a gap": ("[5, 10]", "[6, 10]", 5, "strata[1].blocks", "Start this one at 5"),
    "an overlap": ("[5, 10]", "[4, 10]", 5, "strata[1].blocks", "overlaps strata[0]"),
    "a gap at the start": ("[0, 5]", "[1, 5]", 4, "strata[0].blocks", "blocks [0, 1)"),
    "blocks beyond the model": ("encoder: 24", "encoder: 22", 7, "strata[2].blocks", "has 22 blocks"),
    "blocks missing at the end": ("encoder: 24", "encoder: 30", 7, "strata[2].blocks", "[24, 30) belong to no stratum"),
    "a stack without strata": ("{encoder: 24}", "{encoder: 24, decoder: 6}", 2, "model.blocks.decoder", "its own plan"),
    "an unknown stack": ("stack: encoder\n", "stack: encodr\n", 6, "strata[2].stack", "Did you mean 'encoder'"),
    "an empty range": ("[5, 10]", "[5, 5]", 5, "strata[1].blocks", "holds no block"),
    "a reversed range": ("[5, 10]", "[10, 5]", 5, "strata[1].blocks", "holds no block"),
    "a negative block": ("[0, 5]", "[-1, 5]", 4, "strata[0].blocks[0]", "at least 0"),
    "three numbers for a range": ("[5, 10]", "[5, 10, 12]", 5, "strata[1].blocks", "two whole numbers"),
    "a word for a range": ("[5, 10]", "middle", 5, "strata[1].blocks", "two whole numbers"),
    "a truth value for a block": ("[0, 5]", "[no, 5]", 4, "strata[0].blocks[0]", "got False"),
    "an unknown role": ("[query, key", "[querry, key", 9, "strata[2].lora.targets[0]", "Did you mean 'query'"),
    "LoRA on a norm": ("[query, key", "[output_norm, key", 9, "strata[2].lora.targets[0]", "linear map"),
    "an unknown bias role": ("[intermediate,", "[intermediat,", 10, "strata[2].bitfit[0]", "Did you mean"),
    "a role named twice": ("[query, key", "[key, key", 9, "strata[2].lora.targets[1]", "twice"),
    "an unknown method": ("method: bitfit}", "method: bitfits}", 5, "strata[1].method", "Did you mean 'bitfit'"),
    "an unknown field": ("rank: 64", "rnak: 64", 9, "strata[2].lora.rnak", "Did you mean 'rank'"),
    "an unknown top field": ("provenance:", "provenence:", 12, "provenence", "Did you mean 'provenance'"),
    "LoRA without targets": ("[query, key, value]", "[]", 9, "strata[2].lora.targets", "nothing would train"),
    "BitFit without roles": (
        "[intermediate, output, output_norm]",
        "[]",
        10,
        "strata[2].bitfit",
        "nothing would train",
    ),
    "an option that nobody reads": ("method: lora+bitfit", "method: lora", 10, "strata[2].bitfit", "does not read"),
    "a rank of zero": ("rank: 64", "rank: 0", 9, "strata[2].lora.rank", "at least 1"),
    "a rank in words": ("rank: 64", "rank: many", 9, "strata[2].lora.rank", "got 'many'"),
    "alpha zero": ("alpha: 64", "alpha: 0", 9, "strata[2].lora.alpha", "above 0"),
    "alpha not a number": ("alpha: 64", "alpha: .nan", 9, "strata[2].lora.alpha", "write a number"),
    "dropout of one": ("dropout: 0.0", "dropout: 1.0", 9, "strata[2].lora.dropout", "below 1"),
    "an option left empty": ("[intermediate, output, output_norm]", "", 10, "strata[2].bitfit", "remove the field"),
    "LoRA outside the blocks": ("head: full", "head: lora", 11, "outside.head", "freeze, bitfit, norm, full"),
    "rsLoRA in words": ("rank: 64", "rank: 64, rslora: maybe", 9, "strata[2].lora.rslora", "true or false"),
    "a learning rate where nothing trains": (
        "method: freeze",
        "method: freeze, learning_rate: 0.1",
        4,
        "strata[0].learning_rate",
        "does not read",
    ),
    "a learning rate of zero": (
        "method: bitfit}",
        "method: bitfit, learning_rate: 0}",
        5,
        "strata[1].learning_rate",
        "above 0",
    ),
    "a learning rate in words": (
        "method: bitfit}",
        "method: bitfit, learning_rate: high}",
        5,
        "strata[1].learning_rate",
        "write a number",
    ),
    "a learning rate left empty": (
        "method: bitfit}",
        "method: bitfit, learning_rate: }",
        5,
        "strata[1].learning_rate",
        "remove the field",
    ),
    "a negative weight decay": (
        "method: bitfit}",
        "method: bitfit, weight_decay: -1}",
        5,
        "strata[1].weight_decay",
        "at least 0",
    ),
    "a misspelt learning rate": (
        "method: bitfit}",
        "method: bitfit, learning_rat: 1}",
        5,
        "strata[1].learning_rat",
        "Did you mean 'learning_rate'",
    ),
    "an endless learning rate outside": (
        "head: full",
        "head: full, learning_rate: .inf",
        11,
        "outside.learning_rate",
        "write a number",
    ),
    "a learning rate for a frozen outside": (
        "pooler: bitfit, head: full",
        "pooler: freeze, head: freeze, learning_rate: 0.1",
        11,
        "outside.learning_rate",
        "nothing reads",
    ),
    "an outside field left empty": ("head: full", "head: ", 11, "outside.head", "remove the field"),
    "two kinds of adapter": (
        "method: bitfit}",
        "method: ia3}",
        8,
        "strata[2].method",
        "strata[2] (encoder [10, 24)) is 'lora+bitfit' and strata[1] (encoder [5, 10)) is 'ia3'",
    ),
    "LoRA beside DoRA": ("method: bitfit}", "method: dora}", 8, "strata[2].method", "Give both the same kind"),
    "two dropouts": (
        "method: bitfit}",
        "method: lora, lora: {dropout: 0.5}}",
        9,
        "strata[2].lora.dropout",
        "one dropout for all its modules. Write the same in both",
    ),
    "two scaling rules": (
        "method: bitfit}",
        "method: lora, lora: {rslora: true}}",
        9,
        "strata[2].lora.rslora",
        "one rslora for all its modules",
    ),
    "BitFit beside IA3": (
        "method: freeze}",
        "method: ia3}",
        8,
        "strata[2].method",
        "is 'ia3'",
    ),
    "a PEFT method misspelt": ("method: freeze}", "method: lohha}", 4, "strata[0].method", "Did you mean 'loha'"),
    "PEFT options for another method": (
        "method: bitfit}",
        "method: bitfit, peft: {targets: [key]}}",
        5,
        "strata[1].peft",
        "does not read",
    ),
    "blocks that are not a mapping": ("{encoder: 24}", "24", 2, "model.blocks", "{encoder: 12}"),
    "a stack without blocks": ("encoder: 24", "encoder: 0", 2, "model.blocks.encoder", "at least 1"),
    "a field twice": ("id: bert-large-cased,", "id: a, id: b,", 2, "model.id", "twice"),
    "a missing field": (", method: freeze", "", 4, "strata[0]", "'method' is missing"),
    "no version": ("schema_version: 1\n", "", 1, "", "Add schema_version: 1"),
    "a version in words": ("schema_version: 1", "schema_version: one", 1, "schema_version", "whole number"),
    "broken YAML": ("blocks: [10, 24]", "blocks: [10, 24", 8, "", "not readable as YAML"),
    "an alias": ("[5, 10]", "*x", 5, "", "aliases"),
    "a Python tag": ("by hand", "!!python/name:os.system x", 12, "provenance.source", "tag"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_bad_files_are_refused_with_line_field_and_remedy(case):
    old, new, line, field, words = BROKEN[case]
    # The alignment in the example is for the eye; one space makes the cases above easier to write.
    text = PAPER.replace("],   ", "], ").replace("],  ", "], ")
    assert old in text
    with pytest.raises(ConfigError) as caught:
        StrataConfig.from_yaml(text.replace(old, new, 1), file="my.yaml")
    message = str(caught.value)
    assert message.startswith(f"my.yaml, line {line}{f', {field}:' if field else ''}"), message
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "text", ["", "# only a comment\n", "- a list\n", "just words", "a: [", "[" * 3000, "<<: {a: 1}"]
)
def test_files_that_are_no_plan_at_all_are_refused_in_one_sentence(text):
    with pytest.raises(ConfigError) as caught:
        StrataConfig.from_yaml(text, file="my.yaml")
    assert str(caught.value).startswith("my.yaml")
    assert "\n" not in str(caught.value)


def test_unreadable_files_are_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"Cannot read .*missing\.yaml"):
        StrataConfig.load(tmp_path / "missing.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"model: \xe9\xe8")
    with pytest.raises(ConfigError, match="not UTF-8"):
        StrataConfig.load(tmp_path / "latin.yaml")
    (tmp_path / "bad.json").write_text('{"schema_version": 1,\n "model": }')
    with pytest.raises(ConfigError, match=r"bad\.json, line 2: not JSON"):
        StrataConfig.load(tmp_path / "bad.json")


def test_errors_in_json_name_the_line_too(tmp_path):
    path = tmp_path / "strata.json"
    config = StrataConfig.preset("spafit-4-9-I", blocks=24)
    path.write_text(config.to_json().replace('"method": "bitfit"', '"method": "bitfti"'))
    line = next(i for i, text in enumerate(path.read_text().splitlines(), 1) if "bitfti" in text)
    with pytest.raises(ConfigError, match=rf"line {line}, strata\[1\].method.*Did you mean 'bitfit'"):
        StrataConfig.load(path)


def test_plans_built_in_python_get_the_same_checks():
    with pytest.raises(ConfigError, match=r"^strata\[1\]\.blocks: blocks \[2, 3\)"):
        StrataConfig("m", {"encoder": 6}, (Stratum("encoder", (0, 2), "freeze"), Stratum("encoder", (3, 6), "lora")))
    with pytest.raises(ConfigError, match="Did you mean 'dora'"):
        Stratum("encoder", (0, 2), "dorra")
    with pytest.raises(ConfigError, match=r"provenance\.when: got object"):
        StrataConfig("m", {"encoder": 1}, (Stratum("encoder", (0, 1), "full"),), provenance={"when": object()})
    with pytest.raises(ConfigError, match="0 ≤ s1 ≤ s2 ≤ 6"):
        StrataConfig.from_boundaries({"encoder": (4, 2)}, blocks={"encoder": 6})
    with pytest.raises(ConfigError, match="one pair per stack"):
        StrataConfig.from_boundaries({"encoder": (1, 2)}, blocks={"encoder": 6, "decoder": 6})


def test_bitfit_written_by_hand_for_a_model_without_biases_names_line_and_norm():
    config = StrataConfig.from_yaml(PAPER, file="my.yaml")
    with pytest.raises(ConfigError, match=r"my\.yaml, line 5, strata\[1\]\.method.*Write norm in its place"):
        config.check_model({"encoder": 24}, bias_roles={"encoder": ()})
    with pytest.raises(ConfigError, match=r"line 10, strata\[2\]\.bitfit\[0\].*'intermediate' has no bias"):
        config.check_model({"encoder": 24}, bias_roles={"encoder": ("query", "key", "value")})
    with pytest.raises(ConfigError, match=r"line 2, model\.blocks.*the model has encoder of 12 blocks"):
        config.check_model({"encoder": 12})
    assert config.check_model({"encoder": 24}, bias_roles={"encoder": ROLES}) is config


# -- one plan, one adapter --------------------------------------------------------------------------------------------

NAMED = """\
schema_version: 1
model: {id: m, blocks: {encoder: 6}}
strata:
  - {stack: encoder, blocks: [0, 2], method: norm}
  - stack: encoder
    blocks: [2, 4]
    method: loha
    peft: {targets: [query, value], options: {r: 4, init_weights: true}}
  - stack: encoder
    blocks: [4, 6]
    method: loha
    peft: {targets: [output], options: {r: 4, init_weights: true}}
    learning_rate: 1e-3
outside: {pooler: freeze, learning_rate: 0.01, weight_decay: 0.1}
"""


def test_peft_methods_are_read_by_name_with_targets_of_their_own():
    config = StrataConfig.from_yaml(NAMED)
    assert [s.adapter for s in config.strata] == [None, "loha", "loha"]
    assert config.strata[1].peft == PeftOptions(("query", "value"), {"r": 4, "init_weights": True})
    assert config.strata[2].learning_rate == 0.001
    assert (config.outside.learning_rate, config.outside.weight_decay) == (0.01, 0.1)
    assert StrataConfig.from_yaml(config.to_yaml()) == config
    text = config.describe()
    assert "loha on output, r 4, init_weights True; learning rate 0.001" in text
    assert "final norm freeze, learning rate 0.01, weight decay 0.1" in text
    assert Stratum("encoder", (0, 1), "vera").peft == PeftOptions()


@pytest.mark.parametrize(
    ("old", "new", "line", "field", "words"),
    [
        (
            "[output], options: {r: 4,",
            "[output], options: {r: 8,",
            12,
            "strata[2].peft.options",
            "Write the same in both",
        ),
        ("method: norm", "method: bitfit", 4, "strata[0].method", "strata[1] (encoder [2, 4)) is 'loha'"),
        ("pooler: freeze", "pooler: bitfit", 14, "outside.pooler", "carry trained biases"),
        ("pooler: freeze, ", "", 14, "outside.pooler", "Write norm, full or freeze for outside.pooler"),
        ("targets: [output]", "targets: [output_norm]", 12, "strata[2].peft.targets[0]", "linear map"),
        ("targets: [output]", "target: [output]", 12, "strata[2].peft.target", "Did you mean 'targets'"),
        ("{r: 4, init", "{r: .nan, init", 8, "strata[1].peft.options.r", "finite"),
        ("{r: 4, init", "{2r: 4, init", 8, "strata[1].peft.options", "not the name of a PEFT option"),
        ("{r: 4, init", "{bias: all, init", 8, "strata[1].peft.options.bias", "follows from the plan"),
        ("options: {r: 4, init_weights: true}", "options: 4", 8, "strata[1].peft.options", "write a mapping"),
    ],
)
def test_a_plan_that_is_not_one_adapter_is_refused_with_both_places(old, new, line, field, words):
    assert old in NAMED
    with pytest.raises(ConfigError) as caught:
        StrataConfig.from_yaml(NAMED.replace(old, new, 1), file="my.yaml")
    assert str(caught.value).startswith(f"my.yaml, line {line}, {field}:"), caught.value
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ranks_alphas_and_targets_may_differ_and_lora_goes_with_biases_and_norms():
    strata = (
        Stratum("encoder", (0, 1), "lora", LoraOptions(4, 8, targets=("key",))),
        Stratum("encoder", (1, 2), "lora+bitfit", LoraOptions(8, 1)),
        Stratum("encoder", (2, 3), "lora+norm", LoraOptions(16)),
        Stratum("encoder", (3, 4), "bitfit", weight_decay=0),
    )
    assert StrataConfig("m", {"encoder": 4}, strata).strata == strata
    # DoRA is a LoRA configuration too, so biases may train beside it.
    StrataConfig("m", {"encoder": 2}, (Stratum("encoder", (0, 1), "dora"), Stratum("encoder", (1, 2), "bitfit")))


def test_fields_at_their_defaults_are_not_written():
    text = StrataConfig.preset("spafit-scaled-I", blocks=6).to_yaml()
    assert not any(word in text for word in ("rslora", "learning_rate", "weight_decay", "peft:", "final_norm"))
    written = StrataConfig("m", {"encoder": 1}, (Stratum("encoder", (0, 1), "lora", LoraOptions(rslora=True)),))
    assert "rslora: true" in written.to_yaml()


def test_a_quoted_key_that_looks_like_a_merge_key_is_text():
    config = StrataConfig.preset("head", blocks=2).with_provenance({"<<": 1})
    assert StrataConfig.from_yaml(config.to_yaml()) == config


@pytest.fixture(scope="module")
def peft_configs():
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return {kind.value.lower(): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def test_methods_by_name_are_those_of_peft_that_take_target_modules(peft_configs):
    for name in PEFT_METHODS:
        fields = peft_configs[name].__dataclass_fields__
        assert {"target_modules", "modules_to_save"} <= set(fields), name
    assert not set(PEFT_METHODS) & set(METHODS)


@pytest.mark.filterwarnings("ignore")  # PEFT's own, which differ from method to method
def test_methods_by_name_put_tensors_of_their_own_on_each_target_and_nowhere_else(peft_configs):
    import torch
    from peft import get_peft_model

    def trained(name: str, **options: object) -> tuple[set[str], set[str], set[str]]:
        model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(3)))
        extra = {"adalora": {"total_step": 10}, "c3a": {"block_size": 32}, "vblora": {"vector_length": 32}}
        wrapped = get_peft_model(model, peft_configs[name](target_modules=["0", "2"], **extra.get(name, {})))
        names = {n.removeprefix("base_model.model.") for n, p in wrapped.named_parameters() if p.requires_grad}
        return {n for n in names if n.startswith("0.")}, {n for n in names if n.startswith("2.")}, names

    for name in PEFT_METHODS:
        first, second, everything = trained(name)
        assert first, name
        assert everything == first | second, name
        assert {n[2:] for n in first} == {n[2:] for n in second}, name
    # Control: methods that are left out because their modules share tensors.
    for name in ("vblora", "unilora"):
        first, second, everything = trained(name)
        assert {n[2:] for n in first} != {n[2:] for n in second} or everything != first | second, name


# -- newer files ------------------------------------------------------------------------------------------------------


def test_newer_files_load_with_one_warning_that_names_what_is_ignored():
    newer = PAPER.replace("schema_version: 1", "schema_version: 9").replace("rank: 64", "rank: 64, quantum: true")
    newer += "mood: sunny\n"
    with pytest.warns(UserWarning, match="schema version 9, newer") as caught:
        config = StrataConfig.from_yaml(newer, file="my.yaml")
    assert len(caught) == 1
    assert "mood" in str(caught[0].message)
    assert "quantum" in str(caught[0].message)
    assert config == StrataConfig.from_yaml(PAPER)
    # Control: a file of this version warns of nothing, and its unknown fields are errors.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        StrataConfig.from_yaml(PAPER)
    with pytest.raises(ConfigError, match="unknown field 'mood'"):
        StrataConfig.from_yaml(newer.replace("schema_version: 9", "schema_version: 1"))


# -- the rest ---------------------------------------------------------------------------------------------------------


def test_describe_shows_every_stratum_and_what_trains():
    text = StrataConfig.from_yaml(PAPER).describe()
    assert "bert-large-cased: encoder of 24 blocks" in text
    assert "[10, 24)  14     lora+bitfit  LoRA rank 64 on query, key, value; biases of intermediate" in text
    assert "tested against baselines: no" in text


def test_html_is_escaped():
    html = StrataConfig.preset("spafit-scaled-I", blocks=6, model_id="<script>")._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


def test_numbers_that_are_not_finite_become_null_in_provenance():
    import numpy as np

    config = StrataConfig.preset("spafit-scaled-I", blocks=6).with_provenance(
        {"a": float("nan"), "b": np.float64(0.5), "c": (np.int64(1), np.array([1.0, np.inf]))}
    )
    assert [config.provenance[k] for k in "abc"] == [None, 0.5, [1, [1.0, None]]]
    assert StrataConfig.from_yaml(config.to_yaml()) == config


def test_numbers_with_exponents_are_numbers():
    assert StrataConfig.from_yaml(PAPER.replace("dropout: 0.0", "dropout: 1e-1")).strata[2].lora.dropout == 0.1


def test_roles_are_those_that_the_stack_finder_knows():
    assert set(ROLES) == set(LAYOUT_ROLES)


def test_reading_a_plan_loads_neither_torch_nor_pandas():
    code = (
        "import sys; from spafit.strata import StrataConfig; c = StrataConfig.preset('spafit-scaled-I', blocks=6); "
        "StrataConfig.from_yaml(c.to_yaml()); print([m for m in ('torch', 'pandas') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
