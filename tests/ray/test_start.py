"""A run's own Ray starts on a machine that is too busy for Ray's agents to start in time."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("ray", reason="needs the extra `ray`")
pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

LATE_AGENTS = """
import os, sys, time
if any(name.endswith(("dashboard/agent.py", "runtime_env/agent/main.py")) for name in sys.orig_argv):
    while not os.path.exists(os.environ["AGENTS_MAY_START"]):
        time.sleep(0.05)
"""
"""`sitecustomize.py`: holds each agent of Ray until a file exists."""
PROGRAM = """
import os, ray
from actors.cluster.connect import join, leave
join("local")
@ray.remote(num_cpus=0.1)
def variable():
    return os.environ.get("GIVEN", "none")
assert ray.get(variable.remote(), timeout=120) == "none"
open(os.environ["AGENTS_MAY_START"], "w").close()
given = variable.options(runtime_env={"env_vars": {"GIVEN": "by the agent"}}).remote()
assert ray.get(given, timeout=240) == "by the agent"
leave()
"""


def test_a_cluster_whose_agents_start_too_late_is_up_at_the_second_attempt_with_runtime_environments(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(LATE_AGENTS)
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False,
        env=variables | {"PYTHONPATH": path, "AGENTS_MAY_START": str(tmp_path / "go"), "RAY_worker_niceness": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Ray did not start (attempt 1 of 5)") == 1 and "attempt 2" not in done.stderr
