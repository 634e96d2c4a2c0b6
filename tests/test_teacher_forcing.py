"""States of an encoder-decoder's decoder under teacher forcing, and of both stacks from one forward pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from probing.batching import plan_extraction
from probing.extraction import extract, extract_stacks, seconds_per_token
from probing.tasks.base import Text
from probing.teacher_forcing import causal_words, feeding_of
from spafit.errors import ModelError, UsageError
from spafit.models import LoadedModel, load_model
from tests.extraction_fixtures import shard_files, some_texts
from tests.tiny import tiny, tiny_encoder_decoder, tiny_tokenizer

FAMILIES = ("t5", "bart", "encoder-decoder", "widths")


def _loaded(name: str, *, closing: bool = True) -> LoadedModel:
    if name == "encoder-decoder":
        model = tiny_encoder_decoder()
    elif name == "widths":  # the encoder's states are projected to the decoder's width
        model = tiny_encoder_decoder(hidden_size=24)
    else:
        model = tiny(name)
    return load_model((model, tiny_tokenizer(decoder=not closing)))


def _by_hand(loaded: LoadedModel, text: Text) -> tuple[list[torch.Tensor], list[tuple[int, int]]]:
    """Decoder states of one text by the model's own forward pass, and the positions of each word's tokens."""
    tokenizer, model = loaded.tokenizer, loaded.model
    encoded = tokenizer(text.string, return_offsets_mapping=True)
    ids, start = encoded["input_ids"], model.config.decoder_start_token_id
    fed = [start, *(ids[:-1] if ids[-1] in tokenizer.all_special_ids else ids)]
    with torch.no_grad():
        output = model(
            input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([fed]), output_hidden_states=True,
            return_dict=True,
        )  # fmt: skip
    states = output.decoder_hidden_states
    positions = []
    for a, b in text.spans:
        own = [i + 1 for i, (x, y) in enumerate(encoded["offset_mapping"]) if x < b and y > a]
        positions.append((own[0], own[-1]))
    return [s[0] for s in states], positions


@pytest.mark.parametrize("closing", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_decoder_states_are_those_of_the_model_fed_the_text_shifted_right(name, closing, tmp_path):
    loaded, texts = _loaded(name, closing=closing), some_texts(9)
    store = extract(
        loaded, texts, stack="decoder", word_pooling=["first", "last", "mean"], sentence_pooling=["last", "mean"],
        cache_dir=tmp_path,
    )  # fmt: skip
    decoder = next(s for s in loaded.stacks if s.name == "decoder")
    assert store.num_hidden == decoder.num_blocks + 1
    for t, text in enumerate(texts):
        states, positions = _by_hand(loaded, text)
        for hidden in range(decoder.num_blocks + (decoder.final_norm is None)):  # T5's last one is after its norm
            for w, (first, last) in enumerate(positions):
                row = np.array([store.word_offsets[t] + w])
                for pooling, expected in (
                    ("first", states[hidden][first]),
                    ("last", states[hidden][last]),
                    ("mean", states[hidden][first : last + 1].mean(0)),
                ):
                    got = store.words(pooling, hidden=hidden, rows=row)[0]
                    np.testing.assert_allclose(got, expected.numpy(), atol=1e-5)
            own = states[hidden][positions[0][0] : positions[-1][1] + 1]
            np.testing.assert_allclose(store.sentences("mean", hidden=hidden)[t], own.mean(0).numpy(), atol=1e-5)
            np.testing.assert_allclose(store.sentences("last", hidden=hidden)[t], states[hidden][-1], atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_state_of_the_position_before_is_another_one(name, tmp_path):
    """The negative control of the test above: reading one position earlier gives other numbers."""
    loaded, texts = _loaded(name), some_texts(4)
    store = extract(loaded, texts, stack="decoder", word_pooling=["last"], sentence_pooling=(), cache_dir=tmp_path)
    states, positions = _by_hand(loaded, texts[0])
    before = states[1][positions[0][1] - 1].numpy()
    assert np.abs(store.words("last", hidden=1, rows=np.array([0]))[0] - before).max() > 1e-2


def test_a_decoder_state_knows_what_the_decoder_read_to_its_left_and_not_to_its_right(tmp_path):
    """With the encoder's text fixed, so that cross-attention shows it nothing of the change."""
    loaded = _loaded("bart")
    source = "the big dog runs"
    texts = [Text(source, target=t) for t in ("the cat sees a dog", "the cat sees a cat", "the dog sees a dog")]
    states = []
    for text in texts:
        ids = torch.tensor([loaded.tokenizer(source)["input_ids"]])
        fed = torch.tensor([[2, *loaded.tokenizer(text.target)["input_ids"][:-1]]])
        with torch.no_grad():
            states.append(loaded.model(input_ids=ids, decoder_input_ids=fed).last_hidden_state[0])
    # [start] [CLS] the cat sees a dog: "sees" stands at position 4.
    assert torch.allclose(states[0][4], states[1][4], atol=1e-6)
    assert (states[0][4] - states[2][4]).abs().max() > 1e-3
    store = extract(loaded, texts, stack="decoder", sentence_pooling=["last", "mean"], cache_dir=tmp_path)
    for t in range(3):
        np.testing.assert_allclose(store.sentences("last", hidden=3)[t], states[t][-1].numpy(), atol=1e-5)
        np.testing.assert_allclose(store.sentences("mean", hidden=3)[t], states[t][2:].mean(0).numpy(), atol=1e-5)
    encoder = extract(loaded, texts, stack="encoder", cache_dir=tmp_path)
    assert np.array_equal(*(encoder.sentences("mean", hidden=2)[i] for i in (0, 2)))  # it read the source alone


