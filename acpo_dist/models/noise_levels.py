"""Scheduler configuration of a model. Every key is applied, replaced by a key of the run, or rejected with an error.

Keys that define the network (noise levels, prediction type, x_0 rule) always apply. Keys that define the sampling
levels apply with `sampler.spacing=scheduler` and are replaced by any other spacing. Keys that define the steps are
replaced by `sampler.solver` and `sampler.eta`.
"""

import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from acpo_dist.core.errors import ConfigError, ModelError
from acpo_dist.diffusion.clean_rule import CleanRule
from acpo_dist.diffusion.flow import flow_alpha_bars, flow_trajectory
from acpo_dist.diffusion.prediction import PREDICTION_TYPES
from acpo_dist.diffusion.trajectory import Trajectory, spaced_trajectory
from acpo_dist.models.flow_levels import Arguments, check_flow, flow_sigmas, is_flow
from acpo_dist.models.loading import load_part

logger = logging.getLogger(__name__)

NEAR_ZERO = 2.0**-24
"""Replaces alpha_bar = 0, as in diffusers' Euler scheduler, so that the first sigma is finite."""

LEAST_STEP = 1e-4
"""Minimum relative decrease of sigma in a step; below it the quotients of multistep methods are rounding errors."""

OBEYED = frozenset(
    "num_train_timesteps beta_start beta_end beta_schedule trained_betas rescale_betas_zero_snr prediction_type "
    "clip_sample clip_sample_range thresholding dynamic_thresholding_ratio sample_max_value".split()
)
"""Keys that define the network; applied in every rollout, training step and measurement."""
FLOW = frozenset(
    "shift base_shift max_shift base_image_seq_len max_image_seq_len invert_sigmas stochastic_sampling".split()
)
"""Keys of flow schedulers; `models.flow_levels` applies or rejects them."""
SPACING = frozenset(
    "timestep_spacing steps_offset set_alpha_to_one final_sigmas_type use_karras_sigmas use_exponential_sigmas "
    "use_beta_sigmas use_lu_lambdas sigma_min sigma_max interpolation_type lambda_min_clipped".split()
)
"""Keys that define the sampling levels; applied by `sampler.spacing=scheduler` (`steps_offset` also by `leading`)."""
STEPPING = frozenset(
    "solver_order solver_type algorithm_type lower_order_final euler_at_final predict_x0 disable_corrector solver_p "
    "skip_prk_steps variance_type".split()
)
"""Keys that define the steps; replaced by `sampler.solver` and `sampler.eta`."""
ONLY: dict[str, tuple[Any, ...]] = {
    "use_flow_sigmas": (False,), "flow_shift": (1.0,), "use_dynamic_shifting": (False,), "shift_terminal": (None,),
    "time_shift_type": ("exponential",), "timestep_type": ("discrete",), "prediction_type": PREDICTION_TYPES,
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
}  # fmt: skip
"""Supported values of keys for which not every value is supported."""
SPACED = tuple(
    f"{name}Scheduler"
    for name in "DDPM DDIM PNDM EulerDiscrete HeunDiscrete DPMSolverMultistep DEISMultistep UniPCMultistep".split()
)
"""Scheduler classes supported by `sampler.spacing=scheduler`."""
OBSOLETE = frozenset(("tensor_format", "timestep_values"))
"""Keys of old folders that diffusers no longer reads."""


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """Noise schedule, prediction type and x_0 rule of a model, from its scheduler configuration."""

    prediction_type: str
    """A name in `diffusion.prediction.PREDICTION_TYPES`."""
    alpha_bars: Tensor
    """Cumulative signal fraction by timestep, float64, shape (T,); for flow models see `diffusion.flow`."""
    rule: CleanRule
    """The x_0 rule of the scheduler."""
    scheduler: str
    """Name of the scheduler's class in diffusers."""
    config: Mapping[str, Any]
    """All keys of the scheduler class, including defaults."""
    arguments: Arguments | None = None
    """Arguments of `set_timesteps` in the family's pipeline; None if it passes the number of steps only."""

    def trajectory(self, num_steps: int, spacing: str, shift: float | None = None) -> Trajectory:
        """Create a trajectory with a named spacing.

        Args:
            num_steps: number of denoise steps.
            spacing: a name in `diffusion.trajectory.SPACINGS`, or `scheduler` for the scheduler's own configuration.
            shift: replaces the shift of a flow model's scheduler in named spacings; None keeps it.

        Raises:
            ConfigError: the scheduler's own configuration does not define a valid trajectory, or the spacing or the
                shift is not for this kind of model.
            ValueError: unknown spacing, or more steps than timesteps.
        """
        if self.prediction_type == "flow_prediction":
            scheduler = build(self.scheduler, self.config)
            arguments = self.arguments(scheduler, num_steps) if self.arguments else {}
            sigmas = flow_sigmas(scheduler, num_steps, spacing, shift, arguments)
            return flow_trajectory(sigmas, len(self.alpha_bars))
        if shift is not None:
            raise ConfigError(
                f"sampler.shift is {shift:g}, and the model's scheduler ({self.scheduler}) has no flow sigmas to "
                "shift. Remove sampler.shift."
            )
        if spacing == "scheduler":
            return self._own_trajectory(num_steps)
        return spaced_trajectory(self.alpha_bars, num_steps, spacing, steps_offset=self.config.get("steps_offset", 0))

    def _own_trajectory(self, num_steps: int) -> Trajectory:
        if self.scheduler not in SPACED:
            raise ConfigError(
                f"sampler.spacing is `scheduler`, and the model's scheduler is {self.scheduler}; supported are "
                f"{', '.join(SPACED)}. Set another sampler.spacing."
            )
        scheduler = build(self.scheduler, self.config)
        scheduler.set_timesteps(num_steps)
        timesteps = [float(timestep) for timestep in scheduler.timesteps]
        sigmas = getattr(scheduler, "sigmas", None)
        if sigmas is not None:
            return self._through_sigmas(timesteps, sigmas[: len(timesteps) + 1].double())
        # PNDM repeats its first step.
        timesteps = list(dict.fromkeys(timesteps))
        stride = len(self.alpha_bars) // num_steps
        uneven = [early - late for early, late in pairwise(timesteps) if early - late != stride]
        if self.scheduler in ("DDIMScheduler", "PNDMScheduler") and uneven:
            raise ConfigError(
                f"sampler.spacing is `scheduler`, and {self.scheduler} with timestep_spacing "
                f"{self.config['timestep_spacing']} and {num_steps} steps evaluates the network every {uneven[0]:g} "
                f"timesteps but always steps by {stride}. Set sampler.spacing to linspace, leading or trailing, or a "
                "sampler.num_steps that divides the number of timesteps."
            )
        end = float(getattr(scheduler, "final_alpha_cumprod", torch.ones(())))
        levels = [level for level in self.alpha_bars[[int(timestep) for timestep in timesteps]].tolist() if level < end]
        # With set_alpha_to_one=False a step from timestep 0 ends at the same level, so it is removed.
        return Trajectory(timesteps=tuple(timesteps[: len(levels)]), alpha_bars=(*levels, end))

    def _through_sigmas(self, timesteps: list[float], sigmas: Tensor) -> Trajectory:
        # Heun lists every inner level twice, once per call.
        repeats = self.scheduler == "HeunDiscreteScheduler"
        first = [step for step in range(len(sigmas)) if not repeats or step == 0 or sigmas[step] != sigmas[step - 1]]
        distinct = sigmas[first]
        if bool((distinct[1:] > distinct[:-1] * (1 - LEAST_STEP)).any()):
            raise ConfigError(
                f"sampler.spacing is `scheduler`, and {self.scheduler} under its own configuration has steps without "
                f"length or against the direction: sigmas {distinct.tolist()}. Set another sampler.spacing."
            )
        levels = (1 / (1 + distinct**2)).tolist()
        return Trajectory(timesteps=tuple(timesteps[step] for step in first[:-1]), alpha_bars=tuple(levels))


