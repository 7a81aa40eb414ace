"""Seconds from the command to the first sample on Ray, and of a restart after a lost learner rank, by phase.

    .venv/bin/python benchmarks/starts.py [--config toy_sdxl] [--rounds 3] [KEY=VALUE ...]

Each round runs `acpo train CONFIG --backend ray` in a process of its own, kills the learner's rank 0 in the second
iteration and lets the run restart it. One JSON line per phase: seconds after the command started or the rank was
killed, and seconds of the phase, each with its median over rounds. Phases may overlap.
"""

import os

# Before torch is imported: two torch threads on contended cores are tens of times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

SMALL = [
    "run.iterations=3", "checkpoint.every=1", "tracking.images_every=99", "rollout.cpus_per_worker=0.1",
    "rewards.cpus_per_replica=0.1", "learner.cpus_per_rank=0.1",
]  # fmt: skip


def main() -> None:
    """Run the rounds, or one run with its phases timed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="toy_sdxl")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stamps", type=Path, default=None, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    if options.stamps:
        _train(options)
        return
    rounds = []
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            stamps = Path(folder) / "stamps.jsonl"
            command = [sys.executable, __file__, "--config", options.config, "--stamps", str(stamps)]
            started = time.time()
            ran = subprocess.run(
                [*command, f"run.dir={folder}/run", *options.overrides], capture_output=True, text=True, check=False
            )
            if ran.returncode:
                raise SystemExit((ran.stdout + ran.stderr)[-3000:])
            rounds.append(_phases([json.loads(line) for line in stamps.read_text().splitlines()], started))
        for key, (at, took) in rounds[-1].items():
            _say(round=number, start=key[0], phase=key[1], at_s=at, took_s=took)
    for key in rounds[0]:
        pairs = [found[key] for found in rounds if key in found]
        at, took = (round(median(column), 1) for column in zip(*pairs, strict=True))
        _say(start=key[0], phase=key[1], at_s=at, took_s=took, rounds=len(pairs))


def _phases(stamps: list[dict[str, Any]], started: float) -> dict[tuple[str, str], tuple[float, float]]:
    """Return (seconds until it began, its duration) by ("start" or "restart", phase), the first of each name."""
    lost = next(one["began"] for one in stamps if one["phase"] == "rank killed")
    found: dict[tuple[str, str], tuple[float, float]] = {}
    for one in sorted(stamps, key=lambda one: one["began"]):
        which, origin = ("start", started) if one["began"] < lost else ("restart", lost)
        row = (round(one["began"] - origin, 2), round(one["ended"] - one["began"], 2))
        found.setdefault((which, one["phase"]), row)
    return found


def _train(options: argparse.Namespace) -> None:
    """Run the command in this process and write one line per phase."""
    file = options.stamps.open("a")

    def note(phase: str, began: float) -> None:
        file.write(json.dumps({"phase": phase, "began": began, "ended": time.time()}) + "\n")
        file.flush()

    def timed(owner: Any, name: str, phase: str) -> None:
        inner: Callable[..., Any] = getattr(owner, name)

        def outer(*arguments: Any, **named: Any) -> Any:
            began = time.time()
            try:
                return inner(*arguments, **named)
            finally:
                note(phase, began)

        setattr(owner, name, outer)

    began = time.time()
    from acpo_dist.cli import main as acpo
    from acpo_dist.training import calibration, loop, run
    from actors import launch, learner, rollout
    from actors.reward import pool

    note("import", began)
    for owner, name, phase in (
        (run, "open_run", "open the run folder"),
        (run, "_open_tracker", "open the trackers"),
        (launch, "join", "start Ray"),
        (launch, "leave", "stop Ray"),
        (learner, "place", "place the learner"),
        (learner.RayLearner, "renew", "replace the learner ranks"),
        (launch, "deploy", "start the reward pool"),
        (pool, "await_running", "load the rewards"),
        (learner.RayLearner, "build", "wait for the learner"),
        (rollout.RayRollouts, "await_ready", "wait for the rollout workers"),
        (learner.RayLearner, "start", "build the optimiser"),
        (calibration, "_generate_calibration", "first samples"),
        (loop, "calibrate", "calibrate"),
        (loop.Trainer, "iterate", "iteration"),
    ):
        timed(owner, name, phase)
    train = learner.RayLearner.train
    killed = options.stamps.with_suffix(".killed")

    def trained(self: Any, handles: Any, task: Any, advance: Any = None) -> Any:
        if task.iteration == 1 and not killed.exists():
            killed.touch()
            pid = _pid_of_rank()
            note("rank killed", time.time())
            os.kill(pid, signal.SIGKILL)
        return train(self, handles, task, advance)

    learner.RayLearner.train = trained
    sys.argv = ["acpo", "train", options.config, "--backend", "ray", *SMALL, *options.overrides]
    acpo()


def _pid_of_rank() -> int:
    import psutil

    for one in psutil.Process().children(recursive=True):
        if one.cmdline() and one.cmdline()[0].startswith("ray::LearnerActor"):
            return one.pid
    raise SystemExit("no learner rank found")


def _say(**facts: Any) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
