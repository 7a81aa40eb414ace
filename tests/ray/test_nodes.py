"""Nodes that are lost during a run: real raylets on one machine, one of which is killed."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.helpers.forked import module
from tests.helpers.runs import CLOCKS

ITERATIONS = 3

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]
ATTENTIVE = {"RAY_health_check_period_ms": "1000", "RAY_health_check_initial_delay_ms": "1000"}
"""Ray asks nodes whether they live every second; by default every third one, and only after five."""
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def found(forks, tmp_path_factory):
    """Result of a cluster that lost a rollout worker's node, and then a learner's."""
    pytest.importorskip("ray", reason="needs the extra `ray`")
    folder = tmp_path_factory.mktemp("lost")
    done = subprocess.run(
        [*module(forks[0], folder, "tests.helpers.lost_nodes"), str(folder)], cwd=ROOT, capture_output=True, text=True,
        timeout=1100,
        env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled", **ATTENTIVE},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_samples_of_a_lost_node_are_drawn_again_identically_and_the_pool_continues(found):
    rollout = found["rollout"]
    assert rollout["nodes"] == 2
    # No update lies between the two rollouts: version 2 holds the weights of version 1.
    assert rollout["same_images"] and rollout["versions"] == [2]
    # Requests that meet at a replica are scored together, and a sum of float32 depends on what it is batched with.
    assert rollout["score_error"] < 1e-5


def test_a_run_whose_learner_node_is_lost_ends_with_the_metrics_of_an_undisturbed_one(found, tmp_path, tiny):
    from acpo_dist.tracking.console import Console
    from acpo_dist.tracking.jsonl import read_metrics
    from acpo_dist.training.local import open_ports
    from acpo_dist.training.run import drive

    learner = found["learner"]
    assert learner["lost_after"][0] >= 2 and learner["iterations"] == ITERATIONS
    # The state of the lost node was kept on the driver's, which wrote it: only the iteration under way was repeated.
    assert len(learner["saved"]) == 2 and learner["saved"][0] >= "000001"
    calm = tmp_path / "calm"
    drive(
        tiny(f"run.iterations={ITERATIONS}", "checkpoint.every=1", f"run.dir={calm}"), open_ports, Console(quiet=True)
    )
    rows = read_metrics(calm / "metrics.jsonl")
    assert [row["iteration"] for row in learner["rows"]] == [row["iteration"] for row in rows]
    for mine, theirs in zip(rows, learner["rows"], strict=True):
        for name, value in mine.items():
            # The best iteration is one of those with a checkpoint, and the lost run has fewer checkpoints.
            if not name.startswith(CLOCKS) and name != "guard/best_iteration":
                # One process and Ray sum float32 in another order, and updates carry that on; gains are differences in
                # standard deviations, so they have an absolute error.
                assert theirs[name] == pytest.approx(value, rel=2e-3, abs=5e-4), (mine["iteration"], name)


def test_a_role_finds_its_machines_by_label_and_a_missing_one_is_named():
    from actors.placement import NodeOffer, PlacementPlan, Role, explain, matches

    assert matches({"zone": "a"}, {"zone": "in(a,b)"}) and matches({}, {"zone": "!a"})
    assert not matches({"zone": "c"}, {"zone": "in(a,b)"}) and not matches({"zone": "a"}, {"zone": "!in(a,b)"})
    learner = Role(
        name="learner", count=2, cpus=1, gpus=1, strategy="PACK", count_key="learner.num_ranks",
        labels={"acpo-role": "learner"},
    )  # fmt: skip
    plain = NodeOffer(address="192.0.2.1", resources={"CPU": 8, "GPU": 8}, labels={})
    said = explain(PlacementPlan(roles=(learner,)), [plain], waited_s=3)
    assert "a machine with the labels {'acpo-role': 'learner'} for learner" in said
    small = NodeOffer(address="192.0.2.2", resources={"CPU": 8, "GPU": 1}, labels={"acpo-role": "learner"})
    assert "room for 1 of learner on 1 machines" in explain(PlacementPlan(roles=(learner,)), [plain, small], waited_s=3)


def test_a_live_cluster_is_held_against_the_plan_by_sum_by_role_and_by_what_is_free():
    from actors.cluster.capacity import compare
    from actors.placement import NodeOffer, PlacementPlan, Role

    rollout = Role(name="rollout", count=3, cpus=2, gpus=1, strategy="SPREAD", count_key="rollout.num_workers", least=2)
    node = NodeOffer(address="192.0.2.1", resources={"CPU": 8, "GPU": 1}, labels={"zone": "a", "ray.io/node-id": "x"})
    found = compare(PlacementPlan(roles=(rollout,)), [node], {"CPU": 1.0, "GPU": 1.0})
    assert found["needed"] == {"CPU": 4, "GPU": 2} and found["missing"] == {"GPU": 1}
    assert found["missing_by_role"] == ["room for 1 of rollout on 1 machines"]
    assert found["missing_now"] == {"CPU": 3, "GPU": 1} and found["machines"][0]["labels"] == {"zone": "a"}
