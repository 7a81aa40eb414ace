"""Requests to the reward pool, repeated until the deadline; a missing score is never replaced."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException, RequestCancelledError
from typing_extensions import override

from acpo_dist.core.errors import RewardError, WorkerLostError
from acpo_dist.workers.learner.signal import GradientSource
from acpo_dist.workers.reward.wire import WireTensor
from acpo_dist.workers.reward.worker import ScoredGradient
from actors.reward.counts import RequestCounts
from actors.reward.liveness import REPLICA, Liveness, running_replicas, serve_status
from actors.reward.replica import ReplicaError
from actors.reward.start import refuse

logger = logging.getLogger(__name__)


class NoAnswerError(RewardError):
    """The pool did not respond in time; the request itself may be valid."""


_MAX_FAILURES = {"refused": 3, "nonfinite": 3, "memory": 3, "lost": 20, "timeout": 20, "unfit": 20}
"""Failures of one request by cause before it fails, so that a request that no replica can compute does not retry
without end, and one that ends replicas does not end all of them."""
_OWN_FAULT = ("refused", "nonfinite", "memory")
"""Causes that concern the request itself if they occur on several replicas."""
_LOST = (RayError, DeploymentUnavailableError, RequestCancelledError, RayServeException, ConnectionError)
_PATIENCE = 1.5
"""Factor on rewards.attempt_timeout_s after which a caller checks whether the pool makes progress. A replica whose
batch takes longer than one such time ends itself; after that the request is queued, or its process or machine is
lost."""
_LONGEST = 4
"""Largest duration of one attempt in a pool that makes progress, in units of rewards.deadline_s."""
_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 1.0
_THREADS = 64


@dataclass(frozen=True, kw_only=True)
class PoolLink:
    """What a process needs to send requests to the pool."""

    applications: Mapping[str, str]
    """Serve application by metric."""
    deadline_s: float
    """Seconds without any response from the pool before a request fails."""
    attempt_timeout_s: float


class RewardClient(GradientSource):
    """A client of the pool; thread-safe."""

    def __init__(self, link: PoolLink) -> None:
        """Store the names of the applications, which may still be starting; the first request gets Serve's handle."""
        self.link = link
        self._pools: dict[str, tuple[Any, Liveness]] = {}
        self._lock = threading.Lock()
        self.counts = RequestCounts()
        self._threads: ThreadPoolExecutor | None = None

    @property
    def retries(self) -> int:
        """Number of attempts that failed and were repeated."""
        return self.counts.retries

    def handle(self, metric: str) -> Any:
        """Return Serve's handle of a metric."""
        return self._pool(metric)[0]

    def liveness(self, metric: str) -> Liveness:
        """Return the record of a metric's responses."""
        return self._pool(metric)[1]

    def _pool(self, metric: str) -> tuple[Any, Liveness]:
        with self._lock:
            if metric not in self._pools:
                application = self.link.applications[metric]
                handle = serve.get_deployment_handle(REPLICA, application)
                self._pools[metric] = handle, Liveness(handle, application)
            return self._pools[metric]

    @override
    def submit(self, metric: str, sent: WireTensor, prompts: Sequence[str]) -> Future[ScoredGradient]:
        return self._executor().submit(self._request, metric, "value_and_grad", sent, tuple(prompts))

    def submit_scores(self, metric: str, images: Any, prompts: Sequence[str]) -> Future[list[float]]:
        """Return the result of `score` as a future."""
        return self._executor().submit(self.score, metric, images, prompts)

    def score(self, metric: str, images: Any, prompts: Sequence[str]) -> list[float]:
        """Return raw scores of images.

        Args:
            metric: name of a reward or judge.
            images: object reference of uint8 images (B, 3, H, W).
            prompts: one per image.

        Raises:
            RewardError: no response within the deadline, or replicas failed repeatedly.
        """
        return self._request(metric, "score", [images], tuple(prompts))

    def _executor(self) -> ThreadPoolExecutor:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(max_workers=_THREADS, thread_name_prefix="reward")
        return self._threads

    def _request(self, metric: str, method: str, *arguments: Any) -> Any:
        """Return the response of any replica, with retries."""
        with self.counts.request(metric):
            return _Request(self, metric, method, arguments).answer()

    def replicas(self, metric: str) -> int:
        """Return the number of running replicas of a metric."""
        return running_replicas(self.link.applications[metric])


