"""Configuration sections of the model families. The module does not import torch, so validation is fast."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field
from typing_extensions import override

from acpo_dist.config.plugins import ModelConfig
from acpo_dist.config.section import Section
from acpo_dist.core.errors import quoted
from acpo_dist.core.sizes import BUCKET_SIDE, Size, buckets_of, parse_size

DtypeName = Literal["float32", "bfloat16"]
VaeDtypeName = Literal["float32", "bfloat16", "float16"]
_TOY_SIDE = 32
"""Area of the buckets of embedded toys."""


class TuningConfig(Section):
    """Weights that are trained."""

    method: Literal["lora", "full"] = "lora"
    """`lora` trains adapters and disables them for the anchor; `full` trains all weights and keeps a frozen copy."""
    rank: int = Field(default=16, ge=1)
    """LoRA rank."""
    alpha: float | None = Field(default=None, gt=0)
    """LoRA scale times rank; None means the rank."""
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Name suffixes of the modules that get adapters; convolutions (`conv1`, `conv2`, `conv_shortcut`) too."""
    use_rslora: bool = False
    """Rank-stabilised LoRA: scale alpha / sqrt(rank) instead of alpha / rank."""
    use_dora: bool = False
    """DoRA: train the norm of each output row of a weight beside its low-rank update."""
    init_weights: Literal["default", "gaussian"] = "default"
    """Initial values of the first LoRA matrix, as in peft: `default` (Kaiming uniform) or `gaussian`."""
    init: Path | None = None
    """LoRA file to continue. It determines modules and ranks, and `rank` and `targets` are not used."""
    anchor: Literal["init", "base"] = "init"
    """With `init`, the model to which the anchor holds: base model plus that LoRA, or the base model."""


class MemoryConfig(Section):
    """Settings that reduce memory at the cost of time."""

    gradient_checkpointing: bool = False
    """Recompute the U-Net's blocks in the backward pass: one additional forward pass per gradient step."""
    vae_checkpointing: bool = False
    """Recompute the layers of the VAE's decoder in the backward pass."""
    vae_slicing: bool = False
    """Decode finished samples one by one."""
    vae_tiling: bool = False
    """Decode finished samples in tiles; large images differ slightly. Not used where gradients are needed."""
    anchor_dtype: DtypeName = "float32"
    """Data type of the frozen copy in full fine-tuning; LoRA needs no copy."""
    embedding_cache: Path | None = None
    """Folder of cached prompt embeddings; `acpo embed` fills it and a run adds missing prompts."""
    free_text_encoders: bool = False
    """Load the text encoders only for prompts whose embeddings are not cached, and free them afterwards."""
    offload: bool = False
    """Keep in host memory between uses: U-Net and VAE of rollouts, text encoders, and the frozen copy of full
    fine-tuning. For roles that take turns on one GPU; each phase then begins with the transfer of its weights."""


class SpeedConfig(Section):
    """Settings that increase speed; results differ by rounding."""

    channels_last: bool = False
    """Store convolution weights of U-Net and VAE in the channels-last memory format."""
    compile: Literal["inductor", "aot_eager"] | None = None
    """torch.compile of the U-Net's repeated transformer blocks; compilation takes minutes. `inductor` generates
    kernels; `aot_eager` only traces, to test whether a model can be compiled."""


class SizeShare(Section):
    """One of several image sizes."""

    size: Annotated[Size, BeforeValidator(lambda value: _pair(value))]
    """Width and height in pixels."""
    share: float = Field(default=1.0, gt=0)
    """Share of the samples, relative to the other sizes."""


class Buckets(Section):
    """SDXL's aspect ratios at another area."""

    buckets: int = Field(ge=16)
    """Side in pixels of the square with that area; 1024 gives the published sizes."""


def _pair(value: Any) -> Size:
    """Width and height from one number, two numbers, or text such as `832x1216`."""
    if isinstance(value, str):
        return parse_size(value)
    if isinstance(value, int) and not isinstance(value, bool):
        value = (value, value)
    if isinstance(value, list | tuple) and len(value) == 2:
        width, height = value
        if type(width) is int and type(height) is int and min(width, height) > 0:
            return width, height
    raise ValueError(f"expected [width, height] in pixels, found {quoted(value)}")


