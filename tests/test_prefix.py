"""The frozen-prefix cache changes what is computed, and nothing of what is learnt."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from spafit import io, prefix
from spafit.adapt import StratifiedModel, apply_strata, canonical_parameters
from spafit.batches import Collator, EncodedTexts
from spafit.errors import NumericalError, OutputError
from spafit.prefix import PrefixCache, PrefixError, prefix_bytes, prefix_pays
from spafit.runtime import torch_seed
from spafit.stacks import find_stacks
from spafit.strata import Outside, StrataConfig, Stratum
from tests.tiny import VOCABULARY, WIDTH, tiny, tiny_tokenizer

#: Modules before the blocks that have dropout.
BEFORE = {
    "bert": ("bert.embeddings",),
    "roberta": ("roberta.embeddings",),
    "distilbert": ("distilbert.embeddings",),
    "gpt2": ("transformer.drop",),
    "llama": (),
}
DROPOUT = {
    "bert": {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3},
    "roberta": {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3},
    "distilbert": {"dropout": 0.3, "attention_dropout": 0.3},
    "gpt2": {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3},
    "llama": {"attention_dropout": 0.3},
}
NO_DROPOUT = {name: dict.fromkeys(settings, 0.0) for name, settings in DROPOUT.items()}
COLLATOR = Collator(tiny_tokenizer())


def texts(n: int = 24, *, seed: int = 0, last: int | None = None) -> EncodedTexts:
    generator = np.random.default_rng(seed)
    items = []
    for length in generator.integers(3, 20, n):
        ids = generator.integers(5, VOCABULARY, length).tolist()
        items.append({"input_ids": [*ids[:-1], ids[-1] if last is None else last], "attention_mask": [1] * int(length)})
    return EncodedTexts(tuple(items), generator.integers(0, 2, n), 0)


def stratified(
    name: str, first: int | dict[str, int] = 2, *, method: str = "lora", pooler: str = "freeze", **changes: Any
) -> StratifiedModel:
    """A tiny classifier whose blocks below ``first`` are frozen."""
    settings = {**NO_DROPOUT.get(name, {}), "pad_token_id": 0, **changes}
    model = tiny(name, auto="AutoModelForSequenceClassification", **settings)
    strata, blocks = [], {}
    for stack in find_stacks(model):
        blocks[stack.name] = count = stack.num_blocks
        k = first if isinstance(first, int) else first[stack.name]
        strata += [Stratum(stack.name, (0, k), "freeze")] if k else []
        strata += [Stratum(stack.name, (k, count), method)] if k < count else []
    with torch_seed(0, "adapter"):
        wrapped = apply_strata(model, StrataConfig("tiny", blocks, tuple(strata), Outside(pooler=pooler)))
    with torch.no_grad():  # PEFT starts one factor at zero; gradients of the other would all be zero
        generator = torch.Generator().manual_seed(3)
        for name_, parameter in canonical_parameters(wrapped.model).items():
            if ".lora_B." in name_:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return wrapped


def build(model: StratifiedModel, data: EncodedTexts, folder: Path, **options: Any) -> PrefixCache:
    return PrefixCache.build(model, data, COLLATOR, folder, device="cpu", **{"batch_tokens": 64, **options})


def batch_of(data: EncodedTexts, items: Sequence[int], *, extra: int = 0) -> dict[str, torch.Tensor]:
    """A batch, with ``extra`` more columns of padding."""
    batch = COLLATOR([data[int(i)] for i in items])
    for key in ("input_ids", "attention_mask"):
        batch[key] = nn.functional.pad(batch[key], (0, extra))
    return batch


def run(model: StratifiedModel, batch: dict[str, torch.Tensor], cache: PrefixCache | None) -> Any:
    inputs = dict(batch)
    index = inputs.pop("index")
    with cache.attached(index, inputs["attention_mask"]) if cache is not None else nullcontext():
        return model.model(**inputs)


def train_mode(model: StratifiedModel, name: str, first: int) -> None:
    base = model.model.get_base_model()
    model.model.train()
    for path in (*BEFORE[name], *model.plan.stacks[0].block_paths[:first]):
        base.get_submodule(path).eval()


def train(
    name: str,
    batches: Sequence[dict[str, torch.Tensor]],
    folder: Path | None,
    *,
    accumulate: int = 1,
    dtype: torch.dtype = torch.float64,
    **changes: Any,
) -> tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Losses, gradients of the first optimiser step, and weights after the last, with a cache if there is a folder.

    In float64, since AdamW's division blows rounding up wherever a gradient is about zero.
    """
    model = stratified(name, **changes)
    model.model.to(dtype)
    cache = build(model, texts(), folder) if folder is not None else None
    train_mode(model, name, 2)
    torch.manual_seed(0)  # dropout of the trained blocks
    trained = {n: p for n, p in canonical_parameters(model.model).items() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
    losses, gradients = [], {}
    for step, batch in enumerate(batches):
        loss = run(model, batch, cache).loss
        (loss / accumulate).backward()
        losses.append(float(loss.detach()))
        if (step + 1) % accumulate == 0:
            gradients = gradients or {n: p.grad.clone() for n, p in trained.items()}
            optimizer.step()
            optimizer.zero_grad()
    return losses, gradients, {n: p.detach().clone() for n, p in trained.items()}


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-6) -> bool:
    return bool((got - expected).detach().abs().max() <= tolerance * max(1.0, float(expected.detach().abs().max())))


