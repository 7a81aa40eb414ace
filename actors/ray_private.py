"""Every private or generated Ray name that this project uses, behind plain functions; tested with Ray 2.60.

No other module imports such names, so a new version of Ray is checked only here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import _raylet
from ray._private import state, utils
from ray._private.node import Node
from ray._private.runtime_env.packaging import _get_excludes, get_excludes_from_ignore_files
from ray._private.services import canonicalize_bootstrap_address
from ray.experimental import internal_kv
from ray.serve import context
from ray.serve._private.config import DeploymentConfig
from ray.serve._private.router import SharedRouterLongPollClient
from ray.serve.generated import serve_pb2

# Names of generated and compiled modules, which a type checker does not see.
_pb: Any = serve_pb2
_native: Any = _raylet


def forget_cluster() -> None:
    """Drop Ray Serve's caches about the cluster of this process; call it when the process leaves the cluster.

    Serve recognises a controller of an earlier cluster by the job id, and the first job of every new cluster has the
    same id. A process that starts its own Ray twice would send its requests to the former controller.
    """
    context._set_global_client(None)
    SharedRouterLongPollClient.get_or_create.cache_clear()  # pyright: ignore[reportFunctionMemberAccess]


def end_serve_handles() -> None:
    """Stop the routers of all Serve handles of this process, which would otherwise continue to poll the controller."""
    if context._cached_client_from_current_session():
        client: Any = context._global_client
        client.shutdown_cached_handles()


def control_address(address: str) -> str | None:
    """Return HOST:PORT of the control service at an address such as `auto`; None for a cluster not yet started."""
    return canonicalize_bootstrap_address(address)


@contextmanager
def agents_not_awaited(port: int) -> Iterator[None]:
    """Let a cluster that is started in the block accept work before the two agents of its node have started.

    Ray's node process aborts if its agents have not written their ports within 15 s, a fixed time
    (https://github.com/ray-project/ray/issues/65983), and their imports take longer on a busy machine. It waits only
    for ports that it does not know: the block states the port of the agent of runtime environments, and that the agent
    of metrics and dashboard serves none, as an installation of Ray without the extra `default` does.

    Args:
        port: unused port of this machine.
    """
    start = Node.start_raylet
    unserved = (
        _native.METRICS_AGENT_PORT_NAME, _native.METRICS_EXPORT_PORT_NAME, _native.DASHBOARD_AGENT_LISTEN_PORT_NAME
    )  # fmt: skip

    def announced(self: Node, *args: Any, **options: Any) -> None:
        for name in unserved:
            _native.persist_port(self.get_session_dir_path(), self.node_id, name, -1)
        self._ray_params.runtime_env_agent_port = port
        start(self, *args, **options)

    Node.start_raylet = announced
    try:
        yield
    finally:
        Node.start_raylet = start


def object_store_bytes() -> int:
    """Return the size in bytes of the object store of a cluster started on this machine."""
    return utils.resolve_object_store_memory(utils.estimate_available_memory())


def ended_jobs() -> set[str]:
    """Return ids (hexadecimal) of the jobs, submitted or interactive, whose driver process has ended."""
    return {job["JobID"] for job in state.jobs() if job["IsDead"]}


def read_key(key: str) -> str | None:
    """Return the value of a key of the cluster's key-value store, or None."""
    found = internal_kv._internal_kv_get(key.encode())
    return found.decode() if found else None


def write_key(key: str, value: str, *, overwrite: bool = True) -> None:
    """Set a key of the cluster's key-value store.

    Args:
        key: the key.
        value: the new value.
        overwrite: False keeps an existing value.
    """
    internal_kv._internal_kv_put(key.encode(), value.encode(), overwrite=overwrite)


def delete_key(key: str) -> None:
    """Delete a key of the cluster's key-value store, if it exists."""
    internal_kv._internal_kv_del(key.encode())


def is_uploaded(file: Path, folder: Path, excludes: list[str]) -> bool:
    """Return whether Ray uploads a file or folder with a working directory.

    Args:
        file: absolute path within `folder`.
        folder: the working directory.
        excludes: patterns in the syntax of .gitignore, in addition to those of .gitignore and .rayignore files.
    """
    # Ray applies ignore files from the top of the tree downwards.
    ways = [*(folder / part for part in reversed(file.relative_to(folder).parents)), file]
    filters: list[Callable[[Path], bool]] = [_get_excludes(folder, excludes)]
    for way in ways:
        filters += get_excludes_from_ignore_files(way, include_gitignore=True)
        if any(excluded(way) for excluded in filters):
            return False
    return True


def replica_bounds(application: str, deployment: str) -> tuple[int, int]:
    """Return the configured smallest and largest number of replicas of a Serve deployment."""
    config = _deployed(application, deployment).deployment_config
    if config.HasField("autoscaling_config"):
        return config.autoscaling_config.min_replicas, config.autoscaling_config.max_replicas
    return config.num_replicas, config.num_replicas


def replica_resources(application: str, deployment: str) -> str:
    """Return Ray options of one replica of a Serve deployment (CPUs, GPUs), as JSON."""
    return _deployed(application, deployment).replica_config.ray_actor_options.decode()


def reconfigure(application: str, deployment: str, change: Callable[[Any], None], *, timeout_s: float) -> None:
    """Change the configuration of a running Serve deployment without restarting its replicas.

    Serve has public calls for this only where the application is described in a file; `serve.run` would need the
    driver's objects, and start every replica afresh.

    Args:
        change: modifies Serve's `DeploymentConfig` in place.

    Raises:
        RayError: the controller is gone, or does not respond within `timeout_s`.
    """
    info = _deployed(application, deployment)
    config = DeploymentConfig.from_proto(info.deployment_config)
    change(config)
    proto: Any = config.to_proto()
    # The same code version: replicas that stay are not restarted.
    proto.version = info.version
    arguments = _pb.DeploymentArgs(
        deployment_name=deployment, deployment_config=proto.SerializeToString(), ingress=True,
        replica_config=info.replica_config.SerializeToString(), deployer_job_id=ray.get_runtime_context().get_job_id(),
    )  # fmt: skip
    deployed = _controller().deploy_application.remote(
        application, [arguments.SerializeToString()], _pb.ApplicationArgs().SerializeToString()
    )
    ray.get(deployed, timeout=timeout_s)


def _deployed(application: str, deployment: str, timeout_s: float = 60.0) -> Any:
    """Return Serve's own record of a deployment."""
    record: Any = ray.get(_controller().get_deployment_info.remote(deployment, application), timeout=timeout_s)
    return _pb.DeploymentRoute.FromString(record).deployment_info


def _controller() -> Any:
    client = context._get_global_client()
    assert client is not None, "called only while Serve runs"
    return client._controller
