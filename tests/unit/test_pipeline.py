"""Samples drawn ahead of the learner: which version draws them, what is dropped, and that each is used once."""

import shutil
import threading
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from acpo_dist.core.clock import PhaseClock, RoleClock
from acpo_dist.core.types import RolloutHandle
from acpo_dist.tracking.console import Console
from acpo_dist.training.context import RunContext, fixed_groups
from acpo_dist.training.local import LocalLearner, LocalRewards, LocalRollouts, learner_spec, open_ports
from acpo_dist.training.run import drive
from acpo_dist.training.samples import AheadSamples
from tests.helpers.config import refusal
from tests.helpers.runs import results

QUIET = Console(quiet=True)
SMALL = ["sampler.num_steps=4", "rollout.prompts_per_iteration=4", "learner.global_batch=4", "tracking.images_every=99"]
SCORES_ONLY = ["algorithm.type=ddpo", "sampler.eta=1.0", "rollout.samples_per_prompt=2", "learner.global_batch=8"]


class Pool:
    """Rollouts and rewards without a model; a drawing waits while `gate` is closed."""

    def __init__(self) -> None:
        self.schedule_id, self.drawn, self.published = "first", Counter(), []
        self.gate = threading.Event()
        self.gate.set()

    def trajectory(self):
        return SimpleNamespace(schedule_id=self.schedule_id)

    def publish(self, version):
        self.published.append(version)

    def generate(self, groups, advance, *, version):
        assert self.gate.wait(60)
        advance(0)
        ids = tuple(plan.sample_id for group in groups for plan in group.samples)
        self.drawn.update((name, version) for name in ids)
        return [
            RolloutHandle(
                sample_ids=ids, prompts=ids, policy_version=version, schedule_id=self.schedule_id, payload=None
            )
        ]  # fmt: skip

    def score(self, handles, names, advance):
        return {name: dict.fromkeys(handles[0].sample_ids, 0.5) for name in names}


@pytest.fixture
def ahead(tiny):
    """Samples drawn ahead from a pool without a model."""
    opened = []

    def make(*overrides: str) -> tuple[AheadSamples, Pool]:
        pool = Pool()
        ports = SimpleNamespace(rollout=pool, reward=pool, weights=pool)
        context = RunContext(config=tiny(*overrides), ports=ports, folder=None, prompts=("a", "b", "c"), console=QUIET)
        opened.append(AheadSamples(context, RoleClock()))
        return opened[-1], pool

    yield make
    for samples in opened:
        samples.close()


@pytest.mark.parametrize("bound", [1, 2])
def test_an_iteration_is_drawn_with_the_version_that_is_newest_when_the_request_is_made(bound, ahead):
    samples, _ = ahead(f"pipeline.max_staleness={bound}", "run.iterations=6")
    taken = [samples.take(version, version, PhaseClock()) for version in range(6)]
    assert [one.version for one in taken] == [max(0, iteration - bound) for iteration in range(6)]
    assert all(handle.policy_version == one.version for one in taken for handle in one.handles)
    assert samples.metrics() == {"pipeline/dropped": 0.0, "pipeline/discarded": 0.0}
    # The run ends: nothing is drawn that no iteration needs.
    assert samples.to_mapping()["in_flight"] == []


def test_the_next_iteration_is_drawn_while_the_learner_has_the_present_one(ahead):
    samples, pool = ahead("pipeline.max_staleness=1", "run.iterations=3")
    samples.take(0, 0, PhaseClock())
    samples.take(1, 1, PhaseClock())  # requests iteration 2 with version 1
    assert samples.take(2, 2, PhaseClock()).version == 1
    assert set(pool.drawn.values()) == {1}


def test_every_sample_is_drawn_and_then_taken_dropped_or_discarded(ahead):
    samples, pool = ahead("pipeline.max_staleness=2", "run.iterations=9")
    counted, taken = Counter(), []
    for iteration in range(6):
        if iteration == 3:
            pool.schedule_id = "second"
        for handle in samples.take(iteration, iteration, PhaseClock()).handles:
            taken += handle.sample_ids
        counted.update(samples.metrics())
    samples.discard()
    counted.update(samples.metrics())
    samples.close()
    assert len(taken) == len(set(taken)) == 6 * 8
    # Iterations 3 and 4 were in flight when the trajectory changed, 6 and 7 at the end.
    assert counted == {"pipeline/dropped": 16.0, "pipeline/discarded": 16.0}
    assert {name for name, _ in pool.drawn} >= set(taken)
    assert pool.drawn.total() <= 6 * 8 + 16 + 16


def test_samples_older_than_the_bound_are_dropped_and_drawn_with_the_newest_version(ahead):
    samples, pool = ahead("pipeline.max_staleness=1", "run.iterations=6")
    samples.restore({"in_flight": [[4, 1], [5, 4]], "dropped": 0})
    assert pool.published == [1, 4]
    found = samples.take(4, 4, PhaseClock())
    assert found.version == 4 and samples.metrics()["pipeline/dropped"] == 8
    assert samples.take(5, 5, PhaseClock()).version == 4


def test_samples_in_flight_are_drawn_again_with_their_recorded_version(ahead):
    samples, _ = ahead("pipeline.max_staleness=2", "run.iterations=9")
    for version in range(4):
        samples.take(version, version, PhaseClock())
    state = samples.to_mapping()
    assert state == {"in_flight": [[4, 2], [5, 3]], "dropped": 0}
    again, pool = ahead("pipeline.max_staleness=2", "run.iterations=9")
    again.restore(state)
    assert pool.published == [2, 3]
    assert [again.take(at, at, PhaseClock()).version for at in (4, 5, 6)] == [2, 3, 4]