def _image_size(value: Any) -> Any:
    """One of the forms of `image_size`."""
    if value is None or value == "buckets" or isinstance(value, SizeShare | Buckets):
        return value
    if isinstance(value, dict):
        return Buckets.model_validate(value) if set(value) == {"buckets"} else (SizeShare.model_validate(value),)
    several = isinstance(value, list | tuple) and not all(type(side) is int for side in value)
    try:
        if several and value:
            return tuple(
                entry if isinstance(entry, SizeShare)
                else SizeShare.model_validate(entry if isinstance(entry, dict) else {"size": entry})
                for entry in value
            )  # fmt: skip
        width, height = _pair(value)
    except ValueError as error:
        raise ValueError(
            f"found {quoted(value)}, expected one number (a square), [width, height], `buckets` (SDXL's sizes), "
            "{buckets: SIDE}, or a list of sizes such as [{size: [832, 1216], share: 2}, {size: 1024}]"
        ) from error
    return width if width == height else (width, height)


ImageSize = Annotated[
    int | Literal["buckets"] | tuple[int, int] | Buckets | tuple[SizeShare, ...] | None, BeforeValidator(_image_size)
]


class LoraConfig(Section):
    """A LoRA that is merged into the base model."""

    path: Path
    """File in kohya's, A1111's, diffusers' or peft's layout."""
    scale: float = 1.0
    """Strength of the LoRA."""


class LatentConfig(ModelConfig):
    """A latent diffusion model and its tuning."""

    bucket_side: ClassVar[int] = BUCKET_SIDE
    """Side of the square whose area `image_size: buckets` has."""

    path: str
    """Embedded toy, pipeline folder, hub id, or a checkpoint file (`.safetensors`, `.ckpt`)."""
    config: str | None = None
    """For a checkpoint file: pipeline folder or embedded toy whose configurations and tokenizers it uses; None uses the
    published ones of Stable Diffusion 1.x, 2.x or SDXL. A transformer also takes its text encoders from there."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """For a checkpoint file: what the network predicts; None reads it from the file."""
    loras: tuple[LoraConfig, ...] = ()
    """LoRA files that are merged into the base model before the run; the anchor includes them."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    variant: str | None = None
    """File variant, such as fp16."""
    offline: bool = False
    """Do not access the hub: the model must be a folder or in the local cache."""
    vae: str | None = None
    """Folder, hub id or `.safetensors` file of a VAE that replaces the pipeline's own."""
    image_size: ImageSize = None
    """Size in pixels: one number (a square), [width, height], `buckets` (SDXL's published list; `{buckets: 512}` at
    another area), or a list of `{size, share}`, which an iteration mixes; None means the U-Net's default."""
    dtype: DtypeName = "float32"
    """Data type of the frozen weights and of rollouts."""
    vae_dtype: VaeDtypeName = "float32"
    """Data type of the VAE. SDXL's VAE overflows in float16, which raises an error."""
    negative_prompt: str | None = None
    """Prompt of the unconditional branch of guidance; None means the family's null condition."""
    long_prompts: Literal["chunk", "cut"] = "chunk"
    """Prompts of more than 75 tokens: `chunk` encodes each 75 tokens by themselves and concatenates the results, as
    other SDXL tools do; `cut` drops the rest and reports how many prompts are affected."""
    tuning: TuningConfig = TuningConfig()
    memory: MemoryConfig = MemoryConfig()
    speed: SpeedConfig = SpeedConfig()
    seed: int = 0
    """Seed of the adapters' initial values."""

    @property
    @override
    def sizes(self) -> tuple[tuple[Size, float], ...]:
        value = self.image_size
        if value is None:
            return ()
        if isinstance(value, str | Buckets):
            own = _TOY_SIDE if self.path.startswith("toy-") else self.bucket_side
            return tuple((size, 1.0) for size in buckets_of(own if isinstance(value, str) else value.buckets))
        if isinstance(value, int):
            return (((value, value), 1.0),)
        if isinstance(value[0], int):
            return ((value, 1.0),)  # pyright: ignore[reportReturnType]
        return tuple((entry.size, entry.share) for entry in value)  # pyright: ignore[reportAttributeAccessIssue]


class SdxlConfig(LatentConfig):
    """A Stable Diffusion XL model and its tuning."""

    type: Literal["sdxl"] = "sdxl"
    path: str = "stabilityai/stable-diffusion-xl-base-1.0"
    """Embedded toy (`toy-sdxl`), pipeline folder, hub id, or a checkpoint file (`.safetensors`, `.ckpt`)."""


