"""The rollout worker: draws samples along a trajectory with guidance, keeps late states; stateless but for weights."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from acpo_dist.config.schema import SamplerConfig
from acpo_dist.core.errors import WeightSyncError
from acpo_dist.core.registry import MODELS, resolve
from acpo_dist.core.types import LateLatents, RolloutBatch, SamplePlan, WeightBundle, WeightEcho
from acpo_dist.core.weights import checksum
from acpo_dist.diffusion.sampling import guide, keep_states, walk
from acpo_dist.diffusion.trajectory import Trajectory, spaced_trajectory
from acpo_dist.models.family import Condition, trainable_tensors

BASE_VERSION = 0


class RolloutWorker:
    """One model, one trajectory, many samples."""

    def __init__(self, model: Any, sampler: SamplerConfig, *, device: str = "cpu", name: str = "rollout/0") -> None:
        """Load the model with untouched weights (version 0).

        Args:
            model: the model's configuration section.
            name: how this worker is called in messages.
        """
        self._family = resolve("model", MODELS, model.type).load(model, device=device, trainable=False)
        self._sampler, self._device, self._name = sampler, device, name
        self._version = BASE_VERSION
        self.trajectory: Trajectory = spaced_trajectory(self._family.alpha_bars, sampler.num_steps, sampler.spacing)
        self._late = self.trajectory.late_steps(sampler.t_max, len(self._family.alpha_bars), sampler.late_per_sample)

    @torch.no_grad()
    def generate(self, plans: Sequence[SamplePlan]) -> RolloutBatch:
        """Draw one chunk; each sample depends on its own seed and prompt and on the weights alone."""
        prompts = tuple(plan.prompt for plan in plans)
        start = torch.stack([self._start(plan.seed) for plan in plans]).to(self._device)
        kept: dict[int, Tensor] = {}
        clean = walk(
            self._denoiser(prompts),
            start,
            self.trajectory,
            self._family.prediction_type,
            visit=keep_states(self._late, kept),
        )
        pixels = self._family.decode(clean).clamp(0, 1)
        return RolloutBatch(
            sample_ids=tuple(plan.sample_id for plan in plans),
            prompts=prompts,
            policy_version=self._version,
            schedule_id=self.trajectory.schedule_id,
            latents_BCHW=clean.float().cpu(),
            late=tuple(self._late_state(step, kept[step]) for step in self._late),
            images_BCHW=(pixels * 255).round().to(torch.uint8).cpu(),
        )

    def load(self, bundle: WeightBundle) -> WeightEcho:
        """Copy weights in, then say what the parameters hold.

        Raises:
            WeightSyncError: names or shapes are not those of the trainable parameters.
        """
        own = trainable_tensors(self._family.network)
        if set(own) != set(bundle.tensors):
            odd = sorted(set(own) ^ set(bundle.tensors))[:5]
            raise WeightSyncError(
                f"{self._name}: the bundle's names differ from the trainable parameters, such as {odd}"
            )
        bent = [name for name, parameter in own.items() if bundle.tensors[name].shape != parameter.shape]
        if bent:
            raise WeightSyncError(f"{self._name}: the bundle's shapes differ from the parameters', such as {bent[:5]}")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(bundle.tensors[name])
        self._version = bundle.version
        held = {name: parameter.detach().to(bundle.tensors[name].dtype) for name, parameter in own.items()}
        return WeightEcho(worker=self._name, version=bundle.version, checksum=checksum(held))

    def _start(self, seed: int) -> Tensor:
        return torch.randn(self._family.sample_shape, generator=torch.Generator().manual_seed(seed))

    def _late_state(self, step: int, latents: Tensor) -> LateLatents:
        return LateLatents(
            denoise_step=step,
            timestep=self.trajectory.timesteps[step],
            alpha_bar=self.trajectory.alpha_bars[step],
            latents_BCHW=latents.float().cpu(),
        )

    def _denoiser(self, prompts: tuple[str, ...]):
        family, scale = self._family, self._sampler.guidance_scale
        condition = family.encode(prompts)
        if not family.conditional or scale <= 1:
            return lambda state, timesteps: family.predict(state, timesteps, condition)
        # Both branches in one forward: the null prompt first, as diffusers orders them.
        both: Condition = family.encode([""] * len(prompts)).join(condition)

        def guided(state: Tensor, timesteps: Tensor) -> Tensor:
            head = family.predict(torch.cat([state, state]), torch.cat([timesteps, timesteps]), both)
            unconditional, conditional = head.chunk(2)
            return guide(conditional, unconditional, scale)

        return guided
