"""Samples drawn ahead on Ray: the metrics of one process, also when a rollout worker is killed while it draws ahead."""

import os
import signal
from contextlib import contextmanager

import pytest

from acpo_dist.tracking.console import Console
from acpo_dist.training.run import drive
from tests.helpers.runs import results

pytestmark = pytest.mark.ray
QUIET = Console(quiet=True)
AHEAD = [
    "pipeline.max_staleness=1", "run.iterations=3", "sampler.num_steps=4", "tracking.images_every=9",
    "rollout.cpus_per_worker=0.1", "rewards.cpus_per_replica=0.1", "learner.cpus_per_rank=0.2",
    "cluster.worker_timeout_s=900", "rewards.judges=[]",
]  # fmt: skip


def test_a_rollout_worker_killed_while_it_draws_ahead_changes_no_metric_and_loses_no_sample(cluster, tiny, tmp_path):
    from acpo_dist.training.local import open_ports as local_ports
    from actors.launch import open_ports as ray_ports

    seen = {"killed": [], "trained": [], "redone": 0}

    @contextmanager
    def killing(config, tracker):
        with ray_ports(config, tracker) as ports:
            workers, train = ports.rollout.await_ready(), ports.learner.train

            def trained(handles, task, advance=None):
                # The next iteration's samples are being drawn now.
                if task.iteration == 1:
                    seen["killed"].append(workers["rollout/0"])
                    os.kill(workers["rollout/0"], signal.SIGKILL)
                seen["trained"] += task.sample_ids
                return train(handles, task, advance)

            ports.learner.train = trained
            yield ports

    for name, ports, extra in (("local", local_ports, []), ("ray", killing, ["rollout.num_workers=2"])):
        drive(tiny(*AHEAD, f"run.dir={tmp_path / name}", *extra), ports, QUIET)
    assert seen["killed"] and len(seen["trained"]) == len(set(seen["trained"])) == 3 * 8
    for mine, theirs in zip(*(results(tmp_path / name) for name in ("local", "ray")), strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            assert theirs[name] == pytest.approx(value, rel=2e-3, abs=5e-4), (mine["iteration"], name)
