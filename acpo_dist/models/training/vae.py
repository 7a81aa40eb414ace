"""Train a small `AutoencoderKL` on images."""

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

logger = logging.getLogger(__name__)

ImageBatch = Callable[[int, torch.Generator], Tensor]
"""(count, generator) -> images (B, 3, H, W) in [0, 1]."""


def train_vae(
    vae: Any, draw: ImageBatch, *, steps: int, batch_size: int, seed: int, learning_rate: float = 3e-3
) -> None:
    """Train in place on squared error, the error of finite differences (edges), and a small KL to the unit Gaussian.

    Sets `scaling_factor` in the config to the reciprocal of the standard deviation of the latents, as SDXL's VAE does.

    Args:
        vae: an `AutoencoderKL`; untyped because its declared outputs are unions with tuples, which do not occur here.
        draw: source of training images.
        steps: number of optimiser steps.
        batch_size: images per step.
        seed: seed of images and latents.
        learning_rate: learning rate.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, total_steps=steps, pct_start=0.05)
    vae.train()
    for step in range(steps):
        images = 2 * draw(batch_size, generator) - 1
        posterior = vae.encode(images).latent_dist
        latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        decoded = vae.decode(latents).sample
        loss = (
            F.mse_loss(decoded, images)
            + _edge_loss(decoded, images)
            + 1e-4 * posterior.kl().mean() / latents[0].numel()
        )
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        decay.step()
        if step % 200 == 0:
            logger.info("vae step %d of %d: loss %.5f", step, steps, loss.item())
    vae.eval()
    with torch.no_grad():
        images = 2 * draw(512, generator) - 1
        latents = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in images.split(64)])
    vae.register_to_config(scaling_factor=float(1 / latents.std()))


def _edge_loss(decoded: Tensor, images: Tensor) -> Tensor:
    error = decoded - images
    return (error[..., 1:, :] - error[..., :-1, :]).square().mean() + (error[..., 1:] - error[..., :-1]).square().mean()
