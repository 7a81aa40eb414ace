"""What a caller of the pool counts: requests, retries by cause, and how long answers took."""

import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

CAUSES = ("lost", "timeout", "refused", "nonfinite", "memory", "unfit", "avoided", "backpressure")
"""Why a request was asked again: the replica or its node died; no answer within the attempt's time; it failed; its
answer was not finite; it ran out of memory; it was leaving; it was known to be bad; too many requests waited."""
_REMEMBERED = 4096
_RETRIES = frozenset(CAUSES) - {"avoided", "backpressure"}
"""Attempts that failed; being turned away at the door is none."""


@dataclass
class RequestCounts:
    """Counts of one caller, safe to use from several threads."""

    requests: int = 0
    answered: int = 0
    causes: Counter[str] = field(default_factory=Counter)
    """Retries by cause."""
    unanswered: int = 0
    """Requests that ended in an error."""

    def __post_init__(self) -> None:
        """Latencies since they were last looked at, by metric."""
        self._lock = threading.Lock()
        self._latencies: dict[str, deque[float]] = {}

    @property
    def retries(self) -> int:
        """Attempts that failed and were followed by another one."""
        return sum(count for cause, count in self.causes.items() if cause in _RETRIES)

    def again(self, cause: str) -> None:
        """A request is asked again."""
        with self._lock:
            self.causes[cause] += 1

    @contextmanager
    def request(self, metric: str) -> Iterator[None]:
        """One request from its first attempt to its answer."""
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
        """Median and 95th percentile in seconds by metric, of the answers since the last call."""
        with self._lock:
            taken, self._latencies = self._latencies, {}
        return {
            metric: {"p50": _quantile(times, 0.5), "p95": _quantile(times, 0.95)} for metric, times in taken.items()
        }

    def to_metrics(self) -> dict[str, float]:
        """Figures for tracking."""
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
    """Busy time and age of a replica when it was last asked, in seconds; and its work so far."""

    busy_s: float
    up_s: float
    batches: int
    images: int


def utilisation(before: Mapping[str, ReplicaClock], now: Mapping[str, ReplicaClock]) -> float:
    """Share of their time that the replicas of now computed, since they were last asked or since they started."""
    none = ReplicaClock(busy_s=0.0, up_s=0.0, batches=0, images=0)
    busy = sum(clock.busy_s - before.get(name, none).busy_s for name, clock in now.items())
    passed = sum(clock.up_s - before.get(name, none).up_s for name, clock in now.items())
    return busy / passed if passed > 0 else 0.0


def mean_batch(before: Mapping[str, ReplicaClock], now: Mapping[str, ReplicaClock]) -> float:
    """Images per batch over the same time; 0 when nothing was computed."""
    none = ReplicaClock(busy_s=0.0, up_s=0.0, batches=0, images=0)
    images = sum(clock.images - before.get(name, none).images for name, clock in now.items())
    batches = sum(clock.batches - before.get(name, none).batches for name, clock in now.items())
    return images / batches if batches else 0.0
