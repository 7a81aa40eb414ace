"""Latent critic: a small network that predicts a metric's score of the decoded image from x_0 or x0-hat.

The score of a decoded estimate is a function of the estimate alone, so the network reads no timestep and no prompt.
Its score and gradient need neither the VAE's forward nor its backward pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from acpo_dist.core.errors import RewardConfigError, RewardError
from acpo_dist.rewards.critic_config import LatentCriticConfig

PROBE = "probe"
"""Name of the decoded probe in the file, beside the weights."""
_SIDE = 8
"""Side of the probe, in latent elements."""
_TOLERANCE = 0.02
"""Largest difference between two decoded probes of one VAE in other precisions or files, in units of the gamut."""


class CriticNetwork(nn.Module):
    """Convolutions with two halvings and a mean over positions: x_0 (B, C, h, w) -> scores (B,)."""

    mean_C: Tensor
    std_C: Tensor
    scale: Tensor

    def __init__(self, channels: int, width: int) -> None:
        """Create random weights.

        Args:
            channels: C.
            width: channels of the first layers; the last ones have four times as many.
        """
        super().__init__()
        # Not ReLU: distillation fits the gradient, so the second derivative is needed.
        self.features = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1), nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.SiLU(),
            nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1), nn.SiLU(),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Linear(4 * width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 1))
        self.register_buffer("mean_C", torch.zeros(channels))
        self.register_buffer("std_C", torch.ones(channels))
        self.register_buffer("scale", torch.tensor([0.0, 1.0]))

    def standardise(self, clean: Tensor, scores: Tensor) -> None:
        """Take units of input and output from training data: x_0 (N, C, h, w) and scores (N,)."""
        self.mean_C.copy_(clean.mean((0, 2, 3)))
        self.std_C.copy_(clean.std((0, 2, 3)).clamp(min=1e-6))
        self.scale.copy_(torch.stack([scores.mean(), scores.std().clamp(min=1e-6)]))

    def forward(self, clean: Tensor) -> Tensor:
        """Return scores in the metric's unit."""
        maps = self.features((clean - self.mean_C[:, None, None]) / self.std_C[:, None, None])
        return self.scale[0] + self.scale[1] * self.head(maps.mean((2, 3)))[:, 0]


class LatentCritic:
    """A critic from a file; the `Metric` interface with x_0 in place of images."""

    Config = LatentCriticConfig

    def __init__(self, config: LatentCriticConfig, *, device: str = "cpu") -> None:
        """Load the weights.

        Raises:
            RewardConfigError: the file is missing or holds no critic.
        """
        facts = config.facts
        if facts is None:
            raise RewardConfigError(f"`{config.name}`: {config.unusable()}")
        try:
            state = load_file(config.file)
            self._probe = state.pop(PROBE)
            self.network = CriticNetwork(facts.channels, facts.width)
            self.network.load_state_dict(state)
        except (SafetensorError, RuntimeError, KeyError) as error:
            raise RewardConfigError(f"`{config.name}`: {config.file} holds no whole critic: {error}") from error
        self.network.to(device).eval().requires_grad_(False)
        self._name, self._facts, self._device = config.name, facts, device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """A shape (C, h, w) that it scores."""
        return (self._facts.channels, *self._facts.shapes[0])

    def check_decoder(self, decoder: Any) -> None:
        """Check that the latents belong to the VAE on which the critic was distilled.

        Raises:
            RewardConfigError: the decoder gives another image for the same latents.
        """
        found = decoded_probe(decoder, self._facts.channels, self._device)
        gap = float((found - self._probe.to(found)).abs().max()) if found.shape == self._probe.shape else float("inf")
        if not gap <= _TOLERANCE:
            raise RewardConfigError(
                f"`{self._name}` was distilled on the VAE of `{self._facts.path}`, and this model's VAE decodes the "
                f"same latents to another image (difference {gap:.2g}). Distil it again: acpo rewards distil "
                f"{self._facts.name} --model MODEL"
            )

    def __call__(self, clean: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score latents; the prompts are ignored.

        Args:
            clean: x_0 or x0-hat, float32, shape (B, C, h, w), of a size in the training data.
            prompts: one per sample.

        Returns:
            Scores (B,) in the metric's unit, float32.

        Raises:
            RewardError: another number of channels or another size, or values that are not finite.
        """
        facts, shape = self._facts, tuple(clean.shape[1:])
        if clean.ndim != 4 or shape[0] != facts.channels or shape[1:] not in facts.shapes:
            known = ", ".join(f"{facts.channels} x {height} x {width}" for height, width in facts.shapes)
            raise RewardError(
                f"`{self._name}` was distilled on latents of {known} (channels x height x width), found "
                f"{' x '.join(map(str, shape))}. Distil it at this size, or use `{facts.name}` itself."
            )
        if not bool(torch.isfinite(clean.detach()).all()):
            raise RewardError(f"`{self._name}`: the latents are not finite")
        return self.network(clean)


@torch.no_grad()
def decoded_probe(decoder: Any, channels: int, device: str) -> Tensor:
    """Decode fixed latents and average over blocks: (3, 8, 8) on the CPU, which identifies a VAE."""
    generator = torch.Generator().manual_seed(20240607)
    latents = torch.randn(1, channels, _SIDE, _SIDE, generator=generator)
    pixels = decoder.decode(latents.to(device)).float().cpu()
    return nn.functional.adaptive_avg_pool2d(pixels, _SIDE)[0]
