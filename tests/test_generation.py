"""Figures of written texts against hand counts and brute force; prompts token by token; ``spafit generate``."""

from __future__ import annotations

import builtins
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from typer.testing import CliRunner

import spafit
from analysis.cli.main import app
from spafit.answer_bits import answer_bits
from spafit.checkpoint import load
from spafit.data.training import TrainData
from spafit.errors import DataError, ModelError, UsageError
from spafit.generating import generate
from spafit.generation_metrics import answer_scores, distinct, generation_table, repetition, rouge_scores
from spafit.heads import load_with_head
from spafit.kinds.language import ready_to_pad
from spafit.settings import TrainSettings
from spafit.text_windows import IGNORED, encode_pair, encode_prompt
from tests.paths import MODELS, needs_smollm2
from tests.tiny import save_tiny, tiny, tiny_tokenizer

CHAT = (
    "{% for m in messages %}[CLS] {{ m.content }} [SEP] the{% endfor %}{% if add_generation_prompt %}[CLS]{% endif %}"
)


def test_repetition_and_variety_are_those_counted_by_hand() -> None:
    texts = ["a b c d a b c d", "a b c d e", "a b", ""]
    # abcd bcda cdab dabc abcd: four different ones of five
    np.testing.assert_allclose(repetition(texts), [1 / 5, 0, np.nan, np.nan])
    np.testing.assert_allclose(repetition(texts, 1), [1 / 2, 0, 0, np.nan])
    assert repetition(["so " * 100])[0] == pytest.approx(1 - 1 / 97)
    assert distinct(texts, 1)[0] == 5 / 15
    assert distinct(texts, 2)[0] == 5 / 12  # ab bc cd da de
    assert np.isnan(distinct(["a"], 2)).all()
    assert distinct(["a b"], 1)[0] == 1
    with pytest.raises(UsageError, match="Runs of 0 words"):
        repetition(["a"], 0)


def test_the_jackknife_of_variety_is_that_of_leaving_texts_out_one_by_one() -> None:
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(list("abcdefghij"), size=draw.integers(2, 9))) for _ in range(12)]

    def share(kept: list[str]) -> float:
        runs = [w for t in kept for w in zip(t.split(), t.split()[1:], strict=False)]
        return len(set(runs)) / len(runs)

    value, low, high = distinct(texts, 2)
    left_out = np.array([share(texts[:i] + texts[i + 1 :]) for i in range(12)])
    error = math.sqrt(11 / 12 * ((left_out - left_out.mean()) ** 2).sum())
    assert value == pytest.approx(share(texts))
    assert (low, high) == pytest.approx((max(0, value - 1.96 * error), min(1, value + 1.96 * error)))


def written(texts: list[str]) -> pd.DataFrame:
    return pd.DataFrame(
        {"text": texts, "tokens": [len(t.split()) for t in texts], "ended": [len(t) < 9 for t in texts]}
    )


def test_the_table_holds_each_figure_with_the_interval_of_its_mean() -> None:
    draw = np.random.default_rng(1)
    n = 300
    texts = [" ".join(draw.choice(list("abc"), size=draw.integers(1, 9))) for _ in range(n)]
    references = [t if draw.random() < 0.4 else "z" for t in texts]
    bits = np.column_stack([draw.gamma(5, size=n), draw.integers(1, 9, size=n)])
    given = written(texts)
    table = generation_table(given, references=references, bits=bits, n_boot=2000).set_index("metric")
    same = np.array([t == r for t, r in zip(texts, references, strict=True)], dtype=float)
    for name, values in {"tokens": given["tokens"], "ended": given["ended"].astype(float), "exact_match": same}.items():
        row, values = table.loc[name], np.asarray(values)
        assert row["value"] == pytest.approx(values.mean())
        half = 1.96 * values.std(ddof=1) / math.sqrt(n)
        assert row["ci_high"] - row["ci_low"] == pytest.approx(2 * half, rel=0.1)
        assert row["ci_low"] < row["value"] < row["ci_high"]
    assert table.loc["seq_rep_4"]["n"] == sum(len(t.split()) >= 4 for t in texts)
    assert table.loc["seq_rep_4"]["value"] == pytest.approx(np.nanmean(repetition(texts)))
    rate = bits[:, 0].sum() / bits[:, 1].sum()
    assert table.loc["bits_per_token"]["value"] == pytest.approx(rate)
    # the ratio's standard error by linearisation
    error = np.std(bits[:, 0] - rate * bits[:, 1], ddof=1) / bits[:, 1].mean() / math.sqrt(n)
    width = table.loc["bits_per_token"]["ci_high"] - table.loc["bits_per_token"]["ci_low"]
    assert width == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert table.loc["perplexity"]["ci_high"] == pytest.approx(2 ** table.loc["bits_per_token"]["ci_high"])
    assert {"distinct_1", "distinct_2", "distinct_3", "length_ratio"} <= set(table.index)
    pd.testing.assert_frame_equal(
        table, generation_table(given, references=references, bits=bits, n_boot=2000).set_index("metric")
    )


