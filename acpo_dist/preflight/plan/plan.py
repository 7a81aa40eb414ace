"""Parameters, memory by role, batches, time and warnings of a configuration."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from acpo_dist.config.schema import Config
from acpo_dist.models.architectures import Architecture, architecture_of
from acpo_dist.models.family import trainable_tensors
from acpo_dist.models.loading import DTYPES, held_dtype
from acpo_dist.models.schedulers import SAMPLERS
from acpo_dist.models.vae import VAE_DTYPES
from acpo_dist.preflight.plan import phases
from acpo_dist.preflight.plan.balance import Split, iteration_seconds, splits
from acpo_dist.preflight.plan.memory import GIB, LearnerState, Memory, learner_state
from acpo_dist.preflight.plan.networks import new_text_encoders
from acpo_dist.preflight.plan.rates import Device, device_for
from acpo_dist.preflight.plan.sharing import (
    needed_gib,
    one_process,
    replicas_of,
    reward_devices,
    rollout_devices,
)
from acpo_dist.preflight.plan.tracer import Trace
from acpo_dist.preflight.plan.warnings import warnings_for


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Resources of a run."""

    parameters: dict[str, int]
    roles: dict[str, Memory]
    workers: dict[str, int]
    batch: dict[str, int]
    seconds: dict[str, float]
    """Seconds by phase of one iteration."""
    teraflops: dict[str, float]
    """Operations per sample, by computation."""
    device: Device
    needed_gib: dict[str, float]
    """Peak GiB per device, for the workers of a role that share one, the workers of several roles (`shared`), or the
    process that holds all roles (`all`)."""
    overlapped: bool = False
    """Whether rollouts are drawn ahead on devices of their own."""
    splits: dict[str, Split] = field(default_factory=dict)
    """Splits of the run's GPUs between the roles; empty in one process and without GPUs."""
    warnings: list[str] = field(default_factory=list)

    @property
    def seconds_per_iteration(self) -> float:
        """Seconds of the phases that run in sequence."""
        return iteration_seconds(self.seconds, overlapped=self.overlapped)

    def to_mapping(self) -> dict[str, Any]:
        """Return JSON-compatible data."""
        return {
            "parameters": self.parameters,
            "roles": {
                name: {"workers": self.workers[name], "memory_gib": memory.to_mapping()}
                for name, memory in self.roles.items()
            },
            "batch": self.batch,
            "seconds_per_iteration": self.seconds_per_iteration,
            "seconds": self.seconds,
            "splits": {name: split.to_mapping() for name, split in self.splits.items()},
            "teraflops_per_sample": self.teraflops,
            "device": {"name": self.device.name, "memory_gib": self.device.memory_gib, "needed_gib": self.needed_gib},
            "warnings": self.warnings,
        }


@dataclass(frozen=True, kw_only=True)
class _Traced:
    """Traces of the phases."""

    step: Trace
    decode: Trace
    reward: Trace | None
    learn: Trace


def make_plan(config: Config, *, device: str = "auto") -> Plan:
    """Plan a run without loading weights.

    Args:
        config: configuration of the run.
        device: a key of `rates.DEVICES`, `cpu`, or `auto`.

    Returns:
        The plan.

    Raises:
        ModelError: the architecture of the model is unknown.
        KeyError: the device is unknown.
    """
    architecture = architecture_of(config.model)
    learner = config.learner
    shares = [config.rewards.pool_of(name).gpus or 0.0 for name in replicas_of(config)]
    wants_gpu = max(learner.gpus_per_rank, config.rollout.gpus_per_worker, *shares) > 0
    target = device_for(device, wants_gpu=wants_gpu)
    setting = setting_of(config, architecture)
    parameters = count_parameters(setting)
    step, decode = phases.rollout(setting, config.rollout.batch_size)
    traced = _Traced(
        step=step,
        decode=decode,
        reward=phases.reward(setting, learner.micro_batch),
        learn=phases.learner(setting, learner.micro_batch),
    )
    roles = _roles(config, parameters, setting, traced)
    batch = _batch(config)
    flops = _flops(config, traced)
    seconds = _seconds(config, flops, batch, target)
    base = parameters["network"] * DTYPES[config.model.dtype].itemsize / GIB
    needed = needed_gib(config, roles, target, base=base)
    return Plan(
        parameters=parameters, roles=roles, batch=batch, seconds=seconds, device=target, needed_gib=needed,
        workers={
            "rollout": config.rollout.num_workers, "learner": learner.num_ranks,
            "reward": sum(replicas_of(config).values()),
        },
        teraflops={name: value / 1e12 for name, value in flops.items()},
        overlapped=config.pipeline.max_staleness > 0 and not one_process(config),
        splits=_splits(config, seconds),
        warnings=warnings_for(config, architecture, roles, needed, target),
    )  # fmt: skip


def _splits(config: Config, seconds: dict[str, float]) -> dict[str, Split]:
    """Return the splits of a run whose roles have GPUs of their own."""
    gpus = (config.rollout.gpus_per_worker, config.learner.gpus_per_rank)
    if one_process(config) or min(gpus) == 0:
        return {}
    devices = {
        "rollout": rollout_devices(config), "reward": max(reward_devices(config).values()),
        "learner": config.learner.num_ranks,
    }  # fmt: skip
    return splits(config, seconds, devices)


