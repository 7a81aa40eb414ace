"""No secret of the environment is left by a run on Ray with an HTTP endpoint: not by its workers either."""

import os
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.conftest import TINY
from tests.helpers.forked import acpo
from tests.helpers.secrets import PLANTED, SECRETS, files_with

pytest.importorskip("ray", reason="needs the extra `ray`")
pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]

RUN = [
    *TINY, "run.iterations=1", "cluster.backend=ray", "rewards.http.enabled=true", "rewards.http.port=0",
    "tracking.mlflow=true", "rollout.cpus_per_worker=0.1", "rewards.cpus_per_replica=0.1", "learner.cpus_per_rank=0.2",
]  # fmt: skip


def test_no_secret_reaches_the_output_the_run_folder_or_the_logs_of_ray(forks, tmp_path):
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # The length of socket paths is limited.
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as session:
        variables |= {**SECRETS, "RAY_TMPDIR": session, "RAY_AUTH_MODE": "token", "RAY_worker_niceness": "0"}
        done = subprocess.run(
            [*acpo(forks[0], tmp_path), "train", "toy_sdxl", "--json", *RUN, f"run.dir={tmp_path / 'run'}"],
            capture_output=True, text=True, check=False,
            env=variables | {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "NO_PROXY": "*"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert PLANTED not in done.stderr + done.stdout
        logs = list(Path(session).rglob("raylet.out"))
        assert logs and files_with(PLANTED, Path(session)) == []
    assert (tmp_path / "run" / "mlflow" / "pending.jsonl").stat().st_size > 0
    assert files_with(PLANTED, tmp_path / "run") == []
