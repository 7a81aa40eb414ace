"""Seconds per phase of an iteration."""

import threading
import time
from collections.abc import Generator
from contextlib import contextmanager


class PhaseClock:
    """Measures the wall-clock seconds of each phase; the iteration starts when the clock is constructed."""

    def __init__(self) -> None:
        """Start the clock."""
        self._start = time.monotonic()
        self._phases: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Generator[None, None, None]:
        """Add the duration of the block to phase `name`, also if the block raises."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._phases[name] = time.monotonic() - start

    def metrics(self, roles: "RoleClock", gradient_s: float = 0.0) -> dict[str, float]:
        """Return the seconds of the iteration, and the share of it in which each role had no work.

        Args:
            roles: work of `rollout`, `learner` and `reward`.
            gradient_s: seconds in which the learner waited for the reward pool: work of the pool, not of the learner.

        Returns:
            `time/<phase>` and `time/iteration` in seconds, and `idle/<role>` in [0, 1].
        """
        whole = time.monotonic() - self._start
        busy = {role: roles.seconds(role, self._start) for role in ("rollout", "learner", "reward")}
        busy["learner"] -= gradient_s
        busy["reward"] += gradient_s
        idle = {f"idle/{role}": min(1.0, max(0.0, 1 - seconds / whole)) for role, seconds in busy.items()}
        return {f"time/{name}": s for name, s in self._phases.items()} | {"time/iteration": whole} | idle


class RoleClock:
    """Records when each role works, from any thread."""

    def __init__(self) -> None:
        """Start without any work."""
        self._lock = threading.Lock()
        self._started: dict[tuple[str, int], float] = {}
        self._spans: dict[str, list[tuple[float, float]]] = {}

    @contextmanager
    def busy(self, role: str) -> Generator[None, None, None]:
        """Count the duration of the block as work of the role."""
        key, start = (role, threading.get_ident()), time.monotonic()
        with self._lock:
            self._started[key] = start
        try:
            yield
        finally:
            with self._lock:
                del self._started[key]
                self._spans.setdefault(role, []).append((start, time.monotonic()))

    def seconds(self, role: str, since: float) -> float:
        """Return the seconds of the role's work since a time of `time.monotonic`; earlier work is forgotten."""
        now = time.monotonic()
        with self._lock:
            kept = [span for span in self._spans.get(role, []) if span[1] > since]
            self._spans[role] = kept
            running = [(start, now) for (name, _), start in self._started.items() if name == role]
        return sum(end - max(start, since) for start, end in (*kept, *running))
