"""The same run on Ray: equal to one process, and whole when workers die. Real actors, Serve replicas and ZeRO ranks."""

import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from acpo_dist.tracking.console import Console
from acpo_dist.tracking.jsonl import read_metrics
from acpo_dist.training.context import fixed_groups
from acpo_dist.training.run import drive
from tests.conftest import poison

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
    "cluster.worker_timeout_s=240",
]


def _metrics(root):
    skip = ("time/", "reward_pool/")
    return [{k: v for k, v in row.items() if not k.startswith(skip)} for row in read_metrics(root / "metrics.jsonl")]


def test_local_and_ray_give_the_same_first_iteration_and_the_same_images(cluster, tiny, tmp_path):
    from acpo_dist.training.local import open_ports as local_ports
    from actors.launch import open_ports as ray_ports

    for name, ports, extra in (("local", local_ports, []), ("ray", ray_ports, ["rollout.num_workers=2"])):
        drive(tiny("run.iterations=1", f"run.dir={tmp_path / name}", *SMALL, *extra), ports, QUIET)
    local, ray = (_metrics(tmp_path / name) for name in ("local", "ray"))
    assert local[0].keys() == ray[0].keys()
    for name, value in local[0].items():
        assert ray[0][name] == pytest.approx(value, rel=1e-4, abs=1e-7), name
    # The grids come after one update, whose float32 sums run in another order: at most a grey level or two apart.
    grids = [Image.open(tmp_path / name / "samples/000001.png") for name in ("local", "ray")]
    first, second = (np.asarray(grid, dtype=int) for grid in grids)
    assert abs(first - second).max() <= 2


def _images(ports, groups):
    handles = ports.rollout.generate(groups)
    return ports.rollout.images(handles, [plan.sample_id for group in groups for plan in group.samples])


def test_one_rollout_worker_and_three_draw_the_same_images_and_a_killed_one_is_replaced(ports_of, tiny):
    from acpo_dist.training.local import LocalRollouts

    config = tiny("rollout.num_workers=3", *SMALL)
    groups = fixed_groups(config, PROMPTS, 24, stream="test")
    alone = LocalRollouts(tiny(), device="cpu")
    handles = alone.generate(groups)
    expected = alone.images(handles, [plan.sample_id for group in groups for plan in group.samples])
    ports = ports_of(config)
    ports.learner.start(None)
    ports.weights.publish(3)
    assert torch.equal(_images(ports, groups), expected)
    victim = ports.rollout.await_ready()["rollout/1"]
    os.kill(victim, signal.SIGKILL)
    assert torch.equal(_images(ports, groups), expected)
    assert ports.rollout.redone >= 1
    assert all(handle.policy_version == 3 for handle in ports.rollout.generate(groups))
    _retimed_like_one_process(ports, alone, groups)


def _retimed_like_one_process(ports, alone, groups):
    """Error sums to 1e-12, ends and images along another trajectory bit for bit, a killed worker included."""
    from acpo_dist.diffusion.trajectory import explicit_trajectory

    sigmas = [0.05, 0.2, 0.6, 1.5, 4.0, 9.0, 12.0, 14.0]
    found = ports.rollout.measure_errors(ports.rollout.generate(groups), sigmas, guidance=True)
    for mine, theirs in zip(alone.measure_errors(alone.generate(groups), sigmas, guidance=True), found, strict=True):
        assert np.allclose(mine.v, theirs.v, rtol=1e-12) and np.allclose(mine.guided_K3, theirs.guided_K3, rtol=1e-12)
    other = explicit_trajectory(alone.alpha_bars(), [999, 700, 450, 250, 100, 20])
    assert torch.equal(ports.rollout.final_latents(groups, other), alone.final_latents(groups, other))
    alone.follow(other)
    assert set(ports.rollout.follow(other)) == {other.schedule_id}
    os.kill(ports.rollout.await_ready()["rollout/2"], signal.SIGKILL)
    handles = ports.rollout.generate(groups)
    assert {handle.schedule_id for handle in handles} == {other.schedule_id}
    ids = [plan.sample_id for group in groups for plan in group.samples]
    assert torch.equal(ports.rollout.images(handles, ids), alone.images(alone.generate(groups), ids))


