"""Wait until the reward pool runs, and report why it does not start."""

import re
import time
from collections.abc import Sequence
from typing import Any

from acpo_dist.core import errors
from acpo_dist.core.errors import UsageError, WorkerError
from actors.reward.liveness import serve_status

_OURS = re.compile(rf"^{re.escape(errors.__name__)}\.(\w+): (.*)", re.MULTILINE | re.DOTALL)
"""The last lines of a traceback that ends in one of this project's errors."""


def await_running(applications: Sequence[str], *, timeout_s: float) -> None:
    """Wait until applications run; Serve itself waits without limit for a replica that cannot be placed.

    Raises:
        UsageError: raised by a replica itself; a restart would raise it again.
        WorkerError: an application failed, or does not run in time; with the reason if known.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        found = serve_status().applications
        states = {name: found[name] for name in applications if name in found}
        for one in states.values():
            refuse(one)
        failed = [f"{name}: {_reason(one)}" for name, one in states.items() if one.status == "DEPLOY_FAILED"]
        if failed:
            raise WorkerError("; ".join(failed))
        waiting = [name for name in applications if name not in states or states[name].status != "RUNNING"]
        if not waiting:
            return
        if time.monotonic() > deadline:
            reasons = [f"{name} ({_reason(states[name])})" if name in states else name for name in waiting]
            raise WorkerError(
                f"{', '.join(reasons)} not ready within {timeout_s:g} s (cluster.worker_timeout_s); see the machines' "
                "Serve logs"
            )
        # Serve has no call that blocks until an application is ready.
        time.sleep(0.2)


def refuse(application: Any) -> None:
    """Raise an error of a replica's start that is meant for the user; Serve would start the replica again.

    Args:
        application: Serve's status of it.
    """
    for deployment in application.deployments.values():
        said = _OURS.search(deployment.message)
        kind = getattr(errors, said[1], None) if said else None
        if said and isinstance(kind, type) and issubclass(kind, UsageError):
            raise kind(said[2].strip())


def _reason(application: Any) -> str:
    """Return the last line of a replica's traceback, else Serve's own message, which names only the deployment."""
    last = [one.message.strip().splitlines()[-1] for one in application.deployments.values() if one.message.strip()]
    return "; ".join(last) or application.message or str(application.status)
