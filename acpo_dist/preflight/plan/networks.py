"""Networks of a configured model on the meta device: shapes and types without values or memory."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from acpo_dist.diffusion.clean_rule import NO_RULE
from acpo_dist.diffusion.flow import flow_inputs
from acpo_dist.models.architectures import Architecture
from acpo_dist.models.family import Condition
from acpo_dist.models.flux2 import PATCH, Flux2KleinFamily
from acpo_dist.models.loading import DTYPES
from acpo_dist.models.sd3 import DEFAULT_LENGTH, Sd3Family
from acpo_dist.models.sdxl import TIME_IDS
from acpo_dist.models.transformer import DEFAULT_PIXELS, TransformerFamily
from acpo_dist.models.tuning import TunedNetwork
from acpo_dist.models.vae import VAE_DTYPES, VaeDecoder
from acpo_dist.models.zimage import ZImageFamily

META = torch.device("meta")
FAMILIES: dict[str, type[TransformerFamily]] = {
    "sd3": Sd3Family, "zimage": ZImageFamily, "flux2_klein": Flux2KleinFamily,
}  # fmt: skip
"""Families with a transformer."""


def new_unet(architecture: Architecture, dtype: torch.dtype) -> Any:
    """Return the frozen denoiser on the meta device."""
    family = FAMILIES.get(architecture.family)
    kind = UNet2DModel if architecture.family == "ddpm" else family.network_class if family else UNet2DConditionModel
    with META:
        unet = kind.from_config(dict(architecture.unet))
    return _frozen(unet, dtype)


def new_vae(architecture: Architecture, dtype: torch.dtype) -> Any:
    """Return the frozen VAE on the meta device."""
    family = FAMILIES.get(architecture.family)
    kind = family.vae_class if family else AutoencoderKL
    with META:
        vae = kind.from_config(dict(architecture.vae or {}))
    return _frozen(vae, dtype)


def new_text_encoders(architecture: Architecture) -> list[Any]:
    """Return the text encoders on the meta device; SDXL's second one and Stable Diffusion 3's have a projection."""
    first = CLIPTextModelWithProjection if architecture.family == "sd3" else CLIPTextModel
    with META:
        return [
            _new_text_encoder(first if index == 0 else CLIPTextModelWithProjection, config)
            for index, config in enumerate(architecture.text_encoders)
        ]


def _new_text_encoder(clip: Any, config: Any) -> Any:
    keys = _text_keys(config)
    if config.get("model_type") == "t5":
        return T5EncoderModel(T5Config(**keys))
    if config.get("model_type") == "qwen3":
        return Qwen3Model(Qwen3Config(**keys))
    return clip(CLIPTextConfig(**keys))


def _frozen(module: Any, dtype: torch.dtype) -> Any:
    # `module.to` is avoided because its warnings in diffusers concern values.
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module.requires_grad_(False).eval()


def _text_keys(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in ("architectures", "model_type")}


def reduction(architecture: Architecture) -> int:
    """Return the number of pixels per latent along each side."""
    patches = PATCH if architecture.family == "flux2_klein" else 1
    return patches * 2 ** (len(architecture.vae["block_out_channels"]) - 1) if architecture.vae else 1


def sample_shape(config: Any, architecture: Architecture) -> tuple[int, int, int]:
    """Return (C, H, W) of x_0 for the largest configured size, or for the default of the U-Net."""
    factor, channels = reduction(architecture), architecture.unet["in_channels"]
    if config.sizes:
        width, height = max((size for size, _ in config.sizes), key=lambda size: size[0] * size[1])
        return channels, height // factor, width // factor
    size = architecture.unet.get("sample_size") or DEFAULT_PIXELS // factor
    height, width = (size, size) if isinstance(size, int) else size
    return channels, height, width


class MetaFamily:
    """A model on the meta device, with the part of `ModelFamily` that `PolicyNetwork` and the phases of a plan use."""

    device = "meta"

    def __init__(self, config: Any, architecture: Architecture, dtype: torch.dtype, *, trainable: bool = True) -> None:
        """Build the network, with adapters or a frozen copy according to `config.tuning`.

        Args:
            config: configuration section of the model.
            architecture: architecture of the model.
            dtype: type of the network's own weights.
            trainable: whether this is the learner's model, which has the anchor and recomputes activations.
        """
        memory: Any = getattr(config, "memory", None)
        unet = new_unet(architecture, dtype)
        if memory is not None and memory.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        self.network: nn.Module = unet
        anchor_dtype = DTYPES[memory.anchor_dtype] if memory is not None else torch.float32
        self._tuned = TunedNetwork(unet, config.tuning, seed=0, keep_anchor=trainable, anchor_dtype=anchor_dtype)
        self._architecture, self._dtype, self._trainable = architecture, DTYPES[config.dtype], trainable
        self.sample_shape = sample_shape(config, architecture)
        self._kind = FAMILIES.get(architecture.family)
        self.prediction_type, self.clean_rule = "flow_prediction" if self._kind else "epsilon", NO_RULE
        length = getattr(config, "max_sequence_length", None) or architecture.max_sequence_length
        self._length = int(length or DEFAULT_LENGTH)
        # Any decreasing values work: the amount of computation does not depend on them.
        self.alpha_bars = torch.linspace(0.99, 0.01, 1000, dtype=torch.float64)
        self.decoder: VaeDecoder | None = None
        if architecture.vae is not None and memory is not None:
            # float16 has the size of bfloat16 and is checked for overflow, which requires values.
            name = config.vae_dtype if config.vae_dtype != "float16" else "bfloat16"
            decoder = self._kind.decoder_class if self._kind else VaeDecoder
            self.decoder = decoder(
                new_vae(architecture, VAE_DTYPES[name]), checkpointing=memory.vae_checkpointing,
                slicing=memory.vae_slicing, tiling=memory.vae_tiling,
            )  # fmt: skip

    @property
    def held(self) -> list[Tensor]:
        """Return all weights: policy, frozen copy and VAE."""
        modules = {id(module): module for module in (self.network, *self._anchors(), *self._decoders())}
        return [parameter for module in modules.values() for parameter in module.parameters()]

    def cast(self, dtype: torch.dtype) -> None:
        """Convert the trainable weights to `dtype`, as DeepSpeed does."""
        for parameter in self.network.parameters():
            parameter.data = parameter.data.to(dtype)

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Return a `Condition` with the names and shapes of the family's own."""
        architecture, count = self._architecture, len(prompts)
        if architecture.family == "ddpm":
            return Condition({})

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(count, *shape, dtype=self._dtype, device=META)

        network = architecture.unet
        if architecture.family == "sd3":
            length = architecture.text_length + self._length
            pooled = zeros(network["pooled_projection_dim"])
            return Condition(
                {"prompt_embeds": zeros(length, network["joint_attention_dim"]), "pooled_prompt_embeds": pooled}
            )
        if architecture.family == "zimage":
            # Lengths are read as numbers, so they have values. The longest prompt bounds memory and time.
            lengths = torch.full((count,), self._length)
            return Condition({"prompt_embeds": zeros(self._length, network["cap_feat_dim"]), "prompt_length": lengths})
        if architecture.family == "flux2_klein":
            return Condition({"prompt_embeds": zeros(self._length, network["joint_attention_dim"])})
        tensors = {"prompt_embeds": zeros(architecture.text_length, architecture.unet["cross_attention_dim"])}
        if architecture.family == "sdxl":
            tensors["pooled_prompt_embeds"] = zeros(architecture.text_encoders[-1]["projection_dim"])
            tensors["time_ids"] = zeros(TIME_IDS)
        return Condition(tensors)

    def sized(self, condition: Condition, noisy: Tensor) -> Condition:
        """Return the condition, which has time ids already."""
        return condition

    def predict(self, noisy: Tensor, timesteps_B: Tensor, condition: Condition) -> Tensor:
        """Run one pass of the network with float32 input and output."""
        dtype, tensors = self._tuned.dtype, condition.tensors
        if self._kind is not None:
            cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}
            state, at = flow_inputs(noisy, timesteps_B, len(self.alpha_bars))
            # The call of the family itself, which needs the network and the number of timesteps only.
            velocity: Any = self._kind._velocity
            return velocity(self, state.to(dtype), at.float(), cast).float()
        arguments: dict[str, Any] = {}
        if tensors:
            arguments["encoder_hidden_states"] = tensors["prompt_embeds"].to(dtype)
        if "time_ids" in tensors:
            added = {"text_embeds": tensors["pooled_prompt_embeds"], "time_ids": tensors["time_ids"]}
            arguments["added_cond_kwargs"] = added
        return self._tuned.active(noisy.to(dtype), timesteps_B, return_dict=False, **arguments)[0].float()

    def anchored(self) -> AbstractContextManager[None]:
        """Return a context in which `predict` runs the frozen base model."""
        return self._tuned.anchored()

    def substituted(self, weights: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Return a context in which `predict` runs with these values of the trainable weights."""
        return self._tuned.substituted(weights)

    def decode(self, clean: Tensor) -> Tensor:
        """Decode x_0 to RGB pixels, float32, nominally in [0, 1]."""
        return self.decoder.decode(clean) if self.decoder is not None else clean.float() / 2 + 0.5

    def _anchors(self) -> list[nn.Module]:
        if not (self._trainable and self._tuned.method == "full"):
            return []
        with self.anchored():
            return [self._tuned.active]

    def _decoders(self) -> list[nn.Module]:
        return [self.decoder.vae] if self.decoder is not None else []
