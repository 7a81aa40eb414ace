"""PLMS: linear multistep sampling on eps, for any trajectory.

In z = x / sqrt(alpha_bar) and sigma = sqrt(1 / alpha_bar - 1) the deterministic sampling ODE is dz/dsigma = eps(x, t).
The multistep method is Adams-Bashforth in sigma: it integrates the polynomial in sigma through the last k values of eps
over the step. The weights depend on the spacing of sigma, which is arbitrary; for even spacing they are the classical
weights (55, -59, 37, -9) / 24.

diffusers' `PNDMScheduler` always uses the classical weights and evenly spaced timesteps. It averages eps over timesteps
and applies the DDIM step to the average (here: multiplies it by the difference in sigma). Both methods agree if sigma
is linear in the timestep. Otherwise PNDM is of second order in the timestep, and it is incorrect on unevenly spaced
trajectories. PNDM repeats its first step, which costs one more call; here the order increases as 1, 2, 3, 4.

Sources: Liu et al. 2022 (PNDM); Hairer, Norsett and Wanner 1993, III.5 (variable steps).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from acpo_dist.diffusion.prediction import to_noise
from acpo_dist.diffusion.sampling import Predict, Sampler, Stepper
from acpo_dist.diffusion.trajectory import Trajectory

MAX_ORDER = 4


def noise_levels(trajectory: Trajectory) -> tuple[float, ...]:
    """Return sqrt(1 / alpha_bar - 1) of the N + 1 levels of a trajectory, decreasing; 0 is clean, inf pure noise."""
    return tuple(math.sqrt(max(0.0, 1 / level - 1)) if level > 0 else math.inf for level in trajectory.alpha_bars)


def adams_bashforth(nodes: Sequence[float], end: float) -> tuple[float, ...]:
    """Adams-Bashforth weights: integrate the polynomial through the values at the nodes from the last node to `end`.

    Args:
        nodes: k distinct positions, the newest last; the order is k.
        end: position of the end of the step, different from the last node.

    Returns:
        One weight per node, in the order of `nodes`; the sum is the signed length of the step.
    """
    length = end - nodes[-1]
    # Scale the newest node to 0 and the end to 1, so that the equations are well conditioned on any trajectory.
    places = (np.asarray(nodes, dtype=np.float64) - nodes[-1]) / length
    powers = np.arange(len(nodes))
    weights = np.linalg.solve(places[None, :] ** powers[:, None], 1 / (powers + 1.0))
    return tuple(float(length * weight) for weight in weights)


class Multistep:
    """Multistep integrator of one trajectory with a history of eps."""

    def __init__(self, trajectory: Trajectory, order: int) -> None:
        """Start with an empty history; the first step is of order 1.

        Args:
            trajectory: noise levels of all steps.
            order: maximum order, 1 to 4.

        Raises:
            ValueError: order outside 1..4.
        """
        if not 1 <= order <= MAX_ORDER:
            raise ValueError(f"PLMS has orders 1 to {MAX_ORDER}, found {order}")
        self._sigmas, self._levels, self._order = noise_levels(trajectory), trajectory.alpha_bars, order
        self._history: list[Tensor] = []

    def advance(self, step: int, noise: Tensor, state: Tensor) -> Tensor:
        """Append eps to the history and take one step.

        Args:
            step: denoise step.
            noise: eps at `state`, shape (B, ...).
            state: x at the level of the step, same shape.

        Returns:
            x at the next level, same shape.
        """
        self._history = [*self._history, noise][-self._order :]
        known = self._sigmas[step + 1 - len(self._history) : step + 1]
        weights = adams_bashforth(known, self._sigmas[step + 1])
        moved = torch.zeros_like(noise)
        for weight, value in zip(weights, self._history, strict=True):
            moved = moved + weight * value
        signal, following = math.sqrt(self._levels[step]), math.sqrt(self._levels[step + 1])
        return following / signal * state + following * moved

    def shift(self, change: Tensor) -> None:
        """Add `change` to every eps of the history, after the state has been changed outside of `advance`."""
        self._history = [value + change for value in self._history]


def noise_of(model_output: Tensor, state: Tensor, alpha_bar: float, prediction_type: str) -> Tensor:
    """Convert a network output at one noise level to eps.

    Args:
        model_output: network output, shape (B, ...).
        state: x_t, same shape.
        alpha_bar: noise level of the whole batch.
        prediction_type: a name in `prediction.PREDICTION_TYPES`.

    Returns:
        eps of the same shape, float32 or float64.
    """
    levels = torch.full((state.shape[0],), alpha_bar, dtype=torch.float64, device=state.device)
    return to_noise(model_output, state, levels, prediction_type)


@dataclass(frozen=True)
class PLMS(Sampler):
    """PLMS sampler: one network call per step, of order 4 on smooth trajectories with any spacing.

    A step that is much longer than the previous steps extrapolates with large weights of alternating sign. Use a lower
    `order` on such a trajectory; order 1 is DDIM.
    """

    order: int = MAX_ORDER

    @override
    def start(self, trajectory: Trajectory, prediction_type: str, predict: Predict) -> Stepper:
        multistep = Multistep(trajectory, self.order)

        def advance(step: int, model_output: Tensor, state: Tensor) -> Tensor:
            return multistep.advance(
                step, noise_of(model_output, state, trajectory.alpha_bars[step], prediction_type), state
            )

        return advance
