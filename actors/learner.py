"""Learner ranks as a gang of actors: all of them, or none."""

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from acpo_dist.config.schema import Config
from acpo_dist.core.errors import UsageError, WorkerError, WorkerLostError
from acpo_dist.core.ports import Advance
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
from acpo_dist.workers.learner.metrics import MetricSums
from actors.cluster.software import Software, require_same, software
from actors.group import fetch, gather, kill
from actors.placement import Role
from actors.process import set_up
from actors.reward.client import PoolLink
from actors.reward.pool import ServeRewards

_DEATH_S = 75.0
"""Longest time that Ray takes to see that a machine is gone whose network was cut."""


class LearnerActor:
    """Shell round `LearnerWorker`: rank variables first, then everything heavy."""

    def __init__(self, rank: int, world_size: int, model_type: str, cpus: float, gpus: float) -> None:
        """Set the process up, and import what `build` needs while the rest of the cluster comes up."""
        self._device = set_up(cpus=cpus, gpus=gpus)
        # Ray shows each rank its own GPU alone, so the local rank is always 0.
        os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world_size))
        resolve("model", MODELS, model_type)

    def address(self) -> tuple[str, int]:
        """Where the ranks meet: this host and a free port."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def build(self, master: tuple[str, int], spec: Any, link: PoolLink, expected: Software | None) -> int:
        """Load the model; returns the process id."""
        require_same(expected)
        os.environ.update(MASTER_ADDR=master[0], MASTER_PORT=str(master[1]))
        from acpo_dist.workers.learner.worker import LearnerWorker
        from actors.reward.client import RewardClient

        self._client = RewardClient(link)
        self._worker = LearnerWorker(spec, self._client, device=self._device)
        return os.getpid()

    def start(self, folder: Path | None) -> int:
        """See `LearnerWorker.start`; returns D."""
        self._worker.start(folder)
        return self._worker.num_elements

    def train(self, references: list[Any], task: TrainTask) -> tuple[MetricSums, int, list[SkippedStep], bool, int]:
        """See `LearnerWorker.train`; then whether too many steps were refused, and how often this rank asked again."""
        found = self._worker.train(ray.get(references), task)
        return *found, self._worker.skipped_too_many, self._client.retries

    def gradient_norms(self, references: list[Any], terms: Sequence[RewardTerm]) -> list[float]:
        """See `LearnerWorker.gradient_norms`."""
        return self._worker.gradient_norms(ray.get(references), terms)

    def observe(self, references: list[Any]) -> dict[str, list[float]]:
        """See `LearnerWorker.observe`."""
        return self._worker.observe(ray.get(references))

    def measure_drift(self, references: list[Any], timesteps: Sequence[int]) -> MetricSums:
        """See `LearnerWorker.measure_drift`."""
        return self._worker.measure_drift(ray.get(references), timesteps)

    def export(self, version: int, ema: bool) -> tuple[WeightBundle, str]:
        """The bundle and its checksum, each an object of its own."""
        bundle = self._worker.export(version, ema=ema)
        return bundle, bundle.checksum

    def save(self, folder: Path) -> None:
        """See `LearnerWorker.save`."""
        self._worker.save(folder)

    def ping(self) -> None:
        """Answer."""

    def holds(self, file: Path, content: bytes) -> str:
        """Empty if the file is the same here, else the address of this machine."""
        try:
            return "" if file.read_bytes() == content else ray.util.get_node_ip_address()
        except OSError:
            return ray.util.get_node_ip_address()

    def close(self) -> None:
        """Leave the process group."""
        self._worker.close()


class RayLearner:
    """The gang as the driver sees it. A rank that fails ends the others: half a gang would wait for ever."""

    def __init__(self, config: Config, role: Role, group: Any) -> None:
        """Start the actors; `build` loads the models."""
        shell = ray.remote(LearnerActor).options(
            max_restarts=0, num_cpus=role.cpus, num_gpus=role.gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group),
        )  # fmt: skip
        self._actors = {
            f"learner/{rank}": shell.remote(rank, role.count, config.model.type, role.cpus, role.gpus)
            for rank in range(role.count)
        }
        self._config, self._rewards = config, None
        self._timeout_s = config.learner.timeout_s
        self._num_elements = 0

    @property
    def _first(self) -> Any:
        return self._actors["learner/0"]

    def build(self, rewards: ServeRewards) -> None:
        """Load the models and connect the ranks to the reward pool."""
        self._rewards = rewards
        master = fetch(self._first.address.remote(), name="learner/0", what="address", timeout_s=self._timeout_s)
        spec = ray.put(learner_spec(self._config))
        expected = None if self._config.cluster.mixed_software else software()
        self._all("load model", lambda actor: actor.build.remote(master, spec, rewards.link, expected))
        self._require_shared_folder()

    def start(self, folder: Path | None) -> None:
        """See `LearnerGroup.start`."""
        self._num_elements = self._all("start", lambda actor: actor.start.remote(folder))[0]

    def train(self, handles: Sequence[RolloutHandle], task: TrainTask, advance: Advance | None = None) -> TrainReport:
        """See `LearnerGroup.train`."""
        references = _latents(handles)
        answers = self._all("train", lambda actor: actor.train.remote(references, task))
        if self._rewards is not None:
            self._rewards.learner_retries = sum(retries for *_, retries in answers)
        if advance:
            advance(len(task.sample_ids))
        # Every rank refuses the same steps, and knows the samples of its own.
        skipped = zip(*(steps for _, _, steps, *_ in answers), strict=True)
        return TrainReport(
            metrics=MetricSums.merge(metrics for metrics, *_ in answers).means(), optim_steps=answers[0][1],
            skipped=tuple(
                replace(ranks[0], sample_ids=tuple(name for rank in ranks for name in rank.sample_ids))
                for ranks in skipped
            ),
            too_many=answers[0][3],
        )  # fmt: skip

    def gradient_scale(self, handles: Sequence[RolloutHandle], rewards: Sequence[RewardTerm]) -> GradientScale:
        """See `LearnerGroup.gradient_scale`."""
        references = _latents(handles)
        answers = self._all("gradient scale", lambda actor: actor.gradient_norms.remote(references, rewards))
        norms = [norm for part in answers for norm in part]
        return GradientScale(median_norm=median(norms), num_elements=self._num_elements)

    def observe(self, handles: Sequence[RolloutHandle]) -> dict[str, list[float]]:
        """See `LearnerGroup.observe`."""
        references = _latents(handles)
        merged: dict[str, list[float]] = {}
        for part in self._all("observe", lambda actor: actor.observe.remote(references)):
            for name, values in part.items():
                merged.setdefault(name, []).extend(values)
        return merged

    def measure_drift(self, handles: Sequence[RolloutHandle], timesteps: Sequence[int]) -> dict[int, float]:
        """See `LearnerGroup.measure_drift`."""
        references = _latents(handles)
        answers = self._all("measure drift", lambda actor: actor.measure_drift.remote(references, timesteps))
        return {int(name): value for name, value in MetricSums.merge(answers).means().items()}

    def export_reference(self, version: int, *, ema: bool = False) -> tuple[Any, str]:
        """Reference to the bundle, and its checksum; the driver does not open the bundle."""
        bundle, checksum = self._first.export.options(num_returns=2).remote(version, ema)
        return bundle, fetch(checksum, name="learner/0", what="export", timeout_s=self._timeout_s)

    def export(self, version: int, *, ema: bool = False) -> WeightBundle:
        """See `LearnerGroup.export`."""
        reference, _ = self.export_reference(version, ema=ema)
        return fetch(reference, name="learner/0", what="export", timeout_s=self._timeout_s)

    def save(self, folder: Path) -> None:
        """See `LearnerGroup.save`; the folder must be on storage that rank 0 and the driver share."""
        target = folder.resolve()
        self._all("save", lambda actor: actor.save.remote(target))

    def close(self) -> None:
        """End the gang."""
        kill(self._actors)

    def _all(self, what: str, call: Any) -> list[Any]:
        calls = {name: call(actor) for name, actor in self._actors.items()}
        try:
            return list(gather(calls, timeout_s=self._timeout_s, what=what).values())
        except WorkerLostError:
            raise
        except WorkerError as error:
            # A rank that loses its peer often says so before Ray sees that the peer is gone.
            dead = self._first_dead()
            if dead is None:
                raise
            raise WorkerLostError(
                f"{dead} is gone; another rank failed in `{what}` for that reason: {error}"
            ) from error

    def _first_dead(self) -> str | None:
        signs = {actor.ping.remote(): name for name, actor in self._actors.items()} if len(self._actors) > 1 else {}
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
        """Refuse a run folder that not every rank sees: the first checkpoint would be lost, hours later.

        Raises:
            UsageError: names the machines.
        """
        file = self._config.run_dir.resolve() / RESOLVED
        if not file.is_file():
            return
        content = file.read_bytes()
        strangers = {
            where for where in self._all("see the run", lambda actor: actor.holds.remote(file, content)) if where
        }
        if strangers:
            raise UsageError(
                f"{file.parent} is not the same folder on {', '.join(sorted(strangers))} as here, so checkpoints would "
                "be lost. Put runs on storage that all machines share: set ACPO_RUNS on every machine, or run.dir."
            )


def _latents(handles: Sequence[RolloutHandle]) -> list[Any]:
    return [handle.payload[0] for handle in handles]
