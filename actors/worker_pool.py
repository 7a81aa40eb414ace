"""Interchangeable workers that may be lost, late or new: work goes to those who answer, nobody waits for others."""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import ray
from ray.exceptions import RayActorError

from acpo_dist.core.errors import AcpoError, WorkerError, WorkerLostError
from actors.group import fetch, kill

logger = logging.getLogger(__name__)

_LOOK_S = 1.0
"""How often a wait looks up to see who is late."""
_LOG_EVERY_S = 30.0
_TOLD = 500
"""Characters of a worker's end that are told: what failed stands last."""
_MAX_FAILURES = 3
"""How often a task may end its worker; Ray itself tries it `TASK_RETRIES` times before it counts here."""
TASK_RETRIES = 3
"""How often Ray does a task again whose worker or whose result was lost."""


@dataclass(frozen=True)
class Answer:
    """What a worker says: which process it is, and its result."""

    process: str
    result: Any


class NotLoadedError(Exception):
    """A worker's process is there, but what it works with could not be loaded."""

    def __init__(self, cause: Exception, process: str) -> None:
        """Keep what went wrong; one that does not survive the way to the driver goes as its text."""
        known = cause if isinstance(cause, AcpoError) else WorkerError(f"{type(cause).__name__}: {cause}")
        super().__init__(known, process)
        self.cause, self.process = known, process


@dataclass(frozen=True)
class _Running:
    index: int
    name: str
    payload: Any
    since: float


