"""Scheduler configurations of flow models: which are supported, and the sigmas that they give."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from acpo_dist.core.errors import ConfigError, ModelError
from acpo_dist.diffusion.flow import shifted

FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
SIGMA_FLAG = "use_flow_sigmas"
"""Option with which a solver of Stable Diffusion (DPM-Solver, UniPC, DEIS) steps along flow sigmas."""
REFUSED: dict[str, tuple[Any, ...]] = {
    "invert_sigmas": (False,), "stochastic_sampling": (False,), "thresholding": (False,),
}  # fmt: skip
"""Supported values of keys for which not every value is supported."""
SPACINGS = ("trailing", "linspace", "scheduler")

Arguments = Callable[[Any, int], Mapping[str, Any]]
"""(scheduler, num_steps) -> arguments with which the family's pipeline calls `scheduler.set_timesteps`."""


def is_flow(kind: str, config: Mapping[str, Any]) -> bool:
    """Whether a scheduler configuration is that of a flow model."""
    return (
        kind.startswith("Flow")
        or bool(config.get(SIGMA_FLAG, False))
        or config.get("prediction_type") == "flow_prediction"
    )


def check_flow(kind: str, config: Mapping[str, Any], path: str) -> None:
    """Check the scheduler configuration of a flow model.

    Args:
        kind: name of the scheduler class.
        config: all keys of the class.
        path: path of the model, for messages.

    Raises:
        ModelError: the class or a value is not supported.
    """
    if kind.startswith("Flow"):
        if kind != FLOW_SCHEDULER:
            raise ModelError(
                f"model.path: the scheduler of `{path}` is {kind}; of the flow schedulers only {FLOW_SCHEDULER} is "
                f"supported. Write one with the same shift into its scheduler folder: {FLOW_SCHEDULER}(shift=...)"
                ".save_pretrained(...)."
            )
    elif not config.get(SIGMA_FLAG) or config.get("prediction_type") != "flow_prediction":
        raise ModelError(
            f"model.path: the scheduler of `{path}` ({kind}) has prediction_type={config.get('prediction_type')} and "
            f"{SIGMA_FLAG}={config.get(SIGMA_FLAG, False)}: a flow model needs flow_prediction and true, any other "
            "model neither. Correct scheduler_config.json."
        )
    for key, values in REFUSED.items():
        if key in config and config[key] not in values:
            raise ModelError(
                f"model.path: the scheduler of `{path}` ({kind}) has {key}={config[key]}, which no flow model here "
                f"supports; expected {', '.join(map(str, values))}. Stochastic steps are set by sampler.eta."
            )


def flow_sigmas(
    scheduler: Any, num_steps: int, spacing: str, shift: float | None, arguments: Mapping[str, Any]
) -> list[float]:
    """Compute the sigmas of a trajectory.

    Args:
        scheduler: a new scheduler of the model.
        num_steps: N.
        spacing: `trailing` (1, 1 - 1/N, ...) or `linspace` (1 to 1/T), then shifted; `scheduler` gives the sigmas of
            the family's pipeline.
        shift: replaces the shift of the scheduler; None keeps it, fixed or from the number of tokens.
        arguments: arguments of the pipeline's `set_timesteps`.

    Returns:
        N + 1 decreasing sigmas; the last one is 0.

    Raises:
        ConfigError: unknown spacing, or a shift together with `scheduler`.
    """
    if spacing not in SPACINGS:
        raise ConfigError(
            f"sampler.spacing is `{spacing}`, and the model is a flow model, which starts at sigma 1; supported are "
            f"{', '.join(SPACINGS)}."
        )
    if spacing == "scheduler":
        if shift is not None:
            raise ConfigError(
                f"sampler.shift is {shift:g} and sampler.spacing is `scheduler`, which takes the model's own shift. "
                "Set sampler.spacing to trailing or linspace, or remove sampler.shift."
            )
        scheduler.set_timesteps(**({"num_inference_steps": num_steps} | dict(arguments)))
        return [float(sigma) for sigma in scheduler.sigmas]
    end = 1 / num_steps if spacing == "trailing" else 1 / scheduler.config["num_train_timesteps"]
    even = np.linspace(1.0, end, num_steps)
    if shift is None and type(scheduler).__name__ == FLOW_SCHEDULER:
        scheduler.set_timesteps(**({**arguments, "sigmas": even.tolist(), "num_inference_steps": num_steps}))
        return [float(sigma) for sigma in scheduler.sigmas]
    own = float(scheduler.config.get("flow_shift", 1.0)) if shift is None else shift
    return [*(shifted(float(sigma), own) for sigma in even), 0.0]
