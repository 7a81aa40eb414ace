"""Samples of an iteration: drawn and scored when the learner needs them, or ahead of it while it works."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from threading import Event
from typing import Any, Protocol

from typing_extensions import override

from acpo_dist.core.clock import PhaseClock, RoleClock
from acpo_dist.core.types import PromptGroup, RolloutHandle, ScoreTable
from acpo_dist.data.prompts import sample_prompts, size_mix
from acpo_dist.training.calibration import names_of
from acpo_dist.training.context import RunContext

_CLOSE_S = 60.0
"""Longest wait in seconds for the chunk under way when a run ends early."""


@dataclass(frozen=True, kw_only=True)
class ScoredSamples:
    """Samples of one iteration with their scores."""

    groups: Sequence[PromptGroup]
    handles: Sequence[RolloutHandle]
    scores: ScoreTable
    version: int
    """Version of the weights that drew them."""


class SampleSource(Protocol):
    """Delivers each iteration's samples."""

    def take(self, iteration: int, version: int, clock: PhaseClock) -> ScoredSamples:
        """Return the samples of an iteration, each iteration once and in order.

        Args:
            iteration: index of the iteration.
            version: newest published version, which the learner trains.
            clock: receives the seconds of waiting.
        """
        ...

    def metrics(self) -> dict[str, float]:
        """Return counters since the last call."""
        ...

    def discard(self) -> None:
        """Discard samples that are drawn ahead, and count them."""
        ...

    def to_mapping(self) -> dict[str, Any]:
        """Return what a checkpoint needs to draw the samples in flight again."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Draw the samples again that were in flight when the checkpoint was written."""
        ...

    def close(self) -> None:
        """Stop drawing."""
        ...


class OnPolicySamples(SampleSource):
    """Draws and scores with the newest weights, while the learner waits."""

    def __init__(self, context: RunContext, roles: RoleClock) -> None:
        """Store the run's parts."""
        self._context, self._roles = context, roles

    @override
    def take(self, iteration: int, version: int, clock: PhaseClock) -> ScoredSamples:
        console, ports = self._context.console, self._context.ports
        groups, names = groups_of(self._context, iteration), metrics_of(self._context)
        total = sum(len(group.samples) for group in groups)
        with clock.phase("rollout"), self._roles.busy("rollout"), console.phase("rollout", total) as advance:
            handles = ports.rollout.generate(groups, advance)
        with clock.phase("reward"), self._roles.busy("reward"), console.phase("reward", total * len(names)) as advance:
            scores = ports.reward.score(handles, names, advance)
        return ScoredSamples(groups=groups, handles=handles, scores=scores, version=version)

    @override
    def metrics(self) -> dict[str, float]:
        return {}

    @override
    def discard(self) -> None:
        pass

    @override
    def to_mapping(self) -> dict[str, Any]:
        return {}

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        pass

    @override
    def close(self) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class _Request:
    """An iteration's samples that are drawn and scored ahead."""

    version: int
    schedule_id: str
    drawn: Future[list[RolloutHandle]]
    scored: Future[ScoredSamples]


class _StoppedError(Exception):
    """The run has ended before the samples were needed."""


