"""Resources of every role, and a bounded, logged wait until the cluster can place them."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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
    """PACK keeps a gang on few nodes, SPREAD survives the loss of a node."""
    count_key: str
    """Configuration key that sets the count."""
    least: int | None = None
    """Workers with which the run starts; None means all."""
    resources: Mapping[str, float] = field(default_factory=dict)
    """Custom resources of one worker."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Labels that the machine must have."""

    @property
    def needed(self) -> int:
        """Workers that must be placed at the start."""
        return self.count if self.least is None else min(self.count, self.least)

    def bundle(self) -> dict[str, float]:
        """Resources of one worker."""
        own = {"CPU": self.cpus, "GPU": self.gpus} | dict(self.resources)
        return {name: amount for name, amount in own.items() if amount > 0}


@dataclass(frozen=True, kw_only=True)
class PlacementPlan:
    """All roles of a run."""

    roles: tuple[Role, ...]

    def total(self) -> dict[str, float]:
        """Resources of the whole run."""
        return self._sum({role.name: role.count for role in self.roles})

    def needed(self) -> dict[str, float]:
        """Resources that the run needs to start."""
        return self._sum({role.name: role.needed for role in self.roles})

    def _sum(self, counts: Mapping[str, int]) -> dict[str, float]:
        total = {"CPU": 0.0, "GPU": 0.0}
        for role in self.roles:
            for name, amount in role.bundle().items():
                total[name] = total.get(name, 0.0) + counts[role.name] * amount
        return total

    def role(self, name: str) -> Role:
        """Return a role by name."""
        return next(role for role in self.roles if role.name == name)


def plan_placement(config: Config) -> PlacementPlan:
    """Return the roles of a configuration; no cluster is needed."""
    learner, rollout, rewards = config.learner, config.rollout, config.rewards
    roles = config.cluster.roles
    pools = {entry.name: rewards.pool_of(entry.name) for entry in (*rewards.train, *rewards.judges)}
    return PlacementPlan(
        roles=(
            Role(name="learner", count=learner.num_ranks, cpus=learner.cpus_per_rank, gpus=learner.gpus_per_rank,
                 strategy=roles.learner.strategy, count_key="learner.num_ranks",
                 resources=roles.learner.resources, labels=roles.learner.labels),
            Role(name="rollout", count=rollout.num_workers, cpus=rollout.cpus_per_worker, gpus=rollout.gpus_per_worker,
                 strategy="SPREAD", count_key="rollout.num_workers", least=roles.rollout.min_workers,
                 resources=roles.rollout.resources, labels=roles.rollout.labels),
            *(Role(name=f"reward/{name}", count=pool.bounds[0], cpus=pool.cpus or 0.0, gpus=pool.gpus or 0.0,
                   strategy="SPREAD", count_key=f"rewards.pool.{name}" if name in rewards.pool else "rewards.replicas",
                   resources=roles.reward.resources, labels=roles.reward.labels)
              for name, pool in pools.items()),
        )
    )  # fmt: skip


def shortfall(plan: PlacementPlan, available: Mapping[str, float]) -> dict[str, float]:
    """Return the resources that are missing for a start: name -> amount."""
    missing = {name: need - available.get(name, 0.0) for name, need in plan.needed().items()}
    return {name: amount for name, amount in missing.items() if amount > 1e-9}


def await_resources(plan: PlacementPlan, *, timeout_s: float) -> None:
    """Wait until the cluster can place what the run needs to start; its autoscaler receives the request.

    Raises:
        PlacementError: after `timeout_s`; names needed, available and missing resources, and the keys to lower.
    """
    bundles = [role.bundle() or {"CPU": 0.001} for role in plan.roles for _ in range(role.needed)]
    labels = [dict(role.labels) for role in plan.roles for _ in range(role.needed)]
    # One reservation for all roles, so that two runs which start together do not each hold half of their needs.
    reservation = placement_group(bundles, strategy="PACK", bundle_label_selector=labels)
    started = logged = time.monotonic()
    try:
        while not reservation.wait(min(1.0, timeout_s)):
            now = time.monotonic()
            if now - started >= timeout_s:
                raise PlacementError(explain(plan, node_offers(), waited_s=timeout_s))
            if now - logged >= _LOG_EVERY_S:
                logger.warning("waiting for resources: %s", explain(plan, node_offers(), waited_s=now - started))
                logged = now
    finally:
        remove_placement_group(reservation)


