"""Computations of one iteration, run on meta tensors with the project's own algorithms."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from acpo_dist.algorithms.base import Algorithm, LateStates, MicroBatch, TailStates
from acpo_dist.config.schema import Config
from acpo_dist.core.registry import ALGORITHMS, resolve
from acpo_dist.core.types import Normaliser, RewardTerm
from acpo_dist.diffusion.trajectory import Trajectory
from acpo_dist.models.architectures import Architecture
from acpo_dist.models.family import trainable_tensors
from acpo_dist.models.loading import held_dtype
from acpo_dist.preflight.plan.kernels import Kernels
from acpo_dist.preflight.plan.networks import META, MetaFamily
from acpo_dist.preflight.plan.tracer import Trace, trace
from acpo_dist.workers.learner.network import PolicyNetwork
from acpo_dist.workers.learner.signal import PooledReward
from acpo_dist.workers.reward.wire import WireTensor
from acpo_dist.workers.reward.worker import ScoredGradient


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A run and the architecture of its model."""

    config: Config
    architecture: Architecture

    @cached_property
    def sampler_family(self) -> MetaFamily:
        """Return the model as rollout and reward workers hold it, without an anchor."""
        return _family(self, trainable=False)

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the rollouts; 1 if only the conditional branch runs."""
        return self.config.sampler.guidance_for(conditional=self.architecture.family != "ddpm")

    @property
    def accumulated(self) -> bool:
        """Whether gradients of an earlier micro-batch exist during the learner's backward pass."""
        learner = self.config.learner
        return learner.global_batch > learner.micro_batch * learner.num_ranks

    @property
    def anchor_weight(self) -> float:
        """1 if the anchor of the algorithm is enabled, else 0; `auto` without a budget disables it."""
        anchor = self.config.algorithm.anchor
        return 0.0 if anchor.weight == 0 or (anchor.weight == "auto" and anchor.budget is None) else 1.0


def rollout(setting: Setting, batch: int) -> tuple[Trace, Trace]:
    """Trace one denoiser call, and the decoding of `batch` finished samples, both without gradients."""
    family = setting.sampler_family
    rows = 2 * batch if setting.guidance_scale > 1 else batch
    condition = family.encode([_PROMPT] * rows)
    noisy, clean = (torch.zeros(count, *family.sample_shape, device=META) for count in (rows, batch))
    timesteps = torch.zeros(rows, dtype=torch.long, device=META)
    with torch.no_grad(), Kernels(autocast=False).active():
        known = [*family.held, noisy, timesteps, *condition.tensors.values()]
        step = trace(lambda: family.predict(noisy, timesteps, condition), known)
        decode = trace(lambda: (family.decode(clean).clamp(0, 1) * 255).round(), [*family.held, clean])
    return step, decode


def reward(setting: Setting, batch: int) -> Trace | None:
    """Trace the decoding of `batch` estimates and the backward pass of the score's gradient in a reward worker.

    Returns:
        The trace; None if reward workers hold no decoder.
    """
    rewards = setting.config.rewards
    on_latents = all(entry.space == "latent" for entry in rewards.train)
    if (
        setting.architecture.vae is None
        or rewards.cut == "image"
        or on_latents
        or not setting.config.algorithm.pathwise
    ):
        return None
    family = setting.sampler_family
    channels, height, width = family.sample_shape
    side = rewards.latent_crop
    clean = torch.zeros(batch, channels, side or height, side or width, device=META, requires_grad=True)

    def run() -> Tensor:
        (gradient,) = torch.autograd.grad(family.decode(clean).sum(), clean)
        return gradient

    with Kernels(autocast=False).active():
        return trace(run, [*family.held, clean])


