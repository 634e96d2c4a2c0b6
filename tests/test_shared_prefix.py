"""Models that share their first hidden states: computed once, stored as a full pass would store them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from probing.batching import plan_extraction
from probing.extraction import extract
from probing.shared_prefix import extract_sharing, unchanged_hidden
from probing.store import data_path
from spafit.models import LoadedModel, load_model
from tests.extraction_fixtures import some_texts
from tests.tiny import tiny, tiny_tokenizer

TEXTS = some_texts(40)


def pair(kind: str, change: str) -> tuple[LoadedModel, LoadedModel]:
    """A model, and a copy in which every tensor whose name holds ``change`` is another one."""
    tokenizer = tiny_tokenizer(decoder=kind in ("gpt2", "llama"))
    model = tiny(kind)
    other = copy.deepcopy(model)
    with torch.no_grad():
        touched = [p.add_(0.1) for n, p in other.named_parameters() if change in n]
    assert touched
    return load_model((model, tokenizer)), load_model((other, tokenizer))


@pytest.mark.parametrize(
    ("kind", "change", "expected"),
    [
        ("bert", "layer.2.output.dense.bias", 3),
        ("bert", "layer.0.", 1),
        ("bert", "embeddings.LayerNorm", 0),
        ("bert", "pooler", 4),
        ("gpt2", "h.1.mlp", 2),
        ("gpt2", "ln_f", 4),
        ("llama", "layers.2.", 3),
        ("albert", "albert_layer", 1),
    ],
)
def test_hidden_states_before_the_first_changed_tensor_are_unchanged(kind: str, change: str, expected: int) -> None:
    before, after = pair(kind, change)
    blocks = before.stacks[0].num_blocks
    assert unchanged_hidden(before, after) == (blocks + 1 if expected == 4 else expected)
    assert unchanged_hidden(before, before) == blocks + 1


def test_models_that_are_built_differently_share_nothing() -> None:
    before = load_model((tiny("bert"), tiny_tokenizer()))
    assert unchanged_hidden(before, load_model((tiny("roberta"), tiny_tokenizer()))) == 0
    model = tiny("bert")
    model.config.layer_norm_eps = 1e-3
    assert unchanged_hidden(before, load_model((model, tiny_tokenizer()))) == 0


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_stores_are_byte_for_byte_those_of_full_passes(kind: str, tmp_path: Path) -> None:
    before, after = pair(kind, {"bert": "layer.2.", "gpt2": "h.2.", "llama": "layers.2."}[kind])
    _, second = pair(kind, {"bert": "layer.1.", "gpt2": "h.1.", "llama": "layers.1."}[kind])
    second = load_model((second.model, before.tokenizer))
    options = {"batch_tokens": 64}
    blocks = {"full": 0, "cut": 0}

    def counted(model: LoadedModel, kind_of_pass: str) -> None:
        for path in model.stacks[0].block_paths:
            block = model.model.get_submodule(path)
            original = block.forward

            def forward(*a: object, original=original, **k: object) -> object:  # type: ignore[no-untyped-def]
                blocks[kind_of_pass] += 1
                return original(*a, **k)

            block.forward = forward

    for model in (before, after, second):
        extract(model, TEXTS, cache_dir=tmp_path / "full", device="cpu", **options)
    extract_sharing(
        before, {"after": (after, 3), "second": (second, 2)}, TEXTS, options=options, device="cpu",
        cache_dir=tmp_path / "shared",
    )  # fmt: skip
    for model in (before, after, second):
        folders = [plan_extraction(model, TEXTS, cache_dir=tmp_path / n, **options) for n in ("full", "shared")]
        for shard in range(folders[0].shards):
            a, b = (data_path(p.folder, shard).read_bytes() for p in folders)
            assert a == b
        counted(model, "full")
        assert extract(model, TEXTS, cache_dir=tmp_path / "shared", device="cpu", **options).seconds == 0.0
    assert blocks["full"] == 0


def test_shared_blocks_run_once(tmp_path: Path) -> None:
    before, after = pair("bert", "layer.2.")
    calls: list[str] = []
    for name, model in (("before", before), ("after", after)):
        for path in model.stacks[0].block_paths:
            inner = model.model.get_submodule(f"{path}.attention")
            inner.register_forward_pre_hook(lambda *_, n=name, p=path: calls.append(f"{n} {p[-1]}"))
    batches = plan_extraction(before, TEXTS, batch_tokens=64, cache_dir=tmp_path).batches
    extract_sharing(before, {"a": (after, 3)}, TEXTS, options={"batch_tokens": 64}, device="cpu", cache_dir=tmp_path)
    trial = 1  # one batch is computed both ways beforehand, to see that they agree
    assert calls.count("before 2") == batches
    assert calls.count("before 0") == batches + trial
    assert calls.count("after 0") == trial
    assert calls.count("after 2") == batches + 2 * trial


def test_a_stack_that_hands_on_more_than_states_is_left_to_full_passes(tmp_path: Path) -> None:
    before, after = pair("t5", "block.2.")
    extract_sharing(before, {"a": (after, 3)}, TEXTS, options={}, device="cpu", cache_dir=tmp_path)
    plan = plan_extraction(after, TEXTS, cache_dir=tmp_path)
    assert not data_path(plan.folder, 0).exists()
