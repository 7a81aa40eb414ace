"""Z-Image: a single-stream transformer on variable-length text of a Qwen3 encoder, and a latent VAE."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor
from torch.nn import functional
from transformers import Qwen3Model
from typing_extensions import override

from acpo_dist.models.config import ZImageConfig
from acpo_dist.models.text import Encoders
from acpo_dist.models.transformer import TransformerFamily, chat_tokens, linear_mu


class ZImageFamily(TransformerFamily):
    """Z-Image: transformer, text encoder and VAE.

    The pipeline's guidance scale g is guidance with the weight 1 + g, which is `sampler.guidance_scale` here.
    """

    pipeline: ClassVar[Any] = ZImagePipeline
    network_class: ClassVar[Any] = ZImageTransformer2DModel
    text_parts: ClassVar[tuple[tuple[str, str, Any], ...]] = (("tokenizer", "text_encoder", Qwen3Model),)

    Config = ZImageConfig

    @classmethod
    @override
    def _text_facts(cls, config: ZImageConfig, path: str) -> dict[str, Any]:
        return {"length": config.max_sequence_length}

    @classmethod
    @override
    def _embedder(cls, config: ZImageConfig, path: str) -> Any:
        length = config.max_sequence_length

        def embed(encoders: Encoders, prompt: str | None) -> dict[str, Tensor]:
            # The null condition is the encoded empty prompt.
            text = prompt or ("" if prompt is None else config.negative_prompt) or ""
            ids, mask = chat_tokens(encoders[0], text, length, thinking=True)
            output = encoders[0].model(input_ids=ids, attention_mask=mask.bool(), output_hidden_states=True)
            # Texts have unequal lengths: stored with padding, so that prompts can be batched, and cut in `_velocity`.
            states = output.hidden_states[-2][0][mask[0].bool()]
            padded = functional.pad(states, (0, 0, 0, length - len(states)))
            return {"prompt_embeds": padded[None], "prompt_length": mask.sum(1)}

        return embed

    @classmethod
    @override
    def call_arguments(cls, config: ZImageConfig, guidance_scale: float) -> dict[str, Any]:
        return super().call_arguments(config, guidance_scale) | {"guidance_scale": max(0.0, guidance_scale - 1)}

    @override
    def _velocity(self, state: Tensor, at: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        texts = zip(tensors["prompt_embeds"], tensors["prompt_length"].tolist(), strict=True)
        outputs = self._tuned.active(
            list(state.unsqueeze(2).unbind(0)), (len(self.alpha_bars) - at) / len(self.alpha_bars),
            [text[:length] for text, length in texts], return_dict=False,
        )[0]  # fmt: skip
        # The transformer's time is 1 - sigma, so its output is x_0 - eps.
        return -torch.stack(outputs).squeeze(2)

    @property
    @override
    def _patch(self) -> int:
        return 2

    @override
    def _scheduler_arguments(self, scheduler: Any, num_steps: int) -> Mapping[str, Any]:
        even = torch.linspace(1.0, 1 / num_steps, num_steps).tolist()
        return {"sigmas": even, "mu": linear_mu(self._tokens, scheduler.config)}