def test_killing_a_reward_replica_loses_no_sample_and_changes_no_score(ports_of, tiny):
    config = tiny("rewards.replicas=2", *SMALL)
    ports = ports_of(config)
    ports.learner.start(None)
    groups = fixed_groups(config, PROMPTS, 64, stream="test")
    handles = ports.rollout.generate(groups)
    names = ["two_stream", "strided_judge"]
    undisturbed = ports.reward.score(handles, names)
    pid = ports.reward.vitals()["two_stream"][0]["pid"]
    killed = []

    def kill_once(count):
        # In the middle of the load: the first answers are in, the others are under way.
        if not killed:
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    disturbed = ports.reward.score([handle for _ in range(6) for handle in handles], names, kill_once)
    assert killed
    # Requests of other samples may share a batch, which moves float32 sums by a unit in the last place.
    for name in names:
        assert disturbed[name] == pytest.approx(undisturbed[name], abs=1e-6), name
        assert len(disturbed[name]) == 64


@pytest.fixture(scope="module")
def one_process_weights(tiny_module):
    """Weights after three optimiser steps in one process, and the rollouts they were made from."""
    from acpo_dist.training.local import LocalLearner, LocalRewards, LocalRollouts, learner_spec

    config = tiny_module()
    rollouts, rewards = LocalRollouts(config, device="cpu"), LocalRewards(config, device="cpu")
    handles = rollouts.generate(fixed_groups(config, PROMPTS, 24, stream="test"))
    learner = LocalLearner(learner_spec(config), rewards, device="cpu")
    learner.start(None)
    start = {name: value.clone() for name, value in learner.export(0).tensors.items()}
    learner.train(handles, _task(handles))
    return handles, start, learner.export(1).tensors


@pytest.fixture(scope="module")
def tiny_module():
    from acpo_dist.config.load import load_config
    from tests.conftest import TINY

    return lambda *overrides: load_config(
        "toy_sdxl", [*TINY, "learner.micro_batch=2", "learner.learning_rate=1e-3", *SMALL, *overrides]
    )


def _task(handles):
    from acpo_dist.core.types import Normaliser, RewardTerm, TrainTask

    ids = tuple(sample_id for handle in handles for sample_id in handle.sample_ids)
    normaliser = Normaliser(mean=0.4, std=0.2, sign=1)
    return TrainTask(
        iteration=0, policy_version=0, sample_ids=ids, weights=dict.fromkeys(ids, 1.0), anchor_weight=2.0,
        # Not the configured rate: it is the driver that says.
        learning_rate=5e-4, rewards=(RewardTerm(name="two_stream", weight=1.0, normaliser=normaliser),),
    )  # fmt: skip


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_on_two_ranks_agrees_with_one_process_after_three_steps(
    stage, cluster, ports_of, tiny_module, one_process_weights, tmp_path
):
    from dataclasses import replace

    local_handles, start, expected = one_process_weights
    config = tiny_module("learner.num_ranks=2", f"learner.zero_stage={stage}")
    ports = ports_of(config)
    ports.learner.start(None)
    ports.learner.save(tmp_path / "before")
    handles = [replace(h, payload=(cluster.put(h.payload), cluster.put(h.payload.images_BCHW))) for h in local_handles]
    report = ports.learner.train(handles, _task(handles))
    assert report.optim_steps == 3
    found = ports.learner.export(1).tensors
    # Over all elements: single ones whose gradient is at the rounding of float32 sums get an Adam update of arbitrary
    # sign, whoever sums.
    error = sum(float((found[name] - value).square().sum()) for name, value in expected.items()) ** 0.5
    size = sum(float(value.square().sum()) for value in expected.values()) ** 0.5
    moved = sum(float((value - start[name]).square().sum()) for name, value in expected.items()) ** 0.5
    assert moved > 0.005 * size
    assert error <= 1e-4 * size, (error, size, moved)
    ports.learner.save(tmp_path / "saved")
    from safetensors.torch import load_file

    saved, before = (load_file(tmp_path / name / "optimizer.safetensors") for name in ("saved", "before"))
    assert float(saved["step"]) == 3 and not any(bool(value.any()) for value in before.values())
    assert {name: value.shape for name, value in before.items()} == {n: value.shape for n, value in saved.items()}
    _refuses(ports.learner, local_handles, cluster, found, tmp_path)


