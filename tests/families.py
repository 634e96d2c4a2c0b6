"""Tiny models of the families that people fine-tune, six blocks deep so that SPAFIT's three strata all have blocks.

``FAMILIES`` holds one :class:`Family` per row: how to build it with its training head and deterministic weights, and
inputs for one forward pass. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tests.tiny import HEADS, INNER, POSITIONS, VOCABULARY, WIDTH, draw_weights, tiny

DEPTH = 6
#: Width of LLaVA's vision tower and of the encoder of the encoder-decoder pair, unlike that of what they lead to.
OTHER_WIDTH = 24
IMAGE_TOKEN, PATCHES = 4, 4

_IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "max_position_embeddings": POSITIONS,
}
_ROTARY = {**_TEXT, **_IDS, "num_key_value_heads": 1, "head_dim": 8}
_VISION = {
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
}


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        name: as people call it.
        build: makes the model with the head that it is trained with.
        inputs: names of the forward pass's inputs, of ``ids``, ``caption`` (ends in EOS, where CLIP pools),
            ``decoder_ids``, ``pixels``, ``sound``, ``image_ids``.
        output: the output that a loss is made of.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: tuple[str, ...]
    output: str = "logits"

    @property
    def reads_text(self) -> bool:
        """Whether text is among what it reads."""
        return bool({"ids", "caption", "image_ids"} & set(self.inputs))

    def batch(self) -> dict[str, torch.Tensor]:
        """Keyword arguments for one forward pass of two items."""
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(5, VOCABULARY, (2, 7), generator=generator)
        made = {
            "ids": ("input_ids", ids),
            "caption": ("input_ids", torch.cat([ids[:, 1:], torch.full((2, 1), _IDS["eos_token_id"])], 1)),
            "decoder_ids": ("decoder_input_ids", ids[:, :4].flip(1)),
            "pixels": ("pixel_values", torch.randn((2, 1, 8, 8), generator=generator)),
            "sound": ("input_features", torch.randn((2, 8, 20), generator=generator)),
            "image_ids": ("input_ids", torch.cat([torch.full((2, PATCHES), IMAGE_TOKEN), ids], 1)),
        }
        return dict(made[name] for name in self.inputs)


def _drawn(make: Callable[[], nn.Module]) -> nn.Module:
    from spafit.runtime import torch_seed

    with torch_seed(0, "family"):
        return draw_weights(make())


def _known(name: str, head: str, **changes: Any) -> Callable[[], nn.Module]:
    """A model of ``tests.tiny`` at this depth."""
    depth = {"gpt2": ("n_layer",), "distilbert": ("n_layers",), "t5": ("num_layers", "num_decoder_layers"),
             "bart": ("encoder_layers", "decoder_layers")}.get(name, ("num_hidden_layers",))  # fmt: skip
    return lambda: tiny(name, auto=f"AutoModelFor{head}", **dict.fromkeys(depth, DEPTH), **changes)


def _causal(kind: str, **changes: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(kind, **{**_ROTARY, **changes})
        return _drawn(lambda: AutoModelForCausalLM.from_config(config))

    return build


def _whisper() -> nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=VOCABULARY, num_mel_bins=8, d_model=WIDTH, encoder_layers=DEPTH, decoder_layers=DEPTH,
        encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=INNER, decoder_ffn_dim=INNER,
        max_source_positions=10, max_target_positions=POSITIONS, decoder_start_token_id=2, **_IDS,
    )  # fmt: skip
    return _drawn(lambda: WhisperForConditionalGeneration(config))


def _llava() -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(hidden_size=OTHER_WIDTH, **_VISION)
    # LLaVA's own default reads the last block but one, so that the last block of its tower is never used.
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**_ROTARY),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
    )
    return _drawn(lambda: LlavaForConditionalGeneration(config))


def _clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    vision = {**_VISION, "hidden_size": WIDTH}
    return _drawn(lambda: CLIPModel(CLIPConfig(text_config={**_TEXT, **_IDS}, vision_config=vision, projection_dim=8)))


def _encoder_decoder() -> nn.Module:
    from transformers import BertConfig, EncoderDecoderConfig, EncoderDecoderModel

    encoder, decoder = BertConfig(**{**_TEXT, "hidden_size": OTHER_WIDTH}), BertConfig(**_TEXT)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    return _drawn(lambda: EncoderDecoderModel(config))


_IDS_IN, _SEQ2SEQ = ("ids",), ("ids", "decoder_ids")
FAMILIES = {
    f.name: f
    for f in (
        Family("BERT", _known("bert", "SequenceClassification"), _IDS_IN),
        Family("RoBERTa", _known("roberta", "SequenceClassification"), _IDS_IN),
        Family("DistilBERT", _known("distilbert", "SequenceClassification"), _IDS_IN),
        Family("ALBERT", _known("albert", "SequenceClassification"), _IDS_IN),
        Family("DeBERTa-v2", _known("deberta-v2", "SequenceClassification"), _IDS_IN),
        Family("ModernBERT", _known("modernbert", "SequenceClassification"), _IDS_IN),
        Family("MPNet", _known("mpnet", "SequenceClassification"), _IDS_IN),
        Family("ELECTRA", _known("electra", "SequenceClassification"), _IDS_IN),
        Family("GPT-2", _known("gpt2", "CausalLM"), _IDS_IN),
        Family("OPT", _known("opt", "CausalLM"), _IDS_IN),
        Family("GPT-NeoX", _known("gpt-neox", "CausalLM"), _IDS_IN),
        Family("Llama", _causal("llama"), _IDS_IN),
        Family("Mistral", _causal("mistral"), _IDS_IN),
        Family("Mixtral", _known("mixtral", "CausalLM"), _IDS_IN),
        Family("Qwen2", _causal("qwen2"), _IDS_IN),
        Family("Qwen3", _causal("qwen3"), _IDS_IN),
        Family("Gemma", _causal("gemma"), _IDS_IN),
        Family("Gemma 2", _causal("gemma2"), _IDS_IN),
        Family("Gemma 3 (text)", _causal("gemma3_text"), _IDS_IN),
        Family("OLMo 2", _causal("olmo2"), _IDS_IN),
        Family("T5", _known("t5", "Seq2SeqLM"), _SEQ2SEQ),
        Family("BART", _known("bart", "Seq2SeqLM"), _SEQ2SEQ),
        Family("EncoderDecoder (BERT and BERT)", _encoder_decoder, _SEQ2SEQ),
        Family("ViT", _known("vit", "ImageClassification"), ("pixels",)),
        Family("DINOv2", _known("dinov2", "ImageClassification"), ("pixels",)),
        Family("CLIP", _clip, ("caption", "pixels"), output="logits_per_image"),
        Family("Whisper", _whisper, ("sound", "decoder_ids")),
        Family("LLaVA", _llava, ("image_ids", "pixels")),
    )
}


def outputs(family: Family, model: nn.Module) -> torch.Tensor:
    """The family's output for its inputs, in eval mode."""
    model.eval()
    with torch.no_grad():
        return getattr(model(**family.batch()), family.output)


def one_step(family: Family, model: nn.Module, *, rate: float = 0.05) -> set[str]:
    """One step against the gradient's sign on what requires a gradient; returns the names that received one."""
    model.train()
    getattr(model(**family.batch()), family.output).float().pow(2).mean().backward()
    received = set()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                received.add(name)
                parameter -= rate * parameter.grad.sign()
                parameter.grad = None
    return received


__all__ = ["DEPTH", "FAMILIES", "OTHER_WIDTH", "Family", "one_step", "outputs"]
