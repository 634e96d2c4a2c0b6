"""YAML files whose fields are checked: each error names the file, the line and the field.

Plans, strata and hypotheses are read this way. Dates stay text, aliases and merge keys are refused, and 1e-5 is a
number.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import yaml

from spafit.errors import ConfigError, did_you_mean
from spafit.fields import FieldError, FieldPath, Origin

T = TypeVar("T")
_SCALARS = {f"tag:yaml.org,2002:{t}" for t in ("str", "int", "float", "bool", "null")}
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


def resolve_exponents(cls: Any) -> None:
    """Make a loader or dumper of PyYAML take numbers such as 1e-5 for numbers."""
    pattern, first = _EXPONENT
    cls.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(pattern), list(first))


resolve_exponents(_Loader)
_Loader.yaml_implicit_resolvers = {
    key: [(tag, rule) for tag, rule in rules if tag != "tag:yaml.org,2002:timestamp"]
    for key, rules in _Loader.yaml_implicit_resolvers.items()
}


def read_fields(source: str, *, file: str, what: str, build: Callable[[Any, Origin], T]) -> T:
    """Read text as YAML and build an object from its plain content.

    Args:
        source: the text.
        file: its name, for errors.
        what: what it should be, such as ``a strata file``.
        build: from plain content and where each field stands; raises :class:`FieldError` for a bad field.

    Raises:
        ConfigError: ``file``, line, field, what was got, what is allowed, and the remedy.
    """
    lines: dict[FieldPath, int] = {}
    origin = Origin(file, lines)
    try:
        loader = _Loader(source)
        try:
            node = loader.get_single_node()
            content = _build(node, (), lines, loader) if node is not None else None
        finally:
            loader.dispose()
        return build(content, origin)
    except FieldError as error:
        raise origin.locate(error) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error).splitlines()[0]
        raise ConfigError(f"{file}{where}: not readable as YAML: {problem}.") from None
    except RecursionError:
        raise ConfigError(f"{file}: nested too deeply to be {what}.") from None


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


def mapping(
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


def entries(content: Any, path: FieldPath) -> list[Any]:
    """Check that a field holds a list, and return it."""
    if not isinstance(content, list):
        raise FieldError(path, f"got {content!r}; write a list.")
    return content
