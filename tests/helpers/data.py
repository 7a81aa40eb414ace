"""Public data sets that some tests read; they are not part of the repository (CONTRIBUTING.md lists them)."""

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("ACPO_TEST_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
"""Folder of the data sets: ACPO_TEST_DATA, by default `../shared/data` seen from the repository."""


def needs(*names: str) -> pytest.MarkDecorator:
    """Skip a test where the folder lacks one of these files or folders."""
    absent = [name for name in names if not (DATA / name).exists()]
    return pytest.mark.skipif(
        bool(absent), reason=f"needs {', '.join(absent)}: set ACPO_TEST_DATA to a folder that holds them"
    )


def shared(name: str) -> Path:
    """Return the path of a file of the data sets, or skip the test."""
    if not (DATA / name).is_file():
        pytest.skip(f"needs {name}: set ACPO_TEST_DATA to a folder that holds it")
    return DATA / name
