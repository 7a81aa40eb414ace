"""Drift controller: damped dual ascent on the constraint `anchor error <= budget squared`."""

import math
from dataclasses import dataclass, replace


def initial_anchor_weight(*, reward_weight: float, num_elements: int, gradient_norm: float, budget: float) -> float:
    """Return the anchor weight at which one unconstrained step drifts by `budget` (rms, noise units).

    lambda_a = lambda_q sqrt(D) ||g_eps|| / (2 r): the minimiser of -lambda_q <g, D> + (lambda_a / D) ||D||^2.
    This is an upper estimate, since the network cannot realise every drift; the controller adjusts it afterwards.

    Args:
        reward_weight: lambda_q, weight of the reward.
        num_elements: D, elements of one latent tensor.
        gradient_norm: median over samples of ||dq / d eps-hat||.
        budget: r, target rms drift, in noise units.

    Raises:
        ValueError: the budget is not positive, or the gradient is zero or not finite.
    """
    if not budget > 0:
        raise ValueError(f"the drift budget must be positive, found {budget}")
    if not (math.isfinite(gradient_norm) and gradient_norm > 0):
        raise ValueError(f"the reward gradient must be finite and not zero, found a median norm of {gradient_norm}")
    return reward_weight * math.sqrt(num_elements) * gradient_norm / (2 * budget)


@dataclass(frozen=True, kw_only=True)
class DriftController:
    """Anchor weight with its controller state. `rate` 0 keeps the weight fixed, as in the published method.

    The controller is proportional-integral in log drift. The integral term alone, which is plain dual ascent,
    oscillates, because the policy responds to the anchor weight with a delay of several iterations.
    """

    weight: float
    budget: float | None
    """Target rms drift, in the anchor's units; None disables the controller."""
    rate: float
    """Change of the log weight per iteration, as a share of the log excess."""
    brake: float = 3.0
    """Ratio of the weight's rate of increase above the set point to its rate of decrease below it."""
    damping: float = 12.0
    """Response to a change of the excess since the last iteration, in units of `rate`."""
    headroom: float = 0.8
    """Set point as a share of the budget: drift is noisy, and a set point at the budget would be exceeded half the
    time."""
    last_excess: float | None = None
    """log(drift / set point) of the last iteration; None before the first."""
    min_weight: float = 1e-4
    max_weight: float = 1e6

    def update(self, anchor_error: float) -> "DriftController":
        """lambda <- clip(lambda exp(rate (b e + d (e - e_last)))), e = log(rms drift / (h r)), h the headroom.

        b is the brake where e > 0, else 1; d the damping. e is taken as -1 at least, and the factor within [1/e, e].

        Args:
            anchor_error: mean squared drift of the last iteration.
        """
        if self.budget is None or self.rate == 0:
            return self
        excess = max(-1.0, math.log(max(anchor_error, 1e-30)) / 2 - math.log(self.headroom * self.budget))
        change = 0.0 if self.last_excess is None else excess - self.last_excess
        exponent = self.rate * (excess * (self.brake if excess > 0 else 1.0) + self.damping * change)
        weight = self.weight * math.exp(min(1.0, max(-1.0, exponent)))
        return replace(self, weight=min(self.max_weight, max(self.min_weight, weight)), last_excess=excess)
