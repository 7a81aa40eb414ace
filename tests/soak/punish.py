"""One disturbed run: start, inject, continue until it is finished, check."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.conftest import TINY
from tests.helpers.runs import results
from tests.soak import checks
from tests.soak.cases import ITERATIONS, SURVIVED, Case
from tests.soak.faults import Injector
from tests.soak.processes import Processes, shared_memory
from tests.soak.server import TrackingServer

RUN_S = 2400.0
"""Seconds after which a run counts as hung."""
_LEFT_S = 90.0
"""Seconds that descendants of a process have to end: two agents of Ray notice after 63 s that a driver was killed."""
_STARTS = 12


@dataclass(frozen=True)
class Forks:
    """Program that Ray starts workers with (`tests.helpers.forked`), and the process whose children they are then."""

    program: str
    server: int


def command(folder: Path, case: Case, *, faults: Path, resume: bool = False, python: str = sys.executable) -> list[str]:
    """`acpo train` of a case; Ray's workers run in the interpreter `python`."""
    overrides = [
        *TINY, f"run.iterations={ITERATIONS}", "checkpoint.every=1", f"cluster.backend={case.backend}",
        f"run.dir={folder}", *case.overrides,
        f"rewards.judges=[{{type: 'tests.helpers.misbehaving:Misbehaving', folder: '{faults}'}}]",
    ]  # fmt: skip
    code = f"import sys; sys.executable = {python!r}; from acpo_dist.cli import main; main()"
    return [sys.executable, "-c", code, "train", "toy_sdxl", *overrides, *(["--resume", "auto"] if resume else [])]


def twin(root: Path) -> list[dict[str, float]]:
    """Metrics of the undisturbed run in one process."""
    case = Case(0, "local")
    (root / "faults").mkdir(parents=True, exist_ok=True)
    with (root / "twin.txt").open("w") as output:
        subprocess.run(
            command(root / "twin", case, faults=root / "faults"), check=True, stdout=output, stderr=output,
            timeout=RUN_S,
        )  # fmt: skip
    return results(root / "twin")


def punish(case: Case, root: Path, expected: list[dict[str, float]], forks: Forks) -> dict[str, Any]:
    """Execute a case in the folder `root` and check it.

    Returns:
        The case, its injections and all that went wrong, as JSON.
    """
    started = time.monotonic()
    faults = root / "faults"
    faults.mkdir(parents=True)
    before = shared_memory()
    problems: list[str] = []
    codes: list[int] = []
    said: list[str] = []
    started_by: list[Processes] = []
    folder = root / "disk" / "run" if case.has("disk") else root / "run"
    serving = closing(TrackingServer(root / "mlflow")) if case.has("mlflow") else nullcontext()
    with _disk(root / "disk", case.has("disk")), serving as server:
        tracked = ["tracking.mlflow=true", f"tracking.mlflow_uri={server.uri}"] if server else []
        run = replace(case, overrides=[*case.overrides, *tracked])
        for attempt in range(_STARTS):
            log = root / f"output{attempt}.txt"
            code, signalled, processes = _start(run, folder, faults, log, problems, server, forks, resume=bool(attempt))
            codes.append(code)
            started_by.append(processes)
            output = log.read_text(errors="replace")
            said.append(output)
            problems += checks.ending(code, output, signalled=signalled)
            if not code:
                break
            if all(one.role in (*SURVIVED, "mlflow") for one in case.injections):
                problems.append(f"ended with exit code {code}, and not only restarted: {output.strip()[-600:]}")
        else:
            problems.append(f"not finished after {_STARTS} starts")
        if not codes[-1]:
            problems += checks.compare(results(folder), expected, exact=case.backend == "local")
            problems += checks.folder_left(folder)
            if server:
                problems += server.missing(folder)
        problems += _left(started_by)
        if problems and case.has("disk"):
            shutil.copytree(folder, root / "run", dirs_exist_ok=True)
    if left := sorted(name for name in shared_memory() - before if not _in_use(name)):
        problems.append(f"left in shared memory: {left}")
    restarts = sum(text.count("cluster.max_restarts)") for text in said)
    return {
        "seed": case.seed, "backend": case.backend, "overrides": case.overrides, "codes": codes, "restarts": restarts,
        "injections": [one.to_mapping() for one in case.injections], "problems": problems,
        "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip


def _start(
    case: Case,
    folder: Path,
    faults: Path,
    log: Path,
    problems: list[str],
    server: TrackingServer | None,
    forks: Forks,
    *,
    resume: bool,
) -> tuple[int, bool, Processes]:
    """Start the run once; returns its code, whether it received a signal itself, and all processes it had."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # Ray starts workers at niceness 15: beside other work they would hardly run.
    variables["RAY_worker_niceness"] = "0"
    with log.open("w") as output:
        process = subprocess.Popen(
            command(folder, case, faults=faults, resume=resume, python=forks.program), stdout=output, stderr=output,
            env=variables, start_new_session=True,
        )  # fmt: skip
    processes = Processes(process.pid, forks.server)
    injector = Injector(processes, folder, ITERATIONS, faults, server)
    pending = [one for one in case.injections if not one.done]
    deadline = time.monotonic() + RUN_S
    try:
        while process.poll() is None:
            if time.monotonic() > deadline:
                problems.append(f"hung: no end within {RUN_S:g} s; processes {processes.titles()}")
                break
            injector.step(pending)
    finally:
        injector.release()
        if process.poll() is None:
            process.kill()
        process.wait()
    driver = [one for one in pending if one.done and (one.role == "driver" or one.fault == "damaged checkpoint")]
    return process.returncode, any(one.fault != "SIGSTOP" for one in driver), processes


def _left(started: list[Processes]) -> list[str]:
    """Wait for all processes of runs that have ended; those that stay are a problem, and are killed."""
    deadline = time.monotonic() + _LEFT_S
    while any(one.alive() for one in started) and time.monotonic() < deadline:
        time.sleep(0.2)
    titles = {pid: title for one in started for pid, title in one.titles().items()}
    left = [pid for one in started for pid in one.alive()]
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return [f"processes left {_LEFT_S:g} s after the end: {[titles.get(pid, pid) for pid in left]}"] if left else []


class _disk:  # noqa: N801
    """A small file system of its own for a run, mounted on a folder while the block runs; needs root."""

    def __init__(self, folder: Path, wanted: bool, size: str = "96m") -> None:
        self._folder, self._wanted, self._size = folder, wanted, size

    def __enter__(self) -> None:
        if self._wanted:
            self._folder.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={self._size}", "tmpfs", self._folder], check=True)

    def __exit__(self, *_: object) -> None:
        if self._wanted:
            subprocess.run(["umount", self._folder], check=True)


def _in_use(name: str) -> bool:
    """Whether a process has a file of /dev/shm open or mapped."""
    path = f"/dev/shm/{name}"
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                if path in (entry / "maps").read_text():
                    return True
                if any(os.readlink(one) == path for one in (entry / "fd").iterdir()):
                    return True
    return False
