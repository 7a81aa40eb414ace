"""Workers that cannot load their model: the reason reaches the user, instead of a lack of machines."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from acpo_dist.config.plugins import MetricConfig
from acpo_dist.core.errors import (
    ConfigError,
    ModelError,
    RewardConfigError,
    WeightSyncError,
    WorkerLostError,
)
from acpo_dist.core.weights import make_bundle
from acpo_dist.models.family import trainable_tensors
from acpo_dist.rewards.statistics import Sharpness
from acpo_dist.training.context import fixed_groups
from acpo_dist.workers.rollout.worker import RolloutWorker
from tests.helpers.pools import until

pytestmark = pytest.mark.ray
pools = pytest.importorskip("actors.worker_pool", reason="needs the extra `ray`")
rollouts = pytest.importorskip("actors.rollout", reason="needs the extra `ray`")


def started(config):
    """Rollout workers of a configuration that are starting."""
    from actors.placement import plan_placement

    return rollouts.RayRollouts(config, plan_placement(config).role("rollout"))


def test_a_model_that_cannot_be_read_is_named_at_once_and_no_worker_is_started_again(cluster, tiny, tmp_path):
    config = tiny("cluster.worker_timeout_s=300")
    broken = config.model_copy(update={"model": config.model.model_copy(update={"path": str(tmp_path)})})
    pool = started(broken)
    try:
        with pytest.raises(ModelError, match=r"model\.path"):
            pool.nodes()
    finally:
        pool.close()


def test_a_schedule_without_a_late_step_is_an_error_of_the_configuration_on_a_cluster_too(cluster, tiny):
    config = tiny()
    none = config.model_copy(update={"sampler": config.sampler.model_copy(update={"t_max": 1e-6})})
    pool = started(none)
    try:
        with pytest.raises(ConfigError, match=r"sampler\.t_max"):
            pool.generate(fixed_groups(none, ["a red circle"], 1, stream="test"))
    finally:
        pool.close()


class Loads:
    """An actor that needs a file to start, like a worker that needs its model."""

    def __init__(self, file: Path) -> None:
        self._failed = None if file.exists() else pools.NotLoadedError(ModelError(f"{file} is gone"), f"{os.getpid()}")

    def ready(self):
        if self._failed is not None:
            raise self._failed
        return pools.Answer(str(os.getpid()), os.getpid())

    def work(self, index: int):
        self.ready()
        return pools.Answer(str(os.getpid()), index)

    def die(self) -> None:
        os._exit(1)


def test_a_worker_that_cannot_load_after_a_loss_is_excluded_and_the_last_one_raises_the_reason(cluster, tmp_path):
    files = {name: tmp_path / name for name in ("a", "b")}
    for file in files.values():
        file.touch()
    shell = cluster.remote(Loads).options(num_cpus=0.1, max_restarts=-1, max_task_retries=3)
    workers = pools.WorkerPool({name: shell.remote(file) for name, file in files.items()}, timeout_s=120, late_s=60,
                      ping=lambda actor: actor.ready.remote())  # fmt: skip
    pids = workers.ask(lambda actor: actor.ready.remote(), what="load", least=2)
    actors = dict(workers.actors)

    def lose(name: str) -> None:
        files[name].unlink()
        actors[name].die.options(max_task_retries=0).remote()
        until(lambda: not Path(f"/proc/{pids[name]}").exists())

    try:
        lose("a")
        done = workers.spread([str(index) for index in range(6)],
                           lambda actor, index: (actor.work.remote(index), None), what="work")  # fmt: skip
        assert [result for result, _ in done] == list(range(6))
        # It may still be on its way back when the other has done everything.
        until(lambda: workers.present() == ["b"] and list(workers.actors) == ["b"])
        lose("b")
        with pytest.raises(ModelError, match="b is gone"):
            workers.ask(lambda actor: actor.ready.remote(), what="load", least=1)
    finally:
        for actor in actors.values():
            cluster.kill(actor)


def test_weights_that_a_worker_takes_with_a_task_are_checked_as_published_ones_are(cluster, tiny):
    config = tiny()
    worker = RolloutWorker(config.model, config.sampler)
    # The shell without its process: what it does is asked in this one.
    actor = rollouts.RolloutActor.__new__(rollouts.RolloutActor)
    actor._failed, actor._loaded, actor._first = None, worker, worker.trajectory
    tensors = {name: value.detach().clone() for name, value in trainable_tensors(worker.family.network).items()}
    right = make_bundle(3, tensors)
    wrong = replace(right, version=4, checksum="0" * 64)
    actor._assume(rollouts.Policy(version=3, bundle=(cluster.put(right),)))
    assert worker.version == 3
    with pytest.raises(WeightSyncError, match="version 4"):
        actor._assume(rollouts.Policy(version=4, bundle=(cluster.put(wrong),)))


def test_a_metric_whose_weights_its_machine_lacks_is_named_without_three_tries(cluster, tiny, tmp_path):
    from actors.reward.pool import deploy

    config = tiny("rewards.cut=latent")
    (entry,) = config.rewards.train
    # The driver's own check is passed by; on a cluster its files are not those of the machine.
    absent = entry.model_copy(update={"weights": str(tmp_path / "absent.safetensors")})
    broken = config.model_copy(update={"rewards": config.rewards.model_copy(update={"train": (absent,)})})
    with pytest.raises(RewardConfigError, match=r"absent\.safetensors"):
        deploy(broken, "acpo-00000003")


class Fails(Sharpness):
    """A metric with an unexpected error."""

    class Config(MetricConfig):
        type: str = "tests.ray.test_loading:Fails"
        prefer: str = "more"

    def __init__(self, config, *, device="cpu"):
        raise ZeroDivisionError("the reason is here")


def test_a_metric_that_fails_in_a_way_of_its_own_is_reported_with_its_last_words(cluster, tiny):
    from actors.reward.pool import deploy

    config = tiny('rewards.train=[{"type": "tests.ray.test_loading:Fails", "name": "fails"}]', "rewards.cut=image")
    with pytest.raises(RewardConfigError, match=r"reward `fails` .*ZeroDivisionError: the reason is here"):
        deploy(config, "acpo-00000004")


class Stranger:
    """An actor that its machine cannot construct, as with another release of the code."""

    def __init__(self) -> None:
        raise TypeError("unexpected keyword argument `software`")

    def ready(self):
        return pools.Answer("never", None)


def test_workers_that_cannot_be_made_at_all_are_reported_with_their_last_words(cluster):
    shell = cluster.remote(Stranger).options(num_cpus=0.1)
    workers = pools.WorkerPool({"a": shell.remote()}, timeout_s=120, late_s=60, ping=lambda actor: actor.ready.remote())
    with pytest.raises(WorkerLostError, match=r"0 workers responded(?s:.*)a was lost: .*unexpected keyword argument"):
        workers.ask(lambda actor: actor.ready.remote(), what="load", least=1)
