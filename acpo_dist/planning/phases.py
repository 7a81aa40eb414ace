"""The computations of one iteration, run on fake tensors in the order in which the workers run them.

Call them with the mode switched on: `with FakeTensorMode() as mode`.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from acpo_dist.models.architectures import Architecture
from acpo_dist.models.family import trainable_tensors
from acpo_dist.models.loading import DTYPES, held_dtype
from acpo_dist.models.vae import VAE_DTYPES, VaeDecoder
from acpo_dist.planning.networks import FakePolicy, new_condition, new_unet, new_vae, pretend, sample_shape
from acpo_dist.planning.tracer import Trace, trace


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the phases need to know of a run."""

    model: Any
    """The model's section."""
    architecture: Architecture
    guided: bool
    """Whether rollouts ask for both branches."""
    image_cut: bool
    """Whether the learner decodes."""
    pathwise: bool
    """Whether the score's gradient is used."""
    uniform: bool
    """Whether a second batch is anchored at uniform timesteps."""
    autocast: bool
    """bfloat16 arithmetic on the weights as they are held (plain torch)."""
    cast: bool
    """The network itself is held in bfloat16 (DeepSpeed)."""
    accumulated: bool
    """Whether gradients are there from an earlier micro-batch."""


def rollout(setting: Setting, mode: FakeTensorMode, batch: int) -> tuple[Trace, Trace]:
    """One denoiser call, and the decoding of `batch` finished samples; both without gradients."""
    dtype = held_dtype(setting.model.dtype, method=setting.model.tuning.method, trainable=False)
    policy = _policy(setting, mode, dtype)
    shape = sample_shape(setting.model, setting.architecture)
    rows = 2 * batch if setting.guided else batch
    condition = new_condition(setting.architecture, rows, DTYPES[setting.model.dtype])
    noisy = torch.zeros(rows, *shape)
    known = [*policy.network.parameters(), noisy, *condition.tensors.values()]
    with torch.no_grad():
        step = trace(lambda: policy.predict(noisy, condition), known)
        return step, _decoding(setting, mode, batch)


def _decoding(setting: Setting, mode: FakeTensorMode, batch: int) -> Trace:
    clean = torch.zeros(batch, *sample_shape(setting.model, setting.architecture))
    if setting.architecture.vae is None:
        return trace(lambda: (clean / 2 + 0.5).clamp(0, 1), [clean])
    decoder = _decoder(setting, mode)
    return trace(lambda: (decoder.decode(clean).clamp(0, 1) * 255).round(), [clean, *decoder.vae.parameters()])


def reward(setting: Setting, mode: FakeTensorMode, batch: int) -> Trace | None:
    """Decoding `batch` estimates and the way back of the score's gradient; None where no decoder is there."""
    if setting.architecture.vae is None or setting.image_cut or not setting.pathwise:
        return None
    decoder = _decoder(setting, mode)
    clean = torch.zeros(batch, *sample_shape(setting.model, setting.architecture), requires_grad=True)
    return trace(lambda: _through(decoder, clean), [clean, *decoder.vae.parameters()])


def learner(setting: Setting, mode: FakeTensorMode, batch: int) -> Trace:
    """Forward and backward of one micro-batch as ACPO runs it: policy and anchor at late and at uniform timesteps."""
    dtype = torch.bfloat16 if setting.cast else held_dtype(
        setting.model.dtype, method=setting.model.tuning.method, trainable=True
    )  # fmt: skip
    policy = _policy(setting, mode, dtype)
    decoder = _decoder(setting, mode) if setting.image_cut and setting.architecture.vae is not None else None
    noisy = torch.zeros(batch, *sample_shape(setting.model, setting.architecture))
    condition = new_condition(setting.architecture, batch, DTYPES[setting.model.dtype])
    known: list[Tensor] = [*policy.network.parameters(), noisy, *condition.tensors.values()]
    if decoder is not None:
        known += decoder.vae.parameters()
    if setting.accumulated:
        for parameter in trainable_tensors(policy.network).values():
            parameter.grad = torch.zeros_like(parameter)
            known.append(parameter.grad)

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16) if setting.autocast else nullcontext():
            head = policy.predict(noisy, condition)
            loss = (noisy - head).square().mean()
            if setting.pathwise and decoder is not None:
                _through(decoder, (noisy - head).detach().requires_grad_(True))
            policy.anchor(noisy, condition)
            if setting.uniform:
                loss = loss + (policy.predict(noisy, condition) - policy.anchor(noisy, condition)).square().mean()
        loss.backward()

    return trace(run, known)


def _through(decoder: Any, clean: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(decoder.decode(clean).sum(), clean)
    return gradient


def _policy(setting: Setting, mode: FakeTensorMode, dtype: torch.dtype) -> FakePolicy:
    memory = getattr(setting.model, "memory", None)
    with unset_fake_temporarily():
        policy = FakePolicy(
            new_unet(setting.architecture, dtype), setting.model.tuning, narrow=setting.cast,
            checkpointing=bool(memory and memory.gradient_checkpointing),
        )  # fmt: skip
    return policy.pretend(mode)


def _decoder(setting: Setting, mode: FakeTensorMode) -> Any:
    # float16 has the size of bfloat16 and, unlike it, is checked for overflow, which fake numbers cannot be.
    name = setting.model.vae_dtype if setting.model.vae_dtype != "float16" else "bfloat16"
    memory = setting.model.memory
    vae = new_vae(setting.architecture, VAE_DTYPES[name])
    pretend(vae, mode)
    return VaeDecoder(
        vae, checkpointing=memory.vae_checkpointing, slicing=memory.vae_slicing, tiling=memory.vae_tiling
    )  # fmt: skip
