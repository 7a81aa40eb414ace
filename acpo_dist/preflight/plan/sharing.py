"""Workers that share a GPU: its peak memory, and the number of GPUs of each role."""

import math
import os
from collections.abc import Iterable, Mapping

from acpo_dist.config.schema import Config
from acpo_dist.models.tuning import shares_base
from acpo_dist.preflight.plan.memory import Memory
from acpo_dist.preflight.plan.rates import CONTEXT_GIB, Device

_PARTS = 1000
"""Number of parts of a GPU; shares are compared as whole parts."""


def one_process(config: Config) -> bool:
    """Return whether all roles run in this process: as configured, or for `auto` if no setting needs Ray."""
    if config.cluster.backend != "auto":
        return config.cluster.backend == "local"
    rewards = config.rewards
    replicas = max(rewards.replicas, *(rewards.pool_of(name).bounds[1] for name in rewards.pool), 1)
    several = config.learner.zero_stage is not None or config.rollout.num_workers > 1 or replicas > 1
    return not (several or rewards.http.enabled or config.cluster.address or os.environ.get("RAY_ADDRESS"))


def replicas_of(config: Config) -> dict[str, int]:
    """Return the number of replicas of every metric at the start of the run."""
    metrics = (*config.rewards.train, *config.rewards.judges)
    return {entry.name: config.rewards.pool_of(entry.name).bounds[0] for entry in metrics}


def rollout_devices(config: Config) -> int:
    """Return the number of GPUs that rollout workers use at the same time.

    Without Ray each process, of one or of `accelerate launch`'s, holds all roles.
    """
    if one_process(config):
        return config.learner.num_ranks
    return _devices(config.rollout.num_workers, config.rollout.num_workers * config.rollout.gpus_per_worker)


def reward_devices(config: Config) -> dict[str, int]:
    """Return the number of GPUs that the replicas of each reward use at the same time; judges are idle then."""
    rewards, counts = config.rewards, replicas_of(config)
    if one_process(config):
        return {entry.name: config.learner.num_ranks for entry in rewards.train}
    whole = sum((rewards.pool_of(name).gpus or 0.0) * count for name, count in counts.items())
    return {
        entry.name: _devices(counts[entry.name], whole if rewards.pool_of(entry.name).gpus else 0.0)
        for entry in rewards.train
    }


def _devices(workers: int, gpus: float) -> int:
    return min(workers, max(1, math.ceil(gpus - 1e-9))) if gpus else workers


def needed_gib(config: Config, roles: Mapping[str, Memory], device: Device, *, base: float = 0.0) -> dict[str, float]:
    """Compute the peak memory per device.

    One process without Ray holds the tensors of all roles, and works in one role at a time (`all`). On Ray, workers
    with a fraction of a GPU may share it with workers of the same role or of several roles (`shared`).

    Args:
        config: configuration of the run.
        roles: memory of one worker by role.
        device: the device.
        base: GiB of the frozen base weights, which one process holds once.

    Returns:
        GiB by role, `shared` or `all`.
    """
    context = CONTEXT_GIB if device.memory_gib is not None else 0.0
    if one_process(config):
        held = sum(memory.total - memory.activations for memory in roles.values())
        held -= base if shares_base(config.model, config.sampler) else 0.0
        section = getattr(config.model, "memory", None)
        if section is not None and section.offload:
            # While rollouts are drawn, the learner's frozen copy is in host memory; afterwards the rollouts' weights.
            turns = {name: memory.activations for name, memory in roles.items()}
            turns["rollout"] += roles["rollout"].weights
            for name in ("learner", "reward"):
                turns[name] += roles["learner"].anchor
            held -= roles["rollout"].weights + roles["learner"].anchor
            return {"all": held + max(turns.values()) + context}
        working = {name: memory.activations for name, memory in roles.items()}
        if config.pipeline.max_staleness:
            # Rollouts are drawn in another thread while the learner works.
            return {"all": held + working["rollout"] + max(working["learner"], working["reward"]) + context}
        return {"all": held + max(working.values()) + context}
    workers = _workers(config, {name: memory.total + context for name, memory in roles.items()}, context)
    needed = {name: _fullest(members) for name, members in workers.items()}
    together = _fullest(member for members in workers.values() for member in members)
    return needed | ({"shared": together} if together > max(needed.values()) else {})


def _workers(config: Config, gib: Mapping[str, float], context: float) -> dict[str, list[tuple[float, float]]]:
    """Return (share of a GPU, GiB) of every worker, by role."""
    rollout, learner, rewards = config.rollout, config.learner, config.rewards
    replicas = []
    for entry in (*rewards.train, *rewards.judges):
        pool = rewards.pool_of(entry.name)
        # A judge scores finished images and holds no decoder.
        amount = gib["reward"] if entry in rewards.train else context
        replicas += [(pool.gpus or 0.0, amount)] * pool.bounds[1]
    return {
        "rollout": [(rollout.gpus_per_worker, gib["rollout"])] * rollout.num_workers,
        "learner": [(learner.gpus_per_rank, gib["learner"])] * learner.num_ranks,
        "reward": replicas,
    }


def _fullest(workers: Iterable[tuple[float, float]]) -> float:
    """Return the maximum GiB of these workers on one GPU; a worker with a whole GPU, or none, does not share."""
    best = [0.0] * (_PARTS + 1)
    for share, amount in workers:
        cost = round(_PARTS * share) if 0 < share < 1 else _PARTS
        for room in range(_PARTS, cost - 1, -1):
            best[room] = max(best[room], best[room - cost] + amount)
    return best[_PARTS]
