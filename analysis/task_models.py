"""A trained classifier, and the same classifier on the body as it was before training: two plain modules, one head."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.sides import run_folder
from spafit import io
from spafit.errors import ModelError, SpafitError, UsageError

if TYPE_CHECKING:
    from torch import nn

    from spafit.data.training import TrainData

#: Tokens kept of an item by a classifier that does not say how many it was trained with.
MAX_LENGTH = 128


@dataclass(frozen=True)
class ClassifierFacts:
    """What a reference says about its classifier before any weight is read.

    Attributes:
        reference: of the model itself, where the folder of a probing run was given.
        ours: it was written by ``spafit train``.
        labels: names of the classes in the order of the outputs; None for a regression.
        paired: trained on pairs of texts; None where that is not said.
        max_length: tokens kept of an item.
    """

    reference: Any
    ours: bool
    labels: tuple[str, ...] | None
    paired: bool | None
    max_length: int

    def order(self, data: TrainData) -> list[int]:
        """Which of the outputs belongs to each class of the data, as in :meth:`TrainData.output_order`.

        Raises:
            DataError: other classes.
            UsageError: pairs of texts for a model of single ones, or the reverse.
        """
        if self.paired not in (None, data.paired):
            trained, got = ("pairs of texts", "single texts") if self.paired else ("single texts", "pairs of texts")
            raise UsageError(f"it was trained on {trained}, and {data.name} holds {got}")
        return data.output_order(self.labels)


def classifier_facts(reference: Any, *, offline: bool = False, allow_pickle: bool = False) -> ClassifierFacts:
    """What kind of classifier a reference stands for; only configurations are read.

    Args:
        reference: a folder of ``spafit train`` (…/seed-0/model), a plain transformers model with its head, a pair
            (module, tokenizer), or the folder of a probing run of one of them.
        offline: never ask the hub.
        allow_pickle: accept pickle weights.

    Raises:
        ModelError: it is no classifier with a head that can be loaded here; the sentence says what it is.
    """
    run = run_folder(reference)
    if run is not None:
        recorded = io.read_json(run / "run.json")["config"].get("model")
        return classifier_facts(recorded, offline=offline, allow_pickle=allow_pickle)
    if isinstance(reference, tuple):
        return _in_memory(reference)
    if not isinstance(reference, str | Path):
        raise ModelError("a backbone, which has no classification head")
    from spafit.checkpoint import CONFIG_FILE, read_config

    if (Path(reference) / CONFIG_FILE).is_file():
        base = read_config(Path(reference))["base"]
        if base.get("head", "sequence-classification") != "sequence-classification":
            raise ModelError(f"it was trained with a head for {base['head']}, and only classifiers of texts are read")
        labels = None if base.get("regression") else tuple(base.get("labels") or ()) or ("LABEL_0", "LABEL_1")
        return ClassifierFacts(reference, True, labels, base.get("paired"), int(base.get("max_length", MAX_LENGTH)))
    return _plain_folder(reference, offline=offline, allow_pickle=allow_pickle)


def _in_memory(pair: tuple[Any, Any]) -> ClassifierFacts:
    config: Any = getattr(pair[0], "config", None)
    if getattr(pair[0], "base_model", pair[0]) is pair[0] or not hasattr(config, "num_labels"):
        raise ModelError(f"a {type(pair[0]).__name__} in memory, which has no classification head")
    return ClassifierFacts(pair, False, _labels(config.num_labels, config.id2label), None, MAX_LENGTH)


def _plain_folder(reference: str | Path, *, offline: bool, allow_pickle: bool) -> ClassifierFacts:
    from spafit.hub import locate, read_config

    found = locate(str(reference), offline=offline, allow_pickle=allow_pickle)
    if found.kind == "adapter":
        raise ModelError(
            "an adapter that was not trained here, so its head is unknown; merge it, and give the merged model"
        )
    content = {} if found.kind == "gguf" else read_config(found.folder / "config.json")
    named = next(iter(content.get("architectures") or ()), "")
    if "ForSequenceClassification" not in named:
        raise ModelError(f"saved as {named or 'a model without a class'}, which has no classification head")
    names = {int(k): v for k, v in (content.get("id2label") or {0: "LABEL_0", 1: "LABEL_1"}).items()}
    return ClassifierFacts(str(reference), False, _labels(len(names), names), None, MAX_LENGTH)


def _labels(count: int, names: dict[int, str]) -> tuple[str, ...] | None:
    """Names of the classes; one output is a regression."""
    return None if count == 1 else tuple(str(names[i]) for i in range(count))


def known_classes(references: Sequence[Any], *, offline: bool = False) -> tuple[tuple[str, ...] | None, bool]:
    """Classes of the first classifier among references (None where they have no names), and whether it regresses.

    Raises:
        UsageError: none of them is a classifier.
    """
    from spafit.class_names import are_placeholders

    reasons = []
    for reference in references:
        try:
            facts = classifier_facts(reference, offline=offline)
        except SpafitError as error:
            reasons.append(f"{reference}: {error}")
            continue
        named = None if facts.labels is None or are_placeholders(facts.labels) else facts.labels
        return named, facts.labels is None
    raise UsageError(f"None of the models after training is a classifier ({reasons[0]}).")


def load_classifier(facts: ClassifierFacts, *, offline: bool, allow_pickle: bool, device: str) -> tuple[Any, Any]:
    """The classifier as a plain module with everything trained in it, gradients off, and its tokenizer.

    Raises:
        ModelError: it cannot be loaded or merged.
    """
    from spafit.checkpoint import load
    from spafit.heads import load_with_head
    from spafit.hub import locate
    from spafit.loading import load_tokenizer

    if isinstance(facts.reference, tuple):
        model, tokenizer = facts.reference
        return model, tokenizer
    reference = str(facts.reference)
    if facts.ours:
        stratified = load(reference, offline=offline, allow_pickle=allow_pickle)
        model, tokenizer = stratified.model, load_tokenizer([locate(reference)], required=True)
        if stratified.is_adapter:
            model = _merged(model)
    else:
        headed = load_with_head(reference, offline=offline, allow_pickle=allow_pickle, restoring=True)
        if headed.missing:
            raise ModelError(f"its head has no weights in the checkpoint ({headed.missing[0]})")
        model, tokenizer = headed.model, headed.tokenizer
    return model.eval().requires_grad_(False).to(device), tokenizer


def _merged(wrapped: Any) -> Any:
    """The wrapped model with its adapter in its weights; merged in place, so that no second copy is made."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            return wrapped.merge_and_unload(safe_merge=True)
    except (NotImplementedError, AttributeError) as error:
        raise ModelError(f"its adapter cannot be merged into the weights ({error})") from error


