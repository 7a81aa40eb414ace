"""Searches for sampling trajectories from their publications' mathematics, written for one comparison.

A trajectory is a set of K nodes of a fine grid of sigmas, noisy to clean, that starts at the first node; the last step
ends at 0. z is a state in which a deterministic first-order step is z + (sigma' - sigma) slope: x / sqrt(alpha_bar),
whose slope is the predicted noise, or the state of a flow model, whose slope is the velocity.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Slope = Callable[[Tensor, Tensor], Tensor]
"""(z (B, C, H, W), sigma (B,)) -> slope (B, C, H, W); B is a multiple of the number of prompts, in their order."""


def karras_grid(low: float, high: float, count: int) -> np.ndarray:
    """Return `count` sigmas from `high` to `low`, evenly spaced in sigma^(1/7)."""
    ramp = np.linspace(0, 1, count)
    return (high ** (1 / 7) * (1 - ramp) + low ** (1 / 7) * ramp) ** 7


def teacher(slope: Slope, start: Tensor, grid: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return the states (N + 1, B, ...) on the grid and at 0, and the slopes (N, B, ...)."""
    states, predictions = [start], []
    for sigma, after in zip(grid, [*grid[1:], 0.0], strict=True):
        predictions.append(slope(states[-1], torch.full((len(start),), float(sigma))))
        states.append(states[-1] + (float(after) - float(sigma)) * predictions[-1])
    return torch.stack(states), torch.stack(predictions)


def gits(slope: Slope, start: Tensor, grid: np.ndarray, steps: Sequence[int], coefficient: float = 1.15) -> dict:
    """GITS (Chen et al. 2024): a first-order jump from the teacher's state, cost in deviation from the chord, DP."""
    states, predictions = teacher(slope, start, grid)
    levels, size = [*grid, 0.0], len(grid) + 1
    own = _deviation(states, states).mean(1).numpy()
    cost = np.full((size, size), np.inf)
    for i in range(size - 1):
        for j in range(i + 1, size):
            jump = states[i] + (levels[j] - levels[i]) * predictions[i]
            cost[i, j] = float(_deviation(jump[None], states)[0].mean()) - own[j]
    return {count: grid[_shortest(cost, count, coefficient)] for count in steps}


def _deviation(points: Tensor, states: Tensor) -> Tensor:
    """Distance (P, B) of points (P, B, ...) to the chord from the first to the last state."""
    end = states[-1].flatten(1)
    chord = end - states[0].flatten(1)
    chord = chord / chord.norm(dim=1, keepdim=True)
    away = end[None] - points.flatten(2)
    along = (away * chord[None]).sum(2, keepdim=True)
    return (away - along * chord[None]).norm(dim=2)


def optimal_steps(slope_of: Callable[[int], Slope], states: Tensor, grid: np.ndarray, steps: Sequence[int]):
    """Optimal Stepsize (Pei et al. 2025): DP over the student's own states, per image; median over images.

    Args:
        slope_of: image -> its slope for any number of states.
        states: the teacher's states on the grid and at 0, (N + 1, B, ...).
    """
    found: dict[int, list[list[int]]] = {count: [] for count in steps}
    levels = torch.tensor([*grid, 0.0], dtype=torch.float32)
    size = len(levels)
    for image in range(states.shape[1]):
        target = states[:, image]
        best = torch.full((size,), torch.inf)
        best[0] = 0.0
        current = target[:1].expand_as(target).clone()
        parents: list[list[int]] = []
        for _ in range(max(steps)):
            reached = [at for at in range(size - 1) if torch.isfinite(best[at])]
            predictions = slope_of(image)(current[reached], levels[reached])
            after, parent = current.clone(), list(parents[-1]) if parents else [0] * size
            for at, prediction in zip(reached, predictions, strict=True):
                moved = current[at][None] + (levels[at + 1 :] - levels[at])[:, None, None, None] * prediction[None]
                error = (moved - target[at + 1 :]).square().flatten(1).mean(1)
                for offset in torch.nonzero(error < best[at + 1 :]).flatten().tolist():
                    to = at + 1 + offset
                    best[to], parent[to], after[to] = error[offset], at, moved[offset]
            parents.append(parent)
            current = after
        for count in steps:
            path, at = [], size - 1
            for level in reversed(range(count)):
                at = parents[level][at]
                path.append(at)
            found[count].append(_filled(path, count, grid))
    return {
        count: grid[_filled(np.median(paths, 0).round().astype(int), count, grid)] for count, paths in found.items()
    }


def _shortest(cost: np.ndarray, count: int, coefficient: float = 1.0) -> list[int]:
    """Return the first `count` nodes of the cheapest path of `count` jumps from the first to the last node."""
    size = len(cost)
    value = cost[:, -1].copy()
    following: list[np.ndarray] = []
    for _ in range(count - 1):
        through = cost[:, :-1] + coefficient * value[None, :-1]
        following.append(through.argmin(1))
        value = through.min(1)
    path = [0]
    for choice in reversed(following):
        path.append(int(choice[path[-1]]))
    assert len(path) == count and size > count
    return path


def _filled(path: Sequence[int], count: int, grid: np.ndarray) -> list[int]:
    """Return `count` different nodes from the first on: nodes given twice are replaced in the widest gaps."""
    nodes = sorted({0, *(int(at) for at in path)})
    while len(nodes) < count:
        ends = [*nodes, len(grid)]
        widest = max(range(len(nodes)), key=lambda at: ends[at + 1] - ends[at])
        nodes = sorted({*nodes, (ends[widest] + ends[widest + 1]) // 2})
    return nodes[:count]
