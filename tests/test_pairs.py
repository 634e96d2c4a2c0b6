"""Pairs of prompt and answer: tables, conversations, main clauses of a treebank, headings; running text by article."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from spafit.data.compression import compression_pairs, compression_rate, first_words, main_clause
from spafit.data.conllu import read_sentences
from spafit.data.wikitext import articles, as_written, heading_pairs
from spafit.data.writing import answers_data, read_pairs, text_data
from spafit.errors import DataError, UsageError
from spafit.generation_metrics import answer_scores
from tests.paths import SHARED, needs_shared

EWT = SHARED / "ud/UD_English-EWT"
WIKITEXT = SHARED / "text/wikitext-2"


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_instructions_with_and_without_an_input_become_prompts(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add.", "input": "2 3", "output": "5"}, {"instruction": "Say hi.", "input": "", "output": "Hi"},
        {"instruction": "Say no.", "output": "No"},
    ]  # fmt: skip
    path = lines(tmp_path / "a.jsonl", rows)
    pairs = read_pairs(path, prompt="instruction+input", answer="output")
    assert pairs["prompt"].tolist() == ["Add.\n\n2 3", "Say hi.", "Say no."]
    assert pairs["answer"].tolist() == ["5", "Hi", "No"]
    assert read_pairs(path, prompt="instruction", answer=None)["answer"].isna().all()
    frame = pd.DataFrame({"q": ["a", "b"], "a": ["c", "d"]})
    for suffix, write in ((".csv", frame.to_csv), (".parquet", frame.to_parquet)):
        write(tmp_path / f"t{suffix}", index=False)
        got = read_pairs(tmp_path / f"t{suffix}", prompt="q", answer="a")
        assert got[["prompt", "answer"]].to_numpy().tolist() == frame.to_numpy().tolist()


def test_the_first_exchange_of_a_conversation_is_taken_and_longer_ones_are_counted(tmp_path: Path) -> None:
    def turn(role: str, content: Any) -> dict[str, Any]:
        return {"role": role, "content": content}

    short = [turn("system", "Be brief."), turn("user", "Hi?"), turn("assistant", "Hi.")]
    longer = [turn("user", "One?"), turn("assistant", "Two."), turn("user", "Why?"), turn("assistant", "So.")]
    path = lines(tmp_path / "chat.jsonl", [{"messages": short}, {"messages": longer}])
    pairs = read_pairs(path, prompt="messages")
    assert pairs["prompt"].tolist() == ["Be brief.\n\nHi?", "One?"]
    assert pairs["answer"].tolist() == ["Hi.", "Two."]
    data = answers_data({"train": path, "validation": path}, prompt="messages")
    assert "chat.jsonl: 1 of 2 conversations go on; their first exchange is taken" in data.source
    for talk, said in (
        ([turn("assistant", "Hi.")], "row 2: the conversation has the turns assistant; a user's turn"),
        ([turn("user", "Hi.")], "has the turns user"),
        ([], "has the turns none"),
        ([turn("user", ["Hi."])], "row 2: not a conversation"),
        ("Hi.", "row 2: not a conversation"),
        ([turn("user", "a"), turn("assistant", " ")], "row 2: the answer is empty"),
    ):
        lines(path, [{"messages": short}, {"messages": talk}])
        with pytest.raises(DataError, match=said):
            read_pairs(path, prompt="messages")


TREES = """\
# sent_id = a
# text = "When he left, the cat (which slept) saw what I don't see, and the dogs ran."
1	"	"	PUNCT	_	_	11	punct	_	SpaceAfter=No
2	When	when	ADV	_	_	4	advmod	_	_
3	he	he	PRON	_	_	4	nsubj	_	_
4	left	leave	VERB	_	_	11	advcl	_	SpaceAfter=No
5	,	,	PUNCT	_	_	4	punct	_	_
6	the	the	DET	_	_	7	det	_	_
7	cat	cat	NOUN	_	_	11	nsubj	_	_
8	(	(	PUNCT	_	_	10	punct	_	SpaceAfter=No
9	which	which	PRON	_	_	10	nsubj	_	_
10	slept	sleep	VERB	_	_	7	acl:relcl	_	SpaceAfter=No
11	saw	see	VERB	_	_	0	root	_	_
12	what	what	PRON	_	_	11	obj	_	_
13	I	I	PRON	_	_	16	nsubj	_	_
14-15	don't	_	_	_	_	_	_	_	_
14	do	do	AUX	_	_	16	aux	_	_
15	n't	not	PART	_	_	16	advmod	_	_
16	see	see	VERB	_	_	12	acl:relcl	_	SpaceAfter=No
17	,	,	PUNCT	_	_	21	punct	_	_
18	and	and	CCONJ	_	_	21	cc	_	_
19	the	the	DET	_	_	20	det	_	_
20	dogs	dog	NOUN	_	_	21	nsubj	_	_
21	ran	run	VERB	_	_	11	conj	_	SpaceAfter=No
22	.	.	PUNCT	_	_	21	punct	_	SpaceAfter=No
23	"	"	PUNCT	_	_	11	punct	_	_

# sent_id = b
1	Cats	cat	NOUN	_	_	4	nsubj	_	_
2	and	and	CCONJ	_	_	3	cc	_	_
3	dogs	dog	NOUN	_	_	1	conj	_	_
4	say	say	VERB	_	_	0	root	_	_
5	they	they	PRON	_	_	6	nsubj	_	_
6	run	run	VERB	_	_	4	ccomp	_	SpaceAfter=No
7	.	.	PUNCT	_	_	4	punct	_	_

"""


def test_the_main_clause_is_what_the_rule_says_of_hand_made_trees(tmp_path: Path) -> None:
    path = tmp_path / "t.conllu"
    path.write_text(
        TREES.replace(
            "slept\tsleep\tVERB\t_\t_\t7\tacl:relcl\t_\tSpaceAfter=No", "slept\tsleep\tVERB\t_\t_\t7\tacl:relcl\t_\t_"
        )
    )
    first, second = read_sentences(path)
    assert first.text().endswith("saw what I don't see, and the dogs ran.\"")
    assert first.text(main_clause(first)) == "the cat saw what I don't see."
    assert main_clause(second) == list(range(7))  # conjoined nouns and a complement clause stay
    pairs = compression_pairs(path)
    assert pairs["idx"].tolist() == [0]  # nothing is left out of the other
    same = read_pairs(path, prompt="sentence", answer="main_clause")
    assert same["answer"].tolist() == pairs["answer"].tolist()
    path.write_text(TREES.split("# sent_id = b")[1].replace("b\n", "", 1))
    with pytest.raises(DataError, match="no sentence has anything to leave out"):
        compression_pairs(path)
    path.write_text(TREES.replace("\t0\troot", "\t_\t_", 1))
    with pytest.raises(DataError, match="'a' has a word without a head"):
        compression_pairs(path)


def test_the_first_words_are_a_baseline_of_the_training_pairs_rate() -> None:
    pairs = pd.DataFrame({"prompt": ["a b c d", "a b"], "answer": ["a", "a b"]})
    assert compression_rate(pairs) == pytest.approx((1 / 4 + 1) / 2)
    assert first_words(["a b c d e f g h", "a", ""], 0.5) == ["a b c d", "a", ""]
    with pytest.raises(UsageError, match="share of words to keep is 0"):
        first_words(["a"], 0)


@needs_shared
def test_sentences_of_the_treebank_read_as_they_were_written_and_are_compressed() -> None:
    path = EWT / "en_ewt-ud-dev.conllu"
    written = [line[9:] for line in path.read_text("utf-8").split("\n") if line.startswith("# text = ")]
    assert [s.text() for s in read_sentences(path)] == written
    pairs = compression_pairs(path)
    assert 900 < len(pairs) < 1100
    assert not pairs["prompt"].duplicated().any()
    for prompt, answer in zip(pairs["prompt"], pairs["answer"], strict=True):
        assert len(answer) < len(prompt)
        rest = iter(prompt.replace(" ", ""))
        assert all(letter in rest for letter in answer.replace(" ", ""))  # in the sentence's order
        assert answer.count("(") == answer.count(")") or "(" not in answer
    pytest.importorskip("rouge_score")
    baseline = answer_scores(first_words(pairs["prompt"], compression_rate(pairs)), pairs["answer"].tolist())
    whole = answer_scores(pairs["prompt"].tolist(), pairs["answer"].tolist())
    assert whole["exact_match"] == 0 <= baseline["exact_match"] < 0.1
    assert whole["rougeL"] < baseline["rougeL"] < 0.8


ARTICLES = """
 = One = 

 One is a number ( 1 ) , it 's said . " Two " is 1 @.@ 5 more . 
 More of it . 

 = = First = = 

 = = = Below = = = 

 Here <unk> . 

 = = <unk> = = 

 Not here . 
 = Two = 

 Of it .
"""  # noqa: W291


def test_wikitext_is_read_by_article_and_its_sections_give_headings(tmp_path: Path) -> None:
    path = tmp_path / "w.txt"
    path.write_text(ARTICLES)
    data = text_data({"train": path, "validation": path})
    texts = data.frames["train"]["text"].tolist()
    assert [t.splitlines()[0].strip() for t in texts] == ["= One =", "= Two ="]
    assert "".join("".join(texts).split()) == "".join(ARTICLES.split())  # nothing is lost
    assert articles("one\ntwo = three") == []
    pairs = heading_pairs(path)
    assert pairs["answer"].tolist() == ["One", "Below", "Two"]
    assert pairs["prompt"].tolist() == ['One is a number (1), it\'s said. "Two" is 1.5 more.', "Here <unk>.", "Of it."]
    assert pairs["level"].tolist() == [1, 3, 1]
    assert read_pairs(path, prompt="opening", answer="heading")["prompt"].tolist() == pairs["prompt"].tolist()
    long = " ".join(["w"] * 50 + ["."] + ["w"] * 60)
    path.write_text(f" = A = \n {long} \n = B = \n {' w' * 100} \n")
    assert [len(p.split()) for p in heading_pairs(path)["prompt"]] == [50, 80]
    path.write_text("no headings")
    with pytest.raises(DataError, match="no headings in WikiText's form"):
        heading_pairs(path)
    assert as_written("a @-@ b ( c ) can 't ; d 's 1 @,@ 000") == "a-b (c) can't; d's 1,000"


@needs_shared
def test_the_real_wikitext_has_its_articles_and_headings() -> None:
    text = (WIKITEXT / "valid.txt").read_text("utf-8")
    assert len(articles(text)) == 60
    assert "".join("".join(articles(text)).split()) == "".join(text.split())
    pairs = heading_pairs(WIKITEXT / "valid.txt")
    assert 350 < len(pairs) < 620
    assert np.all([len(p.split()) <= 80 for p in pairs["prompt"]])
