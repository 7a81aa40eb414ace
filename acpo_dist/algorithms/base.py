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
        """What the model's scheduler does to x0-hat before a step."""
        ...

    @property
    def alpha_bars(self) -> Tensor:
        """Cumulative signal fraction by timestep, float64 (T,), on the CPU."""
        ...

    def encode(self, prompts: Sequence[str]) -> Any:
        """Conditioning of prompts."""
        ...

    def predict(self, noisy: Tensor, timesteps_B: Tensor, condition: Any) -> Tensor:
        """Network output, float32."""
        ...

    def anchored(self) -> AbstractContextManager[None]:
        """While active, `predict` returns the base model's output."""
        ...

    def old(self) -> AbstractContextManager[None]:
        """While active, `predict` returns the output of the policy that drew the rollouts; without gradient.

        It differs from the policy as of the first optimiser step of an iteration, and between iterations where the
        algorithm's configuration has a `sampling_decay`.
        """
        ...

    def features(self, latents: Tensor, timesteps_B: Tensor, condition: Any) -> Sequence[Tensor]:
        """Features of the frozen base's encoder, float32; only where the algorithm's configuration has an `encoder`."""
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
    """State after the stochastic step from x_t, exactly as the rollout had it."""
    following_alpha_bars_B: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class TailStates:
    """States of rollouts before the last K steps, through which the reward's gradient goes."""

    latents: Tensor
    """x before the first of the K steps, (B, C, H, W)."""
    trajectory: Trajectory
    """The K steps."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """B samples of one forward. Tensors on the network's device."""

    sample_ids: tuple[str, ...]
    prompts: tuple[str, ...]
    noise_keys: tuple[int, ...]
    """One seed per sample for all noise drawn in this optimiser step, independent of ranks and micro-batches. The two
    samples of a pair share theirs."""
    states: LateStates | None
    """States of the policy's own rollouts; None for samples of a data set."""
    tail: TailStates | None = None
    """Set where the algorithm's configuration has `gradient_steps`."""
    clean: Tensor
    """x_0 that states are noised from: the sample's own, or a real image."""
    clean_is_real: bool
    """Whether `clean` holds real images, on which an ordinary denoising loss makes sense."""
    weights_B: Tensor
    guidance_scale: float = 1.0
    """Guidance scale of the rollouts; 1 where only the conditional branch ran."""
    eta: float = 0.0
    """DDIM eta of the rollouts' steps."""
    constants: Mapping[str, float] = field(default_factory=dict)
    """Result of `Algorithm.calibrate`."""
    unreadable_B: Tensor | None = None
    """bool (B,): the sample's image could not be decoded and `clean` is a stand-in; None if all could."""

    @property
    def readable(self) -> Tensor:
        """bool (B,): `clean` is an image and not a stand-in."""
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
    """Hinge target in the same units; 0 where no shape needs it."""
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
        """Choose and weigh samples by their scores."""
        ...

    def prepare(self, batch: MicroBatch, network: Network) -> Tensor | None:
        """Per-sample constants (B,) under the weights that made the rollouts, before the first optimiser step."""
        ...

    def observe(self, batch: MicroBatch, network: Network) -> Mapping[str, Tensor]:
        """Per-sample statistics of base samples for `calibrate`; empty if it needs none."""
        ...

    def calibrate(self, metrics: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """Constants of the run, from the `observe` results of all ranks."""
        ...

    def loss(
        self, batch: MicroBatch, network: Network, reward: RewardGradient, anchor_weight: float,
        prepared_B: Tensor | None = None,
    ) -> Loss:  # fmt: skip
        """Forward passes and per-sample loss of one micro-batch.

        The metrics must include the measured drift as `anchor/late`, `anchor/uniform` or both.
        """
        ...


class BaseAlgorithm:
    """Defaults: all samples with equal weight, nothing to prepare, nothing to calibrate."""

    def select(self, scored: ScoredGroups) -> Selection:
        """All samples, weight 1."""
        ids = tuple(plan.sample_id for group in scored.groups for plan in group.samples)
        return Selection(sample_ids=ids, weights=dict.fromkeys(ids, 1.0), metrics={})

    def prepare(self, batch: MicroBatch, network: Network) -> Tensor | None:
        """None."""
        return None

    def observe(self, batch: MicroBatch, network: Network) -> Mapping[str, Tensor]:
        """Empty."""
        return {}

    def calibrate(self, metrics: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """Empty."""
        return {}
