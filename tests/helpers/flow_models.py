"""Pipelines of the flow families with random weights, a millionth of the published sizes."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from acpo_dist.data.toy.text import MAX_TOKENS, vocabulary, write_tokenizer
from acpo_dist.models.training.random_model import byte_tokenizer


def _vae(kind: Any = AutoencoderKL, **options: Any) -> Any:
    return kind(
        in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, sample_size=32,
        **options,
    )  # fmt: skip


def _clip(folder: Path) -> tuple[Any, Any]:
    write_tokenizer(folder)
    words = len(vocabulary()[0])
    config = CLIPTextConfig(
        vocab_size=words, hidden_size=32, intermediate_size=37, projection_dim=32, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=MAX_TOKENS, eos_token_id=words - 1, pad_token_id=words - 1,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config), CLIPTokenizer.from_pretrained(folder)


def _qwen(layers: int) -> tuple[Any, Any]:
    tokenizer = byte_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
    )  # fmt: skip
    return Qwen3ForCausalLM(config), tokenizer


def tiny_sd3(folder: Path, *, t5: bool = True, shift: float = 3.0) -> StableDiffusion3Pipeline:
    """Write and return a Stable Diffusion 3 pipeline for 16 px images, with or without T5."""
    torch.manual_seed(0)
    pairs = [_clip(folder / name) for name in ("tokenizer", "tokenizer_2")]
    encoder = tokenizer = None
    if t5:
        words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((chr(code), -3.0) for code in range(97, 123))]
        tokenizer = T5Tokenizer(vocab=[*words, ("▁", -2.0)], extra_ids=0)
        encoder = T5EncoderModel(
            T5Config(vocab_size=30, d_model=32, d_kv=8, d_ff=37, num_layers=1, num_heads=4, is_encoder_decoder=False)
        )
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32 if t5 else 64,
        pooled_projection_dim=64, pos_embed_max_size=8, qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=_vae(latent_channels=4, scaling_factor=1.5035, shift_factor=0.0609, use_quant_conv=False,
                 use_post_quant_conv=False),
        text_encoder=pairs[0][0], tokenizer=pairs[0][1], text_encoder_2=pairs[1][0], tokenizer_2=pairs[1][1],
        text_encoder_3=encoder, tokenizer_3=tokenizer,
    )  # fmt: skip
    return _saved(pipeline, folder)


def tiny_zimage(folder: Path) -> ZImagePipeline:
    """Write and return a Z-Image pipeline."""
    torch.manual_seed(0)
    encoder, tokenizer = _qwen(2)
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=16, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, cap_feat_dim=16, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    with torch.no_grad():
        # The padding tokens start as uninitialised memory.
        for name, parameter in transformer.named_parameters():
            if "pad_token" in name:
                parameter.normal_()
    pipeline = ZImagePipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=_vae(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False,
                 use_post_quant_conv=False),
        text_encoder=encoder.model, tokenizer=tokenizer,
    )  # fmt: skip
    return _saved(pipeline, folder)


def tiny_flux2(folder: Path, **options: Any) -> Flux2KleinPipeline:
    """Write and return a FLUX.2-klein pipeline."""
    torch.manual_seed(0)
    encoder, tokenizer = _qwen(3)
    transformer = Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, timestep_guidance_channels=256, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )  # fmt: skip
    vae = _vae(AutoencoderKLFlux2, latent_channels=4)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    pipeline = Flux2KleinPipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=vae,
        text_encoder=encoder, tokenizer=tokenizer, **options,
    )  # fmt: skip
    return _saved(pipeline, folder)


def _saved(pipeline: Any, folder: Path) -> Any:
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipeline.save_pretrained(folder, safe_serialization=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
