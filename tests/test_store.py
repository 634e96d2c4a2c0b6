"""The store and its cache: bytes on disk, rows, damage, locks, the size limit, and the commands that look after it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from analysis.cli.cache import cache_app
from probing import cache
from probing.extraction import extract
from probing.store import ActivationStore, Layout, Series, data_path, manifest_path, shard_state, write_shard
from spafit.errors import StoreError, UsageError
from tests.extraction_fixtures import some_texts, tiny_loaded


def _store(folder: Path, dtype: str = "float32") -> tuple[ActivationStore, dict[str, torch.Tensor]]:
    """Two shards of 3 + 2 word rows and 1 + 2 text rows, two sites, with known content."""
    series = (
        Series("block", "words", "mean", (0, 1, 2), 4),
        Series("block", "sentences", "mean", (0, 1, 2), 4),
        Series("attention", "words", "mean", (1, 2), 4),
    )
    layout = Layout(folder, series, dtype, word_edges=np.array([0, 3, 5]), text_edges=np.array([0, 1, 3]))
    generator = torch.Generator().manual_seed(0)
    whole: dict[str, list[torch.Tensor]] = {}
    for shard in range(2):
        memory = torch.empty(layout.shard_bytes(shard), dtype=torch.uint8)
        for key, tensor in layout.tensors(shard, memory).items():
            tensor.copy_(1000 * torch.randn(tensor.shape, generator=generator))
            whole.setdefault(key, []).append(tensor)
        write_shard(layout, shard, memory, halvings={4: 1} if shard else {})
    rows = {"words": np.array([4, -1, 0, 2]), "sentences": np.array([2, 0])}
    store = ActivationStore(
        layout,
        stack="encoder",
        num_hidden=3,
        rows=rows,
        word_offsets=np.array([0, 2, 4]),
        truncated=np.array([True, False]),
        tokens=9,
    )
    return store, {k: torch.cat(v, dim=1) for k, v in whole.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_come_back_as_they_were_stored_in_every_precision(dtype, tmp_path):
    store, whole = _store(tmp_path, dtype)
    for h in range(3):
        words = store.words("mean", hidden=h)
        expected = whole["block.words.mean"][h].float().numpy()
        assert words.dtype == np.float32
        assert np.array_equal(words[[0, 2, 3]], expected[[4, 0, 2]])
        assert np.isnan(words[1]).all()
        sentences = store.sentences("mean", hidden=h, rows=np.array([1, 0, 1]))
        assert np.array_equal(sentences, whole["block.sentences.mean"][h].float().numpy()[[0, 2, 0]])
    attention = store.words("mean", hidden=2, site="attention", rows=np.array([3]))
    assert np.array_equal(attention, whole["attention.words.mean"][1].float().numpy()[[2]])
    assert store.word_valid.tolist() == [True, False, True, True]
    assert store.words("mean", hidden=0, rows=np.zeros(0, dtype=np.int64)).shape == (0, 4)


def test_shards_are_ordinary_safetensors(tmp_path):
    from safetensors.torch import load_file

    store, whole = _store(tmp_path, "bfloat16")
    read = [load_file(str(data_path(tmp_path, k))) for k in range(2)]
    for key, tensor in whole.items():
        assert torch.equal(torch.cat([r[key] for r in read], dim=1), tensor)
    assert store.width("attention") == 4
    assert store.hidden_of("attention") == (1, 2)


def test_asking_for_what_is_not_stored_says_what_is(tmp_path):
    store, _ = _store(tmp_path)
    with pytest.raises(UsageError, match="words by mean, sentences by mean"):
        store.words("max", hidden=0)
    with pytest.raises(UsageError, match="block, attention"):
        store.words("mean", hidden=0, site="heads")
    with pytest.raises(UsageError, match="only 1 to 2"):
        store.words("mean", hidden=0, site="attention")
    with pytest.raises(UsageError, match="from 0 to 3"):
        store.words("mean", hidden=0, rows=np.array([4]))
    data_path(tmp_path, 1).unlink()
    with pytest.raises(StoreError, match="Shard 1 "):
        store.sentences("mean", hidden=0)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_and_any_cut_is_damage(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bits")
    _store(folder)
    path = data_path(folder, 0)
    content = bytearray(path.read_bytes())
    assert shard_state(folder, 0, again=True) == "good"
    where = data.draw(st.integers(0, 8 * len(content) - 1))
    content[where // 8] ^= 1 << where % 8
    path.write_bytes(content)
    assert shard_state(folder, 0, again=True) == "damaged"
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    assert shard_state(folder, 0, again=True) == "damaged"


def test_a_shard_without_manifest_is_missing_and_one_without_data_damaged(tmp_path):
    _store(tmp_path)
    assert [shard_state(tmp_path, k) for k in range(3)] == ["good", "good", "missing"]
    manifest_path(tmp_path, 0).unlink()
    data_path(tmp_path, 1).unlink()
    assert [shard_state(tmp_path, k) for k in range(2)] == ["missing", "damaged"]


def test_the_checksum_is_read_once_per_process_unless_the_file_changes(tmp_path, monkeypatch):
    _store(tmp_path)
    reads = []
    monkeypatch.setattr("probing.store._checksum", lambda path: reads.append(path) or 0)
    assert shard_state(tmp_path, 0) == "good"
    assert reads == []
    os.utime(data_path(tmp_path, 0), (1, 1))
    assert shard_state(tmp_path, 0) == "damaged"
    assert len(reads) == 1


# ---------------------------------------------------------------- the cache as a whole


@pytest.mark.parametrize(
    ("text", "expected"),
    [("50GB", 50 * 10**9), ("1.5 tb", 1500 * 10**9), ("0", 0), ("12345", 12345), ("7 M", 7 * 10**6), (".5kB", 500)],
)
def test_sizes_are_read(text, expected):
    assert cache.parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5 parsecs", "1e9"])
def test_what_is_no_size_is_an_error(text):
    with pytest.raises(UsageError, match="not a size"):
        cache.parse_size(text)


def test_the_cache_is_where_it_is_told_to_be(tmp_path, monkeypatch):
    monkeypatch.setenv("SPAFIT_CACHE", str(tmp_path / "named"))
    assert cache.cache_root() == tmp_path / "named"
    assert cache.cache_root(tmp_path) == tmp_path
    monkeypatch.delenv("SPAFIT_CACHE")
    assert cache.cache_root().name == "spafit"
    monkeypatch.setenv("SPAFIT_CACHE_LIMIT", "2GB")
    assert cache.cache_limit() == 2 * 10**9


def _three_stores(folder: Path) -> list[Path]:
    """Stores of one tiny model over three corpora; the first was used longest ago. Nobody holds them."""
    loaded, folders = tiny_loaded(), []
    for i in range(3):
        folders.append(extract(loaded, some_texts(30, seed=i), cache_dir=folder).folder)
        os.utime(folders[-1] / "store.json", (1000.0 + i, 1000.0 + i))
    return folders


def test_pruning_takes_the_least_recently_used_first_and_never_one_in_use(tmp_path):
    first, second, third = _three_stores(tmp_path)
    sizes = {e.folder: e.bytes for e in cache.entries(tmp_path)}
    assert list(sizes) == [first, second, third]
    assert cache.prune(tmp_path, limit=sum(sizes.values())) == []
    held = extract(tiny_loaded(), some_texts(30, seed=0), cache_dir=tmp_path)
    os.utime(first / "store.json", (1000.0, 1000.0))
    gone = cache.prune(tmp_path, limit=sizes[first] + sizes[third])
    assert [e.folder for e in gone] == [second]
    assert np.isfinite(held.words("mean", hidden=1)).all()
    assert not cache.prune(tmp_path, limit=0, keep=third)
    del held
    assert [e.folder for e in cache.prune(tmp_path, limit=0)] == [first, third]
    assert cache.entries(tmp_path) == []


def test_a_store_that_another_process_uses_is_not_pruned(tmp_path):
    first, *_ = _three_stores(tmp_path)
    code = (
        "import sys; from pathlib import Path; from probing.cache import lease\n"
        "held = lease(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(first)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
    ) as process:
        assert process.stdout.readline() == b"held\n"
        cache.prune(tmp_path, limit=0)
        assert [e.folder for e in cache.entries(tmp_path)] == [first]
        process.stdin.close()
        process.wait(30)
    cache.prune(tmp_path, limit=0)
    assert cache.entries(tmp_path) == []


def test_extraction_makes_room_within_the_limit_and_says_when_it_cannot(tmp_path, monkeypatch):
    first, second, third = _three_stores(tmp_path)
    total = sum(e.bytes for e in cache.entries(tmp_path))
    monkeypatch.setenv("SPAFIT_CACHE_LIMIT", str(total + 5000))
    new = extract(tiny_loaded(), some_texts(30, seed=9), cache_dir=tmp_path)
    assert not first.exists()
    assert second.exists()
    assert third.exists()
    assert sum(e.bytes for e in cache.entries(tmp_path)) <= total + 5000
    monkeypatch.setenv("SPAFIT_CACHE_LIMIT", "50KB")
    with pytest.raises(StoreError, match="SPAFIT_CACHE_LIMIT"):
        extract(tiny_loaded(), some_texts(300, seed=10), cache_dir=tmp_path)
    assert np.isfinite(new.words("mean", hidden=0)).all()


def test_a_disk_that_is_too_small_is_found_before_any_pass(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    loaded, passes = tiny_loaded(), []
    loaded.model.register_forward_pre_hook(lambda *_: passes.append(1))
    with pytest.raises(StoreError, match=r"0\.00 GB free"):
        extract(loaded, some_texts(30), cache_dir=tmp_path)
    assert passes == []


def test_a_cache_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        extract(tiny_loaded(), some_texts(2), cache_dir=tmp_path / "file")


def test_a_claim_is_exclusive_and_clears_what_a_killed_writer_left(tmp_path):
    pytest.importorskip("fcntl")
    left = tmp_path / ".shard-00002.safetensors.x.safetensors"
    other = tmp_path / ".shard-00003.safetensors.x.safetensors"
    left.write_bytes(b"half")
    other.write_bytes(b"half")
    held = cache.claim(tmp_path, 2, wait=False)
    assert cache.claim(tmp_path, 2, wait=False) is None
    assert not left.exists()
    assert other.exists()
    cache.unclaim(held)
    again = cache.claim(tmp_path, 2, wait=True)
    assert again is not None
    cache.unclaim(again)
    assert sorted(p.name for p in tmp_path.iterdir()) == [other.name]


# ---------------------------------------------------------------- spafit cache


def _spafit_cache(*arguments: object):
    return CliRunner().invoke(cache_app, [str(a) for a in arguments])


def test_the_command_lists_verifies_repairs_and_prunes(tmp_path):
    import json

    folders = _three_stores(tmp_path)
    listed = _spafit_cache("list", "--cache-dir", tmp_path)
    assert listed.exit_code == 0
    assert all(f.name[:12] in listed.stdout for f in folders)
    assert "3 store(s)" in listed.stdout
    content = json.loads(_spafit_cache("list", "--cache-dir", tmp_path, "--json").stdout)
    assert [s["address"] for s in content["stores"]] == [f.name for f in folders]
    assert content["stores"][0]["model"] == "BertModel"

    path = data_path(folders[1], 0)
    damaged = bytearray(path.read_bytes())
    damaged[200] ^= 1
    assert _spafit_cache("verify", "--cache-dir", tmp_path).exit_code == 0
    path.write_bytes(damaged)
    found = _spafit_cache("verify", "--cache-dir", tmp_path)
    assert (found.exit_code, str(path) in found.stdout) == (1, True)
    assert _spafit_cache("verify", "--cache-dir", tmp_path, "--repair").exit_code == 1
    assert _spafit_cache("verify", "--cache-dir", tmp_path).exit_code == 0

    os.utime(folders[0] / "store.json", (time.time(), time.time()))
    old = _spafit_cache("prune", "--cache-dir", tmp_path, "--unused-days", 30)
    assert "2 store(s) deleted" in old.stdout
    assert "1 store(s) deleted, 0.0 MB left" in _spafit_cache("prune", "--cache-dir", tmp_path, "--limit", 0).stdout
