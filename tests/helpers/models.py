"""Toy model families, their diffusers pipelines, and both outputs on the same inputs."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor

import acpo_dist.data.toy
from acpo_dist.config.schema import SamplerConfig
from acpo_dist.core.types import SamplePlan
from acpo_dist.data.toy.world import captions
from acpo_dist.models.config import TuningConfig
from acpo_dist.models.ddpm import DdpmFamily
from acpo_dist.models.family import trainable_tensors
from acpo_dist.models.sd15 import Sd15Family
from acpo_dist.models.sdxl import SdxlFamily
from acpo_dist.workers.rollout.worker import RolloutWorker

ASSETS = Path(acpo_dist.data.toy.__file__).parent / "assets"
PROMPTS = (captions()[3], captions()[40], captions()[17])
LORA, FULL = TuningConfig(method="lora", rank=4), TuningConfig(method="full")
FAMILIES = {"sdxl": SdxlFamily, "sd15": Sd15Family, "ddpm": DdpmFamily}
PIPELINES = {"sdxl": "StableDiffusionXLPipeline", "sd15": "StableDiffusionPipeline", "ddpm": "DDPMPipeline"}
every_tuning = pytest.mark.parametrize("tuning", [LORA, FULL], ids=["lora", "full"])
every_family = pytest.mark.parametrize("kind", list(FAMILIES))
on_latents = pytest.mark.parametrize("kind", ["sdxl", "sd15"])


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def load(kind: str, tuning: TuningConfig = LORA, **options):
    family = FAMILIES[kind]
    config = family.Config(**{"path": f"toy-{kind}", "tuning": tuning, **options})
    return family.load(config, device="cpu", trainable=True)


def tune(family) -> None:
    """Move every trainable weight, as training would."""
    generator = rng(5)
    with torch.no_grad():
        for parameter in trainable_tensors(family.network).values():
            spread = 0.1 if parameter.numel() < 2 else 0.1 * float(parameter.std().clamp(min=0.3))
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def answer(family) -> Tensor:
    """The family's prediction for three prompts at three timesteps."""
    noisy = torch.randn(3, *family.sample_shape, generator=rng(1))
    return family.predict(noisy, torch.tensor([20, 300, 900]), family.encode(PROMPTS))


@torch.no_grad()
def answer_of(pipeline, family) -> Tensor:
    """The same prediction by a pipeline's U-Net."""
    noisy, timesteps = torch.randn(3, *family.sample_shape, generator=rng(1)), torch.tensor([20, 300, 900])
    if isinstance(pipeline, DDPMPipeline):
        return pipeline.unet(noisy, timesteps).sample
    if isinstance(pipeline, StableDiffusionPipeline):
        states, _ = pipeline.encode_prompt(list(PROMPTS), "cpu", 1, False)
        return pipeline.unet(noisy, timesteps, encoder_hidden_states=states).sample
    states, _, pooled, _ = pipeline.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False)
    size = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[size, size, 0, 0, size, size]] * 3)}
    return pipeline.unet(noisy, timesteps, encoder_hidden_states=states, added_cond_kwargs=added).sample


def toy_copy(kind: str, folder: Path) -> Path:
    return Path(shutil.copytree(ASSETS / f"toy-{kind}", folder / f"{kind}-copy"))


def small_sdxl(folder: Path) -> Path:
    """toy-sdxl with a random U-Net of one level: a third of the modules, for tests of what surrounds the network."""
    small = toy_copy("sdxl", folder)
    config = json.loads((small / "unet/config.json").read_text())
    levels = {
        "block_out_channels": [48], "attention_head_dim": 4, "transformer_layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"],
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        UNet2DConditionModel.from_config({**config, **levels}).save_pretrained(small / "unet")
    return small


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def open_base(path: Path):
    """A base model in float32, as used by the families, for any dtype of its files."""
    pipeline = DiffusionPipeline.from_pretrained(path, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


SAMPLER = SamplerConfig(num_steps=20, spacing="trailing", guidance_scale=5.0, t_max=0.3, late_per_sample=3)


def rollout_worker(kind: str = "sdxl", sampler: SamplerConfig = SAMPLER, path: Path | None = None, **options):
    config = FAMILIES[kind].Config(path=str(path or f"toy-{kind}"), tuning=LORA, **options)
    return RolloutWorker(config, sampler, name="rollout/7")


def plans(*seeds: int) -> list[SamplePlan]:
    return [SamplePlan(sample_id=f"s{seed}", prompt_id=seed % 3, prompt=PROMPTS[seed % 3], seed=seed) for seed in seeds]


def start_noise(entries: Sequence[SamplePlan], shape: tuple[int, ...]) -> Tensor:
    return torch.stack([torch.randn(shape, generator=rng(entry.seed)) for entry in entries])


def ddim(pipeline, spacing: str, **options) -> DDIMScheduler:
    """diffusers' deterministic sampler on the pipeline's own levels, with a clean end."""
    return DDIMScheduler.from_config(
        pipeline.scheduler.config, clip_sample=False, set_alpha_to_one=True, timestep_spacing=spacing, **options
    )