def test_texts_that_are_their_references_score_one_and_others_nothing() -> None:
    pytest.importorskip("rouge_score")
    texts = ["the cat\nsees a dog", "a dog runs"]
    same = generation_table(written(texts), references=texts).set_index("metric")["value"]
    other = generation_table(written(texts), references=["zz", "yy"]).set_index("metric")["value"]
    for name in ("exact_match", "rouge1", "rouge2", "rougeL", "rougeLsum"):
        assert (same[name], other[name]) == (1, 0)
    # by lines, the order of sentences makes no difference to Lsum: 6 words in common; in one line 3 in order
    swapped = rouge_scores(["d e f\na b c"], ["a b c\nd e f"])
    assert swapped["rougeLsum"] == pytest.approx([1])
    assert swapped["rougeL"] == pytest.approx([0.5])


def test_what_has_no_figures_is_refused_and_rouge_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no written texts"):
        generation_table(written([]))
    with pytest.raises(UsageError, match="1 references for 2 texts"):
        generation_table(written(["a", "b"]), references=["a"])
    with pytest.raises(UsageError, match="1 references for 2 texts"):
        answer_scores(["a", "b"], ["a"])
    with pytest.raises(UsageError, match=r"bits have the shape \(3,\)"):
        generation_table(written(["a"]), bits=np.ones(3))
    own = builtins.__import__

    def without(name: str, *args: Any, **more: Any) -> Any:
        if name.startswith("rouge_score"):
            raise ImportError(name)
        return own(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r'pip install "spafit\[generation\]"'):
        rouge_scores(["a"], ["a"])


def test_prompts_are_put_as_the_template_says() -> None:
    tokenizer = tiny_tokenizer(decoder=True)

    def pieces(**more: Any) -> list[str]:
        return tokenizer.convert_ids_to_tokens(encode_prompt(tokenizer, "the cat", **more))

    assert pieces(template="continue") == pieces(template="plain") == ["the", "cat"]  # no piece for a line break
    with pytest.raises(ModelError, match="has no chat template"):
        pieces(template="chat")
    with pytest.raises(UsageError, match="template is 'poem'"):
        pieces(template="poem")
    tokenizer.chat_template = CHAT
    chat = ["[CLS]", "the", "cat", "[SEP]", "the", "[CLS]"]
    assert pieces() == pieces(template="chat") == chat
    assert pieces(template="plain") == pieces(template="continue") == ["the", "cat"]
    assert encode_prompt(tokenizer, "the cat", separate=True) == tokenizer("the cat")["input_ids"]
    item, cut = encode_pair(tokenizer, "the cat", "dog runs", max_length=32)
    learnt = [i for i, label in zip(item["input_ids"], item["labels"], strict=True) if label != IGNORED]
    assert tokenizer.convert_ids_to_tokens(item["input_ids"][: len(chat)]) == chat
    assert tokenizer.convert_ids_to_tokens(learnt) == ["dog", "runs", "[SEP]"]  # nothing after the end
    assert not cut


