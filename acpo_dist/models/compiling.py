"""torch.compile of the repeated blocks of a U-Net; blocks of the same class share one compilation."""

import torch
from diffusers import UNet2DConditionModel

VARIANTS = 64
"""Recompilation limit per block before torch falls back to eager mode. Gradients, adapters, recomputation, block
classes and batch shapes (until torch marks them dynamic) each cause recompilations."""


def compile_blocks(unet: UNet2DConditionModel, backend: str) -> None:
    """Compile the repeated blocks of a U-Net in place. Parameter names do not change.

    Attention blocks take most of SDXL's compute time and convolutions gain little. A fully compiled U-Net would be
    recompiled whenever adapters are enabled or disabled.

    Args:
        unet: the U-Net.
        backend: backend of `torch.compile`.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, VARIANTS)
    unet.compile_repeated_blocks(backend=backend)
