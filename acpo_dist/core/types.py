"""Records exchanged between components. They are frozen and matched by sample id, never by position."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from acpo_dist.core.sizes import Size


@dataclass(frozen=True, kw_only=True)
class SamplePlan:
    """One sample to draw: its prompt and the seed of all its noise."""

    sample_id: str
    prompt_id: int
    prompt: str
    seed: int
    size: Size | None = None
    """(width, height) in pixels; None draws the model's own size."""


@dataclass(frozen=True, kw_only=True)
class PromptGroup:
    """The samples of one prompt in one iteration. Advantages are relative to the group; shards never split it."""

    prompt_id: int
    prompt: str
    samples: tuple[SamplePlan, ...]


@dataclass(frozen=True, kw_only=True)
class LateLatents:
    """States kept at one late denoise step, where the learner trains."""

    denoise_step: int
    timestep: float
    alpha_bar: float
    width: float
    """Timesteps that the denoise step covers. The learner selects a kept state in proportion to it."""
    latents_BCHW: Tensor
    following_BCHW: Tensor | None = None
    """State after the step, kept if steps are stochastic (`sampler.eta` above 0)."""
    following_alpha_bar: float = 1.0


@dataclass(frozen=True, kw_only=True)
class RolloutBatch:
    """Result of one rollout worker for one chunk of B samples. All tensors are on the CPU."""

    sample_ids: tuple[str, ...]
    prompts: tuple[str, ...]
    policy_version: int
    schedule_id: str
    latents_BCHW: Tensor
    """Final x_0: scaled latents, or pixels in [-1, 1] for a pixel model; float32."""
    late: tuple[LateLatents, ...]
    images_BCHW: Tensor
    """Decoded images, uint8 RGB."""


@dataclass(frozen=True, kw_only=True)
class RolloutHandle:
    """The driver's reference to a rollout chunk: ids and versions, with the tensors behind `payload`."""

    sample_ids: tuple[str, ...]
    prompts: tuple[str, ...]
    policy_version: int
    schedule_id: str
    payload: Any
    """A `RolloutBatch` in process, an object reference on Ray."""


ScoreTable = Mapping[str, Mapping[str, float]]
"""Raw score by metric name and sample id, in the metric's own unit and direction."""


@dataclass(frozen=True, kw_only=True)
class ScoredGroups:
    """Scores of an iteration's samples for `Algorithm.select`. Holds training rewards only, never judges."""

    groups: tuple[PromptGroup, ...]
    qualities: Mapping[str, Mapping[str, float]]
    """Reward name -> sample id -> quality: normalised, signed so that higher is better, not yet weighted."""
    weights: Mapping[str, float]
    """Reward name -> weight in the sum."""
    spread: float = 0.0
    """Coefficient c of the composition: penalty on disagreement between the rewards."""
    images: Callable[[], Mapping[str, Tensor]]
    """Returns images by sample id, uint8 (3, H, W); they are fetched on the call."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Samples to train on with their order and weights, and counts of the excluded samples."""

    sample_ids: tuple[str, ...]
    """Order from which micro-batches are cut; the samples of a pair are adjacent, the winner first."""
    weights: Mapping[str, float]
    """Weight of each sample in the objective, signed for advantages. A sample of weight 0 is excluded from the
    objective but stays in its batch, so that batch sizes hold, and in the anchor."""
    metrics: Mapping[str, float]
    """Counters for tracking."""


@dataclass(frozen=True, kw_only=True)
class Normaliser:
    """Frozen mean and standard deviation of one metric on base-model samples."""

    mean: float
    std: float
    sign: int
    """+1 if higher is better, -1 if lower is better."""
    target: float | None = None
    """Hinge target m in normalised units; None outside `hinge` and `softplus`."""
    ceiling: float | None = None
    """Normalised score of real images, at which the reward is capped; None without a `hinge`."""

    def normalise(self, score: float) -> float:
        """Return the signed z-score: base samples have mean 0 and standard deviation 1, higher is better."""
        return self.sign * (score - self.mean) / self.std

    def reward(self, score: float) -> float:
        """Return the normalised score, capped at the ceiling."""
        value = self.normalise(score)
        return value if self.ceiling is None else min(value, self.ceiling)

    def slope(self, score: float) -> float:
        """Return the derivative of `reward` with respect to the score; 0 at and above the ceiling."""
        reached = self.ceiling is not None and self.normalise(score) >= self.ceiling
        return 0.0 if reached else self.sign / self.std


@dataclass(frozen=True, kw_only=True)
class RewardTerm:
    """Weight and normaliser of one reward in the objective."""

    name: str
    weight: float
    normaliser: Normaliser


@dataclass(frozen=True, kw_only=True)
class TrainTask:
    """Inputs of the learner for one iteration, apart from the rollouts."""

    iteration: int
    policy_version: int
    """Version of the weights that drew the rollouts."""
    sample_ids: tuple[str, ...]
    """Samples to train on, in the global order from which micro-batches are cut."""
    weights: Mapping[str, float]
    """Weight of each sample in the objective, by sample id; signed for advantages, 0 excludes the sample."""
    anchor_weight: float
    learning_rate: float
    rewards: tuple[RewardTerm, ...]
    staleness: int = 0
    """Versions by which the learner's weights, at which gradients are computed, are newer than `policy_version`."""
    constants: Mapping[str, float] = field(default_factory=dict[str, float])
    """Result of `Algorithm.calibrate` on base samples before the first iteration."""


@dataclass(frozen=True, kw_only=True)
class SkippedStep:
    """An optimiser step that was skipped because a loss or the gradient was not finite."""

    step: int
    """Index of the step in the iteration."""
    gradient_norm: float
    """Gradient norm over all ranks; not finite."""
    sample_ids: tuple[str, ...]
    """Samples whose loss was not finite; empty if only the gradient was not finite."""


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """Result of the learner for one iteration; means over all samples of all ranks."""

    metrics: dict[str, float]
    """Means over the steps that were taken."""
    optim_steps: int
    """Number of steps taken; 0 leaves the weights unchanged."""
    skipped: tuple[SkippedStep, ...] = ()
    too_many: bool = False
    """Whether more consecutive steps were skipped than allowed, which ended the iteration early."""


@dataclass(frozen=True, kw_only=True)
class GradientScale:
    """Norm of the reward gradient on base samples, from which the initial anchor weight is computed."""

    median_norm: float
    """Median over samples of ||dq / d eps-hat||."""
    num_elements: int
    """D, elements of one latent tensor."""


@dataclass(frozen=True, kw_only=True)
class WeightBundle:
    """Trainable weights of one version, by name, with the checksum of their bytes."""

    version: int
    checksum: str
    tensors: Mapping[str, Tensor] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class WeightAck:
    """Version and checksum reported by a worker, computed from its own parameters after loading."""

    worker: str
    version: int
    checksum: str
