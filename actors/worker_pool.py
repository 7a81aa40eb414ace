"""A pool of interchangeable actors, which may be lost, late or new. Tasks go to the responsive ones."""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from statistics import median
from typing import Any

import ray
from ray.exceptions import RayActorError

from acpo_dist.core.errors import AcpoError, WorkerError, WorkerLostError
from actors.group import fetch, kill

logger = logging.getLogger(__name__)

_LOOK_S = 1.0
"""Seconds between two checks for late workers."""
_LOG_EVERY_S = 30.0
_SHOWN = 500
"""Characters of a worker's last error that are shown, from its end."""
_MAX_FAILURES = 3
"""Workers that one task may end before the run fails; each is counted after `TASK_RETRIES` retries by Ray."""
TASK_RETRIES = 3
"""Number of times that Ray itself repeats a task whose worker or result was lost."""


@dataclass(frozen=True)
class Answer:
    """Result of a call, and the process that computed it."""

    process: str
    result: Any


class NotLoadedError(Exception):
    """A worker's process runs, but its model could not be loaded."""

    def __init__(self, cause: Exception, process: str) -> None:
        """Store the cause; one that cannot be pickled for the driver is replaced by its text."""
        known = cause if isinstance(cause, AcpoError) else WorkerError(f"{type(cause).__name__}: {cause}")
        super().__init__(known, process)
        self.cause, self.process = known, process


@dataclass(frozen=True)
class _Running:
    index: int
    name: str
    payload: Any
    since: float
    future: Future[Any]


