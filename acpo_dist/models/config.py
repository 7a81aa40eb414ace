"""Sections of the model families: keys, defaults and facts. Imports no torch: a configuration is checked quickly."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from acpo_dist.config.plugins import ModelConfig
from acpo_dist.config.section import Section

DtypeName = Literal["float32", "bfloat16"]
VaeDtypeName = Literal["float32", "bfloat16", "float16"]


class TuningConfig(Section):
    """Which weights train."""

    method: Literal["lora", "full"] = "lora"
    """`lora` trains adapters and switches them off for the anchor; `full` trains all weights beside a frozen copy."""
    rank: int = Field(default=16, ge=1)
    """LoRA rank."""
    alpha: float | None = Field(default=None, gt=0)
    """LoRA scale times rank; None takes the rank."""
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Names of the modules that get adapters (suffixes)."""


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


class LatentConfig(ModelConfig):
    """Which model of a family on latents, and what trains."""

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


class SdxlConfig(LatentConfig):
    """Which SDXL, and what trains."""

    type: Literal["sdxl"] = "sdxl"
    path: str = "stabilityai/stable-diffusion-xl-base-1.0"
    """Embedded toy (`toy-sdxl`), pipeline folder, or hub id."""


class Sd15Config(LatentConfig):
    """Which Stable Diffusion, and what trains."""

    type: Literal["sd15"] = "sd15"
    path: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    """Embedded toy (`toy-sd15`), pipeline folder, or hub id."""


class BaseTrainingConfig(Section):
    """A short training from scratch on `data.path`, when there is no base model."""

    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    """What the network learns to predict."""
    steps: int = Field(default=4000, ge=1)
    """Optimiser steps."""
    max_seconds: float | None = Field(default=None, gt=0)
    """Stop earlier, with the learning rate decayed in time."""
    batch_size: int = Field(default=64, ge=1)
    """Images per step."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""


class DdpmConfig(ModelConfig):
    """Which DDPM, and what trains."""

    type: Literal["ddpm"] = "ddpm"
    path: str = "toy-ddpm"
    """Embedded toy (`toy-ddpm`), pipeline folder, hub id, or `train` for the base recipe below."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: DtypeName = "float32"
    """Type of the frozen weights and of rollouts."""
    tuning: TuningConfig = TuningConfig(method="full")
    base: BaseTrainingConfig = BaseTrainingConfig()
    """Used only with `path: train`."""
    seed: int = 0
    """Seed of the adapters' initial values and of the base recipe."""

    conditional: ClassVar[bool] = False
    pixel_space: ClassVar[bool] = True