@needs_smollm2
def test_smollm2_reads_its_own_chat_and_writes_the_same_in_a_batch_and_alone() -> None:
    headed = load_with_head(str(next((MODELS / "smollm2").glob("*.gguf"))), head="causal-lm")
    tokenizer = headed.tokenizer
    assert tokenizer is not None
    item, cut = encode_pair(tokenizer, "Say hi.", "Hi there!", max_length=99)
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    by_hand = (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\n"
        "Hi there!<|im_end|>"
    )
    assert item["input_ids"] == tokenizer(by_hand, add_special_tokens=False)["input_ids"]
    learnt = [i for i, label in zip(item["input_ids"], item["labels"], strict=True) if label != IGNORED]
    assert learnt == tokenizer("Hi there!<|im_end|>", add_special_tokens=False)["input_ids"]
    assert not cut
    plain, _ = encode_pair(tokenizer, "Say hi.", "Hi!", max_length=99, template="plain")
    assert plain["input_ids"] == tokenizer("Say hi.\nHi!<|im_end|>", add_special_tokens=False)["input_ids"]
    going_on = encode_prompt(tokenizer, "Say hi.", template="continue")
    assert going_on == tokenizer("Say hi.", add_special_tokens=False)["input_ids"]
    prompts = ["What is the capital of France?", "Name a colour."]
    both, alone = (
        generate(headed.model, tokenizer, prompts, max_new_tokens=12, batch_size=size, quiet=True) for size in (2, 1)
    )
    pd.testing.assert_frame_equal(both, alone)
    assert "Paris" in both["text"][0]
    right, wrong = (
        answer_bits(ready_to_pad(headed), ["What is the capital of France?"], [f"The capital of France is {city}."])
        for city in ("Paris", "Rome")
    )
    assert right[0, 0] < wrong[0, 0] - 3


@pytest.mark.parametrize("name", ["gpt2", "llama", "bart", "t5"])
def test_bits_of_answers_are_those_of_the_models_own_loss(name: str, tmp_path: Path) -> None:
    decoder = name in ("gpt2", "llama")
    auto = AutoModelForCausalLM if decoder else AutoModelForSeq2SeqLM
    tiny(name, auto=auto.__name__).save_pretrained(tmp_path)
    tiny_tokenizer(decoder=decoder).save_pretrained(tmp_path)
    headed = ready_to_pad(load_with_head(str(tmp_path), head="causal-lm" if decoder else "seq2seq-lm"))
    prompts, answers = ["the cat", "a dog sees the old cat"], ["dog runs", "cat"]
    got = answer_bits(headed, prompts, answers)
    np.testing.assert_allclose(got, answer_bits(headed, prompts, answers, batch_size=1), rtol=1e-4)
    for (bits, tokens), prompt, answer in zip(got, prompts, answers, strict=True):
        item, _ = encode_pair(headed.tokenizer, prompt, answer, max_length=64, separate=not decoder)
        with torch.no_grad():
            loss = headed.model(**{k: torch.tensor([item[k]]) for k in ("input_ids", "labels")}).loss
        assert tokens == len(headed.tokenizer.tokenize(answer)) + 1  # and the end
        assert bits == pytest.approx(float(loss) * tokens / math.log(2), rel=1e-4)
    with pytest.raises(UsageError, match="1 answers for 2 prompts"):
        answer_bits(headed, prompts, ["cat"])
    with pytest.raises(DataError, match="Item 2: "):
        answer_bits(headed, ["cat", "cat " * 90], ["dog", "dog"])


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["generate", *arguments, "--quiet"])


