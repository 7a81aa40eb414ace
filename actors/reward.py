"""The reward pool on Ray Serve: one deployment per metric; requests are stateless, so a dead replica means a retry."""

import logging
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException, RequestCancelledError

from acpo_dist.config.schema import Config
from acpo_dist.core.errors import RewardError, WorkerError
from acpo_dist.core.ports import Advance
from acpo_dist.core.types import RolloutHandle, ScoreTable
from acpo_dist.rewards.wire import WireTensor
from acpo_dist.rewards.worker import ScoredGradient
from actors.placement import Role
from actors.process import set_up

logger = logging.getLogger(__name__)

_REPLICA = "metric"
_MAX_REFUSALS = 3
"""A replica that answers with an error (a score that is not finite, say) is not asked for ever."""
_LOST = (
    RayError,
    BackPressureError,
    DeploymentUnavailableError,
    RequestCancelledError,
    RayServeException,
    TimeoutError,
)


class RewardReplica:
    """Shell round `RewardWorker`."""

    def __init__(self, metric: Any, model: Any, cut: str, wire_dtype: str, cpus: float, gpus: float) -> None:
        """Set the process up, then load metric and decoder."""
        device = set_up(cpus=cpus, gpus=gpus)
        from acpo_dist.rewards.worker import RewardWorker

        self._worker = RewardWorker(metric, model=model, cut=cut, wire_dtype=wire_dtype, device=device)

    def score(self, pictures: list[Any], prompts: tuple[str, ...]) -> list[float]:
        """Score pictures that lie in the object store (a list of one reference, which Serve leaves alone)."""
        return self._worker.score(ray.get(pictures[0]), prompts)

    def value_and_grad(self, sent: WireTensor, prompts: tuple[str, ...]) -> ScoredGradient:
        """See `RewardWorker.value_and_grad`."""
        return self._worker.value_and_grad(sent, prompts)

    def pid(self) -> int:
        """Process id of this replica."""
        return os.getpid()


def deploy(config: Config, role: Role, run_id: str) -> dict[str, str]:
    """Start one Serve application per metric; returns application name by metric.

    Raises:
        WorkerError: a replica cannot start.
    """
    serve.start(proxy_location="Disabled")
    rewards = config.rewards
    training = {entry.name for entry in rewards.train}
    applications = {}
    targets = []
    for entry in (*rewards.train, *rewards.judges):
        deployment = serve.deployment(
            RewardReplica, name=_REPLICA, num_replicas=rewards.replicas, max_ongoing_requests=2,
            health_check_period_s=5, health_check_timeout_s=30, graceful_shutdown_timeout_s=2,
            graceful_shutdown_wait_loop_s=0.1, ray_actor_options={"num_cpus": role.cpus, "num_gpus": role.gpus},
        )  # fmt: skip
        decoder = config.model if entry.name in training and rewards.cut == "latent" else None
        name = f"{run_id}-{entry.name}"
        target = deployment.bind(entry, decoder, rewards.cut, rewards.wire_dtype, role.cpus, role.gpus)
        targets.append(serve.RunTarget(target=target, name=name, route_prefix=None))
        applications[entry.name] = name
    try:
        # Together: every replica loads its model while the others do.
        serve.run_many(targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=True)
    except RuntimeError as error:
        raise WorkerError(f"the reward pool could not be started: {error}") from error
    return applications


class RewardClient:
    """Asks the pool, and asks again: within the deadline no request is lost and none is answered by a made-up score."""

    def __init__(self, applications: Mapping[str, str], *, deadline_s: float) -> None:
        """Connect to the applications."""
        self._handles = {metric: serve.get_deployment_handle(_REPLICA, name) for metric, name in applications.items()}
        self._deadline_s = deadline_s
        self.requests = 0
        self.retries = 0

    def submit(self, metric: str, method: str, *arguments: Any) -> "PendingReward":
        """Send a request; its `result` waits and retries."""
        self.requests += 1
        return PendingReward(self, metric, method, arguments, time.monotonic() + self._deadline_s)

    def value_and_grad(self, metric: str, sent: WireTensor, prompts: Sequence[str]) -> ScoredGradient:
        """See `GradientSource.value_and_grad`."""
        return self.submit(metric, "value_and_grad", sent, tuple(prompts)).result()

    def send(self, metric: str, method: str, arguments: tuple[Any, ...]) -> Any:
        """One attempt."""
        return getattr(self._handles[metric], method).remote(*arguments)


class PendingReward:
    """A request under way."""

    def __init__(
        self, client: RewardClient, metric: str, method: str, arguments: tuple[Any, ...], deadline: float
    ) -> None:
        """Send the first attempt."""
        self._client, self._metric, self._method, self._arguments = client, metric, method, arguments
        self._deadline = deadline
        self._response = client.send(metric, method, arguments)

    def result(self) -> Any:
        """The answer.

        Raises:
            RewardError: none came within the deadline, or replicas refuse again and again.
        """
        refusals = 0
        while True:
            remaining = self._deadline - time.monotonic()
            if remaining <= 0:
                raise RewardError(
                    f"reward `{self._metric}`: no answer within the deadline (rewards.deadline_s); raise it, or add "
                    "replicas (rewards.replicas)"
                )
            try:
                return self._response.result(timeout_s=remaining)
            except RayTaskError as error:
                refusals += 1
                logger.warning("reward %s: a replica failed (%s)", self._metric, str(error).strip().splitlines()[-1])
                if refusals >= _MAX_REFUSALS:
                    cause = error.cause if isinstance(error.cause, RewardError) else None
                    raise cause or RewardError(f"reward `{self._metric}` failed {refusals} times: {error}") from error
            except _LOST as error:
                logger.warning("reward %s: request lost (%s), asked again", self._metric, type(error).__name__)
            self._client.retries += 1
            self._response = self._client.send(self._metric, self._method, self._arguments)


class ServeRewards:
    """The pool as the driver sees it."""

    def __init__(self, applications: Mapping[str, str], *, deadline_s: float) -> None:
        """Connect to running applications."""
        self.applications = dict(applications)
        self.client = RewardClient(applications, deadline_s=deadline_s)
        self.learner_retries = 0

    def score(
        self, handles: Sequence[RolloutHandle], metrics: Sequence[str], advance: Advance | None = None
    ) -> ScoreTable:
        """See `RewardPool.score`: everything is sent at once, Serve spreads it by load."""
        pending = deque(
            (metric, handle, self.client.submit(metric, "score", [handle.payload[1]], handle.prompts))
            for handle in handles
            for metric in metrics
        )
        table: dict[str, dict[str, float]] = {metric: {} for metric in metrics}
        while pending:
            metric, handle, request = pending.popleft()
            scores = request.result()
            table[metric].update(zip(handle.sample_ids, scores, strict=True))
            if advance:
                advance(len(scores))
        return table

    def counters(self) -> dict[str, float]:
        """See `RewardPool.counters`; the learner ranks' own retries are counted in."""
        return {
            "reward_pool/requests": float(self.client.requests),
            "reward_pool/retries": float(self.client.retries + self.learner_retries),
        }

    def close(self) -> None:
        """Delete the applications."""
        for name in self.applications.values():
            serve.delete(name, _blocking=False)
