"""Rollout workers as restartable actors; lost samples are drawn again from the same seeds."""

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import Tensor
from typing_extensions import override

from acpo_dist.config.schema import Config
from acpo_dist.core.by_size import Mixed, gather
from acpo_dist.core.errors import WeightSyncError
from acpo_dist.core.ports import Advance, RolloutPool
from acpo_dist.core.types import PromptGroup, RolloutBatch, RolloutHandle, SamplePlan, WeightAck, WeightBundle
from acpo_dist.core.weights import require_acks, with_version
from acpo_dist.diffusion.trajectory import Trajectory
from acpo_dist.vrg.sums import ErrorSums
from acpo_dist.workers.rollout.chunks import chunks_of, in_order
from actors.cluster.software import Software, require_same, software
from actors.group import fetch, kill
from actors.placement import Role
from actors.process import set_up
from actors.worker_pool import TASK_RETRIES, Answer, NotLoadedError, WorkerPool

_CLOSE_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Weights and trajectory of a task.

    They are arguments of the task, so that a restarted process, or another one that repeats it, draws the same samples.
    """

    version: int = 0
    bundle: tuple[Any, ...] = ()
    """Reference to the weights, in a tuple so that Ray does not fetch it with every task; empty for the base model."""
    trajectory: Trajectory | None = None
    """None for the trajectory of the configuration."""


PlanFields = Sequence[Mapping[str, Any]]
"""Samples of a chunk as dictionaries of plain values."""


def fields_of(chunk: Sequence[SamplePlan]) -> PlanFields:
    """Return the fields of the samples: Ray packs plain values in half the time that it takes to pickle objects."""
    return [vars(plan) for plan in chunk]


def _plans(fields: PlanFields) -> tuple[SamplePlan, ...]:
    return tuple(SamplePlan(**one) for one in fields)


class RolloutActor:
    """Actor around `RolloutWorker`."""

    def __init__(
        self, model: Any, sampler: Any, name: str, cpus: float, gpus: float, expected: Software | None = None
    ) -> None:
        """Set up the process and load the model; an error is raised by the first call instead."""
        self._process = f"process {os.getpid()} on {ray.util.get_node_ip_address()}"
        self._loaded, self._failed = None, None
        try:
            device = set_up(cpus=cpus, gpus=gpus)
            require_same(expected)
            from acpo_dist.workers.rollout.worker import RolloutWorker

            self._loaded = RolloutWorker(model, sampler, device=device, name=name)
            self._first = self._loaded.trajectory
        except Exception as error:
            # Ray restarts an actor whose constructor fails without limit, and reports it as lost.
            self._failed = NotLoadedError(error, self._process)

    @property
    def _worker(self) -> Any:
        if self._failed is not None:
            raise self._failed
        return self._loaded

    @ray.method(num_returns=3)
    def generate(self, plans: PlanFields, policy: Policy) -> tuple[Answer, Any, Tensor]:
        """Draw a chunk; return its handle, the latents and the images as three objects of the object store.

        Args:
            plans: the chunk's samples, by `fields_of`.
            policy: weights and trajectory.
        """
        self._assume(policy)
        batch = self._worker.generate(_plans(plans))
        handle = RolloutHandle(
            sample_ids=batch.sample_ids, prompts=batch.prompts, policy_version=batch.policy_version,
            schedule_id=batch.schedule_id, payload=None,
        )  # fmt: skip
        return Answer(self._process, handle), replace(batch, images_BCHW=torch.empty(0)), batch.images_BCHW

    def load(self, bundle: WeightBundle) -> Answer:
        """Run `RolloutWorker.load`."""
        return Answer(self._process, self._worker.load(bundle))

    def measure_errors(self, batch: RolloutBatch, sigmas: tuple[float, ...], policy: Policy) -> Answer:
        """Run `RolloutWorker.measure_errors` with the weights and trajectory of `policy`."""
        self._assume(policy)
        return Answer(self._process, self._worker.measure_errors(batch, sigmas))

    def final_latents(self, plans: PlanFields, trajectory: Trajectory, policy: Policy) -> Answer:
        """Run `RolloutWorker.final_latents` with the weights and trajectory of `policy`."""
        self._assume(policy)
        return Answer(self._process, self._worker.final_latents(_plans(plans), trajectory))

    def set_trajectory(self, trajectory: Trajectory) -> Answer:
        """Run `RolloutWorker.set_trajectory`."""
        return Answer(self._process, self._worker.set_trajectory(trajectory))

    def alpha_bars(self) -> Tensor:
        """Return the model's noise schedule."""
        return self._worker.alpha_bars

    def trajectory(self) -> Trajectory:
        """Return the trajectory in use."""
        return self._worker.trajectory

    def ready(self) -> Answer:
        """Return process id and Ray's node id, once the model is loaded."""
        assert self._worker is not None
        return Answer(self._process, (os.getpid(), ray.get_runtime_context().get_node_id()))

    def _assume(self, policy: Policy) -> None:
        """Load the weights and the trajectory of a task, unless they are in use already."""
        if policy.version != self._worker.version:
            if not policy.bundle:
                raise WeightSyncError(
                    f"a worker that holds version {self._worker.version} cannot draw samples of the base model"
                )
            bundle: Any = ray.get(policy.bundle[0])
            require_acks(policy.version, bundle.checksum, [self._worker.load(bundle)])
        wanted = policy.trajectory or self._first
        if wanted.schedule_id != self._worker.trajectory.schedule_id:
            self._worker.set_trajectory(wanted)


