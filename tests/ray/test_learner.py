"""Two DeepSpeed ranks equal one process: every ZeRO stage, every algorithm, and across a checkpoint."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
from safetensors.torch import load_file
from torch import Tensor

from acpo_dist.core.registry import ALGORITHMS, resolve
from acpo_dist.core.types import Normaliser, RewardTerm, TrainTask
from acpo_dist.training.context import fixed_groups
from tests.conftest import TINY, poison

pytestmark = pytest.mark.ray
SMALL = [
    "rollout.cpus_per_worker=0.1", "rewards.cpus_per_replica=0.1", "learner.cpus_per_rank=0.2",
    "cluster.worker_timeout_s=900", "learner.micro_batch=2", "learner.learning_rate=1e-3", "rewards.judges=[]",
    "sampler.eta=1", "rollout.samples_per_prompt=4", "rollout.prompts_per_iteration=2", "learner.max_skipped_steps=1",
]  # fmt: skip
PROMPTS = ("a red circle on a white background", "a blue cross on a black background")
# DRaFT repeats the last sampler steps, which only deterministic ones allow; CRD compares the samples of a prompt.
NEEDS = {"draft": "draft sampler.eta=0", "crd": "crd learner.micro_batch=4"}
CASES = [*(NEEDS.get(name, name) for name in ALGORITHMS), "dpo algorithm.space=ncp"]


@pytest.fixture(scope="module")
def tiny_config(tmp_path_factory):
    """Load configs/toy_sdxl.yaml with a small network."""
    from acpo_dist.config.load import load_config
    from tests.helpers.models import small_sdxl

    path = small_sdxl(tmp_path_factory.mktemp("small"))
    return lambda *overrides: load_config("toy_sdxl", [*TINY, *SMALL, f"model.path={path}", *overrides])


@pytest.fixture(scope="module")
def two_ranks(tiny_config):
    return lambda stage, *overrides: tiny_config("learner.num_ranks=2", f"learner.zero_stage={stage}", *overrides)


@pytest.fixture(scope="module")
def ports(cluster, two_ranks):
    """Two learner ranks and a reward pool; tests load their models into the same actors, which start slowly."""
    from acpo_dist.tracking.composite import CompositeTracker
    from actors.launch import open_ports

    with open_ports(two_ranks(2), CompositeTracker([])) as opened:
        yield opened


@pytest.fixture(scope="module")
def rewards(tiny_config):
    from acpo_dist.training.local import LocalRewards

    return LocalRewards(tiny_config(), device="cpu")


@pytest.fixture(scope="module")
def drawn(tiny_config):
    """Three global batches of eight samples."""
    from acpo_dist.training.local import LocalRollouts

    config = tiny_config()
    return LocalRollouts(config, device="cpu").generate(fixed_groups(config, PROMPTS, 24, stream="test"))


def sent(cluster, handles, poisoned_row: int | None = None):
    """The same handles with their samples in the cluster's object store."""
    batches = [h.payload if poisoned_row is None else poison(h.payload, [poisoned_row]) for h in handles]
    return [
        replace(handle, payload=(cluster.put(batch), cluster.put(batch.images_BCHW)))
        for handle, batch in zip(handles, batches, strict=True)
    ]


def task_of(handles, *, first: int | None = None, constants: Mapping[str, float] | None = None) -> TrainTask:
    """Weights of both signs, as for advantages, or of pairs."""
    ids = tuple(sample_id for handle in handles for sample_id in handle.sample_ids)[:first]
    signs = {name: 1.0 if index % 4 < 2 else -0.5 for index, name in enumerate(ids)}
    return TrainTask(
        iteration=0, policy_version=0, sample_ids=ids, weights=signs, anchor_weight=2.0, constants=constants or {},
        # Not the configured rate: the loop sets it.
        learning_rate=5e-4,
        rewards=(RewardTerm(name="two_stream", weight=1.0, normaliser=Normaliser(mean=0.4, std=0.2, sign=1)),),
    )  # fmt: skip


@pytest.fixture(scope="module")
def one_process(rewards, tiny_config):
    from acpo_dist.training.local import LocalLearner, learner_spec

    def started(*overrides: str):
        learner = LocalLearner(learner_spec(tiny_config(*overrides)), rewards, device="cpu")
        learner.start(None)
        return learner

    return started


