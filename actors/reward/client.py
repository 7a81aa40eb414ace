"""Asks the pool, and asks again: within the deadline no request is lost and none is answered by a made-up score."""

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException, RequestCancelledError

from acpo_dist.core.errors import RewardError
from acpo_dist.workers.reward.wire import WireTensor
from acpo_dist.workers.reward.worker import ScoredGradient
from actors.reward.counts import RequestCounts
from actors.reward.liveness import REPLICA, Liveness, running_replicas
from actors.reward.replica import ReplicaError

logger = logging.getLogger(__name__)


class NoAnswerError(RewardError):
    """The pool has no answer now, though the request may be right."""


_MAX_FAILURES = {"refused": 3, "nonfinite": 3, "memory": 3, "lost": 20, "timeout": 20, "unfit": 20}
"""How often a request may fail for one cause: one that no replica can answer must not go round for ever, and one that
ends every replica it meets must not end them all."""
_OWN_FAULT = ("refused", "nonfinite", "memory")
"""Causes that, met on one replica after the other, lie in the request itself."""
_LOST = (RayError, DeploymentUnavailableError, RequestCancelledError, RayServeException, ConnectionError)
_PATIENCE = 1.5
"""A replica ends itself when one batch takes longer than rewards.attempt_timeout_s. After so many times that a caller
looks whether its request waits for its turn, or for a process that is frozen or a machine that is gone."""
_LONGEST = 4
"""Times rewards.deadline_s that one attempt lasts at most, in a pool that answers others."""
_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 1.0


@dataclass(frozen=True, kw_only=True)
class PoolLink:
    """What a process needs to ask the pool."""

    applications: Mapping[str, str]
    """Serve application by metric."""
    deadline_s: float
    """Longest time in which the pool answers nobody."""
    attempt_timeout_s: float


