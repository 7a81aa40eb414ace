"""Run lock: at most one process, on any host, writes to a run folder."""

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import psutil

from acpo_dist.core.errors import ResumeError, RunTakenError, UsageError, shorten

logger = logging.getLogger(__name__)

LOCK_FILE = "driver.json"
_BEAT_S = 5.0
_SILENT_S = 30.0
"""Seconds without a heartbeat after which a holder on another host counts as dead; several heartbeats long, because
shared storage may be slow."""

Sign = Literal["alive", "gone", "unknown"]


@dataclass(frozen=True)
class LockHolder:
    """The process that holds the lock, as written to the lock file."""

    token: str
    host: str
    place: str
    """Host name, boot id and process namespace: the scope in which `pid` is unique."""
    pid: int
    started: float
    """Start time of the process on a monotonic clock: distinguishes it from a later process with the same number."""
    beat: int = 0
    """Heartbeat counter. A count and not a time, because the clocks of two hosts differ."""

    def __str__(self) -> str:
        """Return process and host, for messages."""
        return f"process {self.pid} on {self.host}"


def lock_holder(root: Path) -> LockHolder | None:
    """Return the process in the lock file, alive or not; None without a readable lock file."""
    return _parsed(_content(root / LOCK_FILE))


def sign_of(holder: LockHolder) -> Sign:
    """Return whether the holder is alive, without waiting; `unknown` on another host."""
    if holder.place != _place():
        return "unknown"
    try:
        process = psutil.Process(holder.pid)
        if process.status() == psutil.STATUS_ZOMBIE or _started(process) != holder.started:
            return "gone"
    except psutil.NoSuchProcess:
        return "gone"
    except psutil.Error:
        return "unknown"
    return "alive"


class RunLock:
    """Exclusive right to write to a run folder; acquired by `held`."""

    def __init__(self, root: Path) -> None:
        """Prepare the lock of the folder `root`; `take` acquires it."""
        self._path = root / LOCK_FILE
        process = psutil.Process()
        self._me = LockHolder(uuid.uuid4().hex, socket.gethostname(), _place(), process.pid, _started(process))
        self._over = threading.Event()
        self._writing = threading.Lock()
        self._lost: LockHolder | None = None
        self._made = False

    def require(self) -> None:
        """Check that this process still holds the lock.

        Raises:
            RunTakenError: another process holds the lock now.
        """
        if self._lost is None:
            self._look()
        if self._lost is not None:
            raise RunTakenError(
                f"{self._path.parent}: {self._lost} holds the run lock now, because it saw no heartbeat of this "
                f"process for {_SILENT_S:g} s. It continues from the newest checkpoint; this process ends and writes "
                "nothing more."
            )

    def take(self, wait: Callable[[float], object]) -> None:
        """Acquire the lock; a lock file of a dead process is replaced.

        Args:
            wait: sleeps for a number of seconds, to see whether a holder on another host is alive.

        Raises:
            ResumeError: another live process holds the lock.
            UsageError: the folder cannot be made or written.
        """
        folder = self._path.parent
        self._made = not os.path.isdir(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            while True:
                try:
                    with self._path.open("x", encoding="utf-8") as file:
                        file.write(json.dumps(asdict(self._me)))
                    return
                except FileExistsError:
                    self._remove_dead(wait)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", error)
            raise UsageError(
                f"run.dir: {shorten(str(folder), 250)} cannot be made or written: {reason}. Set run.dir, or "
                "ACPO_RUNS for the folder of all runs, to a folder of your own with free space."
            ) from error

    def beat(self) -> None:
        """Write heartbeats until `release`; runs in its own thread."""
        count = 0
        while not self._over.wait(_BEAT_S):
            count += 1
            try:
                with self._writing:
                    if self._over.is_set():
                        return
                    self._look()
                    if self._lost is not None:
                        return
                    self._write(replace(self._me, beat=count))
            except OSError as error:
                # The storage may recover; if not, the run itself fails on it.
                logger.warning("%s cannot be written: %s", self._path, error)

    def release(self) -> None:
        """Release the lock and remove its file."""
        self._over.set()
        # A heartbeat in progress must not create the file again, unless it hangs on lost storage.
        locked = self._writing.acquire(timeout=_BEAT_S)
        try:
            self._aside.unlink(missing_ok=True)
            found = lock_holder(self._path.parent)
            if found is not None and found.token == self._me.token:
                self._path.unlink(missing_ok=True)
        finally:
            if locked:
                self._writing.release()
        if self._made:
            with suppress(OSError):
                # The folder is empty if the run never started.
                self._path.parent.rmdir()

    @property
    def _aside(self) -> Path:
        return self._path.with_name(f".{LOCK_FILE}.{self._me.token}")

    def _look(self) -> None:
        found = lock_holder(self._path.parent)
        # A missing or truncated file has no other holder; the next heartbeat writes it again.
        if found is not None and found.token != self._me.token:
            self._lost = found

    def _write(self, holder: LockHolder) -> None:
        self._aside.write_text(json.dumps(asdict(holder)), encoding="utf-8")
        os.replace(self._aside, self._path)

    def _remove_dead(self, wait: Callable[[float], object]) -> None:
        """Remove the lock file of a dead holder; of several processes that try at once, one succeeds."""
        root, content = self._path.parent, _content(self._path)
        if content is None:
            return
        found = _parsed(content)
        sign = sign_of(found) if found is not None else "unknown"
        if sign == "unknown":
            logger.warning(
                "waiting %g s for a heartbeat of %s, which holds the lock of %s", _SILENT_S, found or "a process", root
            )
            wait(_SILENT_S)
            now = _content(self._path)
            if now is None:
                return
            sign = "gone" if now == content else "alive"
            content, found = now, _parsed(now) or found
        if sign == "alive":
            raise ResumeError(
                f"{root}: {found or 'another process'} holds the run lock, and two processes must not write to one "
                "folder. Wait for it or end it, or start another run with run.name, run.seed or run.dir."
            )
        try:
            os.rename(self._path, self._aside)
        except FileNotFoundError:
            return
        if _content(self._aside) != content:
            # The file belongs to another process that acquired the lock in between: restore it.
            with suppress(FileExistsError):
                os.link(self._aside, self._path)
        self._aside.unlink(missing_ok=True)


@contextmanager
def held(root: Path, *, wait: Callable[[float], object] = time.sleep) -> Iterator[RunLock]:
    """Hold the run lock while the block runs.

    Raises:
        ResumeError: another live process holds it.
    """
    lock = RunLock(root)
    lock.take(wait)
    threading.Thread(target=lock.beat, daemon=True, name="run-lock").start()
    try:
        yield lock
    finally:
        lock.release()


def _content(path: Path) -> bytes | None:
    """Return the content of the file; None if it is missing or unreadable."""
    try:
        return path.read_bytes()
    except OSError:
        return None


def _parsed(content: bytes | None) -> LockHolder | None:
    try:
        return LockHolder(**json.loads(content)) if content else None
    except (ValueError, TypeError):
        return None


def _started(process: psutil.Process) -> float:
    """Return the start time in ticks since boot on Linux, from psutil elsewhere, whose wall clock may be changed."""
    try:
        content = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8", errors="replace")
        # The name in brackets may hold any character; the fields after it start with the third, and this is the 22nd.
        return float(content.rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return process.create_time()


def _place() -> str:
    parts = [socket.gethostname()]
    for name in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        try:
            parts.append(os.readlink(name) if "ns" in name else Path(name).read_text(encoding="ascii").strip())
        except OSError:
            continue
    return " ".join(parts)
