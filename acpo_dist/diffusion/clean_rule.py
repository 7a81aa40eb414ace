"""What a scheduler does to its x_0 estimate before it steps: nothing, clip it, or threshold it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from acpo_dist.diffusion.prediction import PREDICTION_TYPES, signal_and_noise, to_clean


@dataclass(frozen=True, kw_only=True)
class CleanRule:
    """x_0 = rule(x0-hat), after which eps is derived again from x_t and x_0.

    The rule acts on the network output, in the network's own prediction type: whatever reads the output afterwards
    (any solver, the density of a stochastic step, the error that VRG measures) works with the restricted x_0 and the
    eps that belongs to it. Without a rule the output is returned as it is, bit for bit.
    """

    limit: float | None = None
    """Clip to [-limit, limit] (`clip_sample`, `clip_sample_range`)."""
    quantile: float | None = None
    """Dynamic thresholding: divide by this quantile of |x0-hat| per sample (`dynamic_thresholding_ratio`); it replaces
    the clip, as in diffusers."""
    ceiling: float = 1.0
    """Largest divisor of dynamic thresholding (`sample_max_value`)."""

    @property
    def is_active(self) -> bool:
        """Whether the rule changes anything."""
        return self.limit is not None or self.quantile is not None

    def restrict(self, clean: Tensor) -> Tensor:
        """Apply the rule to x_0 estimates.

        Args:
            clean: x0-hat, shape (B, ...), float32 or float64.

        Returns:
            Same shape, differentiable; elements that the clip changes pass no gradient.

        Source of thresholding: Imagen (Saharia et al. 2022), as diffusers applies it.
        """
        if self.quantile is not None:
            scale = torch.quantile(clean.abs().flatten(1), self.quantile, dim=1).clamp(1, self.ceiling)
            scale = scale.reshape(-1, *[1] * (clean.ndim - 1))
            return torch.minimum(torch.maximum(clean, -scale), scale) / scale
        return clean if self.limit is None else clean.clamp(-self.limit, self.limit)

    def apply(self, model_output: Tensor, noisy: Tensor, alpha_bar_B: Tensor, prediction_type: str) -> Tensor:
        """Network output whose x0-hat obeys the rule and whose eps-hat belongs to that x_0.

        Args:
            model_output: network output, guided if the sampler is guided, shape (B, ...).
            noisy: x_t, same shape.
            alpha_bar_B: level per sample, in (0, 1).
            prediction_type: `epsilon`, `v_prediction` or `sample`.

        Returns:
            Same shape. Where the rule changes nothing, the very values of `model_output`.

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
        if prediction_type == "sample":
            return model_output + change
        raise ValueError(f"unknown prediction_type {prediction_type!r}; known: {', '.join(PREDICTION_TYPES)}")

    def share_changed(self, model_output: Tensor, noisy: Tensor, alpha_bar_B: Tensor, prediction_type: str) -> Tensor:
        """Share of the elements of each x0-hat that the rule changes, float64 (B,)."""
        clean = to_clean(model_output, noisy, alpha_bar_B, prediction_type)
        return (self.restrict(clean) != clean).flatten(1).double().mean(1)


NO_RULE = CleanRule()
"""Schedulers of latent models: x0-hat is used as it is."""