class RayRollouts(RolloutPool):
    """A pool of rollout actors. The driver holds object references: the payload of a handle is (latents, images)."""

    def __init__(self, config: Config, role: Role, group: Any = None) -> None:
        """Start the actors; `await_ready` waits for them.

        Args:
            group: placement group with one bundle per actor; None lets Ray place and move them, and its autoscaler add
                machines for them.
        """
        where = PlacementGroupSchedulingStrategy(group) if group is not None else "SPREAD"
        selector = {} if group is not None else {"label_selector": dict(role.labels)}
        shell = ray.remote(RolloutActor).options(
            max_restarts=-1, max_task_retries=TASK_RETRIES, num_cpus=role.cpus, num_gpus=role.gpus,
            resources=dict(role.resources), scheduling_strategy=where, **selector,
        )  # fmt: skip
        names = [f"rollout/{rank}" for rank in range(role.count)]
        expected = None if config.cluster.mixed_software else software()
        self._started = {
            name: shell.remote(config.model, config.sampler, name, role.cpus, role.gpus, expected) for name in names
        }
        options = config.cluster.roles.rollout
        self._workers = WorkerPool(
            self._started, timeout_s=config.cluster.worker_timeout_s, late_s=options.late_s,
            ping=lambda actor: actor.ready.remote(),
        )  # fmt: skip
        self._first_least, self._least = options.min_workers or role.count, options.min_workers or 1
        self._chunk = config.rollout.batch_size
        self._timeout_s = config.cluster.worker_timeout_s
        self._earlier = config.pipeline.max_staleness
        self._bundles: dict[int, Any] = {}
        """Object references of the weights by version; empty for the base model."""
        self._trajectory: Trajectory | None = None
        self._lock = threading.RLock()
        """Held while the pool works: samples may be drawn in another thread."""

    @property
    def redone(self) -> int:
        """Number of tasks that were repeated because a worker was lost or late."""
        return self._workers.redone

    def await_ready(self) -> dict[str, int]:
        """Wait until the models are loaded; return process ids by name of the workers that are ready."""
        return {name: pid for name, (pid, _) in self._ready().items()}

    def nodes(self) -> list[str]:
        """Return Ray's node ids of the rollout workers, once the models are loaded."""
        return sorted({node for _, node in self._ready().values()})

    def _ready(self) -> dict[str, Any]:
        with self._lock:
            found = self._workers.ask(lambda actor: actor.ready.remote(), what="load model", least=self._first_least)
        self._first_least = self._least
        return found

    def _policy(self, version: int | None = None) -> Policy:
        """Published weights, the newest for None, with the trajectory in use."""
        if not self._bundles:
            return Policy(trajectory=self._trajectory)
        wanted = max(self._bundles) if version is None else version
        return Policy(version=wanted, bundle=(self._bundles[wanted],), trajectory=self._trajectory)

    @override
    def generate(
        self, groups: Sequence[PromptGroup], advance: Advance | None = None, *, version: int | None = None
    ) -> list[RolloutHandle]:
        # Chunks go to any free worker; chunks of a lost worker are drawn again.
        chunks = chunks_of(groups, self._chunk)

        def submit(actor: Any, index: int) -> tuple[Any, Any]:
            meta, latents, images = actor.generate.remote(fields_of(chunks[index]), policy)
            return meta, (latents, images)

        with self._lock:
            # One object for all chunks, which Ray passes to the workers by value.
            policy = ray.put(self._policy(version))
            done = self._workers.spread(
                [chunk[0].sample_id for chunk in chunks], submit, what="generate",
                advance=(lambda index: advance(len(chunks[index]))) if advance else None,
            )  # fmt: skip
        return [replace(meta, payload=payload) for meta, payload in done]

    @override
    def measure_errors(self, handles: Sequence[RolloutHandle], sigmas: Sequence[float]) -> list[ErrorSums]:
        # The latents are sent from worker to worker.
        policy = self._policy()
        with self._lock:
            done = self._workers.spread(
                [handle.sample_ids[0] for handle in handles],
                lambda actor, index: (
                    actor.measure_errors.remote(handles[index].payload[0], tuple(sigmas), policy), None,
                ),
                what="measure errors",
            )  # fmt: skip
        return [sums for sums, _ in done]

    @override
    def final_latents(self, groups: Sequence[PromptGroup], trajectory: Trajectory) -> Mixed:
        chunks, policy = chunks_of(groups, self._chunk), self._policy()
        with self._lock:
            done = self._workers.spread(
                [chunk[0].sample_id for chunk in chunks],
                lambda actor, index: (actor.final_latents.remote(fields_of(chunks[index]), trajectory, policy), None),
                what="final latents",
            )  # fmt: skip
        return in_order(groups, chunks, [final_latents for final_latents, _ in done])

    @override
    def set_trajectory(self, trajectory: Trajectory) -> list[str]:
        # A late worker receives it with its next task.
        with self._lock:
            self._trajectory = trajectory
            ids = self._workers.ask(
                lambda actor: actor.set_trajectory.remote(trajectory), what="set trajectory", least=self._least
            )
        return list(ids.values())

    @override
    def alpha_bars(self) -> Tensor:
        name, actor = self._anyone()
        return fetch(actor.alpha_bars.remote(), name=name, what="noise schedule", timeout_s=self._timeout_s)

    @override
    def trajectory(self) -> Trajectory:
        if self._trajectory is not None:
            return self._trajectory
        name, actor = self._anyone()
        return fetch(actor.trajectory.remote(), name=name, what="trajectory", timeout_s=self._timeout_s)

    @override
    def load(self, bundle: WeightBundle) -> list[WeightAck]:
        return self.load_reference(ray.put(bundle), bundle.version)

    def load_reference(self, bundle: Any, version: int) -> list[WeightAck]:
        """Load weights from the object store; a late worker loads them with its next task.

        Args:
            bundle: object reference of a `WeightBundle`, which the driver does not fetch.
            version: its version.

        Returns:
            Acknowledgements of the workers that have responded.
        """
        again = version <= max(self._bundles, default=-1)
        self._bundles = with_version(self._bundles, version, bundle, earlier=self._earlier)
        if self._earlier and not again:
            # Drawing goes on: a worker loads and verifies a version with its next chunk of that version.
            return []
        with self._lock:
            acks = self._workers.ask(lambda actor: actor.load.remote(bundle), what="load weights", least=self._least)
        return list(acks.values())

    @override
    def images(self, handles: Sequence[RolloutHandle], sample_ids: Sequence[str]) -> Mixed:
        # Only chunks with a wanted image are fetched.
        wanted = set(sample_ids)
        found: dict[str, Tensor] = {}
        for handle in handles:
            if wanted & set(handle.sample_ids):
                images = fetch(handle.payload[1], name="object store", what="images", timeout_s=self._timeout_s)
                found.update(zip(handle.sample_ids, images, strict=True))
        return gather([found[sample_id] for sample_id in sample_ids])

    def close(self) -> None:
        """End the actors; a thread that still draws fails at once, and is waited for."""
        kill(self._started)
        if self._lock.acquire(timeout=_CLOSE_S):
            self._lock.release()

    def _anyone(self) -> tuple[str, Any]:
        with self._lock:
            name = next(iter(self._workers.present() or self._workers.actors))
        return name, self._workers.actors[name]
