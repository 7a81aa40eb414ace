"""YAML for configurations: numbers as in other languages, and no duplicate keys."""

import re
from typing import Any

import yaml
from yaml.composer import ComposerError

from acpo_dist.core.errors import ConfigError, quoted, shorten

_MOST_VALUES = 100_000
"""Values of a document after its aliases are followed; a configuration has some hundred."""


class _Loader(yaml.SafeLoader):
    """Parses 1e-4 as a number, as other languages do, and rejects a key that is set twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise ComposerError(None, None, f"`{key.value}` is set twice", key.start_mark)
        return node


class _Dumper(yaml.CSafeDumper):
    """Quotes a text such as `1e5`, which `_Loader` would parse as a number."""


_INTEGER, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_PATTERNS = {
    # YAML 1.1 reads 010 as 8, 1:30 as 90 and 1e-4 as text. Here numbers are decimal, or hexadecimal with 0x.
    _INTEGER: re.compile(r"^[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$"),
    _FLOAT: re.compile(
        r"^([-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.[0-9]+([eE][-+]?[0-9]+)?)"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
    ),
}
for _yaml in (_Loader, _Dumper):
    _kept = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _PATTERNS]
        for first, resolvers in _yaml.yaml_implicit_resolvers.items()
    }
    _yaml.yaml_implicit_resolvers = _kept
    for _tag, _pattern in _PATTERNS.items():
        _yaml.add_implicit_resolver(_tag, _pattern, list("-+0123456789."))


def read_yaml(text: str, *, whole: bool = False) -> Any:
    """Parse YAML to plain data.

    Args:
        text: one document.
        whole: reject a comment after the value, which YAML would drop.

    Raises:
        ConfigError: not YAML, or a key that is set twice, with its position.
    """
    try:
        value = yaml.load(text, _Loader)
        tokens = yaml.scan(text, _Loader) if whole else ()
        ends = [token.end_mark.index for token in tokens if token.end_mark is not None]
        _require_small(value)
        rest = text[sorted(set(ends))[-2 if len(set(ends)) > 1 else -1] :].strip() if ends else ""
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        reason = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"not valid YAML: {shorten(reason)}{_place(error)}") from error
    if rest.startswith("#"):
        raise ConfigError(f"not valid here: {quoted(rest)} follows the value. Put a text with # into quotes.")
    return value


def _require_small(value: Any) -> None:
    """Refuse data that a few lines with anchors and aliases blow up to billions of values, or that contains itself.

    Raises:
        ValueError: more than `_MOST_VALUES` values, or a value within itself.
    """
    sizes: dict[int, int] = {}

    def count(part: Any) -> int:
        if not isinstance(part, dict | list):
            return 1
        if id(part) not in sizes:
            # Found again below itself: infinitely many.
            sizes[id(part)] = _MOST_VALUES + 1
            sizes[id(part)] = 1 + sum(map(count, part.values() if isinstance(part, dict) else part))
        return sizes[id(part)]

    if count(value) > _MOST_VALUES:
        raise ValueError(f"more than {_MOST_VALUES} values, or a value that contains itself")


def read_scalar(text: str) -> Any:
    """Parse a YAML scalar that spans all of `text`: null, switch or number; anything else is the text itself."""
    loader = _Loader("")
    stripped = text.strip()
    tag = loader.resolve(yaml.ScalarNode, stripped, (True, False))
    if tag.rpartition(":")[2] not in ("null", "bool", "int", "float"):
        return text
    try:
        return loader.construct_object(yaml.ScalarNode(tag, stripped))
    except (ValueError, OverflowError):
        return text


def _place(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    return f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""


def write_yaml(value: Any) -> str:
    """Return YAML that `read_yaml` parses to the same data."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
