"""Learner rank: selects its micro-batches, computes the algorithm's loss and updates the weights."""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from acpo_dist.algorithms.base import Algorithm, BaseAlgorithm
from acpo_dist.algorithms.branches import both_branches
from acpo_dist.algorithms.tail import states_at
from acpo_dist.core.errors import CheckpointError, ConfigError
from acpo_dist.core.memory import within_memory
from acpo_dist.core.registry import ALGORITHMS, resolve
from acpo_dist.core.seeding import derive_seed
from acpo_dist.core.types import RewardTerm, RolloutBatch, SkippedStep, TrainTask, WeightBundle
from acpo_dist.core.weights import make_bundle, with_version
from acpo_dist.diffusion.prediction import add_noise, flow_scale, to_clean
from acpo_dist.diffusion.sampling import guide
from acpo_dist.models.family import copy_weights, load_family, trainable_tensors
from acpo_dist.models.loading import held_dtype
from acpo_dist.objective.anchor import anchor_error, output_drift, resolve_space
from acpo_dist.workers.learner.batches import BatchMaker, LearnerSpec, mean_elements, memory_remedy
from acpo_dist.workers.learner.engine import Engine, TorchEngine
from acpo_dist.workers.learner.metrics import MetricSums
from acpo_dist.workers.learner.network import PolicyNetwork
from acpo_dist.workers.learner.samples import SampleStore
from acpo_dist.workers.learner.signal import GradientSource, PooledReward
from acpo_dist.workers.learner.state import EARLIER, TrainingState, earlier_files, write_state

logger = logging.getLogger(__name__)

ZERO_SNR = 1e-6
"""alpha_bar below which the last level is treated as pure noise; ordinary schedules end at 4e-5 or more."""


