"""Metrics of a client of the reward pool: requests, retries by cause, latencies."""

import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

CAUSES = ("lost", "timeout", "refused", "nonfinite", "memory", "unfit", "avoided", "backpressure")
"""Causes of a retry: the replica or its node died; no response within the attempt's time; the metric failed; the
response was not finite; out of memory; the replica was ending; the caller avoided it; too many queued requests."""
_REMEMBERED = 4096
_RETRIES = frozenset(CAUSES) - {"avoided", "backpressure"}
"""Causes that count as failed attempts."""


@dataclass
class RequestCounts:
    """Counts of one client; thread-safe."""

    requests: int = 0
    answered: int = 0
    causes: Counter[str] = field(default_factory=Counter)
    """Retries by cause."""
    unanswered: int = 0
    """Requests that ended in an error."""

    def __post_init__(self) -> None:
        """Create the lock and the latencies, by metric, since they were last taken."""
        self._lock = threading.Lock()
        self._latencies: dict[str, deque[float]] = {}

    @property
    def retries(self) -> int:
        """Number of attempts that failed and were repeated."""
        return sum(count for cause, count in self.causes.items() if cause in _RETRIES)

    def again(self, cause: str) -> None:
        """Record a retry."""
        with self._lock:
            self.causes[cause] += 1

    @contextmanager
    def request(self, metric: str) -> Iterator[None]:
        """Count and time one request from its first attempt to its response."""
        with self._lock:
            self.requests += 1
        started = time.monotonic()
        try:
            yield
        except BaseException:
            with self._lock:
                self.unanswered += 1
            raise
        with self._lock:
            self.answered += 1
            self._latencies.setdefault(metric, deque(maxlen=_REMEMBERED)).append(time.monotonic() - started)

    def take_latencies(self) -> dict[str, dict[str, float]]:
        """Return median and 95th percentile of the latencies in seconds, by metric, since the last call."""
        with self._lock:
            taken, self._latencies = self._latencies, {}
        return {
            metric: {"p50": _quantile(times, 0.5), "p95": _quantile(times, 0.95)} for metric, times in taken.items()
        }

    def to_metrics(self) -> dict[str, float]:
        """Return metrics for tracking."""
        return {
            "reward_pool/requests": float(self.requests),
            "reward_pool/unanswered": float(self.unanswered),
            **{f"reward_pool/retries/{cause}": float(self.causes[cause]) for cause in CAUSES},
        }


def _quantile(values: deque[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@dataclass(frozen=True, kw_only=True)
class ReplicaClock:
    """Busy time and age of a replica in seconds at its last report, and its work so far."""

    busy_s: float
    up_s: float
    batches: int
    images: int


def utilisation(before: Mapping[str, ReplicaClock], now: Mapping[str, ReplicaClock]) -> float:
    """Return the share of time that replicas spent computing since their last report or their start."""
    none = ReplicaClock(busy_s=0.0, up_s=0.0, batches=0, images=0)
    busy = sum(clock.busy_s - before.get(name, none).busy_s for name, clock in now.items())
    passed = sum(clock.up_s - before.get(name, none).up_s for name, clock in now.items())
    return busy / passed if passed > 0 else 0.0


def mean_batch(before: Mapping[str, ReplicaClock], now: Mapping[str, ReplicaClock]) -> float:
    """Return images per batch since the last reports; 0 without batches."""
    none = ReplicaClock(busy_s=0.0, up_s=0.0, batches=0, images=0)
    images = sum(clock.images - before.get(name, none).images for name, clock in now.items())
    batches = sum(clock.batches - before.get(name, none).batches for name, clock in now.items())
    return images / batches if batches else 0.0
