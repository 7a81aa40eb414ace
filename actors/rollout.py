"""Rollout workers as actors: restartable, and their chunks are redone from the same seeds when one dies."""

import logging
from collections import deque
from collections.abc import Sequence
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
from acpo_dist.core.types import PromptGroup, RolloutHandle, SamplePlan, WeightBundle, WeightEcho
from acpo_dist.rollout.chunks import chunks_of
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
        self.redone = 0

    def await_ready(self) -> dict[str, int]:
        """Wait until every model is loaded; process id by worker."""
        return gather(
            {n: a.ready.remote() for n, a in self._actors.items()}, timeout_s=self._timeout_s, what="load model"
        )

    def generate(self, groups: Sequence[PromptGroup], advance: Advance | None = None) -> list[RolloutHandle]:
        """See `RolloutPool.generate`: chunks go to whichever worker is free; a dead worker's chunk is redone."""
        chunks = chunks_of(groups, self._chunk)
        todo = deque(range(len(chunks)))
        free = deque(self._actors)
        running: dict[Any, tuple[int, str, tuple[Any, Any]]] = {}
        done: dict[int, RolloutHandle] = {}
        attempts = [0] * len(chunks)
        while len(done) < len(chunks):
            while todo and free:
                index, name = todo.popleft(), free.popleft()
                meta, latents, images = self._actors[name].generate.options(num_returns=3).remote(chunks[index])
                running[meta] = (index, name, (latents, images))
            finished, _ = ray.wait(list(running), num_returns=1, timeout=self._timeout_s)
            if not finished:
                names = ", ".join(sorted(name for _, name, _ in running.values()))
                raise WorkerError(f"{names}: no samples within {self._timeout_s:g} s")
            index, name, payload = running.pop(finished[0])
            handle = self._collect(finished[0], name)
            free.append(name)
            if handle is None:
                attempts[index] += 1
                if attempts[index] > MAX_RESTARTS:
                    raise WorkerError(
                        f"samples {chunks[index][0].sample_id}... failed {attempts[index]} times, last on {name}"
                    )
                todo.appendleft(index)
                continue
            done[index] = replace(handle, payload=payload)
            if advance:
                advance(len(chunks[index]))
        return [done[index] for index in range(len(chunks))]

    def _collect(self, reference: Any, name: str) -> RolloutHandle | None:
        """What the worker says it made, or None if it must be made again; a restarted worker gets its weights back."""
        try:
            handle: RolloutHandle | None = ray.get(reference)
        except RayActorError as error:
            logger.warning("%s died (%s); it is restarted and its samples are redone", name, type(error).__name__)
            handle = None
        except RayTaskError:
            handle = fetch(reference, name=name, what="generate")
        if handle is not None and handle.policy_version == self._version:
            return handle
        self.redone += 1
        if self._bundle is not None:
            # Retried until the restarted process answers; the time-out below bounds it.
            fetch(
                self._actors[name].load.options(max_task_retries=-1).remote(self._bundle),
                name=name,
                what="load weights",
                timeout_s=self._timeout_s,
            )
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
