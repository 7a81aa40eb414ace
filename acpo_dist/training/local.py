"""The ports in one process: laptop, one GPU, debugging, unit tests. The same worker classes, without Ray."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from acpo_dist.config.schema import Config
from acpo_dist.core.allocator import keep_freed_memory
from acpo_dist.core.ports import Advance, Ports, Tracker
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
from acpo_dist.vrg.sums import ErrorSums
from acpo_dist.workers.learner.batches import LearnerSpec
from acpo_dist.workers.learner.worker import LearnerWorker
from acpo_dist.workers.reward.wire import WireTensor
from acpo_dist.workers.reward.worker import RewardWorker, ScoredGradient
from acpo_dist.workers.rollout.chunks import chunks_of
from acpo_dist.workers.rollout.worker import RolloutWorker


def default_device() -> str:
    """`cuda` when there is a GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def open_ports(config: Config, tracker: Tracker) -> Iterator[Ports]:
    """All ports in this process; one torch thread unless OMP_NUM_THREADS says otherwise."""
    device = default_device()
    if device == "cpu":
        keep_freed_memory()
    rollout = LocalRollouts(config, device=device)
    reward = LocalRewards(config, device=device)
    learner = LocalLearner(learner_spec(config), reward, device=device)
    try:
        yield Ports(
            rollout=rollout, reward=reward, learner=learner, weights=LocalChannel(learner, rollout), tracker=tracker
        )
    finally:
        for part in (learner, reward, rollout):
            part.close()


class LocalRollouts:
    """One rollout worker, called."""

    def __init__(self, config: Config, *, device: str) -> None:
        """Load the worker."""
        self.worker = RolloutWorker(config.model, config.sampler, device=device)
        self._chunk = config.rollout.batch_size

    def generate(self, groups: Sequence[PromptGroup], advance: Advance | None = None) -> list[RolloutHandle]:
        """See `RolloutPool.generate`."""
        handles = []
        for plans in chunks_of(groups, self._chunk):
            batch = self.worker.generate(plans)
            handles.append(
                RolloutHandle(
                    sample_ids=batch.sample_ids,
                    prompts=batch.prompts,
                    policy_version=batch.policy_version,
                    schedule_id=batch.schedule_id,
                    payload=batch,
                )
            )
            if advance:
                advance(len(plans))
        return handles

    def trajectory(self) -> Trajectory:
        """See `RolloutPool.trajectory`."""
        return self.worker.trajectory

    def alpha_bars(self) -> Tensor:
        """See `RolloutPool.alpha_bars`."""
        return self.worker.alpha_bars

    def follow(self, trajectory: Trajectory) -> list[str]:
        """See `RolloutPool.follow`."""
        return [self.worker.follow(trajectory)]

    def final_latents(self, groups: Sequence[PromptGroup], trajectory: Trajectory) -> Tensor:
        """See `RolloutPool.ends`."""
        return torch.cat([self.worker.final_latents(plans, trajectory) for plans in chunks_of(groups, self._chunk)])

    def measure_errors(self, handles: Sequence[RolloutHandle], sigmas: Sequence[float]) -> list[ErrorSums]:
        """See `RolloutPool.measure_errors`."""
        return [self.worker.measure_errors(handle.payload, sigmas) for handle in handles]

    def load(self, bundle: WeightBundle) -> list[WeightAck]:
        """See `RolloutPool.load`."""
        return [self.worker.load(bundle)]

    def images(self, handles: Sequence[RolloutHandle], sample_ids: Sequence[str]) -> Tensor:
        """See `RolloutPool.images`."""
        at = {name: handle.payload.images_BCHW[row] for handle in handles for row, name in enumerate(handle.sample_ids)}
        return torch.stack([at[sample_id] for sample_id in sample_ids])

    def close(self) -> None:
        """Nothing to free."""


