"""Configuration of Stable Diffusion's families: which model, and what may be saved in memory."""

from pathlib import Path
from typing import Literal

from acpo_dist.config.section import Section
from acpo_dist.models.loading import DtypeName
from acpo_dist.models.tuning import TuningConfig
from acpo_dist.models.vae import VaeDtypeName


class MemoryConfig(Section):
    """Memory saved at the price of time."""

    gradient_checkpointing: bool = False
    """Recompute the U-Net's blocks in the backward pass: one more forward per gradient step."""
    vae_checkpointing: bool = False
    """The same for the VAE's decoder."""
    vae_slicing: bool = False
    """Decode finished samples one by one."""
    vae_tiling: bool = False
    """Decode finished samples in tiles; large images differ a little. Never where the score's gradient passes."""
    anchor_dtype: DtypeName = "float32"
    """Type of the frozen copy beside full fine-tuning; LoRA needs no copy."""
    embedding_cache: Path | None = None
    """Folder that keeps the embeddings of prompts; `acpo embed` fills it, a run adds what is missing."""
    free_text_encoders: bool = False
    """Load the text encoders only for prompts whose embeddings are not known yet."""


class SpeedConfig(Section):
    """Other layouts for the same arithmetic; results differ by rounding."""

    channels_last: bool = False
    """Convolution weights of U-Net and VAE with channels innermost, as tensor cores read them."""
    compile: Literal["inductor", "aot_eager"] | None = None
    """torch.compile of the U-Net's repeated transformer blocks alone: minutes at first, for faster steps after.
    `inductor` makes kernels; `aot_eager` only traces, to try whether a model can be compiled."""


class LatentConfig(Section):
    """Which model of a family on latents, and what trains."""

    type: str
    path: str
    """Embedded toy, pipeline folder, or hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    variant: str | None = None
    """File variant, such as fp16."""
    offline: bool = False
    """Never ask the hub: the model must be a folder or in the local cache."""
    vae: str | None = None
    """Folder or hub id of a VAE that replaces the pipeline's own."""
    image_size: int | None = None
    """Height and width in pixels; None takes the U-Net's own."""
    dtype: DtypeName = "float32"
    """Type of the frozen weights and of rollouts."""
    vae_dtype: VaeDtypeName = "float32"
    """Type of the VAE; SDXL's own overflows in float16, which is refused or noticed."""
    negative_prompt: str | None = None
    """What guidance leads away from; None is the family's null condition."""
    tuning: TuningConfig = TuningConfig()
    memory: MemoryConfig = MemoryConfig()
    speed: SpeedConfig = SpeedConfig()
    seed: int = 0
    """Seed of the adapters' initial values."""
