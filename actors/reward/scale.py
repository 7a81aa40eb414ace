"""Status of the reward pools of live runs, and changes of their number of replicas."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve

from acpo_dist.config.pool import MetricPoolConfig
from acpo_dist.core.errors import UsageError, WorkerError
from acpo_dist.core.registry import nearest
from actors.cluster.control import CONTROL_TIMEOUT_S, bounded
from actors.ray_private import reconfigure, replica_bounds, replica_resources
from actors.reward.liveness import REPLICA, replica_vitals, running_replicas, serve_status
from actors.reward.pool import autoscaling

_APPLICATION = re.compile(r"(?P<run>acpo-[0-9a-f]{8})-(?P<metric>.+)")


@dataclass(frozen=True, kw_only=True)
class LivePool:
    """The application of one metric of a run."""

    run: str
    metric: str
    application: str


def live_pools(run: str | None = None) -> list[LivePool]:
    """Return reward applications on the connected cluster, of one run or of all."""
    matches = [(name, _APPLICATION.fullmatch(name)) for name in serve_status().applications]
    pools = [LivePool(run=match["run"], metric=match["metric"], application=name) for name, match in matches if match]
    return [pool for pool in pools if run in (None, pool.run)]


def find_pool(metric: str, run: str | None = None) -> LivePool:
    """Return the application of a metric.

    Raises:
        UsageError: there is none, or several runs have one and `run` is None.
    """
    pools = live_pools(run)
    found = [pool for pool in pools if pool.metric == metric]
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(f"{len(found)} live runs have `{metric}`: select one with --run {_any(p.run for p in found)}.")
    runs, metrics = sorted({pool.run for pool in live_pools()}), sorted({pool.metric for pool in pools})
    if run is not None and not pools:
        raise UsageError(f"no live run has the name `{run}`.{nearest(run, runs)} Live: {', '.join(runs) or 'none'}.")
    if not pools:
        raise UsageError(
            "no run has a reward pool on this cluster: check that the run is live and that --address is its cluster."
        )
    known = ", ".join(metrics)
    raise UsageError(f"no live reward or judge has the name `{metric}`.{nearest(metric, metrics)} Live: {known}.")


def pool_status(pool: LivePool) -> dict[str, Any]:
    """Return the state of an application and of its replicas, as plain data."""
    deployment = serve_status().applications[pool.application].deployments.get(REPLICA)
    fewest, most = bounded(lambda: replica_bounds(pool.application, REPLICA), what=f"bounds of {pool.metric}")
    vitals = replica_vitals(serve.get_deployment_handle(REPLICA, pool.application))
    return {
        "run": pool.run, "metric": pool.metric, "application": pool.application,
        "status": deployment.status.value if deployment else "UNKNOWN",
        "message": deployment.message if deployment else "",
        "min_replicas": fewest, "max_replicas": most,
        "states": {str(state): count for state, count in deployment.replica_states.items()} if deployment else {},
        "queue": sum(one["queue"] for one in vitals),
        "replicas": [
            {
                "replica": one["replica"].rsplit("#", 1)[-1], "pid": one["pid"], "queue": one["queue"],
                "requests": one["requests"], "images": one["images"],
                "batch": one["images"] / one["batches"] if one["batches"] else None,
                "utilisation": one["busy_s"] / one["up_s"] if one["up_s"] else None, "up_s": one["up_s"],
                "known_score": one["known_score"], "sick": one["sick"],
            }
            for one in vitals
        ],
    }  # fmt: skip


def scale(
    pool: LivePool, fewest: int, most: int, *, timeout_s: float, waiting: Callable[[int], None] = lambda running: None
) -> int:
    """Set the number of replicas, or its bounds, and wait until it is reached. Other replicas are not restarted.

    A removed replica finishes its requests; callers repeat requests that it cannot finish in time.

    Args:
        pool: from `find_pool`.
        fewest: smallest number of replicas.
        most: largest number; equal to `fewest` for a fixed number.
        timeout_s: seconds to wait.
        waiting: called with the number of running replicas during the wait.

    Returns:
        Number of running replicas.

    Raises:
        WorkerError: not reached within `timeout_s`; the cluster continues to try.
    """
    application = pool.application

    def change() -> None:
        reconfigure(application, REPLICA, lambda config: _set_bounds(config, fewest, most), timeout_s=CONTROL_TIMEOUT_S)

    bounded(change, what=f"scale {pool.metric}")
    deadline = time.monotonic() + timeout_s
    while True:
        running = running_replicas(pool.application)
        if fewest <= running <= most:
            return running
        if time.monotonic() >= deadline:
            needs = bounded(lambda: replica_resources(application, REPLICA), what="resources of a replica")
            free = ray.available_resources()
            raise WorkerError(
                f"`{pool.metric}` has {running} replicas after {timeout_s:g} s, expected {fewest} to {most}; a "
                f"replica needs {needs}, free are {free.get('CPU', 0):g} CPU and {free.get('GPU', 0):g} GPU. The "
                "cluster continues to try: add machines, wait, or scale down."
            )
        waiting(running)
        # Serve has no call that blocks until a replica is ready.
        time.sleep(0.2)


def _set_bounds(config: Any, fewest: int, most: int) -> None:
    """Write a number of replicas, or its bounds, into Serve's configuration of a deployment."""
    if fewest == most:
        config.autoscaling_config = None
        config.num_replicas = most
        return
    old = config.autoscaling_config
    bounds = {"min_replicas": fewest, "max_replicas": most, "initial_replicas": None}
    config.autoscaling_config = old.model_copy(update=bounds) if old else autoscaling(fewest, most, MetricPoolConfig())


def _any(names: Any) -> str:
    return "|".join(sorted(names))
