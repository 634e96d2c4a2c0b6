"""CoNLL-U treebanks: the format's corners, every malformed line named, derivations recomputed independently."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probing.tasks.conllu import DEFAULT, DERIVATIONS, equal_bins, treebank_tasks
from probing.tasks.treebank import read_treebank
from spafit.data.conllu import word_depths
from spafit.errors import DataError, TaskError, UnknownTaskError
from tests.paths import SHARED, needs_shared

EWT = SHARED / "ud/UD_English-EWT"

# Two sentences with a multiword token, an empty node, a form with a space and a subtyped relation.
CORNERS = """\
# newdoc id = news-1
# sent_id = a
# text = Don't pay 10 000.
1-2\tDon't\t_\t_\t_\t_\t_\t_\t_\tSpaceAfter=Yes
1\tDo\tdo\tAUX\tVB\tVerbForm=Fin\t3\taux\t_\t_
2\tn't\tnot\tPART\tRB\t_\t3\tadvmod:neg\t_\t_
3\tpay\tpay\tVERB\tVB\tVerbForm=Inf\t0\troot\t_\t_
3.1\tmoney\t_\t_\t_\t_\t_\t_\t3:obj\t_
4\t10 000\t10000\tNUM\tCD\tNumForm=Digit|NumType=Card\t3\tobj\t_\t_
5\t.\t.\tPUNCT\t.\t_\t3\tpunct\t_\t_

# newdoc id = mail-7
# sent_id = b
1\tHi\thi\tINTJ\tUH\t_\t0\troot\t_\t_

