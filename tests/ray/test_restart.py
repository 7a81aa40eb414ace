"""A learner rank is killed on a run's own Ray: the run restarts it, with the metrics of an undisturbed run."""

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from acpo_dist.tracking.jsonl import read_metrics
from tests.conftest import TINY
from tests.helpers.forked import acpo
from tests.helpers.runs import results

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]
ITERATIONS = 3
RUN = [
    *TINY, f"run.iterations={ITERATIONS}", "cluster.backend=ray", "learner.num_ranks=2",
    "learner.zero_stage=2", "rollout.cpus_per_worker=0.1", "rewards.cpus_per_replica=0.1", "learner.cpus_per_rank=0.2",
]  # fmt: skip


def started(folder: Path, every: int, python: str, session: str) -> subprocess.Popen[str]:
    """Start `acpo train` on its own Ray cluster with files in `session`; it and its workers are forks of `python`."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.Popen(
        [*acpo(python, folder.parent), "train", "toy_sdxl", *RUN, f"checkpoint.every={every}", f"run.dir={folder}"],
        env=variables | {"RAY_TMPDIR": session}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def in_session(pid: int, session: str) -> bool:
    """Whether a process has a file of a Ray session open, as workers have their logs."""
    with contextlib.suppress(OSError):
        return any(os.readlink(entry).startswith(session) for entry in Path(f"/proc/{pid}/fd").iterdir())
    return False


def titles(parents: set[int]) -> dict[int, str]:
    """Process title by process id of all descendants; Ray writes the method that an actor executes into its title."""
    found: dict[int, tuple[int, str]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                above = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                title = (entry / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
                found[int(entry.name)] = above, title
            except OSError:
                continue
    family, size = set(parents), 0
    while size != len(family):
        size = len(family)
        family |= {pid for pid, (above, _) in found.items() if above in family}
    return {pid: found[pid][1] for pid in family if pid in found}


def kill_a_rank(process: subprocess.Popen[str], server: int, session: str, method: str, rows: Path, least: int) -> None:
    """Send SIGKILL to a learner rank that executes a method, once this many iterations are recorded.

    Args:
        server: process whose children the run's workers are, and workers of other tests.
    """
    while process.poll() is None:
        # Ray's workers run at low priority: a loop without pauses would starve them.
        if least and not (rows.exists() and len(read_metrics(rows)) >= least):
            time.sleep(0.2)
            continue
        for pid, title in titles({server}).items():
            if title == f"ray::LearnerActor.{method}" and in_session(pid, session):
                os.kill(pid, signal.SIGKILL)
                return
        time.sleep(0.02)
    raise AssertionError(f"no rank was seen in `{method}` before the run ended:\n{process.communicate()[0]}")


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """Return metrics of the same run in one process without a fault."""
    from acpo_dist.config.load import load_config
    from acpo_dist.tracking.console import Console
    from acpo_dist.training.local import open_ports
    from acpo_dist.training.run import drive

    pytest.importorskip("ray", reason="needs the extra `ray`")
    pytest.importorskip("deepspeed", reason="needs the extra `zero`")
    folder = tmp_path_factory.mktemp("calm") / "run"
    config = load_config("toy_sdxl", [*TINY, f"run.iterations={ITERATIONS}", f"run.dir={folder}"])
    drive(config, open_ports, Console(quiet=True))
    return results(folder)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize(
    ("method", "least", "every"),
    [
        ("train", 1, 9),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in
          [("build", 0, 1), ("gradient_norms", 0, 1), ("train", 0, 9), ("save", 1, 1), ("train", 2, 1)]),
    ],
)  # fmt: skip
def test_a_learner_rank_killed_on_a_runs_own_ray_costs_a_restart_and_changes_no_metric(
    method, least, every, calm, forks, tmp_path
):
    folder = tmp_path / "run"
    python, server = forks
    # The length of socket paths is limited.
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as session:
        process = started(folder, every, python, session)
        kill_a_rank(process, server, session, method, folder / "metrics.jsonl", least)
        said, _ = process.communicate(timeout=1100)
    assert process.returncode == 0, said
    assert "Traceback" not in said and "cluster.max_restarts" in said
    if every > ITERATIONS:
        # The last one, and the state before a loss that the driver had kept; a busy machine may lose more than one.
        saved = sorted(path.name for path in (folder / "checkpoints").iterdir())
        assert 2 <= len(saved) <= 1 + said.count("cluster.max_restarts)") and saved[-1] == f"{ITERATIONS:06d}", saved
    found = results(folder)
    # One line before the first update, one after each.
    assert [row["iteration"] for row in found] == [row["iteration"] for row in calm] == list(range(ITERATIONS + 1))
    for mine, theirs in zip(calm, found, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            # Requests that meet at a replica are scored together, and a sum of float32 depends on its batch.
            assert theirs[name] == pytest.approx(value, rel=2e-3, abs=5e-4), (mine["iteration"], name)
