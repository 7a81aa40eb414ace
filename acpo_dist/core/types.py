"""What travels between the parts: frozen records, paired by sample id and never by position."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SamplePlan:
    """One sample to be drawn: its prompt and the seed that fixes all its noise."""

    sample_id: str
    prompt_id: int
    prompt: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class PromptGroup:
    """The samples of one prompt in one iteration; advantages are relative to it, shards never cut it."""

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
    """Timesteps that the denoise step covers: how likely the learner takes this state among those that are kept."""
    latents_BCHW: Tensor
    following_BCHW: Tensor | None = None
    """State after the step, kept where steps are stochastic (`sampler.eta` above 0)."""
    following_alpha_bar: float = 1.0


@dataclass(frozen=True, kw_only=True)
class RolloutBatch:
    """What one rollout worker made of one chunk of samples. B samples, all tensors on the CPU."""

    sample_ids: tuple[str, ...]
    prompts: tuple[str, ...]
    policy_version: int
    schedule_id: str
    latents_BCHW: Tensor
    """Final x_0: scaled latents, or pixels in [-1, 1] for a pixel model; float32."""
    late: tuple[LateLatents, ...]
    images_BCHW: Tensor
    """uint8 RGB, what a user would save."""


@dataclass(frozen=True, kw_only=True)
class RolloutHandle:
    """A rollout chunk as the driver holds it: names and versions here, tensors wherever `payload` points."""

    sample_ids: tuple[str, ...]
    prompts: tuple[str, ...]
    policy_version: int
    schedule_id: str
    payload: Any
    """A `RolloutBatch` in process, an object reference on Ray."""


ScoreTable = Mapping[str, Mapping[str, float]]
"""metric name -> sample id -> raw score, in the metric's own unit and direction."""


@dataclass(frozen=True, kw_only=True)
class ScoredGroups:
    """The samples of an iteration as an algorithm may judge them: by the rewards that train, never by judges."""

    groups: tuple[PromptGroup, ...]
    qualities: Mapping[str, Mapping[str, float]]
    """Reward name -> sample id -> quality: normalised, signed so that higher is better, not yet weighted."""
    weights: Mapping[str, float]
    """Reward name -> its weight in the sum."""
    spread: float = 0.0
    """c of the composition: how much the rewards' disagreement costs."""
    images: Callable[[], Mapping[str, Tensor]]
    """Images by sample id, uint8 (3, H, W); fetched when asked for."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which samples are trained on, in which order, with what weight, and what became of the others."""

    sample_ids: tuple[str, ...]
    """Order that micro-batches are cut from; pairs lie side by side, the winner first."""
    weights: Mapping[str, float]
    """Weight of each in the objective, signed where it is an advantage. 0 leaves a sample out of the objective alone:
    it stays in its batch, so that batch arithmetic holds, and under the anchor."""
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
    """Normalised score of real images, beyond which nothing more is gained; None without a `hinge`."""

    def normalise(self, score: float) -> float:
        """Signed z-score: base samples have mean 0 and standard deviation 1, higher is better."""
        return self.sign * (score - self.mean) / self.std

    def reward(self, score: float) -> float:
        """What a score is worth: normalised, and no more than the ceiling."""
        value = self.normalise(score)
        return value if self.ceiling is None else min(value, self.ceiling)

    def slope(self, score: float) -> float:
        """Derivative of `reward`; 0 from the ceiling on."""
        reached = self.ceiling is not None and self.normalise(score) >= self.ceiling
        return 0.0 if reached else self.sign / self.std


@dataclass(frozen=True, kw_only=True)
class RewardTerm:
    """How one reward enters the objective."""

    name: str
    weight: float
    normaliser: Normaliser


@dataclass(frozen=True, kw_only=True)
class TrainTask:
    """Everything the learner needs for one iteration besides the rollouts."""

    iteration: int
    policy_version: int
    """Version of the weights that the rollouts were made with and that gradients are computed for."""
    sample_ids: tuple[str, ...]
    """Samples to train on, in the global order that micro-batches are cut from."""
    weights: Mapping[str, float]
    """See `Selection.weights`."""
    anchor_weight: float
    learning_rate: float
    rewards: tuple[RewardTerm, ...]
    constants: Mapping[str, float] = field(default_factory=dict[str, float])
    """What the algorithm worked out on base samples before the first iteration."""


@dataclass(frozen=True, kw_only=True)
class SkippedStep:
    """An optimiser step that was left out, because a loss or the gradient was not finite."""

    step: int
    """Its place in the iteration."""
    gradient_norm: float
    """Over all ranks; not finite."""
    sample_ids: tuple[str, ...]
    """Those whose own loss was not finite; empty where only the gradient was not."""


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What the learner says after one iteration; means over all samples of all ranks."""

    metrics: dict[str, float]
    """Of the steps that were taken."""
    optim_steps: int
    """Those that were taken; without any, the weights are what they were."""
    skipped: tuple[SkippedStep, ...] = ()
    too_many: bool = False
    """More steps in a row were refused than may be; those after them were not tried."""


@dataclass(frozen=True, kw_only=True)
class GradientScale:
    """How strong the reward's gradient is on base samples: what the first anchor weight is worked out from."""

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
    """What a worker says it holds, computed from its own parameters after loading."""

    worker: str
    version: int
    checksum: str
