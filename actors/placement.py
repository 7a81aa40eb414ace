"""Who needs what: a pure plan, and a bounded, logged wait until the cluster has it."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

import ray
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from acpo_dist.config.schema import Config
from acpo_dist.core.errors import PlacementError

logger = logging.getLogger(__name__)

_LOG_EVERY_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Role:
    """Workers of one kind."""

    name: str
    count: int
    cpus: float
    gpus: float
    strategy: str
    """PACK keeps a gang together, SPREAD survives the loss of a node."""
    count_key: str
    """Configuration key that sets the count."""

    def bundle(self) -> dict[str, float]:
        """Resources of one worker."""
        return {name: amount for name, amount in (("CPU", self.cpus), ("GPU", self.gpus)) if amount > 0}


@dataclass(frozen=True, kw_only=True)
class PlacementPlan:
    """All roles of a run."""

    roles: tuple[Role, ...]

    def total(self) -> dict[str, float]:
        """Resources that the whole run needs."""
        return {
            "CPU": sum(role.count * role.cpus for role in self.roles),
            "GPU": sum(role.count * role.gpus for role in self.roles),
        }

    def role(self, name: str) -> Role:
        """A role by name."""
        return next(role for role in self.roles if role.name == name)


def plan_placement(config: Config) -> PlacementPlan:
    """The plan of a configuration; nothing is asked of a cluster."""
    learner, rollout, rewards = config.learner, config.rollout, config.rewards
    metrics = len(rewards.train) + len(rewards.judges)
    return PlacementPlan(
        roles=(
            Role(name="learner", count=learner.num_ranks, cpus=learner.cpus_per_rank, gpus=learner.gpus_per_rank,
                 strategy="PACK", count_key="learner.num_ranks"),
            Role(name="rollout", count=rollout.num_workers, cpus=rollout.cpus_per_worker, gpus=rollout.gpus_per_worker,
                 strategy="SPREAD", count_key="rollout.num_workers"),
            Role(name="reward", count=metrics * rewards.replicas, cpus=rewards.cpus_per_replica,
                 gpus=rewards.gpus_per_replica, strategy="SPREAD", count_key="rewards.replicas"),
        )
    )  # fmt: skip


def shortfall(plan: PlacementPlan, available: Mapping[str, float]) -> dict[str, float]:
    """What is missing: resource -> amount."""
    missing = {name: need - available.get(name, 0.0) for name, need in plan.total().items()}
    return {name: amount for name, amount in missing.items() if amount > 1e-9}


def await_resources(plan: PlacementPlan, *, timeout_s: float) -> None:
    """Wait until the cluster has registered what the plan needs.

    Raises:
        PlacementError: after `timeout_s`, with what is needed, registered and missing, and which key to lower.
    """
    deadline = time.monotonic() + timeout_s
    next_log = time.monotonic()
    while True:
        registered = ray.cluster_resources()
        missing = shortfall(plan, registered)
        if not missing:
            return
        now = time.monotonic()
        if now >= deadline:
            raise PlacementError(_explain(plan, registered, timeout_s))
        if now >= next_log:
            logger.warning("waiting for %s; the cluster has %s", missing, _amounts(registered))
            next_log = now + _LOG_EVERY_S
        # Nodes register with the cluster's control service; there is nothing to block on but time.
        time.sleep(min(0.5, max(0.0, deadline - now)))


def place(role: Role, *, timeout_s: float) -> PlacementGroup:
    """Reserve one bundle per worker of a role.

    Raises:
        PlacementError: not placed in time, though registered: other runs hold the resources, or no node is big enough.
    """
    bundle = role.bundle() or {"CPU": 0.001}
    group = placement_group([bundle] * role.count, strategy=role.strategy)
    try:
        ray.get(group.ready(), timeout=timeout_s)
    except GetTimeoutError as error:
        remove_placement_group(group)
        raise PlacementError(
            f"{role.count} x {bundle} for `{role.name}` could not be reserved within {timeout_s:g} s; free now: "
            f"{_amounts(ray.available_resources())}. Lower {role.count_key}, or wait for other runs to end."
        ) from error
    return group


def _explain(plan: PlacementPlan, registered: Mapping[str, float], timeout_s: float) -> str:
    needs = "; ".join(f"{role.name} {role.count} x {role.bundle()} ({role.count_key})" for role in plan.roles)
    return (
        f"the run needs {_amounts(plan.total())}, but after {timeout_s:g} s the cluster has registered "
        f"{_amounts(registered)} (missing {_amounts(shortfall(plan, registered))}). Needed: {needs}. Lower a count, "
        "give workers smaller shares (…cpus_per_…, …gpus_per_…), or add nodes."
    )


def _amounts(resources: Mapping[str, float]) -> str:
    shown = {name: resources[name] for name in ("CPU", "GPU") if resources.get(name)}
    return ", ".join(f"{amount:g} {name}" for name, amount in shown.items()) or "nothing"