def on_body_before(after: nn.Module, body: nn.Module) -> nn.Module:
    """The classifier with embeddings, blocks and last norm of another body; head and pooler stay those of ``after``.

    Both are used by reference: nothing is copied on one device.

    Args:
        after: the trained classifier, a plain module.
        body: the model before training, without a head.

    Raises:
        ModelError: the body is built otherwise.
    """
    from torch import nn

    inner: Any = getattr(after, "base_model", after)
    theirs = dict(body.named_parameters(remove_duplicate=False))
    memo: dict[int, Any] = {id(t): t for t in (*after.parameters(), *after.buffers())}
    for name, own in inner.named_parameters(remove_duplicate=False):
        if "pool" in name:
            continue  # trained with the head, and missing in many checkpoints
        if name not in theirs or theirs[name].shape != own.shape:
            what = "no" if name not in theirs else f"a {tuple(theirs[name].shape)}"
            raise ModelError(
                f"the model before training has {what} {name} where the classifier has a {tuple(own.shape)} one; they "
                "are not checkpoints of one architecture"
            )
        value = theirs[name].detach().to(device=own.device, dtype=own.dtype)
        memo[id(own)] = nn.Parameter(value, requires_grad=False)
    before: nn.Module = copy.deepcopy(after, memo)
    return before.eval()
