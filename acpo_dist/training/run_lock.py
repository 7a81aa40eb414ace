"""Who drives a run: one process at a time, on whatever machine, lest two write into one folder."""

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

from acpo_dist.core.errors import ResumeError, RunTakenError

logger = logging.getLogger(__name__)

LOCK_FILE = "driver.json"
_BEAT_S = 5.0
_SILENT_S = 30.0
"""A driver elsewhere that did not write for so long is gone; several beats, since shared storage may be slow."""

Sign = Literal["alive", "gone", "unknown"]


@dataclass(frozen=True)
class LockHolder:
    """What a driver writes of itself."""

    token: str
    host: str
    place: str
    """Machine, start of its kernel and its process namespace: where `pid` means something."""
    pid: int
    started: float
    """When that process was started, since a number is given again; by a clock that nobody sets."""
    beat: int = 0
    """Grows while it lives. Counted, because the clocks of two machines differ."""

    def __str__(self) -> str:
        """How a message names it."""
        return f"process {self.pid} on {self.host}"


def lock_holder(root: Path) -> LockHolder | None:
    """Who drives a run, or last did without saying that it stops."""
    return _parsed(_content(root / LOCK_FILE))


def sign_of(driver: LockHolder) -> Sign:
    """Whether a driver lives, as far as can be told without waiting, which is not at all on another machine."""
    if driver.place != _place():
        return "unknown"
    try:
        process = psutil.Process(driver.pid)
        if process.status() == psutil.STATUS_ZOMBIE or _started(process) != driver.started:
            return "gone"
    except psutil.NoSuchProcess:
        return "gone"
    except psutil.Error:
        return "unknown"
    return "alive"


class RunLock:
    """The right to write into a run folder, while it is held."""

    def __init__(self, root: Path) -> None:
        """Of this folder; see `held`."""
        self._path = root / LOCK_FILE
        process = psutil.Process()
        self._me = LockHolder(uuid.uuid4().hex, socket.gethostname(), _place(), process.pid, _started(process))
        self._over = threading.Event()
        self._writing = threading.Lock()
        self._lost: LockHolder | None = None
        self._made = False

    def require(self) -> None:
        """Look whether the folder is still ours.

        Raises:
            RunTakenError: another process drives the run now.
        """
        if self._lost is None:
            self._look()
        if self._lost is not None:
            raise RunTakenError(
                f"{self._path.parent} is driven by {self._lost} now, which saw no sign of life of this process for "
                f"{_SILENT_S:g} s. It goes on from the newest checkpoint; this one ends, and writes nothing more."
            )

    def take(self, wait: Callable[[float], object]) -> None:
        """Write ourselves down, if nobody else drives the run.

        Raises:
            ResumeError: somebody does.
        """
        self._made = not self._path.parent.is_dir()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                with self._path.open("x", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(self._me)))
                return
            except FileExistsError:
                self._remove_dead(wait)

    def beat(self) -> None:
        """Give signs of life until `release`, from a thread of its own."""
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
                # The storage may come back; if not, the run itself will say so.
                logger.warning("%s cannot be written: %s", self._path, error)

    def release(self) -> None:
        """Let others drive the run."""
        self._over.set()
        # A beat that is being written must not bring the file back; one that hangs, on storage that is gone, may.
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
                # Empty where nothing was begun after all.
                self._path.parent.rmdir()

    @property
    def _aside(self) -> Path:
        return self._path.with_name(f".{LOCK_FILE}.{self._me.token}")

    def _look(self) -> None:
        found = lock_holder(self._path.parent)
        # A file that is gone or cut was taken by nobody; the next beat writes it again.
        if found is not None and found.token != self._me.token:
            self._lost = found

    def _write(self, driver: LockHolder) -> None:
        self._aside.write_text(json.dumps(asdict(driver)), encoding="utf-8")
        os.replace(self._aside, self._path)

    def _remove_dead(self, wait: Callable[[float], object]) -> None:
        """Put a dead driver's file out of the way; of several that do so at once, one gets through."""
        root, content = self._path.parent, _content(self._path)
        if content is None:
            return
        found = _parsed(content)
        sign = sign_of(found) if found is not None else "unknown"
        if sign == "unknown":
            logger.warning("waiting %g s to see whether %s still drives %s", _SILENT_S, found or "a process", root)
            wait(_SILENT_S)
            now = _content(self._path)
            if now is None:
                return
            sign = "gone" if now == content else "alive"
            content, found = now, _parsed(now) or found
        if sign == "alive":
            raise ResumeError(
                f"{root} is driven by {found or 'another process'}: two would write into one folder. Let it end, or "
                "end it; or begin another run with run.name, run.seed or run.dir."
            )
        try:
            os.rename(self._path, self._aside)
        except FileNotFoundError:
            return
        if _content(self._aside) != content:
            # Not the dead one's: somebody who came at the same moment was quicker.
            with suppress(FileExistsError):
                os.link(self._aside, self._path)
        self._aside.unlink(missing_ok=True)


@contextmanager
def held(root: Path, *, wait: Callable[[float], object] = time.sleep) -> Iterator[RunLock]:
    """Drive a run alone while the block runs.

    Raises:
        ResumeError: another process drives it.
    """
    lock = RunLock(root)
    lock.take(wait)
    threading.Thread(target=lock.beat, daemon=True, name="tenure").start()
    try:
        yield lock
    finally:
        lock.release()


def _content(path: Path) -> bytes | None:
    """None where there is no file, or it cannot be read now."""
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
    """Ticks since the machine's own start where Linux says them: psutil counts from a wall clock that may be set."""
    try:
        content = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8", errors="replace")
        # The name is in brackets and may hold anything; after it come the fields from the third on, this is the 22nd.
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
