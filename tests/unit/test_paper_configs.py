"""The papers' experiments in configs/papers: every file loads, and names the data that is missing in one line."""

from pathlib import Path

import pytest

from acpo_dist.config.load import find_config, load_config
from acpo_dist.preflight.doctor import configured
from acpo_dist.preflight.doctor.finding import run_checks
from tests.helpers.images import encode, image

PAPERS = sorted((Path(__file__).resolve().parents[2] / "configs/papers").glob("*.yaml"))
DATA_KEYS = ("path", "prompts", "pairs")


@pytest.fixture(autouse=True)
def online(monkeypatch):
    """A hub id counts as usable, as on a machine with network access; loading a configuration downloads nothing."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_every_configuration_of_a_paper_loads_and_is_named_after_its_file(path: Path):
    config = load_config(path)
    assert config.run.name == f"paper-{path.stem.replace('_', '-')}"


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_missing_data_is_named_in_one_line(path: Path, monkeypatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    config = load_config(path)
    wanted = {str(value) for key in DATA_KEYS if (value := getattr(config.data, key)) not in (None, "none")}
    failed = [one.found for one in run_checks(configured.data_checks(config)) if one.verdict == "failed"]
    assert len(failed) == len(wanted) > 0
    assert all(sum(name in text for text in failed) == 1 for name in wanted)
    assert all("\n" not in text for text in failed)


def test_the_data_checks_pass_on_a_stand_in(tmp_path: Path):
    (tmp_path / "faces").mkdir()
    for seed in range(2):
        (tmp_path / f"faces/{seed}.png").write_bytes(encode(image(seed, 64, 64)))
    config = load_config("papers/acpo_anime_faces", [f"data.path={tmp_path / 'faces'}"])
    findings = list(run_checks(configured.data_checks(config)))
    assert [one.verdict for one in findings] == ["ok"] and "64 x 64" in findings[0].found


def test_a_configuration_of_a_paper_is_found_by_its_short_name():
    assert find_config("papers/acpo_cifar10").name == "acpo_cifar10.yaml"