def learner(setting: Setting, batch: int) -> Trace:
    """Trace the forward and backward passes of the configured algorithm for one micro-batch."""
    config = setting.config
    narrow = config.learner.precision == "bfloat16"
    kernels = Kernels(autocast=narrow and config.learner.zero_stage is None)
    family = _family(setting, trainable=True)
    network = PolicyNetwork(family, config.algorithm.encoder)
    if narrow and config.learner.zero_stage is not None:
        family.cast(torch.bfloat16)
    network.autocast = kernels.region
    algorithm: Algorithm = resolve("algorithm", ALGORITHMS, config.algorithm.type)(config.algorithm)
    rewards = config.rewards
    pool = PooledReward(
        _Zeros(), [RewardTerm(name="planned", weight=1.0, normaliser=Normaliser(mean=0.0, std=1.0, sign=1))],
        family.decode, cut=rewards.cut, wire_dtype="float32", crop=rewards.latent_crop,
    )  # fmt: skip
    samples = _micro_batch(setting, family, batch)
    known = [*family.held, *network.encoder_weights, samples.clean, samples.weights_B]
    known += [value for value in vars(samples.late).values() if value is not None]
    if setting.accumulated:
        for parameter in trainable_tensors(family.network).values():
            parameter.grad = torch.zeros_like(parameter)
            known.append(parameter.grad)

    def run() -> None:
        with torch.no_grad():
            prepared = algorithm.prepare(samples, network)
        loss = algorithm.loss(samples, network, pool, setting.anchor_weight, prepared).per_sample.mean()
        with kernels.recomputation():
            loss.backward()

    with kernels.active():
        return trace(run, known)


_PROMPT = "a prompt"


class _Zeros:
    """A `GradientSource` that stands for a reward pool in other processes; scores and gradients are zeros."""

    def submit(self, metric: str, sent: WireTensor, prompts: Sequence[str]) -> Future[ScoredGradient]:
        response = Future[ScoredGradient]()
        zeros = WireTensor(np.zeros_like(sent.data), np.zeros_like(sent.exponent))
        response.set_result(ScoredGradient([0.0] * len(prompts), zeros))
        return response


def _family(setting: Setting, *, trainable: bool) -> MetaFamily:
    model = setting.config.model
    dtype = held_dtype(model.dtype, method=model.tuning.method, trainable=trainable)
    return MetaFamily(model, setting.architecture, dtype, trainable=trainable)


def _micro_batch(setting: Setting, family: MetaFamily, count: int) -> MicroBatch:
    """Return rollout samples whose tensors are all on the meta device."""
    config = setting.config

    def states() -> Tensor:
        return torch.zeros(count, *family.sample_shape, device=META)

    def levels() -> Tensor:
        return torch.zeros(count, dtype=torch.float64, device=META)

    stochastic = config.algorithm.needs_noise
    steps = _gradient_steps(config)
    conditional = setting.architecture.family != "ddpm"
    return MicroBatch(
        sample_ids=tuple(str(index) for index in range(count)), prompts=(_PROMPT if conditional else "",) * count,
        noise_keys=tuple(range(count)), clean=states(),
        states=LateStates(
            latents=states(), timesteps_B=torch.zeros(count, dtype=torch.long, device=META), alpha_bars_B=levels(),
            following=states() if stochastic else None, following_alpha_bars_B=levels() if stochastic else None,
        ),
        tail=TailStates(latents=states(), trajectory=_last_steps(steps)) if steps else None,
        clean_is_real=getattr(config.algorithm.anchor, "source", "rollout") == "data",
        weights_B=torch.ones(count, device=META), guidance_scale=setting.guidance_scale,
        guidance_rescale=config.sampler.guidance_rescale, eta=config.sampler.eta,
        stochastic_step=config.sampler.stochastic_step,
    )  # fmt: skip


def _gradient_steps(config: Config) -> int:
    """Return the number of sampler steps that carry the reward gradient, at most; 0 if an estimate is scored."""
    steps: Any = getattr(config.algorithm, "gradient_steps", "estimate")
    if steps == "random":
        return config.algorithm.max_gradient_steps or config.sampler.num_steps
    return 0 if steps == "estimate" else steps


def _last_steps(count: int) -> Trajectory:
    """Return any `count` steps to a clean sample: cost does not depend on the noise levels."""
    levels = [0.5 + 0.5 * step / count for step in range(count + 1)]
    return Trajectory(timesteps=tuple(float(count - step) for step in range(count)), alpha_bars=tuple(levels))
