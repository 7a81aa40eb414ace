"""The reward pool on Ray Serve: one deployment per metric. Requests are stateless, so they survive lost replicas."""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig
from torch import Tensor
from typing_extensions import override

from acpo_dist.config.pool import MetricPoolConfig
from acpo_dist.config.roles import RewardRoleConfig
from acpo_dist.config.schema import Config
from acpo_dist.core.errors import WorkerError, WorkerLostError
from acpo_dist.core.ports import Advance, RewardPool
from acpo_dist.core.types import RolloutHandle, ScoreTable
from actors.cluster.control import attempt, bounded
from actors.cluster.orphans import forget, orphans, own
from actors.cluster.software import software
from actors.ray_private import delete_key
from actors.reward.client import PoolLink, RewardClient
from actors.reward.counts import ReplicaClock, mean_batch, utilisation
from actors.reward.liveness import REPLICA, replica_vitals
from actors.reward.replica import ReplicaPlan, RewardReplica, reference_key
from actors.reward.start import await_running

logger = logging.getLogger(__name__)

_MOST_THREADS = 64
_IMAGES_AT_ONCE = 16


def deploy(config: Config, run_id: str, *, near: Sequence[str] = ()) -> "ServeRewards":
    """Start one Serve application per metric, named `<run_id>-<metric>`.

    Args:
        near: Ray's node ids that replicas prefer.

    Raises:
        UsageError: a metric cannot be built, or its machine runs other software; the replica's message.
        WorkerError: a replica cannot start, or not in time.
    """
    timeout_s = config.cluster.worker_timeout_s
    bounded(lambda: serve.start(proxy_location="Disabled"), what="start Ray Serve", timeout_s=timeout_s)
    rewards = config.rewards
    training = {entry.name for entry in rewards.train}
    pools = {entry.name: rewards.pool_of(entry.name) for entry in (*rewards.train, *rewards.judges)}
    where = _machines(config.cluster.roles.reward, near)
    expected = None if config.cluster.mixed_software else software()
    targets = []
    for entry in (*rewards.train, *rewards.judges):
        pool = pools[entry.name]
        plan = ReplicaPlan(
            metric=entry,
            model=config.model if entry.name in training and rewards.cut == "latent" else None,
            cut=rewards.cut, wire_dtype=rewards.wire_dtype, cpus=pool.cpus or 0.0, gpus=pool.gpus or 0.0,
            max_batch=pool.max_batch, batch_wait_s=pool.batch_wait_s, attempt_timeout_s=rewards.attempt_timeout_s,
            # A metric may need its own libraries.
            software=expected.code_alone() if expected and pool.runtime_env.pip else expected,
        )  # fmt: skip
        targets.append(
            serve.RunTarget(
                target=_deployment(pool, where).bind(plan), name=f"{run_id}-{entry.name}", route_prefix=None
            )
        )
    names = [target.name for target in targets]
    try:
        bounded(lambda: [own(name) for name in names], what="record the owner of the reward pool")
        # Started together, so that replicas load their models in parallel.
        bounded(
            lambda: serve.run_many(
                targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False
            ),
            what="deploy the reward pool", timeout_s=timeout_s,
        )  # fmt: skip
        await_running(names, timeout_s=timeout_s)
    except WorkerLostError:
        delete(names)
        raise
    except WorkerError as error:
        delete(names)
        raise WorkerError(f"the reward pool could not be started: {error}") from error
    except BaseException:
        # On an interrupt Serve would keep the applications and their resources.
        delete(names)
        raise
    latent = frozenset(entry.name for entry in rewards.train if entry.space == "latent")
    return ServeRewards(link_of(config, run_id), pools, latent)


def link_of(config: Config, run_id: str) -> PoolLink:
    """Return what a process needs to send requests to the pool that `deploy` starts, or has not started yet."""
    rewards = config.rewards
    return PoolLink(
        applications={entry.name: f"{run_id}-{entry.name}" for entry in (*rewards.train, *rewards.judges)},
        deadline_s=rewards.deadline_s, attempt_timeout_s=rewards.attempt_timeout_s,
    )  # fmt: skip


def _machines(role: RewardRoleConfig, near: Sequence[str]) -> dict[str, Any]:
    """Return Ray options: where a replica may run, and which nodes it prefers."""
    options: dict[str, Any] = {"resources": dict(role.resources)} if role.resources else {}
    labels = dict(role.labels)
    if near:
        nearest = labels | {"ray.io/node-id": f"in({','.join(near)})"}
        return options | {"label_selector": nearest, "fallback_strategy": [{"label_selector": labels}]}
    return options | ({"label_selector": labels} if labels else {})


def _deployment(pool: MetricPoolConfig, where: Mapping[str, Any]) -> Any:
    fewest, most = pool.bounds
    options: dict[str, Any] = {"num_cpus": pool.cpus, "num_gpus": pool.gpus, **where}
    if pool.runtime_env.pip or pool.runtime_env.env_vars:
        pip = {"pip": list(pool.runtime_env.pip)} if pool.runtime_env.pip else {}
        options["runtime_env"] = {"env_vars": dict(pool.runtime_env.env_vars), **pip}
    scaling: dict[str, Any] = {"num_replicas": fewest}
    if fewest != most:
        scaling = {"autoscaling_config": autoscaling(fewest, most, pool)}
    return serve.deployment(
        RewardReplica, name=REPLICA, max_ongoing_requests=pool.max_ongoing_requests,
        max_queued_requests=pool.max_queued_requests, health_check_period_s=5, health_check_timeout_s=10,
        graceful_shutdown_timeout_s=10, graceful_shutdown_wait_loop_s=0.1, ray_actor_options=options, **scaling,
    )  # fmt: skip


