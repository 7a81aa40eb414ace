"""The drift controller: dual ascent on `anchor error <= budget squared`."""

import math
from dataclasses import dataclass, replace


def initial_anchor_weight(*, reward_weight: float, num_elements: int, gradient_norm: float, budget: float) -> float:
    """Anchor weight at which one unconstrained step would drift by `budget` (rms, noise units).

    lambda_a = lambda_q sqrt(D) ||g_eps|| / (2 r): the minimiser of -lambda_q <g, D> + (lambda_a / D) ||D||^2.
    An upper estimate, since the network cannot realise every drift; the controller takes it from there.

    Args:
        num_elements: D, elements of one latent tensor.
        gradient_norm: median over samples of ||dq / d eps-hat||.

    Raises:
        ValueError: a non-positive budget, or a gradient that is zero or not finite.
    """
    if not budget > 0:
        raise ValueError(f"the drift budget must be positive, found {budget}")
    if not (math.isfinite(gradient_norm) and gradient_norm > 0):
        raise ValueError(f"the reward gradient must be finite and not zero, found a median norm of {gradient_norm}")
    return reward_weight * math.sqrt(num_elements) * gradient_norm / (2 * budget)


@dataclass(frozen=True, kw_only=True)
class DriftController:
    """State of the anchor weight. `rate` 0 keeps it fixed, which is the faithful mode."""

    weight: float
    budget: float | None
    """Wanted rms drift in noise units; None switches steering off."""
    rate: float
    brake: float = 10.0
    """How many times faster the weight rises over its set point than it falls under it."""
    headroom: float = 0.8
    """Set point as a share of the budget: drift is noisy, and aiming at the limit itself oversteps it half the time."""
    min_weight: float = 1e-4
    max_weight: float = 1e6

    def update(self, anchor_error: float) -> "DriftController":
        """lambda <- clip(lambda exp(rate (L_a / (h r)^2 - 1))), h the headroom.

        An excess counts `brake` times, and the factor is at most e.

        Args:
            anchor_error: mean squared drift of the last iteration.
        """
        if self.budget is None or self.rate == 0:
            return self
        excess = anchor_error / (self.headroom * self.budget) ** 2 - 1
        exponent = min(1.0, self.rate * (excess * self.brake if excess > 0 else excess))
        weight = min(self.max_weight, max(self.min_weight, self.weight * math.exp(exponent)))
        return replace(self, weight=weight)
