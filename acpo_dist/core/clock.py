"""Seconds per phase of an iteration."""

import time
from collections.abc import Generator
from contextlib import contextmanager


class PhaseClock:
    """Starts when it is made."""

    def __init__(self) -> None:
        """Start."""
        self._start = time.monotonic()
        self._phases: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Generator[None, None, None]:
        """Measure what happens inside, also when it fails."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._phases[name] = time.monotonic() - start

    def metrics(self) -> dict[str, float]:
        """`time/<phase>` and `time/iteration`, seconds."""
        whole = {"time/iteration": time.monotonic() - self._start}
        return {f"time/{name}": seconds for name, seconds in self._phases.items()} | whole
