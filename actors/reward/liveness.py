"""State of the replicas, and whether the pool makes progress while a request is queued."""

import logging
import math
import threading
import time
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ReplicaState

from actors.cluster.control import bounded

logger = logging.getLogger(__name__)

REPLICA = "metric"
"""Name of the one deployment in every application of the pool."""
_VITALS_TIMEOUT_S = 2.0
_CHECK_EVERY_S = 1.0
"""Seconds between two checks; concurrent requests share one."""


class Liveness:
    """Time of the last response from any replica of a metric; thread-safe."""

    def __init__(self, handle: Any, application: str) -> None:
        """Start without any response.

        Args:
            handle: Serve's handle of the application's deployment.
        """
        self._handle, self._application = handle, application
        self._lock = threading.Lock()
        self._checked, self._all_replied = -math.inf, False
        self.heard = -math.inf
        """Time of the last response of a replica to any process, on the monotonic clock."""

    def answered(self) -> None:
        """Record a response to this process."""
        self.heard = time.monotonic()

    def check(self) -> bool:
        """Query the replicas for the time of their last response to any process; return whether all of them replied."""
        with self._lock:
            if time.monotonic() - self._checked >= _CHECK_EVERY_S:
                # Taken before the query, so that a time computed from an age is never too late.
                now = time.monotonic()
                found = replica_vitals(self._handle)
                ages = [one["answered_s_ago"] for one in found if one["answered_s_ago"] is not None]
                self.heard = max([self.heard, *(now - age for age in ages)])
                self._all_replied = len(found) >= max(1, running_replicas(self._application))
                self._checked = time.monotonic()
            return self._all_replied


def replica_vitals(handle: Any) -> list[dict[str, Any]]:
    """Return the state of every replica of a deployment; replicas that do not reply within 2 s are left out."""
    try:
        answers = handle.broadcast("vitals").results(timeout_s=_VITALS_TIMEOUT_S, return_exceptions=True)
    except (RayError, RayServeException, TimeoutError) as error:
        logger.info("replicas do not reply: %s", error)
        return []
    return [answer for answer in answers if isinstance(answer, dict)]


def serve_status() -> Any:
    """Return Serve's status of all applications.

    Raises:
        WorkerLostError: Serve's controller is gone or does not respond.
    """
    return bounded(serve.status, what="status of Ray Serve")


def running_replicas(application: str) -> int:
    """Return the number of replicas of an application that accept requests; 0 without the application."""
    found = serve_status().applications.get(application)
    deployment = found.deployments.get(REPLICA) if found else None
    return int(deployment.replica_states.get(ReplicaState.RUNNING, 0)) if deployment else 0
