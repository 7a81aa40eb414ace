"""The ports in one process, without Ray: the worker classes are called directly."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from typing_extensions import override

from acpo_dist.config.schema import Config
from acpo_dist.core.allocator import keep_freed_memory
from acpo_dist.core.by_size import Mixed, gather
from acpo_dist.core.errors import ConfigError
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
from acpo_dist.core.weights import require_acks, with_version
from acpo_dist.diffusion.trajectory import Trajectory
from acpo_dist.models.tuning import release_frozen, share_frozen, shares_base
from acpo_dist.vrg.sums import ErrorSums
from acpo_dist.workers.learner.batches import LearnerSpec
from acpo_dist.workers.learner.signal import GradientSource
from acpo_dist.workers.learner.worker import LearnerWorker
from acpo_dist.workers.reward.wire import WireTensor
from acpo_dist.workers.reward.worker import RewardWorker, ScoredGradient
from acpo_dist.workers.rollout.chunks import chunks_of, in_order
from acpo_dist.workers.rollout.worker import RolloutWorker


def default_device() -> str:
    """Return `cuda` if there is a GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def open_ports(config: Config, tracker: Tracker) -> Iterator[Ports]:
    """Context with all ports in this process."""
    if config.learner.num_ranks > 1:
        raise ConfigError(
            f"learner.num_ranks is {config.learner.num_ranks}, and this is one process: start "
            f"`accelerate launch --num_processes {config.learner.num_ranks} -m acpo_dist train ...`, or set "
            "learner.num_ranks=1, or use --backend ray with learner.zero_stage."
        )
    device = default_device()
    if device == "cpu":
        keep_freed_memory()
    rollout = LocalRollouts(config, device=device)
    reward = LocalRewards(config, device=device)
    learner = LocalLearner(learner_spec(config), reward, device=device, rollout=rollout)
    try:
        yield Ports(
            rollout=rollout, reward=reward, learner=learner, weights=LocalChannel(learner, rollout), tracker=tracker
        )
    finally:
        for part in (learner, reward, rollout):
            part.close()


class LocalRollouts(RolloutPool):
    """One rollout worker in this process."""

    def __init__(self, config: Config, *, device: str) -> None:
        """Load the worker."""
        self.worker = RolloutWorker(config.model, config.sampler, device=device)
        self._chunk = config.rollout.batch_size
        self._earlier = config.pipeline.max_staleness
        self._bundles: dict[int, WeightBundle] = {}
        self._lock = threading.Lock()
        """Held while the worker draws or changes: samples may be drawn in another thread."""

    @override
    def generate(
        self, groups: Sequence[PromptGroup], advance: Advance | None = None, *, version: int | None = None
    ) -> list[RolloutHandle]:
        handles = []
        with self._lock:
            self._use(version)
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

    @override
    def trajectory(self) -> Trajectory:
        return self.worker.trajectory

    @override
    def alpha_bars(self) -> Tensor:
        return self.worker.alpha_bars

    @override
    def set_trajectory(self, trajectory: Trajectory) -> list[str]:
        with self._lock:
            return [self.worker.set_trajectory(trajectory)]

    @override
    def final_latents(self, groups: Sequence[PromptGroup], trajectory: Trajectory) -> Mixed:
        chunks = chunks_of(groups, self._chunk)
        with self._lock:
            self._use(None)
            return in_order(groups, chunks, [self.worker.final_latents(plans, trajectory) for plans in chunks])

    @override
    def measure_errors(self, handles: Sequence[RolloutHandle], sigmas: Sequence[float]) -> list[ErrorSums]:
        with self._lock:
            self._use(None)
            return [self.worker.measure_errors(handle.payload, sigmas) for handle in handles]

    @override
    def load(self, bundle: WeightBundle) -> list[WeightAck]:
        if self._earlier == 0:
            return [self.worker.load(bundle)]
        self._bundles = with_version(self._bundles, bundle.version, bundle, earlier=self._earlier)
        return []

    def _use(self, version: int | None) -> None:
        """Load a published version, the newest for None, unless the worker holds it."""
        wanted = max(self._bundles, default=self.worker.version) if version is None else version
        if wanted != self.worker.version:
            bundle = self._bundles[wanted]
            require_acks(wanted, bundle.checksum, [self.worker.load(bundle)])

    @override
    def images(self, handles: Sequence[RolloutHandle], sample_ids: Sequence[str]) -> Mixed:
        at = {name: handle.payload.images_BCHW[row] for handle in handles for row, name in enumerate(handle.sample_ids)}
        return gather([at[sample_id] for sample_id in sample_ids])

    @override
    def close(self) -> None:
        pass


