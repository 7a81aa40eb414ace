"""Wait for calls of many actors with a deadline, and convert Ray's exceptions to errors that name the worker."""

import logging
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from acpo_dist.core.errors import AcpoError, WorkerError, WorkerLostError

logger = logging.getLogger(__name__)


def gather(calls: Mapping[str, Any], *, timeout_s: float, what: str) -> dict[str, Any]:
    """Return the result of one call per worker, by worker name.

    Args:
        calls: worker name -> object reference.
        timeout_s: seconds without any response.
        what: name of the call in errors.

    Raises:
        AcpoError: raised by a worker itself.
        WorkerLostError: a worker died, or its arguments were on a lost machine; names the worker.
        WorkerError: a worker failed, or did not respond in time; names the worker.
    """
    waiting = {reference: name for name, reference in calls.items()}
    results: dict[str, Any] = {}
    while waiting:
        ready, _ = ray.wait(list(waiting), num_returns=1, timeout=timeout_s)
        if not ready:
            raise WorkerError(f"{', '.join(sorted(waiting.values()))}: no response to `{what}` within {timeout_s:g} s")
        name = waiting.pop(ready[0])
        results[name] = fetch(ready[0], name=name, what=what)
    return {name: results[name] for name in calls}


def fetch(reference: Any, *, name: str, what: str, timeout_s: float | None = None) -> Any:
    """Return the result of an object reference, or of its future if that is done; errors as in `gather`."""
    try:
        return reference.result() if isinstance(reference, Future) else ray.get(reference, timeout=timeout_s)
    except RayTaskError as error:
        cause = error.cause if isinstance(error.cause, AcpoError) else None
        if cause is not None:
            raise cause from None
        if isinstance(error.cause, RayError):
            raise WorkerLostError(f"{name}: `{what}` needs data that is lost: {error.cause}") from error.cause
        raise WorkerError(f"{name} failed in `{what}`:\n{error}") from error
    except GetTimeoutError as error:
        raise WorkerError(f"{name}: no response to `{what}` within {timeout_s:g} s") from error
    except RayActorError as error:
        raise WorkerLostError(f"{name} died in `{what}`: {error}") from error
    except RayError as error:
        raise WorkerLostError(f"{name}: `{what}` failed in Ray: {error}") from error


def kill(handles: Mapping[str, Any]) -> None:
    """End actors, some of which may be dead already."""
    for name, handle in handles.items():
        try:
            ray.kill(handle)
        except (RayError, RuntimeError, ValueError) as error:
            logger.info("%s had ended already: %s", name, error)
