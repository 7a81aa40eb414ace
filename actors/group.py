"""Wait for calls of many actors with a deadline, and convert Ray's exceptions to errors that name the worker."""

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from acpo_dist.core.errors import AcpoError, WorkerError, WorkerLostError

logger = logging.getLogger(__name__)


ASK_S = 15.0
"""Seconds without a response after which workers are asked for a sign of life; two such times find a lost response."""


def gather(
    calls: Mapping[str, Any], *, timeout_s: float, what: str, ping: Callable[[str], Any] | None = None
) -> dict[str, Any]:
    """Return the result of one call per worker, by worker name.

    Args:
        calls: worker name -> object reference.
        timeout_s: seconds without any response.
        what: name of the call in errors.
        ping: makes a later call of the named worker, which executes its calls in order, and returns its reference;
            finds responses that the network has lost. For calls with small results, which arrive in that order too.

    Raises:
        AcpoError: raised by a worker itself.
        WorkerLostError: a worker died, its response or its arguments were lost; names the worker.
        WorkerError: a worker failed, or did not respond in time; names the worker.
    """
    waiting = {reference: name for name, reference in calls.items()}
    results: dict[str, Any] = {}
    signs: dict[str, Any] = {}
    passed: set[str] = set()
    heard = time.monotonic()
    while waiting:
        remaining = heard + timeout_s - time.monotonic()
        ready, _ = ray.wait(list(waiting), num_returns=1, timeout=max(0.0, min(ASK_S, remaining)))
        if ready:
            name = waiting.pop(ready[0])
            results[name] = fetch(ready[0], name=name, what=what)
            heard = time.monotonic()
            continue
        names = sorted(waiting.values())
        if remaining <= ASK_S:
            raise WorkerError(f"{', '.join(names)}: no response to `{what}` within {timeout_s:g} s")
        # After a cut of the network, Ray waits without end for a response that was sent during it.
        if lost := passed.intersection(names):
            raise WorkerLostError(f"{', '.join(sorted(lost))}: the response to `{what}` was lost")
        if ping:
            signs |= {name: ping(name) for name in names if name not in signs}
            passed = {name for name in names if _answered(signs, name)}
    return {name: results[name] for name in calls}


def _answered(signs: dict[str, Any], name: str) -> bool:
    """Whether a worker has answered its sign of life; one that failed is made again."""
    if not ray.wait([signs[name]], timeout=0)[0]:
        return False
    try:
        ray.get(signs[name])
    except RayError:
        # Unavailable for a while; a dead worker fails the call itself.
        del signs[name]
        return False
    return True


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
