"""Stable Diffusion XL: two text encoders, pooled and size conditioning, latent VAE."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from typing_extensions import override

from acpo_dist.core.errors import ModelError
from acpo_dist.core.sizes import Size
from acpo_dist.models.config import SdxlConfig
from acpo_dist.models.family import Condition
from acpo_dist.models.latent import LatentFamily
from acpo_dist.models.loading import load_part
from acpo_dist.models.text import Encoders, encode_chunks

TIME_IDS = 6
"""Number of time ids: original size, crop and target size, two values each."""


class SdxlFamily(LatentFamily):
    """Stable Diffusion XL: U-Net, two text encoders and VAE."""

    pipeline: ClassVar[Any] = StableDiffusionXLPipeline
    text_parts: ClassVar[tuple[tuple[str, str, Any], ...]] = (
        ("tokenizer", "text_encoder", CLIPTextModel),
        ("tokenizer_2", "text_encoder_2", CLIPTextModelWithProjection),
    )

    Config = SdxlConfig

    @classmethod
    def _embedder(cls, config: SdxlConfig, path: str) -> Any:
        zeros = cls._null_is_zeros(config, path)

        def embed(encoders: Encoders, prompt: str | None) -> dict[str, Tensor]:
            text = prompt or ("" if prompt is None else config.negative_prompt) or ""
            # SDXL uses the penultimate layer of both encoders, and the projection of the second encoder's first chunk.
            made, last = encode_chunks(
                encoders, text, lambda _, output: output.hidden_states[-2], cut=config.long_prompts == "cut",
                hidden=True,
            )  # fmt: skip
            made["pooled_prompt_embeds"] = last[0]
            return {name: torch.zeros_like(value) for name, value in made.items()} if zeros and prompt == "" else made

        return embed

    @classmethod
    def _null_is_zeros(cls, config: SdxlConfig, path: str) -> bool:
        index = load_part(cls.pipeline.load_config, path, None)
        return bool(index.get("force_zeros_for_empty_prompt", True)) and config.negative_prompt is None

    @override
    def size_conditioning(
        self, originals: Sequence[Size], crops: Sequence[tuple[int, int]], size: Size
    ) -> dict[str, Tensor]:
        rows = [
            [height, width, *crop, size[1], size[0]] for (width, height), crop in zip(originals, crops, strict=True)
        ]
        return {"time_ids": torch.tensor(rows, dtype=torch.float32, device=self.device)}

    @override
    def sized(self, condition: Condition, noisy: Tensor) -> Condition:
        """Add time ids of an image that was drawn at its size and not cropped, unless the condition has its own."""
        if "time_ids" in condition.tensors:
            return condition
        height, width = (side * self.factor for side in noisy.shape[2:])
        # float32 for any data type of the weights: the embedding of the ids is computed in float32.
        ids = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device=noisy.device)
        return Condition({**condition.tensors, "time_ids": ids.expand(len(noisy), -1)})

    def _added(self, condition: Condition) -> dict[str, Tensor]:
        tensors = condition.tensors
        ids = tensors["time_ids"]
        if ids.ndim != 2 or ids.shape[1] != TIME_IDS or len(ids) != len(tensors["prompt_embeds"]):
            raise ModelError(
                f"time ids of shape {tuple(ids.shape)}: expected ({len(tensors['prompt_embeds'])}, {TIME_IDS}): "
                "original height and width, top and left of the crop, target height and width of each sample."
            )
        return {"text_embeds": tensors["pooled_prompt_embeds"], "time_ids": ids}

    def _check_network(self, unet: Any) -> None:
        super()._check_network(unet)
        if unet.config.get("addition_embed_type") != "text_time":
            raise ModelError(f"model.path: the U-Net of `{self.path}` takes no sizes or pooled text: it is no SDXL.")
        width = unet.config["addition_time_embed_dim"]
        pooled = load_part(CLIPTextConfig.from_pretrained, self.path, "text_encoder_2")
        ids, rest = divmod(unet.config["projection_class_embeddings_input_dim"] - pooled.projection_dim, width)
        if rest or ids != TIME_IDS:
            raise ModelError(
                f"model.path: the U-Net of `{self.path}` takes {ids} time ids, expected SDXL's {TIME_IDS} (sizes and "
                "crop). A refiner takes 5, with an aesthetic score; tune the base model."
            )
