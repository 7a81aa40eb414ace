"""Perceptual term: shape of the reward, surrogate loss for its gradient, and pixel clamp."""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

SHAPES = ("identity", "hinge", "softplus")


def shape_reward(quality_B: Tensor, shape: str, target: float) -> tuple[Tensor, Tensor]:
    """Return the minimised value phi(q) per sample and its derivative, each (B,).

    Args:
        quality_B: normalised quality, higher is better.
        shape: `identity` -q, `hinge` max(m - q, 0), `softplus` log(1 + exp(m - q)).
        target: m, in normalised units; ignored by `identity`.

    Raises:
        ValueError: unknown shape.
    """
    if shape == "identity":
        return -quality_B, -torch.ones_like(quality_B)
    gap = target - quality_B
    if shape == "hinge":
        return F.relu(gap), -(gap > 0).to(quality_B.dtype)
    if shape == "softplus":
        return F.softplus(gap), -torch.sigmoid(gap)
    raise ValueError(f"unknown reward shape {shape!r}; known: {', '.join(SHAPES)}")


def surrogate(tensor: Tensor, gradient: Tensor, slope_B: Tensor) -> Tensor:
    """Return the per-sample inner product of the constant reward gradient with `tensor`.

    Its gradient with respect to the parameters equals that of phi(Q(tensor)) in one graph, provided that `gradient` is
    dQ/dtensor at this tensor and `slope_B` is phi'(q). Its value has no meaning.

    Args:
        tensor: x0-hat or decoded images, carries the graph, shape (B, ...).
        gradient: dQ/dtensor, same shape, constant.
        slope_B: phi'(q) per sample, constant.

    Returns:
        Shape (B,).
    """
    inner = (gradient.detach().to(tensor.dtype) * tensor).flatten(1).sum(1)
    return slope_B.detach().to(tensor.dtype) * inner


class _ProjectedClamp(torch.autograd.Function):
    """Clip to [0, 1]; the backward pass drops gradients whose update would move the value further out of [0, 1]."""

    @staticmethod
    def forward(ctx: Any, pixels: Tensor, direction: int) -> Tensor:
        ctx.save_for_backward(pixels)
        ctx.direction = direction
        return pixels.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (pixels,) = ctx.saved_tensors
        (gradient,) = grad_outputs
        step = ctx.direction * gradient
        outward = ((pixels > 1) & (step > 0)) | ((pixels < 0) & (step < 0))
        return gradient.masked_fill(outward, 0.0), None


def clip_pixels(pixels: Tensor, *, ascend: bool = False) -> Tensor:
    """Clip to [0, 1] with a projected straight-through gradient.

    A hard clamp drops the gradient that corrects over-exposure; an unprojected one rewards values outside the gamut.

    Args:
        pixels: any shape.
        ascend: whether the gradient is that of a maximised value (a score) instead of a minimised one (a loss).
    """
    result = _ProjectedClamp.apply(pixels, 1 if ascend else -1)
    assert isinstance(result, Tensor)
    return result
