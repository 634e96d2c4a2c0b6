"""Loading gives the weights that were saved, refuses what is not whole or not trusted, and touches nothing global."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from spafit import models
from spafit.digests import model_digest, tokenizer_digest
from spafit.errors import HubError, ModelError
from spafit.models import default_model_path, load_model, randomize_weights
from tests.paths import MODELS, needs_smollm2
from tests.tiny import (
    BLOCKS,
    DECODERS,
    HEADS,
    INNER,
    POSITIONS,
    VOCABULARY,
    WIDTH,
    save_tiny,
    tiny,
    tiny_inputs,
    tiny_tokenizer,
)

needs_default = pytest.mark.skipif(default_model_path() is None, reason="the demo extra is not installed")


def states(model: nn.Module, name: str = "bert") -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_inputs(name)).last_hidden_state


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small-bert"
    save_tiny("bert", folder)
    return folder


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize(
    ("name", "window"),
    [
        ("bert", 64),
        ("roberta", 64),
        ("mpnet", 64),
        ("gpt2", 64),
        ("llama", 64),
        ("t5", 64),
        ("clip", 64),
        ("vit", None),
    ],
)
def test_folder_gives_the_model_that_was_saved_in_eval_mode_without_gradients(tmp_path, name, window):
    saved = save_tiny(name, tmp_path / name, tokenizer=name != "vit")
    loaded = load_model(str(tmp_path / name))
    for key, tensor in saved.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[key], tensor), key
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert (loaded.name, loaded.reference, loaded.revision) == (name, str(tmp_path / name), None)
    assert loaded.max_length == window
    assert (loaded.tokenizer is None) == (name == "vit")
    assert (loaded.image_processor is None) == (name not in ("clip", "vit"))
    assert [n.partition(":")[0] for n in loaded.notes] == ["no preprocessor_config.json"] * (name in ("clip", "vit"))


def test_window_of_roberta_leaves_out_its_position_offset(tmp_path):
    """66 position embeddings of which 0 and 1 stand for padding: 64 tokens run, 65 do not."""
    save_tiny("roberta", tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = int(1e30)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.model.config.max_position_embeddings == POSITIONS + 2
    assert loaded.max_length == POSITIONS
    loaded.model(torch.full((1, POSITIONS), 5))
    with pytest.raises((IndexError, RuntimeError)):
        loaded.model(torch.full((1, POSITIONS + 1), 5))


def test_precision_is_as_told(bert_folder):
    half = load_model(bert_folder, dtype="bfloat16")
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    assert half.weights_digest != load_model(bert_folder).weights_digest


@pytest.mark.parametrize("auto", ["AutoModelForMaskedLM", "AutoModelForSequenceClassification"])
def test_checkpoint_with_a_head_loads_as_its_backbone_and_says_so(tmp_path, auto):
    whole = save_tiny("bert", tmp_path / "headed", auto=auto)
    loaded = load_model(tmp_path / "headed")
    assert type(loaded.model).__name__ == "BertModel"
    torch.testing.assert_close(states(loaded.model), states(whole.base_model), rtol=0, atol=0)
    assert any("of a head were left out" in note for note in loaded.notes)
    if "LM" in auto:  # without a pooler in the checkpoint, one is drawn: always the same
        assert any("no pooler" in note for note in loaded.notes)
        assert load_model(tmp_path / "headed").weights_digest == loaded.weights_digest


def test_causal_language_model_loads_as_its_backbone(tmp_path):
    whole = save_tiny("gpt2", tmp_path, auto="AutoModelForCausalLM")
    loaded = load_model(tmp_path)
    assert type(loaded.model).__name__ == "GPT2Model"
    assert torch.equal(states(loaded.model, "gpt2"), states(whole.transformer, "gpt2"))


def test_half_of_a_two_stack_model_loads_by_itself(tmp_path):
    from transformers import T5EncoderModel

    with torch.random.fork_rng():
        encoder = T5EncoderModel(tiny("t5").config)
    encoder.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    (stack,) = load_model(tmp_path).stacks
    assert stack.name == "encoder"


def test_normal_loads_are_silent_and_leave_logging_as_it_was(bert_folder, tmp_path, capfd):
    save_tiny("bert", tmp_path / "headed", auto="AutoModelForMaskedLM")
    from transformers.utils import logging as hf_logging

    logger = logging.getLogger("transformers")
    before = (logger.level, hf_logging.is_progress_bar_enabled(), list(logger.handlers), list(warnings.filters))
    capfd.readouterr()
    load_model(bert_folder)
    load_model(tmp_path / "headed")
    assert capfd.readouterr() == ("", "")
    assert before == (logger.level, hf_logging.is_progress_bar_enabled(), list(logger.handlers), list(warnings.filters))


def test_loading_leaves_the_global_generator_alone(tmp_path):
    save_tiny("bert", tmp_path, auto="AutoModelForMaskedLM")
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    load_model(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)


# ---------------------------------------------------------------- folders that are not whole or not trusted


def test_folder_without_weights_is_an_error_that_names_the_file(bert_folder, tmp_path):
    copied(bert_folder, tmp_path, without=("model.safetensors",))
    with pytest.raises(ModelError, match=r"has no weights: model\.safetensors is missing"):
        load_model(tmp_path)


def test_folder_without_configuration_is_an_error(tmp_path):
    with pytest.raises(ModelError, match=r"has no config\.json, so it is not a model"):
        load_model(tmp_path)


def test_folder_without_tokenizer_is_an_error_with_a_remedy(tmp_path):
    save_tiny("bert", tmp_path, tokenizer=False)
    with pytest.raises(
        ModelError, match=r"has no tokenizer: neither tokenizer\.json.*give the pair \(model, tokenizer\)"
    ):
        load_model(tmp_path)


def test_partial_checkpoint_says_how_many_tensors_are_missing(bert_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    copied(bert_folder, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {k: v for k, v in tensors.items() if "layer.1.attention" not in k}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    lost = len(tensors) - len(kept)
    with pytest.raises(ModelError, match=rf"lacks {lost} of {len(tensors)} tensors of BertModel \(encoder\.layer\.1"):
        load_model(tmp_path)


def test_missing_shard_is_named(bert_folder, tmp_path):
    tiny("bert").save_pretrained(tmp_path, max_shard_size="10KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    assert load_model(tmp_path).weights_digest == load_model(bert_folder).weights_digest
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    shards[1].unlink()
    with pytest.raises(ModelError, match=rf"lacks 1 of its {len(shards)} weight files \({shards[1].name}\)"):
        load_model(tmp_path)


def test_configuration_with_fewer_blocks_than_the_checkpoint_is_an_error(bert_folder, tmp_path):
    copied(bert_folder, tmp_path, num_hidden_layers=2)
    with pytest.raises(ModelError, match=r"holds 3 blocks, but its config\.json says 2"):
        load_model(tmp_path)


def test_truncated_weights_and_other_sizes_are_errors(bert_folder, tmp_path):
    copied(bert_folder, tmp_path / "cut")
    data = (tmp_path / "cut" / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(tmp_path / "cut")
    copied(bert_folder, tmp_path / "wide", hidden_size=32)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(tmp_path / "wide")
    copied(bert_folder, tmp_path / "odd", model_type="nobody-knows-it")
    with pytest.raises(ModelError, match=r"cannot be loaded.*nobody-knows-it"):
        load_model(tmp_path / "odd")
    copied(bert_folder, tmp_path / "torn")
    (tmp_path / "torn" / "config.json").write_text('{"model_type": ')
    with pytest.raises(ModelError, match=r"config\.json is not valid JSON"):
        load_model(tmp_path / "torn")


def test_pickle_weights_are_refused_then_read_when_allowed(bert_folder, tmp_path):
    copied(bert_folder, tmp_path, without=("model.safetensors",))
    torch.save(tiny("bert").state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickle weights only \(pytorch_model\.bin\).*code.*--allow-pickle"):
        load_model(tmp_path)
    allowed = load_model(tmp_path, allow_pickle=True)
    assert allowed.weights_digest == load_model(bert_folder).weights_digest


class Mischief:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_pickle_that_would_run_code_is_refused_even_when_pickles_are_allowed(bert_folder, tmp_path):
    copied(bert_folder, tmp_path / "m", without=("model.safetensors",))
    state = tiny("bert").state_dict()
    torch.save({**state, "pooler.dense.bias": Mischief(tmp_path / "ran")}, tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"more than tensors.*use safetensors"):
        load_model(tmp_path / "m", allow_pickle=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_remote_code_is_refused_wherever_it_is_named(bert_folder, tmp_path, file):
    copied(bert_folder, tmp_path)
    settings = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps({**settings, "auto_map": {"AutoModel": "mine.Model"}}))
    with pytest.raises(ModelError, match=r"Python code of its own \(auto_map: AutoModel\).*never run"):
        load_model(tmp_path)


def test_unknown_path_suggests_a_sibling_folder(bert_folder):
    with pytest.raises(ModelError, match=r"no model at '.*smal-bert'\. Did you mean '.*small-bert'\?"):
        load_model(str(bert_folder.parent / "smal-bert"))
    with pytest.raises(ModelError, match=r"no model at '\./nothing/here/at/all'\. Give a folder"):
        load_model("./nothing/here/at/all")


def test_hub_name_close_to_a_local_folder_suggests_it(bert_folder, monkeypatch):
    monkeypatch.chdir(bert_folder.parent)
    with pytest.raises(HubError, match=r"is not in the cache.*Did you mean 'small-bert'"):
        load_model("smalll-bert", offline=True)


def test_revision_of_a_local_folder_is_an_error(bert_folder):
    with pytest.raises(ModelError, match=r"has no revision 'v2'"):
        load_model(bert_folder, revision="v2")


def copied(source: Path, target: Path, without: tuple[str, ...] = (), **settings: Any) -> None:
    target.mkdir(exist_ok=True)
    for file in source.iterdir():
        if file.name not in without:
            (target / file.name).write_bytes(file.read_bytes())
    if settings:
        config = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps({**config, **settings}))


# ---------------------------------------------------------------- the built-in default


@needs_default
def test_default_is_minilm_and_says_what_it_is():
    loaded = load_model()
    assert sum(p.numel() for p in loaded.model.parameters()) == 22_713_216
    assert (loaded.name, loaded.reference, loaded.max_length) == ("all-MiniLM-L6-v2", "default", 512)
    (stack,) = loaded.stacks
    assert (stack.num_blocks, stack.width, stack.num_heads) == (6, 384, 12)
    assert any("contrastively" in n and "without a language-model head" in n for n in loaded.notes)
    # Real weights, not fresh ones: sentences of one meaning are nearer than others.
    texts = ["A man is eating food.", "A man eats something.", "The stock market fell sharply."]
    batch = loaded.tokenizer(texts, return_tensors="pt", padding=True)
    mask = batch["attention_mask"].unsqueeze(-1)
    mean = (loaded.model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    near, far = (nn.functional.cosine_similarity(mean[0], mean[i], dim=0) for i in (1, 2))
    assert near > 0.7
    assert far < 0.2


@needs_default
def test_default_path_does_not_import_its_package():
    code = (
        "import sys\nfrom spafit.models import DEFAULT_PACKAGE, default_model_path\n"
        "assert default_model_path().name == 'model'\nassert DEFAULT_PACKAGE not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_default_names_the_extra(monkeypatch):
    monkeypatch.setattr(models, "DEFAULT_PACKAGE", "no_such_package_at_all")
    assert default_model_path() is None
    with pytest.raises(ModelError, match=r'pip install "spafit\[demo\]"'):
        load_model()


# ---------------------------------------------------------------- GGUF


@pytest.mark.slow
@needs_smollm2
def test_gguf_file_and_its_folder_load_as_a_decoder_and_can_be_randomised(capfd):
    loaded = load_model(MODELS / "smollm2")
    (stack,) = loaded.stacks
    assert (stack.name, stack.num_blocks, stack.width, stack.num_heads) == ("decoder", 30, 576, 9)
    assert stack.final_norm == "norm"
    assert not stack.has_biases
    assert loaded.name.startswith("SmolLM2-135M")
    assert any("de-quantised" in n for n in loaded.notes)
    assert loaded.tokenizer.pad_token is not None
    batch = loaded.tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        last = loaded.model(**batch).last_hidden_state[0, -1]
    logits = last @ loaded.model.get_input_embeddings().weight.T
    assert loaded.tokenizer.decode(logits.argmax()).strip() == "Paris"
    assert capfd.readouterr() == ("", "")
    fresh = randomize_weights(loaded, 0)
    assert fresh.weights_digest != loaded.weights_digest
    assert fresh.stacks == loaded.stacks


def test_folder_with_several_gguf_files_asks_for_one(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"several GGUF files \(a\.gguf, b\.gguf\)"):
        load_model(tmp_path)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(tmp_path / "a.gguf")


# ---------------------------------------------------------------- adapters


peft_warns = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own


def adapter(folder: Path, base: nn.Module, base_path: str, **settings: Any) -> nn.Module:
    """Write a LoRA adapter with drawn weights; return the wrapped model that wrote it."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        wrapped = get_peft_model(base, LoraConfig(r=2, lora_alpha=8, target_modules=["query", "value"], **settings))
    draw_weights_of(wrapped, ("lora_", "modules_to_save"))
    save_adapter(wrapped, folder, base_path)
    return wrapped.eval()


