"""Plug-ins of the configuration tests."""

from pathlib import Path

import pytest

from tests.helpers.config import SMALLEST, write


@pytest.fixture
def smallest(tmp_path, monkeypatch) -> Path:
    """Write the smallest configuration that loads."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent)
    return write(tmp_path / "smallest.yaml", SMALLEST)
