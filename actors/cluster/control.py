"""Calls to a cluster's control services with a time limit and a name, which Ray's own calls lack."""

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import TypeVar

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from acpo_dist.core.errors import AcpoError, WorkerLostError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

CONTROL_TIMEOUT_S = 300.0
"""Seconds that one call may take. Serve's controller runs at low priority, so it is slow on an overloaded machine."""
_INTERRUPTED_S = 5.0
"""Seconds that an interrupted call may still take."""


def bounded(call: Callable[[], Result], *, what: str, timeout_s: float = CONTROL_TIMEOUT_S) -> Result:
    """Return the result of a call, which runs in its own thread.

    Args:
        call: uses Ray's or Serve's control service.
        what: name of the call in errors.
        timeout_s: time limit in seconds.

    Raises:
        AcpoError: raised by the call itself.
        WorkerLostError: the call failed in another way, or took longer than `timeout_s`.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    # A daemon, so that a call that never returns does not keep the process alive.
    threading.Thread(target=run, daemon=True, name=f"ray {what}").start()
    try:
        return future.result(timeout_s)
    except AcpoError:
        raise
    except (KeyboardInterrupt, SystemExit):
        # Clean-up must see the effects of the call.
        wait([future], timeout=_INTERRUPTED_S)
        raise
    except TimeoutError as error:
        raise WorkerLostError(f"the Ray cluster did not respond to `{what}` within {timeout_s:g} s") from error
    except Exception as error:
        # Ray and Serve raise bare `Exception` and `RuntimeError` too.
        raise WorkerLostError(f"the Ray cluster failed in `{what}`: {reason(error)}") from error


def attempt(call: Callable[[], object], *, what: str, timeout_s: float = CONTROL_TIMEOUT_S) -> None:
    """Make a call for clean-up: a failure is only logged, so that it does not hide why the run ends."""
    try:
        bounded(call, what=what, timeout_s=timeout_s)
    except AcpoError as error:
        logger.warning("clean-up: %s", error)


@contextmanager
def named_failures() -> Iterator[None]:
    """Convert an exception of Ray that no other handler has converted to a `WorkerLostError`.

    Raises:
        WorkerLostError: Ray or Serve failed in the block.
    """
    try:
        yield
    except (RayError, RayServeException) as error:
        raise WorkerLostError(f"the Ray cluster failed: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """Return type and last line of an exception, at most 300 characters."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1][:300]}" if lines else type(error).__name__