def shuffled_batches(count: int, size: int = 4) -> list[dict[str, torch.Tensor]]:
    data, generator = texts(), np.random.default_rng(5)
    return [batch_of(data, generator.permutation(len(data))[:size], extra=i % 3) for i in range(count)]


@pytest.mark.parametrize("dropout", [False, True], ids=["no-dropout", "dropout-above"])
@pytest.mark.parametrize("name", list(BEFORE))
def test_losses_gradients_and_weights_after_five_steps_are_those_without_the_cache(
    name: str, dropout: bool, tmp_path: Path
) -> None:
    changes = DROPOUT[name] if dropout else {}
    batches = shuffled_batches(10)
    with_cache = train(name, batches, tmp_path, accumulate=2, **changes)
    without = train(name, batches, None, accumulate=2, **changes)
    np.testing.assert_allclose(with_cache[0], without[0], rtol=1e-9)
    assert set(with_cache[1]) == set(without[1])
    assert any("lora_A" in n for n in without[1])
    for n, expected in without[1].items():
        assert float(expected.abs().max()) > 0, n
        assert close(with_cache[1][n], expected), n
    for n, expected in without[2].items():
        assert close(with_cache[2][n], expected), n
    if dropout:  # the control: dropout is really on above the prefix
        assert not np.allclose(without[0], train(name, batches, None, accumulate=2)[0])


def test_fully_trained_blocks_and_norms_also_get_the_same_gradients(tmp_path: Path) -> None:
    for method in ("full", "norm", "bitfit"):
        batches = shuffled_batches(2)
        got = train("bert", batches, tmp_path / method, method=method, dtype=torch.float32)
        expected = train("bert", batches, None, method=method, dtype=torch.float32)
        assert all(close(got[1][n], g) for n, g in expected[1].items())


def test_frozen_blocks_do_not_run_while_attached_and_run_again_afterwards(tmp_path: Path) -> None:
    model, data = stratified("bert"), texts()
    cache = build(model, data, tmp_path)
    base, calls = model.model.get_base_model(), []
    for block in range(3):
        query = base.get_submodule(f"bert.encoder.layer.{block}.attention.self.query")
        query.register_forward_hook(lambda *_, b=block: calls.append(b))
    batch = batch_of(data, [4, 2, 9])
    run(model, batch, cache)
    assert calls == [2]
    run(model, batch, None)
    assert calls == [2, 0, 1, 2]
    with pytest.raises(RuntimeError), cache.attached(batch["index"], batch["attention_mask"]):
        raise RuntimeError
    assert not any("forward" in m.__dict__ for m in base.modules())