class LocalRewards:
    """One reward worker per metric, called. Also the learner's gradient source."""

    def __init__(self, config: Config, *, device: str) -> None:
        """Load every metric; only those that train get the decoder."""
        rewards = config.rewards
        training = {entry.name for entry in rewards.train}
        self._workers = {
            entry.name: RewardWorker(
                entry,
                model=config.model if entry.name in training and rewards.cut == "latent" else None,
                cut=rewards.cut,
                wire_dtype=rewards.wire_dtype,
                device=device,
            )
            for entry in (*rewards.train, *rewards.judges)
        }
        self._requests = 0

    def score(
        self, handles: Sequence[RolloutHandle], metrics: Sequence[str], advance: Advance | None = None
    ) -> ScoreTable:
        """See `RewardPool.score`."""
        table: dict[str, dict[str, float]] = {name: {} for name in metrics}
        for handle in handles:
            for name in metrics:
                self._requests += 1
                scores = self._workers[name].score(handle.payload.images_BCHW, handle.prompts)
                table[name].update(zip(handle.sample_ids, scores, strict=True))
                if advance:
                    advance(len(scores))
        return table

    def score_images(self, metric: str, images: Tensor) -> list[float]:
        """See `RewardPool.score_images`."""
        self._requests += 1
        return self._workers[metric].score(images, ("",) * len(images))

    def submit(self, metric: str, sent: WireTensor, prompts: Sequence[str]) -> Future[ScoredGradient]:
        """Compute scores and gradient (`GradientSource.submit`)."""
        self._requests += 1
        future: Future[ScoredGradient] = Future()
        future.set_result(self._workers[metric].value_and_grad(sent, prompts))
        return future

    def counters(self) -> dict[str, float]:
        """See `RewardPool.counters`; in process nothing is retried."""
        return {"reward_pool/requests": float(self._requests), "reward_pool/retries": 0.0}

    def close(self) -> None:
        """Nothing to free."""


class LocalLearner:
    """One learner rank, called."""

    def __init__(self, spec: LearnerSpec, rewards: LocalRewards, *, device: str) -> None:
        """Load the worker."""
        self.worker = LearnerWorker(spec, rewards, device=device)

    def start(self, folder: Path | None) -> None:
        """See `LearnerGroup.start`."""
        self.worker.start(folder)

    def train(self, handles: Sequence[RolloutHandle], task: TrainTask, advance: Advance | None = None) -> TrainReport:
        """See `LearnerGroup.train`."""
        metrics, steps, skipped = self.worker.train([handle.payload for handle in handles], task)
        if advance:
            advance(len(task.sample_ids))
        return TrainReport(
            metrics=metrics.means(), optim_steps=steps, skipped=tuple(skipped), too_many=self.worker.skipped_too_many
        )

    def gradient_scale(self, handles: Sequence[RolloutHandle], rewards: Sequence[RewardTerm]) -> GradientScale:
        """See `LearnerGroup.gradient_scale`."""
        norms = self.worker.gradient_norms([handle.payload for handle in handles], rewards)
        return GradientScale(median_norm=median(norms), num_elements=self.worker.num_elements)

    def observe(self, handles: Sequence[RolloutHandle]) -> dict[str, list[float]]:
        """See `LearnerGroup.observe`."""
        return self.worker.observe([handle.payload for handle in handles])

    def measure_drift(
        self, handles: Sequence[RolloutHandle], timesteps: Sequence[int], *, space: str = "eps"
    ) -> dict[int, float]:
        """See `LearnerGroup.measure_drift`."""
        metrics: Mapping[str, float] = self.worker.measure_drift(
            [h.payload for h in handles], timesteps, space=space
        ).means()
        return {int(name): value for name, value in metrics.items()}

    def export(self, version: int, *, ema: bool = False) -> WeightBundle:
        """See `LearnerGroup.export`."""
        return self.worker.export(version, ema=ema)

    def save(self, folder: Path) -> None:
        """See `LearnerGroup.save`."""
        self.worker.save(folder)

    def close(self) -> None:
        """See `LearnerGroup.close`."""
        self.worker.close()


class LocalChannel:
    """Hands the bundle over and checks the echo."""

    def __init__(self, learner: LocalLearner, rollouts: LocalRollouts) -> None:
        """Connect the two ends."""
        self._learner, self._rollouts = learner, rollouts

    def publish(self, version: int) -> str:
        """See `WeightChannel.publish`."""
        bundle = self._learner.export(version)
        require_acks(version, bundle.checksum, self._rollouts.load(bundle))
        return bundle.checksum


def learner_spec(config: Config) -> LearnerSpec:
    """The sections that a learner rank gets."""
    return LearnerSpec(
        model=config.model, algorithm=config.algorithm, learner=config.learner, rewards=config.rewards,
        sampler=config.sampler, data=config.data, seed=config.run.seed,
    )  # fmt: skip
