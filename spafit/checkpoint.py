"""Save a trained model as a stock PEFT folder, load it again with its plan, and write a model card."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spafit import io
from spafit.adapt import (
    ADAPTER,
    StratifiedModel,
    apply_strata,
    canonical_name,
    canonical_parameters,
    is_quantised,
    meta_copy,
)
from spafit.errors import ModelError
from spafit.hub import quiet
from spafit.strata import StrataConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

CONFIG_FILE = "spafit_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
#: Ends of class names that one of transformers' Auto classes loads.
_LOADED_BY_TASK = ("SequenceClassification", "TokenClassification", "MaskedLM", "CausalLM")


def save(
    stratified: StratifiedModel,
    directory: str | Path,
    *,
    base: Mapping[str, Any] | None = None,
    card: str | None = None,
    write: bool = True,
) -> Path:
    """Write what trained into ``directory``; return it.

    With an adapter the folder holds ``adapter_config.json`` and ``adapter_model.safetensors`` in PEFT's own format,
    with only the biases that train, so that plain ``peft`` and plain ``transformers`` load it. A model of which
    everything trains is written as a plain transformers folder. ``spafit_config.json`` beside either holds the plan,
    the exact names and sizes that train, and a digest of the base; where a schedule moved what trains, also the plan
    that holds at this point, within the one that holds all of them.

    Args:
        stratified: the model.
        directory: made if missing.
        base: where the base can be had: ``reference``, ``revision``, ``head``, ``labels``, ``regression``; with
            ``digest``, that of :func:`base_digest`, the base is not read again.
        card: text of the model card (README.md); none by default.
        write: False in the processes of a sharded model that only help to gather it.

    Raises:
        OutputError: the folder cannot be written.
    """
    folder = Path(directory)
    model = stratified.model
    source = dict(base or {})
    state = adapter_state(stratified) if stratified.is_adapter else whole_tensors(model.state_dict())
    source["digest"] = source.get("digest") or base_digest(stratified)
    if not write:
        return folder
    if stratified.is_adapter:
        config = model.peft_config[ADAPTER]
        before = (config.inference_mode, config.base_model_name_or_path, config.revision)
        named = source.get("folder") or source.get("reference") or before[1]
        config.inference_mode, config.base_model_name_or_path = True, None if named is None else str(named)
        config.revision = source.get("revision") or before[2]
        try:
            io.write_json(folder / "adapter_config.json", _adapter_config(config))
        finally:
            config.inference_mode, config.base_model_name_or_path, config.revision = before
        _write_tensors(folder / WEIGHTS_FILE, state)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        with quiet():
            model.save_pretrained(str(folder), state_dict=state)
    moment = stratified.moment.plan
    holds = {} if moment is None else {"holds": moment.config.to_dict()}
    io.write_json(
        folder / CONFIG_FILE,
        {
            "schema_version": io.SCHEMA_VERSION,
            "plan": stratified.config.to_dict(),
            "trainable": dict(stratified.trainable),
            **holds,
            "base": {k: v for k, v in source.items() if k != "folder"},
        },
    )
    if card is not None:
        io.write_text(folder / "README.md", card)
    return folder


def adapter_state(stratified: StratifiedModel) -> dict[str, torch.Tensor]:
    """The tensors of the adapter file under PEFT's names, gathered where sharded.

    They are what trains and, beside added biases, the zeros that PEFT looks for; see ``fixed_at_zero``.
    """
    from peft import get_peft_model_state_dict

    model = stratified.model
    wanted = {*stratified.trainable, *stratified.fixed_at_zero}
    trained = {n for n, _ in model.named_parameters() if canonical_name(n) in wanted}
    state = {n: t for n, t in model.state_dict().items() if n in trained or ".modules_to_save." in n}
    kept = get_peft_model_state_dict(model, state_dict=state, adapter_name=ADAPTER, save_embedding_layers=False)
    # With bias="all" PEFT lists the biases of modules that are saved whole a second time, under an inner name.
    return whole_tensors(
        {
            n: t.contiguous()
            for n, t in kept.items()
            if ".modules_to_save." not in f"{n}." and ".original_module." not in f"{n}."
        }
    )


def whole_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors; sharded ones are gathered, for which every process has to call this."""
    return {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in tensors.items()}


