"""Models with their language-model head: load one, and put a tuned body under the head of the one it came from."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spafit.errors import ModelError
from spafit.hub import locate, read_config
from spafit.loading import from_files, load_tokenizer

if TYPE_CHECKING:
    import torch
    from torch import nn

Kind = Literal["causal", "masked"]


@dataclass(frozen=True)
class LanguageModel:
    """A model that predicts tokens.

    Attributes:
        model: with its head, in eval mode, gradients off.
        tokenizer: its tokenizer.
        kind: ``causal`` (next token) or ``masked``.
        name: label for tables.
    """

    model: Any
    tokenizer: Any
    kind: Kind
    name: str

    @property
    def body(self) -> Any:
        """The backbone: everything below the head.

        Raises:
            ModelError: the model does not say which part that is.
        """
        prefix = self.model.base_model_prefix
        body = getattr(self.model, prefix, None)
        if body is None:
            raise ModelError(f"{self.name} has no backbone named {prefix!r}; only models built like that are read.")
        return body


def load_language_model(
    reference: str | Path, *, revision: str | None = None, offline: bool = False, allow_pickle: bool = False
) -> LanguageModel:
    """Load a causal or masked language model with its own head.

    Args:
        reference: hub id, folder or GGUF file.
        revision: branch, tag or commit of a hub model.
        offline: never ask the hub.
        allow_pickle: accept pickle weights.

    Raises:
        ModelError: it has no language-model head of its own, or cannot be read.
    """
    import transformers

    found = locate(str(reference), revision=revision, offline=offline, allow_pickle=allow_pickle)
    if found.kind == "adapter":
        raise ModelError(
            f"{reference} is an adapter; its language-model head is that of its base. Give the base here, and put the "
            "tuned body under its head."
        )
    settings: dict[str, Any] = {}
    kind: Kind = "causal"
    if found.kind == "gguf":
        settings["gguf_file"] = found.weights[0]  # files of this kind hold decoders with their head
    else:
        config = read_config(found.folder / "config.json")
        named = next(iter(config.get("architectures") or ()), "")
        if config.get("is_encoder_decoder"):
            raise ModelError(
                f"{found.label} is an encoder-decoder, whose head continues what its decoder wrote about another text; "
                "retention is of causal and masked language models. Compare its stacks by probing."
            )
        if "ForMaskedLM" in named or "ForPreTraining" in named:
            kind = "masked"
        elif "ForCausalLM" not in named and "LMHead" not in named:
            raise ModelError(
                f"{found.label} was saved as {named or 'a model without a class'}, without a language-model head, so "
                "what it knows of its language cannot be measured. Give the checkpoint that was pre-trained."
            )
    auto = transformers.AutoModelForCausalLM if kind == "causal" else transformers.AutoModelForMaskedLM
    model, info = from_files(auto, found, dtype="float32", **settings)
    head = [k for k in info["missing_keys"] if not k.startswith(f"{model.base_model_prefix}.")]
    if head:
        raise ModelError(f"{found.label} lacks weights of its head ({head[0]}). Give a whole checkpoint.")
    tokenizer = load_tokenizer([found], required=True)
    return LanguageModel(model.eval().requires_grad_(False), tokenizer, kind, found.label)


def graft(original: LanguageModel, body: nn.Module, *, name: str | None = None) -> LanguageModel:
    """The original head on a tuned body; neither model is changed, and nothing stays tied.

    Everything outside the body (head, its transform and biases) is a copy, so a head that shares its matrix with the
    original embeddings keeps that matrix, whatever became of the tuned ones.

    Args:
        original: the language model before training.
        body: the tuned backbone, of the same class as the original's; it is used in place, not copied.
        name: label of the result.

    Raises:
        ModelError: the body is another class, or of another width or vocabulary.
    """
    old = original.body
    if type(body) is not type(old):
        raise ModelError(
            f"The body is a {type(body).__name__} and the original head belongs to a {type(old).__name__}. Give the "
            "backbone of the same model after training."
        )
    shapes = [{n: tuple(p.shape) for n, p in m.named_parameters() if "pooler" not in n} for m in (old, body)]
    if shapes[0] != shapes[1]:
        raise ModelError(
            f"The body after training and that of {original.name} have parameters of other names or shapes. Merge "
            "adapters first, and give checkpoints of one model."
        )
    prefix = original.model.base_model_prefix
    grafted = copy.copy(original.model)
    grafted._modules = {n: body if n == prefix else copy.deepcopy(m) for n, m in original.model._modules.items()}
    grafted._parameters = {n: copy.deepcopy(p) for n, p in original.model._parameters.items()}
    return replace(original, model=grafted, name=name or original.name)


def with_state_map(language: LanguageModel, weight: torch.Tensor, bias: torch.Tensor) -> LanguageModel:
    """The same model with states ``x @ weight + bias`` in place of the body's last states ``x``; a re-fitted head."""
    from torch import nn

    class Mapped(nn.Module):
        def __init__(self, body: nn.Module):
            super().__init__()
            self.body = body

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            outputs = self.body(*args, **kwargs)
            outputs["last_hidden_state"] = outputs[0] @ weight + bias
            return outputs

    prefix = language.model.base_model_prefix
    mapped = copy.copy(language.model)
    mapped._modules = {n: Mapped(m) if n == prefix and m is not None else m for n, m in language.model._modules.items()}
    return replace(language, model=mapped)
