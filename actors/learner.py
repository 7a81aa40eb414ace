"""Learner ranks as actors that are placed, and fail, together."""

import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from typing_extensions import override

from acpo_dist.config.schema import Config
from acpo_dist.core.errors import LearnerLostError, UsageError, WorkerError, WorkerLostError
from acpo_dist.core.ports import Advance, KeptState, LearnerGroup
from acpo_dist.core.registry import MODELS, resolve
from acpo_dist.core.types import (
    GradientScale,
    RewardTerm,
    RolloutHandle,
    SkippedStep,
    TrainReport,
    TrainTask,
    WeightBundle,
)
from acpo_dist.training.local import learner_spec
from acpo_dist.training.run_folder import RESOLVED
from acpo_dist.workers.learner.metrics import MetricSums, merged_drift, merged_lists, merged_report
from acpo_dist.workers.learner.state import SerialisedState, serialise, write_serialised
from actors.cluster.control import attempt
from actors.cluster.software import Software, require_same, software
from actors.group import fetch, gather, kill
from actors.placement import Role, place
from actors.process import set_up
from actors.reward.client import PoolLink
from actors.reward.pool import ServeRewards

logger = logging.getLogger(__name__)

_GIB = 2**30
_DEATH_S = 75.0
"""Seconds within which Ray detects a machine whose network was cut."""


class LearnerActor:
    """Actor around `LearnerWorker`: sets the rank variables before it imports torch."""

    def __init__(self, rank: int, world_size: int, model_type: str, cpus: float, gpus: float) -> None:
        """Set up the process and import the model's family while the other roles start."""
        self._device = set_up(cpus=cpus, gpus=gpus)
        # Ray shows each rank only its own GPU, so the local rank is always 0.
        os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world_size))
        resolve("model", MODELS, model_type)

    def address(self) -> tuple[str, int]:
        """Return the address of the process group: this host and a free port."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def build(self, master: tuple[str, int], spec: Any, link: PoolLink, expected: Software | None) -> int:
        """Load the model and return the process id.

        Args:
            master: host and port of the process group.
            spec: the learner's part of the configuration.
            link: the reward pool.
            expected: the driver's software; None skips the comparison.

        Raises:
            SoftwareError: this machine runs other software.
        """
        require_same(expected)
        os.environ.update(MASTER_ADDR=master[0], MASTER_PORT=str(master[1]))
        from acpo_dist.workers.learner.worker import LearnerWorker
        from actors.reward.client import RewardClient

        self._client = RewardClient(link)
        self._worker = LearnerWorker(spec, self._client, device=self._device)
        return os.getpid()

    def start(self, folder: Path | None) -> tuple[int, int]:
        """Run `LearnerWorker.start`; return D, the number of elements of x_0, and the bytes of the training state."""
        self._worker.start(folder)
        return self._worker.num_elements, self._worker.state_bytes

    def train(self, references: list[Any], task: TrainTask) -> tuple[MetricSums, int, list[SkippedStep], bool, int]:
        """Run `LearnerWorker.train`; adds whether too many steps were skipped, and this rank's retried requests."""
        found = self._worker.train(ray.get(references), task)
        return *found, self._worker.skipped_too_many, self._client.retries

    def gradient_norms(self, references: list[Any], terms: Sequence[RewardTerm]) -> list[float]:
        """Run `LearnerWorker.gradient_norms` on batches in the object store."""
        return self._worker.gradient_norms(ray.get(references), terms)

    def observe(self, references: list[Any]) -> dict[str, list[float]]:
        """Run `LearnerWorker.observe` on batches in the object store."""
        return self._worker.observe(ray.get(references))

    def measure_drift(self, references: list[Any], timesteps: Sequence[int], space: str) -> MetricSums:
        """Run `LearnerWorker.measure_drift` on batches in the object store."""
        return self._worker.measure_drift(ray.get(references), timesteps, space=space)

    def export(self, version: int, ema: bool) -> tuple[WeightBundle, str]:
        """Return the bundle and its checksum as two objects of the object store."""
        bundle = self._worker.export(version, ema=ema)
        return bundle, bundle.checksum

    def save(self, folder: Path, earlier: Sequence[int]) -> None:
        """Run `LearnerWorker.save`."""
        self._worker.save(folder, earlier)

    def keep(self, earlier: Sequence[int]) -> SerialisedState:
        """Return the files of the training state on rank 0, nothing on the others."""
        return serialise(self._worker.state(earlier))

    def ping(self) -> None:
        """Return, which shows that the process is alive."""

    def holds(self, file: Path, content: bytes) -> str:
        """Return an empty text if this machine reads the same content from the file, else its address."""
        try:
            return "" if file.read_bytes() == content else ray.util.get_node_ip_address()
        except OSError:
            return ray.util.get_node_ip_address()

    def close(self) -> None:
        """Leave the process group."""
        self._worker.close()


