"""Ctrl-C and SIGTERM end a run cleanly: complete folder, released lock, and a message with the command to resume."""

import signal

import pytest

from acpo_dist.training.run_lock import LOCK_FILE
from tests.helpers.exports import command
from tests.helpers.interrupted import interrupted_by, started


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_an_interrupted_run_leaves_a_complete_folder_and_prints_how_to_resume(
    number, code, word, tmp_path, monkeypatch, capsys
):
    root = tmp_path / "run"
    # Both signals raise the same exception, from which the state in MLflow follows: one of them shows it.
    recorded = number is signal.SIGTERM
    process = started(root, f"tracking.mlflow={str(recorded).lower()}")
    said = interrupted_by(number, root, process)
    assert process.returncode == code, said
    assert said.endswith(f"{word}; continue with `acpo train ... --resume auto`\n") and "Traceback" not in said
    assert not (root / LOCK_FILE).exists()
    if not recorded:
        return
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    exit_code, listed, _ = command(monkeypatch, capsys, "runs", "--uri", uri, "--experiment", "acpo")
    assert exit_code == 0 and [run["state"] for run in listed["runs"]] == ["killed"]
