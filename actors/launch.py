"""Open the ports of a run on Ray: plan, place, start the roles, and end them."""

import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import ray

import acpo_dist
from acpo_dist.config.schema import Config
from acpo_dist.core.errors import UsageError
from acpo_dist.core.ports import Ports, Tracker
from actors.channel import RayChannel
from actors.cluster.connect import join, leave
from actors.cluster.control import named_failures
from actors.group import kill
from actors.learner import RayLearner
from actors.placement import await_resources, node_offers, plan_placement
from actors.reward.gateway import open_gateway, read_tokens
from actors.reward.pool import deploy, end_orphans, link_of
from actors.rollout import RayRollouts

logger = logging.getLogger(__name__)


@contextmanager
def open_ports(config: Config, tracker: Tracker) -> Iterator[Ports]:
    """Start all roles of a run on Ray; they are ended when the block is left.

    Raises:
        PlacementError: the cluster cannot place the run.
        WorkerError: a worker cannot start.
        WorkerLostError: a worker or the cluster was lost.
    """
    plan = plan_placement(config)
    http = config.rewards.http
    if http.enabled:
        read_tokens(http)
    with ExitStack() as stack:
        stack.enter_context(connected(config))
        end_orphans()
        await_resources(plan, timeout_s=config.cluster.place_timeout_s)
        # All roles load their models at the same time. Rollout workers hold no reservation, so each may move.
        learner = RayLearner(config, plan.role("learner"))
        stack.callback(learner.close)
        rollout = RayRollouts(config, plan.role("rollout"))
        stack.callback(rollout.close)
        run_id = f"acpo-{uuid.uuid4().hex[:8]}"
        learner.load(link_of(config, run_id))
        near = rollout.nodes() if config.cluster.roles.reward.near_rollout and len(node_offers()) > 1 else []
        reward = deploy(config, run_id, near=near)
        stack.callback(reward.close)
        learner.build(reward)
        if http.enabled:
            gateway, address = open_gateway(reward.link, _gradients(config), config.rewards.cut, http)
            stack.callback(kill, {"http": gateway})
            tracker.set_tags({"reward_pool": address})
            logger.warning("the reward pool listens on %s (rewards.http)", address)
        rollout.await_ready()
        yield Ports(
            rollout=rollout, reward=reward, learner=learner, weights=RayChannel(learner, rollout), tracker=tracker
        )


@contextmanager
def connected(config: Config) -> Iterator[None]:
    """Join the configured cluster, or start a local one for the block; an existing connection is used and kept.

    Raises:
        UsageError: the cluster cannot be joined.
        WorkerLostError: Ray fails within the block.
    """
    _require_own_packages()
    if ray.is_initialized():
        with named_failures():
            yield
        return
    # `local` even if a cluster runs on this machine, since it may belong to another user.
    join(config.cluster.address or os.environ.get("RAY_ADDRESS") or "local")
    try:
        with named_failures():
            yield
    finally:
        leave()


def _gradients(config: Config) -> dict[str, bool]:
    """Return whether the pool computes gradients of a metric, by name."""
    training = {entry.name for entry in config.rewards.train}
    return {
        entry.name: entry.name in training and entry.differentiable
        for entry in (*config.rewards.train, *config.rewards.judges)
    }


def _require_own_packages() -> None:
    """Reject another package named `actors` that shadows this project's."""
    import actors

    ours = Path(acpo_dist.__file__).resolve().parent.parent / "actors"
    found = Path(str(actors.__file__)).resolve().parent
    if found != ours:
        raise UsageError(
            f"the package `actors` was imported from {found}, expected {ours}; start `acpo` from another folder."
        )
