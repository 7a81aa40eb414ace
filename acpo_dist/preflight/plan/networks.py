"""A configured model's networks on the meta device: every shape and type, no value and no memory."""

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from acpo_dist.models.architectures import Architecture
from acpo_dist.models.config import TuningConfig
from acpo_dist.models.family import Condition
from acpo_dist.models.tuning import TunedNetwork

META = torch.device("meta")


def new_unet(architecture: Architecture, dtype: torch.dtype) -> Any:
    """The denoiser, frozen, on the meta device."""
    kind = UNet2DModel if architecture.family == "ddpm" else UNet2DConditionModel
    with META:
        unet = kind.from_config(dict(architecture.unet))
    return _frozen(unet, dtype)


def new_vae(architecture: Architecture, dtype: torch.dtype) -> Any:
    """The VAE, frozen, on the meta device."""
    with META:
        vae = AutoencoderKL.from_config(dict(architecture.vae or {}))
    return _frozen(vae, dtype)


def new_text_encoders(architecture: Architecture) -> list[Any]:
    """The text encoders on the meta device; SDXL's second has a projection."""
    kinds = (CLIPTextModel, CLIPTextModelWithProjection)
    with META:
        return [
            kind(CLIPTextConfig(**_text_keys(config)))
            for kind, config in zip(kinds, architecture.text_encoders, strict=False)
        ]


def _frozen(module: Any, dtype: torch.dtype) -> Any:
    # Not `module.to`: diffusers warns there of what matters for values alone.
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module.requires_grad_(False).eval()


def _text_keys(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in ("architectures", "model_type")}


def reduction(architecture: Architecture) -> int:
    """Pixels per latent, along each side."""
    return 2 ** (len(architecture.vae["block_out_channels"]) - 1) if architecture.vae else 1


def sample_shape(config: Any, architecture: Architecture) -> tuple[int, int, int]:
    """(C, H, W) of x_0."""
    factor, size = reduction(architecture), architecture.unet["sample_size"]
    pixels = getattr(config, "image_size", None) or (size if isinstance(size, int) else size[0]) * factor
    return architecture.unet["in_channels"], pixels // factor, pixels // factor


def new_condition(architecture: Architecture, count: int, dtype: torch.dtype) -> Condition:
    """Conditioning of `count` prompts."""
    if architecture.family == "ddpm":
        return Condition({})
    width = architecture.unet["cross_attention_dim"]
    states = torch.zeros(count, architecture.text_length, width, dtype=dtype, device=META)
    if architecture.family != "sdxl":
        return Condition({"prompt_embeds": states})
    pooled = torch.zeros(count, architecture.text_encoders[-1]["projection_dim"], dtype=dtype, device=META)
    ids = torch.zeros(count, 6, dtype=dtype, device=META)
    return Condition({"prompt_embeds": states, "text_embeds": pooled, "time_ids": ids})


class FakePolicy:
    """The policy's forward as the families do it."""

    def __init__(self, unet: Any, tuning: TuningConfig, *, checkpointing: bool, narrow: bool) -> None:
        """Put adapters in, or make all weights trainable.

        Args:
            narrow: hold the adapters in the type of the rest, as DeepSpeed does.
        """
        if checkpointing:
            unet.enable_gradient_checkpointing()
        self.network: nn.Module = unet
        self._tuned = TunedNetwork(unet, tuning, seed=0, keep_anchor=False)
        self._full = tuning.method == "full"
        if narrow:
            dtype = self._tuned.dtype
            for parameter in self.network.parameters():
                parameter.data = parameter.data.to(dtype)

    def predict(self, noisy: Tensor, condition: Condition) -> Tensor:
        """One pass, float32 in and out."""
        dtype = self._tuned.dtype
        timesteps = torch.zeros(len(noisy), dtype=torch.long, device=noisy.device)
        tensors = dict(condition.tensors)
        if not tensors:
            return self.network(noisy.to(dtype), timesteps, return_dict=False)[0].float()
        states = tensors.pop("prompt_embeds").to(dtype)
        return self.network(
            noisy.to(dtype), timesteps, states, added_cond_kwargs=tensors or None, return_dict=False
        )[0].float()  # fmt: skip

    def anchor(self, noisy: Tensor, condition: Condition) -> Tensor:
        """The base model's pass: a copy of the same shape beside full fine-tuning, adapters off for LoRA."""
        with torch.no_grad():
            if self._full:
                return self.predict(noisy, condition)
            with self._tuned.anchored():
                return self.predict(noisy, condition)