"""


def conllu(*trees: str, ids: str = "s", documents: bool = False) -> str:
    """Sentences from ``form/UPOS/head/deprel[/feats]`` tokens."""
    lines = []
    for number, tree in enumerate(trees):
        if documents:
            lines.append(f"# newdoc id = d-{number}")
        lines.append(f"# sent_id = {ids}{number}")
        for i, token in enumerate(tree.split(), start=1):
            form, upos, head, relation, *feats = token.split("/")
            lines.append(
                "\t".join([str(i), form, "_", upos, "_", feats[0] if feats else "_", head, relation, "_", "_"])
            )
        lines.append("")
    return "\n".join([*lines, ""])


A = "dogs/NOUN/2/nsubj/Number=Plur bark/VERB/0/root loudly/ADV/2/advmod"
B = "the/DET/2/det cat/NOUN/3/nsubj/Number=Sing sleeps/VERB/0/root/Number=Sing"


def folder(tmp_path, train: str, dev: str, test: str, code: str = "xx_tiny"):
    for split, text in (("train", train), ("dev", dev), ("test", test)):
        (tmp_path / f"{code}-ud-{split}.conllu").write_text(text, encoding="utf-8")
    return tmp_path


def items_of(task, split):
    found = task.items[task.items["split"] == split]
    return [(row.item, task.labels[row.label]) for row in found.itertuples()]


def test_multiword_tokens_and_empty_nodes_leave_the_syntactic_words(tmp_path):
    treebank = read_treebank(folder(tmp_path, CORNERS, conllu(A), conllu(B)))
    first, second = treebank.sentences[:2]
    assert first.words == ("Do", "n't", "pay", "10 000", ".")
    assert first.heads == (3, 3, 0, 3, 3)
    assert (first.document, second.document) == ("news-1", "mail-7")
    assert (first.depth, second.depth) == (2, 1)
    text = treebank.corpus.texts[treebank.text_of[0]]
    assert text.string == "Do n't pay 10 000 ."
    assert text.words == first.words


def test_relations_lose_their_subtype_unless_it_is_asked_for(tmp_path):
    treebank = read_treebank(folder(tmp_path, CORNERS, CORNERS, CORNERS))
    plain, full = treebank_tasks(treebank, ["deprel", "deprel_full"])
    assert ("a:2", "advmod") in items_of(plain, "train")
    assert ("a:2", "advmod:neg") in items_of(full, "train")
    assert plain.items["control"].iloc[0] == "do"  # the word form, lower-cased


def test_head_direction_is_where_the_head_stands(tmp_path):
    treebank = read_treebank(folder(tmp_path, conllu(A, B), conllu(A), conllu(B)))
    (direction,) = treebank_tasks(treebank, ["head_direction"])
    assert items_of(direction, "train") == [
        ("s0:1", "right"), ("s0:2", "root"), ("s0:3", "left"), ("s1:1", "right"), ("s1:2", "right"), ("s1:3", "root"),
    ]  # fmt: skip


def test_head_distance_keeps_its_order_and_leaves_out_roots(tmp_path):
    far = " ".join(f"w{i}/X/12/dep" for i in range(1, 12)) + " b/X/0/root"
    treebank = read_treebank(folder(tmp_path, conllu(far, A), conllu(A), conllu(far, ids="t")))
    (task,) = treebank_tasks(treebank, ["head_distance"])
    assert task.labels == ("1", "2", "3", "4-5", "6-9", "10+")
    assert len(items_of(task, "test")) == 11
    assert dict(items_of(task, "test"))["t0:1"] == "10+"
    assert dict(items_of(task, "test"))["t0:3"] == "6-9"


def test_asking_for_more_changes_nothing_for_the_others(tmp_path):
    many = [f"w{i}/NOUN/2/nsubj runs/VERB/0/root the/DET/2/x {'a/ADV/2/x ' * (i % 3)}" for i in range(12)]
    treebank = read_treebank(folder(tmp_path, conllu(*many[:4]), conllu(*many[4:8]), conllu(*many[8:])))
    alone = treebank_tasks(treebank, ["upos"])[0]
    again = treebank_tasks(read_treebank(tmp_path), ["bigram_shift", "deprel", "upos"])[2]
    assert alone.digest == again.digest
    several = treebank_tasks(treebank, ["bigram_shift", "upos", "deprel", "length"])
    assert several[1].corpus is several[2].corpus is several[3].corpus is alone.corpus
    assert several[0].corpus.name == "xx_tiny.bigram_shift"
    assert [t.name for t in several] == ["xx_tiny.bigram_shift", "xx_tiny.upos", "xx_tiny.deprel", "xx_tiny.length"]


def test_equal_sentences_share_a_text_but_stay_items_of_their_own(tmp_path):
    treebank = read_treebank(folder(tmp_path, conllu(A, B, A), conllu(B), conllu(A)))
    assert len(treebank.corpus.texts) == 2
    (task,) = treebank_tasks(treebank, ["upos"])
    assert (task.items["split"] == "train").sum() == 9
    assert task.items["group"].nunique() == 5
    assert "1 test sentence(s) also occur" in task.notes[0]


def test_repeated_and_missing_sentence_ids_are_made_unique(tmp_path):
    nameless = conllu(A).replace("# sent_id = s0\n", "")
    treebank = read_treebank(folder(tmp_path, conllu(A) + conllu(B) + nameless, conllu(A), conllu(B)))
    assert [s.id for s in treebank.sentences] == ["s0", "s0~2", "sentence-3", "s0~3", "s0~4"]
    assert treebank_tasks(treebank, ["upos"])[0].items["item"].is_unique


def test_labels_unseen_in_training_are_dropped_and_counted(tmp_path):
    treebank = read_treebank(
        folder(tmp_path, conllu(A), conllu(A), conllu(A, "wow/INTJ/0/root x/SYM/1/dep x/SYM/1/dep"))
    )
    (task,) = treebank_tasks(treebank, ["upos"])
    assert task.labels == ("ADV", "NOUN", "VERB")
    assert len(items_of(task, "test")) == 3
    assert "3 dev or test item(s) dropped: their label is not in training (SYM 2, INTJ 1)." in task.notes


def test_unspecified_columns_are_no_items(tmp_path):
    open_head = "a/NOUN/2/nsubj b/_/_/_ c/VERB/_/_"
    treebank = read_treebank(folder(tmp_path, conllu(A, B, open_head), conllu(A), conllu(A)))
    upos, depth = treebank_tasks(treebank, ["upos", "tree_depth"])
    assert "1 word(s) without a UPOS tag are no items." in upos.notes
    assert "1 sentence(s) without a complete tree are no items." in depth.notes
    bare = conllu("a/NOUN/_/_ b/VERB/_/_")
    with pytest.raises(TaskError, match="no training sentence has a complete tree"):
        treebank_tasks(read_treebank(folder(tmp_path, bare, bare, bare)), ["tree_depth"])


def test_default_tasks_that_a_small_treebank_cannot_give_are_named(tmp_path):
    treebank = read_treebank(folder(tmp_path, conllu(A, B), conllu(A), conllu(A)))
    tasks = treebank_tasks(treebank)
    assert "xx_tiny.word_content" not in [t.name for t in tasks]
    assert any("xx_tiny.word_content is left out: " in note for note in tasks[0].notes)
    with pytest.raises(TaskError, match="too small for word_content"):
        treebank_tasks(treebank, ["word_content"])


def test_features_cover_the_words_that_have_them(tmp_path):
    treebank = read_treebank(folder(tmp_path, conllu(A, B), conllu(A, B), conllu(A, B)))
    (task,) = treebank_tasks(treebank, ["feats.Number"])
    assert Counter(label for _, label in items_of(task, "test")) == {"Plur": 1, "Sing": 2}
    with pytest.raises(
        UnknownTaskError, match=r"no feature 'Nmber'\. Did you mean 'Number'\? Its FEATS keys are Number"
    ):
        treebank_tasks(treebank, ["feats.Nmber"])
    with pytest.raises(TaskError, match="no FEATS key with two values of at least 100 training"):
        treebank_tasks(treebank, ["feats"])


def test_feats_takes_every_key_with_support(tmp_path):
    trees = ["a/NOUN/0/root/Number=Sing|Rare=Yes b/NOUN/1/x/Number=Plur|Case=Nom"] * 100
    treebank = read_treebank(folder(tmp_path, conllu(*trees), conllu(*trees[:3]), conllu(*trees[:20])))
    assert [t.name for t in treebank_tasks(treebank, ["feats"])] == ["xx_tiny.feats.Number"]  # Case has one value
    short = read_treebank(folder(tmp_path, conllu(*trees), conllu(*trees[:3]), conllu(*trees[:19])))
    with pytest.raises(TaskError, match="no FEATS key"):
        treebank_tasks(short, ["feats"])


def test_an_unknown_task_is_answered_with_the_nearest(tmp_path):
    treebank = read_treebank(folder(tmp_path, conllu(A), conllu(A), conllu(B)))
    with pytest.raises(UnknownTaskError, match=r"no task 'upso'\. Did you mean 'upos'\? Use upos, xpos"):
        treebank_tasks(treebank, ["upso"])


MALFORMED = {
    "columns": (conllu(A).replace("\t_\t_\n2\t", "\t_\n2\t"), 2, "9 column(s) where CoNLL-U has 10."),
    "spaces": (conllu(A).replace("\t", " "), 2, "1 column(s) where CoNLL-U has 10 (cells must be separated by tabs"),
    "bad id": (conllu(A).replace("\n2\t", "\nx\t"), 3, "bad word id 'x'; expected 2."),
    "skipped id": (conllu(A).replace("\n3\t", "\n4\t"), 4, "bad word id '4'; expected 3."),
    "no blank line": (conllu(A).rstrip("\n") + "\n1\tx" + "\t_" * 8 + "\n\n", 5, "Is a blank line missing before it?"),
    "comment inside": (conllu(A).rstrip("\n") + "\n" + conllu(B), 5, "a comment inside a sentence"),
    "empty form": (conllu(A).replace("\tbark\t", "\t\t"), 3, "the word form is empty."),
    "head range": (conllu(A).replace("\t2\tadvmod", "\t4\tadvmod"), 4, "word 3 has head '4'; allowed are 0 to 3"),
    "head letters": (conllu(A).replace("\t2\tadvmod", "\tx\tadvmod"), 4, "word 3 has head 'x'; allowed are 0 to 3"),
    "head negative": (conllu(A).replace("\t2\tadvmod", "\t-1\tadvmod"), 4, "word 3 has head '-1'"),
    "own head": (conllu(A).replace("\t2\tadvmod", "\t3\tadvmod"), 4, "word 3 is its own head."),
    "cycle": (
        "\n" + conllu(A).replace("\t0\troot", "\t3\troot"),
        3,
        "the heads form a cycle: no root is above word 1.",
    ),
    "range start": (CORNERS.replace("1-2\t", "2-3\t"), 4, "token range '2-3' does not start at the next free word, 1."),
    "range end": (CORNERS.replace("1-2\t", "1-9\t"), 10, "a token range ends at word 9, but the sentence has 5 words."),
    "empty node": (CORNERS.replace("3.1\t", "7.1\t"), 8, "empty node '7.1' does not follow word 3."),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_line_is_named(tmp_path, case):
    text, line, what = MALFORMED[case]
    path = folder(tmp_path, text, conllu(A), conllu(B))
    with pytest.raises(DataError) as caught:
        read_treebank(path)
    assert f"xx_tiny-ud-train.conllu:{line}: " in str(caught.value)
    assert what in str(caught.value)


def test_what_is_no_treebank_is_said(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        read_treebank(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds no \.conllu file"):
        read_treebank(tmp_path)
    (tmp_path / "empty.conllu").write_text("# nothing\n\n")
    with pytest.raises(DataError, match="holds no sentences"):
        read_treebank(tmp_path / "empty.conllu")
    folder(tmp_path / ".", conllu(A), conllu(A), conllu(A))
    folder(tmp_path, conllu(A), conllu(A), conllu(A), code="yy_other")
    with pytest.raises(DataError, match="holds several treebanks"):
        read_treebank(tmp_path)


def test_a_single_file_is_split_by_document_where_there_are_enough(tmp_path):
    trees = [A, B] * 30
    (tmp_path / "one.conllu").write_text(conllu(*trees, documents=True))
    treebank = read_treebank(tmp_path / "one.conllu")
    assert Counter(s.split for s in treebank.sentences) == {"train": 48, "dev": 6, "test": 6}
    assert "split 80/10/10 by document" in treebank.notes[0]
    assert treebank == read_treebank(tmp_path / "one.conllu")  # deterministic
    blocks = [
        conllu(*[A, B] * 3, ids=f"x{d}").replace("# sent_id", f"# newdoc id = d{d}\n# sent_id", 1) for d in range(12)
    ]
    (tmp_path / "docs.conllu").write_text("".join(blocks))
    split_of: dict[str, set[str]] = {}
    for sentence in read_treebank(tmp_path / "docs.conllu").sentences:
        split_of.setdefault(sentence.document, set()).add(sentence.split)
    assert len(split_of) == 12
    assert all(len(splits) == 1 for splits in split_of.values())
    (tmp_path / "few.conllu").write_text(conllu(*trees))
    assert "by sentence" in read_treebank(tmp_path / "few.conllu").notes[0]


def test_missing_splits_are_made_and_noted(tmp_path):
    path = folder(tmp_path, conllu(*[A, B] * 20), conllu(A, B), conllu(B))
    (path / "xx_tiny-ud-test.conllu").unlink()
    treebank = read_treebank(path)
    assert Counter(s.split for s in treebank.sentences) == {"train": 36, "dev": 4, "test": 2}
    assert any("its dev file is the test split" in n for n in treebank.notes)
    (path / "xx_tiny-ud-dev.conllu").unlink()
    assert Counter(s.split for s in read_treebank(path).sentences) == {"train": 32, "dev": 4, "test": 4}


def test_genre_comes_from_a_comment_or_the_document_name(tmp_path):
    declared = CORNERS.replace("# sent_id = a", "# genre = law\n# sent_id = a")
    treebank = read_treebank(folder(tmp_path, declared, conllu(A), conllu(B)))
    assert [s.genre for s in treebank.sentences][:2] == ["law", ""]
    guessed = read_treebank(folder(tmp_path, CORNERS, CORNERS, CORNERS))
    assert {s.genre for s in guessed.sentences} == {"news", "mail"}
    assert set(treebank_tasks(guessed, ["upos"])[0].items["genre"]) == {"news", "mail"}
    split_names = conllu(A, ids="train-s")
    assert {
        s.genre for s in read_treebank(folder(tmp_path, split_names, conllu(A, ids="dev-s"), conllu(B))).sentences
    } == {""}


def test_licence_and_citation_come_from_the_readme(tmp_path):
    path = folder(tmp_path, conllu(A), conllu(A), conllu(B))
    assert read_treebank(path).licence == "see the data's source"
    (path / "LICENSE.txt").write_text("\nSome Licence 1.0\n\nlong text")
    assert read_treebank(path).licence == "Some Licence 1.0"
    (path / "README.md").write_text("Cite\n  @book{key1,\n  title = {A {B} C}}\nLicense: CC0 1.0\n")
    treebank = read_treebank(path)
    assert (treebank.licence, treebank.citation) == ("CC0 1.0", "@book{key1, title = {A {B} C}}")


@st.composite
def forests(draw):
    """Heads of a random forest in random word order, and its depths computed from the construction."""
    n = draw(st.integers(1, 12))
    order = draw(st.permutations(range(n)))
    heads, depths = [0] * n, [0] * n
    for k, node in enumerate(order):
        parent = draw(st.integers(-1, k - 1)) if k else -1
        heads[node] = 0 if parent < 0 else order[parent] + 1
        depths[node] = 1 if parent < 0 else depths[order[parent]] + 1
    return heads, depths


@given(forests())
def test_depths_match_the_way_the_tree_was_built(tree):
    heads, depths = tree
    assert word_depths(heads) == depths


@given(st.integers(1, 9).flatmap(lambda n: st.lists(st.integers(-1, n), min_size=n, max_size=n)))
def test_depths_match_walking_up_from_each_word_even_with_cycles(heads):
    def walk(word):
        for steps in range(1, len(heads) + 1):
            if heads[word] <= 0:
                return steps if heads[word] == 0 else 0
            word = heads[word] - 1
        return 0

    assert word_depths(heads) == [walk(w) for w in range(len(heads))]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=200), st.integers(2, 6))
def test_bins_cover_every_value_once_and_in_order(values, bins):
    classes = equal_bins(values, bins)
    tops = [top for top, _ in classes]
    assert tops == sorted(set(tops))
    assert tops[-1] == max(values)
    assert len(classes) <= bins
    assert len({name for _, name in classes}) == len(classes)


def test_bins_are_about_equal_where_the_values_allow_it():
    values = list(range(1, 61))
    assert equal_bins(values, 6) == [
        (10, "1-10"),
        (20, "11-20"),
        (30, "21-30"),
        (40, "31-40"),
        (50, "41-50"),
        (60, "51+"),
    ]
    assert equal_bins([3] * 50 + [4] * 50, 6) == [(3, "1-3"), (4, "4+")]


@pytest.fixture(scope="module")
def ewt():
    if not EWT.is_dir():
        pytest.skip("the shared real data (../shared/data) is not here")
    return read_treebank(EWT)


@needs_shared
def test_ewt_has_its_published_counts(ewt):
    assert Counter(s.split for s in ewt.sentences) == {"train": 12544, "dev": 2001, "test": 2077}
    words = Counter()
    for sentence in ewt.sentences:
        words[sentence.split] += len(sentence.words)
    assert words == {"train": 204577, "dev": 25147, "test": 25094}
    assert (ewt.name, ewt.licence) == ("en_ewt", "CC BY-SA 4.0")
    assert "silveira14gold" in ewt.citation
    assert {s.genre for s in ewt.sentences} == {"answers", "email", "newsgroup", "reviews", "weblog"}
    assert len({s.document for s in ewt.sentences}) == 1174


@needs_shared
def test_ewt_label_counts_match_a_count_of_the_raw_lines(ewt):
    upos, deprel = Counter(), Counter()
    for line in (EWT / "en_ewt-ud-test.conllu").read_text(encoding="utf-8").split("\n"):
        cells = line.split("\t")
        if cells[0].isdigit():
            upos[cells[3]] += 1
            deprel[cells[7].split(":")[0]] += 1
    tags, relations = treebank_tasks(ewt, ["upos", "deprel"])
    assert Counter(label for _, label in items_of(tags, "test")) == upos
    assert len(upos) == 17
    dropped = sum(n for label, n in deprel.items() if label not in relations.labels)
    assert Counter(label for _, label in items_of(relations, "test")).total() == deprel.total() - dropped


@needs_shared
def test_ewt_sentence_tasks_are_what_they_say(ewt):
    depth, length, content, shift = treebank_tasks(ewt, ["tree_depth", "length", "word_content", "bigram_shift"])
    by_id = {s.id: s for s in ewt.sentences}
    rng = np.random.default_rng(0)
    for task, value in ((depth, lambda s: s.depth), (length, lambda s: len(s.words))):
        for i in rng.integers(len(task.items), size=300):
            row = task.items.iloc[i]
            low, _, high = task.labels[row["label"]].rstrip("+").partition("-")
            found = value(by_id[row["group"]])
            assert int(low) <= found
            assert task.labels[row["label"]].endswith("+") or found <= int(high or low)
            assert task.corpus.texts[row["text"]].words == by_id[row["group"]].words
    chosen = set(content.labels)
    for row in content.items.itertuples():
        assert chosen & {w.lower() for w in by_id[row.group].words} == {content.labels[row.label]}
    assert len(shift.corpus.texts) == len(shift.items)
    for row in shift.items.itertuples():
        original, shown = list(by_id[row.group].words), shift.corpus.texts[row.text].string
        assert (shown == " ".join(original)) == (shift.labels[row.label] == "original")
        if shift.labels[row.label] == "shifted":
            assert any(
                shown == " ".join([*original[:i], original[i + 1], original[i], *original[i + 2 :]])
                for i in range(1, len(original) - 1)
            )
    for split in ("train", "dev", "test"):
        labels = shift.items.loc[shift.items["split"] == split, "label"]
        assert abs(labels.mean() - 0.5) < 0.001


@needs_shared
def test_ewt_gives_every_task(ewt):
    ewt = replace(ewt, sentences=ewt.sentences[::4])  # a quarter, for speed
    tasks = treebank_tasks(ewt, [d for d in DERIVATIONS if d != "feats"])
    assert len({t.name for t in tasks}) == len(DERIVATIONS) - 1
    assert {f"en_ewt.{name}" for name in DEFAULT} <= {t.name for t in tasks}
    assert all({"genre", "document", "length"} <= set(t.items.columns) for t in tasks)
    keys = {t.name.removeprefix("en_ewt.feats.") for t in treebank_tasks(ewt, ["feats"])}
    assert {"Number", "Tense", "Person", "VerbForm", "Case"} <= keys
    assert "Polarity" not in keys  # one value only


@needs_shared
def test_ewt_reads_within_seconds():
    start = time.process_time()
    treebank_tasks(read_treebank(EWT), ["upos"])
    assert time.process_time() - start < 15  # about 3 s on an idle core; loaded machines count more
