"""Really tiny models of many architectures, built from configurations without any download, for the other tests.

``tiny(name)`` gives the backbone with deterministic random weights; every parameter is drawn (norm weights and biases
included), so that a test notices when one is left out. ``tiny_inputs`` fits it, ``tiny_tokenizer`` too, and
``save_tiny`` writes a folder as the hub would serve it. Exact parameter counts stand in ``PARAMETERS``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

VOCABULARY = 128
WIDTH, BLOCKS, HEADS, INNER, POSITIONS = 16, 3, 2, 32, 64

PARAMETERS = {
    "bert": 10080,
    "roberta": 10112,
    "distilbert": 9776,
    "electra": 8384,
    "albert": 4208,
    "albert-groups": 6432,
    "deberta-v2": 10064,
    "mpnet": 10144,
    "modernbert": 9840,
    "gpt2": 12944,
    "gpt-neox": 8752,
    "opt": 9808,
    "llama": 9072,
    "qwen2": 9168,
    "gemma2": 9168,
    "olmo2": 9144,
    "mixtral": 13776,
    "t5": 15728,
    "bart": 18704,
    "mbart": 18768,
    "vit": 7344,
    "dinov2": 7184,
    "clip": 17121,
    "swin": 9022,
    "convnext": 8536,
}

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "max_position_embeddings": POSITIONS,
}
_IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
_VISION = {
    "hidden_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
}
_SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": BLOCKS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER,
    "max_position_embeddings": POSITIONS,
    **_IDS,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_ROTARY = {**_COMMON, **_IDS, "num_key_value_heads": 1}

# name: (model type, settings). The model type picks transformers' own configuration and backbone class.
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {**_COMMON}),
    "roberta": ("roberta", {**_COMMON, "pad_token_id": 1, "max_position_embeddings": POSITIONS + 2}),
    "distilbert": (
        "distilbert",
        {
            "vocab_size": VOCABULARY,
            "dim": WIDTH,
            "n_layers": BLOCKS,
            "n_heads": HEADS,
            "hidden_dim": INNER,
            "max_position_embeddings": POSITIONS,
        },
    ),
    "electra": ("electra", {**_COMMON, "embedding_size": 8}),
    "albert": ("albert", {**_COMMON, "embedding_size": 8, **_IDS}),
    "albert-groups": ("albert", {**_COMMON, "num_hidden_layers": 4, "num_hidden_groups": 2, "embedding_size": 8}),
    "deberta-v2": (
        "deberta-v2",
        {
            **_COMMON,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "position_buckets": 8,
        },
    ),
    "mpnet": ("mpnet", {**_COMMON, "pad_token_id": 1, "max_position_embeddings": POSITIONS + 2}),
    "modernbert": ("modernbert", {**_COMMON, **_IDS, "cls_token_id": 2, "sep_token_id": 3}),
    "gpt2": (
        "gpt2",
        {
            "vocab_size": VOCABULARY,
            "n_embd": WIDTH,
            "n_layer": BLOCKS,
            "n_head": HEADS,
            "n_positions": POSITIONS,
            "bos_token_id": 2,
            "eos_token_id": 3,
        },
    ),
    "gpt-neox": ("gpt_neox", {**_COMMON, **_IDS}),
    "opt": (
        "opt",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "word_embed_proj_dim": WIDTH,
            "num_hidden_layers": BLOCKS,
            "num_attention_heads": HEADS,
            "ffn_dim": INNER,
            "max_position_embeddings": POSITIONS,
            **_IDS,
        },
    ),
    "llama": ("llama", _ROTARY),
    "qwen2": ("qwen2", _ROTARY),
    "gemma2": ("gemma2", {**_ROTARY, "head_dim": 8}),
    "olmo2": ("olmo2", _ROTARY),
    "mixtral": ("mixtral", {**_ROTARY, "num_local_experts": 2}),
    "t5": (
        "t5",
        {
            "vocab_size": VOCABULARY,
            "d_model": WIDTH,
            "d_kv": 8,
            "d_ff": INNER,
            "num_layers": 2,
            "num_decoder_layers": BLOCKS,
        }
        | {"num_heads": HEADS, "pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0},
    ),
    "bart": ("bart", _SEQ2SEQ),
    "mbart": ("mbart", _SEQ2SEQ),
    "vit": ("vit", _VISION),
    "dinov2": ("dinov2", {**_VISION, "mlp_ratio": 2}),
    "clip": ("clip", {"text_config": {**_COMMON, **_IDS}, "vision_config": _VISION, "projection_dim": 8}),
    "swin": (
        "swin",
        {"image_size": 16, "patch_size": 2, "num_channels": 1, "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2]}
        | {"window_size": 2},
    ),
    "convnext": (
        "convnext",
        {
            "image_size": 16,
            "patch_size": 2,
            "num_channels": 1,
            "hidden_sizes": [8, 16],
            "depths": [2, 2],
            "num_stages": 2,
        },
    ),
}

NAMES = tuple(_CONFIGS)
VISION = ("vit", "dinov2", "swin", "convnext")
SEQ2SEQ = ("t5", "bart", "mbart")
DECODERS = ("gpt2", "gpt-neox", "opt", "llama", "qwen2", "gemma2", "olmo2", "mixtral")


def tiny_config(name: str, **changes: Any) -> Any:
    """The configuration of one tiny model; ``changes`` replace its settings."""
    from transformers import AutoConfig

    kind, settings = _CONFIGS[name]
    return AutoConfig.for_model(kind, **{**settings, **changes})


def draw_weights(model: nn.Module, seed: int = 0) -> nn.Module:
    """Add deterministic noise to every parameter in place and return the model in eval mode, gradients off."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval().requires_grad_(False)


