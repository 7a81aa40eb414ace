"""`key=value` overrides: the type of the key determines how its value is parsed."""

import re
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from acpo_dist.config.section import PluginField, Section
from acpo_dist.config.yaml_text import read_scalar, read_yaml
from acpo_dist.core.errors import ConfigError, quoted

_INDEX = re.compile(r"[0-9]{1,6}")
_DEEPEST = 16
_UNKNOWN = object()
"""Type of a key that no section has; validation rejects it by name."""


def merge_overrides(
    mapping: dict[str, Any], overrides: Sequence[str], schema: type[BaseModel] | None = None
) -> dict[str, Any]:
    """Apply `key=value` overrides to plain data, in order; the last one wins.

    A `type` replaces its mapping, so it is applied before values inside that mapping, whatever the order of the
    overrides, but after an override that sets the mapping itself.

    Args:
        mapping: nested plain data.
        overrides: `key=value` texts.
        schema: section whose annotations determine how values are parsed; None parses all as YAML.

    Raises:
        ConfigError: no `key=value`, or a value that is not YAML although the key's type requires YAML.
    """
    for override in _types_first(overrides):
        key, value = _split(override)
        found = _UNKNOWN if schema is None else _annotation(schema, key, mapping)
        try:
            parsed: Any = read_value(found, value)
        except ConfigError as error:
            raise ConfigError(f"the value of the override {quoted(override)} is {error}") from error
        for part in reversed(key):
            parsed = {part: parsed}
        mapping = merge(mapping, parsed)
    return mapping


def read_value(annotation: Any, text: str) -> Any:
    """Parse the value of an override.

    A key that takes text uses `text` literally; `null` is None if the key may be None. Numbers and switches are parsed
    as YAML scalars; lists, mappings and sections as YAML.

    Args:
        annotation: type of the key.
        text: the value as passed by the shell.
    """
    options = _options(annotation)
    scalar = read_scalar(text)
    if _takes_text(options):
        # An empty path would be the working directory.
        if type(None) in options and (text == "null" or (text == "" and str not in options)):
            return None
        lists = any(get_origin(option) in (tuple, list, dict) for option in options)
        if lists and text.lstrip()[:1] in ("[", "{"):
            return read_yaml(text, whole=True)
        other = {type(option.value) if isinstance(option, _Choice) else option for option in options}
        other = other - {str, Path, type(None)} | ({int} if float in other else set())
        return scalar if type(scalar) in other else text
    if annotation is _UNKNOWN or any(not _is_scalar(option) for option in options):
        return read_yaml(text, whole=True)
    return scalar


class _Choice:
    """One value of a `Literal`."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _options(annotation: Any) -> list[Any]:
    """Return the alternatives of a union, without `Annotated`; values of a `Literal` one by one."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _options(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [option for part in get_args(annotation) for option in _options(part)]
    if origin is Literal:
        return [_Choice(value) for value in get_args(annotation)]
    return [annotation]


def _takes_text(options: list[Any]) -> bool:
    return any(option in (str, Path) or (isinstance(option, _Choice) and isinstance(option.value, str))
               for option in options)  # fmt: skip


def _is_scalar(option: Any) -> bool:
    return isinstance(option, _Choice) or option in (bool, int, float, type(None))


def _annotation(schema: type[BaseModel], key: Sequence[str], mapping: Any) -> Any:
    """Return the type of a dotted key; for a plug-in's own keys by the `type` that is set in `mapping`."""
    annotation: Any = schema
    for part in key:
        section = _section(annotation, mapping)
        if section is not None:
            field = section.model_fields.get(part)
            annotation = _UNKNOWN if field is None else Annotated[field.annotation, *field.metadata, None]
        else:
            annotation = _item(annotation)
        if isinstance(mapping, dict):
            mapping = mapping.get(part)
        elif isinstance(mapping, list) and _INDEX.fullmatch(part) and int(part) < len(mapping):
            mapping = mapping[int(part)]
        else:
            mapping = None
    return annotation


def _section(annotation: Any, mapping: Any) -> type[Section] | None:
    metadata = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
    for plugin in metadata:
        if isinstance(plugin, PluginField):
            return plugin.section_of(mapping)
    found = [option for option in _options(annotation) if isinstance(option, type) and issubclass(option, Section)]
    return found[0] if found else None


def _item(annotation: Any) -> Any:
    """Return the type of the items of a tuple, or of the values of a mapping."""
    for option in _options(annotation):
        arguments = [part for part in get_args(option) if part is not Ellipsis]
        if arguments and get_origin(option) in (tuple, dict, list):
            return arguments[-1]
    return _UNKNOWN


def _split(text: str) -> tuple[list[str], str]:
    key, separator, value = text.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts) or len(parts) > _DEEPEST:
        raise ConfigError(f"an override must have the form `section.key=value`, found {quoted(text)}")
    return parts, value


def _types_first(overrides: Sequence[str]) -> list[str]:
    ordered: list[tuple[str, str]] = []
    for text in overrides:
        key = text.partition("=")[0].strip()
        place = len(ordered)
        if key.endswith(".type"):
            within = key.removesuffix("type")
            # Overrides that set the mapping, a parent of it, or its type.
            barriers = [at for at, (other, _) in enumerate(ordered) if other == key or within.startswith(f"{other}.")]
            start = barriers[-1] + 1 if barriers else 0
            inside = [at for at in range(start, place) if ordered[at][0].startswith(within)]
            place = inside[0] if inside else place
        ordered.insert(place, (key, text))
    return [text for _, text in ordered]


def merge(base: dict[str, Any], over: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Merge `over` into `base`: mappings are merged, lists replaced; a mapping whose `type` changes is replaced."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and value.get("type", old.get("type")) == old.get("type"):
            merged[key] = merge(old, value, f"{prefix}{key}.")
        elif isinstance(old, list) and isinstance(value, dict) and value and all(map(_is_index, value)):
            merged[key] = _merge_items(f"{prefix}{key}", old, value)
        else:
            merged[key] = value
    return merged


def _is_index(part: Any) -> bool:
    return _INDEX.fullmatch(str(part)) is not None


def _merge_items(key: str, old: list[Any], over: dict[str, Any]) -> list[Any]:
    """Set an item of a list by index, as in `rewards.train.0.weight=2`."""
    items = list(old)
    for index, value in over.items():
        if int(index) >= len(items):
            raise ConfigError(f"`{key}.{index}`: the list has {len(items)} entries, counted from 0")
        items[int(index)] = merge({index: items[int(index)]}, {index: value}, f"{key}.")[index]
    return items
