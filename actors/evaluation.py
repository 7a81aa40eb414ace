"""An evaluation on Ray: rollout actors and one Serve deployment per judge, without a learner."""

import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.placement_group import remove_placement_group
from torch import Tensor
from typing_extensions import override

from acpo_dist.config.pool import MetricPoolConfig
from acpo_dist.config.schema import Config, RewardsConfig
from acpo_dist.core.errors import WorkerError
from acpo_dist.core.ports import RolloutPool
from acpo_dist.evaluation.suites.backend import Backend
from acpo_dist.evaluation.suites.judges import CHUNK, JudgePool
from actors.cluster.control import attempt
from actors.launch import connected
from actors.placement import PlacementPlan, Role, await_resources, place
from actors.reward.client import NoAnswerError, RewardClient
from actors.reward.pool import deploy, end_orphans
from actors.rollout import RayRollouts


class RayBackend(Backend):
    """Runs an evaluation on the configured cluster, or on a local one that exists during `open`."""

    name = "ray"

    def __init__(self, config: Config, *, workers: int) -> None:
        """Take resources and time limits from `config`; call `open` first."""
        self._config, self._workers = config, workers
        # One chunk running and one queued per worker, so none is idle while images are fetched.
        self.chunks_at_once = 2 * workers
        self._own = False

    @contextmanager
    def open(self) -> Iterator["RayBackend"]:
        """Join or start the cluster."""
        self._own = not (self._config.cluster.address or os.environ.get("RAY_ADDRESS") or ray.is_initialized())
        with connected(self._config):
            end_orphans()
            yield self

    @override
    @contextmanager
    def rollouts(self, config: Config) -> Iterator[RolloutPool]:
        rollout, cluster = config.rollout, config.cluster
        role = Role(
            name="rollout", count=self._workers, cpus=self._share(rollout.cpus_per_worker, self._workers),
            gpus=rollout.gpus_per_worker, strategy="SPREAD", count_key="--workers",
        )  # fmt: skip
        await_resources(PlacementPlan(roles=(role,)), timeout_s=cluster.place_timeout_s)
        group = place(role, timeout_s=cluster.place_timeout_s)
        try:
            pool = RayRollouts(config, role, group)
            try:
                pool.await_ready()
                yield pool
            finally:
                pool.close()
        finally:
            attempt(lambda: remove_placement_group(group), what="release the workers' machines")

    @override
    @contextmanager
    def judges(self, sections: Sequence[Any]) -> Iterator[JudgePool]:
        rewards = self._config.rewards
        cpus = self._share(rewards.cpus_per_replica, len(sections) * rewards.replicas)
        # One request at a time per replica: a score must not depend on the other images of its batch.
        alone = MetricPoolConfig(
            replicas=rewards.replicas, max_ongoing_requests=1, max_batch=CHUNK, cpus=cpus, gpus=rewards.gpus_per_replica
        )
        served = RewardsConfig(
            train=tuple(sections[:1]), judges=tuple(sections[1:]), cut="image", wire_dtype="float32",
            deadline_s=rewards.deadline_s, attempt_timeout_s=rewards.attempt_timeout_s,
            pool={section.name: alone for section in sections},
        )  # fmt: skip
        pool = deploy(self._config.model_copy(update={"rewards": served}), f"acpo-eval-{uuid.uuid4().hex[:8]}")
        try:
            yield ServeJudges(pool.client)
        finally:
            pool.close()

    def _share(self, cpus: float, count: int) -> float:
        """Return the CPUs of one worker; on a cluster of its own, workers and judges use at most half of it each."""
        if not self._own:
            return cpus
        return min(cpus, max(0.01, int(50 * ray.cluster_resources().get("CPU", 1.0) / count) / 100))


class ServeJudges(JudgePool):
    """The judges of an evaluation, called from the driver."""

    def __init__(self, client: RewardClient) -> None:
        """Send requests through this client."""
        self._client = client

    @override
    def submit(self, judge: str, images: Tensor, prompts: Sequence[str]) -> Callable[[], list[float]]:
        answer = self._client.submit_scores(judge, ray.put(images), prompts)

        def wait() -> list[float]:
            try:
                return answer.result()
            except NoAnswerError as error:
                # The pool has failed; the images may be valid.
                raise WorkerError(f"{error} Scores so far are saved: continue with --resume.") from error

        return wait
