"""Words and sub-words: alignment by character offsets against a naive loop, for three families of tokenizers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probing.align import encode_texts, ragged
from probing.tasks.base import Text
from spafit.errors import DataError, ModelError
from tests.tiny import tiny_tokenizer

SENTENCES = [
    "the cat sees a big dog and runs",
    "A dog , an old one , walked ( slowly ) home .",
    "unbelievable naïveté costs € 5,000.00 in Zürich",
    "日本 語 and emoji 👩‍🚀 mixed x",
    "do n't can not",
]


def _byte_level(*, trim_offsets: bool, add_prefix_space: bool):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(SENTENCES * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def _unigram():
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=90, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(SENTENCES * 3, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend)


TOKENIZERS = {
    "wordpiece": tiny_tokenizer(),
    "byte-level": _byte_level(trim_offsets=True, add_prefix_space=False),
    "byte-level, spaces inside offsets": _byte_level(trim_offsets=False, add_prefix_space=True),
    "unigram": _unigram(),
}
each_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


def _naive(tokenizer, text: Text) -> list[list[int]]:
    """Positions of the tokens that overlap each span, one text and one token at a time."""
    encoding = tokenizer(text.string, text.second).encodings[0]
    owned = []
    for a, b in text.spans:
        pairs = zip(encoding.offsets, encoding.sequence_ids, strict=True)
        owned.append([i for i, ((s, e), segment) in enumerate(pairs) if segment == 0 and max(s, a) < min(e, b)])
    return owned


def _words(encoded) -> list[list[int]]:
    pairs = zip(encoded.word_first.tolist(), encoded.word_last.tolist(), strict=True)
    return [list(range(a, b + 1)) if a >= 0 else [] for a, b in pairs]


@each_tokenizer
def test_words_own_the_tokens_that_a_naive_loop_finds(tokenizer):
    texts = [Text.from_words(s.split()) for s in SENTENCES]
    encoded = encode_texts(tokenizer, texts, max_length=None)
    assert _words(encoded) == [w for t in texts for w in _naive(tokenizer, t)]
    for i, text in enumerate(texts):
        ids = encoded.ids[encoded.token_offsets[i] : encoded.token_offsets[i + 1]].tolist()
        assert ids == tokenizer(text.string)["input_ids"]


_CHARACTERS = st.characters(codec="utf-8", exclude_categories=["Cs", "Cc", "Zs", "Zl", "Zp"])


@each_tokenizer
@settings(max_examples=40, deadline=None)
@given(words=st.lists(st.text(_CHARACTERS, min_size=1, max_size=8), min_size=1, max_size=6))
def test_alignment_agrees_with_the_naive_loop_on_any_words(tokenizer, words):
    text = Text.from_words(words)
    try:
        encoded = encode_texts(tokenizer, [text], max_length=None)
    except DataError:
        assert not any(s is not None for s in tokenizer(text.string).encodings[0].sequence_ids)
        return
    for found, expected in zip(_words(encoded), _naive(tokenizer, text), strict=True):
        # A token without characters may stand inside a word; at its edges only overlapping tokens count.
        assert found[:1] == expected[:1]
        assert found[-1:] == expected[-1:]


@each_tokenizer
def test_no_token_belongs_to_two_space_separated_words(tokenizer):
    encoded = encode_texts(tokenizer, [Text.from_words(s.split()) for s in SENTENCES], max_length=None)
    for i in range(len(SENTENCES)):
        owned = [x for w in _words(encoded)[encoded.word_offsets[i] : encoded.word_offsets[i + 1]] for x in w]
        assert len(owned) == len(set(owned)) > 0


def test_a_token_over_two_spans_belongs_to_both():
    # Spans finer than tokens: "runs" is one token, asked for as "run" + "s".
    encoded = encode_texts(tiny_tokenizer(), [Text("runs a", ((0, 3), (3, 4), (5, 6)))], max_length=None)
    assert _words(encoded) == [[1], [1], [2]]


def test_only_the_first_segment_of_a_pair_owns_words():
    tokenizer = tiny_tokenizer()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    texts = [Text("a dog", ((0, 1), (2, 5)), second="the cat"), Text("the cat"), Text("a", ((0, 1),), second="a a")]
    encoded = encode_texts(tokenizer, texts, max_length=None)
    assert _words(encoded) == [[1], [2], [1]]
    assert encoded.lengths.tolist() == [7, 4, 6]
    assert encoded.types[:7].tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert encoded.own[:7].tolist() == [False, True, True, False, True, True, False]


def test_a_word_that_the_tokenizer_drops_has_no_token():
    encoded = encode_texts(tiny_tokenizer(), [Text.from_words(["a", "\u200b\u0301", "dog"])], max_length=None)
    assert [bool(w) for w in _words(encoded)] == [True, False, True]


def test_special_tokens_written_in_the_text_are_part_of_it():
    encoded = encode_texts(tiny_tokenizer(), [Text.from_words(["a", "[SEP]", "dog"])], max_length=None)
    assert encoded.own.tolist() == [False, True, True, True, False]
    assert _words(encoded) == [[1], [2], [3]]


@pytest.mark.parametrize("window", [5, 6, 7, 8, 9, 11])
@pytest.mark.parametrize("second", [None, "the big dog", "a cat sees the big old dog"])
def test_truncation_keeps_what_transformers_keeps_and_never_a_part_of_a_word(window, second):
    tokenizer = tiny_tokenizer()
    # "xyz" is x ##y ##z: windows cut through it.
    text = Text(*(lambda t: (t.string, t.spans))(Text.from_words(["a", "xyz", "runs", "uvw"])), second=second)
    encoded = encode_texts(tokenizer, [text], max_length=window)
    reference = tokenizer(text.string, text.second, truncation="longest_first", max_length=window)
    whole = tokenizer(text.string, text.second)
    assert encoded.ids.tolist() == reference["input_ids"]
    assert bool(encoded.truncated[0]) == (len(whole["input_ids"]) > window)
    kept = sum(s == 0 for s in reference.encodings[0].sequence_ids)
    for found, tokens in zip(_words(encoded), _naive(tokenizer, text), strict=True):
        assert found == (tokens if tokens[-1] <= kept else [])


def test_a_text_within_the_window_is_not_truncated():
    encoded = encode_texts(tiny_tokenizer(), [Text.from_words(["a", "dog"])], max_length=4)
    assert not encoded.truncated.any()
    assert (encoded.word_first >= 0).all()


def test_a_window_with_no_room_for_text_is_an_error():
    with pytest.raises(ModelError, match="no room"):
        encode_texts(tiny_tokenizer(), [Text("a dog")], max_length=2)


def test_the_tokenizers_own_settings_are_neither_used_nor_changed():
    tokenizer = tiny_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(max_length=3, strategy="only_first", direction="left")
    backend.enable_padding(length=20, pad_id=0, pad_token="[PAD]")
    before = backend.truncation, backend.padding
    encoded = encode_texts(tokenizer, [Text("the big old dog")], max_length=None)
    assert encoded.lengths.tolist() == [6]
    assert (backend.truncation, backend.padding) == before


def test_a_slow_tokenizer_encodes_sentences_and_refuses_words():
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    texts = [Text("ab"), Text("abcdef", second="xy")]
    encoded = encode_texts(tokenizer, texts, max_length=8)
    assert encoded.lengths.tolist() == [3, 8]
    assert encoded.ids[3:].tolist() == [*tokenizer("abcd")["input_ids"], *tokenizer("xy")["input_ids"]]
    assert encoded.own.tolist() == [True, True, False, *[True] * 4, False, True, True, False]
    assert encoded.truncated.tolist() == [False, True]
    with pytest.raises(ModelError, match="slow one"):
        encode_texts(tokenizer, [Text.from_words(["ab"])], max_length=None)


@pytest.mark.parametrize("string", ["", "   ", "\u200b"])
def test_an_empty_text_is_named(string):
    with pytest.raises(DataError, match=r"Text 7 .* empty"):
        encode_texts(tiny_tokenizer(), [Text("a"), Text(string)], max_length=None, numbers=np.array([3, 7]))


@pytest.mark.parametrize("span", [(0, 6), (-1, 2), (2, 2), (3, 1)])
def test_a_span_outside_its_text_is_an_error(span):
    with pytest.raises(DataError, match="span outside"):
        encode_texts(tiny_tokenizer(), [Text("a dog", (span,))], max_length=None)


def test_texts_keep_their_place_among_pairs_and_chunks(monkeypatch):
    monkeypatch.setattr("probing.align._CHUNK", 2)
    tokenizer = tiny_tokenizer()
    texts = [Text(s, second=p) for s, p in [("a", None), ("a dog", "x"), ("the", None), ("old cat", None), ("b", "c")]]
    encoded = encode_texts(tokenizer, texts, max_length=None)
    for i, text in enumerate(texts):
        ids = encoded.ids[encoded.token_offsets[i] : encoded.token_offsets[i + 1]].tolist()
        assert ids == tokenizer(text.string, text.second)["input_ids"]


@given(lengths=st.lists(st.integers(0, 4), min_size=1, max_size=8), data=st.data())
def test_ragged_picks_the_elements_of_rows_in_order(lengths, data):
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    rows = np.array(data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=6)), dtype=np.int64)
    expected = [i for r in rows for i in range(offsets[r], offsets[r + 1])]
    assert ragged(offsets, rows).tolist() == expected
