"""Rollout workers as actors: restartable, and their chunks are redone from the same seeds when one dies."""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import Tensor

from acpo_dist.config.schema import Config
from acpo_dist.core.errors import WorkerError
from acpo_dist.core.ports import Advance
from acpo_dist.core.types import PromptGroup, RolloutBatch, RolloutHandle, SamplePlan, WeightBundle, WeightEcho
from acpo_dist.diffusion.trajectory import Trajectory
from acpo_dist.rollout.chunks import chunks_of
from acpo_dist.vrg.sums import ErrorSums
from actors.group import fetch, gather, kill
from actors.placement import Role
from actors.process import set_up

logger = logging.getLogger(__name__)

MAX_RESTARTS = 10


class RolloutActor:
    """Shell round `RolloutWorker`."""

    def __init__(self, model: Any, sampler: Any, name: str, cpus: float, gpus: float) -> None:
        """Set the process up, then load the model."""
        device = set_up(cpus=cpus, gpus=gpus)
        from acpo_dist.rollout.worker import RolloutWorker

        self._worker = RolloutWorker(model, sampler, device=device, name=name)

    def generate(self, plans: tuple[SamplePlan, ...]) -> tuple[RolloutHandle, Any, Tensor]:
        """Draw a chunk: what the driver may know, the latents, the pictures; each an object of its own."""
        batch = self._worker.generate(plans)
        handle = RolloutHandle(
            sample_ids=batch.sample_ids, prompts=batch.prompts, policy_version=batch.policy_version,
            schedule_id=batch.schedule_id, payload=None,
        )  # fmt: skip
        return handle, replace(batch, images_BCHW=torch.empty(0)), batch.images_BCHW

    def load(self, bundle: WeightBundle) -> WeightEcho:
        """See `RolloutWorker.load`."""
        return self._worker.load(bundle)

    def measure_errors(self, batch: RolloutBatch, sigmas: tuple[float, ...], guidance: bool) -> tuple[int, ErrorSums]:
        """Version of the weights, and `RolloutWorker.measure_errors`."""
        return self._worker.version, self._worker.measure_errors(batch, sigmas, guidance=guidance)

    def ends(self, plans: tuple[SamplePlan, ...], trajectory: Trajectory) -> tuple[int, Tensor]:
        """Version of the weights, and `RolloutWorker.ends`."""
        return self._worker.version, self._worker.ends(plans, trajectory)

    def follow(self, trajectory: Trajectory) -> str:
        """See `RolloutWorker.follow`."""
        return self._worker.follow(trajectory)

    def alpha_bars(self) -> Tensor:
        """The model's noise schedule."""
        return self._worker.alpha_bars

    def trajectory(self) -> Trajectory:
        """The one in use."""
        return self._worker.trajectory

    def ready(self) -> int:
        """Process id, once the model is loaded."""
        import os

        return os.getpid()


