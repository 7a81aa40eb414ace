"""Stable Diffusion 3 and 3.5: two CLIP encoders, an optional T5 encoder, a joint transformer and a latent VAE."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTextModelWithProjection, T5EncoderModel
from typing_extensions import override

from acpo_dist.core.json_text import read_object
from acpo_dist.models.config import Sd3Config
from acpo_dist.models.loading import load_part
from acpo_dist.models.single_file import tokenizer_source
from acpo_dist.models.text import Encoders
from acpo_dist.models.transformer import TransformerFamily, linear_mu

T5_PARTS = ("tokenizer_3", "text_encoder_3")
DEFAULT_LENGTH = 256
"""Tokens of T5 in the pipeline."""
LENGTH_KEY = "max_sequence_length"
"""Key of model_index.json with which a folder replaces `DEFAULT_LENGTH`; diffusers ignores it."""


class Sd3Family(TransformerFamily):
    """Stable Diffusion 3 and 3.5: transformer, text encoders and VAE."""

    pipeline: ClassVar[Any] = StableDiffusion3Pipeline
    network_class: ClassVar[Any] = SD3Transformer2DModel
    text_parts: ClassVar[tuple[tuple[str, str, Any], ...]] = (
        ("tokenizer", "text_encoder", CLIPTextModelWithProjection),
        ("tokenizer_2", "text_encoder_2", CLIPTextModelWithProjection),
        (*T5_PARTS, T5EncoderModel),
    )
    unused_parts: ClassVar[tuple[str, ...]] = ("image_encoder", "feature_extractor")

    Config = Sd3Config

    @classmethod
    def notes(cls, config: Sd3Config) -> list[str]:
        """Return what a run says of this model when it starts: whether T5 is missing. No weights are loaded.

        Raises:
            ModelError: the model is not available.
        """
        path = tokenizer_source(config)
        if len(cls._text_parts(config, path)) == 3:
            return []
        why = "has no T5" if config.t5 else "is used without its T5 (model.t5=false)"
        return [
            f"`{config.path}` {why}: the CLIP encoders alone read the prompts, and T5's part of the condition is zero, "
            "as in the pipeline without it"
        ]

    @classmethod
    @override
    def _unused(cls, config: Sd3Config) -> tuple[str, ...]:
        return cls.unused_parts if config.t5 else (*cls.unused_parts, *T5_PARTS)

    @classmethod
    @override
    def _text_parts(cls, config: Sd3Config, path: str) -> tuple[tuple[str, str, Any], ...]:
        has_t5 = config.t5 and bool((_index(config, path).get(T5_PARTS[1]) or [None, None])[1])
        return cls.text_parts if has_t5 else cls.text_parts[:2]

    @classmethod
    @override
    def _text_facts(cls, config: Sd3Config, path: str) -> dict[str, Any]:
        return {"length": cls._length(config, path), "t5": len(cls._text_parts(config, path)) == 3}

    @classmethod
    @override
    def _whole(cls, config: Sd3Config, path: str, **parts: Any) -> Any:
        # diffusers loads a folder without T5 only if the missing components are named.
        if len(cls._text_parts(config, path)) < 3:
            parts |= dict.fromkeys(T5_PARTS)
        return super()._whole(config, path, **parts)

    @classmethod
    @override
    def _limit(cls, config: Sd3Config, path: str) -> int:
        return cls._length(config, path)

    @classmethod
    @override
    def _own_tokens(cls, config: Sd3Config, path: str, tokenizer: Any) -> int:
        if len(cls._text_parts(config, path)) == 3:
            return cls._limit(config, path)
        # Without T5 the CLIP encoders read the prompt, between two marks.
        return int(tokenizer.model_max_length) - 2

    @classmethod
    def _length(cls, config: Sd3Config, path: str) -> int:
        return config.max_sequence_length or int(_index(config, path).get(LENGTH_KEY, DEFAULT_LENGTH))

    @classmethod
    @override
    def _embedder(cls, config: Sd3Config, path: str) -> Any:
        length = cls._length(config, path)
        network = read_object(Path(path) / cls.network_part / "config.json")
        width = int(network["joint_attention_dim"])

        def embed(encoders: Encoders, prompt: str | None) -> dict[str, Tensor]:
            # The null condition is the encoded empty prompt.
            text = prompt or ("" if prompt is None else config.negative_prompt) or ""
            outputs = [encoder(encoder.chunks(text, cut=True)[0], hidden=True) for encoder in encoders[:2]]
            clip = torch.cat([output.hidden_states[-2] for output in outputs], -1)
            if len(encoders) == 3:
                t5 = encoders[2]
                tokens = t5.tokenizer(
                    text, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
                )
                long = t5.model(tokens.input_ids.to(clip.device))[0]
            else:
                long = clip.new_zeros(1, length, width)
            joined = torch.cat([functional.pad(clip, (0, long.shape[-1] - clip.shape[-1])), long], 1)
            return {"prompt_embeds": joined, "pooled_prompt_embeds": torch.cat([output[0] for output in outputs], -1)}

        return embed

    @override
    def _velocity(self, state: Tensor, at: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return self._tuned.active(
            hidden_states=state, timestep=at, encoder_hidden_states=tensors["prompt_embeds"],
            pooled_projections=tensors["pooled_prompt_embeds"], return_dict=False,
        )[0]  # fmt: skip

    @override
    def _scheduler_arguments(self, scheduler: Any, num_steps: int) -> Mapping[str, Any]:
        if not scheduler.config.get("use_dynamic_shifting", False):
            return {}
        return {"mu": linear_mu(self._tokens, scheduler.config, max_shift=1.16)}


def _index(config: Sd3Config, path: str) -> Mapping[str, Any]:
    """Read model_index.json of a folder or of a hub id, of which nothing else is downloaded.

    Raises:
        ModelError: it is not available.
    """
    return load_part(
        StableDiffusion3Pipeline.load_config, path, None, revision=config.revision, local_files_only=config.offline
    )