class AheadSamples(SampleSource):
    """Draws and scores the next iterations in two other threads while the learner works.

    The request for iteration i + `pipeline.max_staleness` is made when iteration i starts, with the version that is
    newest then. The version that draws a sample is therefore independent of timing, and a resumed run repeats it.
    """

    def __init__(self, context: RunContext, roles: RoleClock) -> None:
        """Start the threads."""
        self._context, self._roles = context, roles
        self._bound = context.config.pipeline.max_staleness
        self._pending: dict[int, _Request] = {}
        self._dropped = self._discarded = 0
        self._stopped = Event()
        self._drawing = ThreadPoolExecutor(1, thread_name_prefix="rollout")
        self._scoring = ThreadPoolExecutor(1, thread_name_prefix="reward")

    @override
    def take(self, iteration: int, version: int, clock: PhaseClock) -> ScoredSamples:
        self._drop_outdated(iteration, version)
        last = self._context.config.run.iterations - 1
        for wanted in range(iteration, min(iteration + self._bound, last) + 1):
            if wanted not in self._pending:
                self._pending[wanted] = self._request(wanted, version)
        with clock.phase("rollout"), self._context.console.phase("rollout, drawn ahead", None):
            return self._pending.pop(iteration).scored.result()

    @override
    def metrics(self) -> dict[str, float]:
        counted = {"pipeline/dropped": float(self._dropped), "pipeline/discarded": float(self._discarded)}
        self._dropped = self._discarded = 0
        return counted

    @override
    def discard(self) -> None:
        self._discarded += self._remove(list(self._pending))

    @override
    def to_mapping(self) -> dict[str, Any]:
        self._drop_other_trajectories()
        flying = [[iteration, request.version] for iteration, request in sorted(self._pending.items())]
        return {"in_flight": flying, "dropped": self._dropped}

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        self._dropped = int(state.get("dropped", 0))
        flying = [(int(iteration), int(version)) for iteration, version in state.get("in_flight", [])]
        for version in sorted({version for _, version in flying}):
            self._context.ports.weights.publish(version)
        for iteration, version in flying:
            self._pending[iteration] = self._request(iteration, version)

    @override
    def close(self) -> None:
        if self._stopped.is_set():
            return
        self._stopped.set()
        self._remove(list(self._pending))
        pools = (self._drawing, self._scoring)
        # Each pool has one thread, so this call returns after the work under way.
        ends = [pool.submit(int) for pool in pools]
        wait(ends, timeout=_CLOSE_S)
        for pool, end in zip(pools, ends, strict=True):
            pool.shutdown(wait=end.done())

    def _drop_outdated(self, iteration: int, version: int) -> None:
        """Drop requests whose samples would be older than the bound when they are used."""
        self._drop_other_trajectories()
        old = [
            wanted for wanted, request in self._pending.items()
            if version + wanted - iteration - request.version > self._bound
        ]  # fmt: skip
        self._dropped += self._remove(old)

    def _drop_other_trajectories(self) -> None:
        # Whether such samples were drawn before or after the change depends on timing.
        now = self._context.ports.rollout.trajectory().schedule_id
        other = [iteration for iteration, request in self._pending.items() if request.schedule_id != now]
        self._dropped += self._remove(other)

    def _remove(self, iterations: Sequence[int]) -> int:
        """Remove requests and return the number of their samples."""
        for iteration in iterations:
            request = self._pending.pop(iteration)
            request.drawn.cancel()
            request.scored.cancel()
        rollout = self._context.config.rollout
        return len(iterations) * rollout.prompts_per_iteration * rollout.samples_per_prompt

    def _request(self, iteration: int, version: int) -> _Request:
        schedule_id = self._context.ports.rollout.trajectory().schedule_id
        groups = groups_of(self._context, iteration)
        drawn = self._drawing.submit(self._draw, groups, version)
        scored = self._scoring.submit(self._score, groups, version, drawn)
        return _Request(version=version, schedule_id=schedule_id, drawn=drawn, scored=scored)

    def _draw(self, groups: Sequence[PromptGroup], version: int) -> list[RolloutHandle]:
        with self._roles.busy("rollout"):
            return self._context.ports.rollout.generate(groups, self._advance, version=version)

    def _score(
        self, groups: Sequence[PromptGroup], version: int, drawn: Future[list[RolloutHandle]]
    ) -> ScoredSamples:  # fmt: skip
        handles = drawn.result()
        with self._roles.busy("reward"):
            scores = self._context.ports.reward.score(handles, metrics_of(self._context), self._advance)
        return ScoredSamples(groups=groups, handles=handles, scores=scores, version=version)

    def _advance(self, count: int) -> None:
        if self._stopped.is_set():
            raise _StoppedError


def open_samples(context: RunContext, roles: RoleClock) -> SampleSource:
    """Return the source for `pipeline.max_staleness`."""
    return AheadSamples(context, roles) if context.config.pipeline.max_staleness else OnPolicySamples(context, roles)


def groups_of(context: RunContext, iteration: int) -> list[PromptGroup]:
    """Return the prompt groups of an iteration."""
    config = context.config
    return sample_prompts(
        context.prompts, iteration=iteration, run_seed=config.run.seed,
        num_prompts=config.rollout.prompts_per_iteration, samples_per_prompt=config.rollout.samples_per_prompt,
        mix=size_mix(config),
    )  # fmt: skip


def metrics_of(context: RunContext) -> list[str]:
    """Return the names of all rewards and judges."""
    rewards = context.config.rewards
    return [*names_of(rewards.train), *names_of(rewards.judges)]
