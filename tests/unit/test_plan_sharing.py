"""`acpo plan` adds up the memory of workers that share a device, and compares splits of the devices."""

import pytest

from acpo_dist.config.load import load_config
from acpo_dist.preflight.plan.balance import splits
from acpo_dist.preflight.plan.rates import CONTEXT_GIB
from tests.helpers.plans import planned


def ray_plan(*overrides: str):
    return planned("toy_sdxl", "cluster.backend=ray", *overrides, device="rtx4090")


def test_workers_that_share_a_gpu_need_their_memory_on_it_together():
    whole, half = (
        ray_plan("rollout.num_workers=3", "learner.gpus_per_rank=1", f"rollout.gpus_per_worker={share}")
        for share in (1, 0.5)
    )
    role = whole.roles["rollout"].total + CONTEXT_GIB
    assert whole.needed_gib["rollout"] == pytest.approx(role) and half.needed_gib["rollout"] == pytest.approx(2 * role)
    # Three workers on two GPUs draw as fast as two.
    assert half.seconds["rollout"] == pytest.approx(1.5 * whole.seconds["rollout"])


def test_the_pool_of_a_metric_counts_in_the_plan():
    plain = ray_plan("rewards.replicas=2", "rewards.gpus_per_replica=1")
    pooled = ray_plan("rewards.pool={two_stream: {replicas: 8, gpus: 0.125}}")
    # The judge keeps its one replica.
    assert plain.workers["reward"] == 4 and pooled.workers["reward"] == 9
    one = plain.roles["reward"].total + CONTEXT_GIB
    assert plain.needed_gib["reward"] == pytest.approx(one) and pooled.needed_gib["reward"] == pytest.approx(8 * one)
    # Eight eighths of a GPU are one GPU.
    assert pooled.seconds["reward"] == pytest.approx(2 * plain.seconds["reward"])


def test_workers_of_several_roles_on_one_gpu_are_added_up():
    third = ["rollout.gpus_per_worker", "learner.gpus_per_rank", "rewards.gpus_per_replica"]
    apart = ray_plan(*(f"{key}=1" for key in third))
    assert set(apart.needed_gib) == {"rollout", "learner", "reward"}
    shared = ray_plan(*(f"{key}=0.25" for key in third))
    # Four workers: the judge's replica holds no decoder.
    assert shared.needed_gib["shared"] == pytest.approx(sum(apart.needed_gib.values()) + CONTEXT_GIB)
    assert set(planned("toy_sdxl", device="rtx4090").needed_gib) == {"all"}


def test_the_best_split_gives_each_role_gpus_in_proportion_to_its_work():
    seconds, devices = {"rollout": 12.0, "reward": 2.0, "learner": 2.0}, {"rollout": 2, "reward": 1, "learner": 5}
    config = load_config("toy_sdxl", ["learner.micro_batch=1", "learner.global_batch=32"])
    found = splits(config, seconds, devices)
    assert found["configured"].devices == devices and found["configured"].seconds == pytest.approx(16)
    # 24, 2 and 10 device seconds; the number of ranks divides 32 micro-batches.
    assert found["overlapped"].devices == {"rollout": 4, "reward": 2, "learner": 2}
    assert found["overlapped"].seconds == pytest.approx(6)
    assert found["overlapped"].idle == pytest.approx(1 - 36 / (8 * 6))
    assert found["synchronous"].seconds <= 16
    assert all(sum(split.devices.values()) == 8 for split in found.values())


def test_roles_that_overlap_in_one_process_need_their_memory_together():
    turns, overlapped = (planned("toy_sdxl", f"pipeline.max_staleness={n}", device="rtx4090") for n in (0, 1))
    least = min(overlapped.roles["rollout"].activations, overlapped.roles["learner"].activations)
    assert overlapped.needed_gib["all"] >= turns.needed_gib["all"] + 0.9 * least
    # On one device drawing ahead saves no time.
    assert overlapped.seconds_per_iteration == turns.seconds_per_iteration == sum(turns.seconds.values())
