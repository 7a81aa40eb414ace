"""`acpo train` in a separate process that receives a signal."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.conftest import TINY
from tests.helpers.forked import acpo

ACPO = Path(sys.executable).parent / "acpo"


def started(root: Path, *overrides: str, python: str | None = None) -> subprocess.Popen[str]:
    """Start a run of many iterations; `python` is the program of `tests.helpers.forked` that executes it, if any."""
    program = [str(ACPO)] if python is None else acpo(python, root.parent)
    asked = [*TINY, f"run.dir={root}", "run.iterations=500", "checkpoint.every=1", *overrides]
    return subprocess.Popen(
        [*program, "train", "toy_sdxl", *asked], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # A shell starts what it runs in the background with SIGINT ignored, and the tests with it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def interrupted_by(number: signal.Signals, root: Path, process: subprocess.Popen[str]) -> str:
    """Return the output of a run that receives a signal after its first iteration."""
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if line.startswith("iteration "):
            process.send_signal(number)
            break
    said += process.stderr.read()
    process.wait(timeout=600)
    return said
