"""Read a backbone, an adapter and a tokenizer from files, through transformers' and PEFT's own loaders.

Nothing here asks the hub: :mod:`spafit.hub` has brought the files. What the loaders cannot read, and what a checkpoint
lacks, is a :class:`~spafit.errors.ModelError`; what was left out on purpose becomes a note for the report.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spafit.digests import adapter_digest, model_digest
from spafit.errors import ModelError
from spafit.hub import Located, locate, quiet, read_config
from spafit.runtime import torch_dtype, torch_seed
from spafit.stacks import Stack, find_stacks

if TYPE_CHECKING:
    from torch import nn


# ---------------------------------------------------------------- folders


def load_backbone(found: Located, *, dtype: str, notes: list[str]) -> nn.Module:
    """Load the backbone of a folder or GGUF file; what a report must say is added to ``notes``.

    Raises:
        ModelError: it cannot be read, or lacks weights of the backbone.
    """
    import transformers

    if found.kind == "gguf":
        model, info = from_files(transformers.AutoModel, found, dtype=dtype, gguf_file=found.weights[0])
        notes.append(f"weights de-quantised from {found.weights[0]}, so not exactly those that were trained")
    else:
        config = read_config(found.folder / "config.json")
        named = next(iter(config.get("architectures") or ()), "")
        # Half of a two-stack model saved by itself; every other backbone is what AutoModel makes of the model type.
        half = re.fullmatch(r"\w+(Encoder|Text|Vision)Model", named) and getattr(transformers, named, None)
        if config.get("model_type") == "encoder-decoder":  # two backbones under one name, which AutoModel does not know
            half = transformers.EncoderDecoderModel
        model, info = from_files(half or transformers.AutoModel, found, dtype=dtype)
    _check_whole(model, info, found, notes)
    return model


def from_files(auto: Any, found: Located, *, dtype: str, seed: int = 0, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """Load with a loader of transformers, from files only; return the model and what was missing or left over.

    Parts that the checkpoint lacks are drawn from ``seed``.

    Raises:
        ModelError: it cannot be read.
    """
    import struct
    from pickle import UnpicklingError

    from safetensors import SafetensorError

    broken = (OSError, ValueError, RuntimeError, LookupError, TypeError, EOFError, SafetensorError, struct.error)
    arguments = {
        "dtype": torch_dtype(dtype),
        "local_files_only": True,
        "trust_remote_code": False,
        "output_loading_info": True,
        **settings,
    }
    if "gguf_file" not in settings:
        arguments["use_safetensors"] = found.weights[0].endswith((".safetensors", ".safetensors.index.json"))
        arguments["weights_only"] = True
    # Parts that the checkpoint lacks (a pooler) are drawn anew: from a fixed seed, so that digests stay equal.
    with torch_seed(seed, "missing weights"), quiet(), _own_warnings(), _no_bar("gguf_file" in settings):
        try:
            model, info = auto.from_pretrained(str(found.folder), **arguments)
        except ImportError as error:
            raise ModelError(
                f"{found.folder} needs a package that is missing ({_line(error)}). For GGUF files: "
                'pip install "spafit[gguf]".'
            ) from error
        except UnpicklingError as error:
            raise ModelError(
                f"{found.folder} holds a pickle with more than tensors in it, which torch's restricted reader refuses. "
                "Do not trust it; use safetensors."
            ) from error
        except broken as error:
            raise ModelError(
                f"{found.folder} cannot be loaded ({_line(error)}). Check that the folder is whole and that this "
                "version of transformers knows its model type."
            ) from error
    return model, info


def _check_whole(model: Any, info: dict[str, Any], found: Located, notes: list[str]) -> None:
    """Every weight of the backbone is there; heads that were dropped and poolers that were drawn are notes."""
    prefix = getattr(model, "base_model_prefix", "")
    head = f"{prefix}." if prefix and hasattr(model, prefix) else ""
    missing = sorted(k for k in info["missing_keys"] if k.startswith(head))
    poolers = [k for k in missing if "pooler" in k]
    lost = [k for k in missing if k not in poolers]
    if lost:
        raise ModelError(
            f"{found.folder} lacks {len(lost)} of {len(model.state_dict())} tensors of {type(model).__name__} "
            f"({lost[0]}, …). Save or download the whole checkpoint."
        )
    if poolers:
        notes.append("the checkpoint has no pooler: its weights are random and nothing here reads them")
    dropped = sorted(info["unexpected_keys"])
    for stack in _try_stacks(model):
        blocks = {int(n) for key in dropped for n in re.findall(rf"(?:^|\.){re.escape(stack.path)}\.(\d+)\.", key)}
        beyond = {b for b in blocks if b >= stack.num_blocks}
        if beyond:
            raise ModelError(
                f"{found.folder} holds {max(beyond) + 1} blocks, but its config.json says {stack.num_blocks}. Correct "
                "num_hidden_layers."
            )
    if dropped:
        notes.append(
            f"{len(dropped)} tensors of a head were left out ({dropped[0]}{', …' if len(dropped) > 1 else ''})"
        )


def _try_stacks(model: nn.Module) -> tuple[Stack, ...]:
    try:
        return find_stacks(model)
    except ModelError:  # a stack that the user names; its check comes later
        return ()


# ---------------------------------------------------------------- adapters


def adapter_base(adapter: Located, *, offline: bool, allow_pickle: bool, timeout_s: float) -> Located:
    """Find the base that an adapter's configuration names: beside the adapter, as a path, or on the hub.

    Raises:
        ModelError: it names none, or what it names cannot be had.
    """
    config = read_config(adapter.folder / "adapter_config.json")
    base = config.get("base_model_name_or_path")
    if not base:
        raise ModelError(
            f"{adapter.folder / 'adapter_config.json'} names no base model. Set its base_model_name_or_path "
            "to a folder or hub id."
        )
    reference = next((str(p) for p in (adapter.folder / base, adapter.folder.parent / base) if p.exists()), base)
    try:
        found = locate(
            reference,
            revision=None if Path(reference).expanduser().exists() else config.get("revision"),
            offline=offline,
            allow_pickle=allow_pickle,
            timeout_s=timeout_s,
        )
    except ModelError as error:
        raise type(error)(f"The base of the adapter {adapter.folder}: {error}") from error
    if found.kind != "model":
        raise ModelError(f"The base of the adapter {adapter.folder} is a {found.kind} ({base}). Give a plain model.")
    return found


_HEADS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}


def load_adapted(adapter: Located, base: Located, *, dtype: str, notes: list[str]) -> tuple[nn.Module, str, str]:
    """Load the base and merge the adapter by PEFT; return the backbone, the digest of the base, and the adapter's.

    Raises:
        ModelError: the adapter is prompt-based, or does not fit its base.
    """
    import transformers
    from peft import PeftConfig, PeftModel

    with _own_warnings():
        config = PeftConfig.from_pretrained(str(adapter.folder))
    if config.is_prompt_learning:
        raise ModelError(
            f"{adapter.folder} is a {config.peft_type.value} adapter: it adds inputs and changes no block, so its "
            "layers are its base's. Probe the base."
        )
    read_config(base.folder / "config.json")
    # The adapter's tensors are named after the class that it was trained on, so that class is what it is loaded on.
    named = (config.auto_mapping or {}).get("base_model_class") or _HEADS.get(config.task_type, "AutoModel")
    auto = getattr(transformers, named, None)
    if auto is None:
        raise ModelError(
            f"{adapter.folder} was trained on {named!r}, which transformers does not have. Merge it in your own "
            "code, and give the pair (model, tokenizer)."
        )
    settings = {}
    labels = _labels(adapter)
    if labels is not None and "Classification" in named:
        settings["num_labels"] = labels
    base_notes: list[str] = []
    model, info = from_files(auto, base, dtype=dtype, **settings)
    _check_whole(model, info, base, base_notes)
    digest = model_digest(model.base_model)
    with quiet(), _own_warnings():
        try:
            wrapped = PeftModel.from_pretrained(model, str(adapter.folder), is_trainable=False)
            merged = wrapped.merge_and_unload()
        except (OSError, ValueError, RuntimeError, KeyError, AttributeError, NotImplementedError) as error:
            raise ModelError(
                f"The adapter {adapter.folder} does not fit its base {base.folder} ({_line(error)}). Check "
                "base_model_name_or_path and revision in its adapter_config.json."
            ) from error
    notes.append(f"{config.peft_type.value} adapter merged into its base {base.label}")
    return merged.base_model, digest, adapter_digest(adapter)


def _labels(adapter: Located) -> int | None:
    """Number of classes of the head saved with an adapter."""
    from safetensors import safe_open

    if not adapter.weights[0].endswith(".safetensors"):
        return None
    with safe_open(adapter.folder / adapter.weights[0], framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - the file is no mapping
            if re.search(
                r"\.(classifier|score|out_proj)(\.modules_to_save(\.default)?|\.original_module)?\.weight$", key
            ):
                return int(file.get_slice(key).get_shape()[0])
    return None


# ---------------------------------------------------------------- tokenizers


def load_tokenizer(homes: list[Located], *, required: bool) -> Any | None:
    """The tokenizer of the first folder that has one (an adapter's own, else its base's)."""
    from transformers import AutoTokenizer

    for home in homes:
        names = {p.name for p in home.folder.iterdir()}
        files = {"tokenizer.json", "vocab.txt", "vocab.json"} & names
        files |= {n for n in names if n.endswith((".model", ".tiktoken"))}
        if home.kind != "gguf" and not files:
            continue
        if "tokenizer_config.json" in names:
            read_config(home.folder / "tokenizer_config.json")
        settings = {"gguf_file": home.weights[0]} if home.kind == "gguf" else {}
        with quiet(), _own_warnings(), _no_bar(home.kind == "gguf"):
            try:
                tokenizer = AutoTokenizer.from_pretrained(
                    str(home.folder), local_files_only=True, trust_remote_code=False, **settings
                )
            except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
                raise ModelError(f"The tokenizer in {home.folder} cannot be loaded ({_line(error)}).") from error
        if tokenizer.pad_token is None and tokenizer.eos_token is not None:
            tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so which token pads makes no difference
        return tokenizer
    if required:
        raise ModelError(
            f"{homes[-1].folder} has no tokenizer: neither tokenizer.json, vocab.txt, vocab.json nor a *.model file "
            "is there. Copy the tokenizer's files into it, or load both yourself and give the pair (model, tokenizer)."
        )
    return None


# ---------------------------------------------------------------- quiet loading


def _line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


@contextlib.contextmanager
def _own_warnings() -> Iterator[None]:
    """PEFT reads an attribute that transformers deprecates; the user can do nothing about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield


@contextlib.contextmanager
def _no_bar(needed: bool) -> Iterator[None]:
    """GGUF files are converted under a bar that nothing switches off; it is for terminals."""
    if needed and not sys.stderr.isatty():
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    else:
        yield
