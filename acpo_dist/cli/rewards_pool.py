"""`acpo rewards status` and `acpo rewards scale`: the reward pool of a live run."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from acpo_dist.cli.app import answer
from acpo_dist.cli.rewards import rewards_app

Address = Annotated[str | None, typer.Option(help="Ray cluster; by default RAY_ADDRESS, else the one on this machine.")]
Run = Annotated[str | None, typer.Option(help="Run id, if several are live; `acpo rewards status` lists them.")]


@rewards_app.command("status")
def status(
    address: Address = None,
    run: Run = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object: applications and replicas.")] = False,
) -> None:
    """Reward pools of live runs: replicas, queues, batches, utilisation."""
    import rich.console

    from acpo_dist.tracking.console import Console

    with _cluster(address):
        from actors.reward.scale import live_pools, pool_status

        pools = [pool_status(pool) for pool in live_pools(run)]
    if as_json:
        answer({"pools": pools})
        return
    console = Console(rich_console=rich.console.Console(file=sys.stdout))
    if not pools:
        console.message("no run has a reward pool on this cluster")
        return
    console.table(
        "reward pools",
        ["run", "metric", "status", "replicas", "wanted", "queue"],
        [
            [pool["run"], pool["metric"], pool["status"], pool["states"].get("RUNNING", 0), _bounds(pool),
             pool["queue"]]
            for pool in pools
        ],
    )  # fmt: skip
    console.table(
        "replicas",
        ["metric", "replica", "pid", "up s", "requests", "images", "batch", "busy", "queue"],
        [
            [pool["metric"], one["replica"], one["pid"], f"{one['up_s']:.0f}", one["requests"], one["images"],
             _number(one["batch"], "{:.1f}"), _number(one["utilisation"], "{:.0%}"), one["queue"]]
            for pool in pools for one in pool["replicas"]
        ],
    )  # fmt: skip


@rewards_app.command("scale")
def scale(
    metric: Annotated[str, typer.Argument(help="Name of the reward or judge.")],
    replicas: Annotated[
        str, typer.Argument(metavar="N|MIN:MAX", help="Number of replicas, or bounds for autoscaling.")
    ],
    address: Address = None,
    run: Run = None,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds to wait until the number is reached.")] = 120.0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object at the end.")] = False,
) -> None:
    """Change the number of replicas of a live run; requests are kept, and remaining replicas are not restarted."""
    from acpo_dist.tracking.console import Console

    fewest, most = _parse(replicas)
    with _cluster(address):
        from actors.reward.scale import find_pool
        from actors.reward.scale import scale as set_replicas

        pool = find_pool(metric, run)
        running = set_replicas(pool, fewest, most, timeout_s=timeout)
    if as_json:
        answer({"run": pool.run, "metric": metric, "min_replicas": fewest, "max_replicas": most, "running": running})
        return
    wanted = f"{fewest}" if fewest == most else f"{fewest} to {most}, by load"
    Console().message(f"{metric} of {pool.run}: {running} replicas running ({wanted})")


def _parse(text: str) -> tuple[int, int]:
    from acpo_dist.core.errors import UsageError

    parts = text.split(":")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"expected a number of replicas such as 3, or bounds such as 1:4, found `{text}`")
    fewest, most = int(parts[0]), int(parts[-1])
    if fewest > most:
        raise UsageError(f"the lower bound {fewest} is above the upper bound {most}")
    return fewest, most


@contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """Join a running cluster.

    Raises:
        UsageError: Ray is not installed, or the cluster cannot be joined.
    """
    from acpo_dist.config.relations import module_available
    from acpo_dist.core.errors import UsageError

    if not module_available("ray"):
        raise UsageError("reward pools run on Ray, which is not installed: pip install 'acpo-dist[ray]'")
    from actors.cluster.connect import joined

    with joined(address or "auto"):
        yield


def _bounds(pool: dict[str, Any]) -> str:
    fewest, most = pool["min_replicas"], pool["max_replicas"]
    return f"{fewest}" if fewest == most else f"{fewest} to {most}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
