"""Conversions between noise, clean and velocity predictions, in float32 or float64.

B samples, C channels, H W latent pixels. `alpha_bar_B` is the cumulative signal fraction per sample, shape (B,).
With a = sqrt(alpha_bar) and s = sqrt(1 - alpha_bar): x_t = a x_0 + s eps, v = a eps - s x_0.

Flow models use a_f = 1 - sigma, s_f = sigma and predict eps - x_0 (`flow_prediction`). Only the ratio k = s / a of
noise to signal matters to a sampler, so every state is stored with a^2 + s^2 = 1: x_t is the flow model's state divided
by c = sqrt(a_f^2 + s_f^2) = 1 / (a + s), and alpha_bar = (a_f / c)^2. alpha_bar is 0 (k infinite) at sigma = 1, which
is allowed as the first level of a trajectory. A family multiplies x_t by c before it calls its network.

Source: Ho et al. 2020 (eps), Salimans and Ho 2022 (v), Lipman et al. 2023 and Liu et al. 2023 (flow).
"""

from typing import Literal, get_args

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]
PREDICTION_TYPES: tuple[str, ...] = get_args(PredictionType)


def signal_and_noise(alpha_bar_B: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Compute (sqrt(alpha_bar), sqrt(1 - alpha_bar)) in float64, cast and shaped to broadcast over `like`."""
    shape = (-1, *[1] * (like.ndim - 1))
    wide = alpha_bar_B.to(device=like.device, dtype=torch.float64).reshape(shape)
    return wide.sqrt().to(_width(like)), (1 - wide).sqrt().to(_width(like))


def flow_scale(alpha_bar_B: Tensor, like: Tensor) -> Tensor:
    """Compute c = 1 / (a + s), a flow model's state over the stored state, shaped to broadcast over `like`."""
    shape = (-1, *[1] * (like.ndim - 1))
    wide = alpha_bar_B.to(device=like.device, dtype=torch.float64).reshape(shape)
    return (1 / (wide.sqrt() + (1 - wide).sqrt())).to(_width(like))


def add_noise(clean: Tensor, noise: Tensor, alpha_bar_B: Tensor) -> Tensor:
    """Add noise to clean samples: x_t = a x_0 + s eps.

    Args:
        clean: x_0, shape (B, ...).
        noise: eps, same shape.
        alpha_bar_B: alpha_bar per sample.

    Returns:
        x_t, same shape.
    """
    signal, spread = signal_and_noise(alpha_bar_B, clean)
    return signal * clean + spread * noise


def to_clean(model_output: Tensor, noisy: Tensor, alpha_bar_B: Tensor, prediction_type: str) -> Tensor:
    """Convert a network output to the one-step estimate of x_0, without an x_0 rule (see `clean_rule`).

    Args:
        model_output: network output, shape (B, ...), any floating dtype.
        noisy: x_t, same shape.
        alpha_bar_B: alpha_bar per sample, in (0, 1); 0 is allowed for `v_prediction` and `flow_prediction`.
        prediction_type: a name in `PREDICTION_TYPES`.

    Returns:
        x0-hat of the same shape, float64 if one of the inputs is float64, otherwise float32.

    Raises:
        ValueError: unknown prediction type.
    """
    width = torch.promote_types(_width(model_output), _width(noisy))
    model_output, noisy = model_output.to(width), noisy.to(width)
    signal, spread = signal_and_noise(alpha_bar_B, noisy)
    if prediction_type == "epsilon":
        return (noisy - spread * model_output) / signal
    if prediction_type == "v_prediction":
        return signal * noisy - spread * model_output
    if prediction_type == "flow_prediction":
        return flow_scale(alpha_bar_B, noisy) * (noisy - spread * model_output)
    if prediction_type == "sample":
        return model_output
    raise ValueError(f"unknown prediction_type {prediction_type!r}; known: {', '.join(PREDICTION_TYPES)}")


def to_noise(model_output: Tensor, noisy: Tensor, alpha_bar_B: Tensor, prediction_type: str) -> Tensor:
    """Convert a network output to an estimate of eps. Arguments as in `to_clean`.

    For the prediction type `sample` the result is divided by s, which amplifies rounding at low noise levels.

    Returns:
        eps-hat of the same shape, float64 if one of the inputs is float64, otherwise float32.

    Raises:
        ValueError: unknown prediction type.
    """
    width = torch.promote_types(_width(model_output), _width(noisy))
    model_output, noisy = model_output.to(width), noisy.to(width)
    signal, spread = signal_and_noise(alpha_bar_B, noisy)
    if prediction_type == "epsilon":
        return model_output
    if prediction_type == "v_prediction":
        return spread * noisy + signal * model_output
    if prediction_type == "flow_prediction":
        return flow_scale(alpha_bar_B, noisy) * (noisy + signal * model_output)
    if prediction_type == "sample":
        return (noisy - signal * model_output) / spread
    raise ValueError(f"unknown prediction_type {prediction_type!r}; known: {', '.join(PREDICTION_TYPES)}")


def to_velocity(model_output: Tensor, noisy: Tensor, alpha_bar_B: Tensor) -> Tensor:
    """Convert a `flow_prediction` to a `v_prediction` at the same state. Arguments as in `to_clean`."""
    width = torch.promote_types(_width(model_output), _width(noisy))
    model_output, noisy = model_output.to(width), noisy.to(width)
    signal, spread = signal_and_noise(alpha_bar_B, noisy)
    return flow_scale(alpha_bar_B, noisy) * (model_output + (signal - spread) * noisy)


def _width(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
