"""Installed distributions: their versions, and one whose import is left until it is needed."""

import sys
from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the version of each installed distribution; distributions that are not installed are omitted."""
    found: dict[str, str] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def leave_out_bitsandbytes() -> None:
    """Keep diffusers, transformers and peft from importing bitsandbytes; call it before they are imported.

    They import it wherever it is installed, for quantised models. It costs a sixth of a process's start and prints
    warnings about kernels, and is used here by one optimiser only, through `import_bitsandbytes`.
    """
    # None makes `import` fail and `find_spec` find nothing.
    sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]


def import_bitsandbytes() -> ModuleType:
    """Import bitsandbytes, whether or not it was left out.

    Raises:
        ImportError: it is not installed.
    """
    entry: Any = sys.modules.get("bitsandbytes", sys)
    if entry is None:
        del sys.modules["bitsandbytes"]
    return import_module("bitsandbytes")