def read_schedule(path: str, revision: str | None = None, subfolder: str | None = "scheduler") -> NoiseSchedule:
    """Read the noise schedule of a pipeline folder.

    The last alpha_bar of a discrete schedule with zero terminal SNR is 2^-24 instead of 0; that of a flow model is 0.

    Args:
        path: pipeline folder or hub id.
        revision: branch, tag or commit of a hub id.
        subfolder: folder of the scheduler; None for the pipeline folder itself.

    Raises:
        ModelError: the configuration cannot be read, is neither a discrete nor a flow schedule, or has an unsupported
            key.
    """
    config = load_part(DDPMScheduler.load_config, path, subfolder, revision=revision)
    if not isinstance(config, Mapping):
        raise ModelError(
            f"model.path: scheduler_config.json of `{path}`: expected a JSON object, found {type(config).__name__}. "
            "Check that the download is complete."
        )
    return schedule_of(config, path)


def schedule_of(config: Mapping[str, Any], path: str) -> NoiseSchedule:
    """Create the noise schedule of a scheduler configuration.

    Args:
        config: content of `scheduler_config.json`.
        path: path of the model, for messages.

    Raises:
        ModelError: see `read_schedule`.
    """
    kind = str(config.get("_class_name"))
    if kind.startswith("EDM"):
        raise ModelError(
            f"model.path: `{path}` is trained for {kind}, which scales the network's input and output by the noise "
            "level; such models cannot be tuned here. Use a model with a discrete Stable Diffusion schedule "
            "(DDPMScheduler and its relatives) or a flow model (FlowMatchEulerDiscreteScheduler)."
        )
    own = _defaults(kind, path)
    known = OBEYED | FLOW | SPACING | STEPPING | set(ONLY) | OBSOLETE
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    unknown = sorted(key for key in {*own, *given} if key not in known)
    if unknown:
        raise ModelError(
            f"model.path: the scheduler of `{path}` ({kind}) has the key `{unknown[0]}`, which is not supported, so it "
            "would be ignored. Remove it from scheduler_config.json if the model does not depend on it."
        )
    # diffusers ignores keys of other classes; folders contain such keys after the scheduler class was changed.
    full = own | {key: value for key, value in given.items() if key in own}
    if is_flow(kind, full):
        check_flow(kind, full, path)
        return NoiseSchedule(
            prediction_type="flow_prediction", alpha_bars=flow_alpha_bars(full["num_train_timesteps"]),
            rule=CleanRule(), scheduler=kind, config=full,
        )  # fmt: skip
    for key, values in ONLY.items():
        if key in full and full[key] not in values:
            raise ModelError(
                f"model.path: the scheduler of `{path}` ({kind}) has {key}={full[key]}; supported are "
                f"{', '.join(map(str, values))}."
            )
    replaced = {key: full[key] for key in sorted(SPACING | STEPPING) if key in full and full[key] != own[key]}
    if replaced:
        logger.info("%s: sampler.spacing, .solver and .eta replace the scheduler's %s", path, replaced)
    try:
        alpha_bars = build(kind, full).alphas_cumprod.double()
    except (NotImplementedError, ValueError) as error:
        raise ModelError(f"model.path: the scheduler of `{path}` cannot be built: {error}") from error
    prediction_type = str(full["prediction_type"])
    if float(alpha_bars[-1]) <= NEAR_ZERO:
        if prediction_type == "epsilon":
            raise ModelError(
                f"model.path: the schedule of `{path}` ends without signal (rescale_betas_zero_snr), where a noise "
                "prediction does not determine the image: such a model must predict v. Check its "
                "scheduler_config.json."
            )
        alpha_bars[-1] = NEAR_ZERO
    return NoiseSchedule(
        prediction_type=prediction_type, alpha_bars=alpha_bars, rule=_rule_of(full), scheduler=kind, config=full
    )


def build(kind: str, config: Mapping[str, Any]) -> Any:
    """Create a diffusers scheduler from its class name and configuration."""
    return getattr(diffusers, kind)(**config)


def _defaults(kind: str, path: str) -> dict[str, Any]:
    scheduler = getattr(diffusers, kind, None)
    if scheduler is None or not issubclass(scheduler, diffusers.SchedulerMixin):
        raise ModelError(
            f"model.path: the scheduler of `{path}` is `{kind}`, which diffusers {diffusers.__version__} does not "
            "have. Correct _class_name in scheduler_config.json."
        )
    parameters = inspect.signature(scheduler.__init__).parameters
    return {name: value.default for name, value in parameters.items() if name != "self"}


def _rule_of(config: Mapping[str, Any]) -> CleanRule:
    if config.get("thresholding"):
        return CleanRule(quantile=config["dynamic_thresholding_ratio"], ceiling=config["sample_max_value"])
    return CleanRule(limit=config["clip_sample_range"]) if config.get("clip_sample") else CleanRule()