def sharded_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A whole tensor, cut as a sharded parameter is; unchanged for other parameters."""
    if not hasattr(parameter, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh = parameter.device_mesh  # type: ignore[attr-defined]
    return distribute_tensor(tensor.to(mesh.device_type), mesh, parameter.placements)  # type: ignore[attr-defined]


def load(
    directory: str | Path,
    base: nn.Module | None = None,
    *,
    offline: bool = False,
    allow_pickle: bool = False,
    dtype: str = "float32",
) -> StratifiedModel:
    """Load what :func:`save` wrote, with its plan, ready to be used or trained on.

    Args:
        directory: the folder.
        base: a fresh base model with the same head; by default it is loaded from where the folder says.
        offline: never ask the hub for the base.
        allow_pickle: accept a base with pickle weights.
        dtype: precision of a base that is loaded here.

    Raises:
        ModelError: the folder is not whole, or the base is not the one that the adapter was trained on.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(directory)
    content = read_config(folder)
    config = StrataConfig.from_dict(content["plan"])
    source = content["base"]
    adapter = (folder / "adapter_config.json").is_file()
    if base is None:
        from spafit.heads import load_with_head

        reference = source.get("reference")
        if adapter and reference is None:
            raise ModelError(f"{folder} does not say where its base is. Load the base yourself: load(folder, base).")
        base = load_with_head(
            reference if adapter else str(folder),
            head=source.get("head", "sequence-classification"),
            labels=source.get("labels"),
            regression=bool(source.get("regression")),
            revision=source.get("revision") if adapter else None,
            offline=offline,
            allow_pickle=allow_pickle,
            dtype=dtype,  # type: ignore[arg-type]
            restoring=True,
        ).model
    holds = content.get("holds")
    bare = meta_copy(base) if holds is not None else None
    stratified = apply_strata(base, config)
    if holds is not None:
        stratified.moment.bare = bare
        stratified.hold(StrataConfig.from_dict(holds))
    if dict(stratified.trainable) != content["trainable"]:
        differ = sorted(set(stratified.trainable.items()) ^ {(k, v) for k, v in content["trainable"].items()})
        raise ModelError(
            f"{folder} was trained with other parameters than its plan gives on this base ({differ[0][0]}, …). Use the "
            "base and the number of labels that it was trained on."
        )
    if not adapter:
        return stratified
    if base_digest(stratified) != source["digest"]:
        raise ModelError(
            f"The base is not the one that {folder} was trained on (digest {base_digest(stratified)[:12]}, expected "
            f"{source['digest'][:12]}). Use {_said(source)} with its weights as they were before any training."
        )
    try:
        state = load_file(str(folder / WEIGHTS_FILE))
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder / WEIGHTS_FILE} cannot be read ({error}). Save or copy it again.") from error
    load_state(stratified, state)
    return stratified


def _said(source: Mapping[str, Any]) -> str:
    """A base's name for people."""
    from spafit.models import DEFAULT_NAME

    reference = source.get("reference")
    if reference is None:
        return "the same base"
    named = f"the built-in {DEFAULT_NAME}" if reference == "default" else str(reference)
    return f"{named} at revision {source['revision']}" if source.get("revision") else named


def load_state(stratified: StratifiedModel, state: Mapping[str, torch.Tensor]) -> None:
    """Put an adapter's tensors (PEFT's names) into a wrapped model, exactly; every one that trains must be there.

    Raises:
        ModelError: tensors are missing, left over, or of another shape.
    """
    import torch

    named = {canonical_name(n): t for n, t in state.items()}
    zeros = set(stratified.fixed_at_zero)
    wanted = zeros | set(stratified.trainable)
    missing = sorted(wanted - set(named))
    extra = sorted(n for n in named if n not in wanted or (n in zeros and named[n].any()))
    parameters = canonical_parameters(stratified.model)
    wrong = [n for n, t in named.items() if n in parameters and parameters[n].shape != t.shape]
    if missing or extra or wrong:
        first = (missing or extra or wrong)[0]
        raise ModelError(
            f"The saved weights do not fit the plan: {len(missing)} missing, {len(extra)} left over, {len(wrong)} of "
            f"another shape ({first}, …). They belong to another plan or base."
        )
    with torch.no_grad():
        for name, tensor in named.items():
            parameters[name].copy_(sharded_like(tensor, parameters[name]))


