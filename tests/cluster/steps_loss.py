"""Steps: machines are lost or disconnected during a run, and the metrics are those of an undisturbed run."""

import time
from collections.abc import Callable
from typing import Any

from tests.cluster.cluster import Cluster
from tests.cluster.hosts import Host, until
from tests.cluster.runs import Run, labels, largest_difference

_NOTICE_S = 180
"""Longest time, on two busy cores, from the loss of a machine to the next finished iteration."""
_BACK_S = 300
"""Longest time until Ray's autoscaler has added a restarted machine."""
_CUT_S = 20
_LOST_AFTER = 7
"""Iterations before a machine is lost; a checkpoint is made after every fifth."""
_TOLERANCE = 1e-3
"""How much metrics may differ, relative above 1. The reward pool puts images together as they come, and scores of
another batch are the same to about 1e-7 only; training makes differences grow."""

RESTARTED = "cluster.max_restarts)"
"""Message that a run prints for each restart."""

_COMMON = ("run.iterations=16", "cluster.roles.rollout.late_s=10")
_MOVABLE = (*_COMMON, *labels(learner="in(learner,rollout)", rollout="in(learner,rollout)", reward="in(head,rollout)"))
"""Learner and rollout workers fit on either machine."""
_LEARNER_APART = (*_COMMON, *labels(learner="learner", rollout="in(learner,rollout)", reward="in(head,rollout)"))
"""A rollout worker and all reward replicas are on the third machine: replicas rather go where rollout workers are."""
_REWARD_APART = (*_COMMON, *labels(learner="learner", rollout="learner", reward="in(head,rollout)"),
                 "cluster.roles.reward.near_rollout=false", "rewards.replicas=2")  # fmt: skip
"""Replicas alone are on the third machine."""


def undisturbed(cluster: Cluster) -> dict[str, Any]:
    """Expected metrics of the disturbed runs."""
    return {"iterations": len(Run(cluster, "calm", 0, _MOVABLE).submit().finish().rows())}


def rollout_host(cluster: Cluster) -> dict[str, Any]:
    """The machine of a rollout worker and of all reward replicas is lost permanently."""
    return _lose(Run(cluster, "lost-rollout", 0, _LEARNER_APART), _of("rollout", "reward", never="learner"), restarts=0)


def reward_host(cluster: Cluster) -> dict[str, Any]:
    """A machine with only reward replicas is lost permanently."""
    return _lose(Run(cluster, "lost-reward", 0, _REWARD_APART), _of("reward", never="rollout"), restarts=0)


def learner_host(cluster: Cluster) -> dict[str, Any]:
    """The learner's machine is lost: the same job continues from its newest checkpoint."""
    return _lose(Run(cluster, "lost-learner", 0, _MOVABLE), _of("learner"), restarts=1)


def cut_rollout(cluster: Cluster) -> dict[str, Any]:
    """The machine of a rollout worker and of all reward replicas is disconnected for 20 s."""
    return _cut(Run(cluster, "cut-rollout", 0, _LEARNER_APART), _of("rollout", "reward", never="learner"))


def cut_learner(cluster: Cluster) -> dict[str, Any]:
    """The learner's machine is disconnected for 20 s."""
    return _cut(Run(cluster, "cut-learner", 0, _LEARNER_APART), _of("learner"))


Choice = Callable[[Cluster], Host]


def _of(*roles: str, never: str = "") -> Choice:
    """A machine other than the head with workers of all `roles`."""

    def choose(cluster: Cluster) -> Host:
        places = cluster.places()
        wanted = set.intersection(*(places[role] for role in roles)) - places.get(never, set())
        assert wanted - {cluster.head.address}, places
        return cluster.host_at(sorted(wanted - {cluster.head.address})[-1])

    return choose


def _lose(run: Run, choose: Choice, *, restarts: int) -> dict[str, Any]:
    cluster = run.cluster
    run.submit().await_rows(1)
    host = choose(cluster)
    run.await_rows(_LOST_AFTER)
    before = len(run.rows())
    host.power_off()
    gone = time.monotonic()
    # A restart first takes the lines after the checkpoint away.
    run.await_rows(before + 1, _NOTICE_S)
    took_s = time.monotonic() - gone
    run.finish()
    said = run.output()
    assert said.count(RESTARTED) == restarts, said[-6000:]
    found = {"host": host.name, "next_iteration_s": took_s, "difference": _like_calm(Run(cluster, "calm", 0), run)}
    cluster.net.start(host)
    return found | _all_back(cluster)


def _cut(run: Run, choose: Choice) -> dict[str, Any]:
    cluster = run.cluster
    run.submit().await_rows(1)
    host = choose(cluster)
    run.await_rows(_LOST_AFTER)
    host.cut()
    time.sleep(_CUT_S)  # the cut is the experiment
    before = len(run.rows())
    assert before < len(Run(cluster, "calm", 0).rows()), "the run was over before the cut could be felt"
    host.join()
    healed = time.monotonic()
    run.await_rows(before + 1, _NOTICE_S)
    took_s = time.monotonic() - healed
    run.finish()
    restarts = run.output().count(RESTARTED)
    found = {
        "host": host.name, "iterations_during_the_cut": before - _LOST_AFTER, "next_iteration_s": took_s,
        "restarts": restarts, "difference": _like_calm(Run(cluster, "calm", 0), run),
    }  # fmt: skip
    return found | _all_back(cluster)


def _like_calm(calm: Run, run: Run) -> float:
    difference, where = largest_difference(calm.rows(), run.rows())
    assert difference < _TOLERANCE, f"{run.name} is not as undisturbed: {where}"
    return difference


def _all_back(cluster: Cluster) -> dict[str, Any]:
    """A restarted machine is added by Ray's autoscaler, which runs on the head."""
    started = time.monotonic()
    until(lambda: len(cluster.nodes()) == 3, _BACK_S, "not all machines are there again")
    return {"taken_in_again_s": time.monotonic() - started}