def count_parameters(setting: phases.Setting) -> dict[str, int]:
    """Count parameters by network without reading weights.

    Args:
        setting: run and architecture.

    Returns:
        `network` (frozen, or the whole network in full tuning), `trainable` (adapters, or the whole network),
        `text_encoders` and `vae`.
    """
    family, encoders = setting.sampler_family, new_text_encoders(setting.architecture)
    trainable = _count([trainable_tensors(family.network).values()])
    whole = _count([family.network.parameters()])
    return {
        "network": whole if setting.config.model.tuning.method == "full" else whole - trainable,
        "trainable": trainable,
        "text_encoders": _count(module.parameters() for module in encoders),
        "vae": _count([family.decoder.vae.parameters()]) if family.decoder is not None else 0,
    }


def _count(groups: Iterable[Iterable[Tensor]]) -> int:
    return sum(value.numel() for group in groups for value in group)


def setting_of(config: Config, architecture: Architecture) -> phases.Setting:
    """Return the input of the phases for a run."""
    return phases.Setting(config=config, architecture=architecture)


def _roles(config: Config, parameters: dict[str, int], setting: phases.Setting, traced: _Traced) -> dict[str, Memory]:
    model, learner = config.model, config.learner
    full = model.tuning.method == "full"
    width = DTYPES[model.dtype].itemsize
    adapters = 0 if full else parameters["trainable"]
    memory = getattr(model, "memory", None)
    text = 0 if memory is None or memory.free_text_encoders else parameters["text_encoders"] * width
    vae = parameters["vae"] * VAE_DTYPES[model.vae_dtype].itemsize if parameters["vae"] else 0
    frozen = 0 if full else parameters["network"]
    held = held_dtype(model.dtype, method=model.tuning.method, trainable=True).itemsize
    state = LearnerState(
        frozen=frozen, trainable=parameters["trainable"], frozen_bytes=held, trainable_bytes=4,
        zero_stage=learner.zero_stage, ranks=learner.num_ranks, narrow=learner.precision == "bfloat16",
        eight_bit=learner.optimizer == "adamw_8bit", offloaded=learner.offload_optimizer == "cpu",
    )  # fmt: skip
    weights, gradients, optimizer = learner_state(state)
    copied = torch.float32 if memory is None else DTYPES[memory.anchor_dtype]
    anchor = copied.itemsize * parameters["network"] if full else 0
    if config.algorithm.old_decay(0) is not None or (
        config.pipeline.max_staleness and config.algorithm.compares_policies
    ):
        # The weights that drew the samples, beside the ones that train.
        anchor += (2 if state.narrow and learner.zero_stage is not None else 4) * parameters["trainable"]
    # Without an earlier micro-batch the trace allocates the gradients itself.
    extra = traced.learn.peak_bytes if setting.accumulated else max(0.0, traced.learn.peak_bytes - gradients)
    sampling = max(traced.step.peak_bytes, traced.decode.peak_bytes)
    rollout = parameters["network"] * width + 4 * adapters + text + vae
    reward = vae if traced.reward is not None else 0
    return {
        "rollout": Memory(weights=rollout / GIB, activations=sampling / GIB),
        "learner": Memory(
            weights=(weights + text + vae) / GIB, gradients=gradients / GIB, optimizer=optimizer / GIB,
            anchor=anchor / GIB, activations=extra / GIB,
        ),
        "reward": Memory(
            weights=reward / GIB, activations=(traced.reward.peak_bytes if traced.reward else 0) / GIB
        ),
    }  # fmt: skip


def _accumulation(config: Config) -> int:
    learner = config.learner
    return learner.global_batch // (learner.micro_batch * learner.num_ranks)


def _batch(config: Config) -> dict[str, int]:
    rollout, learner = config.rollout, config.learner
    samples = rollout.prompts_per_iteration * rollout.samples_per_prompt
    return {
        "samples_per_iteration": samples,
        "prompts_per_iteration": rollout.prompts_per_iteration,
        "samples_per_prompt": rollout.samples_per_prompt,
        "rollout_batch": rollout.batch_size,
        "global_batch": learner.global_batch,
        "micro_batch": learner.micro_batch,
        "ranks": learner.num_ranks,
        "accumulation": _accumulation(config),
        "optimizer_steps": learner.inner_epochs * samples // learner.global_batch,
    }


def _flops(config: Config, traced: _Traced) -> dict[str, float]:
    """Return floating-point operations per sample, by computation."""
    steps = config.sampler.num_steps
    solver = SAMPLERS.get(config.sampler.solver)
    calls = steps * (solver.calls_per_step if solver else 1)
    batch, micro = config.rollout.batch_size, config.learner.micro_batch
    return {
        "rollout_step": traced.step.flops / batch,
        "rollout": calls * traced.step.flops / batch + traced.decode.flops / batch,
        "decode": traced.decode.flops / batch,
        "reward_gradient": traced.reward.flops / micro if traced.reward else 0.0,
        "learner": traced.learn.flops / micro,
    }


def _seconds(config: Config, flops: dict[str, float], batch: dict[str, int], device: Device) -> dict[str, float]:
    samples, model = batch["samples_per_iteration"], config.model
    trained = samples * config.learner.inner_epochs
    # Rewards run in sequence, each on the devices of its own replicas.
    decoded = trained * flops["reward_gradient"] * sum(1 / count for count in reward_devices(config).values())
    vae = getattr(model, "vae_dtype", "float32")
    sampling = samples * (flops["rollout"] - flops["decode"]) / device.rate(model.dtype)
    return {
        "rollout": (sampling + samples * flops["decode"] / device.rate(vae)) / rollout_devices(config),
        "reward": decoded / device.rate(vae),
        "learner": trained * flops["learner"] / device.rate(config.learner.precision) / config.learner.num_ranks,
    }
