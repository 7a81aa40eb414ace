"""Which files a configuration names by a relative path: a job looks for them in what was uploaded with it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from acpo_dist.config.schema import Config

_WRITTEN = ("run.dir", "model.memory.embedding_cache")
"""Made by the run itself."""
_NO_FILES = ("toy", "none")
"""What `data.prompts` may be besides a file."""


def relative_files(config: Config) -> dict[str, str]:
    """Key -> relative path of a file or folder that the run will read.

    A text that may as well be a name (of a hub's repository, of a shipped file) counts where such a file is here.
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
