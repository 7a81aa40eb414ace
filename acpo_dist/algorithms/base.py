"""Inputs and outputs of an algorithm. An algorithm depends on no model family, engine or reward pool."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from acpo_dist.core.types import ScoredGroups, Selection
from acpo_dist.diffusion.clean_rule import CleanRule
from acpo_dist.diffusion.trajectory import Trajectory


class Network(Protocol):
    """The policy and the frozen base model behind one `predict`."""

    @property
    def prediction_type(self) -> str:
        """`epsilon`, `v_prediction` or `sample`."""
        ...

    @property
    def clean_rule(self) -> CleanRule:
        """The rule that the model's scheduler applies to x0-hat before a step."""
        ...

    @property
    def alpha_bars(self) -> Tensor:
        """Cumulative signal fraction by timestep, float64 (T,), on the CPU."""
        ...

    def encode(self, prompts: Sequence[str], conditioning: Mapping[str, Tensor] | None = None) -> Any:
        """Return the conditioning of the prompts.

        Args:
            prompts: one per sample.
            conditioning: tensors that replace the network's own, such as original size and crop of real images.
        """
        ...

    def predict(self, noisy: Tensor, timesteps_B: Tensor, condition: Any) -> Tensor:
        """Return the network output (B, C, H, W), float32.

        Args:
            noisy: x_t (B, C, H, W).
            timesteps_B: integer timesteps (B,).
            condition: result of `encode`.
        """
        ...

    def anchored(self) -> AbstractContextManager[None]:
        """Return a context in which `predict` returns the base model's output."""
        ...

    def old(self) -> AbstractContextManager[None]:
        """Return a context in which `predict` returns the output of the old policy, without gradient.

        It drew the rollouts, unless the algorithm's configuration sets `draws_with_old` to False. It differs from the
        policy after the first optimiser step of an iteration, and between iterations if there is an `old_decay`.
        """
        ...

    def features(self, latents: Tensor, timesteps_B: Tensor, condition: Any) -> Sequence[Tensor]:
        """Return features of the frozen base encoder, float32; requires `encoder` in the algorithm's configuration."""
        ...


@dataclass(frozen=True, kw_only=True)
class LateStates:
    """One state of each sample's rollout."""

    latents: Tensor
    """x_t (B, C, H, W)."""
    timesteps_B: Tensor
    alpha_bars_B: Tensor
    """float64."""
    following: Tensor | None = None
    """State after the stochastic step from x_t, exactly as the rollout stored it."""
    following_alpha_bars_B: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class TailStates:
    """States of rollouts before the last K steps, through which the reward gradient is propagated."""

    latents: Tensor
    """x before the first of the K steps, (B, C, H, W)."""
    trajectory: Trajectory
    """The K steps."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """B samples of one forward pass. Tensors are on the network's device."""

    sample_ids: tuple[str, ...]
    prompts: tuple[str, ...]
    noise_keys: tuple[int, ...]
    """One seed per sample for all noise drawn in this optimiser step, independent of ranks and micro-batches; the two
    samples of a pair have the same seed."""
    states: LateStates | None
    """States of the policy's own rollouts; None for samples of a data set."""
    tail: TailStates | None = None
    """Set if the algorithm's configuration has `gradient_steps`."""
    clean: Tensor
    """x_0 (B, C, H, W) for forward noising: the sample's own, or a real image."""
    clean_prompts: tuple[str, ...] | None = None
    """Captions of the real images in `clean`; None if `prompts` describe it."""
    clean_conditioning: Mapping[str, Tensor] = field(default_factory=dict)
    """Conditioning of the images in `clean` besides their captions, such as original size and crop."""
    latest_share: float = 1.0
    """Largest late timestep as a share of the noise schedule (`sampler.t_max`)."""
    clean_is_real: bool
    """Whether `clean` holds real images, for which the ordinary denoising loss is valid."""
    weights_B: Tensor
    guidance_scale: float = 1.0
    """Guidance scale of the rollouts; 1 means that only the conditional branch ran."""
    guidance_rescale: float = 0.0
    """Guidance rescale of the rollouts (`sampler.guidance_rescale`)."""
    eta: float = 0.0
    """Noise of the rollouts' steps (`sampler.eta`)."""
    stochastic_step: str = "ddim"
    """Kind of the rollouts' steps (`sampler.stochastic_step`)."""
    constants: Mapping[str, float] = field(default_factory=dict)
    """Result of `Algorithm.calibrate`."""
    unreadable_B: Tensor | None = None
    """bool (B,): the sample's image could not be decoded and `clean` is a placeholder; None if all were decoded."""

    @property
    def readable(self) -> Tensor:
        """bool (B,): `clean` is a decoded image and not a placeholder."""
        if self.unreadable_B is None:
            return torch.ones_like(self.weights_B, dtype=torch.bool)
        return ~self.unreadable_B

    @property
    def late(self) -> LateStates:
        """The rollouts' states.

        Raises:
            RuntimeError: the samples come from a data set; configurations that mix the two are rejected earlier.
        """
        if self.states is None:
            raise RuntimeError("this batch holds images of a data set, which have no rollout states")
        return self.states


