"""Models that write: items and loss against transformers' own, what is learnt, generation, and refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from typer.testing import CliRunner

import spafit
from analysis.cli.main import app
from spafit.batches import EncodedTexts
from spafit.data.training import TrainData
from spafit.data.writing import answers_data, text_data
from spafit.errors import DataError, ModelError, UsageError
from spafit.generating import generate
from spafit.generation_metrics import answer_scores, rouge_scores
from spafit.heads import load_with_head
from spafit.kinds import kind_of
from spafit.kinds.language import Answers
from spafit.predictions import summarise
from spafit.settings import TrainSettings
from spafit.strata import Outside, StrataConfig, Stratum
from spafit.text_windows import IGNORED, encode_pair, pack
from tests.tiny import DECODERS, POSITIONS, save_tiny, tiny, tiny_tokenizer

FAMILIES = ("gpt2", "llama", "bart", "t5")
WORDS = ("the", "big", "old", "a", "and", "sees")


def auto(name: str) -> str:
    return "AutoModelForCausalLM" if name in DECODERS else "AutoModelForSeq2SeqLM"


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp(request.param)
    same = {"num_layers": 3} if request.param == "t5" else {}  # transformers cannot generate where the depths differ
    tiny(request.param, auto=auto(request.param), **same).save_pretrained(folder)
    tiny_tokenizer(decoder=request.param in DECODERS).save_pretrained(folder)
    return request.param, str(folder)


def pairs(n: int, seed: int, *, shuffled: bool = False) -> pd.DataFrame:
    """The answer names the other animal, and whether it runs: two words that the prompt decides."""
    draw = np.random.default_rng(seed)
    animals = draw.integers(0, 2, n)
    filler = [" ".join(draw.choice(WORDS, size=draw.integers(0, 4))) for _ in range(n)]
    prompts = [f"{('cat', 'dog')[a]} {f}".strip() for a, f in zip(animals, filler, strict=True)]
    told = draw.permutation(animals) if shuffled else animals
    return pd.DataFrame({"prompt": prompts, "answer": [("dog runs", "cat sees")[a] for a in told], "idx": range(n)})


def task(*, shuffled: bool = False) -> TrainData:
    frames = {"train": pairs(64, 0, shuffled=shuffled), "validation": pairs(24, 1)}
    return TrainData("animals", frames, None, (), kind="answers")


def test_bits_are_those_of_the_models_own_loss_whatever_the_batch(family: tuple[str, str]) -> None:
    _name, folder = family
    kind = Answers(task())
    headed = kind.load(folder, seed=0, revision=None, offline=True, allow_pickle=False)
    items = kind.encode(pairs(7, 3), headed, max_length=16)
    got = [
        summarise(headed.model, items, kind.collator(headed), lambda m, i: kind.loss(m, i)[1], batch_size=b)
        for b in (1, 7)
    ]
    np.testing.assert_allclose(got[0], got[1], rtol=2e-5)
    for item, (bits, tokens, right) in zip(items.items, got[0], strict=True):
        given = {k: torch.tensor([item[k]]) for k in ("input_ids", "labels")}
        with torch.no_grad():
            own = headed.model(**given)
        predicted = sum(label != IGNORED for label in item["labels"])
        assert tokens == predicted
        assert bits == pytest.approx(float(own.loss) * predicted / math.log(2), rel=1e-4)
        assert 0 <= right <= tokens
    scores = kind.score(got[0], items)
    assert scores["bits_per_token"] == pytest.approx(got[0][:, 0].sum() / got[0][:, 1].sum())
    assert scores["perplexity"] == pytest.approx(2 ** scores["bits_per_token"])


@pytest.mark.parametrize("shuffled", [False, True])
def test_an_answer_that_the_prompt_decides_is_learnt_and_one_that_it_does_not_is_not(
    family: tuple[str, str], shuffled: bool, tmp_path: Path
) -> None:
    _name, folder = family
    how = TrainSettings(epochs=20, batch_size=8, learning_rate=5e-3, max_length=16, select_share=0.0)
    result = spafit.fit(
        folder, "full", data=task(shuffled=shuffled), settings=how, out=tmp_path, device="cpu", quiet=True
    )
    scores = result.runs.set_index("metric")["value"]
    assert (scores["exact_match"] > 0.95) == (not shuffled)
    assert scores["headline"] == -scores["bits_per_token"]
    table = pd.read_csv(tmp_path / "seed-0" / "predictions-validation.csv")
    assert (table["written"] == table["answer"]).mean() == scores["exact_match"]
    assert table["bits"].sum() / table["tokens"].sum() == pytest.approx(scores["bits_per_token"], rel=1e-4)
    if not shuffled:
        assert "minus bits_per_token" in result.to_markdown()


def test_a_plan_trains_its_blocks_alone_comes_back_and_keeps_the_head(family: tuple[str, str], tmp_path: Path) -> None:
    from spafit import checkpoint

    _name, folder = family
    how = TrainSettings(epochs=1, batch_size=8, max_length=16, select_share=0.0)
    result = spafit.fit(folder, "spafit-scaled-I", data=task(), settings=how, out=tmp_path, device="cpu", quiet=True)
    assert not any("lm_head" in n for n in checkpoint_names(result.model_folder(0)))
    again = checkpoint.load(result.model_folder(0))
    frames = pairs(6, 5)
    kind = kind_of(task())
    headed = kind.load(folder, seed=0, revision=None, offline=True, allow_pickle=False)
    written = generate(again.model, headed.tokenizer, frames["prompt"].tolist(), max_new_tokens=5, quiet=True)
    assert len(written) == 6
    with again.base_model() as base:
        before = generate(base, headed.tokenizer, frames["prompt"].tolist(), max_new_tokens=5, quiet=True)
    fresh = generate(headed.model, headed.tokenizer, frames["prompt"].tolist(), max_new_tokens=5, quiet=True)
    pd.testing.assert_frame_equal(before, fresh)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_texts_are_the_same_in_any_batch_and_draws_come_from_the_seed(
    family: tuple[str, str], options: dict[str, Any]
) -> None:
    _name, folder = family
    kind = Answers(task())
    headed = kind.load(folder, seed=0, revision=None, offline=True, allow_pickle=False)
    prompts = pairs(9, 2)["prompt"].tolist()

    def texts(**more: Any) -> pd.DataFrame:
        return generate(headed.model, headed.tokenizer, prompts, max_new_tokens=6, quiet=True, **options, **more)

    pd.testing.assert_frame_equal(texts(batch_size=1), texts(batch_size=9))
    assert texts()["prompt"].tolist() == prompts
    state = torch.get_rng_state()
    one, two, other = (texts(sample=True, seed=s) for s in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    pd.testing.assert_frame_equal(one, two)
    assert one["text"].tolist() != other["text"].tolist()
    assert (texts()["tokens"] <= 6).all()


def test_greedy_text_is_transformers_own_of_one_prompt(family: tuple[str, str]) -> None:
    name, folder = family
    kind = Answers(task())
    headed = kind.load(folder, seed=0, revision=None, offline=True, allow_pickle=False)
    kinds = AutoModelForCausalLM if name in DECODERS else AutoModelForSeq2SeqLM
    model = kinds.from_pretrained(folder).eval()
    tokenizer = tiny_tokenizer(decoder=name in DECODERS)
    text = "cat sees a dog"
    ids = tokenizer(text if name not in DECODERS else text + "\n", return_tensors="pt")
    own = model.generate(
        input_ids=ids["input_ids"], max_new_tokens=6, do_sample=False, eos_token_id=[3], pad_token_id=0
    )
    skip = ids["input_ids"].shape[1] if name in DECODERS else 1
    got = generate(headed.model, headed.tokenizer, [text], max_new_tokens=6, quiet=True)
    assert got["text"][0] == tokenizer.decode(own[0, skip:], skip_special_tokens=True).strip()


@given(st.lists(st.lists(st.integers(0, 99), max_size=9), min_size=1, max_size=9), st.integers(2, 12))
@settings(max_examples=50, deadline=None)
def test_packing_loses_and_doubles_no_token(texts: list[list[int]], window: int) -> None:
    windows = pack(texts, window, end=100)
    assert [t for w in windows for t in w] == [t for text in texts for t in (*text, 100)]
    assert all(len(w) == window for w in windows[:-1])
    assert 0 < len(windows[-1]) <= window


def test_running_text_is_predicted_token_by_token_across_windows(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "m", auto="AutoModelForCausalLM")
    (tmp_path / "train.txt").write_text("the cat sees a dog\n\nthe big dog runs and sees the old cat\n" * 8)
    data = text_data({"train": tmp_path / "train.txt"})
    assert {k: len(v) for k, v in data.frames.items()} == {"train": 13, "validation": 3}
    how = TrainSettings(epochs=25, batch_size=4, learning_rate=1e-2, max_length=8, select_share=0.2)
    result = spafit.fit(
        str(tmp_path / "m"), "full", data=data, settings=how, out=tmp_path / "out", device="cpu", quiet=True
    )
    scores = result.runs.set_index("metric")["value"]
    assert scores["bits_per_token"] < 3 < math.log2(99)
    kind = kind_of(data)
    headed = kind.load(str(tmp_path / "m"), seed=0, revision=None, offline=True, allow_pickle=False)
    items = kind.encode(data.frames["train"], headed, max_length=8)
    tokens = sum(len(tiny_tokenizer(decoder=True)(t)["input_ids"]) + 1 for t in data.frames["train"]["text"])
    assert sum(len(i["input_ids"]) for i in items.items) == tokens


def test_answers_are_written_for_items_drawn_evenly_whose_prompt_leaves_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spafit.kinds import language

    save_tiny("llama", tmp_path / "m", auto="AutoModelForCausalLM")
    window = POSITIONS
    frame = pairs(30, 1)
    frame.loc[5, "prompt"] = " ".join(
        ["cat"] * (window - 4)
    )  # fits beside its answer, but not beside all that is written
    data = TrainData("animals", {"train": pairs(12, 0), "validation": frame}, None, (), kind="answers")
    how = TrainSettings(epochs=1, batch_size=8, max_length=window, select_share=0.0)
    for most in (100, 7):
        monkeypatch.setattr(language, "WRITTEN", most)
        result = spafit.fit(
            str(tmp_path / "m"), "full", data=data, settings=how, out=tmp_path / str(most), device="cpu", quiet=True
        )
        table = pd.read_csv(tmp_path / str(most) / "seed-0" / "predictions-validation.csv")
        assert table["idx"].tolist() == frame["idx"].tolist()
        told = table["answer"].notna()
        assert told.sum() == min(most, 29)
        assert not told[5]
        assert (table["answer"][told] == frame["answer"][told.to_numpy()]).all()
        assert any(f"for {told.sum()} of 30 validation items" in note for note in result.run["notes"])
    assert np.flatnonzero(told).max() > 7  # not the first ones


class Template:
    """A tokenizer with a chat template, as instruction models have."""

    def __init__(self) -> None:
        self.own = tiny_tokenizer(decoder=True)
        turns = "{% for m in messages %}[CLS] {{ m.content }} [SEP]{% endfor %}"
        self.own.chat_template = turns + "{% if add_generation_prompt %}[CLS]{% endif %}"


def test_the_loss_is_of_the_answer_alone_in_a_chat_and_in_plain_text() -> None:
    tokenizer = tiny_tokenizer(decoder=True)
    for chat in (False, True):
        if chat:
            tokenizer = Template().own
        item, cut = encode_pair(tokenizer, "the cat", "dog runs", max_length=32)
        learnt = [i for i, label in zip(item["input_ids"], item["labels"], strict=True) if label != IGNORED]
        assert tokenizer.convert_ids_to_tokens(learnt) == ["dog", "runs", "[SEP]"]
        assert not cut
        read = item["input_ids"][: len(item["input_ids"]) - len(learnt)]
        said = ["[CLS]", "the", "cat", "[SEP]", "[CLS]"] if chat else ["the", "cat"]
        assert tokenizer.convert_ids_to_tokens(read) == said
        assert encode_pair(tokenizer, "the cat", "dog runs", max_length=len(read) + 1)[1]
        with pytest.raises(DataError, match=r"the prompt has \d tokens, and 2 are kept"):
            encode_pair(tokenizer, "the cat", "dog runs", max_length=2)


def test_rouge_is_that_of_hand_counted_examples() -> None:
    """'the cat sat' on 'the cat runs': 2 of 3 words, 1 of 2 pairs of words; the longest common part has 2 of 3."""
    pytest.importorskip("rouge_score")
    found = rouge_scores(["the cat sat", "x"], ["the cat runs", "y"])
    assert found["rouge1"] == pytest.approx([2 / 3, 0])
    assert found["rouge2"] == pytest.approx([1 / 2, 0])
    assert found["rougeL"] == pytest.approx([2 / 3, 0])
    scores = answer_scores(["a b", "c"], ["a b ", "d e"])
    assert scores["exact_match"] == 0.5
    assert scores["length_ratio"] == 0.75


def test_bad_data_and_models_are_refused_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"q": "cat", "a": a}) + "\n" for a in ("dog", " ", "")))
    with pytest.raises(DataError, match=r"p.jsonl, row 2: the answer is empty \(2 in all\)"):
        answers_data({"train": tmp_path / "p.jsonl"}, prompt="q", answer="a")
    with pytest.raises(DataError, match=r"no column .w.\. Columns: q, a"):
        answers_data({"train": tmp_path / "p.jsonl"}, prompt="q", answer="w")
    save_tiny("t5", tmp_path / "t5", auto="AutoModelForSeq2SeqLM")
    save_tiny("bert", tmp_path / "bert")
    save_tiny("llama", tmp_path / "llama", auto="AutoModelForCausalLM")
    text = TrainData(
        "t",
        {"train": pd.DataFrame({"text": ["cat"]}), "validation": pd.DataFrame({"text": ["cat"]})},
        None,
        (),
        kind="text",
    )
    with pytest.raises(ModelError, match="running text is for decoders"):
        spafit.fit(str(tmp_path / "t5"), "full", data=text, out=tmp_path / "o", quiet=True)
    with pytest.raises(ModelError, match="writes no text"):
        spafit.fit(None, "full", data=text, out=tmp_path / "o", quiet=True)
    with pytest.raises(DataError, match="kind answers needs the column 'prompt'"):
        spafit.fit(
            str(tmp_path / "t5"),
            "full",
            data=TrainData("x", text.frames, None, (), kind="answers"),
            out=tmp_path / "o",
            quiet=True,
        )
    with pytest.raises(UsageError, match="poems"):
        kind_of(TrainData("x", text.frames, None, (), kind="poems"))
    how = TrainSettings(max_length=4, epochs=1)
    long = TrainData(
        "long",
        {s: pairs(3, 0).assign(prompt="the big old cat sees a dog") for s in ("train", "validation")},
        None,
        (),
        kind="answers",
    )
    with pytest.raises(DataError, match=r"long, row 1: the prompt has 7 tokens"):
        spafit.fit(str(tmp_path / "llama"), "full", data=long, settings=how, out=tmp_path / "o", quiet=True)
    headed = load_with_head(str(tmp_path / "llama"), head="causal-lm")
    bare = headed.tokenizer
    bare.sep_token = bare.eos_token = None
    with pytest.raises(ModelError, match="no token for the end of a text"):
        generate(headed.model, bare, ["cat"], quiet=True)
    with pytest.raises(DataError, match="do not fit into the model's window"):
        generate(headed.model, tiny_tokenizer(decoder=True), ["cat"], max_new_tokens=500, quiet=True)
    with pytest.raises(UsageError, match="temperature and top_p are of draws"):
        generate(headed.model, tiny_tokenizer(decoder=True), ["cat"], top_p=0.5, quiet=True)


def test_the_command_trains_on_pairs_and_on_text(tmp_path: Path) -> None:
    save_tiny("bart", tmp_path / "bart", auto="AutoModelForSeq2SeqLM")
    pairs(20, 0).rename(columns={"prompt": "question"}).to_csv(tmp_path / "p.csv", index=False)
    common = ["--epochs", "1", "--max-length", "16", "--device", "cpu", "--quiet"]
    done = CliRunner().invoke(
        app,
        ["train", "--model", str(tmp_path / "bart"), "--train", str(tmp_path / "p.csv"), "--prompt", "question",
         "--strata", "lora", "--out", str(tmp_path / "out"), *common],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "exact_match" in done.output
    save_tiny("gpt2", tmp_path / "gpt2", auto="AutoModelForCausalLM")
    (tmp_path / "t.txt").write_text("the cat sees a dog\n" * 20)
    done = CliRunner().invoke(
        app,
        ["train", "--model", str(tmp_path / "gpt2"), "--train", str(tmp_path / "t.txt"), "--running-text", "--out",
         str(tmp_path / "text"), *common],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "perplexity" in done.output


def test_a_plan_of_ones_own_trains_a_head_that_presets_keep(tmp_path: Path) -> None:
    """Untied heads: frozen under presets, trained where the plan says so."""
    model = save_tiny("llama", tmp_path / "m", auto="AutoModelForCausalLM")
    how = TrainSettings(epochs=1, batch_size=8, max_length=16, select_share=0.0)
    size = model.lm_head.weight.numel()
    blocks = model.config.num_hidden_layers
    trained = {}
    for name, plan in {
        "preset": "lora",
        "own": StrataConfig(
            "m", {"decoder": blocks}, (Stratum("decoder", (0, blocks), "norm"),), Outside(head="full", pooler="freeze")
        ),
    }.items():
        result = spafit.fit(
            str(tmp_path / "m"), plan, data=task(), settings=how, out=tmp_path / name, device="cpu", quiet=True
        )
        trained[name] = checkpoint_names(result.model_folder(0))
    tied = model.config.tie_word_embeddings
    assert any("lm_head" in n for n in trained["own"]) == (not tied)
    assert not any("lm_head" in n for n in trained["preset"])
    assert size > 0


def checkpoint_names(folder: Path) -> list[str]:
    from spafit.checkpoint import read_config

    return list(read_config(folder)["trainable"])


def test_items_are_a_data_set_for_loaders() -> None:
    items = EncodedTexts(({"input_ids": [1, 2], "labels": [IGNORED, 2]},), None, 0, 4)
    assert items[0]["labels"] == [IGNORED, 2]
