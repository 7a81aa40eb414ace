"""Sampling trajectories with explicit noise levels from noisy to clean."""

import hashlib
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """Timesteps and noise levels of N denoise steps.

    Step i conditions the network on `timesteps[i]` and goes from `alpha_bars[i]` to `alpha_bars[i+1]`.
    `alpha_bars` has N + 1 strictly increasing entries; the last entry is the end of the trajectory (1 is clean), and
    the first can be 0, pure noise. Timesteps of flow models are 1000 sigma - 1, so that -1 is clean for every model.
    """

    timesteps: tuple[float, ...]
    alpha_bars: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check the levels.

        Raises:
            ValueError: lengths do not match, an alpha_bar is outside [0, 1], or alpha_bars do not increase.
        """
        if not self.timesteps or len(self.alpha_bars) != len(self.timesteps) + 1:
            raise ValueError(
                f"N timesteps need N + 1 alpha_bars, found {len(self.timesteps)} and {len(self.alpha_bars)}"
            )
        if not all(0 <= level <= 1 for level in self.alpha_bars) or self.alpha_bars[0] >= 1:
            raise ValueError(f"alpha_bars must lie in [0, 1], the first below 1; found {self.alpha_bars}")
        if any(later <= earlier for earlier, later in zip(self.alpha_bars, self.alpha_bars[1:], strict=False)):
            raise ValueError(f"alpha_bars must increase from noisy to clean; found {self.alpha_bars}")

    @property
    def num_steps(self) -> int:
        """Number of denoise steps."""
        return len(self.timesteps)

    @property
    def schedule_id(self) -> str:
        """Identifier of the trajectory, stored with every sample; a hash of timesteps and levels."""
        text = ",".join(f"{value:.12g}" for value in (*self.timesteps, *self.alpha_bars))
        return f"{self.num_steps}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"

    def width(self, step: int) -> float:
        """Number of timesteps from a denoise step to the next one; from the last step to a clean sample (-1)."""
        timesteps = (*self.timesteps, -1.0)
        return timesteps[step] - timesteps[step + 1]

    def late_steps(self, t_max: float, num_train_timesteps: int, count: int) -> tuple[int, ...]:
        """Select evenly spread denoise steps with a timestep of at most t_max T.

        Args:
            t_max: share of the training timesteps, in (0, 1].
            num_train_timesteps: T.
            count: maximum number of steps.

        Returns:
            Up to `count` denoise steps, ascending.

        Raises:
            ValueError: no step has a timestep of at most t_max T.
        """
        late = [step for step, timestep in enumerate(self.timesteps) if timestep <= t_max * num_train_timesteps]
        if not late:
            raise ValueError(
                f"no denoise step lies at or below t_max = {t_max} of {num_train_timesteps} timesteps; the latest is "
                f"at {self.timesteps[-1]:g}."
            )
        if len(late) <= count:
            return tuple(late)
        if count == 1:
            return (late[len(late) // 2],)
        return tuple(late[round(index * (len(late) - 1) / (count - 1))] for index in range(count))


SPACINGS = ("trailing", "leading", "linspace", "karras")
"""Spacings of `spaced_trajectory`, with the names used in diffusers."""
KARRAS_RHO = 7.0


def spaced_trajectory(alpha_bars_T: Tensor, num_steps: int, spacing: str, *, steps_offset: int = 1) -> Trajectory:
    """Create a trajectory with a named spacing that ends at a clean sample.

    Args:
        alpha_bars_T: cumulative signal fraction by timestep, float64, shape (T,).
        num_steps: number of denoise steps.
        spacing: `trailing` (T-1, T-1-T/N, ...), `leading` (..., T/N + offset, offset) and `linspace` (T-1 to 0) are
            evenly spaced timesteps; `karras` spaces sigma over the whole schedule with rho = 7 (Karras et al. 2022).
        steps_offset: last timestep of `leading`.

    Returns:
        The trajectory.

    Raises:
        ValueError: unknown spacing, or more steps than timesteps.
    """
    total = len(alpha_bars_T)
    if not 1 <= num_steps <= total:
        raise ValueError(f"num_steps must be in 1..{total}, found {num_steps}")
    if spacing == "trailing":
        timesteps = [round(total - index * total / num_steps) - 1 for index in range(num_steps)]
    elif spacing == "leading":
        ratio = total // num_steps
        timesteps = [min(index * ratio + steps_offset, total - 1) for index in reversed(range(num_steps))]
    elif spacing == "linspace":
        timesteps = [int(step) for step in np.linspace(0, total - 1, num_steps).round()[::-1]]
    elif spacing == "karras":
        return _karras_trajectory(alpha_bars_T, num_steps)
    else:
        raise ValueError(f"unknown spacing {spacing!r}; known: {', '.join(SPACINGS)}")
    return explicit_trajectory(alpha_bars_T, timesteps)


def _karras_trajectory(alpha_bars_T: Tensor, num_steps: int) -> Trajectory:
    levels_T = [float(level) for level in alpha_bars_T.double()]
    sigmas_T = [math.sqrt((1 - level) / level) for level in levels_T]
    noisy, clean = sigmas_T[-1] ** (1 / KARRAS_RHO), sigmas_T[0] ** (1 / KARRAS_RHO)
    shares = [index / max(num_steps - 1, 1) for index in range(num_steps)]
    sigmas = [(noisy + share * (clean - noisy)) ** KARRAS_RHO for share in shares]
    inner = [1 / (1 + sigma**2) for sigma in sigmas[1:-1]]
    # The levels at both ends are taken from the schedule, without rounding through sigma.
    levels = [levels_T[-1], *inner, levels_T[0]][:num_steps]
    return Trajectory(timesteps=tuple(_timestep_of(sigma, sigmas_T) for sigma in sigmas), alpha_bars=(*levels, 1.0))


def _timestep_of(sigma: float, sigmas_T: Sequence[float]) -> float:
    """Timestep of a noise level by linear interpolation in log sigma, clamped to the training timesteps."""
    above = bisect_left(sigmas_T, sigma)
    if above == 0:
        return 0.0
    if above == len(sigmas_T):
        return float(len(sigmas_T) - 1)
    low, high = math.log(sigmas_T[above - 1]), math.log(sigmas_T[above])
    return above - 1 + (math.log(sigma) - low) / (high - low)


def explicit_trajectory(alpha_bars_T: Tensor, timesteps: Sequence[int]) -> Trajectory:
    """Create a trajectory with the given integer timesteps that ends at a clean sample.

    Args:
        alpha_bars_T: cumulative signal fraction by timestep, shape (T,).
        timesteps: N decreasing timesteps.
    """
    levels = [float(alpha_bars_T[timestep].to(torch.float64)) for timestep in timesteps]
    return Trajectory(timesteps=tuple(float(timestep) for timestep in timesteps), alpha_bars=(*levels, 1.0))
