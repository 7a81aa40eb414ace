"""Plug-ins of the configuration tests, and one undisturbed run for tests that read or continue one."""

from pathlib import Path

import pytest

from tests.helpers.config import SMALLEST, write
from tests.helpers.runs import PLAIN


@pytest.fixture
def smallest(tmp_path, monkeypatch) -> Path:
    """Write the smallest configuration that loads."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent)
    return write(tmp_path / "smallest.yaml", SMALLEST)


@pytest.fixture(scope="session")
def plain_run(tmp_path_factory):
    """Result of an undisturbed run of `toy_sdxl` with TINY and PLAIN; only to be read: a test that writes copies it."""
    from acpo_dist.config.load import load_config
    from acpo_dist.tracking.console import Console
    from acpo_dist.training.local import open_ports
    from acpo_dist.training.run import drive
    from tests.conftest import TINY

    root = tmp_path_factory.mktemp("plain") / "run"
    return drive(load_config("toy_sdxl", [*TINY, *PLAIN, f"run.dir={root}"]), open_ports, Console(quiet=True))
