"""References: what they resolve to, how lists of them are cut, and what is said about those that resolve to nothing."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from probing import registry
from probing.registry import LIST_COLUMNS, list_tasks, load_tasks, register_task, split_references
from probing.tasks.base import Corpus, Task, Text
from spafit.errors import ConfigError, DataError, TaskError, UsageError
from tests.paths import SHARED, needs_shared
from tests.test_conllu import A, B, conllu, folder

TEXTS = Corpus("toy", tuple(Text(f"text {i}") for i in range(9)))


def toy(name, level="syntax", corpus=TEXTS):
    n = len(corpus.texts)
    items = pd.DataFrame(
        {
            "item": [f"i{i}" for i in range(n)],
            "text": np.arange(n),
            "span": -1,
            "label": np.arange(n) % 2,
            "split": ["train"] * (n - 4) + ["dev"] * 2 + ["test"] * 2,
            "group": [f"g{i}" for i in range(n)],
            "control": "",
        }
    )
    return Task(name, level, "sentence", ("a", "b"), corpus, items, description=f"Toy {name}.")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """A registry with a group ``toy`` and a single task ``lone``, and nothing from installed packages."""
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.setattr(registry, "_built", {})
    monkeypatch.setattr(registry, "_installed", lambda: {})
    register_task("toy", lambda: [toy("toy.tense", "semantics"), toy("toy.length", "surface")])
    register_task("lone", lambda: toy("lone"))


def names(*references, **options):
    return [t.name for t in load_tasks(references, **options)]


def test_names_and_groups_resolve_in_the_order_asked():
    assert names("lone", "toy") == ["lone", "toy.tense", "toy.length"]
    assert names("toy.length", "toy", "toy.length") == ["toy.length", "toy.tense"]
    first, second = load_tasks(["toy.length"]) + load_tasks(["toy.tense"])
    assert first.corpus is second.corpus


def test_factories_run_once_and_only_when_used():
    calls = []
    register_task("late", lambda: calls.append(1) or toy("late"))
    assert calls == []
    assert names("late", "late") == names("late") == ["late"]
    assert calls == [1]


def test_the_list_shows_groups_and_their_tasks():
    table = list_tasks()
    assert tuple(table.columns) == LIST_COLUMNS
    assert table["name"].tolist() == ["lone", "toy", "toy.tense", "toy.length"]
    assert table["kind"].tolist() == ["task", "group", "task", "task"]
    assert table.loc[1, ["train", "dev", "test"]].tolist() == [10, 4, 4]
    assert table.loc[2, ["level", "classes"]].tolist() == ["semantics", 2]


def test_a_name_is_taken_once_and_must_be_a_name():
    with pytest.raises(TaskError, match="'toy' is registered already"):
        register_task("toy", lambda: toy("toy"))
    for bad in ("a.b", "conllu:x", "", "a,b"):
        with pytest.raises(TaskError, match="cannot be registered"):
            register_task(bad, lambda: toy("x"))


@pytest.mark.parametrize("made", [[], [toy("other")], [toy("bad.x"), toy("bad.x")], [toy("bad"), toy("bad.x")]])
def test_a_factory_that_returns_other_names_is_refused(made):
    register_task("bad", lambda: made)
    if made and [t.name for t in made] == ["bad", "bad.x"]:
        with pytest.raises(TaskError, match="must return a task of that name"):
            load_tasks(["bad"])
        return
    with pytest.raises(TaskError, match="factory of tasks 'bad' must return"):
        load_tasks(["bad"])
    assert "cannot be loaded" in list_tasks().set_index("name").loc["bad", "description"]


def test_entry_points_are_loaded_lazily_and_a_broken_one_is_named(monkeypatch):
    points = {
        "plug": EntryPoint("plug", "tests.test_registry:plug_tasks", "spafit.tasks"),
        "broken": EntryPoint("broken", "tests.no_such_module:tasks", "spafit.tasks"),
    }
    monkeypatch.setattr(registry, "_installed", lambda: points)
    assert names("plug.one") == ["plug.one"]
    with pytest.raises(TaskError, match="'broken' come from an installed package that cannot be imported"):
        load_tasks(["broken"])
    listed = list_tasks().set_index("name")["description"]
    assert listed["broken"].startswith("cannot be loaded")
    with pytest.raises(TaskError, match="registered already"):
        register_task("plug", lambda: toy("plug"))


def plug_tasks():
    return (toy("plug.one"),)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("tyo", r"Unknown task 'tyo'\. Did you mean 'toy'\?"),
        ("toy.tens", r"Unknown task 'toy\.tens'\. Did you mean 'toy\.tense'\?"),
        ("conlu:x", r"Unknown kind of task 'conlu:' in 'conlu:x'\. Did you mean 'conllu:'\?"),
        ("conllu:", "what to read is missing after the colon"),
        ("conllu:x#", "give PATH#name,name"),
        ("senteval:#x", "give PATH#name,name"),
        ("table:x.tsv", "text=COLUMN and label=COLUMN are needed"),
    ],
)
def test_an_unknown_reference_is_answered_with_a_remedy(reference, message):
    with pytest.raises(TaskError, match=message):
        load_tasks([reference])


def test_a_treebank_is_read_once_for_several_references(tmp_path):
    folder(tmp_path, conllu(A, B), conllu(A), conllu(B))
    tasks = load_tasks([f"conllu:{tmp_path}#upos", "lone", f"conllu:{tmp_path}/#head_direction"])
    assert [t.name for t in tasks] == ["xx_tiny.upos", "lone", "xx_tiny.head_direction"]
    assert tasks[0].corpus is tasks[2].corpus


def test_a_path_may_hold_a_hash_sign(tmp_path):
    odd = tmp_path / "bank#2"
    odd.mkdir()
    folder(odd, conllu(A, B), conllu(A), conllu(B))
    assert "xx_tiny.upos" in names(f"conllu:{odd}")
    assert names(f"conllu:{odd}#upos") == ["xx_tiny.upos"]


def test_different_tasks_or_texts_of_one_name_are_refused(tmp_path):
    for number, trees in enumerate(([A, B], [B, A, A])):
        (tmp_path / str(number)).mkdir()
        folder(tmp_path / str(number), conllu(*trees), conllu(A), conllu(B, "x/NOUN/0/root"))
    with pytest.raises(TaskError, match=r"Two different tasks are called 'xx_tiny\.upos'"):
        load_tasks([f"conllu:{tmp_path}/0#upos", f"conllu:{tmp_path}/1#upos"])
    register_task("clash", lambda: toy("clash", corpus=Corpus("toy", tuple(Text(f"other {i}") for i in range(9)))))
    with pytest.raises(TaskError, match="Two sources are called 'toy' but hold different texts"):
        load_tasks(["toy", "clash"])


def test_a_yaml_file_files_tasks_under_its_levels(tmp_path):
    folder(tmp_path, conllu(A, B), conllu(A), conllu(B))
    (tmp_path / "plan.yaml").write_text("surface: [toy.tense]\nother:\n  - conllu:.#upos\n  - lone\n")
    tasks = load_tasks([str(tmp_path / "plan.yaml"), "toy.length"])
    assert [(t.name, t.level) for t in tasks] == [
        ("toy.tense", "surface"), ("xx_tiny.upos", "other"), ("lone", "other"), ("toy.length", "surface"),
    ]  # fmt: skip
    with pytest.raises(TaskError, match=r"Two different tasks are called 'toy\.tense'"):
        load_tasks(["toy.tense", str(tmp_path / "plan.yaml")])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("syntex: [lone]", r"'syntex' is not a level\. Did you mean 'syntax'\?"),
        ("syntax: lone", "syntax: must be a list of task references"),
        ("syntax: [1]", "syntax: must be a list of task references"),
        ("[lone]", "must map levels"),
        ("", "must map levels"),
        ("syntax: [lone\n", r"plan\.yaml:2: is not YAML"),
        ("syntax: [lone]\nother: []\nsyntax: [toy]", r"plan\.yaml:3: 'syntax' stands there twice"),
        ("syntax: [more.yaml]", "cannot name another one"),
    ],
)
def test_a_yaml_file_that_does_not_hold_together_is_explained(tmp_path, content, message):
    (tmp_path / "plan.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_tasks([str(tmp_path / "plan.yaml")])
    with pytest.raises(ConfigError, match="cannot be read"):
        load_tasks([str(tmp_path / "none.yaml")])


def test_levels_can_be_regrouped(tmp_path):
    assert [t.level for t in load_tasks(["toy"], levels={"toy.length": "other"})] == ["semantics", "other"]
    (tmp_path / "levels.yaml").write_text("syntax: [toy.length, toy.tense]\n")
    assert [t.level for t in load_tasks(["toy"], levels=tmp_path / "levels.yaml")] == ["syntax", "syntax"]
    assert [t.level for t in load_tasks(["toy"])] == ["semantics", "surface"]  # the registered tasks stay as they were
    with pytest.raises(
        TaskError, match=r"'toy.lenght', which is not among the tasks loaded\. Did you mean 'toy.length'"
    ):
        load_tasks(["toy"], levels={"toy.lenght": "other"})
    with pytest.raises(TaskError, match="Level 'x' of task 'lone' is not one of"):
        load_tasks(["lone"], levels={"lone": "x"})


@pytest.mark.parametrize(
    ("text", "references"),
    [
        ("toy", ["toy"]),
        ("toy,conllu:/x#upos,deprel", ["toy", "conllu:/x#upos,deprel"]),
        ("conllu:/x#upos,deprel,toy", ["conllu:/x#upos,deprel", "toy"]),
        ("toy.tense, toy.length", ["toy.tense", "toy.length"]),
        ("table:a.tsv,text=b,label=c,lone", ["table:a.tsv,text=b,label=c", "lone"]),
        ("table:a.tsv,text=x, y,label=c", ["table:a.tsv,text=x, y,label=c"]),
        ("table:a,train=b.yaml,text=t,label=l", ["table:a,train=b.yaml,text=t,label=l"]),
        ("table:a.tsv,text=b,label=c,plan.yaml,x", ["table:a.tsv,text=b,label=c", "plan.yaml", "x"]),
        ("tyo,lnoe", ["tyo", "lnoe"]),
        ("senteval:/a,conllu:/b", ["senteval:/a", "conllu:/b"]),
    ],
)
def test_lists_are_cut_where_a_reference_begins(text, references):
    assert split_references(text) == references


@pytest.mark.parametrize("text", ["", ",toy", "toy,", "toy,,lone", "conllu:/x#upos,,deprel"])
def test_empty_pieces_are_refused(text):
    with pytest.raises(UsageError, match="Empty task name"):
        split_references(text)


WORD = st.text(alphabet="abcxyz_-/ #9", min_size=1, max_size=8).map(
    lambda s: f"q{s}q"
)  # no registered name, no edge space
PLAIN = st.sampled_from(["toy", "toy.tense", "toy.lost", "lone", "plan.yaml", "my plans.yml"])
PREFIXED = st.one_of(
    st.builds("conllu:{}#{}".format, WORD, st.lists(WORD, min_size=1, max_size=4).map(",".join)),
    st.builds("senteval:{}".format, st.lists(WORD, min_size=1, max_size=3).map(",".join)),
    st.builds("table:{},text={},label={},test=x.yaml".format, WORD, WORD, WORD),
    st.builds("hub:{},label={}".format, WORD, WORD),
)


@given(st.lists(st.one_of(PLAIN, PREFIXED), min_size=1, max_size=6))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_joining_and_cutting_are_inverse(references):
    assert split_references(",".join(references)) == references


@given(st.lists(st.one_of(PLAIN, WORD, PREFIXED), min_size=1, max_size=6))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_cutting_loses_nothing_and_cutting_again_changes_nothing(pieces):
    cut = split_references(",".join(pieces))
    assert ",".join(cut) == ",".join(pieces)
    assert [r for reference in cut for r in split_references(reference)] == cut
    assert all(a.startswith(registry.PREFIXES) or "," not in a for a, _ in pairwise([*cut, ""]))


def test_a_malformed_file_keeps_its_own_error(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        load_tasks([f"conllu:{tmp_path / 'none'}#upos"])


@needs_shared
def test_one_run_can_mix_every_kind_of_reference():
    references = split_references(
        f"toy,conllu:{SHARED}/ud/UD_English-EWT/en_ewt-ud-dev.conllu#upos,head_direction,"
        f"senteval:{SHARED}/senteval_derived_from_ewt#past_present,"
        f"table:{SHARED}/glue/RTE,text=sentence1,text2=sentence2,label=label,lone"
    )
    assert len(references) == 5
    assert names(*references) == [
        "toy.tense", "toy.length", "en_ewt-ud-dev.upos", "en_ewt-ud-dev.head_direction",
        "senteval_derived_from_ewt.past_present", "rte", "lone",
    ]  # fmt: skip
