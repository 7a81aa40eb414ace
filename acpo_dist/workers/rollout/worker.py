"""Rollout worker: samples along a trajectory with guidance and keeps late states."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from acpo_dist.config.schema import SamplerConfig
from acpo_dist.core.errors import ConfigError, WeightSyncError
from acpo_dist.core.memory import within_memory
from acpo_dist.core.seeding import generator
from acpo_dist.core.types import LateLatents, RolloutBatch, SamplePlan, WeightAck, WeightBundle
from acpo_dist.core.weights import checksum
from acpo_dist.diffusion.sampling import STOCHASTIC, Denoise, Sampler, Visit, guide, keep_states, sample
from acpo_dist.diffusion.splitting import SHARE_AT_END, GuidedDenoise, sample_split
from acpo_dist.diffusion.trajectory import Trajectory
from acpo_dist.models.family import copy_weights, load_family, trainable_tensors
from acpo_dist.models.schedulers import make_sampler
from acpo_dist.models.tuning import MergedAdapters
from acpo_dist.vrg.sums import ErrorSums
from acpo_dist.workers.rollout.errors import measure_errors

BASE_VERSION = 0


class RolloutWorker:
    """Samples from one model along one trajectory."""

    def __init__(self, model: Any, sampler: SamplerConfig, *, device: str = "cpu", name: str = "rollout/0") -> None:
        """Load the model with its original weights (version 0).

        Args:
            model: the model's configuration section.
            sampler: the sampler's section.
            device: torch device.
            name: name of this worker, for messages.

        Raises:
            ConfigError: the sampler's steps do not fit the model.
        """
        self.family = load_family(model, device=device, trainable=False)
        kind = self.family.prediction_type
        if sampler.stochastic_step == "flow_grpo" and kind != "flow_prediction":
            raise ConfigError(
                f"sampler.stochastic_step is flow_grpo, the step of a flow model, and this model predicts {kind}. Set "
                "sampler.stochastic_step=ddim."
            )
        self._sampler, self._device, self._name = sampler, device, name
        self._version = BASE_VERSION
        self._merged = MergedAdapters(self.family.network) if sampler.merge_adapters else None
        self.set_trajectory(self.family.schedule.trajectory(sampler.num_steps, sampler.spacing, sampler.shift))

    @property
    def version(self) -> int:
        """Version of the loaded weights."""
        return self._version

    @property
    def alpha_bars(self) -> Tensor:
        """Cumulative signal fraction by timestep, float64 (T,)."""
        return self.family.alpha_bars

    def set_trajectory(self, trajectory: Trajectory) -> str:
        """Use this trajectory from the next sample on.

        Returns:
            Its schedule id, which is recorded with every sample.

        Raises:
            ConfigError: the solver cannot start at the trajectory's first level.
        """
        if trajectory.alpha_bars[0] == 0 and self._sampler.solver in SHARE_AT_END:
            raise ConfigError(
                f"sampler.solver is {self._sampler.solver}, which cannot start without signal, and this model's first "
                "level has none (sigma 1 of a flow model). Set another sampler.solver, such as ddim or dpmpp_2m."
            )
        self.trajectory = trajectory
        return trajectory.schedule_id

    def _late_steps(self) -> tuple[int, ...]:
        """Return the steps whose states are kept.

        Raises:
            ConfigError: no denoise step is as late as the learner trains.
        """
        sampler, trajectory = self._sampler, self.trajectory
        flow = self.family.prediction_type == "flow_prediction"
        key = "sampler.k_max" if sampler.t_max is None and (sampler.k_max is not None or flow) else "sampler.t_max"
        try:
            share = sampler.latest_share(self.family.alpha_bars.tolist())
            late = trajectory.late_steps(share, len(self.family.alpha_bars), sampler.late_per_sample)
        except ValueError as error:
            raise ConfigError(f"{key}: {error} Raise {key} or sampler.num_steps.") from error
        if sampler.eta > 0 and all(trajectory.alpha_bars[step + 1] >= 1 for step in late):
            raise ConfigError(
                f"{key}: with sampler.eta {sampler.eta:g} the learner needs a late step that does not end at "
                f"the clean sample, and the only one, at timestep {trajectory.timesteps[late[0]]:g}, does. Raise "
                f"{key} or sampler.num_steps."
            )
        return late

    @torch.no_grad()
    def generate(self, plans: Sequence[SamplePlan]) -> RolloutBatch:
        """Draw one chunk of one size; each sample depends only on its seed, its prompt and the weights.

        Raises:
            ConfigError: the trajectory has no step that is as late as the learner trains.
            DeviceMemoryError: the chunk does not fit.
        """
        prompts = tuple(plan.prompt for plan in plans)
        steps = self._late_steps()
        kept: dict[int, Tensor] = {}
        after = {step + 1 for step in steps} if self._sampler.eta > 0 else set[int]()
        with within_memory(f"{self._name}, sampling {len(plans)} at once", f"Lower rollout.batch_size ({len(plans)})."):
            clean = self._sample(plans, self.trajectory, keep_states({*steps, *after}, kept))
        kept[self.trajectory.num_steps] = clean
        with within_memory(
            f"{self._name}, decoding {len(plans)} at once",
            f"Set model.memory.vae_slicing=true (or vae_tiling), or lower rollout.batch_size ({len(plans)}).",
        ):
            pixels = self.family.decode(clean).clamp(0, 1)
        self.family.release()
        return RolloutBatch(
            sample_ids=tuple(plan.sample_id for plan in plans),
            prompts=prompts,
            policy_version=self._version,
            schedule_id=self.trajectory.schedule_id,
            latents_BCHW=clean.float().cpu(),
            late=tuple(self._late_state(step, kept) for step in steps),
            images_BCHW=(pixels * 255).round().to(torch.uint8).cpu(),
        )

    @torch.no_grad()
    def final_latents(self, plans: Sequence[SamplePlan], trajectory: Trajectory) -> Tensor:
        """Return x_0 (B, C, H, W) along another trajectory, float32 on the CPU; the current trajectory is kept."""
        return self._sample(plans, trajectory, None).float().cpu()

    def measure_errors(self, batch: RolloutBatch, sigmas: Sequence[float]) -> ErrorSums:
        """Return the prediction error sums at each sigma on the x_0 of a rollout batch."""
        return measure_errors(self.family, batch.latents_BCHW, batch.prompts, batch.sample_ids, sigmas)

    def load(self, bundle: WeightBundle) -> WeightAck:
        """Copy weights into the trainable parameters.

        Returns:
            Version and checksum of the parameters afterwards.

        Raises:
            WeightSyncError: names or shapes differ from the trainable parameters.
        """
        try:
            copy_weights(self.family.network, bundle.tensors)
        except ValueError as error:
            raise WeightSyncError(f"{self._name}: weights of version {bundle.version}: {error}") from error
        if self._merged is not None:
            self._merged.update()
        self._version = bundle.version
        own = trainable_tensors(self.family.network)
        held = {name: parameter.detach().to(bundle.tensors[name].dtype) for name, parameter in own.items()}
        return WeightAck(worker=self._name, version=bundle.version, checksum=checksum(held))

    def _sample(self, plans: Sequence[SamplePlan], trajectory: Trajectory, visit: Visit | None) -> Tensor:
        start = torch.stack([self._start(plan) for plan in plans]).to(self._device)
        prompts = tuple(plan.prompt for plan in plans)
        kind, solver, rule = self.family.prediction_type, self._sampler.solver, self.family.clean_rule
        if solver in SHARE_AT_END:
            scale = self._guidance_scale()
            return sample_split(
                self._branches(prompts), start, trajectory, kind, guidance_scale=scale, scheme=solver, visit=visit,
                rule=rule,
            )  # fmt: skip
        return sample(
            self._denoiser(prompts), start, trajectory, kind, visit=visit, sampler=self._sampling_rule(plans), rule=rule
        )

    def _start(self, plan: SamplePlan) -> Tensor:
        shape = self.family.shape_of(plan.size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(plan.seed))

    def _late_state(self, step: int, kept: dict[int, Tensor]) -> LateLatents:
        stochastic = self._sampler.eta > 0
        return LateLatents(
            denoise_step=step,
            timestep=self.trajectory.timesteps[step],
            alpha_bar=self.trajectory.alpha_bars[step],
            width=self.trajectory.width(step),
            latents_BCHW=kept[step].float().cpu(),
            following_BCHW=kept[step + 1].float().cpu() if stochastic else None,
            following_alpha_bar=self.trajectory.alpha_bars[step + 1],
        )

    def _sampling_rule(self, plans: Sequence[SamplePlan]) -> Sampler:
        if self._sampler.eta == 0:
            return make_sampler(self._sampler.solver, self.family.alpha_bars)
        shape = self.family.shape_of(plans[0].size)

        def noise(step: int) -> Tensor:
            draws = [torch.randn(shape, generator=generator("eta", plan.seed, step)) for plan in plans]
            return torch.stack(draws).to(self._device)

        return STOCHASTIC[self._sampler.stochastic_step](self._sampler.eta, noise)

    def _guidance_scale(self) -> float:
        """Return the guidance scale; 1 for an unconditional model."""
        return self._sampler.guidance_for(conditional=self.family.conditional)

    def _denoiser(self, prompts: tuple[str, ...]) -> Denoise:
        branches, scale = self._branches(prompts), self._guidance_scale()
        if scale == 1:
            return branches.conditional

        def guided(state: Tensor, timesteps: Tensor) -> Tensor:
            conditional, unconditional = branches.both(state, timesteps)
            return guide(conditional, unconditional, scale, self._sampler.guidance_rescale)

        return guided

    def _branches(self, prompts: tuple[str, ...]) -> GuidedDenoise:
        family = self.family
        condition = family.encode(prompts)
        # Both branches in one forward: the null prompt first, as diffusers orders them.
        joined = family.encode([""] * len(prompts)).join(condition) if self._guidance_scale() != 1 else condition

        def both(state: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
            model_output = family.predict(torch.cat([state, state]), torch.cat([timesteps, timesteps]), joined)
            unconditional, conditional = model_output.chunk(2)
            return conditional, unconditional

        return GuidedDenoise(
            conditional=lambda state, timesteps: family.predict(state, timesteps, condition), both=both
        )
