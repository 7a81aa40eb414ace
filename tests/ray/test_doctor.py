"""`acpo doctor` on a cluster checks every machine and returns all findings in one object."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="needs the extra `ray`")
from actors.cluster import checks
from actors.cluster.software import software

pytestmark = pytest.mark.ray
ACPO = Path(sys.executable).parent / "acpo"


def test_every_machine_reports_its_software_and_run_folder(cluster, tmp_path, monkeypatch):
    (found,) = checks.check_cluster("auto", tmp_path / "runs")
    assert found.verdict == "ok" and software().code in found.found and list(tmp_path.iterdir()) == []
    assert cluster.is_initialized()
    monkeypatch.setattr(checks, "software", lambda: replace(software(), packages={"torch": "1.0"}))
    (other,) = checks.check_cluster("auto", tmp_path)
    assert other.verdict == "failed" and "not 1.0" in other.found and "mixed_software" in other.advice


def test_a_run_folder_that_is_not_shared_is_reported(tmp_path):
    seen = checks.MachineReport(software(), marker=False, findings=[])
    same, folder = checks.judge_machine("machine a", seen, software(), tmp_path)
    assert same.verdict == "ok"
    assert folder.verdict == "failed" and str(tmp_path) in folder.found and "ACPO_RUNS" in folder.advice


def test_the_command_answers_with_one_object_and_fails_where_something_would(tmp_path):
    def ask(*arguments: str):
        variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return subprocess.run(
            [str(ACPO), "doctor", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False,
            env=variables | {"OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"},
        )  # fmt: skip

    done = ask("toy_sdxl", "tracking.mlflow_uri=http://127.0.0.1:9", "--json")
    said = json.loads(done.stdout)
    assert done.returncode == 0, done.stdout
    verdicts = {one["check"]: one["verdict"] for one in said["findings"]}
    assert said["verdict"] == "warning" and verdicts["tracking"] == "warning"
    assert any(name.startswith("machine ") for name in verdicts) and verdicts["extra `ray`"] == "ok"