def test_the_command_writes_texts_and_figures(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "m", auto="AutoModelForCausalLM")
    model = str(tmp_path / "m")
    done = run(model, "the cat", "a dog", "--max-new-tokens", "5", "--device", "cpu", "--json")
    assert done.exit_code == 0, done.output
    content = json.loads(done.stdout)
    headed = load_with_head(model, head="causal-lm")
    own = generate(headed.model, headed.tokenizer, ["the cat", "a dog"], max_new_tokens=5, quiet=True)
    assert [t["text"] for t in content["texts"]] == own["text"].tolist()
    assert {f["metric"]: f["value"] for f in content["figures"]}["tokens"] == own["tokens"].mean()
    (tmp_path / "t.csv").write_text("q,a\nthe cat,dog\na dog,cat\nthe big cat,dog\n")
    table = ["--table", str(tmp_path / "t.csv"), "--prompt", "q", "--max-new-tokens", "5", "--device", "cpu"]
    done = run(model, *table, "--answer", "a", "--limit", "2", "--out", str(tmp_path / "w.csv"))
    assert done.exit_code == 0, done.output
    assert "> the cat\n" in done.stdout
    texts, figures = pd.read_csv(tmp_path / "w.csv"), pd.read_csv(tmp_path / "w-figures.csv").set_index("metric")
    assert texts["answer"].tolist() == ["dog", "cat"]
    assert figures.loc["bits_per_token"]["value"] == pytest.approx(
        texts["bits"].sum() / texts["answer_tokens"].sum(), rel=1e-5
    )
    assert (tmp_path / "w.parquet").is_file()
    one, two = (run(model, *table, "--sample", "--seed", s, "--json").stdout for s in ("1", "2"))
    assert one == run(model, *table, "--sample", "--seed", "1", "--json").stdout != two


def test_the_command_loads_what_was_trained_here_as_it_was_trained(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "m", auto="AutoModelForCausalLM")
    tokenizer = tiny_tokenizer(decoder=True)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path / "m")
    how = TrainSettings(epochs=1, batch_size=4, max_length=16, select_share=0.0)
    rows = pd.DataFrame({"text": ["the cat sees a dog"] * 8, "idx": range(8)})
    data = TrainData("t", {"train": rows, "validation": rows}, None, (), kind="text")
    trained = spafit.fit(
        str(tmp_path / "m"), "lora", data=data, settings=how, out=tmp_path / "o", device="cpu", quiet=True
    )
    folder = str(trained.model_folder(0))
    done = run(folder, "the cat", "--max-new-tokens", "5", "--device", "cpu", "--json")
    assert done.exit_code == 0, done.output
    again = load(folder)
    own = generate(again.model, tokenizer, ["the cat"], max_new_tokens=5, template="continue", quiet=True)
    chat = generate(again.model, tokenizer, ["the cat"], max_new_tokens=5, quiet=True)
    assert json.loads(done.stdout)["texts"][0]["text"] == own["text"][0] != chat["text"][0]


def test_the_command_refuses_in_a_sentence(tmp_path: Path) -> None:
    save_tiny("bert", tmp_path / "bert")
    save_tiny("llama", tmp_path / "llama", auto="AutoModelForCausalLM")
    (tmp_path / "t.csv").write_text("q\nthe cat\n")
    for arguments, said in (
        ([str(tmp_path / "llama")], UsageError),
        ([str(tmp_path / "llama"), "cat", "--table", str(tmp_path / "t.csv")], UsageError),
        ([str(tmp_path / "llama"), "cat", "--answer", "a"], UsageError),
        ([str(tmp_path / "llama"), " "], DataError),
        ([str(tmp_path / "llama"), "cat", "--template", "chat"], ModelError),
        ([str(tmp_path / "llama"), "cat", "--template", "poem"], UsageError),
        ([str(tmp_path / "llama"), "--table", str(tmp_path / "t.csv")], DataError),
        ([str(tmp_path / "bert"), "cat"], ModelError),
    ):
        done = run(*arguments, "--device", "cpu")
        assert isinstance(done.exception, said), (arguments, done.exception)
    rows = pd.DataFrame({"text": ["the cat", "a dog"] * 4, "label": [0, 1] * 4, "idx": range(8)})
    data = TrainData("t", {"train": rows, "validation": rows}, ("a", "b"), ("accuracy",))
    how = TrainSettings(epochs=1, batch_size=4, max_length=16, select_share=0.0)
    trained = spafit.fit(
        str(tmp_path / "bert"), "lora", data=data, settings=how, out=tmp_path / "o", device="cpu", quiet=True
    )
    done = run(str(trained.model_folder(0)), "cat")
    assert isinstance(done.exception, ModelError)
    assert "was trained for sequence-classification and writes no text" in str(done.exception)
