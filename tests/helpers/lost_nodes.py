"""Runs on local Ray nodes that are lost one after another, in a separate process.

`python -m tests.helpers.lost_nodes FOLDER` prints one JSON object as its last line; Ray starts its workers with
`sys.executable`.
"""

import json
import logging
import sys
import threading
import time
from pathlib import Path

import ray
import torch
from ray.cluster_utils import Cluster

from acpo_dist.config.load import load_config
from acpo_dist.tracking.console import Console
from acpo_dist.tracking.jsonl import read_metrics
from actors.cluster.connect import PATIENT, unused_port
from actors.ray_private import agents_not_awaited
from tests.conftest import TINY

ITERATIONS = 3
METRICS = ["two_stream", "strided_judge"]
PROMPTS = ("a red circle on a white background", "a blue cross on a black background")
SMALL = [
    "rollout.cpus_per_worker=0.5", "rollout.num_workers=2", "rewards.cpus_per_replica=0.1", "learner.cpus_per_rank=0.5",
    "cluster.roles.learner.labels={acpo-role: worker}", "cluster.roles.rollout.labels={acpo-role: worker}",
    "cluster.roles.reward.labels={acpo-role: head}", "cluster.roles.rollout.late_s=5", "cluster.place_timeout_s=300",
    "cluster.worker_timeout_s=900",
]  # fmt: skip


class Machines:
    """Start a head and three worker nodes, each with resources for all workers."""

    def __init__(self) -> None:
        args = {"include_dashboard": False, "object_store_memory": 150_000_000, "_system_config": PATIENT}
        # Nodes would wait for their agents one after another.
        with agents_not_awaited(unused_port()):
            self._cluster = Cluster(
                initialize_head=True, head_node_args={"num_cpus": 1, "labels": {"acpo-role": "head"}, **args}
            )
        ray.init(address=self._cluster.address, log_to_driver=False, logging_level=logging.ERROR, namespace="acpo")
        nodes = []
        for _ in range(3):
            with agents_not_awaited(unused_port()):
                nodes.append(
                    self._cluster.add_node(num_cpus=2, labels={"acpo-role": "worker"}, object_store_memory=150_000_000)
                )
        self._cluster.wait_for_nodes()
        self._nodes = {node.node_id: node for node in nodes}

    def of(self, actor_class: str) -> list[str]:
        """Return nodes with live actors of a class."""
        alive = [one for one in ray._private.state.actors().values() if one["State"] == "ALIVE"]
        return sorted({one["Address"]["NodeID"] for one in alive if one["ActorClassName"] == actor_class})

    def lose(self, node: str) -> None:
        """End a node's raylet and its processes."""
        self._cluster.remove_node(self._nodes.pop(node), allow_graceful=False)

    def close(self) -> None:
        """End the remaining nodes."""
        ray.shutdown()
        self._cluster.shutdown()


def lose_rollout(machines: Machines) -> dict:
    """Draw samples, then lose a node with rollout workers and finished samples."""
    from acpo_dist.tracking.composite import CompositeTracker
    from acpo_dist.training.context import fixed_groups
    from actors.launch import open_ports

    config = load_config("toy_sdxl", [*TINY, *SMALL])
    groups = fixed_groups(config, PROMPTS, 16, stream="test")
    ids = [plan.sample_id for group in groups for plan in group.samples]
    with open_ports(config, CompositeTracker([])) as ports:
        ports.learner.start(None)
        ports.weights.publish(1)
        handles = ports.rollout.generate(groups)
        # Nobody has fetched them yet, so half of them are on the node that goes away and nowhere else.
        nodes = machines.of("RolloutActor")
        (learner,) = machines.of("LearnerActor")
        machines.lose(next(node for node in nodes if node != learner))
        started = time.monotonic()
        scores = ports.reward.score(handles, METRICS)
        images = ports.rollout.images(handles, ids)
        recovered_s = time.monotonic() - started
        acks = ports.weights.publish(2)
        drawn = ports.rollout.generate(groups)
        return {
            "nodes": len(nodes), "published": acks, "versions": sorted({one.policy_version for one in drawn}),
            "same_images": bool(torch.equal(images, ports.rollout.images(drawn, ids))),
            "score_error": _error(scores, ports.reward.score(drawn, METRICS)),
            "recovered_s": round(recovered_s, 1), "seconds": round(time.monotonic() - started, 1),
        }  # fmt: skip


def _error(first: dict, second: dict) -> float:
    assert {name: set(row) for name, row in first.items()} == {name: set(row) for name, row in second.items()}
    return max(abs(value - second[name][sample]) for name, row in first.items() for sample, value in row.items())


def lose_learner(machines: Machines, folder: Path) -> dict:
    """Execute a run whose learner's node is lost after its first iteration, without a checkpoint."""
    from acpo_dist.training.run import drive
    from actors.launch import open_ports

    config = load_config(
        "toy_sdxl", [*TINY, *SMALL, f"run.iterations={ITERATIONS}", "checkpoint.every=9", f"run.dir={folder / 'run'}"]
    )
    rows = folder / "run" / "metrics.jsonl"
    lost: list[int] = []

    def watch() -> None:
        while not (rows.exists() and len(read_metrics(rows)) >= 2):
            time.sleep(0.1)
        machines.lose(machines.of("LearnerActor")[0])
        lost.append(len(read_metrics(rows)))

    threading.Thread(target=watch, daemon=True).start()
    started = time.monotonic()
    result = drive(config, open_ports, Console(), resume=None)
    return {
        "saved": sorted(path.name for path in (folder / "run/checkpoints").iterdir()),
        "lost_after": lost, "iterations": result.iterations, "rows": read_metrics(rows),
        "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    given = Path(sys.argv[1])
    own = Machines()
    try:
        outcome = {"rollout": lose_rollout(own), "learner": lose_learner(own, given)}
    finally:
        own.close()
    sys.stdout.write(json.dumps(outcome) + "\n")
