"""Every algorithm on two ZeRO ranks takes the steps that it takes in one process."""

from dataclasses import replace

import pytest

from acpo_dist.core.registry import ALGORITHMS
from acpo_dist.core.types import Normaliser, RewardTerm, TrainTask
from acpo_dist.training.context import fixed_groups

pytestmark = pytest.mark.ray
SMALL = [
    "rollout.cpus_per_worker=0.1", "rewards.cpus_per_replica=0.1", "learner.cpus_per_rank=0.2",
    "cluster.worker_timeout_s=240", "learner.micro_batch=2", "learner.learning_rate=1e-3", "rewards.judges=[]",
    "rollout.samples_per_prompt=4", "rollout.prompts_per_iteration=2",
]  # fmt: skip
CASES = [*ALGORITHMS, "dpo algorithm.space=ncp"]


def _config(tiny, case: str, *more: str):
    name, *rest = case.split()
    return tiny(f"algorithm={{type: {name}}}", "sampler.eta=1", *SMALL, *rest, *more)


def _task(handles, constants) -> TrainTask:
    """Weights of both signs, as advantages have them; pairs count or do not."""
    ids = tuple(sample_id for handle in handles for sample_id in handle.sample_ids)
    signs = {name: 1.0 if index % 4 < 2 else -0.5 for index, name in enumerate(ids)}
    return TrainTask(
        iteration=0, policy_version=0, sample_ids=ids, weights=signs, anchor_weight=2.0, constants=constants,
        # Not the configured rate: it is the driver that says.
        learning_rate=5e-4,
        rewards=(RewardTerm(name="two_stream", weight=1.0, normaliser=Normaliser(mean=0.4, std=0.2, sign=1)),),
    )  # fmt: skip


def test_every_algorithm_takes_the_same_steps_on_two_ranks_as_in_one_process(cluster, ports_of, tiny):
    from acpo_dist.training.local import LocalLearner, LocalRewards, LocalRollouts, learner_spec

    ports = ports_of(_config(tiny, "acpo", "learner.num_ranks=2", "learner.zero_stage=2"))
    local = _config(tiny, "acpo")
    rewards, rollouts = LocalRewards(local, device="cpu"), LocalRollouts(local, device="cpu")
    groups = fixed_groups(local, ("a red circle on a white background", "a blue cross on a black background"), 16,
                          stream="test")  # fmt: skip
    drawn = rollouts.generate(groups)
    sent = [replace(h, payload=(cluster.put(h.payload), cluster.put(h.payload.images_BCHW))) for h in drawn]
    for case in CASES:
        alone = LocalLearner(learner_spec(_config(tiny, case)), rewards, device="cpu")
        alone.start(None)
        start = {name: value.clone() for name, value in alone.export(0).tensors.items()}
        algorithm, observed = alone.worker._algorithm, alone.observe(drawn)
        constants = algorithm.calibrate(observed)
        alone.train(drawn, _task(drawn, constants))
        expected = alone.export(1).tensors
        # The same two actors load the next algorithm: a gang per algorithm would take minutes to start.
        ports.learner._config = _config(tiny, case, "learner.num_ranks=2", "learner.zero_stage=2")
        ports.learner.build(ports.reward)
        ports.learner.start(None)
        assert algorithm.calibrate(ports.learner.observe(sent)) == pytest.approx(constants, rel=1e-4), case
        report = ports.learner.train(sent, _task(sent, constants))
        assert report.optim_steps == 2, case
        found = ports.learner.export(1).tensors
        # Over all elements, as in test_cluster: single ones may get an Adam update of arbitrary sign.
        error = sum(float((found[name] - value).square().sum()) for name, value in expected.items()) ** 0.5
        moved = sum(float((value - start[name]).square().sum()) for name, value in expected.items()) ** 0.5
        assert moved > 0, case
        assert error <= 0.02 * moved, (case, error, moved)