def test_an_error_while_drawing_ahead_reaches_the_driver_when_it_takes_the_samples(ahead):
    samples, pool = ahead("pipeline.max_staleness=1", "run.iterations=4")
    samples.take(0, 0, PhaseClock())
    pool.gate.clear()
    samples.restore({"in_flight": [[3, 0]]})
    pool.score = None
    pool.gate.set()
    with pytest.raises(TypeError):
        samples.take(3, 1, PhaseClock())


def test_closing_ends_a_drawing_after_its_chunk(ahead):
    samples, pool = ahead("pipeline.max_staleness=2", "run.iterations=9")
    samples.take(0, 0, PhaseClock())
    pool.gate.clear()
    closing = threading.Thread(target=samples.close)
    samples.restore({"in_flight": [[7, 0], [8, 0]]})
    closing.start()
    pool.gate.set()
    closing.join(60)
    assert not closing.is_alive()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rollout_") and thread.is_alive()]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["pipeline.max_staleness=3"], "pipeline.max_staleness"),
        (["pipeline.max_staleness=1", "algorithm.type=dpo", "data.pairs=pairs.parquet"], "data.pairs"),
        (["pipeline.max_staleness=1", "algorithm.type=ddpo", "sampler.eta=1", "rollout.samples_per_prompt=2",
          "cluster.backend=ray", "learner.zero_stage=3"], "learner.zero_stage is 3"),
    ],
)  # fmt: skip
def test_a_staleness_that_cannot_be_kept_is_refused(overrides, words):
    assert words in refusal("toy_sdxl", *overrides)


def recording(seen):
    """In-process ports that note which samples are drawn, by version, and which are trained."""

    @contextmanager
    def opened(config, tracker):
        with open_ports(config, tracker) as ports:
            generate, train = ports.rollout.generate, ports.learner.train

            def generated(groups, advance=None, *, version=None):
                handles = generate(groups, advance, version=version)
                if version is not None:
                    seen["drawn"] += [(name, h.policy_version) for h in handles for name in h.sample_ids]
                return handles

            def trained(handles, task, advance=None):
                seen["trained"] += task.sample_ids
                return train(handles, task, advance)

            ports.rollout.generate, ports.learner.train = generated, trained
            yield ports

    return opened


@pytest.mark.parametrize(
    ("bound", "how"),
    [
        (1, []),
        pytest.param(2, SCORES_ONLY, marks=pytest.mark.slow),
        pytest.param(1, [*SCORES_ONLY[2:], "algorithm.type=nft"], marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_run_killed_with_samples_in_flight_resumes_bit_for_bit_and_uses_each_sample_once(bound, how, tiny, tmp_path):
    def config(root):
        return tiny(
            *SMALL, f"pipeline.max_staleness={bound}", "run.iterations=4", "checkpoint.every=1", "checkpoint.keep=9",
            f"run.dir={root}", *how,
        )  # fmt: skip

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    seen = {"drawn": [], "trained": []}
    drive(config(whole), recording(seen), QUIET)
    assert Counter(name for name, _ in seen["drawn"]) == Counter(seen["trained"])
    assert set(Counter(seen["trained"]).values()) == {1}
    drew = {int(name[:6]): version for name, version in seen["drawn"]}
    assert drew == {iteration: max(0, iteration - bound) for iteration in range(4)}
    rows = results(whole)
    assert [row["pipeline/staleness"] for row in rows[:4]] == [float(min(bound, i)) for i in range(4)]
    shutil.copytree(whole, parts)
    for iteration in (3, 4):
        shutil.rmtree(parts / f"checkpoints/{iteration:06d}")
    again = {"drawn": [], "trained": []}
    drive(config(parts), recording(again), QUIET, resume="auto")
    assert results(parts) == rows
    assert set(again["drawn"]) == {pair for pair in seen["drawn"] if int(pair[0][:6]) >= 2}
    files = [load_file(root / "checkpoints/000004/learner/policy.safetensors") for root in (whole, parts)]
    assert all(torch.equal(value, files[1][name]) for name, value in files[0].items())


@pytest.mark.parametrize("how", [SCORES_ONLY, [*SCORES_ONLY[2:], "algorithm.type=nft"]], ids=["ddpo", "nft"])
def test_ratios_and_the_sampling_policy_are_those_of_the_version_that_drew(how, tiny, monkeypatch):
    from tests.unit.test_skipped_steps import PROMPTS, task_of

    config = tiny(*SMALL, *how, "pipeline.max_staleness=1")
    handles = LocalRollouts(config, device="cpu").generate(fixed_groups(config, PROMPTS, 8, stream="test"))
    learner = LocalLearner(learner_spec(config), LocalRewards(config, device="cpu"), device="cpu")
    learner.start(None)
    network, used = learner.worker.network, []
    predict = network.predict

    def noted(*arguments):
        if network.old_weights is not None:
            used.append(network.old_weights)
        return predict(*arguments)

    monkeypatch.setattr(network, "predict", noted)
    first = learner.export(0).tensors
    ids = [name for handle in handles for name in handle.sample_ids]
    task = replace(task_of(ids), learning_rate=1e-2)
    learner.train(handles, task)
    used.clear()
    learner.train(handles, replace(task, iteration=1, staleness=1))
    assert used and all(torch.equal(value, used[0][name].float()) for name, value in first.items())
    # Samples in flight may be drawn again with the version before the present one.
    second = learner.export(1).tensors
    assert not any(torch.equal(value, second[name]) for name, value in first.items() if "lora_B" in name)