class Sd15Config(LatentConfig):
    """A Stable Diffusion 1.x or 2.x model and its tuning."""

    bucket_side: ClassVar[int] = 512
    type: Literal["sd15"] = "sd15"
    path: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    """Embedded toy (`toy-sd15`), pipeline folder, hub id, or a checkpoint file (`.safetensors`, `.ckpt`)."""
    clip_skip: int | None = Field(default=None, ge=1)
    """Layers of the text encoder that are skipped at its end, as diffusers counts them: 1 takes the output of the
    second to last layer (2 in other tools). None takes the last layer's."""


class FlowConfig(LatentConfig):
    """A flow model with a transformer, and its tuning."""

    flow: ClassVar[bool] = True
    long_prompts: Literal["cut"] = "cut"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Prompts longer than the text encoders read are cut; the number of such prompts is reported."""


class Sd3Config(FlowConfig):
    """A Stable Diffusion 3 or 3.5 model (flow matching) and its tuning."""

    type: Literal["sd3"] = "sd3"
    path: str = "stabilityai/stable-diffusion-3.5-medium"
    """Embedded toy (`toy-flow`), pipeline folder, hub id, or a checkpoint file; its transformer and VAE replace those
    of the pipeline folder `config`."""
    t5: bool = True
    """Use the third text encoder, T5, if the folder has it; false samples as the pipeline without it does."""
    max_sequence_length: int | None = Field(default=None, ge=1, le=512)
    """Tokens of the T5 encoder, as in the pipeline; None is 256, or what the folder's model_index.json says."""


class ZImageConfig(FlowConfig):
    """A Z-Image model (flow matching) and its tuning."""

    type: Literal["zimage"] = "zimage"
    path: str = "Tongyi-MAI/Z-Image"
    """Pipeline folder, hub id, or a checkpoint file; its transformer replaces that of the pipeline folder `config`."""
    max_sequence_length: int = Field(default=512, ge=1)
    """Most tokens of a prompt with its chat template, as in the pipeline."""


class Flux2KleinConfig(FlowConfig):
    """A FLUX.2-klein-base model (flow matching) and its tuning."""

    type: Literal["flux2_klein"] = "flux2_klein"
    path: str = "black-forest-labs/FLUX.2-klein-base-4B"
    """Pipeline folder, hub id, or a checkpoint file; its transformer replaces that of the pipeline folder `config`."""
    max_sequence_length: int = Field(default=512, ge=1)
    """Tokens of a prompt with its chat template, as in the pipeline."""
    text_layers: tuple[int, ...] = (9, 18, 27)
    """Hidden states of the text encoder that are the condition, as `text_encoder_out_layers` of the pipeline."""


class BaseTrainingConfig(Section):
    """Training of a base model from scratch on `data.path`."""

    image_size: int = Field(default=32, ge=8, le=256)
    """Side in pixels; larger images are scaled down and cropped."""
    channels: tuple[int, ...] = Field(default=(16, 32, 64), min_length=2)
    """U-Net channels by level, multiples of 16; each level halves the resolution."""
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    """Prediction type of the network."""
    timestep_sampling: Literal["uniform", "log_normal"] = "uniform"
    """Distribution of training timesteps; `log_normal` concentrates on middle noise levels."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type of the forward pass; `auto` is bfloat16 on a processor that multiplies in it, else float32."""
    steps: int = Field(default=4000, ge=1)
    """Optimiser steps."""
    max_seconds: float | None = Field(default=None, gt=0)
    """Time limit in seconds; the learning rate decays with the elapsed time."""
    batch_size: int = Field(default=64, ge=1)
    """Images per step."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""


class DdpmConfig(ModelConfig):
    """An unconditional DDPM and its tuning."""

    type: Literal["ddpm"] = "ddpm"
    path: str = "toy-ddpm"
    """Embedded toy (`toy-ddpm`), pipeline folder, hub id, or `train` to train a base model (`base`)."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: DtypeName = "float32"
    """Data type of the frozen weights and of rollouts."""
    tuning: TuningConfig = TuningConfig(method="full")
    base: BaseTrainingConfig = BaseTrainingConfig()
    """Settings of the base model's training; used only with `path: train`."""
    seed: int = 0
    """Seed of the adapters' initial values and of the base model's training."""

    conditional: ClassVar[bool] = False
    pixel_space: ClassVar[bool] = True
