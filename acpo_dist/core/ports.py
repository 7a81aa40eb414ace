"""The five ports of the training loop, implemented in process and on Ray; the loop is independent of the choice."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from acpo_dist.core.by_size import Mixed
from acpo_dist.core.errors import WorkerLostError
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
"""Callback for progress display; receives the number of samples just finished."""


class RolloutPool(Protocol):
    """Draws samples."""

    def generate(
        self, groups: Sequence[PromptGroup], advance: Advance | None = None, *, version: int | None = None
    ) -> list[RolloutHandle]:
        """Draw every sample of every group. Chunks never split a group and do not depend on the number of workers.

        Args:
            groups: samples to draw.
            advance: called with the number of samples of each finished chunk.
            version: published version of the weights, at most `pipeline.max_staleness` older than the newest; None
                draws with the newest.
        """
        ...

    def load(self, bundle: WeightBundle) -> list[WeightAck]:
        """Make a version the newest, and return the acknowledgements of the workers that have loaded it.

        With `pipeline.max_staleness` above 0 no worker stops for it: each one loads and verifies it with its next chunk
        of that version.
        """
        ...

    def trajectory(self) -> Any:
        """Return the `diffusion.trajectory.Trajectory` that the workers currently use."""
        ...

    def alpha_bars(self) -> Tensor:
        """Return the model's cumulative signal fraction by timestep, float64 (T,)."""
        ...

    def set_trajectory(self, trajectory: Any) -> list[str]:
        """Set the trajectory of every worker from the next `generate` on; returns each worker's schedule id."""
        ...

    def final_latents(self, groups: Sequence[PromptGroup], trajectory: Any) -> Mixed:
        """Return x_0 of every sample along another trajectory from the same noise; keeps all state.

        The order is that of the samples: (B, C, H, W), or a list of (C, H, W) for several sizes.
        """
        ...

    def measure_errors(self, handles: Sequence[RolloutHandle], sigmas: Sequence[float]) -> list[Any]:
        """Measure the error of the predicted noise at each sigma on forward-noised x_0 of the samples.

        Returns:
            One `vrg.sums.ErrorSums` per handle, in the order of the handles, independent of the number of workers.
        """
        ...

    def images(self, handles: Sequence[RolloutHandle], sample_ids: Sequence[str]) -> Mixed:
        """Return images of the given samples, uint8, in the order of `sample_ids`.

        (B, 3, H, W), or a list of (3, H, W) for several sizes.
        """
        ...

    def close(self) -> None:
        """Free the workers."""
        ...


class RewardPool(Protocol):
    """Scores samples."""

    def score(
        self, handles: Sequence[RolloutHandle], metrics: Sequence[str], advance: Advance | None = None
    ) -> ScoreTable:
        """Return raw scores of every sample by every named metric.

        Raises:
            RewardError: a score is missing after the deadline, or not finite.
        """
        ...

    def score_images(self, metric: str, images: Tensor) -> list[float]:
        """Return raw scores of given images, uint8 (B, 3, H, W), by a metric that needs no prompts.

        Raises:
            RewardError: a score is missing after the deadline, or not finite.
        """
        ...

    def counters(self) -> dict[str, float]:
        """Return the numbers of requests, retries and failures so far."""
        ...

    def close(self) -> None:
        """Free the workers."""
        ...


class KeptState(Protocol):
    """Learner's training state that outlives its ranks; the copy may still be under way."""

    def write(self, folder: Path) -> None:
        """Write the files of `LearnerGroup.save`.

        Raises:
            WorkerLostError: the ranks were lost before the copy was complete.
        """
        ...


class LearnerGroup(Protocol):
    """Updates the policy."""

    def renew(self) -> None:
        """Replace the ranks after a `LearnerLostError`; `start` follows.

        Raises:
            WorkerLostError: this group cannot; all workers must be started again.
        """
        raise WorkerLostError("lost learner ranks cannot be replaced alone")

    def train(self, handles: Sequence[RolloutHandle], task: TrainTask, advance: Advance | None = None) -> TrainReport:
        """Run the optimiser steps of one iteration; non-finite steps are skipped and listed in the report."""
        ...

    def gradient_scale(self, handles: Sequence[RolloutHandle], rewards: Sequence[RewardTerm]) -> GradientScale:
        """Measure the reward gradient with respect to the predicted noise, at late states of the given samples."""
        ...

    def observe(self, handles: Sequence[RolloutHandle]) -> dict[str, list[float]]:
        """Run `Algorithm.observe` on base samples and return the joined results of all ranks."""
        ...

    def measure_drift(
        self, handles: Sequence[RolloutHandle], timesteps: Sequence[int], *, space: str = "eps"
    ) -> dict[int, float]:
        """Return the mean squared drift at each timestep, in units of `space`, on forward-noised x_0 of the samples."""
        ...

    def export(self, version: int, *, ema: bool = False) -> WeightBundle:
        """Return the trainable weights gathered from all ranks, or their moving average with `ema`.

        An earlier version is exported as it was published, up to `pipeline.max_staleness` versions back.
        """
        ...

    def save(self, folder: Path, earlier: Sequence[int] = ()) -> None:
        """Write weights, optimiser state and averages to `folder`, in a format independent of the number of ranks.

        Args:
            folder: where to write.
            earlier: versions whose weights are written too; samples in flight were drawn with them.
        """
        ...

    def keep(self, earlier: Sequence[int] = ()) -> KeptState | None:
        """Start to copy what `save` writes to memory that outlives the ranks.

        Args:
            earlier: as in `save`.

        Returns:
            The copy; None if ranks cannot be replaced alone or the state exceeds `checkpoint.in_memory_gib`.
        """
        return None

    def start(self, folder: Path | None) -> None:
        """Build the optimiser, new or from the files of `save`; must be called once, before any other method."""
        ...

    def close(self) -> None:
        """Free the workers."""
        ...


class WeightChannel(Protocol):
    """Sends weights from the learner to the rollout workers and verifies them."""

    def publish(self, version: int) -> str:
        """Send the weights as version `version` and return their checksum.

        Raises:
            WeightSyncError: a worker does not hold these weights afterwards.
        """
        ...


class Tracker(Protocol):
    """Records metrics, images and texts of a run. A failing tracker logs the failure once and never stops training."""

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
        """Attach searchable tags to the run."""
        ...

    def close(self, status: str) -> None:
        """Flush and end with `status`: FINISHED, FAILED or KILLED; RUNNING if another process continues the run."""
        ...


class PairSource(Protocol):
    """Pairs of a data set, for a learner that trains on these instead of rollouts."""

    counts: Mapping[str, int]
    """Number of usable pairs, and of excluded pairs by reason."""

    def sample_pairs(self, *, iteration: int, count: int, run_seed: int) -> list[str]:
        """Return sample ids of `count` pairs, winner and loser adjacent; deterministic in the arguments."""
        ...


@dataclass(frozen=True, kw_only=True)
class Ports:
    """The five ports, and optionally the pairs of a data set."""

    rollout: RolloutPool
    reward: RewardPool
    learner: LearnerGroup
    weights: WeightChannel
    tracker: Tracker
    pairs: PairSource | None = None
    """Usable rows of `data.pairs`, if the learner trains on these instead of rollouts."""
