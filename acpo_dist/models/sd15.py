"""Stable Diffusion 1.4, 1.5 and 2.x: one text encoder, latent VAE, noise or velocity prediction."""

from typing import Any, ClassVar

from diffusers import StableDiffusionPipeline
from torch import Tensor
from transformers import CLIPTextModel

from acpo_dist.core.errors import ModelError
from acpo_dist.models.config import Sd15Config
from acpo_dist.models.latent import LatentFamily
from acpo_dist.models.text import Encoder, Encoders, encode_chunks


class Sd15Family(LatentFamily):
    """Stable Diffusion 1.x and 2.x: U-Net, text encoder and VAE."""

    pipeline: ClassVar[Any] = StableDiffusionPipeline
    text_parts: ClassVar[tuple[tuple[str, str, Any], ...]] = (("tokenizer", "text_encoder", CLIPTextModel),)
    # The safety checker replaces flagged images by black ones, but scores and gradients need the model's output.
    unused_parts: ClassVar[tuple[str, ...]] = ("safety_checker", "feature_extractor", "image_encoder")
    saved_with: ClassVar[dict[str, Any]] = {"requires_safety_checker": False}

    Config = Sd15Config

    @classmethod
    def _embedder(cls, config: Sd15Config, path: str) -> Any:
        def embed(encoders: Encoders, prompt: str | None) -> dict[str, Tensor]:
            # The null condition is the encoded empty prompt, not zeros.
            text = prompt or ("" if prompt is None else config.negative_prompt) or ""
            # As in diffusers, the null condition is that of the last layer.
            skipped = config.clip_skip if prompt else None

            def states(encoder: Encoder, output: Any) -> Tensor:
                if skipped is None:
                    return output[0]
                # transformers 5 has no `text_model` around the layers.
                layers = getattr(encoder.model, "text_model", encoder.model)
                return layers.final_layer_norm(output.hidden_states[-(skipped + 1)])

            cut = config.long_prompts == "cut"
            return encode_chunks(encoders, text, states, cut=cut, hidden=skipped is not None)[0]

        return embed

    def _check_network(self, unet: Any) -> None:
        super()._check_network(unet)
        if unet.config.get("addition_embed_type") is not None or unet.config.get("class_embed_type") is not None:
            raise ModelError(
                f"model.path: the U-Net of `{self.path}` takes more than timesteps and text: it is no Stable Diffusion "
                "1.x or 2.x text-to-image model."
            )
