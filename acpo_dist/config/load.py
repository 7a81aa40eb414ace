"""Read configuration files: `extends`, `key=value` overrides, and errors that say where a value was set."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from acpo_dist.config.relations import check_relations
from acpo_dist.config.schema import Config
from acpo_dist.config.section import describe
from acpo_dist.config.yaml_text import read_yaml, write_yaml
from acpo_dist.core.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parents[1]
_SHIPPED = (_PACKAGE.parent / "configs", _PACKAGE / "_configs")


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Load a file by path, or a shipped one by name, apply overrides, and check it whole.

    Merge order: schema defaults, the `extends` chain, the file, the overrides. Mappings merge, lists replace; a
    mapping whose `type` changes is replaced.

    Raises:
        ConfigError: names the key, the value, where it is set and what is known.
    """
    path = find_config(source)
    merged = merge_overrides(_read_chain(path, ()), overrides)
    origin = str(source) + (f" with {' '.join(overrides)}" if overrides else "")
    return validate(merged, origin)


def validate(mapping: dict[str, Any], origin: str) -> Config:
    """Check plain data against the schema and the relations between sections."""
    try:
        config = Config.model_validate(mapping)
    except ValidationError as error:
        raise ConfigError(f"{origin}: {describe(error, Config)}") from error
    check_relations(config)
    return config


def merge_overrides(mapping: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Plain data with `key=value` overrides applied in order; the last one wins.

    A `type` empties its mapping, so it goes before what was set within that mapping: what is set beside a type must not
    depend on which of the two was typed first. It stays behind whatever sets the mapping itself.
    """
    for override in _types_first(overrides):
        mapping = _merge(mapping, parse_override(override))
    return mapping


def _types_first(overrides: Sequence[str]) -> list[str]:
    ordered: list[tuple[str, str]] = []
    for text in overrides:
        key = text.partition("=")[0].strip()
        place = len(ordered)
        if key.endswith(".type"):
            within = key.removesuffix("type")
            # What sets the mapping, one round it, or its type.
            barriers = [at for at, (other, _) in enumerate(ordered) if other == key or within.startswith(f"{other}.")]
            start = barriers[-1] + 1 if barriers else 0
            inside = [at for at in range(start, place) if ordered[at][0].startswith(within)]
            place = inside[0] if inside else place
        ordered.insert(place, (key, text))
    return [text for _, text in ordered]


def find_config(source: str | Path) -> Path:
    """A path as it is; else `NAME` or `configs/NAME.yaml` among the shipped files."""
    path = Path(source)
    if path.is_file():
        return path
    # Another folder is meant as it is: its missing file must not turn into a shipped one of the same name.
    for folder in _SHIPPED if str(path.parent) in (".", "configs") else ():
        for candidate in (folder / path.name, folder / f"{path.name}.yaml"):
            if candidate.is_file():
                return candidate
    raise ConfigError(
        f"no configuration file `{source}`. Shipped: {', '.join(shipped_configs()) or 'none'}; or give a path."
    )


def shipped_configs() -> list[str]:
    """Names of the configuration files that come with the package."""
    return sorted({path.stem for folder in _SHIPPED if folder.is_dir() for path in folder.glob("*.yaml")})


def parse_override(text: str) -> dict[str, Any]:
    """`a.b=value` as nested data, the value read as YAML."""
    key, separator, value = text.partition("=")
    if not separator or not all(key.split(".")):
        raise ConfigError(f"an override must read `section.key=value`, found `{text}`")
    try:
        parsed: Any = read_yaml(value)
    except ConfigError as error:
        raise ConfigError(f"the value of the override `{text}` is {error}") from error
    for part in reversed(key.split(".")):
        parsed = {part: parsed}
    return parsed


def dump(config: Config) -> str:
    """The whole configuration as YAML; loading it again gives the same configuration."""
    return write_yaml(config.to_mapping())


def _read_chain(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    resolved = path.resolve()
    if resolved in seen:
        raise ConfigError(f"{path}: `extends` goes in a circle: {' -> '.join(p.name for p in (*seen, resolved))}")
    try:
        mapping = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    mapping = {} if mapping is None else mapping
    if not isinstance(mapping, dict):
        raise ConfigError(f"{path}: expected sections at the top level, found {type(mapping).__name__}")
    parent = mapping.pop("extends", None)
    if parent is None:
        return mapping
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: `extends` names one configuration, found {parent!r}")
    beside = [path.parent / name for name in (parent, f"{parent}.yaml") if (path.parent / name).is_file()]
    base = _read_chain(beside[0] if beside else find_config(parent), (*seen, resolved))
    return _merge(base, mapping)


def _merge(base: dict[str, Any], over: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and value.get("type", old.get("type")) == old.get("type"):
            merged[key] = _merge(old, value, f"{prefix}{key}.")
        elif isinstance(old, list) and isinstance(value, dict) and value and all(str(part).isdigit() for part in value):
            merged[key] = _merge_items(f"{prefix}{key}", old, value)
        else:
            merged[key] = value
    return merged


def _merge_items(key: str, old: list[Any], over: dict[str, Any]) -> list[Any]:
    """`rewards.train.0.weight=2`: items of a list by index."""
    items = list(old)
    for index, value in over.items():
        if int(index) >= len(items):
            raise ConfigError(f"`{key}.{index}`: the list has {len(items)} entries, counted from 0")
        items[int(index)] = _merge({index: items[int(index)]}, {index: value}, f"{key}.")[index]
    return items
