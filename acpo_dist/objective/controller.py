"""The drift controller: dual ascent on `anchor error <= budget squared`, damped."""

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
    """State of the anchor weight. `rate` 0 keeps it fixed, which is the faithful mode.

    Proportional and integral in log drift. The integral alone, which is plain dual ascent, oscillates: the policy
    answers an anchor weight several iterations late, and what a run ends with then depends on the phase.
    """

    weight: float
    budget: float | None
    """Wanted rms drift, in the anchor's units; None switches steering off."""
    rate: float
    """Share of a log excess that the log weight moves by in one iteration."""
    brake: float = 3.0
    """How many times faster the weight rises over its set point than it falls under it."""
    damping: float = 12.0
    """Response to a change of the excess since the last iteration, in units of `rate`."""
    headroom: float = 0.8
    """Set point as a share of the budget: drift is noisy, and aiming at the limit itself oversteps it half the time."""
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