def place(role: Role, *, timeout_s: float) -> PlacementGroup:
    """Reserve one bundle per worker of a role.

    Raises:
        PlacementError: not placed in time: other runs hold the resources, or no machine is large enough.
    """
    bundle = role.bundle() or {"CPU": 0.001}
    group = placement_group(
        [bundle] * role.count, strategy=role.strategy, bundle_label_selector=[dict(role.labels)] * role.count
    )
    try:
        ray.get(group.ready(), timeout=timeout_s)
    except GetTimeoutError as error:
        remove_placement_group(group)
        raise PlacementError(
            f"{role.count} x {bundle} for `{role.name}` could not be reserved within {timeout_s:g} s; free now: "
            f"{_amounts(ray.available_resources())}. Lower {role.count_key}, or wait for other runs to end."
        ) from error
    return group


@dataclass(frozen=True, kw_only=True)
class NodeOffer:
    """Resources and labels of one machine."""

    address: str
    resources: Mapping[str, float]
    labels: Mapping[str, str]


def node_offers() -> list[NodeOffer]:
    """Return the live machines of the connected cluster."""
    return [
        NodeOffer(address=node["NodeManagerAddress"], resources=node["Resources"], labels=node.get("Labels", {}))
        for node in ray.nodes() if node["Alive"]
    ]  # fmt: skip


def matches(labels: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Return whether labels satisfy one of Ray's label selectors."""
    return all(_accepts(labels.get(name), condition) for name, condition in wanted.items())


def explain(plan: PlacementPlan, nodes: Sequence[NodeOffer], *, waited_s: float) -> str:
    """Return a message with needed, available and missing resources, by role if roles select machines by label."""
    there: dict[str, float] = {}
    for node in nodes:
        for name, amount in node.resources.items():
            there[name] = there.get(name, 0.0) + amount
    missing = shortfall(plan, there)
    needs = "; ".join(
        f"{role.name} {role.needed} x {role.bundle()}{f' on {dict(role.labels)}' if role.labels else ''} "
        f"({role.count_key})" for role in plan.roles
    )  # fmt: skip
    short = [text for role in plan.roles if (text := lacking(role, nodes))]
    if missing:
        reason = f"missing {_amounts(missing)}"
    elif short:
        reason = "missing " + "; ".join(short)
    else:
        free = _amounts(ray.available_resources())
        reason = f"other runs hold the rest, or no machine is large enough; free now: {free}"
    return (
        f"the run needs {_amounts(plan.needed())}, but after {waited_s:.0f} s the {len(nodes)} machines of the cluster "
        f"have {_amounts(there)} ({reason}). Needed: {needs}. Lower a count, give workers smaller shares (…cpus_per_…, "
        "…gpus_per_…), add machines, or wait longer (cluster.place_timeout_s)."
    )


def lacking(role: Role, nodes: Sequence[NodeOffer]) -> str:
    """Return what the machines allowed for a role lack for it; empty if nothing is missing."""
    allowed = [node for node in nodes if matches(node.labels, role.labels)]
    if not allowed:
        return f"a machine with the labels {dict(role.labels)} for {role.name} (cluster.roles)"
    fit = sum(
        min((int(node.resources.get(name, 0.0) / amount + 1e-9) for name, amount in role.bundle().items()),
            default=role.needed)
        for node in allowed
    )  # fmt: skip
    return "" if fit >= role.needed else f"room for {role.needed - fit} of {role.name} on {len(allowed)} machines"


def _accepts(value: str | None, condition: str) -> bool:
    negated, text = condition.startswith("!"), condition.removeprefix("!")
    found = value in (
        [one.strip() for one in text[3:-1].split(",")] if text.startswith("in(") and text.endswith(")") else [text]
    )
    return found != negated


def _amounts(resources: Mapping[str, float]) -> str:
    hidden = ("node:", "memory", "object_store_memory", "accelerator_type:")
    shown = {name: amount for name, amount in resources.items() if amount and not name.startswith(hidden)}
    return ", ".join(f"{amount:g} {name}" for name, amount in shown.items()) or "nothing"
