"""What replicas say of themselves, and whether the pool gets on with its work while a request waits for its turn."""

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
_LOOK_EVERY_S = 1.0
"""Many requests that wait look together."""


class Liveness:
    """When the replicas of one metric last answered somebody; may be used from several threads."""

    def __init__(self, handle: Any, application: str) -> None:
        """Know nothing yet.

        Args:
            handle: Serve's handle of the application's deployment.
        """
        self._handle, self._application = handle, application
        self._lock = threading.Lock()
        self._looked, self._all_there = -math.inf, False
        self.heard = -math.inf
        """Last sign, on the monotonic clock, that a replica has answered a request of anybody."""

    def answered(self) -> None:
        """A request of this process was answered."""
        self.heard = time.monotonic()

    def look(self) -> bool:
        """Ask the replicas when they last answered, whoever had asked; whether all of them say so."""
        with self._lock:
            if time.monotonic() - self._looked >= _LOOK_EVERY_S:
                # Before they are asked: what they say they did so long ago was not done later than this makes of it.
                now = time.monotonic()
                found = replica_vitals(self._handle)
                ages = [one["answered_s_ago"] for one in found if one["answered_s_ago"] is not None]
                self.heard = max([self.heard, *(now - age for age in ages)])
                self._all_there = len(found) >= max(1, running_replicas(self._application))
                self._looked = time.monotonic()
            return self._all_there


def replica_vitals(handle: Any) -> list[dict[str, Any]]:
    """What every replica of a deployment says of itself; one that does not answer at once is left out."""
    try:
        answers = handle.broadcast("vitals").results(timeout_s=_VITALS_TIMEOUT_S, return_exceptions=True)
    except (RayError, RayServeException, TimeoutError) as error:
        logger.info("replicas do not answer: %s", error)
        return []
    return [answer for answer in answers if isinstance(answer, dict)]


def serve_status() -> Any:
    """Serve's status of all applications.

    Raises:
        WorkerLostError: Serve's controller is gone or does not respond.
    """
    return bounded(serve.status, what="status of Ray Serve")


def running_replicas(application: str) -> int:
    """Replicas of an application that take requests; 0 when there is none or no such application."""
    found = serve_status().applications.get(application)
    deployment = found.deployments.get(REPLICA) if found else None
    return int(deployment.replica_states.get(ReplicaState.RUNNING, 0)) if deployment else 0
