"""Relations of the sampler with the model, the algorithm and the trajectory, checked before a run starts."""

from acpo_dist.config.schema import Config
from acpo_dist.core.errors import ConfigError


def check_sampler(config: Config) -> None:
    """Check that the sampler's steps fit the model and what the learner does with them.

    Raises:
        ConfigError: names both keys and both values.
    """
    _check_noise(config)
    _check_rescale(config)
    _check_merging(config)
    _check_gradient_steps(config)
    _check_search(config)


def _check_noise(config: Config) -> None:
    sampler = config.sampler
    if config.algorithm.needs_noise and sampler.eta == 0:
        raise ConfigError(
            f"algorithm `{config.algorithm.type}` needs the probability of the rollouts' steps, and sampler.eta is 0: "
            "deterministic steps have none. Set sampler.eta=1."
        )
    if sampler.stochastic_step != "ddim" and sampler.eta == 0:
        raise ConfigError(
            f"sampler.stochastic_step is {sampler.stochastic_step} and sampler.eta is 0: steps without noise are the "
            "same for every value. Set sampler.eta=0.7, or remove sampler.stochastic_step."
        )
    if sampler.eta > 0 and sampler.solver != "ddim":
        raise ConfigError(
            f"sampler.eta is {sampler.eta:g}, which only sampler.solver=ddim supports; found {sampler.solver}. Set "
            "sampler.eta=0 or sampler.solver=ddim."
        )
    if sampler.eta > 0 and config.vrg.enabled:
        raise ConfigError(
            f"sampler.eta is {sampler.eta:g} and vrg.enabled is true: validation compares two trajectories from the "
            "same noise, which requires deterministic steps. Set sampler.eta=0 or vrg.enabled=false."
        )


def _check_rescale(config: Config) -> None:
    sampler, model = config.sampler, config.model
    if sampler.guidance_rescale == 0:
        return
    if model.type not in ("sd15", "sdxl"):
        raise ConfigError(
            f"sampler.guidance_rescale is {sampler.guidance_rescale:g} and model.type is {model.type}, whose diffusers "
            "pipeline has no such option. Set sampler.guidance_rescale=0."
        )
    if sampler.solver in ("ltsp", "stsp"):
        raise ConfigError(
            f"sampler.guidance_rescale is {sampler.guidance_rescale:g}, which sampler.solver={sampler.solver} does not "
            "support: it never computes the guided prediction. Set sampler.guidance_rescale=0 or another solver."
        )


def _check_merging(config: Config) -> None:
    dtype = getattr(config.model, "dtype", "float32")
    if config.sampler.merge_adapters and dtype != "float32":
        raise ConfigError(
            f"sampler.merge_adapters is true and model.dtype is {dtype}: weights of that type would lose small updates "
            "to rounding. Set model.dtype=float32 or sampler.merge_adapters=false."
        )


def _check_gradient_steps(config: Config) -> None:
    sampler, algorithm = config.sampler, config.algorithm
    steps = getattr(algorithm, "gradient_steps", "estimate")
    if steps != "estimate" and (sampler.eta > 0 or sampler.solver != "ddim"):
        raise ConfigError(
            f"algorithm.gradient_steps is {steps}: the learner repeats the last sampler steps, which requires "
            f"sampler.solver=ddim with sampler.eta=0; found {sampler.solver} and {sampler.eta:g}. Set these, or "
            "algorithm.gradient_steps=estimate."
        )
    if isinstance(steps, int) and sampler.late_per_sample < steps:
        raise ConfigError(
            f"algorithm.gradient_steps is {steps} and sampler.late_per_sample is {sampler.late_per_sample}: the state "
            f"before the last {steps} steps would not be kept. Set sampler.late_per_sample={steps} or more."
        )
    if getattr(algorithm, "low_variance_samples", 1) > 1 and steps != 1:
        raise ConfigError(
            f"algorithm.low_variance_samples is {algorithm.low_variance_samples} and algorithm.gradient_steps is "
            f"{steps}: fresh noise replaces the state of the last step only. Set algorithm.gradient_steps=1."
        )


def _check_search(config: Config) -> None:
    if config.vrg.enabled and config.vrg.search == "hso_grid" and config.model.flow:
        raise ConfigError(
            f"vrg.search is hso_grid, which needs a finite first sigma, and model.type={config.model.type} starts at "
            "pure noise. Set vrg.search=best or vrg."
        )