def test_only_the_prefix_runs_while_building_and_modes_are_restored(tmp_path: Path) -> None:
    model, data = stratified("bert"), texts()
    model.model.train()
    base, calls = model.model.get_base_model(), {0: 0, 2: 0}
    base.bert.embeddings.eval()
    before = {n: m.training for n, m in base.named_modules()}
    for block in calls:
        query = base.get_submodule(f"bert.encoder.layer.{block}.attention.self.query")
        query.register_forward_hook(lambda *_, b=block: calls.update({b: calls[b] + 1}))
    seen: list[float] = []
    cache = build(model, data, tmp_path, progress=seen.append)
    assert sum(seen) == len(data)
    assert calls[0] >= len(seen)
    assert calls[2] == 4  # two comparisons, with and without the states
    assert {n: m.training for n, m in base.named_modules()} == before
    assert cache.bytes == cache.path.stat().st_size == prefix_bytes(model, data) == data.lengths.sum() * WIDTH * 4


def test_other_items_of_the_same_lengths_give_other_logits(tmp_path: Path) -> None:
    model = stratified("bert")
    item = texts().items[0]
    ids = [[5 + (7 * i + j) % 100 for j in range(6)] for i in range(8)]
    data = EncodedTexts(tuple({**item, "input_ids": i, "attention_mask": [1] * 6} for i in ids), None, 0)
    cache = build(model, data, tmp_path)
    model.model.eval()
    batch = batch_of(data, [0, 1, 2])
    right, own = run(model, batch, cache).logits, run(model, batch, None).logits
    wrong = run(model, {**batch, "index": batch["index"] + 3}, cache).logits
    assert close(right, own, 1e-5)
    assert not close(wrong, own, 1e-3)


@pytest.mark.parametrize("name", ["albert", "deberta-v2", "mpnet", "modernbert", "gpt-neox", "mixtral", "electra"])
def test_logits_agree_for_architectures_of_other_shapes(name: str, tmp_path: Path) -> None:
    model, data = stratified(name, 3 if name == "albert" else 2), texts()
    cache = build(model, data, tmp_path)
    model.model.eval()
    batch = batch_of(data, [3, 11, 7, 20], extra=2)
    assert close(run(model, batch, cache).logits, run(model, batch, None).logits, 1e-5)


def test_an_encoder_decoder_caches_each_stack_that_stays_the_same(tmp_path: Path) -> None:
    data = texts(last=3)
    cases = [
        ("bart", {"encoder": 2, "decoder": 1}, {"encoder": 2, "decoder": 1}),
        ("bart", {"encoder": 1, "decoder": 2}, {"encoder": 1}),
        ("bart", {"encoder": 0, "decoder": 1}, {}),
        ("t5", {"encoder": 2, "decoder": 3}, {"encoder": 2, "decoder": 3}),
        ("t5", {"encoder": 2, "decoder": 1}, {"encoder": 2}),
    ]
    for i, (name, first, expected) in enumerate(cases):
        model = stratified(name, first)
        if not expected:
            with pytest.raises(PrefixError, match="decoder: block 0, or what comes before it, trains"):
                build(model, data, tmp_path / str(i))
            continue
        cache = build(model, data, tmp_path / str(i))
        assert {s.name: s.blocks for s in cache.stacks} == expected
        assert len(cache.notes) == 2 - len(expected)
        model.model.eval()
        batch = batch_of(data, [3, 11, 7, 20])
        assert close(run(model, batch, cache).logits, run(model, batch, None).logits, 1e-5)


def test_a_position_bias_handed_from_block_to_block_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(PrefixError, match="hands more than hidden states from block to block, such as T5's position"):
        build(stratified("t5", {"encoder": 1, "decoder": 0}), texts(last=3), tmp_path)
    assert not list(tmp_path.iterdir())


def test_left_padding_other_items_and_split_batches_are_refused(tmp_path: Path) -> None:
    model, data = stratified("gpt2"), texts()
    cache = build(model, data, tmp_path)
    batch = batch_of(data, [1, 2, 3])
    with (
        pytest.raises(PrefixError, match="padded on the right"),
        cache.attached(batch["index"], batch["attention_mask"].flip(1)),
    ):
        pass
    for index in (batch["index"] + 5, batch["index"] + len(data), batch["index"][:2]):
        with pytest.raises(PrefixError, match="items"), cache.attached(index, batch["attention_mask"]):
            pass
    with (
        pytest.raises(PrefixError, match="one process per device"),
        cache.attached(batch["index"], batch["attention_mask"]),
    ):
        model.model(input_ids=batch["input_ids"][:1], attention_mask=batch["attention_mask"][:1])
    with pytest.raises(PrefixError, match="other items"), cache.attached(batch["index"], None):
        pass
    same = [i for i, n in enumerate(data.lengths) if n == data.lengths[0]]
    alone = batch_of(data, same)
    with cache.attached(alone["index"], None):
        logits = model.model(input_ids=alone["input_ids"]).logits
    assert close(logits, model.model.eval()(input_ids=alone["input_ids"]).logits, 1e-5)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """Files of states that are really written."""
    files: list[Path] = []
    write: Callable[..., None] = io.atomic_write

    def record(path: Path, *args: Any) -> None:
        if path.suffix == ".bin":
            files.append(path)
        write(path, *args)

    monkeypatch.setattr(io, "atomic_write", record)
    return files


