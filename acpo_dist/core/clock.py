"""Seconds per phase of an iteration."""

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

    def metrics(self) -> dict[str, float]:
        """Return `time/<phase>` and `time/iteration`, in seconds."""
        whole = {"time/iteration": time.monotonic() - self._start}
        return {f"time/{name}": seconds for name, seconds in self._phases.items()} | whole
