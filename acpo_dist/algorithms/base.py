"""What an algorithm sees of a micro-batch, and what it returns. It knows no model family, no engine and no pool."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from acpo_dist.core.types import ScoreTable


class Network(Protocol):
    """The policy with its anchor switch; a model family satisfies it."""

    prediction_type: str
    alpha_bars: Tensor

    def encode(self, prompts: Sequence[str]) -> Any:
        """Conditioning of prompts."""
        ...

    def predict(self, noisy: Tensor, timesteps_B: Tensor, condition: Any) -> Tensor:
        """Network output, float32."""
        ...

    def anchored(self) -> AbstractContextManager[None]:
        """While active, `predict` answers with the base model."""
        ...


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """B samples of one forward. Tensors on the network's device."""

    sample_ids: tuple[str, ...]
    prompts: tuple[str, ...]
    noise_keys: tuple[int, ...]
    """One seed per sample for all noise drawn in this optimiser step, independent of ranks and micro-batches."""
    late_latents: Tensor
    """x_t at one late step per sample, from the policy's own rollouts."""
    late_timesteps_B: Tensor
    late_alpha_bars_B: Tensor
    clean: Tensor
    """x_0 that the anchor's uniform timesteps are noised from: the sample's own, or a real picture."""
    clean_is_real: bool
    """Whether `clean` holds real pictures, so that an ordinary denoising loss on them makes sense."""
    weights_B: Tensor


@dataclass(frozen=True, kw_only=True)
class RewardSignal:
    """Normalised quality of a micro-batch and its gradient with respect to x0-hat, weights and signs applied."""

    quality_B: Tensor
    gradient: Tensor
    target: float
    """Hinge target in the same units; 0 where no shape needs it."""
    per_metric: Mapping[str, Tensor]


class RewardGradient(Protocol):
    """Asks the pool."""

    def __call__(self, clean_estimate: Tensor, prompts: Sequence[str]) -> RewardSignal:
        """Quality and gradient at these very tensors."""
        ...


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What an algorithm returns: a per-sample loss (B,) with the graph, and per-sample figures (B,) without."""

    per_sample: Tensor
    figures: Mapping[str, Tensor]


class Algorithm(Protocol):
    """One recipe made of objectives."""

    def select(self, sample_ids: Sequence[str], scores: ScoreTable) -> dict[str, float]:
        """Per-sample weights from scores; samples that are left out are not trained on."""
        ...

    def loss(self, batch: MicroBatch, network: Network, reward: RewardGradient, anchor_weight: float) -> Loss:
        """Forward passes and per-sample loss of one micro-batch."""
        ...
