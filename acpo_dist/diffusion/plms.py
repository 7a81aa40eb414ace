"""PLMS: linear multistep sampling on eps, for any trajectory.

In z = x / sqrt(alpha_bar) and sigma = sqrt(1 / alpha_bar - 1) the deterministic sampling ODE is dz/dsigma = eps(x, t)
with nothing else in it, so a multistep rule for it is Adams-Bashforth in sigma: integrate the polynomial in sigma
through the last k values of eps over the step. The weights depend on the spacing of sigma, which is free; where it is
even they are the classical ones, (55, -59, 37, -9) / 24.

diffusers' `PNDMScheduler` always takes the classical weights and spaces timesteps evenly. Its mean of eps is one over
timesteps, which it then moves by DDIM's transfer (here: times the difference in sigma). The two coincide where sigma is
linear in the timestep; elsewhere PNDM's rule is of second order in the timestep, and on an uneven trajectory it is
wrong. It also repeats its first step, which costs one more call; here the order grows as 1, 2, 3, 4.

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
    """sigma = sqrt(1 / alpha_bar - 1) of the N + 1 levels, decreasing; 0 is clean."""
    return tuple(math.sqrt(max(0.0, 1 / level - 1)) for level in trajectory.alpha_bars)


def adams_bashforth(nodes: Sequence[float], end: float) -> tuple[float, ...]:
    """Weights of the integral, from the last node to `end`, of the polynomial through values at the nodes.

    Args:
        nodes: distinct places, the newest last; k of them give order k.
        end: where the step ends, not the newest node.

    Returns:
        One weight per node, in the order of `nodes`; they add up to the length of the step, signed.
    """
    length = end - nodes[-1]
    # In units of the step the newest node is 0 and the end is 1: the equations stay well scaled on any trajectory.
    places = (np.asarray(nodes, dtype=np.float64) - nodes[-1]) / length
    powers = np.arange(len(nodes))
    weights = np.linalg.solve(places[None, :] ** powers[:, None], 1 / (powers + 1.0))
    return tuple(float(length * weight) for weight in weights)


class Multistep:
    """The last eps of one trajectory, and the steps that follow from them."""

    def __init__(self, trajectory: Trajectory, order: int) -> None:
        """Begin with no history: the first step is of order 1.

        Args:
            order: the highest to use, 1 to 4.

        Raises:
            ValueError: order outside 1..4.
        """
        if not 1 <= order <= MAX_ORDER:
            raise ValueError(f"PLMS has orders 1 to {MAX_ORDER}, found {order}")
        self._sigmas, self._levels, self._order = noise_levels(trajectory), trajectory.alpha_bars, order
        self._history: list[Tensor] = []

    def advance(self, step: int, noise: Tensor, state: Tensor) -> Tensor:
        """Take `noise` = eps at (state, step) into the history and step from x to x at the next level."""
        self._history = [*self._history, noise][-self._order :]
        known = self._sigmas[step + 1 - len(self._history) : step + 1]
        weights = adams_bashforth(known, self._sigmas[step + 1])
        moved = torch.zeros_like(noise)
        for weight, value in zip(weights, self._history, strict=True):
            moved = moved + weight * value
        signal, following = math.sqrt(self._levels[step]), math.sqrt(self._levels[step + 1])
        return following / signal * state + following * moved

    def shift(self, change: Tensor) -> None:
        """Add `change` to every remembered eps: the state was moved, and the history continues from there."""
        self._history = [value + change for value in self._history]


def noise_of(model_output: Tensor, state: Tensor, alpha_bar: float, prediction_type: str) -> Tensor:
    """Eps, float32 or wider, from a network output at one level for the whole batch."""
    levels = torch.full((state.shape[0],), alpha_bar, dtype=torch.float64, device=state.device)
    return to_noise(model_output, state, levels, prediction_type)


@dataclass(frozen=True)
class PLMS(Sampler):
    """One call per step. Of order 4 where the trajectory is smooth, whatever its spacing.

    A step much longer than those before it extrapolates: the weights grow and alternate. On such a trajectory take a
    lower `order`; 1 is DDIM.
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