@dataclass
class _Request:
    """One request and its failures so far."""

    client: RewardClient
    metric: str
    method: str
    arguments: tuple[Any, ...]
    failures: Counter[str] = field(default_factory=Counter)
    bad: set[str] = field(default_factory=set)
    """Replicas that have failed; others are preferred."""
    wrong: set[str] = field(default_factory=set)
    """Replicas whose response was not finite."""
    last: str = "no response"
    pause_s: float = _PAUSE_S

    def answer(self) -> Any:
        link, liveness = self.client.link, self.client.liveness(self.metric)
        started = time.monotonic()
        while True:
            # Any response from the pool extends the deadline, so queued requests do not time out.
            deadline = max(started, liveness.heard) + link.deadline_s
            if time.monotonic() >= deadline:
                raise NoAnswerError(
                    f"reward `{self.metric}`: no response within rewards.deadline_s={link.deadline_s:g} s; the last "
                    f"attempt: {self.last}. Raise the deadline, add replicas (`acpo rewards scale {self.metric} N`), "
                    "or see `acpo rewards status`."
                )
            try:
                answer = self._attempt(started)
            except _AttemptError as error:
                self._failed(error)
                if error.cause == "timeout":
                    self._refuse_without_replicas()
                # Serve queues a request while there is no replica; the pause is for a pool that rejects requests.
                time.sleep(max(0.0, min(self.pause_s, deadline - time.monotonic())))
                self.pause_s = min(2 * self.pause_s, _LONGEST_PAUSE_S)
                continue
            liveness.answered()
            self._end_wrong_replicas()
            return answer

    def _attempt(self, started: float) -> Any:
        try:
            method = getattr(self.client.handle(self.metric), self.method)
            return self._wait(method.remote(*self.arguments, self._avoided()), started)
        except BackPressureError as error:
            raise _AttemptError("backpressure", f"too many queued requests ({error})") from error
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, ReplicaError):
                self.bad.add(cause.replica)
                if cause.cause == "nonfinite":
                    self.wrong.add(cause.replica)
                raise _AttemptError(cause.cause, str(cause)) from error
            text = str(cause) if isinstance(cause, RewardError) else str(error).strip().splitlines()[-1]
            raise _AttemptError("refused", text) from error
        except _LOST as error:
            raise _AttemptError("lost", f"the replica died ({type(error).__name__})") from error

    def _wait(self, response: Any, started: float) -> Any:
        """Wait for the response, even if it is queued for long, as long as the pool makes progress."""
        link, liveness = self.client.link, self.client.liveness(self.metric)
        patience_s, first = _PATIENCE * link.attempt_timeout_s, time.monotonic()
        while True:
            asked = time.monotonic()
            remaining = max(started, liveness.heard) + link.deadline_s - asked
            try:
                return response.result(timeout_s=max(0.0, min(patience_s, remaining)))
            except TimeoutError as error:
                # While all replicas respond and requests complete, this one is queued: another attempt would move it to
                # the end of the queue. A lost response never arrives, so the wait is bounded.
                waited_s = time.monotonic() - first
                if (
                    remaining > 0
                    and waited_s < _LONGEST * link.deadline_s
                    and liveness.check()
                    and liveness.heard > asked
                ):
                    continue
                response.cancel()
                raise _AttemptError("timeout", f"no response within {waited_s:.3g} s") from error

    def _avoided(self) -> frozenset[str]:
        """Return the replicas to avoid while there are others."""
        if self.bad and self.client.replicas(self.metric) > len(self.bad):
            return frozenset(self.bad)
        return frozenset()

    def _failed(self, error: "_AttemptError") -> None:
        self.last = str(error)
        self.client.counts.again(error.cause)
        self.failures[error.cause] += 1
        limit = _MAX_FAILURES.get(error.cause)
        if error.cause not in ("avoided", "backpressure"):
            logger.warning("reward %s: %s: %s; retried", self.metric, error.cause, error)
        if limit is not None and self.failures[error.cause] >= limit:
            if error.cause in _OWN_FAULT:
                named = "" if f"`{self.metric}`" in self.last else f"reward `{self.metric}`: "
                raise RewardError(f"{named}{self.last} ({limit} attempts)") from error
            raise NoAnswerError(f"reward `{self.metric}` failed {limit} times: {error}") from error

    def _refuse_without_replicas(self) -> None:
        """Raise the error that refuses the start of every replica, as after a change of code, before the deadline."""
        application = self.client.link.applications[self.metric]
        with suppress(WorkerLostError):
            if running_replicas(application) == 0 and (found := serve_status().applications.get(application)):
                refuse(found)

    def _end_wrong_replicas(self) -> None:
        """End replicas whose response was not finite if another one could compute it; Serve replaces them."""
        for name in self.wrong:
            try:
                ray.kill(ray.get_actor(name, namespace="serve"))
            except (ValueError, RayError):
                logger.info("reward %s: replica %s has ended already", self.metric, name)


class _AttemptError(Exception):
    """One attempt has failed."""

    def __init__(self, cause: str, text: str) -> None:
        super().__init__(text)
        self.cause = cause