def save_adapter(wrapped: Any, folder: Path, base_path: str) -> None:
    wrapped.save_pretrained(folder)
    # Written afterwards: when it saves, peft asks the hub about a base that is not a folder.
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base_path}))


def draw_weights_of(model: nn.Module, parts: tuple[str, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in parts):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@peft_warns
def test_adapter_folder_gives_pefts_own_states_over_the_base_that_it_names(bert_folder, tmp_path):
    base = load_model(bert_folder)
    wrapped = adapter(tmp_path / "lora", tiny("bert"), str(bert_folder))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_model(tmp_path / "lora")
    torch.testing.assert_close(states(loaded.model), states(wrapped), rtol=1e-5, atol=1e-6)
    assert (states(loaded.model) - states(base.model)).abs().max() > 0.01
    assert loaded.stacks == base.stacks
    assert loaded.weights_digest == base.weights_digest
    assert loaded.adapter_digest is not None
    assert base.adapter_digest is None
    assert loaded.name == "lora"
    assert loaded.tokenizer_digest == base.tokenizer_digest
    assert any("LORA adapter merged into its base small-bert" in n for n in loaded.notes)


@peft_warns
def test_adapter_of_a_classifier_gives_the_backbone_whatever_its_number_of_labels(bert_folder, tmp_path):
    from transformers import AutoModelForSequenceClassification

    with torch.random.fork_rng():
        classifier = AutoModelForSequenceClassification.from_pretrained(bert_folder, num_labels=5)
    wrapped = adapter(tmp_path / "cls", classifier, str(bert_folder), task_type="SEQ_CLS")
    loaded = load_model(tmp_path / "cls")
    assert type(loaded.model).__name__ == "BertModel"
    torch.testing.assert_close(states(loaded.model), states(wrapped.get_base_model().bert), rtol=1e-5, atol=1e-6)
    assert loaded.weights_digest == load_model(bert_folder).weights_digest


@peft_warns
def test_adapter_with_biases_loads_them_and_leaves_untouched_blocks_bitwise_equal(bert_folder, tmp_path):
    """Only block 2 has low-rank weights and biases of its own: states up to its input are the base's, bit for bit."""
    wrapped = adapter(
        tmp_path / "late", tiny("bert"), str(bert_folder), layers_to_transform=[2], layers_pattern="layer", bias="all"
    )
    draw_weights_of(wrapped, ("encoder.layer.2.output.dense.bias",))
    save_adapter(wrapped, tmp_path / "late", str(bert_folder))
    loaded, base = load_model(tmp_path / "late"), load_model(bert_folder)
    ours, plain = (m.model(**tiny_inputs("bert"), output_hidden_states=True).hidden_states for m in (loaded, base))
    assert all(torch.equal(a, b) for a, b in zip(ours[:3], plain[:3], strict=True))
    assert (ours[3] - plain[3]).abs().max() > 0.01
    torch.testing.assert_close(ours[3], states(wrapped), rtol=1e-5, atol=1e-6)


@peft_warns
def test_adapters_base_is_found_beside_it_and_a_missing_one_is_named(bert_folder, tmp_path):
    copied(bert_folder, tmp_path / "base")
    adapter(tmp_path / "lora", tiny("bert"), "base")
    assert load_model(tmp_path / "lora").weights_digest == load_model(bert_folder).weights_digest
    adapter(tmp_path / "lost", tiny("bert"), str(tmp_path / "nowhere" / "base"))
    with pytest.raises(ModelError, match=r"The base of the adapter .*lost: There is no model at '.*nowhere/base'"):
        load_model(tmp_path / "lost")
    copied(bert_folder, tmp_path / "narrow")
    tiny("bert", hidden_size=8).save_pretrained(tmp_path / "narrow")
    adapter(tmp_path / "misfit", tiny("bert"), str(tmp_path / "narrow"))
    with pytest.raises(ModelError, match=r"misfit does not fit its base"):
        load_model(tmp_path / "misfit")


@peft_warns
def test_adapter_digest_follows_its_weights_not_its_place(bert_folder, tmp_path):
    adapter(tmp_path / "one", tiny("bert"), str(bert_folder))
    copied(bert_folder, tmp_path / "base")
    adapter(tmp_path / "two", tiny("bert"), "base")
    adapter(tmp_path / "three", tiny("bert"), "base", use_rslora=True)
    digests = [load_model(tmp_path / n).adapter_digest for n in ("one", "two", "three")]
    assert digests[0] == digests[1] != digests[2]


@peft_warns
def test_prompt_adapters_are_refused_because_they_change_no_block(bert_folder, tmp_path):
    from peft import PromptTuningConfig, get_peft_model

    with torch.random.fork_rng():
        config = PromptTuningConfig(num_virtual_tokens=2, task_type="FEATURE_EXTRACTION")
        wrapped = get_peft_model(tiny("bert"), config)
    save_adapter(wrapped, tmp_path, str(bert_folder))
    with pytest.raises(ModelError, match=r"PROMPT_TUNING adapter.*Probe the base"):
        load_model(tmp_path)
    with pytest.raises(ModelError, match="prompt-based adapter"):
        load_model((wrapped, tiny_tokenizer()))


# ---------------------------------------------------------------- models in memory


def test_model_in_memory_equals_its_folder_and_keeps_its_own_modes(bert_folder):
    model = tiny("bert").train().requires_grad_(True)
    loaded = load_model((model, tiny_tokenizer()))
    folder = load_model(bert_folder)
    assert loaded.weights_digest == folder.weights_digest
    assert loaded.tokenizer_digest == folder.tokenizer_digest
    assert loaded.stacks == folder.stacks
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    theirs, ours = (m.encoder.layer[0].output.dense.weight for m in (model, loaded.model))
    assert theirs.data_ptr() == ours.data_ptr()


@pytest.mark.parametrize("name", ["gpt2", "t5", "clip", "albert"])
def test_digest_is_the_same_in_memory_and_after_saving(tmp_path, name):
    saved = save_tiny(name, tmp_path)
    loaded = load_model(tmp_path)
    assert load_model((saved, loaded.tokenizer)).weights_digest == loaded.weights_digest == model_digest(saved)


def test_digest_changes_with_a_weight_and_with_what_the_configuration_computes():
    model = tiny("bert")
    digests = {model_digest(model)}
    with torch.no_grad():
        model.encoder.layer[0].output.dense.bias[3] += 1e-6
    digests.add(model_digest(model))
    digests.add(model_digest(tiny("bert", num_attention_heads=4)))
    digests.add(model_digest(tiny("bert", hidden_act="relu")))
    assert len(digests) == 4


def test_head_in_memory_is_left_out():
    whole = tiny("bert", auto="AutoModelForMaskedLM")
    loaded = load_model((whole, tiny_tokenizer()))
    assert type(loaded.model).__name__ == "BertModel"
    assert torch.equal(states(loaded.model), states(whole.bert))


@peft_warns
def test_adapter_in_memory_is_read_with_its_effect(bert_folder, tmp_path):
    wrapped = adapter(tmp_path / "lora", tiny("bert"), str(bert_folder))
    loaded = load_model((wrapped, tiny_tokenizer()))
    assert torch.equal(states(loaded.model), states(wrapped))
    assert loaded.stacks[0].block_paths == load_model(bert_folder).stacks[0].block_paths


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.linspace(-1, 1, 6))
        self.tower = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tower(x + self.start)