def test_without_cross_attention_a_word_s_state_depends_on_the_words_to_its_left_alone(tmp_path):
    """The text itself is what both stacks read, so the encoder's news are switched off to look at the causal mask."""
    loaded = _loaded("encoder-decoder")
    with torch.no_grad():
        for block in loaded.model.decoder.bert.encoder.layer:
            block.crossattention.output.dense.weight.zero_()
    sentences = [
        ["the", "cat", "sees", "a", "dog"],
        ["the", "cat", "sees", "a", "cat"],
        ["a", "cat", "sees", "a", "dog"],
    ]
    texts = [Text.from_words(words) for words in sentences]
    store = extract(loaded, texts, stack="decoder", sentence_pooling=(), cache_dir=tmp_path)
    sees = store.words("mean", hidden=2, rows=np.array([2, 7, 12]))
    np.testing.assert_allclose(sees[0], sees[1], atol=1e-6)
    assert np.abs(sees[0] - sees[2]).max() > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_stores_have_the_same_bytes_whether_stacks_are_asked_for_alone_or_together(name, tmp_path):
    loaded, texts = _loaded(name), some_texts(60, longest=30)
    options = {"word_pooling": ["mean", "last"], "batch_tokens": 256}
    both = extract_stacks(loaded, texts, stacks="encoder,decoder", cache_dir=tmp_path / "both", **options)
    assert list(both) == ["encoder", "decoder"]
    for stack, store in both.items():
        alone = extract(loaded, texts, stack=stack, cache_dir=tmp_path / stack, **options)
        assert alone.folder.name == store.folder.name
        assert shard_files(alone.folder) == shard_files(store.folder)
        assert alone.num_hidden == store.num_hidden


def _calls(loaded: LoadedModel) -> dict[str, list[int]]:
    calls: dict[str, list[int]] = {}
    for stack in loaded.stacks:
        for path in stack.block_paths:
            calls[path] = []
            loaded.model.get_submodule(path).register_forward_hook(
                lambda *_, path=path: calls[path].append(1)  # type: ignore[misc]
            )
    return calls


@pytest.mark.parametrize("name", FAMILIES)
def test_both_stacks_cost_one_call_of_every_block_per_batch(name, tmp_path):
    loaded, texts = _loaded(name), some_texts(40)
    batches = plan_extraction(loaded, texts, stack="decoder", batch_tokens=128, cache_dir=tmp_path).batches
    assert batches > 2
    calls = _calls(loaded)
    extract_stacks(loaded, texts, stacks="encoder,decoder", batch_tokens=128, cache_dir=tmp_path)
    assert {len(c) for c in calls.values()} == {batches}
    extract_stacks(loaded, texts, stacks="decoder,encoder", batch_tokens=128, cache_dir=tmp_path)  # all in the cache
    assert {len(c) for c in calls.values()} == {batches}


def test_a_stack_that_is_in_the_cache_is_not_written_again_and_the_encoder_runs_for_the_decoder(tmp_path):
    loaded, texts = _loaded("t5"), some_texts(20)
    first = extract(loaded, texts, stack="encoder", cache_dir=tmp_path)
    stamp = {p.name: p.stat().st_mtime_ns for p in first.folder.glob("shard-*")}
    calls = _calls(loaded)
    extract_stacks(loaded, texts, stacks="encoder,decoder", cache_dir=tmp_path)
    assert {len(c) for c in calls.values()} == {1}
    assert {p.name: p.stat().st_mtime_ns for p in first.folder.glob("shard-*")} == stamp


def test_a_decoder_s_window_counts_its_start_token(tmp_path):
    """Without a closing token to leave out, the last word of a full window has a state in the encoder alone."""
    loaded = _loaded("bart", closing=False)
    full = Text.from_words(["dog"] * 64)  # the window is 64
    stores = extract_stacks(loaded, [full], stacks="encoder,decoder", cache_dir=tmp_path)
    assert stores["encoder"].word_valid.all()
    assert stores["decoder"].word_valid.sum() == 63
    assert stores["decoder"].truncated.all()
    assert not stores["encoder"].truncated.any()


def test_what_a_decoder_is_fed_is_said(tmp_path):
    loaded = _loaded("t5")
    feeding = feeding_of(loaded)
    assert feeding is not None
    assert (feeding.start, feeding.guessed) == (0, False)
    assert "[PAD], then the text itself" in feeding.words
    assert "knows nothing of what stands to its right except through what the encoder read" in causal_words(
        feeding.decoder
    )
    assert feeding_of(load_model((tiny("bert"), tiny_tokenizer()))) is None
    loaded.model.config.decoder_start_token_id = None
    loaded.model.generation_config = None
    guessed = feeding_of(loaded)
    assert guessed is not None
    assert (guessed.start, guessed.guessed) == (2, True)
    assert "the model does not name" in guessed.words


def test_what_cannot_be_fed_is_refused_in_one_sentence_and_its_encoder_is_probed(tmp_path):
    model = tiny_encoder_decoder(vocab_size=200)
    loaded = load_model((model, tiny_tokenizer()))
    with pytest.raises(ModelError, match="its vocabulary of 200 tokens is not the encoder's of 128"):
        extract(loaded, some_texts(2), stack="decoder", cache_dir=tmp_path)
    assert extract(loaded, some_texts(2), stack="encoder", cache_dir=tmp_path).num_hidden == 4
    with pytest.raises(UsageError, match="names one stack twice"):
        extract_stacks(_loaded("t5"), some_texts(2), stacks="encoder,encoder", cache_dir=tmp_path)


def test_time_per_token_of_both_stacks_is_measured():
    assert 0 < seconds_per_token(_loaded("t5"), stack="encoder,decoder") < 1
