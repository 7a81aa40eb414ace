"""Anchor: squared distance between the noise predictions of policy and frozen base model on the same inputs."""

import math

import torch
from torch import Tensor

from acpo_dist.diffusion.prediction import PREDICTION_TYPES, flow_scale, signal_and_noise

SPACES = ("eps", "v", "x0")


def resolve_space(space: str, prediction_type: str) -> str:
    """Return `space`, with `auto` replaced by `v` for velocity predictions and by `eps` otherwise."""
    if space != "auto":
        return space
    return "v" if prediction_type in ("v_prediction", "flow_prediction") else "eps"


def loss_space(prediction_type: str) -> str:
    """Return the units of denoising losses and errors: `v` for flow models, else `eps`.

    The first level of a flow model has no signal: in noise units the squared error of a velocity carries a^2, which
    is 0 there.
    """
    return "v" if prediction_type == "flow_prediction" else "eps"


def output_drift(
    policy_output: Tensor, anchor_output: Tensor, alpha_bar_B: Tensor, prediction_type: str, space: str = "eps"
) -> Tensor:
    """Return the difference of two predictions at the same x_t, in noise, velocity or x_0 units.

    The outputs are subtracted first and scaled afterwards. x_t cancels in the difference, which avoids division by a
    vanishing s and cancellation errors. For differences, eps = a v and eps = -(a/s) x0. Flow models have their own
    a = 1 - sigma and s = sigma there, and `v` is their velocity eps - x_0.

    Args:
        policy_output: network output with the graph, any floating dtype.
        anchor_output: output of the frozen network, same shape.
        alpha_bar_B: in (0, 1); 0 is allowed for velocity predictions in units of `v` and `eps`.
        prediction_type: a name in `prediction.PREDICTION_TYPES`.
        space: `auto`, `eps`, `v` or `x0`.

    Returns:
        The difference in float32 or wider.

    Raises:
        ValueError: unknown space or prediction type.
    """
    width = torch.float64 if policy_output.dtype == torch.float64 else torch.float32
    difference = policy_output.to(width) - anchor_output.detach().to(width)
    signal, spread = signal_and_noise(alpha_bar_B, difference)
    space = resolve_space(space, prediction_type)
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"unknown prediction_type {prediction_type!r}; known: {', '.join(PREDICTION_TYPES)}")
    if space not in SPACES:
        raise ValueError(f"unknown anchor space {space!r}; known: {', '.join(SPACES)}")
    if prediction_type == "flow_prediction":
        scale = flow_scale(alpha_bar_B, difference)
        return difference * {"eps": scale * signal, "v": 1.0, "x0": -scale * spread}[space]
    to_eps = {"epsilon": 1.0, "v_prediction": signal, "sample": -signal / spread}
    from_eps = {"eps": 1.0, "v": 1 / signal, "x0": -spread / signal}
    return difference * to_eps[prediction_type] * from_eps[space]


def drift_unit(alpha_bar: float, space: str, prediction_type: str = "epsilon") -> float:
    """Return the factor that converts a mean squared drift from the units of `loss_space` to units of `space`.

    Raises:
        ValueError: unknown space.
    """
    if space not in SPACES:
        raise ValueError(f"unknown anchor space {space!r}; known: {', '.join(SPACES)}")
    if prediction_type == "flow_prediction":
        squared = (math.sqrt(alpha_bar) + math.sqrt(1 - alpha_bar)) ** -2
        return {"eps": squared * alpha_bar, "v": 1.0, "x0": squared * (1 - alpha_bar)}[space]
    return {"eps": 1.0, "v": 1 / alpha_bar, "x0": (1 - alpha_bar) / alpha_bar}[space]


def anchor_error(drift: Tensor) -> Tensor:
    """Return the mean square over the elements of each sample: (B, ...) -> (B,)."""
    return drift.square().flatten(1).mean(1)
