"""A pool with more requests than it can compute soon, and pools whose run dies before it can end them."""

import contextlib
import json
import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from acpo_dist.core.errors import RewardError
from tests.helpers.forked import driver
from tests.helpers.pools import EndlessLoad, acpo, handle_of, images, until

pytestmark = pytest.mark.ray

SLOW = "slow"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def slow(pool_of, tmp_path_factory):
    """One slow replica; five requests at once exceed the time of one attempt."""
    metric = {"type": "tests.helpers.misbehaving:Misbehaving", "name": SLOW, "seconds": 0.6,
              "folder": str(tmp_path_factory.mktemp("none"))}  # fmt: skip
    return pool_of(
        "acpo-00000003",
        {
            "train": [metric], "judges": [], "cut": "image", "replicas": 1, "cpus_per_replica": 0.1,
            "attempt_timeout_s": 1.5, "deadline_s": 4, "pool": {SLOW: {"max_batch": 1}},
        },
    )  # fmt: skip


def test_a_queue_longer_than_the_deadline_is_worked_off_without_asking_anything_twice(cluster, slow):
    load = [handle_of(cluster, index, images(index, 1)) for index in range(9)]
    before = slow.counters()
    assert len(slow.score(load, [SLOW])[SLOW]) == len(load)
    after = slow.counters()
    assert after["reward_pool/retries"] == before["reward_pool/retries"]
    assert after["reward_pool/unanswered"] == 0


def test_a_first_look_at_replicas_that_are_idle_is_no_sign_that_they_get_on(cluster, slow):
    from actors.reward.liveness import Liveness

    slow.score([handle_of(cluster, 0, images(0, 1))], [SLOW])
    liveness = Liveness(slow.client.handle(SLOW), slow.link.applications[SLOW])
    asked = time.monotonic()
    assert liveness.check()
    assert liveness.heard < asked


def test_several_processes_that_share_a_replica_wait_for_one_another_without_asking_twice(cluster, slow):
    @cluster.remote(num_cpus=0.1)
    def rank(link, first: int) -> int:
        import ray

        from actors.reward.client import RewardClient

        client = RewardClient(link)
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda index: client.score(SLOW, ray.put(images(first + index, 1)), [""]), range(4)))
        return client.retries

    assert cluster.get([rank.remote(slow.link, 4 * index) for index in range(2)]) == [0, 0]


def test_a_request_that_no_replica_can_score_is_not_taken_for_a_pool_that_does_not_answer(cluster, slow):
    from actors.reward.client import NoAnswerError

    with pytest.raises(RewardError, match=r"needs images of at least 3 x 3, found 2 x 2") as found:
        slow.score([handle_of(cluster, 0, images(0, 1, size=2))], [SLOW])
    assert not isinstance(found.value, NoAnswerError)


RUN = """
import json, signal, sys
# A shell starts what it runs in the background with this signal ignored, the tests too.
signal.signal(signal.SIGINT, signal.default_int_handler)
from acpo_dist.config.load import load_config
from actors.cluster.connect import join
from actors.reward.pool import deploy

join(sys.argv[1])
deploy(load_config("toy_sdxl", json.loads(sys.argv[2])), sys.argv[3])
"""


@contextlib.contextmanager
def another_run(cluster, python: str, name: str, folder: Path):
    """Start a process with a pool whose metric loads very slowly; returns once Serve has the application."""
    from ray import serve

    folder.mkdir()
    slow = {"type": "tests.helpers.misbehaving:Misbehaving", "name": SLOW, "folder": str(folder)}
    metric = {**slow, "start_seconds": 600}
    overrides = [f"rewards.train={json.dumps([metric])}", "rewards.judges=[]", "rewards.cut=image",
                 "rewards.cpus_per_replica=0.1"]  # fmt: skip
    address = cluster.get_runtime_context().gcs_address
    process = subprocess.Popen([*driver(python, folder, RUN), address, json.dumps(overrides), name], cwd=ROOT)
    try:
        until(lambda: f"{name}-{SLOW}" in serve.status().applications)
        yield process
    finally:
        process.kill()
        process.wait()


def test_runs_that_are_interrupted_while_their_pools_start_leave_no_application(cluster, forks, slow, tmp_path):
    from ray import serve

    signals = {"acpo-00000004": signal.SIGTERM, "acpo-00000006": signal.SIGINT}
    with contextlib.ExitStack() as stack:
        runs = {name: stack.enter_context(another_run(cluster, forks[0], name, tmp_path / name)) for name in signals}
        for name, number in signals.items():
            runs[name].send_signal(number)
        for process in runs.values():
            process.wait(timeout=600)
        until(lambda: not {f"{name}-{SLOW}" for name in signals} & serve.status().applications.keys())
    assert f"acpo-00000003-{SLOW}" in serve.status().applications


def test_what_a_run_that_was_killed_has_left_is_ended_by_the_next_one_and_pools_of_live_runs_stay(
    cluster, forks, slow, tmp_path
):
    from ray import serve

    from actors.cluster.orphans import orphans
    from actors.reward.pool import end_orphans

    with another_run(cluster, forks[0], "acpo-00000005", tmp_path / "run") as process:
        assert orphans() == []
        os.kill(process.pid, signal.SIGKILL)
        until(lambda: orphans() == [f"acpo-00000005-{SLOW}"])
        end_orphans()
        until(lambda: f"acpo-00000005-{SLOW}" not in serve.status().applications)
    assert f"acpo-00000003-{SLOW}" in serve.status().applications
    assert slow.vitals()[SLOW]


def test_a_metric_with_bounds_gets_replicas_while_requests_wait(cluster, slow):
    run = ("--run", "acpo-00000003")
    acpo("rewards", "scale", SLOW, "1:2", *run)
    (status,) = [pool for pool in acpo("rewards", "status", *run)["pools"] if pool["metric"] == SLOW]
    assert (status["min_replicas"], status["max_replicas"]) == (1, 2)
    load = [handle_of(cluster, index, images(index, 1)) for index in range(6)]
    with contextlib.closing(EndlessLoad(slow, load, SLOW)):
        until(lambda: len(slow.vitals()[SLOW]) == 2, within_s=600)
    acpo("rewards", "scale", SLOW, "1", *run)
