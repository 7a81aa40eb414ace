"""Calls that all processes of a launched run execute together, each on workers of its own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from acpo_dist.config.schema import Config
from acpo_dist.core.by_size import Mixed
from acpo_dist.core.errors import AcpoError, WorkerError
from acpo_dist.core.types import (
    PromptGroup,
    RewardTerm,
    RolloutHandle,
    ScoreTable,
    TrainTask,
    WeightAck,
    WeightBundle,
)
from acpo_dist.diffusion.trajectory import Trajectory
from acpo_dist.training.local import LocalLearner, LocalRewards, LocalRollouts, learner_spec
from acpo_dist.vrg.sums import ErrorSums
from acpo_dist.workers.learner.metrics import MetricSums
from acpo_dist.workers.rollout.chunks import group_chunks


class _Rank:
    """Workers of one process, and the calls that all ranks execute together."""

    def __init__(self, config: Config) -> None:
        state = PartialState()
        self.number, self._count = state.process_index, state.num_processes
        where: Any = state.device
        device = "cpu" if where.type == "cpu" else str(where)
        self._chunk = config.rollout.batch_size
        self.rollout = LocalRollouts(config, device=device)
        self.reward = LocalRewards(config, device=device)
        self.learner = LocalLearner(learner_spec(config), self.reward, device=device, rollout=self.rollout)

    def _share(self, whole: Sequence[Any]) -> Sequence[Any]:
        return whole[self.number :: self._count]

    def generate(self, groups: Sequence[PromptGroup]) -> list[RolloutHandle]:
        return [self.rollout.generate(chunk)[0] for chunk in self._share(group_chunks(groups, self._chunk))]

    def final_latents(self, groups: Sequence[PromptGroup], trajectory: Trajectory) -> list[Mixed]:
        chunks = self._share(group_chunks(groups, self._chunk))
        return [self.rollout.final_latents(chunk, trajectory) for chunk in chunks]

    def measure_errors(self, handles: Sequence[RolloutHandle], sigmas: Sequence[float]) -> list[ErrorSums]:
        return self.rollout.measure_errors(self._share(handles), sigmas)

    def set_trajectory(self, trajectory: Trajectory) -> list[str]:
        return self.rollout.set_trajectory(trajectory)

    def load(self, bundle: WeightBundle) -> list[WeightAck]:
        return self.rollout.load(bundle)

    def score(self, handles: Sequence[RolloutHandle], metrics: Sequence[str]) -> list[ScoreTable]:
        return [self.reward.score([handle], metrics) for handle in self._share(handles)]

    def start(self, folder: Path | None) -> None:
        self.learner.start(folder)

    def train(self, handles: Sequence[RolloutHandle], task: TrainTask) -> Any:
        worker = self.learner.worker
        return *worker.train([handle.payload for handle in handles], task), worker.skipped_too_many

    def gradient_norms(self, handles: Sequence[RolloutHandle], rewards: Sequence[RewardTerm]) -> list[float]:
        return self.learner.worker.gradient_norms([handle.payload for handle in handles], rewards)

    def observe(self, handles: Sequence[RolloutHandle]) -> dict[str, list[float]]:
        return self.learner.observe(handles)

    def measure_drift(self, handles: Sequence[RolloutHandle], timesteps: Sequence[int], space: str) -> MetricSums:
        return self.learner.worker.measure_drift([handle.payload for handle in handles], timesteps, space=space)

    def publish(self, version: int) -> tuple[str, list[WeightAck]]:
        bundle = self.learner.export(version)
        return bundle.checksum, self.rollout.load(bundle)

    def counters(self) -> dict[str, float]:
        return self.reward.counters()


class Ranks:
    """Executes calls on every rank."""

    def __init__(self, config: Config) -> None:
        self.own = _Rank(config)

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Return every rank's result, by rank; called on rank 0.

        Raises:
            AcpoError: raised by any rank.
        """
        broadcast_object_list([(method, arguments)])
        return self._execute(method, arguments)

    def spread(self, method: str, *arguments: Any) -> list[Any]:
        """Return the results of a call that each rank executes for a share, in the order of the whole."""
        parts = self.call(method, *arguments)
        return [parts[index % len(parts)][index // len(parts)] for index in range(sum(map(len, parts)))]

    def serve(self) -> None:
        """Execute the calls of rank 0 until it ends the ports."""
        while True:
            received: Any = broadcast_object_list([None])
            if received[0] is None:
                return
            try:
                self._execute(*received[0])
            except AcpoError:
                # Rank 0 raises the same error and decides what follows.
                continue

    def end(self) -> None:
        """Let the other ranks leave `serve`."""
        broadcast_object_list([None])

    def _execute(self, method: str, arguments: Sequence[Any]) -> list[Any]:
        answer, failed = None, None
        try:
            answer = getattr(self.own, method)(*arguments)
        except AcpoError as error:
            failed = error
        except Exception as error:
            failed = WorkerError(f"rank {self.own.number} failed in `{method}`: {type(error).__name__}: {error}")
        answers = gather_object([(answer, failed)])
        for _, error in answers:
            if error is not None:
                raise error
        return [answer for answer, _ in answers]
