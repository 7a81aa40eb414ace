"""Read configuration files: `extends`, `key=value` overrides, and errors that name the source of a value."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from acpo_dist.config.overrides import merge, merge_overrides
from acpo_dist.config.relations import check_relations
from acpo_dist.config.schema import Config
from acpo_dist.config.section import describe
from acpo_dist.config.yaml_text import read_yaml, write_yaml
from acpo_dist.core.errors import LONGEST, ConfigError, RewardConfigError, shorten
from acpo_dist.core.version import own_version

_PACKAGE = Path(__file__).resolve().parents[1]
_ORIGIN = 160
"""Maximum length of the description of a configuration's source in a message, in characters."""
_WRITER = "# acpo_dist "
_SHIPPED = (_PACKAGE.parent / "configs", _PACKAGE / "_configs")


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Load a file by path, or a shipped one by name, apply overrides, and validate it.

    Merge order: schema defaults, the `extends` chain, the file, the overrides. Mappings are merged, lists replaced; a
    mapping whose `type` changes is replaced.

    Args:
        source: path of a YAML file, or name of a shipped configuration.
        overrides: `key=value` texts.

    Raises:
        ConfigError: names the key, the value, where it is set and the known keys.
    """
    path = find_config(source)
    merged = merge_overrides(_read_chain(path, ()), overrides, Config)
    origin = str(source) + (f" with {' '.join(overrides)}" if overrides else "")
    try:
        return validate(merged, origin)
    except ConfigError as error:
        writer = writer_of(path)
        if writer in (None, own_version()):
            raise
        raise ConfigError(
            f"{path} was written by acpo_dist {writer}, this is {own_version()}: use that version, or edit the file. "
            f"{error}"
        ) from error


def validate(mapping: dict[str, Any], origin: str) -> Config:
    """Validate plain data against the schema and the relations between sections.

    Args:
        mapping: nested plain data, as in a configuration file.
        origin: source of the data, for messages.

    Raises:
        ConfigError: names the key, the value and the known keys.
    """
    try:
        config = Config.model_validate(mapping)
        check_relations(config)
    except ValidationError as error:
        raise ConfigError(f"{shorten(origin, _ORIGIN)}: {describe(error, Config)}") from error
    except RewardConfigError as error:
        raise RewardConfigError(shorten(str(error), LONGEST)) from error
    except OSError as error:
        raise ConfigError(f"{shorten(origin, _ORIGIN)}: a path cannot be checked: {shorten(str(error))}") from error
    return config


def find_config(source: str | Path) -> Path:
    """Return an existing path, or else the shipped file `NAME`, `configs/NAME.yaml`, or either below `papers/`."""
    path = Path(source)
    if path.is_file():
        return path
    # A missing file in another folder must not be replaced by a shipped one of the same name.
    inside = path.relative_to("configs") if path.parts[:1] == ("configs",) else path
    for folder in _SHIPPED if str(inside.parent) in (".", "papers") else ():
        for candidate in (folder / inside, folder / f"{inside}.yaml"):
            if candidate.is_file():
                return candidate
    raise ConfigError(
        f"no configuration file `{source}`. Shipped: {', '.join(shipped_configs()) or 'none'}; or give a path."
    )


def shipped_configs() -> list[str]:
    """Return the names of the shipped configuration files."""
    return sorted({path.stem for folder in _SHIPPED if folder.is_dir() for path in folder.glob("*.yaml")})


def dump(config: Config) -> str:
    """Return the complete configuration as YAML, with this version in the first line."""
    return f"{_WRITER}{own_version()}\n{write_yaml(config.to_mapping())}"


def writer_of(path: Path) -> str | None:
    """Return the version of acpo_dist that wrote a configuration file with `dump`; None for a file written by hand.

    A run's `resolved.yaml` without a version was written by a version that did not record it.
    """
    with path.open(encoding="utf-8", errors="replace") as file:
        first = file.readline(200)
    if first.startswith(_WRITER):
        return first.removeprefix(_WRITER).strip()
    return "of an earlier development version" if path.name == "resolved.yaml" else None


def _read_chain(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    resolved = path.resolve()
    if resolved in seen:
        raise ConfigError(f"{path}: `extends` is circular: {' -> '.join(p.name for p in (*seen, resolved))}")
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
    return merge(base, mapping)