class WorkerPool:
    """Actors of one kind, by name. Every call must return an `Answer` in its first object."""

    def __init__(
        self, actors: Mapping[str, Any], *, timeout_s: float, late_s: float, ping: Callable[[Any], Any]
    ) -> None:
        """Take actors that may still be on their way.

        Args:
            timeout_s: longest wait in which nobody answers.
            late_s: how much later than the others a worker may answer before it is left out.
            ping: asks an actor for a sign of life.
        """
        self.actors = dict(actors)
        self._timeout_s, self._late_s, self._ping = timeout_s, late_s, ping
        self._away: dict[Any, str] = {}
        """Call that a worker has not answered -> its name. It is given nothing more until it does."""
        self._processes: dict[str, str] = {}
        self._lost: dict[str, str] = {}
        """What was last heard of the end of a worker that was lost."""
        self.redone = 0
        """Tasks that were done again."""

    def present(self) -> list[str]:
        """Workers that owe no answer."""
        self._welcome()
        away = set(self._away.values())
        return [name for name in self.actors if name not in away]

    def ask(self, call: Callable[[Any], Any], *, what: str, least: int) -> dict[str, Any]:
        """Ask every present worker; who is late is left out as long as `least` have answered.

        Raises:
            WorkerLostError: fewer than `least` workers are there in time; names the others.
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
            logger.warning("%s has not answered to `%s`; going on without it until it does", name, what)
            self._away[reference] = name
        if len(results) < least:
            raise WorkerLostError(
                f"{len(results)} workers answered to `{what}` within {time.monotonic() - started:.0f} s, {least} are "
                f"needed; no answer from {', '.join(sorted(self._away.values())) or 'anybody'}. Add machines or lower "
                "rollout.num_workers (cluster.roles.rollout.min_workers lets a run begin with fewer)."
                + "".join(f"\n{name} was lost: ...{text}" for name, text in sorted(self._lost.items()))
            )
        return results

    def spread(
        self, names: Sequence[str], submit: Callable[[Any, int], tuple[Any, Any]], *, what: str,
        advance: Callable[[int], None] | None = None,
    ) -> list[tuple[Any, Any]]:  # fmt: skip
        """Tasks go to whoever is free; what a lost or late worker had is done again by another. First answer counts.

        Args:
            names: one per task, for errors.
            submit: (actor, index) -> (reference to wait for, payload that the caller only passes on).
            advance: called with the index of a task that is done.

        Returns:
            (result, payload) per task, in the order of `names`.

        Raises:
            WorkerLostError: nobody answers in time, or a task ends every worker it meets.
        """
        todo = deque(range(len(names)))
        running: dict[Any, _Running] = {}
        done: dict[int, tuple[Any, Any]] = {}
        failures: Counter[int] = Counter()
        took: list[float] = []
        heard = time.monotonic()
        while len(done) < len(names):
            busy = {task.name for task in running.values()}
            for name in [name for name in self.present() if name not in busy]:
                index = todo.popleft() if todo else self._overdue(running, done, took)
                if index is None:
                    break
                reference, payload = submit(self.actors[name], index)
                running[reference] = _Running(index, name, payload, time.monotonic())
            ready, _ = ray.wait([*running, *self._away], num_returns=1, timeout=_LOOK_S)
            now = time.monotonic()
            if ready and ready[0] in running:
                task, heard = running.pop(ready[0]), now
                answer = self._result(ready[0], task.name, what)
                if answer is not None and task.index not in done:
                    done[task.index] = (answer.result, task.payload)
                    took.append(now - task.since)
                    if advance:
                        advance(task.index)
                elif answer is None and task.index not in done:
                    failures[task.index] += 1
                    if failures[task.index] >= _MAX_FAILURES:
                        raise WorkerLostError(
                            f"{names[task.index]}...: every worker died in `{what}`, last {task.name}"
                        )
                    self.redone += 1
                    todo.appendleft(task.index)
            elif not ready and now - heard > self._timeout_s:
                who = ", ".join(sorted({task.name for task in running.values()} | set(self._away.values())))
                raise WorkerLostError(f"{who}: no answer to `{what}` within {self._timeout_s:g} s")
        for reference, task in running.items():
            # Somebody else was faster; whatever it says when it comes back, only its return matters.
            self._away[reference] = task.name
        return [done[index] for index in range(len(names))]

    def _overdue(self, running: Mapping[Any, _Running], done: Mapping[int, Any], took: Sequence[float]) -> int | None:
        """A task whose worker is late, and that nobody else has been given yet."""
        limit = self._late_s + 3 * (median(took) if took else self._timeout_s)
        given = Counter(task.index for task in running.values())
        for task in running.values():
            if task.index not in done and given[task.index] == 1 and time.monotonic() - task.since > limit:
                logger.warning("%s is late (%.0f s); its task is done again elsewhere", task.name, limit)
                self.redone += 1
                return task.index
        return None

    def _result(self, reference: Any, name: str, what: str) -> Answer | None:
        """The answer; None if the worker was lost, which then is away until it gives a sign of life."""
        try:
            answer: Answer = fetch(reference, name=name, what=what)
        except WorkerError as error:
            if (unloaded := _unloaded(error)) is not None:
                self._drop(name, unloaded)
                return None
            if not isinstance(error, WorkerLostError) or not isinstance(error.__cause__, RayActorError):
                raise
            logger.warning("%s was lost in `%s` (%s)", name, what, type(error.__cause__).__name__)
            self._lost[name] = " ".join(str(error.__cause__).split())[-_TOLD:]
            self._away[self._ping(self.actors[name])] = name
            return None
        self._lost.pop(name, None)
        before = self._processes.get(name, answer.process)
        self._processes[name] = answer.process
        if answer.process != before:
            logger.warning("%s died and was restarted (%s, now %s)", name, before, answer.process)
            self.redone += 1
        return answer

    def _welcome(self) -> None:
        """Take back whoever has answered meanwhile; a worker that is dead for good is forgotten."""
        if not self._away:
            return
        ready, _ = ray.wait(list(self._away), num_returns=len(self._away), timeout=0)
        for reference in ready:
            name = self._away.pop(reference)
            try:
                answer: Answer = fetch(reference, name=name, what="come back")
            except WorkerError as error:
                if (unloaded := _unloaded(error)) is not None:
                    self._drop(name, unloaded, late=True)
                elif isinstance(error.__cause__, RayActorError) and self._dead(name):
                    del self.actors[name]
                    logger.error("%s is gone for good: %s", name, error)
                continue
            self._processes[name] = answer.process
            logger.warning("%s is there again", name)
        if not self.actors:
            raise WorkerLostError("every worker is gone for good; see the log for why")

    def _drop(self, name: str, error: NotLoadedError, *, late: bool = False) -> None:
        """Go on without a worker that, on a machine that is new to the run, cannot load what it works with.

        Args:
            late: others have begun without it.

        Raises:
            AcpoError: why, where it was there from the start and never worked, or was the last one.
        """
        if (name not in self._processes and not late) or len(self.actors) == 1:
            raise error.cause
        logger.error("%s is gone for good (%s): %s", name, error.process, error.cause)
        kill({name: self.actors.pop(name)})

    def _dead(self, name: str) -> bool:
        """Whether an actor that was lost does not come back; while it is being restarted, the sign of life waits."""
        sign = self._ping(self.actors[name])
        if not ray.wait([sign], timeout=_LOOK_S)[0]:
            self._away[sign] = name
            return False
        try:
            fetch(sign, name=name, what="come back")
        except WorkerError:
            return True
        return False


def _unloaded(error: WorkerError) -> NotLoadedError | None:
    """What a worker said that has nothing to work with."""
    cause = getattr(error.__cause__, "cause", None)
    return cause if isinstance(cause, NotLoadedError) else None
