"""Named plans: what each trains, against the published counts and an independent count of parameters."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spafit.derived_plans import count_only_plan, lora_matched_plan, random_plan, reversed_plan
from spafit.errors import ConfigError
from spafit.presets import PRESETS, spafit_parameters
from spafit.strata import LINEAR_ROLES, LoraOptions, Outside, StrataConfig, Stratum

BERT_ROLES = (*LINEAR_ROLES[:6], "attention_norm", "output_norm")
FROZEN_AROUND = Outside(pooler="freeze")


def bert_count(width: int, intermediate: int, labels: int, *, vocabulary: int = 1000):
    """Trainable parameters of a plan on a model built like BERT, counted tensor by tensor."""
    linear = dict.fromkeys(("query", "key", "value", "attention_output"), (width, width))
    linear |= {"intermediate": (width, intermediate), "output": (intermediate, width)}
    biases = {role: shape[1] for role, shape in linear.items()} | {"attention_norm": width, "output_norm": width}

    def block(stratum: Stratum) -> int:
        total = 0
        if stratum.lora is not None:
            total += sum(stratum.lora.rank * sum(linear[role]) for role in stratum.lora.targets)
        if "bitfit" in stratum.method:
            total += sum(biases[role] for role in (stratum.bitfit or biases))
        if "norm" in stratum.method:
            total += 4 * width
        if stratum.method == "full":
            total += sum(a * b for a, b in linear.values()) + sum(biases.values()) + 2 * width
        return total

    def count(plan: StrataConfig) -> int:
        total = sum(block(s) * (s.blocks[1] - s.blocks[0]) for s in plan.strata)
        total += {"freeze": 0, "bitfit": width, "norm": 2 * width, "full": (vocabulary + 2) * width}[
            plan.outside.embeddings
        ]
        total += {"freeze": 0, "bitfit": width, "norm": 0, "full": width * width + width}[plan.outside.pooler]
        return total + {"freeze": 0, "full": (width + 1) * labels}[plan.outside.head]

    return count


BERT_LARGE = bert_count(1024, 4096, 2)


def methods(plan: StrataConfig, stack: str = "encoder") -> list[str]:
    """The method of each block of a stack."""
    found = {b: s.method for s in plan.strata if s.stack == stack for b in range(*s.blocks)}
    return [found[b] for b in range(plan.blocks[stack])]


# -- the published counts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "labels", "wanted"),
    [
        ("I", 2, 5_650_434),
        ("II", 2, 7_485_442),
        ("I", 3, 5_651_459),
        ("II", 3, 7_486_467),
        ("I", 1, 5_649_409),
        ("II", 1, 7_484_417),
    ],
)
def test_spafit_4_9_on_bert_large_has_the_derived_number_of_parameters(kind, labels, wanted):
    assert spafit_parameters(4, 9, num_blocks=24, width=1024, labels=labels, adapter_type=kind) == wanted
    plan = StrataConfig.preset(f"spafit-4-9-{kind}", blocks=24)
    assert bert_count(1024, 4096, labels)(plan) == wanted


@given(
    st.integers(1, 30),
    st.data(),
    st.integers(1, 64),
    st.integers(1, 300),
    st.integers(1, 5),
    st.sampled_from(["I", "II"]),
)
@settings(max_examples=60, deadline=None)
def test_the_formula_counts_what_the_plan_trains_for_every_n1_n2_and_size(blocks, data, width, middle, labels, kind):
    n2 = data.draw(st.integers(0, blocks - 1))
    n1 = data.draw(st.integers(0, n2))
    plan = StrataConfig.preset(f"spafit-{n1}-{n2}-{kind}", blocks=blocks)
    formula = spafit_parameters(
        n1, n2, num_blocks=blocks, width=width, labels=labels, adapter_type=kind, intermediate_size=middle
    )
    assert formula == bert_count(width, middle, labels)(plan)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n1": 10}, "0 ≤ N1 ≤ N2 < 24"),
        ({"n2": 24}, "0 ≤ N1 ≤ N2 < 24"),
        ({"n1": -1}, "0 ≤ N1 ≤ N2 < 24"),
        ({"rank": 0}, "rank is 0"),
        ({"adapter_type": "III"}, "Allowed: I, II"),
    ],
)
def test_the_formula_refuses_what_it_does_not_hold_for(changes, words):
    arguments = {"n1": 4, "n2": 9, "num_blocks": 24, "width": 8, "labels": 2} | changes
    with pytest.raises(ConfigError, match=words):
        spafit_parameters(arguments.pop("n1"), arguments.pop("n2"), **arguments)


# -- one method for all blocks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "by_block", "outside"),
    [
        ("full", ["full"] * 6, Outside("full", "full", "full", "full", "full")),
        ("head", ["freeze"] * 6, FROZEN_AROUND),
        ("bitfit", ["bitfit"] * 6, Outside("bitfit", "bitfit", "full", "bitfit", "bitfit")),
        ("norm", ["norm"] * 6, Outside("norm", "norm", "full", "norm", "norm")),
        ("lora", ["lora"] * 6, FROZEN_AROUND),
        ("last-1", ["freeze"] * 5 + ["full"], Outside("freeze", "full", "full", "full")),
        ("Last-6", ["full"] * 6, Outside("freeze", "full", "full", "full")),
        ("thirds", ["freeze"] * 2 + ["bitfit"] * 2 + ["lora+bitfit"] * 2, Outside()),
    ],
)
def test_presets_give_each_block_the_method_that_their_name_says(name, by_block, outside):
    plan = StrataConfig.preset(name, blocks={"encoder": 6, "decoder": 6})
    assert methods(plan) == methods(plan, "decoder") == by_block
    assert plan.outside == outside
    assert plan.provenance["source"] == f"preset {name.lower()}"
    assert plan.provenance["tested"] is False
    assert StrataConfig.from_yaml(plan.to_yaml()) == plan
    if name == "lora":
        assert plan.strata[0].lora == LoraOptions(64, targets=("query", "key", "value"))


@pytest.mark.parametrize(("blocks", "cuts"), [(1, (0, 1)), (2, (1, 1)), (4, (1, 3)), (5, (2, 3)), (24, (8, 16))])
def test_thirds_are_rounded(blocks, cuts):
    assert (
        StrataConfig.preset("thirds", blocks=blocks).boundaries() == cuts == (round(blocks / 3), round(2 * blocks / 3))
    )


def test_bitfit_trains_norms_where_blocks_have_no_bias_and_says_so():
    roles = {"vision": BERT_ROLES, "text": ()}
    plan = StrataConfig.preset("bitfit", blocks={"vision": 4, "text": 3}, bias_roles=roles)
    assert [s.method for s in plan.strata] == ["bitfit", "norm"]
    assert plan.provenance["substitutions"] == ["text [0, 3): norm for bitfit, the blocks have no bias"]
    assert plan.outside.embeddings == "bitfit"
    none = StrataConfig.preset("bitfit", blocks={"decoder": 3}, bias_roles={"decoder": ()})
    assert none.outside == Outside("norm", "norm", "full", "norm", "norm")
    # Control: with biases nothing is replaced.
    assert "substitutions" not in StrataConfig.preset("bitfit", blocks=3).provenance


def test_lora_all_linear_targets_the_linear_maps_that_each_stack_has():
    roles = {"encoder": BERT_ROLES, "decoder": ("output_norm", "cross_value", "output")}
    plan = StrataConfig.preset("lora-all-linear", blocks={"encoder": 2, "decoder": 3}, roles=roles)
    assert [s.lora.targets for s in plan.strata if s.lora] == [LINEAR_ROLES[:6], ("output", "cross_value")]


# -- plans made from plans --------------------------------------------------------------------------------------------


def test_reversed_mirrors_each_stack_and_twice_is_the_start():
    plan = StrataConfig.preset("spafit-scaled-II", blocks={"encoder": 24, "decoder": 6})
    mirrored = StrataConfig.preset("reversed:spafit-scaled-II", blocks={"encoder": 24, "decoder": 6})
    for stack in plan.blocks:
        assert methods(mirrored, stack) == methods(plan, stack)[::-1]
    assert mirrored.outside == plan.outside
    twice = StrataConfig.preset("Reversed:reversed:SPAFIT-scaled-ii", blocks={"encoder": 24, "decoder": 6})
    assert twice.strata == plan.strata
    assert twice.provenance["source"] == "preset reversed:reversed:spafit-scaled-II"


@given(st.integers(1, 40), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_random_keeps_the_number_of_blocks_per_method_and_merges_equal_neighbours(blocks, seed):
    plan = StrataConfig.preset("spafit-scaled-I", blocks=blocks)
    drawn = StrataConfig.preset(f"random:spafit-scaled-I:{seed}", blocks=blocks)
    assert sorted(methods(drawn)) == sorted(methods(plan))
    assert all(a.method != b.method for a, b in itertools.pairwise(drawn.strata))
    assert drawn == StrataConfig.preset(f"random:spafit-scaled-I:{seed}", blocks=blocks)


def test_random_depends_on_the_seed_and_reaches_every_place():
    drawn = [methods(StrataConfig.preset(f"random:spafit-4-9-I:{seed}", blocks=24)) for seed in range(300)]
    assert len({tuple(m) for m in drawn}) == 300
    # Five of 24 blocks are frozen: 62.5 of 300 draws per block, sd 7.0.
    counts = [sum(m[block] == "freeze" for m in drawn) for block in range(24)]
    assert 35 < min(counts) <= max(counts) < 90


def test_substitutions_of_moved_plans_name_the_plan_that_they_speak_of():
    plan = StrataConfig.preset("reversed:spafit-4-9-I", blocks={"decoder": 24}, bias_roles={"decoder": ()})
    assert plan.provenance["substitutions"][0].startswith("preset spafit-4-9-I: decoder [5, 10): norm for bitfit")


INNER = ["spafit-4-9-I", "spafit-4-9-II", "spafit-0-0-I", "thirds", "bitfit", "last-2", "full", "reversed:spafit-4-9-I"]


def nearest_rank(at_rank, wanted: int, highest: int) -> int:
    """By trying every rank; the smaller of two that are as near."""
    return min(range(1, highest), key=lambda rank: (abs(BERT_LARGE(at_rank(rank)) - wanted), rank))


def with_rank(plan: StrataConfig, rank: int) -> StrataConfig:
    """The plan at another rank."""
    strata = [
        Stratum(s.stack, s.blocks, s.method, LoraOptions(rank, targets=s.lora.targets), s.bitfit) if s.lora else s
        for s in plan.strata
    ]
    return StrataConfig(plan.model_id, plan.blocks, tuple(strata), plan.outside)


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("kind", ["lora-matched", "count-only"])
def test_the_rank_is_the_nearest_of_all_ranks_and_the_difference_is_told(kind, inner):
    plan = StrataConfig.preset(inner, blocks=24)
    derived = StrataConfig.preset(f"{kind}:{inner}", blocks=24, count=BERT_LARGE)
    wanted, got = BERT_LARGE(plan), BERT_LARGE(derived)
    assert derived.provenance["parameters"] == {"wanted": wanted, "got": got, "difference": got - wanted}
    assert derived.provenance["source"] == f"preset {kind}:{inner}"
    (low_rank,) = (s for s in derived.strata if s.lora)
    assert low_rank.lora.rank == nearest_rank(lambda r: with_rank(derived, r), wanted, max(3, 2 * low_rank.lora.rank))
    assert low_rank.lora.alpha == low_rank.lora.rank
    if kind == "lora-matched":
        assert methods(derived) == ["lora"] * 24
        assert derived.outside == FROZEN_AROUND
    else:
        trained = sum(m != "freeze" for m in methods(plan))
        assert methods(derived) == ["freeze"] * (24 - trained) + ["lora+bitfit"] * trained
        assert derived.outside == plan.outside


def test_count_only_keeps_the_targets_dropout_and_scale_of_the_plan():
    lora = LoraOptions(8, 16, 0.25, ("query", "output"))
    strata = (Stratum("encoder", (0, 4), "freeze"), Stratum("encoder", (4, 8), "norm"),
              Stratum("encoder", (8, 10), "lora+norm", lora), Stratum("encoder", (10, 24), "freeze"))  # fmt: skip
    plan = StrataConfig("m", {"encoder": 24}, strata, Outside(pooler="norm", learning_rate=0.5))
    derived = count_only_plan(plan, count=BERT_LARGE, bias_roles={"encoder": ()})
    assert methods(derived) == ["freeze"] * 18 + ["lora+norm"] * 6
    got = derived.strata[-1].lora
    assert got is not None
    assert got.alpha == 2 * got.rank
    assert (got.dropout, got.targets) == (0.25, ("query", "output"))
    assert derived.outside == plan.outside
    assert derived.provenance["source"] == "as many trained blocks as another plan, the last ones"
    assert derived.provenance["substitutions"]


def test_count_only_under_rslora_keeps_alpha():
    plan = StrataConfig("m", {"encoder": 4}, (Stratum("encoder", (0, 4), "lora", LoraOptions(8, 16, rslora=True)),))
    derived = count_only_plan(plan, count=BERT_LARGE)
    assert derived.strata[-1].lora.rslora
    assert derived.strata[-1].lora.alpha == 16
    assert derived.strata[-1].lora.rank != 8


def test_matching_survives_a_count_that_is_not_quite_a_line():
    def stepped(plan: StrataConfig) -> int:
        return 10 * BERT_LARGE(plan) + 3_000_000 * sum(s.lora is not None and s.lora.rank > 5 for s in plan.strata)

    plan = StrataConfig.preset("spafit-4-9-I", blocks=24)
    derived = lora_matched_plan(plan, count=stepped)
    ranks = {r: abs(stepped(with_rank(derived, r)) - stepped(plan)) for r in range(1, 100)}
    assert derived.strata[0].lora.rank == min(ranks, key=ranks.__getitem__)


def test_a_count_that_ignores_the_rank_is_refused():
    with pytest.raises(ConfigError, match="do not grow with the rank"):
        lora_matched_plan(StrataConfig.preset("head", blocks=2), count=lambda plan: 7)


def test_plans_from_files_can_be_compared_too(tmp_path):
    path = StrataConfig.preset("thirds", blocks=6).save(tmp_path / "strata.yaml")
    plan = StrataConfig.load(path)
    assert methods(reversed_plan(plan)) == methods(plan)[::-1]
    assert sorted(methods(random_plan(plan, seed=1))) == sorted(methods(plan))
    # Errors found later must not point at lines of a file that does not hold these strata.
    assert plan.origin is not None
    assert reversed_plan(plan).origin is random_plan(plan, seed=1).origin is None
    assert lora_matched_plan(plan, count=BERT_LARGE).origin is None


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_every_listed_name_makes_a_plan_that_reads_back_equal(name):
    for pattern, value in {"PRESET": "spafit-1-2-I", "SEED": "3", "N1": "1", "N2": "2", "-K": "-2"}.items():
        name = name.replace(pattern, value)
    roles: Mapping[str, tuple[str, ...]] = {"encoder": BERT_ROLES}
    biases = {"encoder": ()} if name.startswith("bias-added") else roles
    plan = StrataConfig.preset(name, blocks=6, roles=roles, bias_roles=biases, model_id="m", count=BERT_LARGE)
    assert plan.provenance["source"] == f"preset {name}"
    assert plan.model_id == "m"
    assert StrataConfig.from_yaml(plan.to_yaml()) == plan
    plan.check_model({"encoder": 6}, bias_roles=biases)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("SPAFIT-scaled", "Did you mean 'spafit-scaled-I'"),
        ("spafit-4-9", "Did you mean 'spafit-N1-N2-I'"),
        ("last3", "Did you mean 'last-K'"),
        ("last-0", "Use head"),
        ("last-25", "stack 'encoder' has 24 blocks. Lower K, or use full"),
        ("revrsed:full", "Did you mean 'reversed'"),
        ("reversed:lorra", "'lorra' in 'reversed:lorra' is not known"),
        ("reversed:", "reversed needs a preset"),
        ("random:full", "needs a preset and a seed"),
        ("random:full:one", "needs a preset and a seed"),
        ("lora-matched:bitfit", "Apply it to a model, or give count"),
        ("reversed:count-only:full", "Apply it to a model, or give count"),
        ("lora-all-linear", "Apply it to a model, or give roles"),
        ("full:3", "is not known"),
        ("", "is not known"),
    ],
)
def test_unusable_names_are_refused_with_the_remedy(name, words):
    with pytest.raises(ConfigError) as caught:
        StrataConfig.preset(name, blocks=24)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_plan_without_trained_blocks_has_no_count_only_and_a_stack_without_linear_maps_no_lora():
    with pytest.raises(ConfigError, match="no block trains there"):
        StrataConfig.preset("count-only:head", blocks=4, count=BERT_LARGE)
    with pytest.raises(ConfigError, match="no linear map is known in the blocks of stack 'text'"):
        StrataConfig.preset("lora-all-linear", blocks={"text": 4}, roles={"text": ("output_norm",)})
