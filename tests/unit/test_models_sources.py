"""Models that cannot be loaded are named with the reason; old and downloaded layouts load."""

import itertools
import math
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import constants as hub_constants

from acpo_dist.core.errors import ModelError
from acpo_dist.models.config import TuningConfig
from acpo_dist.models.family import copy_weights
from tests.helpers.models import ASSETS, FAMILIES, answer, answer_of, every_family, load, toy_copy

# Models that cannot be loaded


def test_a_folder_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(ModelError, match=r"absent`, found nothing"):
        load("sdxl", path=str(tmp_path / "absent"))


@every_family
def test_a_folder_without_a_pipeline_is_named(kind: str, tmp_path: Path):
    with pytest.raises(ModelError, match=rf"{tmp_path.name}`, found a folder without model_index\.json"):
        load(kind, path=str(tmp_path))


def test_an_unknown_toy_is_refused_with_those_there_are():
    with pytest.raises(ModelError, match="`toy-flux`; embedded: toy-ddpm, toy-flow, toy-sd15, toy-sdxl"):
        load("sdxl", path="toy-flux")


@pytest.mark.parametrize(
    ("kind", "part", "file"),
    [
        ("sdxl", "unet", "diffusion_pytorch_model.safetensors"),
        ("sdxl", "vae", "diffusion_pytorch_model.safetensors"),
        ("sdxl", "text_encoder", "model.safetensors"),
        ("sdxl", "text_encoder_2", "model.safetensors"),
        ("sdxl", "unet", "config.json"),
        ("sd15", "unet", "diffusion_pytorch_model.safetensors"),
        ("sd15", "text_encoder", "model.safetensors"),
        ("ddpm", "unet", "diffusion_pytorch_model.safetensors"),
    ],
)
@pytest.mark.parametrize("kept", [0.0, 0.5], ids=["emptied", "halved"])
def test_a_truncated_file_is_an_error_that_names_part_and_folder(
    kind: str, part: str, file: str, kept: float, tmp_path: Path
):
    folder = toy_copy(kind, tmp_path)
    whole = (folder / part / file).read_bytes()
    (folder / part / file).write_bytes(whole[: math.floor(kept * len(whole))])
    with pytest.raises(ModelError, match=rf"`{part}` of `{folder}` cannot be loaded"):
        load(kind, path=str(folder))


@pytest.mark.parametrize(("kind", "other"), [*itertools.permutations(FAMILIES, 2)])
def test_one_familys_pipeline_is_not_anothers(kind: str, other: str):
    with pytest.raises(ModelError, match=f"toy-{other}"):
        load(kind, path=f"toy-{other}")


@every_family
def test_tuning_targets_that_fit_no_module_are_refused(kind: str):
    with pytest.raises(ModelError, match=r"model\.tuning\.targets \['to_nowhere'\]"):
        load(kind, TuningConfig(targets=("to_nowhere",)))


# Where models come from


def flat_ddpm(folder: Path) -> Path:
    """toy-ddpm in the layout of the first DDPM repositories: all files at the top level."""
    folder.mkdir(parents=True)
    for file in (ASSETS / "toy-ddpm").rglob("*.*"):
        shutil.copy(file, folder)
    return folder


def test_an_old_ddpm_folder_with_its_files_at_the_top_loads_and_saves(tmp_path: Path):
    family = load("ddpm", path=str(flat_ddpm(tmp_path / "flat")))
    assert torch.equal(answer(family), answer(load("ddpm")))
    family.save_pipeline(tmp_path / "out")
    opened = DiffusionPipeline.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(answer_of(opened, family), answer(family), rtol=0, atol=1e-5)


@pytest.mark.parametrize("flat", [False, True], ids=["folders", "files at the top"])
def test_a_ddpm_that_was_downloaded_by_its_hub_id_loads_in_either_layout(flat: bool, tmp_path: Path, monkeypatch):
    repository, commit = tmp_path / "models--someone--a-ddpm", "a" * 40
    snapshot = repository / "snapshots" / commit
    if flat:
        flat_ddpm(snapshot)
    else:
        shutil.copytree(ASSETS / "toy-ddpm", snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(answer(load("ddpm", path="someone/a-ddpm")), answer(load("ddpm")))


@every_family
def test_a_hub_id_that_cannot_be_had_is_an_error_that_says_what_to_do(kind: str, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"`someone/absent` cannot be loaded.*download it first"):
        load(kind, path="someone/absent")


def test_weights_of_another_network_are_not_copied():
    network = torch.nn.Linear(2, 2)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    copy_weights(network, {name: value + 1 for name, value in before.items()})
    assert all(torch.equal(network.state_dict()[name], value + 1) for name, value in before.items())
    for weights in ({"weight": torch.zeros(2, 2)}, before | {"bias": torch.zeros(3)}):
        with pytest.raises(ValueError, match="bias"):
            copy_weights(network, weights)
    assert all(torch.equal(network.state_dict()[name], value + 1) for name, value in before.items())
