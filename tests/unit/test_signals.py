"""Ctrl-C and SIGTERM end a run cleanly: complete folder, released lock, and a message that says how to resume."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from acpo_dist.training.run_lock import LOCK_FILE
from tests.conftest import TINY
from tests.helpers.exports import command

ACPO = Path(sys.executable).parent / "acpo"


def started(root: Path, *overrides: str) -> subprocess.Popen[str]:
    """A run that would go on for long."""
    asked = [*TINY, f"run.dir={root}", "run.iterations=500", "checkpoint.every=1", *overrides]
    return subprocess.Popen(
        [str(ACPO), "train", "toy_sdxl", *asked], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # A shell starts what it runs in the background with SIGINT ignored, and the tests with it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def interrupted_by(number: signal.Signals, root: Path, process: subprocess.Popen[str]) -> str:
    """What the run says when it is told to end after its first iteration."""
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if line.startswith("iteration "):
            process.send_signal(number)
            break
    said += process.stderr.read()
    process.wait(timeout=120)
    return said


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_run_that_is_told_to_end_leaves_a_whole_folder_and_says_how_to_resume(
    number, code, word, tmp_path, monkeypatch, capsys
):
    root = tmp_path / "run"
    process = started(root, "tracking.mlflow=true")
    said = interrupted_by(number, root, process)
    assert process.returncode == code, said
    assert said.endswith(f"{word}; go on with `acpo train ... --resume auto`\n") and "Traceback" not in said
    assert not (root / LOCK_FILE).exists()
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    exit_code, listed, _ = command(monkeypatch, capsys, "runs", "--uri", uri, "--experiment", "acpo")
    assert exit_code == 0 and [run["state"] for run in listed["runs"]] == ["killed"]
