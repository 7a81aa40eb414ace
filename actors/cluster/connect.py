"""Join and leave a Ray cluster; error messages distinguish a wrong address from a wrong token."""

import logging
import math
import os
import random
import re
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError

from acpo_dist.core.errors import UsageError
from actors.cluster.control import attempt
from actors.ray_private import (
    agents_not_awaited,
    control_address,
    end_serve_handles,
    forget_cluster,
    object_store_bytes,
)

logger = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 10.0
_HANDLES_TIMEOUT_S = 10.0
_START_ATTEMPTS = 5
_AGENTS_TIMEOUT_S = 300.0
PATIENT = {"agent_register_timeout_ms": int(1000 * _AGENTS_TIMEOUT_S)}
"""Ray's own settings of a cluster that is started with `agents_not_awaited`."""
_PORTS = range(20_000, 32_768)
"""Below the ports that the system gives to outgoing connections, above those of common services."""
_GIB = 2**30
_SOCKET_PATH = len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
"""Characters of a socket's path that Ray appends to its temporary folder."""
TOKEN_HELP = "Set RAY_AUTH_MODE=token and put it into RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token."


def join(address: str) -> None:
    """Connect this process; `leave` disconnects it.

    Args:
        address: HOST:PORT of the cluster's control service; `auto` for $RAY_ADDRESS, else the cluster of this machine;
            `local` starts a cluster for this process, even if another one runs on this machine.

    Raises:
        UsageError: there is no cluster at the address, or it requires a token that this process does not have.
    """
    dashboard = False if address == "local" else None
    in_charge = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        _require_listener(address)
        if address == "local" and Path("/dev/shm").is_dir():
            free, needed = shutil.disk_usage("/dev/shm").free, object_store_bytes()
            if warning := small_shared_memory(free, needed):
                logger.warning("%s", warning)
        _init(address, include_dashboard=dashboard)
    except (AuthenticationError, OSError, RuntimeError, ValueError) as error:
        raise UsageError(explain(address, error)) from error
    except SystemExit as stop:
        if stop.code == signal.SIGTERM and callable(handler):
            # Raised by Ray's own handler, which is installed as soon as it connects.
            handler(signal.SIGTERM, None)
        raise
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    if in_charge and callable(handler):
        # Ray has replaced the handler by one that aborts the process.
        signal.signal(signal.SIGTERM, handler)


def _init(address: str, *, include_dashboard: bool | None) -> None:
    """Call `ray.init`; a cluster of this process that is not up in time is stopped and started again.

    Attempts after the first do not wait for Ray's agents, which start too slowly on a busy machine.

    Raises:
        RuntimeError: the cluster was not up in time in any of the attempts.
    """
    attempts = _START_ATTEMPTS if address == "local" else 1
    options: dict[str, Any] = {}
    for number in range(1, attempts + 1):
        try:
            with agents_not_awaited(unused_port()) if options else nullcontext():
                ray.init(
                    address=address, namespace="acpo", logging_level=logging.ERROR, log_to_driver=False,
                    include_dashboard=include_dashboard, **options,
                )  # fmt: skip
            return
        except Exception as error:
            # On a busy machine, Ray raises the base class itself when its node is not up within 30 s, and RuntimeError
            # when its control service is not.
            if type(error) not in (Exception, RuntimeError) or address != "local":
                raise
            ray.shutdown()
            if number == attempts:
                raise RuntimeError(f"{_ended(str(error))} Attempts: {attempts}.") from error
            logger.warning("Ray did not start (attempt %d of %d): %s", number, attempts, error)
            options = {"_system_config": PATIENT}


def unused_port() -> int:
    """Return a port of this machine that nothing listens on, chosen at random, since others may choose too.

    Raises:
        RuntimeError: none was found.
    """
    # Not the generator that experiments seed: two runs of one seed would choose the same port.
    for port in random.SystemRandom().sample(_PORTS, 100):
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port
    raise RuntimeError(f"no port from {_PORTS.start} to {_PORTS.stop - 1} is free.")


@contextmanager
def joined(address: str) -> Iterator[None]:
    """Stay connected during the block; an existing connection is used and kept.

    Raises:
        UsageError: as in `join`.
    """
    if ray.is_initialized():
        yield
        return
    join(address)
    try:
        yield
    finally:
        leave()


def leave() -> None:
    """Disconnect this process, and stop a cluster that it has started; a later `join` starts from a clean state."""
    attempt(end_serve_handles, what="end Serve handles", timeout_s=_HANDLES_TIMEOUT_S)
    forget_cluster()
    ray.shutdown()


def _require_listener(address: str) -> None:
    """Connect to the control service once, since Ray itself retries for minutes.

    Raises:
        OSError: nothing listens at the address, or the host is unknown.
        ValueError: the address has another form.
    """
    where = control_address(address)
    if where is None:
        return
    host, _, port = where.rpartition(":")
    if not port.isdecimal():
        raise ValueError("expected HOST:PORT")
    with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S):
        pass


def small_shared_memory(free: int, needed: int) -> str:
    """Return a warning if this machine's shared memory is too small for Ray's object store; empty otherwise.

    Args:
        free: free bytes of /dev/shm.
        needed: bytes of the object store.
    """
    if free >= needed:
        return ""
    return (
        f"/dev/shm has {free / _GIB:.2f} GiB free, and Ray's object store needs {needed / _GIB:.2f} GiB: Ray keeps "
        f"images and latents on disk in {tempfile.gettempdir()} instead, which is slow. Enlarge /dev/shm (docker run "
        f"--shm-size={math.ceil(needed / _GIB)}g), or lower the object store's size (environment variable "
        "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES); it must hold the images and latents of one iteration."
    )


def explain(address: str, error: Exception) -> str:
    """Message for a cluster that cannot be joined: what is wrong, and the remedy."""
    where = "in RAY_ADDRESS or on this machine" if address == "auto" else f"at {address}"
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if versions := re.findall(r"(Ray|Python): (\S+)", str(error)) if "ersion mismatch" in str(error) else []:
        theirs, ours = (", ".join(f"{name} {number}" for name, number in versions[at : at + 2]) for at in (0, 2))
        return (
            f"the cluster {where} runs {theirs}, and this process {ours}. Ray needs the same versions of both on all "
            "machines: install the cluster's versions here, or start the run from its head node (`acpo submit`)."
        )
    if isinstance(error, AuthenticationError):
        return f"the cluster {where} requires its token: {_ended(reason)} {TOKEN_HELP}"
    if address == "local" and "AF_UNIX" in reason:
        key = "RAY_TMPDIR" if os.environ.get("RAY_TMPDIR") else "TMPDIR"
        folder = os.environ.get(key, tempfile.gettempdir())
        return (
            f"no local Ray cluster can be started: {key}={folder} has {len(os.fsencode(folder))} characters, and with "
            f"Ray's own {_SOCKET_PATH} its sockets' paths exceed the system's limit of 107. Set RAY_TMPDIR to a folder "
            f"of at most {107 - _SOCKET_PATH} characters, such as /tmp."
        )
    if address == "local":
        return (
            f"no local Ray cluster can be started: {_ended(reason)} The machine may be busy or out of memory: end "
            "other work, then run the command again (`acpo train ... --resume auto` continues a run)."
        )
    return (
        f"no Ray cluster {where}: {_ended(reason)} Check that it is running, and that this is its own address "
        "(HOST:6379), not that of its job service. `acpo submit` starts a run from outside the cluster. If it "
        f"requires a token: {TOKEN_HELP}"
    )


def _ended(text: str) -> str:
    return text if text.endswith(".") else f"{text}."
