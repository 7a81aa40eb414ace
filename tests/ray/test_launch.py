"""A run on Ray equals one in a single process, also when workers and replicas are killed."""

import os
import signal

import numpy as np
import pytest
import torch

from acpo_dist.tracking.console import Console
from acpo_dist.training.context import fixed_groups
from acpo_dist.training.run import drive
from tests.conftest import TINY
from tests.helpers.grids import require_same_grids
from tests.helpers.runs import results

pytestmark = pytest.mark.ray
QUIET = Console(quiet=True)
PROMPTS = (
    "a red circle on a white background",
    "a blue cross on a black background",
    "a green square on a gray background",
)
SMALL = [
    "rollout.cpus_per_worker=0.1",
    "rewards.cpus_per_replica=0.1",
    "learner.cpus_per_rank=0.2",
    "cluster.worker_timeout_s=900",
    "rewards.judges=[]",
]


def test_local_and_ray_give_the_same_first_iteration_and_the_same_images(cluster, tiny, tmp_path):
    from acpo_dist.training.local import open_ports as local_ports
    from actors.launch import open_ports as ray_ports

    more = ["rollout.num_workers=2", "learner.num_ranks=2", "learner.zero_stage=2"]
    for name, ports, extra in (("local", local_ports, []), ("ray", ray_ports, more)):
        drive(tiny("run.iterations=1", f"run.dir={tmp_path / name}", *SMALL, *extra, source="toy_flow"), ports, QUIET)
    local, ray = (results(tmp_path / name) for name in ("local", "ray"))
    assert local[0].keys() == ray[0].keys()
    for name, value in local[0].items():
        assert ray[0][name] == pytest.approx(value, rel=1e-4, abs=1e-7), name
    require_same_grids(tmp_path / "local", tmp_path / "ray")


@pytest.fixture(scope="module")
def ports(cluster):
    """A learner, two rollout workers and two replicas of the reward; both tests kill some, which Ray restarts."""
    from acpo_dist.config.load import load_config
    from acpo_dist.tracking.composite import CompositeTracker
    from actors.launch import open_ports

    config = load_config("toy_sdxl", [*TINY, *SMALL, "rollout.num_workers=2", "rewards.replicas=2"])
    with open_ports(config, CompositeTracker([])) as opened:
        opened.learner.start(None)
        yield opened


def _images(rollout, groups):
    handles = rollout.generate(groups)
    return rollout.images(handles, [plan.sample_id for group in groups for plan in group.samples])


def test_one_rollout_worker_and_two_draw_the_same_images_and_a_killed_one_is_replaced(ports, tiny):
    from acpo_dist.training.local import LocalRollouts

    groups = fixed_groups(tiny(*SMALL), PROMPTS, 24, stream="test")
    alone = LocalRollouts(tiny(), device="cpu")
    expected = _images(alone, groups)
    ports.weights.publish(3)
    assert torch.equal(_images(ports.rollout, groups), expected)
    os.kill(ports.rollout.await_ready()["rollout/1"], signal.SIGKILL)
    assert torch.equal(_images(ports.rollout, groups), expected)
    assert ports.rollout.redone >= 1
    assert all(handle.policy_version == 3 for handle in ports.rollout.generate(groups))
    _follows_like_one_process(ports, alone, groups)


def _follows_like_one_process(ports, alone, groups):
    """Error sums to 1e-12, final latents and images along another trajectory bit for bit, also with a killed worker."""
    from acpo_dist.diffusion.trajectory import explicit_trajectory

    sigmas = [0.05, 0.2, 0.6, 1.5, 4.0, 9.0, 12.0, 14.0]
    found = ports.rollout.measure_errors(ports.rollout.generate(groups), sigmas)
    for mine, theirs in zip(alone.measure_errors(alone.generate(groups), sigmas), found, strict=True):
        assert np.allclose(mine.v, theirs.v, rtol=1e-12)
    other = explicit_trajectory(alone.alpha_bars(), [999, 700, 450, 250, 100, 20])
    assert torch.equal(ports.rollout.final_latents(groups, other), alone.final_latents(groups, other))
    alone.set_trajectory(other)
    assert set(ports.rollout.set_trajectory(other)) == {other.schedule_id}
    os.kill(ports.rollout.await_ready()["rollout/0"], signal.SIGKILL)
    handles = ports.rollout.generate(groups)
    assert {handle.schedule_id for handle in handles} == {other.schedule_id}
    ids = [plan.sample_id for group in groups for plan in group.samples]
    assert torch.equal(ports.rollout.images(handles, ids), alone.images(alone.generate(groups), ids))


def test_killing_a_reward_replica_loses_no_sample_and_changes_no_score(ports, tiny):
    handles = ports.rollout.generate(fixed_groups(tiny(*SMALL), PROMPTS, 64, stream="test"))
    undisturbed = ports.reward.score(handles, ["two_stream"])["two_stream"]
    killed = []

    def kill_once(count):
        # In the middle of the load: the first answers are in, the others are under way.
        if not killed:
            killed.append(ports.reward.vitals()["two_stream"][0]["pid"])
            os.kill(killed[0], signal.SIGKILL)

    disturbed = ports.reward.score([handle for _ in range(6) for handle in handles], ["two_stream"], kill_once)
    assert killed
    # Requests of other samples may share a batch, which moves float32 sums by a unit in the last place.
    assert disturbed["two_stream"] == pytest.approx(undisturbed, abs=1e-6)
    assert len(disturbed["two_stream"]) == 64


def test_more_ranks_than_the_cluster_can_place_is_refused_after_a_bounded_wait(cluster, tiny):
    from acpo_dist.core.errors import PlacementError
    from acpo_dist.tracking.composite import CompositeTracker
    from actors.launch import open_ports

    config = tiny(
        "learner.num_ranks=2", "learner.zero_stage=1", "learner.cpus_per_rank=50", "cluster.place_timeout_s=0.1"
    )
    with pytest.raises(PlacementError, match="missing"), open_ports(config, CompositeTracker([])):
        raise AssertionError("nothing may start")


def test_the_plan_counts_every_worker_of_every_role(tiny):
    from actors.placement import plan_placement, shortfall

    plan = plan_placement(tiny("rollout.num_workers=3", "rewards.replicas=2", "rollout.gpus_per_worker=0.5", *SMALL))
    assert plan.total() == pytest.approx({"CPU": 0.2 + 3 * 0.1 + 2 * 0.1, "GPU": 1.5})
    assert shortfall(plan, {"CPU": 1.0, "GPU": 1.0}) == pytest.approx({"GPU": 0.5})
    assert shortfall(plan, {"CPU": 1.0, "GPU": 2.0}) == {}