def autoscaling(fewest: int, most: int, pool: MetricPoolConfig) -> AutoscalingConfig:
    """Return Serve's autoscaling between two numbers of replicas, by the number of ongoing requests."""
    return AutoscalingConfig(
        min_replicas=fewest, max_replicas=most, initial_replicas=fewest,
        target_ongoing_requests=pool.target_ongoing_requests, upscale_delay_s=pool.upscale_delay_s,
        downscale_delay_s=pool.downscale_delay_s, look_back_period_s=min(30.0, max(2.0, pool.upscale_delay_s)),
    )  # fmt: skip


def delete(applications: Sequence[str]) -> None:
    """End applications and delete their records; a cluster that does not respond is logged."""

    def end() -> None:
        for name in applications:
            serve.delete(name, _blocking=False)
            delete_key(reference_key(name))
            forget(name)

    attempt(end, what="end the reward pool")


def end_orphans() -> None:
    """End applications of runs that died without ending them, which hold resources of the cluster.

    Raises:
        WorkerLostError: the cluster does not respond.
    """
    if found := bounded(orphans, what="find reward pools of ended runs"):
        logger.warning("ended reward pools of runs that died: %s", ", ".join(found))
        delete(found)


class ServeRewards(RewardPool):
    """The reward pool, called from the driver."""

    def __init__(
        self, link: PoolLink, pools: Mapping[str, MetricPoolConfig], on_latents: frozenset[str] = frozenset()
    ) -> None:
        """Connect to running applications.

        Args:
            link: addresses and time limits.
            pools: serving options by metric.
            on_latents: metrics that score x_0 instead of images.
        """
        self.link = link
        self.client = RewardClient(link)
        self.learner_retries = 0
        self._pools = dict(pools)
        self._on_latents = on_latents
        self._clocks: dict[str, dict[str, ReplicaClock]] = {}

    @override
    def score(
        self, handles: Sequence[RolloutHandle], metrics: Sequence[str], advance: Advance | None = None
    ) -> ScoreTable:
        # With as many requests in flight as the replicas can hold, Serve distributes them by load.
        with ExitStack() as stack:
            waiting = {}
            for metric in metrics:
                threads = ThreadPoolExecutor(self._window(metric), thread_name_prefix=f"reward-{metric}")
                stack.callback(threads.shutdown, wait=False, cancel_futures=True)
                for handle in handles:
                    sample = handle.payload[0 if metric in self._on_latents else 1]
                    request = threads.submit(self.client.score, metric, sample, handle.prompts)
                    waiting[request] = (metric, handle)
            for request in as_completed(waiting):
                scores = request.result()
                if advance:
                    advance(len(scores))
        # In the order of the samples, since sums over the table must not depend on the order of the responses.
        table: dict[str, dict[str, float]] = {metric: {} for metric in metrics}
        for request, (metric, handle) in waiting.items():
            table[metric].update(zip(handle.sample_ids, request.result(), strict=True))
        return table

    @override
    def score_images(self, metric: str, images: Tensor) -> list[float]:
        return [
            score
            for part in images.split(_IMAGES_AT_ONCE)
            for score in self.client.score(metric, ray.put(part.clone()), ("",) * len(part))
        ]

    def vitals(self) -> dict[str, list[dict[str, Any]]]:
        """Return the state of every replica, by metric; a replica that does not respond within 2 s is left out."""
        return {name: replica_vitals(self.client.handle(name)) for name in self.link.applications}

    @override
    def counters(self) -> dict[str, float]:
        # Per metric, since the last call: replicas, queued requests, images per batch, share of time spent computing,
        # and latency of this process's requests in seconds. Retries of the learner ranks are included.
        counts = self.client.counts
        metrics = {
            "reward_pool/retries": float(counts.retries + self.learner_retries),
            **counts.to_metrics(),
        }
        latencies = counts.take_latencies()
        for metric, found in self.vitals().items():
            now = {
                one["replica"]: ReplicaClock(
                    busy_s=one["busy_s"], up_s=one["up_s"], batches=one["batches"], images=one["images"]
                )
                for one in found
            }
            before = self._clocks.get(metric, {})
            metrics |= {
                f"reward_pool/{metric}/replicas": float(len(now)),
                f"reward_pool/{metric}/queue": float(sum(one["queue"] for one in found)),
                f"reward_pool/{metric}/batch": mean_batch(before, now),
                f"reward_pool/{metric}/utilisation": utilisation(before, now),
                **{f"reward_pool/{metric}/latency_{name}": s for name, s in latencies.get(metric, {}).items()},
            }
            # A replica that did not respond is counted from its last response.
            self._clocks[metric] = before | now
        return metrics

    def close(self) -> None:
        """Delete the applications."""
        delete(list(self.link.applications.values()))

    def _window(self, metric: str) -> int:
        """Return the number of concurrent requests: enough to fill the replicas, and one more each for autoscaling."""
        pool = self._pools[metric]
        replicas = max(pool.bounds[1], self.client.replicas(metric))
        return min((pool.max_ongoing_requests + 1) * replicas, pool.max_queued_requests, _MOST_THREADS)
