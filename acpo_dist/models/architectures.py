"""Published architectures of Stable Diffusion, for models that are not on the disk.

The values are from the configuration files of stabilityai/stable-diffusion-xl-base-1.0 and of Stable Diffusion 1.5.
They are used to plan a run and to build a model of the same size with random weights.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from acpo_dist.core.errors import ModelError
from acpo_dist.models import flow_architectures as flow
from acpo_dist.models.loading import resolve_path

_CLIP_L: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "projection_dim": 768, "hidden_act": "quick_gelu", "vocab_size": 49408, "max_position_embeddings": 77,
    "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
}  # fmt: skip
_BIG_G: dict[str, Any] = _CLIP_L | {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "projection_dim": 1280, "hidden_act": "gelu",
}  # fmt: skip
_VAE: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2, "norm_num_groups": 32,
}  # fmt: skip
_UNET: dict[str, Any] = {"in_channels": 4, "out_channels": 4, "layers_per_block": 2, "norm_num_groups": 32}
_SDXL_UNET: dict[str, Any] = _UNET | {
    "sample_size": 128, "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [5, 10, 20], "transformer_layers_per_block": [1, 2, 10], "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
_SD15_UNET: dict[str, Any] = _UNET | {
    "sample_size": 64, "block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3, "attention_head_dim": 8,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Configurations of a pipeline's networks, with the keys of their `config.json` files."""

    family: str
    unet: Mapping[str, Any]
    vae: Mapping[str, Any] | None = None
    text_encoders: tuple[Mapping[str, Any], ...] = ()
    published: bool = False
    """Whether this is the published architecture of the family, used because the model is not on the disk."""
    max_sequence_length: int | None = None
    """Tokens of T5 that the folder's model_index.json sets; None is the family's default."""

    @property
    def text_length(self) -> int:
        """Number of tokens of a prompt; 0 without text encoders."""
        return int(self.text_encoders[0]["max_position_embeddings"]) if self.text_encoders else 0


PUBLISHED: dict[str, Architecture] = {
    "sdxl": Architecture(
        family="sdxl", unet=_SDXL_UNET, vae=_VAE | {"sample_size": 1024, "scaling_factor": 0.13025},
        text_encoders=(_CLIP_L, _BIG_G), published=True,
    ),
    "sd15": Architecture(
        family="sd15", unet=_SD15_UNET, vae=_VAE | {"sample_size": 512, "scaling_factor": 0.18215},
        text_encoders=(_CLIP_L,), published=True,
    ),
    "sd3": Architecture(
        family="sd3", unet=flow.SD35_MEDIUM, vae=flow.SD3_VAE, text_encoders=(_CLIP_L, _BIG_G, flow.T5_XXL),
        published=True,
    ),
    "zimage": Architecture(
        family="zimage", unet=flow.ZIMAGE, vae=flow.ZIMAGE_VAE, text_encoders=(flow.QWEN3_4B,), published=True
    ),
    "flux2_klein": Architecture(
        family="flux2_klein", unet=flow.FLUX2_KLEIN, vae=flow.FLUX2_VAE, text_encoders=(flow.QWEN3_4B,), published=True
    ),
}  # fmt: skip
TRANSFORMERS = ("sd3", "zimage", "flux2_klein")
"""Families whose network is a transformer."""
_PARTS = {
    "sdxl": ("text_encoder", "text_encoder_2"), "sd15": ("text_encoder",), "ddpm": (),
    "sd3": ("text_encoder", "text_encoder_2", "text_encoder_3"), "zimage": ("text_encoder",),
    "flux2_klein": ("text_encoder",),
}  # fmt: skip
SD2 = Architecture(
    family="sd15", published=True, vae=PUBLISHED["sd15"].vae,
    unet=_SD15_UNET | {
        "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True,
        "upcast_attention": True,
    },
    text_encoders=(
        _CLIP_L | {
            "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
            "projection_dim": 512, "hidden_act": "gelu",
        },
    ),
)  # fmt: skip
"""Stable Diffusion 2.x at 512 px; 768 px differ in sample_size."""


def architecture_of(config: Any) -> Architecture:
    """Read the architecture of a model from its folder or from the hub's local cache, without downloading.

    Args:
        config: the `model` section.

    Returns:
        The architecture; the published one of the family if the model is not on the disk.

    Raises:
        ModelError: the model is not on the disk and its family has no published architecture, or files are missing.
    """
    family = config.type
    if family not in _PARTS:
        raise ModelError(f"model.type `{family}`: only {', '.join(_PARTS)} can be planned.")
    unet = _read(config, "transformer" if family in TRANSFORMERS else "unet") or (
        _read(config, None) if family == "ddpm" else None
    )
    if unet is None:
        if family not in PUBLISHED:
            raise ModelError(f"model.path: `{config.path}` is not on this disk, so its size is unknown.")
        published = PUBLISHED[family]
        # Without T5 two encoders are left.
        count = 2 if getattr(config, "t5", True) is False else None
        return replace(published, text_encoders=published.text_encoders[:count])
    encoders = [_read(config, part) for part in _PARTS[family]]
    if family == "sd3" and (encoders[2] is None or not config.t5):
        encoders = encoders[:2]
    vae = None if family == "ddpm" else _read(config, "vae")
    if any(part is None for part in encoders) or (vae is None and family != "ddpm"):
        raise ModelError(f"model.path: `{config.path}` is incomplete: a text encoder or the VAE has no config.json.")
    index = (_read(config, None, "model_index.json") or {}) if family == "sd3" else {}
    return Architecture(
        family=family, unet=unet, vae=vae, text_encoders=tuple(part for part in encoders if part),
        max_sequence_length=index.get("max_sequence_length"),
    )  # fmt: skip


def prediction_type_of(config: Any) -> str | None:
    """Read the prediction type of a model from its folder or from the hub's local cache.

    Args:
        config: the `model` section.

    Returns:
        `epsilon`, `v_prediction` or `sample`; None if the scheduler configuration is not on the disk.
    """
    scheduler = _read(config, "scheduler", "scheduler_config.json")
    return None if scheduler is None else str(scheduler.get("prediction_type", "epsilon"))


def _read(config: Any, part: str | None, file_name: str = "config.json") -> Mapping[str, Any] | None:
    name = f"{part}/{file_name}" if part else file_name
    path = config.path
    if path == "train":
        raise ModelError("model.path is `train`: the run trains a small model, which needs no plan.")
    resolved = resolve_path(path)
    if Path(resolved).is_file():
        from acpo_dist.models.checkpoint_files import configurations, inspect

        whole = "model_index" if file_name == "model_index.json" else "unet"
        return configurations(inspect(Path(resolved)), config).get(part or whole)
    file: Any = Path(resolved) / name
    if not Path(resolved).is_dir():
        file = try_to_load_from_cache(path, name, revision=config.revision)
    if not isinstance(file, str | Path) or not Path(file).is_file():
        return None
    return json.loads(Path(file).read_text(encoding="utf-8"))
