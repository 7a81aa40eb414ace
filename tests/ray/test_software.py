"""A machine with other code or libraries than the driver is rejected by name before it draws, scores or learns."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from acpo_dist.core.errors import SoftwareError

pytest.importorskip("ray", reason="needs the extra `ray`")
from actors import learner, rollout
from actors import worker_pool as workers
from actors.cluster import software as module
from actors.cluster.software import Software, differences, software
from actors.reward import pool as reward
from tests.ray.test_loading import started

ROOT = Path(module.__file__).resolve().parents[2]
ELSEWHERE = replace(software(), code="another")


def _digest(root: Path) -> str:
    program = "from actors.cluster.software import software; print(software().code)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, env={"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip()


def test_the_digest_tells_one_changed_line_and_not_where_the_code_lies(tmp_path):
    # Source files alone: a checkout may hold links, environments and caches beside them.
    for name in ("acpo_dist", "actors"):
        for path in (ROOT / name).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                copy = tmp_path / path.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())
    assert _digest(tmp_path) == software().code
    with (tmp_path / "acpo_dist" / "objective" / "anchor.py").open("a") as file:
        file.write("# another line\n")
    assert _digest(tmp_path) != software().code


def test_another_version_is_a_difference_and_another_build_or_a_missing_extra_is_none():
    mine = Software("a", {"torch": "2.15.0", "pyiqa": "0.1.16", "numpy": "2.4.6"})
    assert differences(mine, Software("a", {"torch": "2.15.0", "numpy": "2.4.6", "deepspeed": "0.19.8"})) == []
    assert differences(mine, Software("b", {"torch": "2.14.0"})) == [
        "acpo_dist has other code (b, not a)", "torch is 2.14.0, not 2.15.0",
    ]  # fmt: skip
    # The build is cut off where versions are read.
    assert all("+" not in version for version in software().packages.values())


@pytest.mark.ray
def test_rollout_workers_with_other_code_than_the_driver_end_the_start_of_a_run(cluster, tiny, monkeypatch):
    monkeypatch.setattr(rollout, "software", lambda: ELSEWHERE)
    pool = started(tiny())
    try:
        with pytest.raises(SoftwareError, match=rf"other code \({software().code}, not another\).*mixed_software"):
            pool.await_ready()
    finally:
        pool.close()


@pytest.mark.ray
def test_replicas_with_other_code_than_the_driver_end_the_start_of_a_run(cluster, tiny, monkeypatch):
    monkeypatch.setattr(reward, "software", lambda: ELSEWHERE)
    with pytest.raises(SoftwareError, match=r"other code"):
        reward.deploy(tiny("rewards.cut=image", "rewards.judges=[]"), "acpo-00000005")


def test_a_learner_rank_with_other_code_than_the_driver_loads_nothing():
    rank = learner.LearnerActor.__new__(learner.LearnerActor)
    with pytest.raises(SoftwareError, match=r"other code"):
        rank.build(("127.0.0.1", 1), None, None, ELSEWHERE)  # pyright: ignore[reportArgumentType]


@pytest.mark.ray
def test_mixed_software_takes_them_all_the_same(ports_of, tiny, monkeypatch):
    for role in (rollout, learner, reward):
        monkeypatch.setattr(role, "software", lambda: ELSEWHERE)
    ports_of(tiny("cluster.mixed_software=true", "rewards.judges=[]"))


class Machine:
    """An actor on a machine that has the driver's software or not."""

    def __init__(self, expected: Software, name: str) -> None:
        self._name, self._failed = name, None
        try:
            module.require_same(expected)
        except SoftwareError as error:
            self._failed = workers.NotLoadedError(error, name)

    def ready(self, wait):
        if self._failed is not None:
            raise self._failed
        return workers.Answer(self._name, self._name)


@pytest.mark.ray
def test_a_machine_with_other_software_that_joins_later_is_not_used_and_the_run_continues(cluster, caplog):
    gate = cluster.remote(lambda: None).options(num_cpus=0.1)
    shell = cluster.remote(Machine).options(num_cpus=0.1)
    actors = {"here": shell.remote(software(), "here"), "late": shell.remote(ELSEWHERE, "late")}
    pool = workers.WorkerPool(actors, timeout_s=60, late_s=0, ping=lambda actor: actor.ready.remote(None))
    # `late` has not answered when the run begins with one worker.
    pool._away[actors["late"].ready.remote(gate.remote())] = "late"
    assert pool.ask(lambda actor: actor.ready.remote(None), what="start", least=1) == {"here": "here"}
    while pool._away:
        cluster.wait(list(pool._away), num_returns=1, timeout=300)
        assert pool.present() == ["here"]
    assert list(pool.actors) == ["here"] and "cluster.mixed_software" in caplog.text
