"""Look at the reward pools of live runs, and change the number of their replicas while requests go on."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.serve.context import _get_global_client

from acpo_dist.config.pool import MetricPoolConfig
from acpo_dist.core.errors import UsageError, WorkerError
from acpo_dist.core.registry import nearest
from actors.reward.liveness import REPLICA, replica_vitals, running_replicas
from actors.reward.pool import autoscaling

_APPLICATION = re.compile(r"(?P<run>acpo-[0-9a-f]{8})-(?P<metric>.+)")


@dataclass(frozen=True, kw_only=True)
class LivePool:
    """The application of one metric of a run."""

    run: str
    metric: str
    application: str


def live_pools(run: str | None = None) -> list[LivePool]:
    """Reward applications on the cluster that this process is connected to, of one run or of all."""
    matches = [(name, _APPLICATION.fullmatch(name)) for name in serve.status().applications]
    pools = [LivePool(run=match["run"], metric=match["metric"], application=name) for name, match in matches if match]
    return [pool for pool in pools if run in (None, pool.run)]


def find_pool(metric: str, run: str | None = None) -> LivePool:
    """The application of a metric.

    Raises:
        UsageError: there is none, or several runs have one and none is named.
    """
    pools = live_pools(run)
    found = [pool for pool in pools if pool.metric == metric]
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(f"{len(found)} live runs have `{metric}`: name one with --run {_any(p.run for p in found)}.")
    runs, metrics = sorted({pool.run for pool in live_pools()}), sorted({pool.metric for pool in pools})
    if run is not None and not pools:
        raise UsageError(f"no live run is called `{run}`.{nearest(run, runs)} Live: {', '.join(runs) or 'none'}.")
    if not pools:
        raise UsageError("no run has a reward pool on this cluster: is it live, and is --address its cluster?")
    known = ", ".join(metrics)
    raise UsageError(f"no live reward or judge is called `{metric}`.{nearest(metric, metrics)} Live: {known}.")


def pool_status(pool: LivePool) -> dict[str, Any]:
    """State of an application, and what its replicas say of themselves."""
    deployment = serve.status().applications[pool.application].deployments.get(REPLICA)
    fewest, most = _bounds(_deployed(pool.application)[0].deployment_config)
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
    """Set the number of replicas, or its bounds, and wait until it holds. Replicas that stay are not restarted.

    A replica that goes finishes what it has begun; what it cannot finish in time is asked again by its caller.

    Args:
        waiting: called with the number of running replicas, from time to time.

    Returns:
        Replicas that run now.

    Raises:
        WorkerError: not reached within `timeout_s`; the cluster keeps trying.
    """
    _redeploy(pool.application, fewest, most)
    deadline = time.monotonic() + timeout_s
    while True:
        running = running_replicas(pool.application)
        if fewest <= running <= most:
            return running
        if time.monotonic() >= deadline:
            needs, free = _deployed(pool.application)[0].replica_config, ray.available_resources()
            raise WorkerError(
                f"`{pool.metric}` has {running} replicas after {timeout_s:g} s, {fewest} to {most} were asked for; a "
                f"replica needs {needs.ray_actor_options.decode()}, free are {free.get('CPU', 0):g} CPU and "
                f"{free.get('GPU', 0):g} GPU. The cluster goes on trying: add nodes, wait, or scale down again."
            )
        waiting(running)
        # Serve tells nobody when a replica is ready; there is nothing to block on but time.
        time.sleep(0.2)


def _redeploy(application: str, fewest: int, most: int) -> None:
    """Give Serve the application again as it is, code version included, with another number of replicas.

    Serve has public calls for this only where the application is described in a file; `serve.run` would need the
    driver's objects, and start every replica afresh.
    """
    from ray.serve._private.config import DeploymentConfig
    from ray.serve.generated import serve_pb2

    info, controller = _deployed(application)
    config = DeploymentConfig.from_proto(info.deployment_config)
    if fewest == most:
        config.autoscaling_config = None
        config.num_replicas = most
    else:
        old = config.autoscaling_config
        config.autoscaling_config = (
            old.model_copy(update={"min_replicas": fewest, "max_replicas": most, "initial_replicas": None})
            if old
            else autoscaling(fewest, most, MetricPoolConfig())
        )
    proto = config.to_proto()
    proto.version = info.version
    arguments = _message(serve_pb2, "DeploymentArgs")(
        deployment_name=REPLICA, deployment_config=proto.SerializeToString(), ingress=True,
        replica_config=info.replica_config.SerializeToString(), deployer_job_id=ray.get_runtime_context().get_job_id(),
    )  # fmt: skip
    ray.get(
        controller.deploy_application.remote(
            application, [arguments.SerializeToString()], _message(serve_pb2, "ApplicationArgs")().SerializeToString()
        )
    )


def _deployed(application: str) -> tuple[Any, Any]:
    """Serve's own record of an application's deployment, and its controller."""
    from ray.serve.generated import serve_pb2

    client = _get_global_client()
    assert client is not None, "asked only while Serve runs"
    controller = client._controller
    record = ray.get(controller.get_deployment_info.remote(REPLICA, application))
    return _message(serve_pb2, "DeploymentRoute").FromString(record).deployment_info, controller


def _message(module: Any, name: str) -> Any:
    """A class of a generated protobuf module, which no type checker can see into."""
    return getattr(module, name)


def _bounds(proto: Any) -> tuple[int, int]:
    if proto.HasField("autoscaling_config"):
        return proto.autoscaling_config.min_replicas, proto.autoscaling_config.max_replicas
    return proto.num_replicas, proto.num_replicas


def _any(names: Any) -> str:
    return "|".join(sorted(names))
