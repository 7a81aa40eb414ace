"""Compare the resources of a live cluster with those a run needs, before anything is started."""

from collections.abc import Sequence
from typing import Any

import ray

from acpo_dist.config.schema import Config
from actors.cluster.connect import joined
from actors.cluster.control import bounded
from actors.placement import NodeOffer, PlacementPlan, lacking, node_offers, plan_placement, shortfall


def cluster_capacity(config: Config, address: str) -> dict[str, Any]:
    """Return the machines of a running cluster, their free resources, and what a run lacks there.

    Args:
        config: configuration of the run.
        address: address of the cluster's control service, such as `auto` on one of its machines, or HOST:6379.

    Returns:
        Result of `compare`.

    Raises:
        UsageError: the cluster cannot be joined.
        WorkerLostError: the cluster does not respond.
    """
    with joined(address):
        nodes = bounded(node_offers, what="list machines")
        free = bounded(ray.available_resources, what="free resources")
        return compare(plan_placement(config), nodes, dict(free))


def compare(plan: PlacementPlan, nodes: Sequence[NodeOffer], free: dict[str, float]) -> dict[str, Any]:
    """Return needed, available and missing resources as plain data.

    Args:
        plan: roles of the run.
        nodes: machines of the cluster.
        free: resources that no other run holds.

    Returns:
        `machines`, `needed`, `missing` (from all machines), `missing_by_role`, `missing_now` (from free resources).
    """
    there: dict[str, float] = {}
    for node in nodes:
        for name, amount in node.resources.items():
            there[name] = there.get(name, 0.0) + amount
    return {
        "machines": [
            {"address": node.address, "cpus": node.resources.get("CPU", 0.0), "gpus": node.resources.get("GPU", 0.0),
             "labels": {name: value for name, value in node.labels.items() if not name.startswith("ray.io/")}}
            for node in nodes
        ],
        "needed": plan.needed(),
        "missing": shortfall(plan, there),
        "missing_by_role": [text for role in plan.roles if (text := lacking(role, nodes))],
        "missing_now": shortfall(plan, free),
    }  # fmt: skip
