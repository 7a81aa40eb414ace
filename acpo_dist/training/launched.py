"""The ports on several processes of one machine that `accelerate launch` or torchrun started, without Ray.

Rank 0 runs the training loop. It broadcasts every call, and all ranks, rank 0 included, execute it on workers of their
own: each rank draws and scores a share of the chunks, and trains a share of the micro-batches.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from statistics import median

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor
from typing_extensions import override

from acpo_dist.config.schema import Config
from acpo_dist.core.by_size import Mixed
from acpo_dist.core.errors import WeightSyncError
from acpo_dist.core.ports import Advance, LearnerGroup, Ports, RewardPool, RolloutPool, Tracker, WeightChannel
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
from acpo_dist.core.weights import require_acks
from acpo_dist.diffusion.trajectory import Trajectory
from acpo_dist.training.launched_ranks import Ranks
from acpo_dist.training.local import default_device
from acpo_dist.vrg.sums import ErrorSums
from acpo_dist.workers.learner.metrics import merged_drift, merged_lists, merged_report
from acpo_dist.workers.rollout.chunks import chunks_of, in_order

_TIMEOUT = timedelta(hours=6)
"""Longest time that other ranks wait for rank 0, which may train a base model or write an export alone. A process that
dies ends the others at once: the launcher does that."""


@contextmanager
def launched_group() -> Iterator[bool]:
    """Join the process group for the block, and yield whether this process runs the training loop.

    The other processes execute calls before the block starts, until rank 0 leaves it.
    """
    state = PartialState(cpu=default_device() == "cpu", timeout=_TIMEOUT)
    if not state.is_main_process:
        while (config := broadcast_object_list([None])[0]) is not None:
            Ranks(config).serve()
    try:
        yield state.is_main_process
    finally:
        if state.is_main_process:
            broadcast_object_list([None])
        state.destroy_process_group()


@contextmanager
def open_ports(config: Config, tracker: Tracker) -> Iterator[Ports]:
    """Open the ports on all processes; called on rank 0 within `launched_group`."""
    broadcast_object_list([config])
    ranks = Ranks(config)
    try:
        yield Ports(
            rollout=LaunchedRollouts(ranks, config), reward=LaunchedRewards(ranks), learner=LaunchedLearner(ranks),
            weights=LaunchedChannel(ranks), tracker=tracker,
        )  # fmt: skip
    finally:
        ranks.end()


class LaunchedRollouts(RolloutPool):
    """One rollout worker per process."""

    def __init__(self, ranks: Ranks, config: Config) -> None:
        """Store the ranks."""
        self._ranks, self._own = ranks, ranks.own.rollout
        self._chunk = config.rollout.batch_size

    @override
    def generate(
        self, groups: Sequence[PromptGroup], advance: Advance | None = None, *, version: int | None = None
    ) -> list[RolloutHandle]:
        handles = self._ranks.spread("generate", groups)
        if advance:
            advance(sum(len(handle.sample_ids) for handle in handles))
        return handles

    @override
    def load(self, bundle: WeightBundle) -> list[WeightAck]:
        return [ack for acks in self._ranks.call("load", bundle) for ack in acks]

    @override
    def trajectory(self) -> Trajectory:
        return self._own.trajectory()

    @override
    def alpha_bars(self) -> Tensor:
        return self._own.alpha_bars()

    @override
    def set_trajectory(self, trajectory: Trajectory) -> list[str]:
        return [name for names in self._ranks.call("set_trajectory", trajectory) for name in names]

    @override
    def final_latents(self, groups: Sequence[PromptGroup], trajectory: Trajectory) -> Mixed:
        parts = self._ranks.spread("final_latents", groups, trajectory)
        return in_order(groups, chunks_of(groups, self._chunk), parts)

    @override
    def measure_errors(self, handles: Sequence[RolloutHandle], sigmas: Sequence[float]) -> list[ErrorSums]:
        return self._ranks.spread("measure_errors", handles, sigmas)

    @override
    def images(self, handles: Sequence[RolloutHandle], sample_ids: Sequence[str]) -> Mixed:
        return self._own.images(handles, sample_ids)

    @override
    def close(self) -> None:
        pass


class LaunchedRewards(RewardPool):
    """All metrics on every process; each one is also the gradient source of the learner in its process."""

    def __init__(self, ranks: Ranks) -> None:
        """Store the ranks."""
        self._ranks = ranks

    @override
    def score(
        self, handles: Sequence[RolloutHandle], metrics: Sequence[str], advance: Advance | None = None
    ) -> ScoreTable:
        table: dict[str, dict[str, float]] = {name: {} for name in metrics}
        for part in self._ranks.spread("score", handles, metrics):
            for name, scores in part.items():
                table[name].update(scores)
                if advance:
                    advance(len(scores))
        return table

    @override
    def score_images(self, metric: str, images: Tensor) -> list[float]:
        return self._ranks.own.reward.score_images(metric, images)

    @override
    def counters(self) -> dict[str, float]:
        parts = self._ranks.call("counters")
        return {name: sum(part[name] for part in parts) for name in parts[0]}

    @override
    def close(self) -> None:
        pass


class LaunchedLearner(LearnerGroup):
    """One learner rank per process; every rank holds all weights, and gradients are averaged (data parallel)."""

    def __init__(self, ranks: Ranks) -> None:
        """Store the ranks."""
        self._ranks, self._own = ranks, ranks.own.learner

    @override
    def train(self, handles: Sequence[RolloutHandle], task: TrainTask, advance: Advance | None = None) -> TrainReport:
        answers = self._ranks.call("train", handles, task)
        if advance:
            advance(len(task.sample_ids))
        return merged_report(answers)

    @override
    def gradient_scale(self, handles: Sequence[RolloutHandle], rewards: Sequence[RewardTerm]) -> GradientScale:
        norms = [norm for part in self._ranks.call("gradient_norms", handles, rewards) for norm in part]
        return GradientScale(median_norm=median(norms), num_elements=self._own.worker.num_elements)

    @override
    def observe(self, handles: Sequence[RolloutHandle]) -> dict[str, list[float]]:
        return merged_lists(self._ranks.call("observe", handles))

    @override
    def measure_drift(
        self, handles: Sequence[RolloutHandle], timesteps: Sequence[int], *, space: str = "eps"
    ) -> dict[int, float]:
        return merged_drift(self._ranks.call("measure_drift", handles, timesteps, space))

    @override
    def export(self, version: int, *, ema: bool = False) -> WeightBundle:
        return self._own.export(version, ema=ema)

    @override
    def save(self, folder: Path, earlier: Sequence[int] = ()) -> None:
        self._own.save(folder, earlier)

    @override
    def start(self, folder: Path | None) -> None:
        self._ranks.call("start", folder)

    @override
    def close(self) -> None:
        pass


class LaunchedChannel(WeightChannel):
    """Every rank gives its rollout worker its own learner's weights; all ranks must hold the same bytes."""

    def __init__(self, ranks: Ranks) -> None:
        """Store the ranks."""
        self._ranks = ranks

    @override
    def publish(self, version: int) -> str:
        answers = self._ranks.call("publish", version)
        wanted = answers[0][0]
        other = [rank for rank, (found, _) in enumerate(answers) if found != wanted]
        if other:
            raise WeightSyncError(
                f"version {version}: the learner's weights on rank {', '.join(map(str, other))} differ from those of "
                "rank 0. Continue from the last checkpoint with `--resume auto`."
            )
        require_acks(version, wanted, [ack for _, acks in answers for ack in acks])
        return wanted
