"""Faults that are injected into a run from outside: signals, a full disk, a damaged checkpoint, a faulty metric."""

import os
import random
import signal
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.soak.processes import Processes, of_role, phase_of, rows
from tests.soak.server import TrackingServer

SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGSTOP": signal.SIGSTOP}
STOPPED_S = (2.0, 12.0)
"""Seconds for which SIGSTOP holds a process, and for which the MLflow server is away."""
CLOSED = "closed connections"
_LOOK_S = 0.005
_REFRESH_S = 0.4


@dataclass
class Injection:
    """One fault, when it is due, and what came of it."""

    fault: str
    role: str
    phase: str
    after: int = 0
    """Rows of metrics that must be recorded before."""
    seed: int = 0
    done: bool = False
    seen: str = ""
    """Title of the victim, or file, at the injection."""

    def to_mapping(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


class Injector:
    """Injects faults into one run, each when its phase is seen and the fault before it has had its effect.

    Args:
        processes: the run's processes.
        folder: run folder.
        iterations: iterations of the run.
        faults: folder of the faulty metric.
        server: MLflow server of the run, if it has one.
    """

    def __init__(
        self, processes: Processes, folder: Path, iterations: int, faults: Path, server: TrackingServer | None = None
    ) -> None:
        self._processes, self._folder, self._iterations, self._faults = processes, folder, iterations, faults
        self._server = server
        self._looked = self._away_until = 0.0
        self._gone: list[int] = []
        """Processes that must have ended before the next injection."""
        self._stopped: list[tuple[float, int]] = []
        self.filler = folder.parent / "filler"

    def step(self, due: list[Injection]) -> None:
        """Look once; inject the first fault that is due."""
        now = time.monotonic()
        if now - self._looked > _REFRESH_S:
            self._processes.refresh()
            self._looked = now
        for until, pid in list(self._stopped):
            if now > until:
                self._stopped.remove((until, pid))
                self._signal(pid, signal.SIGCONT)
        if self._server and now > self._away_until > 0:
            self._server.start()
            self._away_until = 0.0
        if not self._stopped and now > self._away_until and not any(map(self._processes.lives, self._gone)):
            titles, done = self._processes.titles(), rows(self._folder)
            phase = phase_of(titles, self._folder, self._iterations)
            for one in due:
                if not one.done and one.phase == phase and one.after <= done and self._inject(one, titles, now):
                    break
        time.sleep(_LOOK_S)

    def release(self) -> None:
        """Continue stopped processes and the MLflow server, and free the disk."""
        if self._server and self._away_until:
            self._server.start()
        for _, pid in self._stopped:
            self._signal(pid, signal.SIGCONT)
        self._stopped.clear()
        self.filler.unlink(missing_ok=True)

    def _inject(self, injection: Injection, titles: dict[int, str], now: float) -> bool:
        """Inject a fault if its victim is there; returns whether it is."""
        chosen = random.Random(injection.seed)
        if self._server:
            seconds = chosen.uniform(*STOPPED_S)
            if injection.fault == CLOSED:
                self._server.close_connections(seconds)
            else:
                self._server.signal(SIGNALS[injection.fault])
                if injection.fault == "SIGKILL":
                    self._server.kill()
            self._away_until = now + seconds
            injection.seen = f"{seconds:.0f} s"
        elif injection.fault in SIGNALS:
            victims = sorted(of_role(titles, injection.role, self._processes.parent))
            if not victims:
                return False
            victim = chosen.choice(victims)
            if injection.fault == "SIGSTOP":
                self._stopped.append((now + chosen.uniform(*STOPPED_S), victim))
            else:
                # A rank that dies ends all of them.
                self._gone = victims if injection.role == "learner" else [victim]
            # The driver's title is the path of its interpreter on this machine.
            injection.seen = Path(titles.get(victim, "")).name if injection.role == "driver" else titles.get(victim, "")
            self._signal(victim, SIGNALS[injection.fault])
        elif injection.fault == "full disk":
            injection.seen = fill(self.filler)
        elif injection.fault == "damaged checkpoint":
            injection.seen = damage(self._folder, chosen)
            if not injection.seen:
                return False
            # Only a restart reads it.
            self._signal(self._processes.parent, signal.SIGKILL)
        else:
            (self._faults / injection.fault).touch()
            injection.seen = injection.fault
        injection.done = True
        return True

    def _signal(self, pid: int, number: signal.Signals) -> None:
        if self._processes.lives(pid):
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def fill(path: Path) -> str:
    """Write a file until the disk is full."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
    return f"{path.stat().st_size >> 20} MiB"


def damage(folder: Path, chosen: random.Random) -> str:
    """Cut or change one file of the newest checkpoint; returns its name, empty without a checkpoint."""
    found = sorted((folder / "checkpoints").glob("[0-9]*"))
    if not found:
        return ""
    file = chosen.choice(sorted(path for path in found[-1].rglob("*") if path.is_file()))
    content = bytearray(file.read_bytes())
    if chosen.random() < 0.5:
        del content[chosen.randrange(len(content)) :]
    else:
        content[chosen.randrange(len(content))] ^= 1 << chosen.randrange(8)
    file.write_bytes(content)
    return str(file.relative_to(folder))
