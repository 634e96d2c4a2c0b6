"""Content digests of models, adapters and tokenizers: what says that two of them compute the same."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from spafit.errors import ModelError
from spafit.hub import Located, read_config
from spafit.io import content_digest, file_digest

if TYPE_CHECKING:
    from torch import nn

# Settings that say where a model came from or how it was run, not what it computes.
_NOT_CONTENT = {
    "_name_or_path", "_commit_hash", "architectures", "dtype", "torch_dtype", "id2label", "label2id", "problem_type",
    "transformers_version", "use_cache", "return_dict", "output_hidden_states", "output_attentions",
    "tie_word_embeddings", "is_encoder_decoder", "task_specific_params", "finetuning_task", "num_labels",
}  # fmt: skip


def model_digest(model: nn.Module) -> str:
    """SHA-256 over the class, the settings that change what it computes, and every tensor of the state."""
    import torch

    digest = hashlib.sha256(type(model).__name__.encode())
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_dict"):
        digest.update(json.dumps(_content(config.to_dict()), sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"\x1f{name}\x1f{tensor.dtype}\x1f{tuple(tensor.shape)}\x1f".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()


def settings_digest(model: nn.Module) -> str:
    """SHA-256 over the class and the settings that change what a model computes, without its weights."""
    config = getattr(model, "config", None)
    settings = _content(config.to_dict()) if config is not None and hasattr(config, "to_dict") else None
    return content_digest([type(model).__name__, json.dumps(settings, sort_keys=True, default=str)])


def tokenizer_digest(tokenizer: Any | None) -> str:
    """SHA-256 of what decides how text becomes tokens; "" without a tokenizer."""
    if tokenizer is None:
        return ""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        # Padding and truncation are left behind by the last call, and belong to the caller.
        content = {k: v for k, v in state.items() if k not in ("padding", "truncation")}
    elif hasattr(tokenizer, "get_vocab"):
        content = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    else:
        raise ModelError(
            f"A {type(tokenizer).__name__} is not a tokenizer: it has no vocabulary. Give a transformers tokenizer, "
            "or None."
        )
    special = {k: str(v) for k, v in getattr(tokenizer, "special_tokens_map", {}).items()}
    return content_digest([json.dumps(content, sort_keys=True), json.dumps(special, sort_keys=True)])


def adapter_digest(adapter: Located) -> str:
    """SHA-256 of an adapter's settings, without where its base lies, and of its weight files."""
    config = read_config(adapter.folder / "adapter_config.json")
    kept = {k: v for k, v in config.items() if k not in ("base_model_name_or_path", "revision", "inference_mode")}
    digests = [file_digest(adapter.folder / name) for name in adapter.weights]
    return content_digest([json.dumps(kept, sort_keys=True), *digests])


def _content(settings: Any) -> Any:
    if isinstance(settings, dict):
        return {str(k): _content(v) for k, v in settings.items() if k not in _NOT_CONTENT}
    return settings
