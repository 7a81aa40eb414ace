"""Structure of the project beyond the linter: optional dependencies are optional, and the wheel is complete."""

import ast
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("acpo_dist", "actors")
MAX_LINES = 400

EXTRAS = ("ray", "deepspeed", "mlflow", "pyiqa")
# The modules that need an extra as soon as they are imported.
DOORS = {"acpo_dist.workers.learner.zero": "deepspeed"}

# Home and work folders of somebody's machine. The image that Ray publishes has its home under /home/ray.
MACHINE_PATH = re.compile(r"(?<![\w.~)>}*-])/(?:work|root|home|Users)/(?!ray\b)[\w.-]+|\b[A-Z]:\\+Users\\+\w")

IMPORT_WITHOUT = """
import importlib, json, sys
answers = []
for extras, modules in json.loads(sys.argv[1]):
    for extra in extras:
        sys.modules[extra] = None
    failures = {}
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {error}"
    loaded = sorted({name.partition(".")[0] for name, module in sys.modules.items() if module is not None})
    answers.append([failures, loaded])
sys.stdout.write("\\n" + json.dumps(answers))
"""

Imported = tuple[dict[str, str], list[str]]
"""Failures by module, and top-level names that are loaded."""


def import_without(*steps: tuple[tuple[str, ...], list[str]]) -> list[Imported]:
    """Import modules in a fresh interpreter where extras are missing, step by step: (missing extras, modules)."""
    arguments = [sys.executable, "-c", IMPORT_WITHOUT, json.dumps(steps)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def imported() -> list[Imported]:
    """The loop without Ray, and then the library without any extra."""
    modules = [name for name in library_modules() if name not in DOORS]
    return import_without((("ray",), ["acpo_dist.training.loop"]), (EXTRAS, modules))


def library_modules() -> list[str]:
    """Every module of the library below the command line."""
    names = []
    for path in sorted((ROOT / "acpo_dist").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return [name for name in names if name.split(".")[1:2] not in (["cli"], ["__main__"])]


def python_files() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def listed_files() -> list[Path]:
    """Files that are committed, or would be committed by `git add`."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60, check=False)
    except FileNotFoundError:
        pytest.skip("needs git to know which files are committed, found none")
    if done.returncode != 0:
        pytest.skip(f"needs a git checkout: {done.stderr.decode(errors='replace').strip()}")
    paths = [ROOT / name for name in done.stdout.decode().split("\0") if name]
    return [path for path in paths if path.is_file()]


def test_the_loop_knows_neither_ray_nor_deepspeed(imported: list[Imported]):
    failures, loaded = imported[0]
    assert failures == {}
    assert not {"actors", "deepspeed", "mlflow", "pyiqa"} & set(loaded)


def test_the_library_imports_without_any_optional_extra(imported: list[Imported]):
    failures, _ = imported[1]
    assert failures == {}


@pytest.mark.parametrize(("module", "needed"), DOORS.items())
def test_an_optional_dependency_needs_only_its_own_extra(module: str, needed: str):
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"needs {needed}, found none")
    ((failures, _),) = import_without((tuple(extra for extra in EXTRAS if extra != needed), [module]))
    assert failures == {}


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the files in a wheel built from this checkout, without its metadata."""
    folder = tmp_path_factory.mktemp("wheel")
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("needs hatchling to build a wheel without a network, found none")
    command = f"from hatchling.build import build_wheel; build_wheel({str(folder)!r})"
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    return {name for name in names if not name.partition("/")[0].endswith(".dist-info")}


def test_the_wheel_holds_both_packages_and_nothing_beside_them(wheel_names: set[str]):
    assert {name.partition("/")[0] for name in wheel_names} == set(PACKAGES)


def test_the_wheel_misses_no_file_of_the_packages_and_no_configuration(wheel_names: set[str]):
    relative = {path.relative_to(ROOT).as_posix() for path in listed_files()}
    packaged = {name for name in relative if name.startswith(tuple(f"{package}/" for package in PACKAGES))}
    configs = {
        f"acpo_dist/_configs/{name.removeprefix('configs/')}" for name in relative if name.startswith("configs/")
    }
    assert wheel_names == packaged | configs


def test_the_wheel_ships_the_toy_assets(wheel_names: set[str]):
    assets = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "acpo_dist/data/toy/assets").rglob("*") if path.is_file()
    }
    if not assets:
        pytest.skip("needs acpo_dist/data/toy/assets: run `make toy`")
    assert assets <= wheel_names


def test_no_other_distribution_claims_our_package_names():
    owners = importlib.metadata.packages_distributions()
    assert {owner for package in PACKAGES for owner in owners.get(package, [])} <= {"acpo-dist"}


def test_no_file_names_a_path_of_one_machine():
    found = []
    for path in listed_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            if match := MACHINE_PATH.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match.group()}")
    assert found == []


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("cd " + "/wo" + "rk/main", True),
        ('"' + "/ho" + 'me/ann/x"', True),
        ("C:" + "\\Users\\ann", True),
        ("file://" + "/ro" + "ot/x", True),
        ("/home/ray/acpo", False),
        ("docs/work/plan.md", False),
        ("https://example.org/home/page", False),
        ("/tmp/ray", False),
    ],
)
def test_the_machine_path_pattern_tells_machines_from_addresses(line: str, named: bool):
    assert bool(MACHINE_PATH.search(line)) is named


def test_no_module_is_longer_than_a_reader_can_hold():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in python_files()
    }
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_nothing_prints():
    calls = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in python_files()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert calls == []


def test_private_names_of_ray_are_imported_in_one_file_only():
    private = re.compile(r"^ray\.(.*\.)?(_\w+|generated)(\.|$)|^ray\.(experimental\.internal_kv|core\.generated)(\.|$)")
    files = [*python_files(), *(ROOT / "benchmarks").rglob("*.py")]
    found = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Attribute):
                names = [ast.unparse(node)]
            found += [f"{path.relative_to(ROOT)}:{node.lineno}: {name}" for name in names if private.search(name)]
    assert {line.partition(":")[0] for line in found} == {"actors/ray_private.py"}, "\n".join(found)
