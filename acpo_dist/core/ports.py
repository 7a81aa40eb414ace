"""The five ports that `loop.py` is written on. In process they call, on Ray they send; the loop does not know."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from acpo_dist.core.types import (
    GradientScale,
    PromptGroup,
    RewardTerm,
    RolloutHandle,
    ScoreTable,
    TrainReport,
    TrainTask,
    WeightAck,
    WeightBundle,
)

Advance = Callable[[int], None]
"""Called with the number of samples just finished, for progress display."""


class RolloutPool(Protocol):
    """Draws samples."""

    def generate(self, groups: Sequence[PromptGroup], advance: Advance | None = None) -> list[RolloutHandle]:
        """Draw every sample of every group; chunks keep groups whole and do not depend on the number of workers."""
        ...

    def load(self, bundle: WeightBundle) -> list[WeightAck]:
        """Load weights into every worker; each says what it holds afterwards."""
        ...

    def trajectory(self) -> Any:
        """The `diffusion.trajectory.Trajectory` that the workers follow now."""
        ...

    def alpha_bars(self) -> Tensor:
        """The model's cumulative signal fraction by timestep, float64 (T,)."""
        ...

    def follow(self, trajectory: Any) -> list[str]:
        """Make every worker follow a trajectory from the next `generate` on; each answers with its schedule id."""
        ...

    def final_latents(self, groups: Sequence[PromptGroup], trajectory: Any) -> Tensor:
        """x_0 (B, C, H, W) of every sample along another trajectory from the same noise; nothing else changes."""
        ...

    def measure_errors(self, handles: Sequence[RolloutHandle], sigmas: Sequence[float], *, guidance: bool) -> list[Any]:
        """Error of the predicted noise at each sigma on forward-noised x_0 of the samples: `vrg.sums.ErrorSums`.

        One entry per handle, in their order, so that the sums do not depend on the number of workers.
        """
        ...

    def images(self, handles: Sequence[RolloutHandle], sample_ids: Sequence[str]) -> Tensor:
        """Images of the named samples, uint8 (B, 3, H, W), in the order asked for."""
        ...

    def close(self) -> None:
        """Free the workers."""
        ...


class RewardPool(Protocol):
    """Scores samples."""

    def score(
        self, handles: Sequence[RolloutHandle], metrics: Sequence[str], advance: Advance | None = None
    ) -> ScoreTable:
        """Raw scores of every sample by every named metric.

        Raises:
            RewardError: a score is missing after the deadline, or not finite.
        """
        ...

    def score_images(self, metric: str, images: Tensor) -> list[float]:
        """Raw scores of images that no rollout made, uint8 (B, 3, H, W), by a metric that reads no prompts.

        Raises:
            RewardError: as `score`.
        """
        ...

    def counters(self) -> dict[str, float]:
        """Requests, retries and failures so far."""
        ...

    def close(self) -> None:
        """Free the workers."""
        ...


class LearnerGroup(Protocol):
    """Updates the policy."""

    def train(self, handles: Sequence[RolloutHandle], task: TrainTask, advance: Advance | None = None) -> TrainReport:
        """Run the optimiser steps of one iteration; a step that is not finite is skipped and listed in the report."""
        ...

    def gradient_scale(self, handles: Sequence[RolloutHandle], rewards: Sequence[RewardTerm]) -> GradientScale:
        """Strength of the reward gradient with respect to the predicted noise, at late states of the given samples."""
        ...

    def observe(self, handles: Sequence[RolloutHandle]) -> dict[str, list[float]]:
        """`Algorithm.observe` on base samples, results of all ranks together."""
        ...

    def measure_drift(
        self, handles: Sequence[RolloutHandle], timesteps: Sequence[int], *, space: str = "eps"
    ) -> dict[int, float]:
        """Mean squared drift at each timestep, in units of `space`, on forward-noised x_0 of the given samples."""
        ...

    def export(self, version: int, *, ema: bool = False) -> WeightBundle:
        """Trainable weights, gathered from all ranks (the averaged ones with `ema`)."""
        ...

    def save(self, folder: Path) -> None:
        """Write weights, optimiser state and averages below `folder`, independent of the number of ranks."""
        ...

    def start(self, folder: Path | None) -> None:
        """Build the optimiser, from scratch or from what `save` wrote; called once, before anything else."""
        ...

    def close(self) -> None:
        """Free the workers."""
        ...


class WeightChannel(Protocol):
    """Carries weights from the learner to the rollout workers, verified."""

    def publish(self, version: int) -> str:
        """Send version `version`; return its checksum.

        Raises:
            WeightSyncError: some worker does not hold it.
        """
        ...


class Tracker(Protocol):
    """Records what happens. A tracker that fails says so once and never stops training."""

    def log_metrics(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of one iteration."""
        ...

    def log_image(self, name: str, iteration: int, path: Path) -> None:
        """Record an image file."""
        ...

    def log_text(self, name: str, text: str) -> None:
        """Record a small text file."""
        ...

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Attach searchable facts to the run."""
        ...

    def close(self, status: str) -> None:
        """Flush and end with `status`: FINISHED, FAILED or KILLED; RUNNING when another process goes on."""
        ...


class PairSource(Protocol):
    """Pairs of a data set, where the learner trains on those instead of rollouts."""

    counts: Mapping[str, int]
    """How many can be used, and what became of the others."""

    def sample_prompts(self, *, iteration: int, count: int, run_seed: int) -> list[str]:
        """Sample ids of `count` pairs, winner and loser side by side; the same for the same arguments."""
        ...


@dataclass(frozen=True, kw_only=True)
class Ports:
    """The five ports, and the pairs of a data set."""

    rollout: RolloutPool
    reward: RewardPool
    learner: LearnerGroup
    weights: WeightChannel
    tracker: Tracker
    pairs: PairSource | None = None
    """Usable rows of `data.pairs`, where the learner trains on those instead of rollouts."""
