"""SIGTERM on Ray, whose own handler would abort the process."""

import signal

import pytest

from acpo_dist.training.run_lock import LOCK_FILE
from tests.helpers.interrupted import interrupted_by, started

pytestmark = pytest.mark.ray


def test_a_run_on_ray_that_is_terminated_ends_in_order(forks, tmp_path):
    pytest.importorskip("ray", reason="needs the extra `ray`")
    small = ["cluster.backend=ray", "rollout.cpus_per_worker=0.1", "rewards.judges=[]"]
    process = started(tmp_path / "run", *small, python=forks[0])
    said = interrupted_by(signal.SIGTERM, tmp_path / "run", process)
    assert process.returncode == 143, said
    assert "terminated; continue with" in said and "SIGTERM received" not in said
    assert not (tmp_path / "run" / LOCK_FILE).exists()
