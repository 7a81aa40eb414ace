"""Backend and ports of a run."""

import os
import sys

from acpo_dist.config.relations import module_available
from acpo_dist.config.schema import Config
from acpo_dist.core.errors import ConfigError
from acpo_dist.training.run import OpenPorts


def choose_backend(config: Config) -> str:
    """Return `local` or `ray`; `auto` uses Ray if the configuration needs several processes.

    Raises:
        ConfigError: Ray is needed but not installed.
    """
    wanted = config.cluster.backend
    if wanted == "auto":
        from acpo_dist.preflight.plan.sharing import one_process

        wanted = "local" if one_process(config) else "ray"
    if wanted == "local" and config.rewards.http.enabled:
        raise ConfigError("rewards.http.enabled needs Ray: set cluster.backend=ray, or rewards.http.enabled=false.")
    ranks = config.learner.num_ranks
    if wanted == "local" and ranks > 1 and launched_processes() == 1:
        raise ConfigError(
            f"learner.num_ranks is {ranks}, and this is one process: start `accelerate launch --num_processes {ranks} "
            "-m acpo_dist train ...`, or set learner.num_ranks=1, or use --backend ray with learner.zero_stage."
        )
    if wanted == "ray" and not module_available("ray"):
        raise ConfigError("the run needs Ray, which is not installed: pip install 'acpo-dist[ray,zero]'")
    if wanted == "ray" and config.learner.zero_stage is not None and not module_available("deepspeed"):
        raise ConfigError("learner.zero_stage is set, but DeepSpeed is not installed: pip install 'acpo-dist[zero]'")
    return wanted


def launched_processes() -> int:
    """Return the number of processes that `accelerate launch` or torchrun started with `-m acpo_dist`; otherwise 1.

    The variables alone do not count: `acpo` may be started inside a job of another launcher.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    launched = spec is not None and spec.name == "acpo_dist.__main__" and "LOCAL_RANK" in os.environ
    return int(os.environ.get("WORLD_SIZE", "1")) if launched else 1


def ports_for(backend: str) -> OpenPorts:
    """Return the function that opens the ports of a backend."""
    if backend == "local":
        from acpo_dist.training import launched, local

        return launched.open_ports if launched_processes() > 1 else local.open_ports
    from actors.launch import open_ports as open_ray_ports

    return open_ray_ports
