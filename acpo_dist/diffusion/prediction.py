"""Conversions between noise, clean and velocity predictions, in float32 or float64.

B samples, C channels, H W latent pixels. `alpha_bar_B` is the cumulative signal fraction per sample, shape (B,).
With a = sqrt(alpha_bar) and s = sqrt(1 - alpha_bar): x_t = a x_0 + s eps, v = a eps - s x_0.
Source: Ho et al. 2020 (eps), Salimans and Ho 2022 (v).
"""

from typing import Literal, get_args

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "sample"]
PREDICTION_TYPES: tuple[str, ...] = get_args(PredictionType)


def signal_and_noise(alpha_bar_B: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Compute (sqrt(alpha_bar), sqrt(1 - alpha_bar)) in float64, cast and shaped to broadcast over `like`."""
    shape = (-1, *[1] * (like.ndim - 1))
    wide = alpha_bar_B.to(device=like.device, dtype=torch.float64).reshape(shape)
    return wide.sqrt().to(_width(like)), (1 - wide).sqrt().to(_width(like))


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
        alpha_bar_B: alpha_bar per sample, in (0, 1).
        prediction_type: `epsilon`, `v_prediction` or `sample`.

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
    if prediction_type == "sample":
        return (noisy - signal * model_output) / spread
    raise ValueError(f"unknown prediction_type {prediction_type!r}; known: {', '.join(PREDICTION_TYPES)}")


def _width(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
