"""Samples drawn ahead on Ray, with a process of each role killed: metrics and samples of an undisturbed run."""

import os
import signal
import subprocess
from collections.abc import Collection

import pytest

from acpo_dist.config.load import dump, load_config
from acpo_dist.tracking.console import Console
from acpo_dist.training.run import drive
from tests.conftest import TINY
from tests.helpers.ahead import LOST_IN, account, recording
from tests.helpers.forked import module
from tests.helpers.runs import results

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]
QUIET = Console(quiet=True)
ITERATIONS, SAMPLES = 3, 8
AHEAD = [
    *TINY, "pipeline.max_staleness=1", f"run.iterations={ITERATIONS}", "sampler.num_steps=4", "checkpoint.every=9",
    "tracking.images_every=9", "rollout.cpus_per_worker=0.1", "rewards.cpus_per_replica=0.1",
    "learner.cpus_per_rank=0.2", "cluster.worker_timeout_s=900", "rewards.judges=[]",
]  # fmt: skip


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """Metrics, drawn chunks and updates of the run in one process without a fault."""
    from acpo_dist.training.local import open_ports

    folder = tmp_path_factory.mktemp("calm")
    config = load_config("toy_sdxl", [*AHEAD, f"run.dir={folder / 'run'}"])
    drive(config, recording(open_ports, folder / "record.jsonl"), QUIET)
    drawn, trained = account(folder / "record.jsonl")
    assert [iteration for iteration, _ in trained] == list(range(ITERATIONS))
    return results(folder / "run"), drawn, trained


def kill(pid: int) -> None:
    """End a process at once."""
    os.kill(pid, signal.SIGKILL)


def kill_worker_and_replica(ports) -> None:
    """Kill the worker that draws the next iteration, and a replica, which scores it."""
    kill(ports.rollout.await_ready()["rollout/0"])
    kill(ports.reward.vitals()["two_stream"][0]["pid"])


def kill_rank(ports) -> None:
    """Kill the learner, whose finished update is lost with it."""
    import ray

    kill(ray.get(ports.learner.actors["learner/0"].__ray_call__.remote(lambda _: os.getpid())))


@pytest.mark.parametrize("lose", [kill_worker_and_replica, kill_rank])
def test_processes_killed_while_samples_are_drawn_ahead_change_no_metric_and_lose_no_sample(
    lose, calm, cluster, tmp_path
):
    from actors.launch import open_ports

    config = load_config("toy_sdxl", [*AHEAD, f"run.dir={tmp_path / 'run'}"])
    drive(config, recording(open_ports, tmp_path / "record.jsonl", lose), QUIET)
    require_equal(calm, tmp_path, repeated=[LOST_IN] if lose is kill_rank else [])
    # A lost rank costs the iteration under way, also between checkpoints: its former state was kept, and is one now.
    saved = {path.name for path in (tmp_path / "run/checkpoints").iterdir()}
    assert saved == {f"{ITERATIONS:06d}", *([f"{LOST_IN:06d}"] if lose is kill_rank else [])}


def test_a_killed_driver_that_drew_ahead_continues_with_the_same_samples_and_metrics(calm, cluster, forks, tmp_path):
    from actors.launch import open_ports

    config = load_config("toy_sdxl", [*AHEAD, "checkpoint.every=1", f"run.dir={tmp_path / 'run'}"])
    (tmp_path / "given.yaml").write_text(dump(config))
    program = module(forks[0], tmp_path, "tests.helpers.ahead")
    done = subprocess.run(
        [*program, str(tmp_path / "given.yaml"), str(tmp_path / "record.jsonl")],
        env={**os.environ, "RAY_ADDRESS": cluster.get_runtime_context().gcs_address}, capture_output=True,
        text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr[-4000:]
    drive(config, recording(open_ports, tmp_path / "record.jsonl"), QUIET, resume="auto")
    # The best checkpoint is one of those that were saved, and only this run saves every iteration.
    require_equal(calm, tmp_path, repeated=[LOST_IN], other={"guard/best_iteration"})


def require_equal(calm, folder, *, repeated: list[int], other: Collection[str] = ()) -> None:
    """Compare metrics to rounding and account for samples: each is in one update, and one that was lost is repeated."""
    metrics, drawn, trained = calm
    found_drawn, found_trained = account(folder / "record.jsonl")
    assert found_drawn == drawn
    # The lost update changed no weight that is left; the one that replaces it has the same samples.
    assert found_trained == sorted(trained + [trained[iteration] for iteration in repeated])
    kept = dict(found_trained)
    ids = [name for update in kept.values() for name in update]
    assert len(ids) == len(set(ids)) == ITERATIONS * SAMPLES
    for mine, theirs in zip(metrics, results(folder / "run"), strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() - set(other):
            # One process and Ray sum float32 in another order.
            assert theirs[name] == pytest.approx(mine[name], rel=2e-3, abs=5e-4), (mine["iteration"], name)