class LearnerWorker:
    """One rank of the learner, independent of Ray; a Ray actor wraps it."""

    def __init__(self, spec: LearnerSpec, source: GradientSource, *, device: str = "cpu") -> None:
        """Load the model and its anchor; `start` builds the optimiser."""
        self._spec, self._source, self._device = spec, source, device
        self.family = load_family(spec.model, device=device, trainable=True)
        space, last = spec.algorithm.anchor.space, float(self.family.alpha_bars[-1])
        if space == "eps" and last < ZERO_SNR:
            raise ConfigError(
                f"algorithm.anchor.space is eps, and the last level of `{spec.model.path}` has alpha_bar {last:.3g}, "
                "zero terminal SNR: drift in noise units vanishes there. Set algorithm.anchor.space=auto or v."
            )
        self.algorithm: Algorithm = resolve("algorithm", ALGORITHMS, spec.algorithm.type)(spec.algorithm)
        self.network = PolicyNetwork(self.family, spec.algorithm.encoder)
        self.batches = BatchMaker(spec, self.family, device=device)
        self._engine: Engine | None = None
        self._weights: dict[str, Tensor] = {}
        self._average: dict[str, Tensor] = {}
        self._old: dict[str, Tensor] = {}
        """Weights of the old policy; empty if the algorithm has none."""
        self._earlier: dict[int, dict[str, Tensor]] = {}
        """Weights of published versions that may still draw samples; empty if rollouts wait for the learner."""
        self._skipped_in_a_row = 0

    @property
    def num_elements(self) -> int:
        """D, elements of one latent tensor; their mean by share if the run mixes sizes."""
        return mean_elements(self._spec.model, self.family)

    def start(self, folder: Path | None) -> None:
        """Build the engine; with a folder, load weights, moments and averages first."""
        weights = load_file(folder / "policy.safetensors") if folder else None
        if weights is not None:
            self._put_weights(weights)
        learner = self._spec.learner
        if learner.zero_stage is None:
            kind = TorchEngine
        else:
            # Imported here, since DeepSpeed is optional and slow to import.
            from acpo_dist.workers.learner.zero import ZeroEngine

            kind = ZeroEngine
        engine: Engine = kind(self.family.network, learner, accumulation=self._spec.accumulation, device=self._device)
        self._engine = engine
        self.network.autocast = engine.autocast
        if folder and weights is not None:
            engine.load(weights, load_file(folder / "optimizer.safetensors"))
            self._average = load_file(folder / "ema.safetensors")
            self._earlier = {version: load_file(path) for version, path in earlier_files(folder).items()}
        self._weights = engine.weights()
        if self._spec.algorithm.old_decay(0) is not None:
            old = load_file(folder / "old.safetensors") if folder else self._weights
            self._set_old({name: value.clone() for name, value in old.items()})
        if not self._average:
            self._average = {name: value.clone() for name, value in self._weights.items()}

    def train(self, batches: Sequence[RolloutBatch], task: TrainTask) -> tuple[MetricSums, int, list[SkippedStep]]:
        """Run one iteration; every rank calls it with its own samples' batches and the same task.

        Returns:
            (metrics of this rank's samples, number of optimiser steps taken, skipped steps with this rank's samples).
            More than `learner.max_skipped_steps` consecutive skipped steps end the iteration, on all ranks at once.

        Raises:
            DeviceMemoryError: a micro-batch or the optimiser step does not fit into memory.
        """
        with within_memory(
            f"the learner, micro-batches of {self._spec.learner.micro_batch}", memory_remedy(self._spec)
        ):
            version = task.policy_version + task.staleness
            if self._spec.max_staleness:
                self._earlier = with_version(self._earlier, version, self._sampling, earlier=self._spec.max_staleness)
            with self._drawn_with(self._earlier[task.policy_version]) if task.staleness else nullcontext():
                found = self._train(batches, task)
            self.family.release()
            return found

    def _train(self, batches: Sequence[RolloutBatch], task: TrainTask) -> tuple[MetricSums, int, list[SkippedStep]]:
        engine = self._ready()
        engine.set_learning_rate(task.learning_rate)
        store = SampleStore(batches, policy_version=task.policy_version)
        crop = derive_seed("crop", self._spec.seed, task.iteration, engine.rank)
        reward = self._reward(task.rewards, crop, skippable=True)
        sums = MetricSums()
        steps = cut(task.sample_ids, self._spec.learner.global_batch) * self._spec.learner.inner_epochs
        prepared = self._prepare(store, task, steps)
        skipped: list[SkippedStep] = []
        tried = 0
        for step, ids in enumerate(steps):
            started = time.monotonic()
            found, bad = MetricSums(), []
            for index, part in enumerate(self._own(ids)):
                batch = self.batches.make(store, part, task, step)
                loss = self.algorithm.loss(
                    batch, self.network, reward, task.anchor_weight, prepared[step][index] if prepared else None
                )
                mean = loss.per_sample.mean()
                finite = torch.isfinite(loss.per_sample)
                if not finite.all():
                    bad += [name for name, ok in zip(part, finite, strict=True) if not ok]
                    # Makes the gradient non-finite too, so that all ranks skip the step.
                    mean = mean * torch.nan
                engine.backward(mean)
                found.add(loss.metrics)
            norm = engine.step()
            if math.isfinite(norm):
                self._skipped_in_a_row = 0
                self._weights = engine.weights()
                self._update_average()
                found.add({"learner/grad_norm": torch.tensor([norm])})
                sums = MetricSums.merge((sums, found))
            else:
                skipped.append(SkippedStep(step=step, gradient_norm=norm, sample_ids=tuple(bad)))
                self._skipped_in_a_row += 1
            tried += 1
            sums.add({"time/optim_step": torch.tensor([time.monotonic() - started])})
            if self.skipped_too_many:
                break
        if reward.waited_s:
            sums.add({"time/reward_gradient": torch.tensor([reward.waited_s])})
        if self._spec.data.pairs is not None:
            broken = self.batches.take_broken()
            if broken:
                logger.warning("pairs left out, since an image cannot be decoded: %s", ", ".join(broken[:5]))
            own = len(steps) * self._spec.learner.global_batch // engine.world_size
            share = torch.zeros(own)
            share[: len(broken)] = 1
            sums.add({"pairs/broken_share": share})
        taken = tried - len(skipped)
        decay = self._spec.algorithm.old_decay(task.iteration)
        if decay is not None:
            self._set_old({name: value.lerp(self._old[name], decay) for name, value in self._weights.items()})
        return sums, taken, skipped

    @property
    def skipped_too_many(self) -> bool:
        """Whether more consecutive steps were skipped than allowed; the same on every rank."""
        return self._skipped_in_a_row > self._spec.learner.max_skipped_steps

    @torch.no_grad()
    def _prepare(
        self, store: SampleStore, task: TrainTask, steps: Sequence[tuple[str, ...]]
    ) -> list[list[Tensor]] | None:
        """Run `Algorithm.prepare` on every micro-batch before the first step; None for most algorithms."""
        if type(self.algorithm).prepare is BaseAlgorithm.prepare:
            return None
        prepared: list[list[Tensor]] = []
        for step, ids in enumerate(steps):
            row: list[Tensor] = []
            for part in self._own(ids):
                value = self.algorithm.prepare(self.batches.make(store, part, task, step), self.network)
                if value is None:
                    return None
                row.append(value)
            prepared.append(row)
        return prepared

    @torch.no_grad()
    def observe(self, batches: Sequence[RolloutBatch]) -> dict[str, list[float]]:
        """Run `Algorithm.observe` on this rank's share of the base samples."""
        store = SampleStore(batches, policy_version=None)
        found: dict[str, list[float]] = {}
        for part, counts in self._share(store):
            metrics = self.algorithm.observe(self.batches.make(store, part, None, 0), self.network)
            if not metrics:
                return {}
            if counts:
                for name, values in metrics.items():
                    found.setdefault(name, []).extend(values.tolist())
        return found

    @torch.no_grad()
    def gradient_norms(self, batches: Sequence[RolloutBatch], terms: Sequence[RewardTerm]) -> list[float]:
        """Return the norm of dq / d eps-hat per sample at one late state, for this rank's share of the samples.

        For an anchor in units of x0 it is the norm of dq / d x0-hat. Under guidance w both branches carry the gradient,
        w g and (1 - w) g, and the anchor is the mean of their drifts: the norm is then
        sqrt(2 (w^2 + (1 - w)^2)) |g|, so that `initial_anchor_weight` gives sqrt(D) sqrt((|g_c|^2 + |g_u|^2) / 2) / r.
        """
        store = SampleStore(batches, policy_version=None)
        reward = self._reward(terms, derive_seed("crop", self._spec.seed, "calibration", self._ready().rank))
        space = resolve_space(self._spec.algorithm.anchor.space, self.family.prediction_type)
        norms: list[float] = []
        for part, counts in self._share(store):
            batch = self.batches.make(store, part, None, 0)
            late, full = batch.late, getattr(self._spec.algorithm, "guidance", "conditional") == "full"
            if batch.tail is not None:
                full = True
                if batch.tail.trajectory.num_steps == 1:
                    late = states_at(batch.tail.latents, batch.tail.trajectory, 0)
            scale = batch.guidance_scale if full else 1.0
            conditional, null = both_branches(self.network, late, batch.prompts, scale)
            model_output = conditional if null is None else guide(conditional, null, scale, batch.guidance_rescale)
            clean = to_clean(model_output, late.latents, late.alpha_bars_B, self.family.prediction_type)
            gradient = reward(clean, batch.prompts)().gradient.flatten(1).norm(dim=1)
            if null is not None:
                gradient = gradient * math.sqrt(2 * (scale**2 + (1 - scale) ** 2))
            if space == "v" and self.family.prediction_type == "flow_prediction":
                # d x0-hat / d v-hat = -s with s = sigma, finite at pure noise.
                level = late.alpha_bars_B
                gradient = gradient * (flow_scale(level, level) * (1 - level).sqrt()).to(gradient)
            elif space != "x0":
                # d x0-hat / d eps-hat = -s / a. The controller corrects the factor a of a velocity, near 1 here.
                gradient = gradient * ((1 - late.alpha_bars_B) / late.alpha_bars_B).sqrt().to(gradient)
            if counts:
                norms += gradient.tolist()
        return norms

    @torch.no_grad()
    def measure_drift(
        self, batches: Sequence[RolloutBatch], timesteps: Sequence[int], *, space: str = "eps"
    ) -> MetricSums:
        """Measure drift at fixed timesteps on forward-noised x_0, for this rank's share, by timestep.

        Args:
            batches: rollouts whose x_0 is noised.
            timesteps: integers in [0, T).
            space: units of the drift: `eps`, `v` or `x0`.
        """
        store = SampleStore(batches, policy_version=None)
        sums = MetricSums()
        for part, counts in self._share(store):
            clean = store.clean(part).to(self._device)
            condition = self.family.encode(store.prompts(part))
            for timestep in timesteps:
                keys = [derive_seed("drift", sample_id, timestep) for sample_id in part]
                noise = torch.stack(
                    [torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(k)) for k in keys]
                )
                alpha_bars = self.family.alpha_bars[[timestep] * len(part)]
                noisy = add_noise(clean, noise.to(clean), alpha_bars)
                at = torch.full((len(part),), timestep, device=clean.device)
                model_output = self.family.predict(noisy, at, condition)
                with self.family.anchored():
                    anchor = self.family.predict(noisy, at, condition)
                drift = output_drift(model_output, anchor, alpha_bars, self.family.prediction_type, space)
                if counts:
                    sums.add({str(timestep): anchor_error(drift)})
        return sums

    def export(self, version: int, *, ema: bool = False) -> WeightBundle:
        """Return the weights for the next rollouts, the same on every rank: the policy's or the old policy's.

        Args:
            version: number of the bundle; an earlier one is exported as it was published.
            ema: export the average over optimiser steps (`learner.ema_decay`) instead.
        """
        # Cast to the rollout workers' type, so that their acknowledged checksum covers the same bytes.
        model = self._spec.model
        dtype = held_dtype(model.dtype, method=model.tuning.method, trainable=False)
        if model.tuning.method == "lora":
            dtype = torch.float32
        weights = self._average if ema else self._earlier.get(version, self._sampling)
        return make_bundle(version, {name: value.to(dtype) for name, value in weights.items()})

    def save(self, folder: Path, earlier: Sequence[int] = ()) -> None:
        """Write the state; every rank calls it, rank 0 writes.

        Args:
            folder: where to write.
            earlier: versions whose weights are written too.

        Raises:
            StorageError: the disk is full or gone.
        """
        write_state(folder, self.state(earlier))

    def state(self, earlier: Sequence[int] = ()) -> TrainingState:
        """Return what `save` writes; every rank calls it, and all but rank 0 get an empty state."""
        engine = self._ready()
        moments = engine.optimiser_state()
        if engine.rank != 0:
            return {}
        parts = {"policy": self._weights, "ema": self._average, "optimizer": moments}
        if self._old:
            parts["old"] = self._old
        return parts | {f"{EARLIER}{version:06d}": self._earlier[version] for version in earlier}

    @property
    def state_bytes(self) -> int:
        """Bytes of the largest `state`: weights, average and two moments, and weights of other versions, in float32."""
        sets = 4 + bool(self._old) + self._spec.max_staleness
        return 4 * sets * sum(value.numel() for value in self._weights.values())

    def close(self) -> None:
        """Leave the process group."""
        if self._engine is not None:
            self._engine.close()

    @property
    def _sampling(self) -> dict[str, Tensor]:
        """Weights for the next rollouts; never changed in place."""
        return (self._old if self._spec.algorithm.draws_with_old else None) or self._weights

    @contextmanager
    def _drawn_with(self, weights: dict[str, Tensor]) -> Iterator[None]:
        """Context in which `network.old()` runs these weights, if the algorithm compares policies."""
        before = self.network.old_weights
        if self._spec.algorithm.compares_policies:
            self.network.old_weights = self._placed(weights)
        try:
            yield
        finally:
            if not self._old:
                self.network.old_weights = before

    def _ready(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("LearnerWorker.start() must be called first")
        return self._engine

    def _reward(self, terms: Sequence[RewardTerm], seed: int, *, skippable: bool = False) -> PooledReward:
        rewards = self._spec.rewards
        return PooledReward(
            self._source, terms, self.family.decode, cut=rewards.cut, wire_dtype=rewards.wire_dtype,
            spread=rewards.spread, crop=rewards.latent_crop, seed=seed, skippable=skippable,
        )  # fmt: skip

    def _own(self, ids: tuple[str, ...]) -> list[tuple[str, ...]]:
        """Return this rank's micro-batches of one optimiser step."""
        engine = self._ready()
        return cut(ids, self._spec.learner.micro_batch)[engine.rank :: engine.world_size]

    def _share(self, store: SampleStore) -> Iterator[tuple[tuple[str, ...], bool]]:
        """Yield this rank's micro-batches, each of one size, and whether each one contributes to the result.

        ZeRO 3 gathers collectively, so all ranks must run the same number of forward passes: a rank without a batch
        repeats the last one, which is then ignored.
        """
        engine = self._ready()
        parts = [part for ids in store.ids_by_size() for part in cut(ids, self._spec.learner.micro_batch)]
        for start in range(0, len(parts), engine.world_size):
            index = start + engine.rank
            yield parts[min(index, len(parts) - 1)], index < len(parts)

    def _update_average(self) -> None:
        for name, value in self._weights.items():
            self._average[name].lerp_(value, 1 - self._spec.learner.ema_decay)

    def _set_old(self, weights: dict[str, Tensor]) -> None:
        self._old = weights
        self.network.old_weights = self._placed(weights)

    def _placed(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        own = trainable_tensors(self.family.network)
        return {name: value.to(device=self._device, dtype=own[name].dtype) for name, value in weights.items()}

    def _put_weights(self, weights: dict[str, Tensor]) -> None:
        try:
            copy_weights(self.family.network, weights)
        except ValueError as error:
            raise CheckpointError(f"the checkpoint belongs to another model: {error}") from error


def cut(ids: Sequence[str], size: int) -> list[tuple[str, ...]]:
    """Cut `ids` into consecutive parts of `size`; the last part may be shorter."""
    return [tuple(ids[start : start + size]) for start in range(0, len(ids), size)]
