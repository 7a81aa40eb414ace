"""Configuration tests bring their own plug-ins, which lie beside them."""

from pathlib import Path

import pytest

from tests.helpers.config import SMALLEST, write


@pytest.fixture
def smallest(tmp_path, monkeypatch) -> Path:
    """A file with the smallest configuration that loads."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent)
    return write(tmp_path / "smallest.yaml", SMALLEST)
