"""A base model that draws noise, one colour or saturated images is reported before training; a healthy one is not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from acpo_dist.core.errors import ModelError
from acpo_dist.data.prompts import load_prompts
from acpo_dist.data.toy.damage import BASE_DAMAGE, spoil
from acpo_dist.data.toy.world import templates
from acpo_dist.evaluation.metrics.sanity import sanity_problems, sanity_statistics
from acpo_dist.models.loading import resolve_path
from acpo_dist.preflight.doctor.configured import check_base_samples
from acpo_dist.tracking.console import Console
from acpo_dist.training.base_check import describe_problems
from acpo_dist.training.context import fixed_groups
from acpo_dist.training.local import LocalRollouts, open_ports
from acpo_dist.training.run import drive

SCHEDULER = "scheduler/scheduler_config.json"


def copied(source: str, folder: Path, file: str | None = None, **changes) -> Path:
    """A copy of an embedded pipeline, with changes to one of its JSON files."""
    shutil.copytree(resolve_path(source), folder)
    if file:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def spoil_vae(folder: Path, factor: float) -> Path:
    """Multiply the last layer of the decoder, as overflow in half precision does for an infinite factor."""
    (file,) = (folder / "vae").glob("*.safetensors")
    tensors = load_file(file)
    tensors["decoder.conv_out.weight"] = tensors["decoder.conv_out.weight"] * factor
    save_file(tensors, file)
    return folder


@pytest.fixture(scope="module")
def real_scenes(tmp_path_factory) -> Path:
    """Image files of the toy world, damaged as the toy models' training images are."""
    folder = tmp_path_factory.mktemp("real")
    scenes = templates()
    draw = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(scenes), generator=draw)[:48]
    images, _ = spoil(scenes[rows], BASE_DAMAGE, draw)
    for index, one in enumerate(images):
        pixels = (one.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
    return folder


def model_of(kind: str, path) -> list[str]:
    prompts = "none" if kind == "ddpm" else "toy"
    return [f"model={{type: {kind}, path: {path}}}", f"data.prompts={prompts}", "rewards.cut=image"]


def problems_of(config) -> dict[str, str]:
    prompts = load_prompts(config.data.prompts, config.data.prompt_column)
    groups = fixed_groups(config, prompts, 8, stream="test")
    rollouts = LocalRollouts(config, device="cpu")
    images = rollouts.images(rollouts.generate(groups), [plan.sample_id for each in groups for plan in each.samples])
    return describe_problems(images, rollouts.final_latents(groups, rollouts.trajectory()), config)


@pytest.mark.parametrize("kind", ["sdxl", "sd15", "ddpm"])
def test_a_healthy_toy_has_no_problems(tiny, kind):
    assert problems_of(tiny(*model_of(kind, f"toy-{kind}"), "sampler.num_steps=12")) == {}


@pytest.mark.parametrize("kind", ["sdxl", "ddpm"])
def test_a_wrong_prediction_type_is_noticed(tiny, tmp_path, kind):
    folder = copied(f"toy-{kind}", tmp_path / "model", SCHEDULER, prediction_type="v_prediction")
    assert problems_of(tiny(*model_of(kind, folder)))


def test_a_pixel_model_without_its_clip_is_noticed(tiny, tmp_path):
    folder = copied("toy-ddpm", tmp_path / "model", SCHEDULER, clip_sample=False)
    assert problems_of(tiny(*model_of("ddpm", folder)))


def test_a_healthy_toy_has_no_problems_beside_real_images(tiny, real_scenes):
    config = tiny(*model_of("sdxl", "toy-sdxl"), f"data.path={real_scenes}", "sampler.num_steps=12")
    assert problems_of(config) == {}


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_a_wrong_vae_scale_is_noticed_beside_real_images(tiny, tmp_path, real_scenes, factor):
    scale = json.loads((Path(resolve_path("toy-sdxl")) / "vae/config.json").read_text())["scaling_factor"]
    folder = copied("toy-sdxl", tmp_path / "model", "vae/config.json", scaling_factor=scale * factor)
    assert problems_of(tiny(*model_of("sdxl", folder), f"data.path={real_scenes}", "sampler.num_steps=12"))


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_an_overflow_in_the_decoder_ends_the_run_with_the_path_of_the_samples(tiny, tmp_path, factor):
    folder, root = spoil_vae(copied("toy-sdxl", tmp_path / "model"), factor), tmp_path / "run"
    config = tiny(*model_of("sdxl", folder), "run.iterations=1", f"run.dir={root}")
    with pytest.raises(ModelError, match=r"model\.dtype") as caught:
        drive(config, open_ports, Console(quiet=True))
    assert str(root / "samples/base.png") in str(caught.value) and (root / "samples/base.png").is_file()
    assert {finding.verdict for finding in check_base_samples(config)} <= {"failed", "warning", "note"}


def test_noise_and_real_images_differ_in_the_correlation_of_neighbours():
    noise = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ramp = torch.linspace(0.1, 0.9, 32).expand(4, 3, 32, 32)
    assert "noise" in sanity_problems(sanity_statistics(noise)) and sanity_problems(sanity_statistics(ramp)) == {}
    assert "constant" in sanity_problems(sanity_statistics(torch.zeros(4, 3, 32, 32)))
    faint = 0.5 + 0.2 * (ramp - 0.5)
    assert {"spread", "contrast"} <= sanity_problems(sanity_statistics(faint), sanity_statistics(ramp)).keys()


def test_doctor_checks_samples_of_an_embedded_model(tiny):
    config = tiny("model.path=toy-sdxl", "sampler.num_steps=12")
    assert [finding.verdict for finding in check_base_samples(config)] == ["ok"]