class RewardClient:
    """A caller of the pool; may be used from several threads."""

    elsewhere = True

    def __init__(self, link: PoolLink) -> None:
        """Connect to the applications."""
        self.link = link
        self._handles = {name: serve.get_deployment_handle(REPLICA, app) for name, app in link.applications.items()}
        self.counts = RequestCounts()
        self.liveness_records = {name: Liveness(self._handles[name], app) for name, app in link.applications.items()}
        self._threads: ThreadPoolExecutor | None = None

    @property
    def retries(self) -> int:
        """Attempts that failed and were followed by another one."""
        return self.counts.retries

    def handle(self, metric: str) -> Any:
        """Serve's handle of a metric."""
        return self._handles[metric]

    def submit(self, metric: str, method: str, *arguments: Any) -> Future[Any]:
        """Ask in a thread of its own."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(max_workers=64, thread_name_prefix="reward")
        return self._threads.submit(self.ask, metric, method, *arguments)

    def score(self, metric: str, images: Any, prompts: Sequence[str]) -> list[float]:
        """Raw scores of the uint8 images (B, 3, H, W) that an object reference points to."""
        return self.ask(metric, "score", [images], tuple(prompts))

    def value_and_grad(self, metric: str, sent: WireTensor, prompts: Sequence[str]) -> ScoredGradient:
        """See `GradientSource.value_and_grad`."""
        return self.ask(metric, "value_and_grad", sent, tuple(prompts))

    def ask(self, metric: str, method: str, *arguments: Any) -> Any:
        """The answer, from whichever replica has it.

        Raises:
            RewardError: none came within the deadline, or replicas failed again and again.
        """
        with self.counts.request(metric):
            return _Request(self, metric, method, arguments).answer()

    def replicas(self, metric: str) -> int:
        """Replicas that serve a metric now."""
        return running_replicas(self.link.applications[metric])


@dataclass
class _Request:
    """One request and what has happened to it."""

    client: RewardClient
    metric: str
    method: str
    arguments: tuple[Any, ...]
    failures: Counter[str] = field(default_factory=Counter)
    bad: set[str] = field(default_factory=set)
    """Replicas that have failed: another is to be asked."""
    wrong: set[str] = field(default_factory=set)
    """Those of them whose answer was not finite."""
    last: str = "nothing was heard"
    pause_s: float = _PAUSE_S

    def answer(self) -> Any:
        link, liveness = self.client.link, self.client.liveness_records[self.metric]
        started = time.monotonic()
        while True:
            # Who waits behind others does not wait in vain: the deadline is for a pool that answers nobody.
            deadline = max(started, liveness.heard) + link.deadline_s
            if time.monotonic() >= deadline:
                raise NoAnswerError(
                    f"reward `{self.metric}`: no answer within rewards.deadline_s={link.deadline_s:g} s; the last "
                    f"attempt: {self.last}. Raise it, add replicas (`acpo rewards scale {self.metric} N`), or see what "
                    "the replicas say (`acpo rewards status`)."
                )
            try:
                answer = self._attempt(started)
            except _AttemptError as error:
                self._failed(error)
                # Serve queues a request while there is no replica, so this only spares a pool that turns it away.
                time.sleep(max(0.0, min(self.pause_s, deadline - time.monotonic())))
                self.pause_s = min(2 * self.pause_s, _LONGEST_PAUSE_S)
                continue
            liveness.answered()
            self._convict()
            return answer

    def _attempt(self, started: float) -> Any:
        try:
            method = getattr(self.client.handle(self.metric), self.method)
            return self._wait(method.remote(*self.arguments, self._avoided()), started)
        except BackPressureError as error:
            raise _AttemptError("backpressure", f"too many requests wait ({error})") from error
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
        """The answer, however many requests are before this one, as long as the pool gets on with them."""
        link, liveness = self.client.link, self.client.liveness_records[self.metric]
        patience_s, first = _PATIENCE * link.attempt_timeout_s, time.monotonic()
        while True:
            asked = time.monotonic()
            remaining = max(started, liveness.heard) + link.deadline_s - asked
            try:
                return response.result(timeout_s=max(0.0, min(patience_s, remaining)))
            except TimeoutError as error:
                # With every replica at work, and requests answered meanwhile, this one's turn will come: to ask again
                # would only put it at the end of the queue. An answer that was lost on its way never comes, however.
                waited_s = time.monotonic() - first
                if (
                    remaining > 0
                    and waited_s < _LONGEST * link.deadline_s
                    and liveness.look()
                    and liveness.heard > asked
                ):
                    continue
                response.cancel()
                raise _AttemptError("timeout", f"no answer within {waited_s:.3g} s") from error

    def _avoided(self) -> frozenset[str]:
        """Bad replicas, as long as there are others."""
        if self.bad and self.client.replicas(self.metric) > len(self.bad):
            return frozenset(self.bad)
        return frozenset()

    def _failed(self, error: "_AttemptError") -> None:
        self.last = str(error)
        self.client.counts.again(error.cause)
        self.failures[error.cause] += 1
        limit = _MAX_FAILURES.get(error.cause)
        if error.cause not in ("avoided", "backpressure"):
            logger.warning("reward %s: %s: %s; asked again", self.metric, error.cause, error)
        if limit is not None and self.failures[error.cause] >= limit:
            if error.cause in _OWN_FAULT:
                named = "" if f"`{self.metric}`" in self.last else f"reward `{self.metric}`: "
                raise RewardError(f"{named}{self.last} (asked {limit} times)") from error
            raise NoAnswerError(f"reward `{self.metric}` failed {limit} times: {error}") from error

    def _convict(self) -> None:
        """Another replica has scored what these could not: proof that the fault was theirs. Serve replaces them."""
        for name in self.wrong:
            try:
                ray.kill(ray.get_actor(name, namespace="serve"))
            except (ValueError, RayError):
                logger.info("reward %s: replica %s has left already", self.metric, name)


class _AttemptError(Exception):
    """One attempt has failed."""

    def __init__(self, cause: str, text: str) -> None:
        super().__init__(text)
        self.cause = cause
