"""Architectures of the embedded toy models: the SDXL, SD 1.5 and DDPM classes at a thousandth of their size."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from diffusers import (
    AutoencoderKL,
    DDPMPipeline,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from acpo_dist.data.toy.text import MAX_TOKENS, vocabulary, write_tokenizer
from acpo_dist.data.toy.world import IMAGE_SIZE
from acpo_dist.models.loading import cast
from acpo_dist.models.pipeline_files import make_portable
from acpo_dist.models.sd3 import LENGTH_KEY

TEXT_WIDTH = 32
TIME_ID_WIDTH = 8
FLOW_T5_TOKENS = 1
"""Zero tokens in place of T5's in toy-flow; the pipeline's 256 would be most of its computation."""
FLOW_SHIFT = 1.5


def new_vae() -> AutoencoderKL:
    """Return an untrained VAE from 32 x 32 pixels to 8 x 8 latents with four channels."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(16, 32, 48),  # pyright: ignore[reportArgumentType]
        down_block_types=("DownEncoderBlock2D",) * 3,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * 3,  # pyright: ignore[reportArgumentType]
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        force_upcast=False,
    )


def _text_config(hidden_act: str) -> CLIPTextConfig:
    vocab, _ = vocabulary()
    end = vocab["<|endoftext|>"]
    return CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        hidden_act=hidden_act,
        bos_token_id=vocab["<|startoftext|>"],
        eos_token_id=end,
        pad_token_id=end,
    )


