"""A full-size pipeline with random weights, for benchmarks and tests without access to a trained one."""

import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from acpo_dist.core.errors import UsageError
from acpo_dist.models.architectures import PUBLISHED, Architecture
from acpo_dist.models.clip_tokenizer import write_clip_tokenizer
from acpo_dist.models.loading import cast
from acpo_dist.models.training.toy_models import sdxl_scheduler

_BLOCK = 1 << 22


def write_random_sdxl(folder: Path, *, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", seed: int = 0) -> Path:
    """Write an SDXL folder of 2.6 B + 0.8 B parameters (7 GB in bfloat16), or keep an existing one.

    Args:
        folder: folder to write.
        dtype: type of the weights.
        device: device on which the weights are generated.
        seed: seed of the weights.

    Returns:
        The folder.

    Raises:
        UsageError: the folder holds other files.
    """
    if (folder / "model_index.json").is_file():
        return folder
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(
            f"{folder} exists and holds no pipeline (no model_index.json). Give a folder that does not exist yet."
        )
    # Written beside the final place first, so that an incomplete folder is never mistaken for a complete one.
    partial = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.partial")
    try:
        _write(partial, dtype, device, seed)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _write(folder: Path, dtype: torch.dtype, device: str, seed: int) -> None:
    architecture = PUBLISHED["sdxl"]
    block = torch.rand(_BLOCK, generator=torch.Generator().manual_seed(seed)).to(device) - 0.5
    write_clip_tokenizer(folder / "tokenizer")
    write_clip_tokenizer(folder / "tokenizer_2", pad_token="!")
    scheduler: EulerDiscreteScheduler = sdxl_scheduler()
    pipeline = StableDiffusionXLPipeline(
        unet=_filled(lambda: UNet2DConditionModel.from_config(dict(architecture.unet)), dtype, block),
        vae=_filled(lambda: AutoencoderKL.from_config(dict(architecture.vae or {})), dtype, block),
        text_encoder=_encoder(CLIPTextModel, architecture, 0, dtype, block),
        text_encoder_2=_encoder(CLIPTextModelWithProjection, architecture, 1, dtype, block),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        scheduler=scheduler,  # pyright: ignore[reportArgumentType]
        force_zeros_for_empty_prompt=True, add_watermarker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder, safe_serialization=True)


def _encoder(kind: Any, architecture: Architecture, index: int, dtype: torch.dtype, block: torch.Tensor) -> Any:
    # position ids are made, not filled; the random start of so many weights is what takes long.
    config = CLIPTextConfig(**architecture.text_encoders[index])
    return _filled(lambda: kind(config), dtype, block)


def _filled(build: Any, dtype: torch.dtype, block: torch.Tensor) -> Any:
    """Build on the meta device, then fill all weights with one repeated random block at the scale of a linear layer."""
    with torch.device("meta"):
        module = build()
    cast(module, dtype)
    module.to_empty(device=block.device)
    with torch.no_grad():
        for owner, name, value in _parameters(module):
            if value.ndim < 2:
                # Norms start as the identity; all other one-dimensional parameters are biases.
                value.fill_(1.0 if name == "weight" and "Norm" in type(owner).__name__ else 0.0)
                continue
            scale = (3 / value[0].numel()) ** 0.5
            flat = value.reshape(-1)
            for start in range(0, flat.numel(), _BLOCK):
                piece = flat[start : start + _BLOCK]
                piece.copy_(2 * scale * block[: piece.numel()])
        for name, buffer in module.named_buffers():
            if name.endswith("position_ids"):
                buffer.copy_(torch.arange(buffer.shape[-1]).expand(buffer.shape))
    return module.eval()


def _parameters(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for owner in module.modules():
        for name, value in owner.named_parameters(recurse=False):
            yield owner, name, value
