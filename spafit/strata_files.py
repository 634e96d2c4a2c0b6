"""strata.yaml in and out: text with line numbers to a plan, and a plan to text that people can edit."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from spafit.errors import ConfigError
from spafit.fields import FieldError, FieldPath, Origin, integer, within
from spafit.strata import SCHEMA_VERSION, StrataConfig
from spafit.stratum import CROSS_TARGETS, METHODS, PLACES, CrossOptions, LoraOptions, Outside, PeftOptions, Stratum
from spafit.yaml_fields import entries, mapping, read_fields, resolve_exponents

_OPTIONS = ("lora", "bitfit", "bias_added", "ia3", "peft", "cross", "learning_rate", "weight_decay")
#: Longest entry of provenance, in characters, that is written on one line.
_ONE_LINE = 100


class _Dumper(yaml.SafeDumper):
    """Safe dumper that indents lists under their key and never writes aliases."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        return True


class _FlowMap(dict):
    """A mapping that is written on one line."""


class _FlowList(list):
    """A list that is written on one line."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    # PyYAML writes rare line breaks bare into single quotes, from where they read back as spaces.
    style = '"' if any(c in text for c in "\n\r\x85\u2028\u2029\ufeff") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _adapt_yaml() -> None:
    resolve_exponents(_Dumper)
    _Dumper.add_representer(str, _represent_text)
    _Dumper.add_representer(
        _FlowMap, lambda dumper, data: dumper.represent_mapping("tag:yaml.org,2002:map", data, flow_style=True)
    )
    _Dumper.add_representer(
        _FlowList, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)
    )


_adapt_yaml()


def load(path: Path) -> StrataConfig:
    """Read ``path`` as YAML, or as JSON where its suffix is ``.json``; see :meth:`StrataConfig.load`."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror or error}. Check the path.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    return parse(text, file=str(path), kind="json" if path.suffix == ".json" else "yaml")


def parse(text: str, *, file: str, kind: Literal["yaml", "json"]) -> StrataConfig:
    """Read a plan from text.

    Raises:
        ConfigError: ``file``, line, field, what was got, what is allowed, and the remedy.

    Warns:
        UserWarning: the text's schema version is newer than this package's; its unknown fields are ignored.
    """
    if kind == "json":
        try:
            json.loads(text)
        except ValueError as error:
            line = getattr(error, "lineno", 1)
            raise ConfigError(f"{file}, line {line}: not JSON ({getattr(error, 'msg', error)}). Mend it.") from None
        # Tabs between tokens are JSON but not YAML; inside JSON texts they cannot occur.
        text = text.replace("\t", " ")
    return read_fields(
        text, file=file, what="a strata file", build=lambda content, origin: config_from_plain(content, origin=origin)
    )


def config_from_plain(content: Any, *, origin: Origin | None = None) -> StrataConfig:
    """Build a plan from plain objects (mappings, lists, texts, numbers) with the file's keys.

    Raises:
        FieldError: a :class:`~spafit.errors.ConfigError` that names the field.
    """
    if content is None:
        raise FieldError(
            (), "the file is empty. Start from a preset: StrataConfig.preset('spafit-scaled-I', …).save()."
        )
    if not isinstance(content, dict):
        raise FieldError(
            (), f"got a {type(content).__name__}; a strata file is a mapping with schema_version, model, …"
        )
    if "schema_version" not in content:
        raise FieldError((), f"the field 'schema_version' is missing. Add schema_version: {SCHEMA_VERSION}.")
    version = integer(content["schema_version"], ("schema_version",), minimum=1)
    ignored: list[str] | None = [] if version > SCHEMA_VERSION else None
    top = mapping(content, (), ("schema_version", "model", "strata"), ("outside", "provenance"), ignored)
    model = mapping(top["model"], ("model",), ("id", "blocks"), (), ignored)
    strata = []
    for i, entry in enumerate(entries(top["strata"], ("strata",))):
        path: FieldPath = ("strata", i)
        got = mapping(entry, path, ("stack", "blocks", "method"), _OPTIONS, ignored)
        for option in _OPTIONS:
            if option in got and got[option] is None:
                raise FieldError((*path, option), "nothing stands here. Write the options, or remove the field.")
        with within(*path):
            if "lora" in got:
                got["lora"] = _lora_from_plain(got["lora"], ignored)
            if "cross" in got:
                options = mapping(got["cross"], ("cross",), ("method",), ("lora",), ignored)
                with within("cross"):
                    if "lora" in options:
                        options["lora"] = _lora_from_plain(options["lora"], ignored, targets=CROSS_TARGETS)
                    got["cross"] = CrossOptions(**options)
            if "peft" in got:
                options = mapping(got["peft"], ("peft",), (), ("targets", "options"), ignored)
                with within("peft"):
                    got["peft"] = PeftOptions(**options)
            strata.append(Stratum(**got))
    around_fields = (*PLACES, "learning_rate", "weight_decay")
    outside = mapping(top.get("outside", {}), ("outside",), (), around_fields, ignored)
    for option, value in outside.items():
        if value is None:
            raise FieldError(("outside", option), "nothing stands here. Write a value, or remove the field.")
    with within("outside"):
        around = Outside(**outside)
    provenance = top.get("provenance", {})
    if not isinstance(provenance, Mapping):
        raise FieldError(("provenance",), f"got {provenance!r}; write a mapping: {{source: …, tested: false}}.")
    config = StrataConfig(model["id"], model["blocks"], tuple(strata), around, provenance, origin)
    if ignored is not None:
        name = origin.file if origin else "The strata configuration"
        fields = f" Ignored: {', '.join(ignored)}." if ignored else ""
        warnings.warn(
            f"{name} has schema version {version}, newer than this package's {SCHEMA_VERSION}; fields that are not "
            f"known here are ignored.{fields} Upgrade spafit to use them.",
            UserWarning,
            stacklevel=4,
        )
    return config


