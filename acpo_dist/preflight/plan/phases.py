"""The computations of one iteration, run on tensors without values in the order in which the workers run them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from acpo_dist.models.architectures import Architecture
from acpo_dist.models.family import trainable_tensors
from acpo_dist.models.loading import DTYPES, held_dtype
from acpo_dist.models.vae import VAE_DTYPES, VaeDecoder
from acpo_dist.preflight.plan.kernels import Kernels
from acpo_dist.preflight.plan.networks import META, FakePolicy, new_condition, new_unet, new_vae, sample_shape
from acpo_dist.preflight.plan.tracer import Trace, trace


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
    branches: bool
    """Whether the learner asks for both branches at once: policy gradients, and rewards of guided estimates."""
    prepared: bool
    """Whether it goes over its samples once more before the weights move."""
    cast: bool
    """The network itself is held in bfloat16 (DeepSpeed)."""
    accumulated: bool
    """Whether gradients are there from an earlier micro-batch."""
    crop: int | None
    """Side of the window of x0-hat that is decoded for the gradient; None for all of it."""


def rollout(setting: Setting, batch: int) -> tuple[Trace, Trace]:
    """One denoiser call, and the decoding of `batch` finished samples; both without gradients."""
    dtype = held_dtype(setting.model.dtype, method=setting.model.tuning.method, trainable=False)
    policy = _policy(setting, dtype)
    shape = sample_shape(setting.model, setting.architecture)
    rows = 2 * batch if setting.guided else batch
    condition = new_condition(setting.architecture, rows, DTYPES[setting.model.dtype])
    noisy = torch.zeros(rows, *shape, device=META)
    known = [*policy.network.parameters(), noisy, *condition.tensors.values()]
    with torch.no_grad(), Kernels(autocast=False).active():
        step = trace(lambda: policy.predict(noisy, condition), known)
        return step, _decoding(setting, batch)


def _decoding(setting: Setting, batch: int) -> Trace:
    clean = torch.zeros(batch, *sample_shape(setting.model, setting.architecture), device=META)
    if setting.architecture.vae is None:
        return trace(lambda: (clean / 2 + 0.5).clamp(0, 1), [clean])
    decoder = _decoder(setting)
    return trace(lambda: (decoder.decode(clean).clamp(0, 1) * 255).round(), [clean, *decoder.vae.parameters()])


def reward(setting: Setting, batch: int) -> Trace | None:
    """Decoding `batch` estimates and the way back of the score's gradient; None where no decoder is there."""
    if setting.architecture.vae is None or setting.image_cut or not setting.pathwise:
        return None
    decoder = _decoder(setting)
    clean = torch.zeros(batch, *sample_shape(setting.model, setting.architecture), device=META)
    clean = _cropped(clean, setting).requires_grad_(True)
    with Kernels(autocast=False).active():
        return trace(lambda: _through(decoder, clean), [clean, *decoder.vae.parameters()])


def learner(setting: Setting, batch: int) -> Trace:
    """Forward and backward of one micro-batch: policy and anchor, and both again where a second batch is anchored."""
    dtype = torch.bfloat16 if setting.cast else held_dtype(
        setting.model.dtype, method=setting.model.tuning.method, trainable=True
    )  # fmt: skip
    policy = _policy(setting, dtype)
    decoder = _decoder(setting) if setting.image_cut and setting.architecture.vae is not None else None
    rows = 2 * batch if setting.branches else batch
    noisy = torch.zeros(rows, *sample_shape(setting.model, setting.architecture), device=META)
    condition = new_condition(setting.architecture, rows, DTYPES[setting.model.dtype])
    known: list[Tensor] = [*policy.network.parameters(), noisy, *condition.tensors.values()]
    if decoder is not None:
        known += decoder.vae.parameters()
    if setting.accumulated:
        for parameter in trainable_tensors(policy.network).values():
            parameter.grad = torch.zeros_like(parameter)
            known.append(parameter.grad)
    kernels = Kernels(autocast=setting.autocast)

    def run() -> None:
        if setting.prepared:
            with torch.no_grad():
                policy.predict(noisy, condition)
        model_output = policy.predict(noisy, condition)
        loss = (noisy - model_output).square().mean()
        if setting.pathwise and decoder is not None:
            _through(decoder, _cropped((noisy - model_output)[:batch].detach(), setting).requires_grad_(True))
        policy.anchor(noisy, condition)
        if setting.uniform:
            part, prompts = noisy[:batch], new_condition(setting.architecture, batch, DTYPES[setting.model.dtype])
            loss = loss + (policy.predict(part, prompts) - policy.anchor(part, prompts)).square().mean()
        kernels.forget()
        loss.backward()

    with kernels.active():
        return trace(run, known)


def _through(decoder: Any, clean: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(decoder.decode(clean).sum(), clean)
    return gradient


def _cropped(clean: Tensor, setting: Setting) -> Tensor:
    return clean if setting.crop is None else clean[..., : setting.crop, : setting.crop]


def _policy(setting: Setting, dtype: torch.dtype) -> FakePolicy:
    memory = getattr(setting.model, "memory", None)
    return FakePolicy(
        new_unet(setting.architecture, dtype), setting.model.tuning, narrow=setting.cast,
        checkpointing=bool(memory and memory.gradient_checkpointing),
    )  # fmt: skip


def _decoder(setting: Setting) -> Any:
    # float16 has the size of bfloat16 and, unlike it, is checked for overflow, which missing values cannot be.
    name = setting.model.vae_dtype if setting.model.vae_dtype != "float16" else "bfloat16"
    memory = setting.model.memory
    return VaeDecoder(
        new_vae(setting.architecture, VAE_DTYPES[name]), checkpointing=memory.vae_checkpointing,
        slicing=memory.vae_slicing, tiling=memory.vae_tiling,
    )  # fmt: skip
