"""FLUX.2-klein (base): a transformer on normalised 2 x 2 patches of VAE latents, with a Qwen3 encoder."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor
from transformers import Qwen3ForCausalLM
from typing_extensions import override

from acpo_dist.core.errors import ModelError
from acpo_dist.models.config import Flux2KleinConfig
from acpo_dist.models.loading import load_part
from acpo_dist.models.text import Encoders
from acpo_dist.models.transformer import TransformerFamily, chat_tokens
from acpo_dist.models.vae import VaeDecoder

PATCH = 2


class Flux2Decoder(VaeDecoder):
    """Decodes and encodes normalised patches of latents: x_0 (B, 4 C, h / 2, w / 2) of latents (B, C, h, w)."""

    @property
    @override
    def factor(self) -> int:
        return PATCH * super().factor

    @property
    @override
    def channels(self) -> int:
        return PATCH * PATCH * super().channels

    @override
    def to_vae(self, clean: Tensor) -> Tensor:
        mean, std = self._statistics(clean)
        return torch.pixel_shuffle(clean * std + mean, PATCH)

    @override
    def from_vae(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return (torch.pixel_unshuffle(latents, PATCH) - mean) / std

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        norm = self.vae.bn
        std = torch.sqrt(norm.running_var + self.vae.config["batch_norm_eps"])
        return norm.running_mean.to(like).reshape(1, -1, 1, 1), std.to(like).reshape(1, -1, 1, 1)


class Flux2KleinFamily(TransformerFamily):
    """FLUX.2-klein-base: transformer, text encoder and VAE."""

    pipeline: ClassVar[Any] = Flux2KleinPipeline
    network_class: ClassVar[Any] = Flux2Transformer2DModel
    vae_class: ClassVar[Any] = AutoencoderKLFlux2
    decoder_class: ClassVar[type[VaeDecoder]] = Flux2Decoder
    text_parts: ClassVar[tuple[tuple[str, str, Any], ...]] = (("tokenizer", "text_encoder", Qwen3ForCausalLM),)

    Config = Flux2KleinConfig

    @classmethod
    @override
    def _text_facts(cls, config: Flux2KleinConfig, path: str) -> dict[str, Any]:
        return {"length": config.max_sequence_length, "layers": list(config.text_layers)}

    @classmethod
    @override
    def _embedder(cls, config: Flux2KleinConfig, path: str) -> Any:
        def embed(encoders: Encoders, prompt: str | None) -> dict[str, Tensor]:
            # The null condition is the encoded empty prompt. Padding is part of the condition, as in the pipeline.
            text = prompt or ("" if prompt is None else config.negative_prompt) or ""
            ids, mask = chat_tokens(encoders[0], text, config.max_sequence_length, thinking=False)
            model = encoders[0].model
            output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
            return {"prompt_embeds": torch.cat([output.hidden_states[layer] for layer in config.text_layers], -1)}

        return embed

    @classmethod
    @override
    def call_arguments(cls, config: Flux2KleinConfig, guidance_scale: float) -> dict[str, Any]:
        return super().call_arguments(config, guidance_scale) | {"text_encoder_out_layers": config.text_layers}

    @override
    def _velocity(self, state: Tensor, at: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        size, height, width = len(state), *state.shape[2:]
        text = tensors["prompt_embeds"]
        image_ids = _positions(range(height), range(width), range(1), state.device).expand(size, -1, -1)
        text_ids = _positions(range(1), range(1), range(text.shape[1]), state.device).expand(size, -1, -1)
        output = self._tuned.active(
            hidden_states=state.flatten(2).transpose(1, 2), timestep=at / len(self.alpha_bars), guidance=None,
            encoder_hidden_states=text, txt_ids=text_ids, img_ids=image_ids, return_dict=False,
        )[0]  # fmt: skip
        return output.transpose(1, 2).reshape(state.shape)

    @override
    def _scheduler_arguments(self, scheduler: Any, num_steps: int) -> Mapping[str, Any]:
        even = [1 - index / num_steps for index in range(num_steps)]
        return {"sigmas": even, "mu": compute_empirical_mu(self._tokens, num_steps)}

    @override
    def _check_network(self, unet: Any) -> None:
        index = load_part(self.pipeline.load_config, self.path, None)
        if unet.config.get("guidance_embeds", False) or index.get("is_distilled", False):
            raise ModelError(
                f"model.path: `{self.path}` is a distilled model, which takes guidance as an input or has it built in; "
                "its velocity is not that of a flow and cannot be anchored. Tune the base model "
                "(black-forest-labs/FLUX.2-klein-base-4B)."
            )


def _positions(rows: range, columns: range, places: range, device: torch.device) -> Tensor:
    """Rotary positions (time, row, column, place in the text), shape (1, count, 4)."""
    axes = [torch.tensor(list(axis), device=device) for axis in (range(1), rows, columns, places)]
    return torch.cartesian_prod(*axes)[None]
