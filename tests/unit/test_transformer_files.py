"""Checkpoint files of transformers: their transformer, and VAE, with the text encoders of a pipeline folder."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from acpo_dist.core.errors import ModelError
from acpo_dist.core.registry import MODELS, resolve
from acpo_dist.models.architectures import architecture_of
from acpo_dist.models.config import Sd3Config, TuningConfig
from acpo_dist.models.sd3 import Sd3Family
from tests.helpers.flow_models import tiny_flux2, tiny_sd3, tiny_zimage
from tests.helpers.transformer_files import write_file

LENGTH = 16
VAE, TRANSFORMER = (f"{part}/diffusion_pytorch_model.safetensors" for part in ("vae", "transformer"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ACPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """(a tiny model, the same architecture with other weights of transformer and VAE)."""
    tiny_sd3(tmp_path / "own")
    other = Path(shutil.copytree(tmp_path / "own", tmp_path / "other"))
    for part in (VAE, TRANSFORMER):
        save_file({name: value * 0.9 for name, value in load_file(other / part).items()}, other / part)
    return tmp_path / "own", other


def config(path: Path, base: Path | None = None) -> Sd3Config:
    return Sd3Config(
        path=str(path), config=None if base is None else str(base), max_sequence_length=LENGTH,
        tuning=TuningConfig(rank=4),
    )  # fmt: skip


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Compare by norm: where a file's weights lie in memory decides how a processor orders the sums of elements."""
    return float((found - expected).norm()) <= 1e-6 * float(expected.norm())


@torch.no_grad()
def answers(section: Sd3Config) -> tuple[torch.Tensor, torch.Tensor]:
    """(velocity, decoded images)."""
    family = Sd3Family.load(section, device="cpu", trainable=False)
    noisy = torch.randn(2, *family.sample_shape, generator=torch.Generator().manual_seed(0))
    return family.predict(noisy, torch.tensor([999, 20]), family.encode(["a red circle", ""])), family.decode(noisy)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
@pytest.mark.parametrize("vae", [True, False])
def test_a_single_file_is_the_model_of_its_folder_with_the_encoders_of_another(prefix, vae, folders, tmp_path, cache):
    own, other = folders
    file = write_file("sd3", own, tmp_path / "model.safetensors", vae=vae, prefix=prefix)
    section = config(file, other)
    Sd3Family.check(section)
    assert not cache.exists()
    velocity, images = answers(section)
    assert _same(velocity, answers(config(own))[0])
    # A file without a VAE takes that of the folder.
    assert _same(images, answers(config(own if vae else other))[1])
    assert Sd3Family.chunk_counts(section, ["a", "a " * 40]) == Sd3Family.chunk_counts(config(own), ["a", "a " * 40])
    assert architecture_of(section).unet["num_layers"] == 2
    assert Sd3Family.notes(section) == []


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
@pytest.mark.parametrize("name", ["zimage", "flux2_klein"])
def test_the_transformer_of_a_file_replaces_that_of_the_folder(name, prefix, tmp_path):
    family, build = resolve("model", MODELS, name), {"zimage": tiny_zimage, "flux2_klein": tiny_flux2}[name]
    options = {"max_sequence_length": 48, "image_size": 16, "tuning": TuningConfig(rank=4)}
    options |= {"text_layers": (1, 3)} if name == "flux2_klein" else {}
    build(tmp_path / "own")
    other = Path(shutil.copytree(tmp_path / "own", tmp_path / "other"))
    save_file({key: value * 0.9 for key, value in load_file(other / TRANSFORMER).items()}, other / TRANSFORMER)
    file = write_file(name, tmp_path / "own", tmp_path / "model.safetensors", prefix=prefix)

    def velocity(path: Path, **more) -> torch.Tensor:
        model = family.load(family.Config(path=str(path), **options, **more), device="cpu", trainable=False)
        noisy = torch.randn(1, *model.sample_shape, generator=torch.Generator().manual_seed(0))
        return model.predict(noisy, torch.tensor([500]), model.encode(["a red circle"]))

    wanted = velocity(tmp_path / "own")
    assert _same(velocity(file, config=str(other)), wanted)
    assert not _same(velocity(other), wanted)


def test_a_single_file_that_lacks_something_is_refused_by_what_to_do(folders, tmp_path):
    own, other = folders
    file = write_file("sd3", own, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"without text encoders.*Set model\.config"):
        Sd3Family.check(config(file))
    with pytest.raises(ModelError, match=r"model\.config.*no transformer"):
        Sd3Family.check(config(file).model_copy(update={"config": "toy-sdxl"}))
    with pytest.raises(ModelError, match=r"does not fit the transformer.*model\.config"):
        Sd3Family.load(config(file).model_copy(update={"config": "toy-flow"}), device="cpu", trainable=False)
    with pytest.raises(ModelError, match=r"model\.prediction_type"):
        Sd3Family.check(config(file, other).model_copy(update={"prediction_type": "v_prediction"}))
    tensors = load_file(file)
    del tensors["model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight"]
    save_file(tensors, tmp_path / "part.safetensors")
    with pytest.raises(ModelError, match=r"the tensor.*fc1"):
        Sd3Family.load(config(tmp_path / "part.safetensors", other), device="cpu", trainable=False)