def tiny(name: str, seed: int = 0, *, auto: str = "AutoModel", **changes: Any) -> nn.Module:
    """One tiny model; ``auto`` picks another head, such as ``AutoModelForMaskedLM``."""
    import transformers

    from spafit.runtime import torch_seed

    with torch_seed(seed, "tiny", name):
        model = getattr(transformers, auto).from_config(tiny_config(name, **changes))
    return draw_weights(model, seed)


def tiny_inputs(name: str, length: int = 7, rows: int = 2) -> dict[str, torch.Tensor]:
    """Keyword arguments for one forward pass of ``tiny(name)``: distinct ids without padding, or images."""
    generator = torch.Generator().manual_seed(1)
    size = 16 if name in ("swin", "convnext") else 8
    pixels = torch.randn((rows, 1, size, size), generator=generator)
    if name in VISION:
        return {"pixel_values": pixels}
    ids = torch.randint(5, VOCABULARY, (rows, length), generator=generator)
    inputs = {"input_ids": ids}
    if name == "clip":
        inputs["pixel_values"] = pixels
    if name in SEQ2SEQ:
        inputs["decoder_input_ids"] = ids.flip(1)
    return inputs


def tiny_tokenizer(*, decoder: bool = False) -> Any:
    """A fast WordPiece tokenizer over letters and a few words, [CLS] and [SEP] around each text unless ``decoder``."""
    from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
    from tokenizers.models import WordPiece
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["the", "cat", "dog", "sees", "a", "big", "and", "runs", "##s", "##ing", "##ed", "old"]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters), *words]
    pieces = list(dict.fromkeys([*pieces, *"0123456789", *(f"##{c}" for c in "0123456789"), *".,!?'-\"():;/"]))
    backend = Tokenizer(WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if not decoder:
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=POSITIONS,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def save_tiny(name: str, folder: Path, seed: int = 0, *, auto: str = "AutoModel", tokenizer: bool = True) -> nn.Module:
    """Write model (safetensors) and tokenizer as a folder that ``from_pretrained`` takes; return the model."""
    model = tiny(name, seed, auto=auto)
    model.save_pretrained(folder)
    if tokenizer:
        tiny_tokenizer(decoder=name in DECODERS).save_pretrained(folder)
    return model


def tiny_encoder_decoder(seed: int = 0, *, decoder: str = "bert", **changes: Any) -> nn.Module:
    """Two tiny models under one EncoderDecoderModel, with random cross-attention; ``changes`` are the decoder's."""
    from transformers import EncoderDecoderConfig, EncoderDecoderModel

    from spafit.runtime import torch_seed

    config = EncoderDecoderConfig.from_encoder_decoder_configs(
        tiny_config("bert"), tiny_config(decoder, **{"num_hidden_layers": 2, **changes})
    )
    config.decoder_start_token_id, config.pad_token_id = 2, 0
    with torch_seed(seed, "tiny encoder-decoder"):
        model = EncoderDecoderModel(config=config)
    return draw_weights(model, seed)