@dataclass(frozen=True, kw_only=True)
class RewardSignal:
    """Normalised quality of a micro-batch and its gradient with respect to x0-hat, weights and signs applied."""

    quality_B: Tensor
    gradient: Tensor
    target: float
    """Hinge target in the same units; 0 if the shape has none."""
    per_metric: Mapping[str, Tensor]


class RewardGradient(Protocol):
    """Asynchronous request to the reward pool."""

    def __call__(self, clean_estimate: Tensor, prompts: Sequence[str]) -> Callable[[], RewardSignal]:
        """Request quality and gradient at exactly these tensors.

        Args:
            clean_estimate: x0-hat (B, C, H, W); only its values are read.
            prompts: one per sample.

        Returns:
            A function that waits for the response. Do all work that does not depend on it before the call.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Per-sample loss (B,) with the graph, and detached per-sample metrics (B,)."""

    per_sample: Tensor
    metrics: Mapping[str, Tensor]


class Algorithm(Protocol):
    """Sample selection and loss of one training method."""

    def select(self, scored: ScoredGroups) -> Selection:
        """Select and weight samples by their scores."""
        ...

    def prepare(self, batch: MicroBatch, network: Network) -> Tensor | None:
        """Return per-sample constants (B,) under the weights that drew the rollouts, or None.

        Called for every micro-batch before the first optimiser step.
        """
        ...

    def observe(self, batch: MicroBatch, network: Network) -> Mapping[str, Tensor]:
        """Return per-sample statistics of base samples for `calibrate`; empty if it needs none."""
        ...

    def calibrate(self, metrics: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """Return constants of the run, computed from the `observe` results of all ranks."""
        ...

    def loss(
        self, batch: MicroBatch, network: Network, reward: RewardGradient, anchor_weight: float,
        prepared_B: Tensor | None = None,
    ) -> Loss:  # fmt: skip
        """Run the forward passes of one micro-batch and return its per-sample loss.

        Args:
            batch: samples of the forward pass.
            network: policy and base model.
            reward: requests quality and gradient from the reward pool.
            anchor_weight: weight of the anchor error in the loss.
            prepared_B: result of `prepare` for this micro-batch.

        Returns:
            Loss and metrics; the metrics must include the measured drift as `anchor/late`, `anchor/uniform` or both.
        """
        ...


class BaseAlgorithm:
    """Default implementation: all samples with equal weight, no preparation and no calibration."""

    def select(self, scored: ScoredGroups) -> Selection:
        """Select all samples with weight 1."""
        ids = tuple(plan.sample_id for group in scored.groups for plan in group.samples)
        return Selection(sample_ids=ids, weights=dict.fromkeys(ids, 1.0), metrics={})

    def prepare(self, batch: MicroBatch, network: Network) -> Tensor | None:
        """Return None."""
        return None

    def observe(self, batch: MicroBatch, network: Network) -> Mapping[str, Tensor]:
        """Return no statistics."""
        return {}

    def calibrate(self, metrics: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """Return no constants."""
        return {}
