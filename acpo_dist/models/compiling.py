"""torch.compile of the blocks that a U-Net repeats: one compilation serves all blocks of a kind."""

import torch
from diffusers import UNet2DConditionModel

VARIANTS = 64
"""How often one block is compiled anew before torch falls back to running it as it is: with and without gradients,
adapters and recomputation, for each kind of block and each batch shape until torch takes that for dynamic."""


def compile_blocks(unet: UNet2DConditionModel, backend: str) -> None:
    """Compile in place; names of parameters stay.

    Attention blocks hold most of SDXL's arithmetic; convolutions are fast as they are, and a whole U-Net would be
    compiled anew wherever adapters are switched.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, VARIANTS)
    unet.compile_repeated_blocks(backend=backend)
