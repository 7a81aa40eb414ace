"""docs/architecture.md is true: the files that it names exist, and its layers are those of the import contract."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "architecture.md"
SUFFIXES = ("py", "md", "yaml", "toml")
FILE = re.compile(rf"`([\w./-]+/[\w.-]+\.(?:{'|'.join(SUFFIXES)}))(?::\w+)?`")


def contract_layers() -> list[tuple[str, ...]]:
    """The layers of `pyproject.toml`, from the top; siblings share a layer."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = [one for one in settings["tool"]["importlinter"]["contracts"] if one["type"] == "layers"]
    return [tuple(name.strip() for name in line.split("|")) for line in contract["layers"]]


def page_layers(text: str) -> list[tuple[str, ...]]:
    """The first column of the table under the heading `Layers`."""
    section = re.split(r"^## ", text, flags=re.MULTILINE)
    (layers,) = [part for part in section if part.startswith("Layers")]
    cells = [line.split("|")[1] for line in layers.splitlines() if line.startswith("| `")]
    return [tuple(re.findall(r"`([\w.]+)`", cell)) for cell in cells]


@pytest.fixture(scope="module")
def text() -> str:
    return PAGE.read_text(encoding="utf-8")


def test_every_file_that_the_page_names_exists(text: str):
    named = sorted(set(FILE.findall(text)))
    assert named, f"{PAGE} names no file in backquotes"
    absent = [name for name in named if not any((base / name).is_file() for base in (ROOT, ROOT / "acpo_dist"))]
    assert absent == [], f"{PAGE} names files that do not exist, neither from the root nor from acpo_dist/: {absent}"


def test_the_layers_of_the_page_are_those_of_the_import_contract(text: str):
    page, contract = page_layers(text), contract_layers()
    missing, unknown = [one for one in contract if one not in page], [one for one in page if one not in contract]
    assert page == contract, f"{PAGE}: missing layers {missing}; not in pyproject.toml {unknown}; or another order"


def test_every_layer_is_a_package_that_exists():
    for name in (name for layer in contract_layers() for name in layer):
        folder = ROOT / name.replace(".", "/")
        assert folder.is_dir() or folder.with_suffix(".py").is_file(), f"pyproject.toml names {name}, which is absent"