class RayLearner(LearnerGroup):
    """All learner ranks, called from the driver. If a rank fails, the others are ended; they would wait for it."""

    def __init__(self, config: Config, role: Role) -> None:
        """Reserve the machines and start the actors; `load` and `build` load the models."""
        self._config, self._role, self._rewards = config, role, None
        self._timeout_s, self._told = config.learner.timeout_s, False
        self._num_elements = self._state_bytes = 0
        self._loading: dict[str, Any] = {}
        self._place()

    def _place(self) -> None:
        role = self._role
        self._group = place(role, timeout_s=self._config.cluster.place_timeout_s)
        shell = ray.remote(LearnerActor).options(
            max_restarts=0, num_cpus=role.cpus, num_gpus=role.gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._group),
        )  # fmt: skip
        self.actors = {
            f"learner/{rank}": shell.remote(rank, role.count, self._config.model.type, role.cpus, role.gpus)
            for rank in range(role.count)
        }

    @property
    def _first(self) -> Any:
        return self.actors["learner/0"]

    def load(self, link: PoolLink, config: Config | None = None) -> None:
        """Start to load the models, which `build` waits for; the reward pool may still be starting.

        Args:
            link: the reward pool.
            config: another configuration for the same ranks, which replace what they have loaded.
        """
        self._config = config or self._config
        # Passed on by Ray, so that this call does not wait for the processes to start.
        master = self._first.address.remote()
        spec = ray.put(learner_spec(self._config))
        expected = None if self._config.cluster.mixed_software else software()
        self._loading = {name: actor.build.remote(master, spec, link, expected) for name, actor in self.actors.items()}

    def build(self, rewards: ServeRewards, config: Config | None = None) -> None:
        """Wait until the ranks have loaded their models.

        Args:
            rewards: the pool that computes gradients of rewards.
            config: as in `load`, which is called if it was not.
        """
        self._rewards = rewards
        if not self._loading or config is not None:
            self.load(rewards.link, config)
        loading, self._loading = self._loading, {}
        self._gather("load model", loading)
        self._require_shared_folder()

    @override
    def renew(self) -> None:
        assert self._rewards is not None
        self.close()
        self._place()
        self.build(self._rewards)

    @override
    def start(self, folder: Path | None) -> None:
        self._num_elements, self._state_bytes = self._all("start", lambda actor: actor.start.remote(folder))[0]

    @override
    def train(self, handles: Sequence[RolloutHandle], task: TrainTask, advance: Advance | None = None) -> TrainReport:
        references = _latents(handles)
        answers = self._all("train", lambda actor: actor.train.remote(references, task))
        if self._rewards is not None:
            self._rewards.learner_retries = sum(retries for *_, retries in answers)
        if advance:
            advance(len(task.sample_ids))
        return merged_report([answer[:4] for answer in answers])

    @override
    def gradient_scale(self, handles: Sequence[RolloutHandle], rewards: Sequence[RewardTerm]) -> GradientScale:
        references = _latents(handles)
        answers = self._all("gradient scale", lambda actor: actor.gradient_norms.remote(references, rewards))
        norms = [norm for part in answers for norm in part]
        return GradientScale(median_norm=median(norms), num_elements=self._num_elements)

    @override
    def observe(self, handles: Sequence[RolloutHandle]) -> dict[str, list[float]]:
        references = _latents(handles)
        return merged_lists(self._all("observe", lambda actor: actor.observe.remote(references)))

    @override
    def measure_drift(
        self, handles: Sequence[RolloutHandle], timesteps: Sequence[int], *, space: str = "eps"
    ) -> dict[int, float]:
        references = _latents(handles)
        return merged_drift(
            self._all("measure drift", lambda actor: actor.measure_drift.remote(references, timesteps, space))
        )

    def export_reference(self, version: int, *, ema: bool = False) -> tuple[Any, str]:
        """Return an object reference of the bundle, and its checksum; the driver does not fetch the bundle."""
        bundle, checksum = self._first.export.options(num_returns=2).remote(version, ema)
        return bundle, self._gather("export", {"learner/0": checksum})[0]

    @override
    def export(self, version: int, *, ema: bool = False) -> WeightBundle:
        reference, _ = self.export_reference(version, ema=ema)
        return fetch(reference, name="learner/0", what="export", timeout_s=self._timeout_s)

    @override
    def save(self, folder: Path, earlier: Sequence[int] = ()) -> None:
        # The folder must be on storage that rank 0 and the driver share.
        target = folder.resolve()
        self._all("save", lambda actor: actor.save.remote(target, earlier))

    @override
    def keep(self, earlier: Sequence[int] = ()) -> KeptState | None:
        limit = self._config.checkpoint.in_memory_gib
        if self._state_bytes > limit * _GIB:
            if limit and not self._told:
                logger.warning(
                    "the training state has up to %.1f GiB, more than checkpoint.in_memory_gib=%g: a lost learner rank "
                    "costs the work since the last checkpoint", self._state_bytes / _GIB, limit,
                )  # fmt: skip
                self._told = True
            return None
        # The ranks copy it while the next samples are drawn. All take part, since ZeRO gathers the moments.
        copies = [actor.keep.remote(list(earlier)) for actor in self.actors.values()]
        return _Copy(copies[0])

    def close(self) -> None:
        """End all ranks and release their machines."""
        kill(self.actors)
        attempt(lambda: remove_placement_group(self._group), what="release the learner's machines")

    def _all(self, what: str, call: Any) -> list[Any]:
        return self._gather(what, {name: call(actor) for name, actor in self.actors.items()})

    def _gather(self, what: str, calls: Mapping[str, Any]) -> list[Any]:
        try:
            return list(gather(calls, timeout_s=self._timeout_s, what=what, ping=self._ping).values())
        except WorkerLostError as error:
            raise LearnerLostError(str(error)) from error
        except WorkerError as error:
            # A rank whose peer died often fails before Ray detects that death.
            dead = self._first_dead()
            if dead is None:
                raise
            raise LearnerLostError(
                f"{dead} is gone; another rank failed in `{what}` for that reason: {error}"
            ) from error

    def _ping(self, name: str) -> Any:
        return self.actors[name].ping.remote()

    def _first_dead(self) -> str | None:
        signs = {actor.ping.remote(): name for name, actor in self.actors.items()} if len(self.actors) > 1 else {}
        deadline = time.monotonic() + _DEATH_S
        while signs and time.monotonic() < deadline:
            for sign in ray.wait(list(signs), num_returns=1, timeout=max(0.0, deadline - time.monotonic()))[0]:
                name = signs.pop(sign)
                try:
                    ray.get(sign)
                except RayError:
                    return name
        return None

    def _require_shared_folder(self) -> None:
        """Reject a run folder that is not shared by all ranks, since checkpoints would be lost.

        Raises:
            UsageError: names the machines.
        """
        file = self._config.run_dir.resolve() / RESOLVED
        if not file.is_file():
            return
        content = file.read_bytes()
        elsewhere = {
            where for where in self._all("see the run", lambda actor: actor.holds.remote(file, content)) if where
        }
        if elsewhere:
            raise UsageError(
                f"{file.parent} is another folder on {', '.join(sorted(elsewhere))} than here, so checkpoints would "
                "be lost. Put runs on storage that all machines share: set ACPO_RUNS on every machine, or run.dir."
            )


class _Copy(KeptState):
    """Training state in the object store, which the driver fetches to its own machine as soon as it is there."""

    def __init__(self, reference: Any) -> None:
        # The driver owns the object, and arrays of its future hold it in the store of this machine.
        self._reference, self._files = reference, reference.future()

    @override
    def write(self, folder: Path) -> None:
        try:
            files = self._files.result(timeout=_DEATH_S)
        except (RayError, TimeoutError) as error:
            raise WorkerLostError(f"the copy was not complete: {type(error).__name__}") from error
        write_serialised(folder, files)


def _latents(handles: Sequence[RolloutHandle]) -> list[Any]:
    return [handle.payload[0] for handle in handles]
