"""Hypothesis files: the shipped ones, their digest, and one sentence for each file that does not hold together."""

from __future__ import annotations

from dataclasses import replace

import pytest

from analysis.hypothesis import DEFAULT, Hypothesis, KnowledgeType, default_hypothesis, parse, shipped_hypotheses
from spafit.errors import ConfigError

SMALL = """\
schema_version: 1
types:
  - name: low
    tasks: [a, 'b*']
    range: [0, 0.5]
  - name: high
    range: [0.5, 1]
delta: 0.1
"""


def small() -> Hypothesis:
    return parse(SMALL, file="mine.yaml")


def test_the_default_states_the_claim_in_thirds():
    claim = default_hypothesis()
    assert claim.levels == ("surface", "syntax", "semantics")
    assert (claim.alpha, claim.delta, claim.seeds, claim.poolings) == (0.05, 0.1, 3, 2)
    assert claim.ranges(24) == ((0, 8), (8, 16), (16, 24))
    assert claim.ranges(6) == ((0, 2), (2, 4), (4, 6))
    assert {DEFAULT, "edge-probing", "best-layer"} == set(shipped_hypotheses())


@pytest.mark.parametrize("name", sorted(shipped_hypotheses()))
def test_shipped_files_are_what_they_are_called_and_survive_a_round_trip(name, tmp_path):
    claim = Hypothesis.load(name)
    assert claim.name == name
    assert claim.description
    again = Hypothesis.load(claim.save(tmp_path / "again.yaml"))
    assert again == claim
    assert again.digest == claim.digest


def test_a_task_belongs_to_the_type_that_names_it_before_the_one_that_names_its_level():
    claim = small()
    assert claim.type_of("b1", "high") == "low"
    assert claim.type_of("c", "high") == "high"
    assert claim.type_of("c", "other") is None
    default = default_hypothesis()
    assert [default.type_of(t, "other") for t in ("WC", "BShift", "SOMO", "wc")] == [*default.levels, None]
    assert default.type_of("core.tense", "semantics") == "semantics"
    assert default.type_of("senteval.SOMO", "surface") == "semantics"


CHANGES = {
    "alpha": 0.01, "delta": 0.2, "min_tasks": 3, "seeds": 5, "poolings": 3,
    "probes": ("linear",), "interventions": ("erasure",), "split_seed": 1, "statistic": "best",
}  # fmt: skip


def test_the_digest_changes_with_every_field_and_with_nothing_else():
    claim = default_hypothesis()
    types = claim.types
    others = [replace(claim, **{k: v}) for k, v in CHANGES.items()]
    others += [
        replace(claim, types=types[::-1]),
        replace(claim, types=(replace(types[0], range=(0.0, 0.4)), *types[1:])),
        replace(claim, types=(replace(types[0], tasks=("x",)), *types[1:])),
        replace(claim, types=tuple(replace(t, range=None) for t in types)),
        replace(claim, types=tuple(replace(t, range=None) for t in types), held_out="tasks"),
    ]
    assert len({c.digest for c in (claim, *others)}) == 1 + len(others)
    assert set(CHANGES) | {"types", "held_out", "name", "description"} == set(Hypothesis.__dataclass_fields__)
    assert replace(claim, name="another", description="in other words").digest == claim.digest
    spaced = SMALL.replace("delta: 0.1\n", "# a comment\n\ndelta:   0.10\n")
    assert parse(spaced, file="x").digest == small().digest


@pytest.mark.parametrize(
    ("old", "new", "line", "sentence"),
    [
        ("delta: 0.1", "delta: 1.5", 8, "delta: got 1.5; write a number between 0 and 1"),
        ("delta: 0.1", "delta: much", 8, "delta: got 'much'; write a number"),
        ("delta: 0.1", "dleta: 0.1", 8, "unknown field 'dleta'.*Did you mean 'delta'"),
        ("delta: 0.1", "alpha: 0.5", 8, "alpha: got 0.5"),
        ("delta: 0.1", "min_tasks: 1", 8, "whole number of at least 2"),
        ("delta: 0.1", "seeds: 1", 8, "whole number of at least 2"),
        ("delta: 0.1", "held_out: item", 8, "Did you mean 'items'"),
        ("delta: 0.1", "statistic: cog", 8, "not a depth of a task. Allowed: emergence_cog, best"),
        ("delta: 0.1", "interventions: [erase]", 8, "Did you mean 'erasure'"),
        ("delta: 0.1", "probes: []", 8, "the list is empty"),
        ("delta: 0.1", "probes: linear", 8, "write a list"),
        ("delta: 0.1", "held_out: tasks", 5, "low has a claimed range, but held_out: tasks chooses"),
        ("range: [0, 0.5]", "range: [0.5, 0.5]", 5, "0 <= start < stop <= 1"),
        ("range: [0, 0.5]", "range: [0, 2]", 5, "0 <= start < stop <= 1"),
        ("range: [0, 0.5]", "range: half", 5, r"write \[start, stop\]"),
        ("range: [0, 0.5]", "range: [0, half]", 5, "got 'half'; write a number"),
        ("name: high", "name: low", 2, "two or more different types"),
        ("name: high", "label: high", 6, "unknown field 'label'"),
        ("schema_version: 1", "schema_version: 9", 1, "Upgrade spafit"),
        ("  - name: high\n    range: [0.5, 1]\n", "", 2, "two or more different types"),
        ("delta: 0.1", "delta: [", 9, "not readable as YAML"),
    ],
)
def test_a_bad_file_is_named_with_line_and_field_in_one_sentence(old, new, line, sentence, tmp_path):
    assert old in SMALL
    path = tmp_path / "mine.yaml"
    path.write_text(SMALL.replace(old, new))
    with pytest.raises(ConfigError, match=sentence) as caught:
        Hypothesis.load(path)
    assert str(caught.value).startswith(f"{path}, line {line}")
    assert len(str(caught.value).splitlines()) == 1


def test_what_is_no_file_and_no_name_is_said(tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'bert-pipeline'"):
        Hypothesis.load("bert-pipline")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        Hypothesis.load(tmp_path / "b.yaml")
    with pytest.raises(ConfigError, match="holds none of 6 blocks"):
        KnowledgeType("narrow", range=(0.0, 0.05)).blocks(6)
    assert KnowledgeType("narrow", range=(0.0, 0.05)).blocks(24) == (0, 1)
    assert KnowledgeType("any").blocks(24) is None
    assert Hypothesis(types=(KnowledgeType("a"), KnowledgeType("b", range=(0, 1)))).ranges(4) is None
