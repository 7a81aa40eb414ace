"""YAML as configurations use it: numbers as in every other language, and no key twice."""

import re
from typing import Any

import yaml
from yaml.composer import ComposerError

from acpo_dist.core.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """Reads 1e-4 as a number, as every other language does, and refuses a key that is set twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise ComposerError(None, None, f"`{key.value}` is set twice", key.start_mark)
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes a text such as `1e5`, which `_Loader` would read back as a number."""


for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
        list("-+0123456789."),
    )
# YAML 1.1 reads 010 as 8 and 1:30 as 90. Here a number is decimal, or hexadecimal with 0x.
_INTEGER = "tag:yaml.org,2002:int"
_DECIMAL = re.compile(r"^[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$")
for _first, _resolvers in list(_Loader.yaml_implicit_resolvers.items()):
    _Loader.yaml_implicit_resolvers[_first] = [
        (tag, _DECIMAL if tag == _INTEGER else pattern) for tag, pattern in _resolvers
    ]


def read_yaml(text: str) -> Any:
    """Plain data from YAML.

    Raises:
        ConfigError: not YAML, or a key that is set twice; says where.
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        raise ConfigError(f"not valid YAML: {error}") from error


def write_yaml(value: Any) -> str:
    """YAML that `read_yaml` reads back to the same data."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
