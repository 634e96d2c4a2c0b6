"""strata.yaml in and out: text with line numbers to a plan, and a plan to text that people can edit."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from spafit.errors import ConfigError, did_you_mean
from spafit.fields import FieldError, FieldPath, Origin, integer, within
from spafit.strata import SCHEMA_VERSION, StrataConfig
from spafit.stratum import METHODS, PLACES, LoraOptions, Outside, PeftOptions, Stratum

_OPTIONS = ("lora", "bitfit", "ia3", "peft", "learning_rate", "weight_decay")
_SCALARS = {f"tag:yaml.org,2002:{t}" for t in ("str", "int", "float", "bool", "null")}
#: Longest entry of provenance, in characters, that is written on one line.
_ONE_LINE = 100
#: Numbers such as 1e-5, which YAML 1.1 takes for text.
_EXPONENT = (r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$", "-+0123456789")


class _Loader(yaml.SafeLoader):
    """Safe loader that keeps dates as text and refuses aliases, with which a file can explode or hold itself."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(
                None, None, "aliases (*name) are not supported; write the value out", self.peek_event().start_mark
            )
        return super().compose_node(parent, index)


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
    pattern, first = _EXPONENT
    for cls in (_Loader, _Dumper):
        cls.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(pattern), list(first))
    _Loader.yaml_implicit_resolvers = {
        key: [(tag, rule) for tag, rule in rules if tag != "tag:yaml.org,2002:timestamp"]
        for key, rules in _Loader.yaml_implicit_resolvers.items()
    }
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
    lines: dict[FieldPath, int] = {}
    origin = Origin(file, lines)
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            content = _build(node, (), lines, loader) if node is not None else None
        finally:
            loader.dispose()
        return config_from_plain(content, origin=origin)
    except FieldError as error:
        raise origin.locate(error) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error).splitlines()[0]
        raise ConfigError(f"{file}{where}: not readable as YAML: {problem}.") from None
    except RecursionError:
        raise ConfigError(f"{file}: nested too deeply to be a strata file.") from None


def _build(node: yaml.Node, path: FieldPath, lines: dict[FieldPath, int], loader: _Loader) -> Any:
    """Plain content of a node; records the line of every field."""
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        content: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            merges = key_node.value == "<<" and key_node.style is None
            if not isinstance(key_node, yaml.ScalarNode) or merges:
                lines[(*path, "<<")] = line
                raise FieldError((*path, "<<"), "keys must be plain words; merge keys are not supported.")
            key = _text_of(key_node.value)
            lines[(*path, key)] = line
            if key in content:
                raise FieldError((*path, key), f"the field {key!r} stands here twice. Remove one.")
            content[key] = _build(value_node, (*path, key), lines, loader)
        return content
    if isinstance(node, yaml.SequenceNode):
        return [_build(child, (*path, i), lines, loader) for i, child in enumerate(node.value)]
    if node.tag not in _SCALARS:
        raise FieldError(path, f"the tag {node.tag!r} is not supported; write texts, numbers, lists and mappings.")
    try:
        value = loader.construct_object(node)
    except (ValueError, OverflowError) as error:
        raise FieldError(path, f"{node.value[:40]!r} cannot be read ({error}).") from None
    return _text_of(value) if isinstance(value, str) else value


def _text_of(value: str) -> str:
    r"""JSON spells characters beyond 16 bits as two escapes (\\ud83d\\ude00); join them."""
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _fields(
    content: Any,
    path: FieldPath,
    required: tuple[str, ...],
    optional: tuple[str, ...],
    ignored: list[str] | None,
) -> dict[str, Any]:
    """Check a mapping's keys. ``ignored`` is None, or the list that takes the unknown fields of a newer file."""
    allowed = (*required, *optional)
    if not isinstance(content, dict):
        raise FieldError(path, f"got {content!r}; write a mapping with the fields {', '.join(allowed)}.")
    for key in content:
        if key not in allowed:
            if ignored is None:
                raise FieldError(
                    (*path, key), f"unknown field {key!r}. Allowed: {', '.join(allowed)}.{did_you_mean(key, allowed)}"
                )
            ignored.append(".".join(map(str, (*path, key))))
    for key in required:
        if key not in content:
            raise FieldError(path, f"the field {key!r} is missing. Add it.")
    return {k: v for k, v in content.items() if k in allowed}


def _list(content: Any, path: FieldPath) -> list[Any]:
    if not isinstance(content, list):
        raise FieldError(path, f"got {content!r}; write a list.")
    return content


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
    top = _fields(content, (), ("schema_version", "model", "strata"), ("outside", "provenance"), ignored)
    model = _fields(top["model"], ("model",), ("id", "blocks"), (), ignored)
    strata = []
    for i, entry in enumerate(_list(top["strata"], ("strata",))):
        path: FieldPath = ("strata", i)
        got = _fields(entry, path, ("stack", "blocks", "method"), _OPTIONS, ignored)
        for option in _OPTIONS:
            if option in got and got[option] is None:
                raise FieldError((*path, option), "nothing stands here. Write the options, or remove the field.")
        with within(*path):
            if "lora" in got:
                known = ("rank", "alpha", "dropout", "targets", "rslora")
                options = _fields(got["lora"], ("lora",), (), known, ignored)
                with within("lora"):
                    got["lora"] = LoraOptions(**options)
            if "peft" in got:
                options = _fields(got["peft"], ("peft",), (), ("targets", "options"), ignored)
                with within("peft"):
                    got["peft"] = PeftOptions(**options)
            strata.append(Stratum(**got))
    around_fields = (*PLACES, "learning_rate", "weight_decay")
    outside = _fields(top.get("outside", {}), ("outside",), (), around_fields, ignored)
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


def plain_from_config(config: StrataConfig) -> dict[str, Any]:
    """Plain objects with the file's keys in the file's order; what equals a default that nobody edits is left out."""
    strata = []
    for s in config.strata:
        entry: dict[str, Any] = {"stack": s.stack, "blocks": list(s.blocks), "method": s.method}
        if s.lora is not None:
            alpha = s.lora.alpha
            entry["lora"] = {
                "rank": s.lora.rank,
                "alpha": int(alpha) if alpha is not None and float(alpha).is_integer() else alpha,
                "dropout": s.lora.dropout,
                "targets": list(s.lora.targets),
            }
            if s.lora.rslora:
                entry["lora"]["rslora"] = True
        for option in ("bitfit", "ia3"):
            if getattr(s, option) is not None:
                entry[option] = list(getattr(s, option))
        if s.peft is not None:
            entry["peft"] = {"targets": list(s.peft.targets)}
            if s.peft.options:
                entry["peft"]["options"] = json.loads(json.dumps(s.peft.options))
        strata.append(entry | _optimizer_fields(s))
    outside: dict[str, Any] = {place: getattr(config.outside, place) for place in PLACES}
    if outside["final_norm"] == "freeze":
        del outside["final_norm"]
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