def test_the_cache_is_reused_for_the_same_key_and_rebuilt_when_anything_is_off(
    tmp_path: Path, written: list[Path]
) -> None:
    model, data = stratified("bert"), texts()
    cache = build(model, data, tmp_path)
    with torch.no_grad():  # training has moved what trains: nothing of the key
        for parameter in model.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    again = build(model, data, tmp_path, batch_tokens=200)
    assert len(written) == 1
    assert (cache.reused, again.reused) == (False, True)
    good = cache.path.read_bytes()
    damages: list[Callable[[], object]] = [
        lambda: cache.path.write_bytes(good[:-4]),
        lambda: cache.path.write_bytes(good[:-1] + bytes([good[-1] ^ 1])),
        lambda: cache.path.unlink(),
        lambda: (tmp_path / "prefix.json").write_text("{"),
        lambda: (tmp_path / "prefix.json").unlink(),
    ]
    for i, damage in enumerate(damages):
        damage()
        assert not build(model, data, tmp_path).reused
        assert len(written) == i + 2
        assert cache.path.read_bytes() == good
    others = texts(seed=1)
    assert not build(model, others, tmp_path).reused
    assert not build(stratified("bert", first=1), others, tmp_path).reused
    changed = stratified("bert", first=1)
    with torch.no_grad():
        changed.model.get_base_model().bert.embeddings.word_embeddings.weight[7] += 1
    assert not build(changed, others, tmp_path).reused


