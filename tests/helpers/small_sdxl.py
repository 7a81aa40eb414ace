"""An SDXL folder for tests: toy-sdxl with a U-Net of one resolution, whose forward pass takes 0.4 of the time.

    python -m tests.helpers.small_sdxl        # train the U-Net again: 13 CPU minutes beside other work

Its images are poorer than those of toy-sdxl. Tests of runs, which claim nothing about quality, train it.
"""

import os
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from acpo_dist.data.toy.text import MAX_TOKENS
from acpo_dist.data.toy.world import IMAGE_SIZE, captions
from acpo_dist.models.loading import cast
from acpo_dist.models.training.denoiser import train_denoiser
from acpo_dist.training.toy_assets import captioned_latents

FOLDER = Path(__file__).parents[1] / "assets/small-sdxl"
TOY = Path(__file__).parents[2] / "acpo_dist/data/toy/assets/toy-sdxl"
SEED = 97


def new_unet() -> UNet2DConditionModel:
    """Return the untrained U-Net: one down block, a middle block with cross-attention, one up block."""
    config: Any = UNet2DConditionModel.load_config(TOY / "unet")
    unet = UNet2DConditionModel.from_config(
        {
            **config, "block_out_channels": (32,), "attention_head_dim": 4, "transformer_layers_per_block": 1,
            "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",),
        }
    )  # fmt: skip
    assert isinstance(unet, UNet2DConditionModel)
    return unet


def build(folder: Path = FOLDER, steps: int = 6000) -> float:
    """Train the U-Net on the toy world with the text encoders of toy-sdxl, and write the folder.

    Args:
        folder: the U-Net is written here; links to the other parts of toy-sdxl are made beside it.
        steps: optimiser steps, of 64 samples each.

    Returns:
        Mean squared error of the noise prediction over the last tenth of the steps.
    """
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(TOY, dtype=torch.float32)
    tokens = pipeline.tokenizer(captions(), padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids
    with torch.no_grad():
        first = pipeline.text_encoder(tokens, output_hidden_states=True).hidden_states[-2]
        second = pipeline.text_encoder_2(tokens, output_hidden_states=True)
        states, pooled = torch.cat([first, second.hidden_states[-2]], -1), second.text_embeds
    time_ids = torch.tensor([IMAGE_SIZE, IMAGE_SIZE, 0, 0, IMAGE_SIZE, IMAGE_SIZE]).float()

    def predict(network: nn.Module, noisy: Tensor, timesteps: Tensor, condition) -> Tensor:
        ids, keep = condition
        added = {"text_embeds": pooled[ids] * keep[:, None], "time_ids": time_ids.expand(len(ids), -1)}
        return network(noisy, timesteps, states[ids] * keep[:, None, None], added_cond_kwargs=added).sample

    torch.manual_seed(SEED)
    unet = new_unet()
    error = train_denoiser(
        unet, captioned_latents(pipeline.vae, SEED), predict, pipeline.scheduler.alphas_cumprod, steps=steps,
        batch_size=64, seed=SEED,
    )  # fmt: skip
    cast(unet, torch.float16)
    unet.save_pretrained(folder / "unet", safe_serialization=True)
    for part in TOY.iterdir():
        link = folder / part.name
        if part.name != "unet" and not link.exists():
            link.symlink_to(os.path.relpath(part, folder))
    return error


if __name__ == "__main__":
    import sys

    sys.stdout.write(f"error of the noise prediction: {build():.4f}\n")