class LocalRewards(RewardPool, GradientSource):
    """One reward worker per metric in this process; also the learner's gradient source."""

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

    @override
    def score(
        self, handles: Sequence[RolloutHandle], metrics: Sequence[str], advance: Advance | None = None
    ) -> ScoreTable:
        table: dict[str, dict[str, float]] = {name: {} for name in metrics}
        for handle in handles:
            for name in metrics:
                self._requests += 1
                worker, batch = self._workers[name], handle.payload
                scores = worker.score(batch.latents_BCHW if worker.on_latents else batch.images_BCHW, handle.prompts)
                table[name].update(zip(handle.sample_ids, scores, strict=True))
                if advance:
                    advance(len(scores))
        return table

    @override
    def score_images(self, metric: str, images: Tensor) -> list[float]:
        self._requests += 1
        return self._workers[metric].score(images, ("",) * len(images))

    @override
    def submit(self, metric: str, sent: WireTensor, prompts: Sequence[str]) -> Future[ScoredGradient]:
        self._requests += 1
        future: Future[ScoredGradient] = Future()
        future.set_result(self._workers[metric].value_and_grad(sent, prompts))
        return future

    @override
    def counters(self) -> dict[str, float]:
        return {"reward_pool/requests": float(self._requests), "reward_pool/retries": 0.0}

    @override
    def close(self) -> None:
        pass


class LocalLearner(LearnerGroup):
    """One learner rank in this process."""

    def __init__(
        self, spec: LearnerSpec, rewards: LocalRewards, *, device: str, rollout: LocalRollouts | None = None
    ) -> None:
        """Load the worker.

        Args:
            spec: the worker's sections.
            rewards: the gradient source.
            device: torch device.
            rollout: rollouts of this process, which use the frozen base weights of the worker (`shares_base`).
        """
        drawing = rollout.worker.family.network if rollout and shares_base(spec.model, spec.sampler) else None
        if drawing is not None:
            release_frozen(drawing)
        self.worker = LearnerWorker(spec, rewards, device=device)
        if drawing is not None:
            share_frozen(drawing, self.worker.family.network)

    @override
    def start(self, folder: Path | None) -> None:
        self.worker.start(folder)

    @override
    def train(self, handles: Sequence[RolloutHandle], task: TrainTask, advance: Advance | None = None) -> TrainReport:
        metrics, steps, skipped = self.worker.train([handle.payload for handle in handles], task)
        if advance:
            advance(len(task.sample_ids))
        return TrainReport(
            metrics=metrics.means(), optim_steps=steps, skipped=tuple(skipped), too_many=self.worker.skipped_too_many
        )

    @override
    def gradient_scale(self, handles: Sequence[RolloutHandle], rewards: Sequence[RewardTerm]) -> GradientScale:
        norms = self.worker.gradient_norms([handle.payload for handle in handles], rewards)
        return GradientScale(median_norm=median(norms), num_elements=self.worker.num_elements)

    @override
    def observe(self, handles: Sequence[RolloutHandle]) -> dict[str, list[float]]:
        return self.worker.observe([handle.payload for handle in handles])

    @override
    def measure_drift(
        self, handles: Sequence[RolloutHandle], timesteps: Sequence[int], *, space: str = "eps"
    ) -> dict[int, float]:
        metrics: Mapping[str, float] = self.worker.measure_drift(
            [h.payload for h in handles], timesteps, space=space
        ).means()
        return {int(name): value for name, value in metrics.items()}

    @override
    def export(self, version: int, *, ema: bool = False) -> WeightBundle:
        return self.worker.export(version, ema=ema)

    @override
    def save(self, folder: Path, earlier: Sequence[int] = ()) -> None:
        self.worker.save(folder, earlier)

    @override
    def close(self) -> None:
        self.worker.close()


class LocalChannel(WeightChannel):
    """Loads the learner's weights into the rollout worker and checks its acknowledgement."""

    def __init__(self, learner: LocalLearner, rollouts: LocalRollouts) -> None:
        """Connect learner and rollout worker."""
        self._learner, self._rollouts = learner, rollouts

    @override
    def publish(self, version: int) -> str:
        bundle = self._learner.export(version)
        require_acks(version, bundle.checksum, self._rollouts.load(bundle))
        return bundle.checksum


def latent_cache(config: Config) -> Path:
    """Return the folder of the latents of `data.path`."""
    return config.data.latent_cache or config.run_dir / "latents"


def learner_spec(config: Config) -> LearnerSpec:
    """Return the configuration sections of a learner rank."""
    return LearnerSpec(
        model=config.model, algorithm=config.algorithm, learner=config.learner, rewards=config.rewards,
        sampler=config.sampler, data=config.data, seed=config.run.seed, max_staleness=config.pipeline.max_staleness,
        latent_cache=latent_cache(config),
    )  # fmt: skip
