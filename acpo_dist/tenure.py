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

DRIVER = "driver.json"
_BEAT_S = 5.0
_SILENT_S = 30.0
"""A driver elsewhere that did not write for so long is gone; several beats, since shared storage may be slow."""

Sign = Literal["alive", "gone", "unknown"]


@dataclass(frozen=True)
class Driver:
    """What a driver writes of itself."""

    token: str
    host: str
    place: str
    """Machine, start of its kernel and its process namespace: where `pid` means something."""
    pid: int
    created: float
    """Start of that process, since a number is given again."""
    beat: int = 0
    """Grows while it lives. Counted, because the clocks of two machines differ."""

    def __str__(self) -> str:
        """How a message names it."""
        return f"process {self.pid} on {self.host}"


def driver_of(root: Path) -> Driver | None:
    """Who drives a run, or last did without saying that it stops."""
    try:
        return Driver(**json.loads((root / DRIVER).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def sign_of(driver: Driver) -> Sign:
    """Whether a driver lives, as far as can be told without waiting, which is not at all on another machine."""
    if driver.place != _place():
        return "unknown"
    try:
        process = psutil.Process(driver.pid)
        alive = process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - driver.created) < 1.0
    except psutil.Error:
        return "gone"
    return "alive" if alive else "gone"


class Tenure:
    """The right to write into a run folder, while it is held."""

    def __init__(self, root: Path) -> None:
        """Of this folder; see `held`."""
        self._path = root / DRIVER
        process = psutil.Process()
        self._me = Driver(uuid.uuid4().hex, socket.gethostname(), _place(), process.pid, process.create_time())
        self._over = threading.Event()
        self._lost: Driver | None = None

    def require(self) -> None:
        """Look whether the folder is still ours.

        Raises:
            RunTakenError: another process drives the run now.
        """
        if self._lost is None:
            self._look()
        if self._lost is not None:
            raise RunTakenError(
                f"{self._path.parent} is driven by {self._lost} now, which took this process for dead after "
                f"{_SILENT_S:g} s without a sign of life. It goes on from the newest checkpoint; this one ends."
            )

    def take(self, wait: Callable[[float], object]) -> None:
        """Write ourselves down, if nobody else drives the run.

        Raises:
            ResumeError: somebody does.
        """
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
        self._path.with_name(f".{DRIVER}.{self._me.token}").unlink(missing_ok=True)
        found = driver_of(self._path.parent)
        if found is not None and found.token == self._me.token:
            self._path.unlink(missing_ok=True)
        with suppress(OSError):
            # Empty where nothing was begun after all.
            self._path.parent.rmdir()

    def _look(self) -> None:
        found = driver_of(self._path.parent)
        # A file that is gone or cut was taken by nobody; the next beat writes it again.
        if found is not None and found.token != self._me.token:
            self._lost = found

    def _write(self, driver: Driver) -> None:
        partial = self._path.with_name(f".{DRIVER}.{self._me.token}")
        partial.write_text(json.dumps(asdict(driver)), encoding="utf-8")
        os.replace(partial, self._path)

    def _remove_dead(self, wait: Callable[[float], object]) -> None:
        """Put a dead driver's file out of the way; of several that do so at once, one gets through."""
        root = self._path.parent
        found = driver_of(root)
        sign = sign_of(found) if found is not None else "unknown"
        if sign == "unknown":
            logger.warning("waiting %g s to see whether %s still drives %s", _SILENT_S, found or "a process", root)
            wait(_SILENT_S)
            now = driver_of(root)
            sign = "gone" if now == found else "alive"
            found = now or found
        if sign == "alive":
            raise ResumeError(
                f"{root} is driven by {found}: two would write into one folder. Let it end, or end it; or begin "
                "another run with run.name, run.seed or run.dir."
            )
        aside = self._path.with_name(f".{DRIVER}.{self._me.token}")
        try:
            os.rename(self._path, aside)
        except FileNotFoundError:
            return
        aside.unlink(missing_ok=True)


@contextmanager
def held(root: Path, *, wait: Callable[[float], object] = time.sleep) -> Iterator[Tenure]:
    """Drive a run alone while the block runs.

    Raises:
        ResumeError: another process drives it.
    """
    tenure = Tenure(root)
    tenure.take(wait)
    threading.Thread(target=tenure.beat, daemon=True, name="tenure").start()
    try:
        yield tenure
    finally:
        tenure.release()


def _place() -> str:
    parts = [socket.gethostname()]
    for name in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        try:
            parts.append(os.readlink(name) if "ns" in name else Path(name).read_text(encoding="ascii").strip())
        except OSError:
            continue
    return " ".join(parts)