class WorkerPool:
    """Actors of one kind, by name. The first object that a call returns must be an `Answer`."""

    def __init__(
        self, actors: Mapping[str, Any], *, timeout_s: float, late_s: float, ping: Callable[[Any], Any]
    ) -> None:
        """Store the actors, which may still be starting.

        Args:
            timeout_s: seconds without any response before a call fails.
            late_s: seconds after the other workers' responses until a worker is left out.
            ping: calls a cheap method of an actor.
        """
        self.actors = dict(actors)
        self._timeout_s, self._late_s, self._ping = timeout_s, late_s, ping
        self._away: dict[Any, str] = {}
        """Pending call -> name of a late or lost worker, which receives no tasks until it responds."""
        self._processes: dict[str, str] = {}
        self._lost: dict[str, str] = {}
        """Last error of every lost worker."""
        self.redone = 0
        """Tasks that were repeated."""

    def present(self) -> list[str]:
        """Names of the responsive workers."""
        self._readmit()
        away = set(self._away.values())
        return [name for name in self.actors if name not in away]

    def ask(self, call: Callable[[Any], Any], *, what: str, least: int) -> dict[str, Any]:
        """Call every responsive worker; late ones are left out once `least` have responded.

        Args:
            call: actor -> object reference.
            what: names the call in errors.
            least: responses that are needed.

        Returns:
            Result by worker name.

        Raises:
            WorkerLostError: fewer than `least` workers responded in time; names the others.
        """
        waiting = {call(self.actors[name]): name for name in self.present()}
        results: dict[str, Any] = {}
        started = enough_since = logged = time.monotonic()
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=_LOOK_S)
            now = time.monotonic()
            if ready:
                name = waiting.pop(ready[0])
                answer = self._result(ready[0], name, what)
                if answer is not None:
                    results[name] = answer.result
                    enough_since = now
                continue
            if len(results) >= least and now - enough_since > self._late_s:
                break
            if now - started > self._timeout_s:
                break
            if now - logged > _LOG_EVERY_S:
                logger.warning("`%s`: waiting for %s", what, ", ".join(sorted(waiting.values())))
                logged = now
        for reference, name in waiting.items():
            logger.warning("%s has not responded to `%s`; continuing without it until it responds", name, what)
            self._away[reference] = name
        if len(results) < least:
            raise WorkerLostError(
                f"{len(results)} workers responded to `{what}` within {time.monotonic() - started:.0f} s, {least} are "
                f"needed; no response from {', '.join(sorted(self._away.values())) or 'any'}. Add machines or lower "
                "rollout.num_workers (cluster.roles.rollout.min_workers lets a run start with fewer)."
                + "".join(f"\n{name} was lost: ...{text}" for name, text in sorted(self._lost.items()))
            )
        return results

    def spread(
        self, names: Sequence[str], submit: Callable[[Any, int], tuple[Any, Any]], *, what: str,
        advance: Callable[[int], None] | None = None,
    ) -> list[tuple[Any, Any]]:  # fmt: skip
        """Distribute tasks over free workers; tasks of lost or late workers are repeated, and the first result counts.

        Args:
            names: one per task, for errors.
            submit: (actor, index) -> (reference to wait for, payload to return with the result).
            what: name of the call in errors.
            advance: called with the index of a finished task.

        Returns:
            (result, payload) per task, in the order of `names`.

        Raises:
            WorkerLostError: no worker responds in time, or a task ended `_MAX_FAILURES` workers.
        """
        todo, free = deque(range(len(names))), deque(self.present())
        running: dict[Any, _Running] = {}
        done: dict[int, tuple[Any, Any]] = {}
        failures: Counter[int] = Counter()
        took: list[float] = []
        arrived: SimpleQueue[Any] = SimpleQueue()
        heard = looked = time.monotonic()
        while len(done) < len(names):
            if self._away:
                busy = {task.name for task in running.values()}
                free = deque(name for name in self.present() if name not in busy)
            if not todo and free and time.monotonic() - looked > _LOOK_S:
                looked = time.monotonic()
                todo.extend(self._overdue(running, done, took, most=len(free)))
            while todo and free:
                name, index = free.popleft(), todo.popleft()
                reference, payload = submit(self.actors[name], index)
                future = reference.future()
                running[reference] = _Running(index, name, payload, time.monotonic(), future)
                future.add_done_callback(lambda _, reference=reference: arrived.put(reference))
            ready = self._await_any(arrived, running)
            now = time.monotonic()
            for reference in ready:
                if reference not in running:
                    continue
                task, heard = running.pop(reference), now
                answer = self._result(task.future if task.future.done() else reference, task.name, what)
                if answer is not None:
                    free.append(task.name)
                if task.index in done:
                    continue
                if answer is not None:
                    done[task.index] = (answer.result, task.payload)
                    took.append(now - task.since)
                    if advance:
                        advance(task.index)
                    continue
                failures[task.index] += 1
                if failures[task.index] >= _MAX_FAILURES:
                    raise WorkerLostError(f"{names[task.index]}...: every worker died in `{what}`, last {task.name}")
                self.redone += 1
                todo.appendleft(task.index)
            if not ready and now - heard > self._timeout_s:
                who = ", ".join(sorted({task.name for task in running.values()} | set(self._away.values())))
                raise WorkerLostError(f"{who}: no response to `{what}` within {self._timeout_s:g} s")
        for reference, task in running.items():
            # Another worker was faster; the result is dropped, and the worker rejoins when it responds.
            self._away[reference] = task.name
        return [done[index] for index in range(len(names))]

    def _await_any(self, arrived: "SimpleQueue[Any]", running: Mapping[Any, _Running]) -> list[Any]:
        """Wait up to `_LOOK_S` for a result; return the references of all that have arrived.

        The time that `ray.wait` takes grows with the number of references, so it is only used for late workers.
        """
        if self._away:
            return ray.wait([*running, *self._away], num_returns=1, timeout=_LOOK_S)[0]
        try:
            found = [arrived.get(timeout=_LOOK_S)]
        except Empty:
            return ray.wait([*running], num_returns=len(running), timeout=0)[0] if running else []
        while not arrived.empty():
            found.append(arrived.get())
        return found

    def _overdue(
        self, running: Mapping[Any, _Running], done: Mapping[int, Any], took: Sequence[float], *, most: int
    ) -> list[int]:  # fmt: skip
        """Return the indices of up to `most` tasks whose worker is late and that no other worker has."""
        limit, now = self._late_s + 3 * (median(took) if took else self._timeout_s), time.monotonic()
        given = Counter(task.index for task in running.values())
        late = [
            task for task in running.values()
            if task.index not in done and given[task.index] == 1 and now - task.since > limit
        ][:most]  # fmt: skip
        for task in late:
            logger.warning("%s is late (%.0f s); its task is repeated by another worker", task.name, limit)
            self.redone += 1
        return [task.index for task in late]

    def _result(self, reference: Any, name: str, what: str) -> Answer | None:
        """Return the answer; None if the worker was lost, which then receives no tasks until it responds to a ping."""
        try:
            answer: Answer = fetch(reference, name=name, what=what)
        except WorkerError as error:
            if (unloaded := _unloaded(error)) is not None:
                self._drop(name, unloaded)
                return None
            if not isinstance(error, WorkerLostError) or not isinstance(error.__cause__, RayActorError):
                raise
            logger.warning("%s was lost in `%s` (%s)", name, what, type(error.__cause__).__name__)
            self._lost[name] = " ".join(str(error.__cause__).split())[-_SHOWN:]
            self._away[self._ping(self.actors[name])] = name
            return None
        self._lost.pop(name, None)
        before = self._processes.get(name, answer.process)
        self._processes[name] = answer.process
        if answer.process != before:
            logger.warning("%s died and was restarted (%s, now %s)", name, before, answer.process)
            self.redone += 1
        return answer

    def _readmit(self) -> None:
        """Readmit workers that have responded in the meantime, and remove those that Ray does not restart."""
        if not self._away:
            return
        ready, _ = ray.wait(list(self._away), num_returns=len(self._away), timeout=0)
        for reference in ready:
            name = self._away.pop(reference)
            try:
                answer: Answer = fetch(reference, name=name, what="ping")
            except WorkerError as error:
                if (unloaded := _unloaded(error)) is not None:
                    self._drop(name, unloaded, late=True)
                elif isinstance(error.__cause__, RayActorError) and self._dead(name):
                    del self.actors[name]
                    logger.error("%s is not restarted: %s", name, error)
                continue
            self._processes[name] = answer.process
            logger.warning("%s responds again", name)
        if not self.actors:
            raise WorkerLostError("no worker is left; see the log for the reasons")

    def _drop(self, name: str, error: NotLoadedError, *, late: bool = False) -> None:
        """Remove a worker that cannot load its model on a machine that is new to the run.

        Args:
            late: whether the run has started without it.

        Raises:
            AcpoError: the cause, if the worker was part of the start of the run or is the last one.
        """
        if (name not in self._processes and not late) or len(self.actors) == 1:
            raise error.cause
        logger.error("%s is removed (%s): %s", name, error.process, error.cause)
        kill({name: self.actors.pop(name)})

    def _dead(self, name: str) -> bool:
        """Return whether Ray will not restart a lost actor; a call to one that is being restarted waits."""
        sign = self._ping(self.actors[name])
        if not ray.wait([sign], timeout=_LOOK_S)[0]:
            self._away[sign] = name
            return False
        try:
            fetch(sign, name=name, what="ping")
        except WorkerError:
            return True
        return False


def _unloaded(error: WorkerError) -> NotLoadedError | None:
    """Return the error of a worker that could not load its model, if that was raised."""
    cause = getattr(error.__cause__, "cause", None)
    return cause if isinstance(cause, NotLoadedError) else None
