"""A queue of requests and one thread that computes them in batches."""

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass
class Job:
    """A queued request."""

    kind: Hashable
    """Requests of one kind share a batch: method, size and type of the images."""
    images: int
    payload: Any
    future: Future[Any] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)


@dataclass
class Vitals:
    """Work of a replica since it became ready; durations in seconds."""

    requests: int = 0
    batches: int = 0
    images: int = 0
    busy_s: float = 0.0
    answered: float | None = None
    """End of the last batch, on the monotonic clock; None before the first."""


class Batcher:
    """Computes in its own thread, so that the event loop remains free for health checks."""

    def __init__(
        self, run: Callable[[Hashable, Sequence[Any]], Sequence[Any]], *, max_images: int, wait_s: float,
        between: Callable[[], None] = lambda: None, pause_s: float = 1.0,
    ) -> None:  # fmt: skip
        """Start the thread.

        Args:
            run: (kind, payloads of one kind) -> one result per payload.
            max_images: largest number of images in a batch; a larger request is a batch of its own.
            wait_s: seconds that an incomplete batch waits for more requests.
            between: called between batches, and every `pause_s` seconds without requests.
            pause_s: seconds between two calls of `between` without requests.
        """
        self._run, self._max_images, self._wait_s = run, max_images, wait_s
        self._between, self._pause_s = between, pause_s
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._started: float | None = None
        self._vitals = Vitals()
        threading.Thread(target=self._work, daemon=True, name="compute").start()

    def submit(self, kind: Hashable, images: int, payload: Any) -> Future[Any]:
        """Queue a request and return the future of its result. A cancelled request is not computed."""
        job = Job(kind, images, payload)
        with self._changed:
            self._jobs.append(job)
            self._changed.notify()
        return job.future

    @property
    def waiting(self) -> int:
        """Number of queued requests."""
        return len(self._jobs)

    def running_s(self) -> float:
        """Seconds since the start of the current batch; 0 between batches."""
        started = self._started
        return 0.0 if started is None else time.monotonic() - started

    def vitals(self) -> Vitals:
        """Return the work so far, including the time of the current batch."""
        done = self._vitals
        return replace(done, busy_s=done.busy_s + self.running_s())

    def _work(self) -> None:
        while True:
            batch = self._gather()
            if batch:
                self._compute(batch)
            self._started = time.monotonic()
            self._between()
            self._started = None

    def _gather(self) -> list[Job]:
        """Return the next batch: queued requests of one kind, oldest first; empty after `pause_s` without any."""
        with self._changed:
            if not self._jobs and not self._changed.wait(self._pause_s):
                return []
            if not self._jobs:
                return []
            first = self._jobs.popleft()
            batch, images = [first], first.images
            until = first.arrived + self._wait_s
            while True:
                for job in [job for job in self._jobs if job.kind == first.kind]:
                    if images + job.images > self._max_images:
                        break
                    self._jobs.remove(job)
                    batch.append(job)
                    images += job.images
                remaining = until - time.monotonic()
                if images >= self._max_images or remaining <= 0 or not self._changed.wait(remaining):
                    break
        return [job for job in batch if job.future.set_running_or_notify_cancel()]

    def _compute(self, batch: list[Job]) -> None:
        self._started = time.monotonic()
        try:
            answers = self._run(batch[0].kind, [job.payload for job in batch])
        except Exception as error:
            if len(batch) == 1:
                self._count(batch)
                batch[0].future.set_exception(error)
                return
            answers = None
        if answers is None:
            # Retry one by one so that only the faulty request fails.
            for job in batch:
                self._compute([job])
            return
        self._count(batch)
        for job, answer in zip(batch, answers, strict=True):
            job.future.set_result(answer)

    def _count(self, batch: list[Job]) -> None:
        """Count a batch before its results are set, so that a caller with a result sees it counted."""
        self._vitals.requests += len(batch)
        self._vitals.batches += 1
        self._vitals.images += sum(job.images for job in batch)
        self._vitals.busy_s += self.running_s()
        self._vitals.answered = time.monotonic()
        self._started = None