class ToySdxl(nn.Module):
    """Jointly trained parts of toy-sdxl: U-Net and both text encoders."""

    def __init__(self) -> None:
        super().__init__()
        # SDXL's activations: quick_gelu in CLIP-L, gelu in OpenCLIP bigG.
        self.text_encoder = CLIPTextModel(_text_config("quick_gelu"))
        self.text_encoder_2 = CLIPTextModelWithProjection(_text_config("gelu"))
        self.unet = UNet2DConditionModel(
            sample_size=IMAGE_SIZE // 4,
            in_channels=4,
            out_channels=4,
            block_out_channels=(48, 72),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=2 * TEXT_WIDTH,
            attention_head_dim=(4, 4),  # pyright: ignore[reportArgumentType]
            transformer_layers_per_block=(1, 1),  # pyright: ignore[reportArgumentType]
            use_linear_projection=True,
            norm_num_groups=8,
            addition_embed_type="text_time",
            addition_time_embed_dim=TIME_ID_WIDTH,
            projection_class_embeddings_input_dim=6 * TIME_ID_WIDTH + TEXT_WIDTH,
        )

    def encode(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the concatenated penultimate states of both encoders (B, L, 64), and the pooled projection (B, 32)."""
        first = self.text_encoder(token_ids, output_hidden_states=True).hidden_states[-2]
        second = self.text_encoder_2(token_ids, output_hidden_states=True)
        return torch.cat([first, second.hidden_states[-2]], -1), second.text_embeds


class ToySd15(nn.Module):
    """Jointly trained parts of toy-sd15: U-Net and its text encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder = CLIPTextModel(_text_config("quick_gelu"))
        self.unet = UNet2DConditionModel(
            sample_size=IMAGE_SIZE // 4,
            in_channels=4,
            out_channels=4,
            block_out_channels=(32, 64),
            layers_per_block=1,
            # SD 1.5's order: attention in every block except the deepest.
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=4,
            norm_num_groups=8,
        )

    def encode(self, token_ids: Tensor) -> Tensor:
        """Return the last states of the encoder after its final norm (B, L, 32)."""
        return self.text_encoder(token_ids).last_hidden_state


class ToyFlow(nn.Module):
    """Jointly trained parts of toy-flow: SD3's joint transformer and two text encoders with projection, without T5."""

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder = CLIPTextModelWithProjection(_text_config("quick_gelu"))
        self.text_encoder_2 = CLIPTextModelWithProjection(_text_config("gelu"))
        self.transformer = SD3Transformer2DModel(
            sample_size=IMAGE_SIZE // 4,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=4,
            attention_head_dim=14,
            num_attention_heads=4,
            joint_attention_dim=2 * TEXT_WIDTH,
            caption_projection_dim=4 * 14,
            pooled_projection_dim=2 * TEXT_WIDTH,
            pos_embed_max_size=IMAGE_SIZE // 8,
            qk_norm="rms_norm",
        )

    def encode(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return SD3's states with one zero token for the missing T5, (B, L + 1, 64), and pooled states (B, 64)."""
        outputs = [
            encoder(token_ids, output_hidden_states=True) for encoder in (self.text_encoder, self.text_encoder_2)
        ]
        states = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        padded = nn.functional.pad(states, (0, 0, 0, FLOW_T5_TOKENS))
        return padded, torch.cat([output.text_embeds for output in outputs], -1)


def new_ddpm(image_size: int = IMAGE_SIZE, channels: Sequence[int] = (16, 32, 64)) -> UNet2DModel:
    """Return an untrained pixel-space U-Net for RGB images, with attention at its lowest resolution.

    Args:
        image_size: side of the images in pixels.
        channels: channels by level; each level halves the resolution.
    """
    lower = len(channels) - 1
    return UNet2DModel(
        sample_size=image_size,
        in_channels=3,
        out_channels=3,
        block_out_channels=tuple(channels),
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * lower + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * lower,
        norm_num_groups=8,
        attention_head_dim=min(16, channels[0]),
    )


def sdxl_scheduler() -> EulerDiscreteScheduler:
    """Return SDXL's noise schedule with its default sampler."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        steps_offset=1,
        timestep_spacing="leading",
    )


def sd15_scheduler() -> PNDMScheduler:
    """Return SD 1.5's noise schedule with its default sampler."""
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    # As in the published folder: `DDIMScheduler.from_config` clips latents without it.
    scheduler.register_to_config(clip_sample=False)
    return scheduler


def save_toy_sdxl(folder: Path, model: ToySdxl, vae: AutoencoderKL) -> None:
    """Write a `StableDiffusionXLPipeline` folder with weights in half precision."""
    write_tokenizer(folder / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        text_encoder_2=model.text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=model.unet,
        scheduler=sdxl_scheduler(),  # pyright: ignore[reportArgumentType]
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    # Only the large parts are halved: diffusers widens them on loading, transformers keeps an encoder's dtype.
    cast(pipeline.unet, torch.float16)
    cast(pipeline.vae, torch.float16)
    pipeline.save_pretrained(folder, safe_serialization=True)
    make_portable(folder)


def save_toy_sd15(folder: Path, model: ToySd15, vae: AutoencoderKL) -> None:
    """Write a `StableDiffusionPipeline` folder without a safety checker, with weights in half precision."""
    write_tokenizer(folder / "tokenizer")
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=model.unet,
        scheduler=sd15_scheduler(),  # pyright: ignore[reportArgumentType]
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )
    cast(pipeline.unet, torch.float16)
    cast(pipeline.vae, torch.float16)
    pipeline.save_pretrained(folder, safe_serialization=True)
    make_portable(folder)


def save_toy_flow(folder: Path, model: ToyFlow, vae: AutoencoderKL, *, shift_factor: float) -> None:
    """Write a `StableDiffusion3Pipeline` folder without T5, with weights in half precision.

    Args:
        folder: the folder.
        model: the trained parts.
        vae: the VAE of the toy models.
        shift_factor: mean of the unscaled latents; the model is trained on (latents - shift) * scaling_factor.
    """
    for tokenizer in ("tokenizer", "tokenizer_2"):
        write_tokenizer(folder / tokenizer)
    vae.register_to_config(shift_factor=shift_factor)
    pipeline = StableDiffusion3Pipeline(
        transformer=model.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT),
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder_2=model.text_encoder_2,
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        text_encoder_3=None,  # pyright: ignore[reportArgumentType]
        tokenizer_3=None,  # pyright: ignore[reportArgumentType]
    )
    cast(pipeline.transformer, torch.float16)
    cast(pipeline.vae, torch.float16)
    pipeline.save_pretrained(folder, safe_serialization=True)
    index = folder / "model_index.json"
    content = json.loads(index.read_text(encoding="utf-8")) | {LENGTH_KEY: FLOW_T5_TOKENS}
    index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save_ddpm(
    folder: Path, unet: UNet2DModel, *, half: bool, prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
) -> None:
    """Write a `DDPMPipeline` folder."""
    pipeline = DDPMPipeline(
        unet=unet, scheduler=DDPMScheduler(num_train_timesteps=1000, prediction_type=prediction_type)
    )
    if half:
        cast(pipeline.unet, torch.float16)
    pipeline.save_pretrained(folder, safe_serialization=True)