class RayRollouts:
    """A pool of rollout actors. The driver holds references; payload is (latents, pictures)."""

    def __init__(self, config: Config, role: Role, group: Any) -> None:
        """Start the actors; `await_ready` waits for them."""
        shell = ray.remote(RolloutActor).options(
            max_restarts=MAX_RESTARTS, num_cpus=role.cpus, num_gpus=role.gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group),
        )  # fmt: skip
        self._actors = {
            f"rollout/{rank}": shell.remote(config.model, config.sampler, f"rollout/{rank}", role.cpus, role.gpus)
            for rank in range(role.count)
        }
        self._chunk = config.rollout.batch_size
        self._timeout_s = config.cluster.worker_timeout_s
        self._bundle: Any = None
        self._version = 0
        self._trajectory: Trajectory | None = None
        self._schedule: str | None = None
        self.redone = 0

    def await_ready(self) -> dict[str, int]:
        """Wait until every model is loaded; process id by worker."""
        return gather(
            {n: a.ready.remote() for n, a in self._actors.items()}, timeout_s=self._timeout_s, what="load model"
        )

    def generate(self, groups: Sequence[PromptGroup], advance: Advance | None = None) -> list[RolloutHandle]:
        """See `RolloutPool.generate`: chunks go to whichever worker is free; a dead worker's chunk is redone."""
        chunks = chunks_of(groups, self._chunk)

        def submit(actor: Any, index: int) -> tuple[Any, Any]:
            meta, latents, images = actor.generate.options(num_returns=3).remote(chunks[index])
            return meta, (latents, images)

        done = self._spread(
            [chunk[0].sample_id for chunk in chunks], submit, what="generate",
            current=lambda meta: meta.policy_version == self._version and self._schedule in (None, meta.schedule_id),
            advance=(lambda index: advance(len(chunks[index]))) if advance else None,
        )  # fmt: skip
        return [replace(meta, payload=payload) for meta, payload in done]

    def measure_errors(
        self, handles: Sequence[RolloutHandle], sigmas: Sequence[float], *, guidance: bool
    ) -> list[ErrorSums]:
        """See `RolloutPool.measure_errors`; the latents go from worker to worker."""

        def submit(actor: Any, index: int) -> tuple[Any, Any]:
            return actor.measure_errors.remote(handles[index].payload[0], tuple(sigmas), guidance), None

        done = self._spread(
            [handle.sample_ids[0] for handle in handles], submit, what="measure errors",
            current=lambda meta: meta[0] == self._version,
        )  # fmt: skip
        return [meta[1] for meta, _ in done]

    def ends(self, groups: Sequence[PromptGroup], trajectory: Trajectory) -> Tensor:
        """See `RolloutPool.ends`."""
        chunks = chunks_of(groups, self._chunk)
        done = self._spread(
            [chunk[0].sample_id for chunk in chunks],
            lambda actor, index: (actor.ends.remote(chunks[index], trajectory), None),
            what="walk to the end", current=lambda meta: meta[0] == self._version,
        )  # fmt: skip
        return torch.cat([meta[1] for meta, _ in done])

    def follow(self, trajectory: Trajectory) -> list[str]:
        """See `RolloutPool.follow`."""
        ids = gather(
            {name: actor.follow.options(max_task_retries=2).remote(trajectory) for name, actor in self._actors.items()},
            timeout_s=self._timeout_s, what="follow a trajectory",
        )  # fmt: skip
        self._trajectory, self._schedule = trajectory, trajectory.schedule_id
        return list(ids.values())

    def alpha_bars(self) -> Tensor:
        """See `RolloutPool.alpha_bars`."""
        name, actor = next(iter(self._actors.items()))
        return fetch(actor.alpha_bars.remote(), name=name, what="noise schedule", timeout_s=self._timeout_s)

    def trajectory(self) -> Trajectory:
        """See `RolloutPool.trajectory`."""
        if self._trajectory is not None:
            return self._trajectory
        name, actor = next(iter(self._actors.items()))
        return fetch(actor.trajectory.remote(), name=name, what="trajectory", timeout_s=self._timeout_s)

    def _spread(
        self, names: Sequence[str], submit: Callable[[Any, int], tuple[Any, Any]], *, what: str,
        current: Callable[[Any], bool], advance: Callable[[int], None] | None = None,
    ) -> list[tuple[Any, Any]]:  # fmt: skip
        """Tasks go to whichever worker is free; one whose worker died or was out of date is done again.

        Args:
            names: one per task, for errors.
            submit: (actor, index) -> (reference to wait for, payload that the driver only passes on).
            current: whether an answer comes from today's weights and trajectory.

        Returns:
            (answer, payload) per task, in the order of `names`.
        """
        todo, free = deque(range(len(names))), deque(self._actors)
        running: dict[Any, tuple[int, str, Any]] = {}
        done: dict[int, tuple[Any, Any]] = {}
        attempts = [0] * len(names)
        while len(done) < len(names):
            while todo and free:
                index, name = todo.popleft(), free.popleft()
                reference, payload = submit(self._actors[name], index)
                running[reference] = (index, name, payload)
            finished, _ = ray.wait(list(running), num_returns=1, timeout=self._timeout_s)
            if not finished:
                busy = ", ".join(sorted(name for _, name, _ in running.values()))
                raise WorkerError(f"{busy}: no answer to `{what}` within {self._timeout_s:g} s")
            index, name, payload = running.pop(finished[0])
            answer = self._collect(finished[0], name, what, current)
            free.append(name)
            if answer is None:
                attempts[index] += 1
                if attempts[index] > MAX_RESTARTS:
                    raise WorkerError(f"samples {names[index]}... failed {attempts[index]} times, last on {name}")
                todo.appendleft(index)
                continue
            done[index] = (answer, payload)
            if advance:
                advance(index)
        return [done[index] for index in range(len(names))]

    def _collect(self, reference: Any, name: str, what: str, current: Callable[[Any], bool]) -> Any:
        """The answer, or None if the work must be done again; a restarted worker gets weights and trajectory back."""
        try:
            answer = ray.get(reference)
        except RayActorError as error:
            logger.warning("%s died (%s); it is restarted and its samples are redone", name, type(error).__name__)
            answer = None
        except RayTaskError:
            answer = fetch(reference, name=name, what=what)
        if answer is not None and current(answer):
            return answer
        self.redone += 1
        # Retried until the restarted process answers; the time-out below bounds it.
        actor, again = self._actors[name], {"max_task_retries": -1}
        calls = []
        if self._bundle is not None:
            calls.append((actor.load.options(**again).remote(self._bundle), "load weights"))
        if self._trajectory is not None:
            calls.append((actor.follow.options(**again).remote(self._trajectory), "follow a trajectory"))
        for call, asked in calls:
            fetch(call, name=name, what=asked, timeout_s=self._timeout_s)
        return None

    def load(self, bundle: WeightBundle) -> list[WeightEcho]:
        """See `RolloutPool.load`."""
        return self.load_reference(ray.put(bundle), bundle.version)

    def load_reference(self, bundle: Any, version: int) -> list[WeightEcho]:
        """The same with the bundle in the object store; the driver does not open it."""
        echoes = gather(
            {name: actor.load.options(max_task_retries=2).remote(bundle) for name, actor in self._actors.items()},
            timeout_s=self._timeout_s, what="load weights",
        )  # fmt: skip
        self._bundle, self._version = bundle, version
        return list(echoes.values())

    def images(self, handles: Sequence[RolloutHandle], sample_ids: Sequence[str]) -> Tensor:
        """See `RolloutPool.images`; only chunks that hold a wanted picture are fetched."""
        wanted = set(sample_ids)
        found: dict[str, Tensor] = {}
        for handle in handles:
            if wanted & set(handle.sample_ids):
                pictures = fetch(handle.payload[1], name="object store", what="pictures", timeout_s=self._timeout_s)
                found.update(zip(handle.sample_ids, pictures, strict=True))
        return torch.stack([found[sample_id] for sample_id in sample_ids])

    def close(self) -> None:
        """End the actors."""
        kill(self._actors)
