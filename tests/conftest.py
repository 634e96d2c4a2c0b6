"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# One worker process per core runs the tests; more threads than cores would make each of them several times slower.
# Before anything imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests have 15 minutes, beside whatever else the machine does."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session")
def small_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random 3-block BERT, 16 wide, with MiniLM's real tokenizer."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    from spafit.models import default_model_path
    from spafit.runtime import torch_seed

    source = default_model_path()
    assert source is not None, "the demo extra is part of the test extra"
    folder = tmp_path_factory.mktemp("models") / "small-bert"
    tokenizer = AutoTokenizer.from_pretrained(source)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64,
    )  # fmt: skip
    with torch_seed(0, "small bert"):
        model = BertModel(config)
    model.save_pretrained(folder)
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An activation cache of the test's own."""
    monkeypatch.setenv("SPAFIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
