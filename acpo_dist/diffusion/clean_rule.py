"""Rules that schedulers apply to the x_0 estimate before a step: none, clipping, or dynamic thresholding."""

from dataclasses import dataclass

import torch
from torch import Tensor

from acpo_dist.diffusion.prediction import PREDICTION_TYPES, flow_scale, signal_and_noise, to_clean


@dataclass(frozen=True, kw_only=True)
class CleanRule:
    """A rule x_0 = rule(x0-hat); eps is then recomputed from x_t and x_0.

    The rule is applied to the network output in the network's prediction type. Solvers, the density of a stochastic
    step and the VRG error measurement therefore all use the restricted x_0 and the matching eps. Without a rule the
    output is unchanged bit for bit.
    """

    limit: float | None = None
    """Clip to [-limit, limit] (`clip_sample`, `clip_sample_range`)."""
    quantile: float | None = None
    """Dynamic thresholding: divide by this quantile of |x0-hat| per sample (`dynamic_thresholding_ratio`). It takes
    precedence over `limit`, as in diffusers."""
    ceiling: float = 1.0
    """Largest divisor of dynamic thresholding (`sample_max_value`)."""

    @property
    def is_active(self) -> bool:
        """Whether the rule clips or thresholds."""
        return self.limit is not None or self.quantile is not None

    def restrict(self, clean: Tensor) -> Tensor:
        """Apply the rule to x_0 estimates.

        Args:
            clean: x0-hat, shape (B, ...), float32 or float64.

        Returns:
            Restricted x_0 of the same shape, differentiable; the gradient of clipped elements is zero.

        Source of thresholding: Imagen (Saharia et al. 2022), as implemented in diffusers.
        """
        if self.quantile is not None:
            scale = torch.quantile(clean.abs().flatten(1), self.quantile, dim=1).clamp(1, self.ceiling)
            scale = scale.reshape(-1, *[1] * (clean.ndim - 1))
            return torch.minimum(torch.maximum(clean, -scale), scale) / scale
        return clean if self.limit is None else clean.clamp(-self.limit, self.limit)

    def apply(self, model_output: Tensor, noisy: Tensor, alpha_bar_B: Tensor, prediction_type: str) -> Tensor:
        """Apply the rule to a network output.

        Args:
            model_output: network output, after guidance if the sampler uses guidance, shape (B, ...).
            noisy: x_t, same shape.
            alpha_bar_B: alpha_bar per sample, in (0, 1), shape (B,).
            prediction_type: a name in `PREDICTION_TYPES`.

        Returns:
            Network output of the same shape that corresponds to the restricted x_0. Elements that the rule does not
            change are equal to those of `model_output`.

        Raises:
            ValueError: unknown prediction type.
        """
        if not self.is_active:
            return model_output
        clean = to_clean(model_output, noisy, alpha_bar_B, prediction_type)
        change = self.restrict(clean) - clean
        signal, spread = signal_and_noise(alpha_bar_B, clean)
        if prediction_type == "epsilon":
            return model_output - signal / spread * change
        if prediction_type == "v_prediction":
            return model_output - change / spread
        if prediction_type == "flow_prediction":
            return model_output - change / (flow_scale(alpha_bar_B, clean) * spread)
        if prediction_type == "sample":
            return model_output + change
        raise ValueError(f"unknown prediction_type {prediction_type!r}; known: {', '.join(PREDICTION_TYPES)}")

    def share_changed(self, model_output: Tensor, noisy: Tensor, alpha_bar_B: Tensor, prediction_type: str) -> Tensor:
        """Share of the elements of x0-hat that the rule changes; arguments as in `apply`.

        Returns:
            One share per sample in [0, 1], float64, shape (B,).
        """
        clean = to_clean(model_output, noisy, alpha_bar_B, prediction_type)
        return (self.restrict(clean) != clean).flatten(1).double().mean(1)


NO_RULE = CleanRule()
"""No clipping and no thresholding, as in the schedulers of latent models."""