def distance(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Euclidean distance over all elements."""
    assert left.keys() == right.keys()
    return sum(float((left[name] - value).double().square().sum()) for name, value in right.items()) ** 0.5


def moments(learner, folder) -> dict[str, Tensor]:
    """Return the optimiser state of a checkpoint."""
    learner.save(folder)
    return load_file(folder / "optimizer.safetensors")


def gradients(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Running means of the clipped gradients: unlike Adam's update, these do not divide by a gradient's size."""
    return {name: value for name, value in state.items() if name.startswith("exp_avg.")}


@pytest.fixture(scope="module")
def expected(one_process, drawn, tmp_path_factory):
    """Run one process: weights before and after 1 + 3 optimiser steps, and the state after the first one."""
    learner, folder = one_process(), tmp_path_factory.mktemp("one_process")
    start = {name: value.clone() for name, value in learner.export(0).tensors.items()}
    learner.train(drawn, task_of(drawn, first=8))
    first = moments(learner, folder / "first")
    learner.train(drawn, task_of(drawn))
    return start, first, learner.export(1).tensors


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_on_two_ranks_takes_the_steps_of_one_process_which_continues_from_its_checkpoint(
    stage, cluster, ports, two_ranks, one_process, drawn, expected, tmp_path
):
    start, first, weights = expected
    learner = ports.learner
    learner.build(ports.reward, two_ranks(stage))
    learner.start(None)
    before = moments(learner, tmp_path / "before")
    assert not any(bool(value.any()) for value in before.values())
    handles = sent(cluster, drawn)
    assert learner.train(handles, task_of(handles, first=8)).optim_steps == 1
    found, zero = gradients(moments(learner, tmp_path / "first")), gradients(before)
    assert distance(found, gradients(first)) <= 1e-4 * distance(gradients(first), zero)
    assert learner.train(handles, task_of(handles)).optim_steps == 3
    after = learner.export(1).tensors
    moved = distance(weights, start)
    # Adam moves an element whose gradient is at float32's rounding by a full step of arbitrary sign.
    assert moved > 0 and distance(after, weights) <= 0.02 * moved, distance(after, weights)
    saved = moments(learner, tmp_path / "saved")
    assert float(saved["step"]) == 4
    assert {name: value.shape for name, value in before.items()} == {n: value.shape for n, value in saved.items()}
    again = replace(task_of(handles, first=8), iteration=1)
    learner.train(handles, again)
    continued = moments(learner, tmp_path / "two")
    alone = one_process()
    alone.start(tmp_path / "saved")
    alone.train(drawn, again)
    found, wanted = moments(alone, tmp_path / "one"), gradients(continued)
    assert float(found["step"]) == 5
    assert distance(gradients(found), wanted) <= 1e-4 * distance(wanted, gradients(saved))
    _skips_what_is_not_finite(learner, cluster, drawn, learner.export(1).tensors, continued, tmp_path)


def _skips_what_is_not_finite(learner, cluster, drawn, weights, saved, folder):
    """A loss that is not finite on one rank is skipped on both, and weights and moments stay."""
    # In the second micro-batch of two, so that the first has left its gradient.
    poisoned = sent(cluster, drawn, poisoned_row=3)
    step = task_of(poisoned, first=8)
    report = learner.train(poisoned, step)
    assert report.optim_steps == 0 and [one.step for one in report.skipped] == [0] and not report.too_many
    assert report.skipped[0].sample_ids == (step.sample_ids[3], step.sample_ids[7])
    assert distance(learner.export(2).tensors, weights) == 0
    assert distance(moments(learner, folder / "skipped"), saved) == 0
    # A skipped step leaves no gradient behind, and a good one resets the count of skipped ones.
    good = sent(cluster, drawn)
    assert learner.train(good, task_of(good, first=8)).optim_steps == 1
    assert not learner.train(poisoned, step).too_many
    last = learner.train(poisoned, task_of(poisoned))
    assert last.too_many and [one.step for one in last.skipped] == [0]


def test_every_algorithm_takes_the_same_steps_on_two_ranks_as_in_one_process(
    cluster, ports, two_ranks, tiny_config, one_process, drawn, tmp_path
):
    handles, of_one_step = sent(cluster, drawn), 8
    for case in CASES:
        name, *rest = case.split()
        overrides = (f"algorithm={{type: {name}}}", *rest)
        alone, section = one_process(*overrides), tiny_config(*overrides).algorithm
        algorithm = resolve("algorithm", ALGORITHMS, section.type)(section)
        constants = algorithm.calibrate(alone.observe(drawn))
        alone.train(drawn, task_of(drawn, first=of_one_step, constants=constants))
        ports.learner.build(ports.reward, two_ranks(2, *overrides))
        ports.learner.start(None)
        assert algorithm.calibrate(ports.learner.observe(handles)) == pytest.approx(constants, rel=1e-4), case
        report = ports.learner.train(handles, task_of(handles, first=of_one_step, constants=constants))
        assert report.optim_steps == 1, case
        folder = tmp_path / case
        found, wanted = (
            gradients(moments(one, folder / name)) for one, name in ((ports.learner, "two"), (alone, "one"))
        )
        size = distance(wanted, {name: value * 0 for name, value in wanted.items()})
        assert size > 0 and distance(found, wanted) <= 1e-4 * size, (case, distance(found, wanted), size)
