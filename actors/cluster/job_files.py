"""Files that a configuration names by a relative path, which a job reads from its uploaded folder."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from acpo_dist.config.schema import Config

_WRITTEN = ("run.dir", "model.memory.embedding_cache")
"""Keys of files that the run itself writes."""
_NO_FILES = ("toy", "none")
"""Values of `data.prompts` that are no files."""


def relative_files(config: Config) -> dict[str, str]:
    """Return key -> relative path of the files and folders that the run reads.

    A text that may also be a name (of a hub repository, of a shipped file) counts if such a file exists here.
    """
    found: dict[str, str] = {}
    for key, value in _leaves(config, ""):
        path, text = Path(value), str(value)
        if key in _WRITTEN or path.is_absolute() or text.startswith("~"):
            continue
        certain = isinstance(value, Path) or text.startswith(".")
        if key == "data.prompts":
            certain = text not in _NO_FILES
        maybe = "/" in text or bool(path.suffix)
        if certain or (maybe and path.exists()):
            found[key] = text
    return found


def _leaves(value: Any, key: str) -> Iterator[tuple[str, str | Path]]:
    if isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _leaves(getattr(value, name), f"{key}.{name}".lstrip("."))
    elif isinstance(value, dict):
        for name, one in value.items():
            yield from _leaves(one, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for index, one in enumerate(value):
            yield from _leaves(one, f"{key}.{index}")
    elif isinstance(value, str | Path) and str(value):
        yield key, value