def test_a_file_cut_behind_our_back_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    model, data = stratified("bert"), texts()
    cache = build(model, data, tmp_path)
    cache.close()
    cache.path.write_bytes(cache.path.read_bytes()[:100])
    batch = batch_of(data, [0, 1])
    with (
        pytest.raises(PrefixError, match="Start again: it is then rebuilt"),
        cache.attached(batch["index"], batch["attention_mask"]),
    ):
        pass


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = stratified("bert"), texts()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OutputError, match="Cannot write"):
            build(model, data, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(prefix.shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(OutputError, match=r"has 0\.00 GB free"):
        build(model, data, tmp_path / "new")


def test_states_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model, data = stratified("bert"), texts()
    token = data.items[int(np.argsort(-data.lengths, kind="stable")[10])]["input_ids"][0]
    ends = np.argsort(-data.lengths, kind="stable")[[0, 1, 2, -3, -2, -1]]
    assert all(token not in data.items[i]["input_ids"] for i in ends), "the compared batch must be finite"
    with torch.no_grad():
        model.model.get_base_model().bert.embeddings.word_embeddings.weight[token] = torch.nan
    with pytest.raises(NumericalError, match="not finite"):
        build(model, data, tmp_path)


def test_indices_travel_through_loader_workers(tmp_path: Path) -> None:
    model, data = stratified("bert"), texts()
    cache = build(model, data, tmp_path)
    model.model.eval()
    generator = torch.Generator().manual_seed(0)
    loader = torch.utils.data.DataLoader(
        data, batch_size=5, shuffle=True, num_workers=2, collate_fn=COLLATOR, generator=generator
    )
    seen = []
    for batch in loader:
        seen += batch["index"].tolist()
        assert close(run(model, batch, cache).logits, run(model, batch, None).logits, 1e-5)
    assert sorted(seen) == list(range(len(data)))


def test_states_are_kept_in_the_model_s_own_precision(tmp_path: Path) -> None:
    model, data = stratified("bert"), texts()
    single = build(model, data, tmp_path / "32").bytes
    model.model.to(torch.bfloat16)
    cache = build(model, data, tmp_path / "16")
    assert cache.bytes == single // 2 == prefix_bytes(model, data)
    assert cache.stacks[0].dtype == "bfloat16"
    batch = batch_of(data, range(8))
    model.model.eval()
    assert close(run(model, batch, cache).logits, run(model, batch, None).logits, 0.05)


def test_under_autocast_the_cache_gives_what_autocast_gives(tmp_path: Path) -> None:
    model, data = stratified("bert"), texts()
    single = build(model, data, tmp_path)
    batch = batch_of(data, range(8))
    model.model.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = build(model, data, tmp_path)
        expected = run(model, batch, None).logits.float()
        assert not mixed.reused
        assert mixed.stacks == single.stacks  # a post-norm block ends in float32
        assert close(run(model, batch, mixed).logits.float(), expected, 0.02)


def test_checkpointing_of_the_trained_blocks_works_above_the_cache(tmp_path: Path) -> None:
    from spafit.activations import checkpoint_trained_blocks

    data, gradients = texts(), []
    for folder in (tmp_path, None):
        model = stratified("bert")
        cache = build(model, data, folder) if folder is not None else None
        assert checkpoint_trained_blocks(model) == 1
        train_mode(model, "bert", 2)
        run(model, batch_of(data, range(6)), cache).loss.backward()
        gradients.append({n: p.grad for n, p in model.model.named_parameters() if p.requires_grad})
    assert all(close(gradients[0][n], g) for n, g in gradients[1].items())


def test_gradients_are_the_same_under_distributed_data_parallel(tmp_path: Path) -> None:
    from torch import distributed

    model, data = stratified("bert"), texts()
    cache = build(model, data, tmp_path / "cache")
    train_mode(model, "bert", 2)
    batch = batch_of(data, range(6))
    run(model, batch, None).loss.backward()
    trained = {n: p for n, p in model.model.named_parameters() if p.requires_grad}
    expected = {n: p.grad.clone() for n, p in trained.items()}
    model.model.zero_grad()
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model.model)
        index = batch.pop("index")
        with cache.attached(index, batch["attention_mask"]):
            parallel(**batch).loss.backward()
    finally:
        distributed.destroy_process_group()
    assert all(close(p.grad, expected[n]) for n, p in trained.items())


def test_the_automatic_decision_follows_the_arithmetic() -> None:
    model, data = stratified("bert", hidden_size=64, intermediate_size=128), texts()
    size, tokens = prefix_bytes(model, data), data.lengths.sum()
    assert size == tokens * 64 * 4
    forward = tokens * 2 * (4 * 64**2 + 2 * 64 * 128) / prefix.PRODUCTS_PER_SECOND["cpu"]
    transfer = size / prefix.DISK_BYTES_PER_SECOND
    even = float((forward + transfer) / (forward - transfer))
    assert 1 < even < 3
    pays, why = prefix_pays(model, data, epochs=1.001 * even, free_bytes=1e9)
    assert pays
    assert "2 of 3 encoder blocks" in why
    assert not prefix_pays(model, data, epochs=0.999 * even, free_bytes=1e9)[0]
    assert not prefix_pays(model, data, epochs=1, free_bytes=1e9)[0]
    assert prefix_pays(model, data, epochs=3, free_bytes=size / 0.899)[0]
    pays, why = prefix_pays(model, data, epochs=3, free_bytes=size / 0.901)
    assert not pays
    assert "the disk has" in why
    # So narrow a model computes faster on a GPU than its states can be read.
    assert not prefix_pays(model, data, epochs=100, free_bytes=1e9, device="cuda:0")[0]


def test_a_plan_without_a_frozen_prefix_is_told_apart() -> None:
    model, data = stratified("bert", first=0), texts()
    why = "encoder: block 0, or what comes before it, trains"
    assert prefix_pays(model, data, epochs=3, free_bytes=1e9) == (False, why)
    assert prefix_bytes(model, data) == 0
    with pytest.raises(PrefixError, match=why):
        build(model, data, Path("never"))
    none = replace(data, items=(), labels=None)
    assert prefix_pays(stratified("bert"), none, epochs=3, free_bytes=1e9) == (False, "there are no training items")
    with pytest.raises(PrefixError, match="there are no training items"):
        build(stratified("bert"), none, Path("never"))