def _refuses(learner, local_handles, cluster, weights, folder):
    """Steps whose loss is not finite on one rank alone are left out on both, and nothing moves."""
    from dataclasses import replace

    from safetensors.torch import load_file

    poisoned = []
    for handle in local_handles:
        # In the second micro-batch of two in every step, so that the first has left its gradient.
        batch = poison(handle.payload, [3])
        poisoned.append(replace(handle, payload=(cluster.put(batch), cluster.put(batch.images_BCHW))))
    report = learner.train(poisoned, _task(poisoned))
    assert report.optim_steps == 0 and [one.step for one in report.refused] == [0, 1, 2]
    ids = _task(poisoned).sample_ids
    assert [one.sample_ids for one in report.refused] == [(ids[8 * step + 3], ids[8 * step + 7]) for step in range(3)]
    after = learner.export(2).tensors
    assert all(torch.equal(after[name], value) for name, value in weights.items())
    learner.save(folder / "refused")
    before, now = (load_file(folder / name / "optimizer.safetensors") for name in ("saved", "refused"))
    assert all(torch.equal(now[name], value) for name, value in before.items())
    # What was left out has left nothing behind.
    good = [replace(h, payload=(cluster.put(h.payload), cluster.put(h.payload.images_BCHW))) for h in local_handles]
    assert learner.train(good, _task(good)).optim_steps == 3
    assert not learner.train(poisoned, _task(poisoned)).too_many
    last = learner.train(poisoned, _task(poisoned))
    assert last.too_many and [one.step for one in last.refused] == [0]


def test_a_checkpoint_of_two_zero_3_ranks_goes_on_in_one_process_with_the_same_weights_and_moments(
    cluster, ports_of, tiny_module, one_process_weights, tmp_path
):
    from dataclasses import replace

    from acpo_dist.training.local import LocalLearner, LocalRewards, learner_spec

    local_handles, _, _ = one_process_weights
    ports = ports_of(tiny_module("learner.num_ranks=2", "learner.zero_stage=3"))
    ports.learner.start(None)
    handles = [replace(h, payload=(cluster.put(h.payload), cluster.put(h.payload.images_BCHW))) for h in local_handles]
    ports.learner.train(handles, _task(handles))
    ports.learner.save(tmp_path / "saved")
    ports.learner.train(handles, replace(_task(handles), iteration=1))
    expected = ports.learner.export(2).tensors
    config = tiny_module()
    alone = LocalLearner(learner_spec(config), LocalRewards(config, device="cpu"), device="cpu")
    alone.start(tmp_path / "saved")
    alone.train(local_handles, replace(_task(handles), iteration=1))
    found = alone.export(2).tensors
    error = sum(float((found[name] - value).square().sum()) for name, value in expected.items()) ** 0.5
    assert error <= 1e-4 * sum(float(value.square().sum()) for value in expected.values()) ** 0.5


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
    assert plan.total() == pytest.approx({"CPU": 0.2 + 3 * 0.1 + 4 * 0.1, "GPU": 1.5})
    assert shortfall(plan, {"CPU": 1.0, "GPU": 1.0}) == pytest.approx({"GPU": 0.5})
    assert shortfall(plan, {"CPU": 1.0, "GPU": 2.0}) == {}
