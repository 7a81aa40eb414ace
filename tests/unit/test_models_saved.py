"""Saved pipelines and adapters give the tuned model's outputs in plain diffusers."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from acpo_dist.core.weights import make_bundle
from acpo_dist.models.config import TuningConfig
from acpo_dist.models.family import trainable_tensors
from acpo_dist.models.lora_files import adapter_layers, kohya_layers, write_lora
from tests.helpers.models import (
    ASSETS,
    FULL,
    LORA,
    PIPELINES,
    SAMPLER,
    answer,
    answer_of,
    ddim,
    every_family,
    load,
    on_latents,
    open_base,
    plans,
    rng,
    rollout_worker,
    start_noise,
    tune,
)

# Saved pipelines


def save_lora(family, file: Path) -> None:
    """Write the adapters of a family as a LoRA file."""
    weights = {name: value.detach() for name, value in trainable_tensors(family.network).items()}
    layers = adapter_layers(weights, family.config.tuning)
    named = kohya_layers(layers, family=family.config.type, unet=family.network.config)
    write_lora(file, named, {}, torch.float32)


@every_family
@pytest.mark.parametrize("tuning", [LORA, TuningConfig(rank=4, alpha=10), FULL], ids=["lora", "lora scaled", "full"])
def test_a_saved_pipeline_opens_anywhere_and_holds_the_tuned_unet(kind: str, tuning: TuningConfig, tmp_path: Path):
    family = load(kind, tuning)
    base = answer(family)
    tune(family)
    tuned = answer(family)
    family.save_pipeline(tmp_path / "out")
    opened = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(opened).__name__ == PIPELINES[kind]
    assert float((tuned - base).abs().max()) > 1e-3
    # Merged weights are rounded once more in float32.
    torch.testing.assert_close(answer_of(opened, family), tuned, rtol=0, atol=1e-5)
    # Saving is no step of training.
    assert torch.equal(answer(family), tuned)


def test_a_base_in_half_precision_is_saved_as_a_pipeline_that_runs_as_it_opens(tmp_path: Path):
    half = DiffusionPipeline.from_pretrained(ASSETS / "toy-sdxl", dtype=torch.float16)
    half.save_pretrained(tmp_path / "half")
    family = load("sdxl", path=str(tmp_path / "half"))
    tune(family)
    family.save_pipeline(tmp_path / "out")
    # Mixed types, half precision text encoders before a float32 U-Net, would not run at all.
    opened = DiffusionPipeline.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(answer_of(opened, family), answer(family), rtol=0, atol=1e-5)


def test_an_update_too_small_for_bfloat16_is_still_in_the_saved_weights(tmp_path: Path):
    family = load("sdxl", dtype="bfloat16")
    base = load("sdxl").network.state_dict()
    with torch.no_grad():
        for name, parameter in trainable_tensors(family.network).items():
            if ".lora_B." in name:
                parameter.copy_(1e-4 * torch.randn(parameter.shape, generator=rng(0)))
    adapters = trainable_tensors(family.network)
    family.save_pipeline(tmp_path / "out")
    saved = DiffusionPipeline.from_pretrained(tmp_path / "out").unet.state_dict()
    for name in [name for name in adapters if ".lora_B." in name]:
        module = name.partition(".lora_B.")[0]
        up, down = adapters[name].detach(), adapters[f"{module}.lora_A.default.weight"].detach()
        update = saved[f"{module}.weight"] - base[f"{module}.base_layer.weight"]
        # float32 at weights below 1: 6e-8; bfloat16 would lose all of it.
        torch.testing.assert_close(update, up @ down, rtol=0, atol=2e-7)


def test_a_saved_pipeline_is_a_base_model_again(tmp_path: Path):
    family = load("sdxl")
    tune(family)
    family.save_pipeline(tmp_path / "out")
    again = load("sdxl", FULL, path=str(tmp_path / "out"))
    torch.testing.assert_close(answer(again), answer(family), rtol=0, atol=1e-5)


@on_latents
@pytest.mark.parametrize("alpha", [None, 10.0])
def test_the_exported_adapter_gives_the_tuned_answer_on_the_plain_base(kind: str, alpha: float | None, tmp_path: Path):
    family = load(kind, TuningConfig(rank=4, alpha=alpha))
    tune(family)
    save_lora(family, tmp_path / "lora.safetensors")
    plain = open_base(ASSETS / f"toy-{kind}")
    plain.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    torch.testing.assert_close(answer_of(plain, family), answer(family), rtol=0, atol=1e-5)


@on_latents
@pytest.mark.parametrize("guidance", [5.0, 1.0], ids=["guided", "conditional"])
def test_plain_diffusers_draws_the_tuned_rollouts_image_from_the_exported_adapter(
    kind: str, guidance: float, tmp_path: Path
):
    sampler = SAMPLER.model_copy(update={"guidance_scale": guidance})
    worker, entries = rollout_worker(kind, sampler), plans(0, 1)
    family = load(kind)
    tune(family)
    worker.load(make_bundle(1, trainable_tensors(family.network)))
    save_lora(family, tmp_path / "lora.safetensors")
    plain = open_base(ASSETS / f"toy-{kind}")
    plain.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    plain.scheduler = ddim(plain, "trailing")
    wanted = plain(
        [entry.prompt for entry in entries], latents=start_noise(entries, (4, 8, 8)), guidance_scale=guidance,
        num_inference_steps=SAMPLER.num_steps, output_type="pt",
    ).images  # fmt: skip
    drawn = worker.generate(entries)
    with torch.no_grad():
        pixels = family.decode(drawn.latents_BCHW).clamp(0, 1)
    torch.testing.assert_close(pixels, wanted, rtol=0, atol=1e-5)