def read_config(folder: Path) -> dict[str, Any]:
    """Content of ``spafit_config.json``.

    Raises:
        ModelError: it is missing or not what this package writes.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ModelError(f"{folder} has no {CONFIG_FILE}: it is not a model that was trained here. Give its folder.")
    try:
        content = io.read_json(path)
        _ = content["plan"], content["trainable"], content["base"]["digest"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is not what this package writes ({error}). Copy the folder again.") from error
    return dict(content)


def base_digest(stratified: StratifiedModel) -> str:
    """SHA-256 over the base as far as the adapter rests on it: frozen tensors, and biases as they were before.

    Modules that the adapter holds whole (heads, norms, blocks) do not count: a head may start from any weights.
    """
    digest = hashlib.sha256()
    if not stratified.is_adapter:
        return digest.hexdigest()
    zeros = set(stratified.fixed_at_zero)
    if is_quantised(stratified.model):
        stratified.model.state_dict()  # has bitsandbytes undo how it reorders weights for some CPUs while it runs
    for name, parameter in sorted(canonical_parameters(stratified.model).items()):
        if name in zeros or (name in stratified.trainable and name not in stratified.base_values):
            continue
        tensor = stratified.base_values.get(name, parameter)
        if tensor.is_meta:
            raise ModelError(
                f"{name} is not in memory, so the base that was trained on cannot be told. Load the model without "
                "modules on disk to save an adapter of it."
            )
        digest.update(f"\x1f{name}\x1f{tensor.dtype}\x1f{tuple(tensor.shape)}\x1f".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def model_card(
    stratified: StratifiedModel,
    *,
    base: str,
    task: str,
    scores: Mapping[str, float],
    settings: Mapping[str, Any],
    command: str | None = None,
    notes: Iterable[str] = (),
) -> str:
    """Markdown model card from what was run; nothing in it is typed by hand."""
    from spafit import __version__

    library = "peft" if stratified.is_adapter else "transformers"
    lines = [
        "---",
        f"library_name: {library}",
        f"base_model: {base}",
        "tags: [spafit]",
        "---",
        f"# {base} trained on {task}",
        "",
        f"Trained by spafit {__version__}" + (f" with `{command}`." if command else "."),
        "",
        "## Results",
        "",
        "| metric | value |",
        "|---|---|",
        *(f"| {k} | {v:.4f} |" for k, v in scores.items()),
        "",
        "## What trained",
        "",
        "```",
        stratified.describe(),
        "```",
        "",
        "## Settings",
        "",
        *(f"- {k}: {v}" for k, v in settings.items()),
        *(f"- {n}" for n in notes),
        "",
        "## How to load it without spafit",
        "",
        "```python",
        *_loading_code(stratified),
        "```",
        "",
    ]
    return "\n".join(lines)


def _loading_code(stratified: StratifiedModel) -> list[str]:
    """Python that loads the saved folder with plain ``peft`` and ``transformers``; runs as it stands in the folder."""
    model = stratified.model.get_base_model() if stratified.is_adapter else stratified.model
    suffix = type(model).__name__.rpartition("For")[2]
    auto = f"AutoModelFor{suffix}" if suffix in _LOADED_BY_TASK else "AutoModelForSequenceClassification"
    use = [
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "",
        'inputs = tokenizer(["A text.", "Another one."], padding=True, truncation=True, return_tensors="pt")',
        "print(model(**inputs).logits)",
    ]
    where = 'folder = "."  # the folder of this file'
    if not stratified.is_adapter:
        return [
            f"from transformers import {auto}, AutoTokenizer",
            "",
            where,
            f"model = {auto}.from_pretrained(folder).eval()",
            *use,
        ]
    head = []
    if suffix.endswith("Classification"):
        config = model.config
        head = [f"    num_labels={config.num_labels},", f"    id2label={config.id2label!r},"]
        head.append(f"    label2id={config.label2id!r},")
        if config.problem_type is not None:
            head.append(f"    problem_type={config.problem_type!r},")
    return [
        "from peft import PeftConfig, PeftModel",
        f"from transformers import {auto}, AutoTokenizer",
        "",
        where,
        "config = PeftConfig.from_pretrained(folder)",
        f"base = {auto}.from_pretrained(",
        "    config.base_model_name_or_path,",
        '    revision=config.revision or "main",',
        *head,
        ")",
        "model = PeftModel.from_pretrained(base, folder).eval()",
        *use,
    ]


def _adapter_config(config: Any) -> dict[str, Any]:
    content = config.to_dict()
    if content.get("modules_to_save"):  # PEFT adds its own names of a task's head to those that we gave
        content["modules_to_save"] = list(dict.fromkeys(content["modules_to_save"]))
    return {k: sorted(v) if isinstance(v, set) else getattr(v, "value", v) for k, v in content.items()}


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    cpu = {n: t.detach().cpu().contiguous().clone() for n, t in sorted(tensors.items())}
    io.atomic_write(path, lambda p: save_file(cpu, str(p), metadata={"format": "pt"}))


def _bytes(tensor: torch.Tensor) -> bytes:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
