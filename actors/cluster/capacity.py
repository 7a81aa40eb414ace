"""A live cluster held against what a run needs, before anything is started: what `acpo plan --address` reports."""

from collections.abc import Sequence
from typing import Any

import ray

from acpo_dist.config.schema import Config
from actors.cluster.connect import joined
from actors.placement import NodeOffer, PlacementPlan, lacking, node_offers, plan_placement, shortfall


def survey(config: Config, address: str) -> dict[str, Any]:
    """Machines of a running cluster, what is free there, and whether the run could start; nothing is started.

    Args:
        address: Ray's own, such as `auto` on a machine of the cluster or HOST:6379; not that of the job service.

    Raises:
        UsageError: the cluster cannot be joined.
    """
    with joined(address):
        return compare(plan_placement(config), node_offers(), dict(ray.available_resources()))


def compare(plan: PlacementPlan, nodes: Sequence[NodeOffer], free: dict[str, float]) -> dict[str, Any]:
    """What `survey` says, as plain data.

    Args:
        free: what no other run holds.
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