def _lora_from_plain(content: Any, ignored: list[str] | None, **defaults: Any) -> LoraOptions:
    options = mapping(content, ("lora",), (), ("rank", "alpha", "dropout", "targets", "rslora"), ignored)
    with within("lora"):
        return LoraOptions(**{**defaults, **options})


def _plain_from_lora(lora: LoraOptions) -> dict[str, Any]:
    alpha = lora.alpha
    plain: dict[str, Any] = {
        "rank": lora.rank,
        "alpha": int(alpha) if alpha is not None and float(alpha).is_integer() else alpha,
        "dropout": lora.dropout,
        "targets": list(lora.targets),
    }
    return {**plain, "rslora": True} if lora.rslora else plain


def plain_from_config(config: StrataConfig) -> dict[str, Any]:
    """Plain objects with the file's keys in the file's order; what equals a default that nobody edits is left out."""
    strata = []
    for s in config.strata:
        entry: dict[str, Any] = {"stack": s.stack, "blocks": list(s.blocks), "method": s.method}
        if s.lora is not None:
            entry["lora"] = _plain_from_lora(s.lora)
        for option in ("bitfit", "bias_added", "ia3"):
            if getattr(s, option) is not None:
                entry[option] = list(getattr(s, option))
        if s.peft is not None:
            entry["peft"] = {"targets": list(s.peft.targets)}
            if s.peft.options:
                entry["peft"]["options"] = json.loads(json.dumps(s.peft.options))
        if s.cross is not None:
            lora = {} if s.cross.lora is None else {"lora": _plain_from_lora(s.cross.lora)}
            entry["cross"] = {"method": s.cross.method, **lora}
        strata.append(entry | _optimizer_fields(s))
    outside: dict[str, Any] = {place: getattr(config.outside, place) for place in PLACES}
    for place in ("final_norm", "projector"):
        if outside[place] == "freeze":
            del outside[place]
    outside |= _optimizer_fields(config.outside)
    content: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "model": {"id": config.model_id, "blocks": dict(config.blocks)},
        "strata": strata,
        "outside": outside,
    }
    if config.provenance:
        content["provenance"] = json.loads(json.dumps(config.provenance))
    return content


def _optimizer_fields(part: Stratum | Outside) -> dict[str, float]:
    fields = {"learning_rate": part.learning_rate, "weight_decay": part.weight_decay}
    return {name: value for name, value in fields.items() if value is not None}


def _flow(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _FlowMap({k: _flow(v) for k, v in value.items()})
    return _FlowList(_flow(v) for v in value) if isinstance(value, list) else value


def _flow_if_short(value: Any) -> Any:
    """One line for what fits on one; a line per entry for the rest."""
    if len(str(value)) <= _ONE_LINE:
        return _flow(value)
    if isinstance(value, Mapping):
        return {k: _flow_if_short(v) for k, v in value.items()}
    return [_flow_if_short(v) for v in value] if isinstance(value, list) else value


def dump_yaml(config: StrataConfig) -> str:
    """YAML text: one line per small stratum, block style for the strata that carry options."""
    content = plain_from_config(config)
    content["model"], content["outside"] = _flow(content["model"]), _flow(content["outside"])
    content["strata"] = [_flow(s) if len(s) == 3 else {k: _flow(v) for k, v in s.items()} for s in content["strata"]]
    if "provenance" in content:
        content["provenance"] = {k: _flow_if_short(v) for k, v in content["provenance"].items()}
    first = range(*config.strata[0].blocks)
    said = f"blocks {first[0]} to {first[-1]}" if len(first) > 1 else f"block {first[0]}"
    comments = [
        f"# Block ranges are half-open: [{first.start}, {first.stop}] is {said}; block 0 follows the embeddings.",
        f"# Methods: {', '.join(METHODS)}.",
    ]
    if any(s.lora is not None for s in config.strata):
        comments.append(
            "# LoRA's alpha and dropout, where nobody set them, are this project's defaults, not the paper's."
        )
    body = yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=False)
    return "\n".join(comments) + "\n" + body


def dump_json(config: StrataConfig) -> str:
    """JSON text with the same content; ASCII only, so that any reader takes it."""
    text = json.dumps(plain_from_config(config), indent=1, allow_nan=False)
    # DEL is the one ASCII character that JSON leaves bare and YAML's reader, which gives the line numbers, refuses.
    return text.replace("\x7f", "\\u007f") + "\n"
