"""Base class of the flow families: a diffusion transformer on VAE latents, trained by flow matching."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor
from transformers import AutoTokenizer
from typing_extensions import override

from acpo_dist.core.errors import ModelError
from acpo_dist.core.sizes import Size
from acpo_dist.diffusion.flow import flow_inputs
from acpo_dist.models.family import Condition
from acpo_dist.models.latent import LatentFamily
from acpo_dist.models.loading import load_part
from acpo_dist.models.single_file import tokenizer_source
from acpo_dist.models.text import Encoder, token_ids

DEFAULT_PIXELS = 1024
"""Height and width of images of a transformer whose configuration has no `sample_size`, as in the pipelines."""


class TransformerFamily(LatentFamily):
    """A flow model with a transformer, text encoders and a VAE. Subclasses call the transformer in `_velocity`."""

    network_part: ClassVar[str] = "transformer"

    def __init__(self, config: Any, *, path: str, device: str, trainable: bool) -> None:
        """Load all components. Called by `load`; arguments as in `LatentFamily`.

        Raises:
            ModelError: the scheduler is not that of a flow model, or the VAE does not fit the transformer.
        """
        super().__init__(config, path=path, device=device, trainable=trainable)
        if self.prediction_type != "flow_prediction":
            raise ModelError(
                f"model.path: the scheduler of `{path}` is {self.schedule.scheduler}, and a model of type "
                f"`{config.type}` is a flow model. Write a FlowMatchEulerDiscreteScheduler with the model's shift into "
                "its scheduler folder."
            )
        channels = self.sample_shape[0]
        if self.decoder.channels != channels:
            raise ModelError(
                f"model.path: the transformer of `{path}` takes {channels} channels, and the VAE has "
                f"{self.decoder.channels}. Check model.vae and the folder."
            )
        self.schedule = replace(self.schedule, arguments=self._scheduler_arguments)

    @override
    def predict(self, noisy: Tensor, timesteps_B: Tensor, condition: Condition) -> Tensor:
        """Run the transformer once; input and output are float32 for any data type of the weights."""
        dtype = self._tuned.dtype
        state, at = flow_inputs(noisy, timesteps_B, len(self.alpha_bars))
        tensors = {
            name: value.to(dtype) if value.is_floating_point() else value for name, value in condition.tensors.items()
        }
        return self._velocity(state.to(dtype), at.float(), tensors).float()

    @classmethod
    def call_arguments(cls, config: Any, guidance_scale: float) -> dict[str, Any]:
        """Arguments of the pipeline's call that stand for this configuration.

        Args:
            config: the `model` section.
            guidance_scale: w of eps_u + w (eps_c - eps_u).
        """
        length = cls._limit(config, tokenizer_source(config))
        return {"guidance_scale": guidance_scale, "max_sequence_length": length}

    def _velocity(self, state: Tensor, at: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Call the transformer.

        Args:
            state: (1 - sigma) x_0 + sigma eps, shape (B, C, H, W), in the network's data type.
            at: T sigma (B,), float32.
            tensors: the condition, in the network's data type.

        Returns:
            The prediction of eps - x_0, same shape.
        """
        raise NotImplementedError

    def _scheduler_arguments(self, scheduler: Any, num_steps: int) -> Mapping[str, Any]:
        """Arguments with which the family's pipeline calls `scheduler.set_timesteps`, without the number of steps."""
        return {}

    @property
    def _tokens(self) -> int:
        """Number of image tokens."""
        return (self.sample_shape[1] // self._patch) * (self.sample_shape[2] // self._patch)

    @property
    def _patch(self) -> int:
        """Side of the patches of x_0 that are one token."""
        config: Any = self.network.config
        return int(config["patch_size"])

    @override
    def _check_network(self, unet: Any) -> None:
        """Transformers have no inpainting or distilled variants to tell apart."""

    @override
    def _own_size(self, unet: Any) -> Size:
        size = unet.config.get("sample_size")
        return (DEFAULT_PIXELS, DEFAULT_PIXELS) if size is None else super()._own_size(unet)

    @property
    @override
    def _multiple(self) -> int:
        return self.factor * self._patch

    @classmethod
    @override
    def chunk_counts(cls, config: Any, prompts: Sequence[str]) -> list[int]:
        """Return the number of times that each prompt fills the longest text encoder; the rest is cut."""
        path = tokenizer_source(config)
        name = cls._text_parts(config, path)[-1][0]
        tokenizer = load_part(
            AutoTokenizer.from_pretrained, tokenizer_source(config, name), name, revision=config.revision,
            local_files_only=config.offline,
        )  # fmt: skip
        limit = cls._own_tokens(config, path, tokenizer)
        return [max(1, -(-len(token_ids(tokenizer, prompt)) // limit)) for prompt in prompts]

    @classmethod
    def _own_tokens(cls, config: Any, path: str, tokenizer: Any) -> int:
        """Most tokens of a prompt that the longest text encoder reads."""
        return cls._limit(config, path)

    @classmethod
    def _limit(cls, config: Any, path: str) -> int:
        """`max_sequence_length` of the pipeline's call."""
        return int(config.max_sequence_length)


def chat_tokens(encoder: Encoder, prompt: str, length: int, *, thinking: bool) -> tuple[Tensor, Tensor]:
    """Tokenise one prompt as the message of a user, padded and truncated.

    Args:
        encoder: tokenizer with a chat template, and its model.
        prompt: the prompt.
        length: number of tokens.
        thinking: `enable_thinking` of the chat template.

    Returns:
        (token ids, attention mask), each of shape (1, length), on the model's device.
    """
    tokenizer, device = encoder.tokenizer, next(encoder.model.parameters()).device
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )
    tokens = tokenizer([text], padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return tokens.input_ids.to(device), tokens.attention_mask.to(device)


def linear_mu(tokens: int, config: Mapping[str, Any], *, max_shift: float = 1.15) -> float:
    """Shift exponent from the number of image tokens, linear between the scheduler's two reference points.

    Args:
        tokens: number of image tokens.
        config: the scheduler's configuration.
        max_shift: used if the configuration has no `max_shift`.
    """
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", max_shift)
    slope = (top - base) / (high - low)
    return tokens * slope + (base - slope * low)