def test_plain_module_loads_with_its_stack_named_and_not_without():
    loaded = load_model(Plain(), stack="tower")
    assert loaded.stacks[0].block_paths == ("tower.0", "tower.1", "tower.2", "tower.3")
    assert (loaded.tokenizer, loaded.tokenizer_digest, loaded.max_length) == (None, "", None)
    with pytest.raises(ModelError, match="No stack of blocks in Plain"):
        load_model(Plain())


def test_wrong_pairs_are_errors():
    with pytest.raises(ModelError, match="pair"):
        load_model(("bert", None))
    with pytest.raises(ModelError, match="is not a tokenizer"):
        load_model((tiny("bert"), 3))


def test_tokenizer_digest_ignores_the_last_calls_padding_and_follows_the_vocabulary():
    tokenizer = tiny_tokenizer()
    before = tokenizer_digest(tokenizer)
    tokenizer(["a cat", "the big dog runs"], padding=True, truncation=True, max_length=5)
    assert tokenizer_digest(tokenizer) == before
    tokenizer.add_tokens(["wug"])
    assert tokenizer_digest(tokenizer) != before
    assert tokenizer_digest(tiny_tokenizer(decoder=True)) != before


# ---------------------------------------------------------------- random weights


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "albert", "vit"])
def test_random_weights_follow_the_seed_alone_and_share_nothing(name):
    loaded = load_model((tiny(name), None))
    original = model_digest(loaded.model)
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    first, again, other = (randomize_weights(loaded, s) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.weights_digest == again.weights_digest
    assert len({first.weights_digest, other.weights_digest, loaded.weights_digest}) == 3
    assert first.stacks == loaded.stacks
    assert first.name == f"{loaded.name}-random-1"
    assert not first.model.training
    assert not any(p.requires_grad for p in first.model.parameters())
    ours = {p.data_ptr() for p in first.model.parameters()}
    assert not ours & {p.data_ptr() for p in (*loaded.model.parameters(), *again.model.parameters())}
    assert model_digest(loaded.model) == original


def test_random_weights_are_drawn_by_the_models_own_scheme():
    """BERT: normal with sd ``initializer_range``, norms 1 and 0, biases 0; the trained ones (fixture) are otherwise."""
    loaded = load_model((tiny("bert", initializer_range=0.05), None))
    block = randomize_weights(loaded, 0).model.encoder.layer[1]
    assert block.output.dense.weight.std().item() == pytest.approx(0.05, rel=0.15)
    assert torch.equal(block.output.LayerNorm.weight, torch.ones(WIDTH))
    assert torch.count_nonzero(block.output.dense.bias) == 0
    assert torch.count_nonzero(loaded.model.encoder.layer[1].output.dense.bias) == WIDTH


@peft_warns
def test_random_weights_of_an_adapted_model_have_no_adapter_left(bert_folder, tmp_path):
    adapter(tmp_path / "lora", tiny("bert"), str(bert_folder))
    fresh = randomize_weights(load_model(tmp_path / "lora"), 4)
    plain = randomize_weights(load_model(bert_folder), 4)
    assert fresh.adapter_digest is None
    assert fresh.weights_digest == plain.weights_digest


def test_random_weights_of_a_plain_module_are_reset_and_bare_parameters_noted():
    loaded = load_model(Plain(), stack="tower")
    fresh = randomize_weights(loaded, 0)
    assert not torch.equal(fresh.model.tower[0][0].weight, loaded.model.tower[0][0].weight)
    assert not torch.equal(fresh.model.start, loaded.model.start)
    assert any("drawn as normal (start" in n for n in fresh.notes)
    assert fresh.weights_digest == randomize_weights(loaded, 0).weights_digest


def test_sizes_of_the_fixtures_are_those_used_here():
    config = tiny("bert").config
    sizes = (config.num_hidden_layers, config.num_attention_heads, config.intermediate_size, config.vocab_size)
    assert sizes == (BLOCKS, HEADS, INNER, VOCABULARY)
    assert "gpt2" in DECODERS
