"""The search finds what exhaustive search, general optimisers and closed forms say is the minimum."""

import itertools
import math

import numpy as np
import pytest
from scipy.optimize import minimize

from acpo_dist.vrg.log_trust import trust_bounds
from acpo_dist.vrg.optimize import optimize
from acpo_dist.vrg.responses import SOLVERS
from acpo_dist.vrg.search import cheapest_path
from acpo_dist.vrg.table import ErrorTable

NODES = np.geomspace(0.01, 20, 24)
BUMPY = ErrorTable(sigmas=NODES, v=np.exp(np.sin(5 * np.log(NODES)) - np.log1p(NODES)))


def by_hand(sigmas, table: ErrorTable, sigma_end: float) -> float:
    pairs = zip(sigmas, [*sigmas[1:], sigma_end], table.value(sigmas).tolist(), strict=True)
    return math.fsum((noisy - clean) ** 2 * error for noisy, clean, error in pairs)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_steps", [1, 2, 3])
@pytest.mark.parametrize("restricted", [False, True])
def test_the_cheapest_path_is_that_of_exhaustive_search(seed: int, num_steps: int, restricted: bool):
    rng = np.random.default_rng(seed)
    edges = np.geomspace(12, 0.05, num_steps + 1)
    layers = [rng.uniform(low, high, 7) for high, low in itertools.pairwise(edges)]
    penalties = rng.uniform(0, 3, 7)
    ratio = 240 ** (1 / num_steps)  # that of neighbouring edges, so some of the pairs are allowed

    def allowed(step, noisy, clean):
        return noisy < (ratio + step) * clean

    def cost(path) -> float:
        sigmas = [layer[index] for layer, index in zip(layers, path, strict=True)]
        if restricted and not all(a < (ratio + i) * b for i, (a, b) in enumerate(itertools.pairwise(sigmas))):
            return math.inf
        return by_hand(sigmas, BUMPY, 0.02) + float(penalties[path[0]])

    best = min(itertools.product(range(7), repeat=num_steps), key=cost)
    assert math.isfinite(cost(best))
    found = cheapest_path(layers, BUMPY, sigma_end=0.02, allowed=allowed if restricted else None, start_cost=penalties)
    assert found == list(best)


def test_layers_without_an_allowed_path_are_an_error():
    with pytest.raises(ValueError, match="no path"):
        cheapest_path([np.array([2.0]), np.array([1.0])], BUMPY, allowed=lambda _, a, b: a < b)


@pytest.mark.parametrize("seed", range(3))
def test_no_local_descent_from_anywhere_in_the_trust_region_finds_less(seed: int):
    rng = np.random.default_rng(seed)
    start = np.sort(np.exp(rng.uniform(np.log(0.02), np.log(15), 8)))[::-1]
    lower, upper = trust_bounds(start, trust=0.45, lowest=0.0, sigma_end=0.0)
    found = optimize(start, BUMPY, trust=0.45)
    values = []
    for _ in range(8):
        origin = rng.uniform(np.log(lower[1:]), np.log(upper[1:]))
        descent = minimize(
            lambda logs: by_hand([start[0], *np.exp(logs)], BUMPY, 0.0),
            origin,
            bounds=np.log(np.stack([lower, upper], axis=1)[1:]),
            method="L-BFGS-B",
        )
        values.append(descent.fun)
    # The descents differ among themselves: the objective has several minima here.
    assert max(values) > 1.001 * min(values)
    assert found.j1 <= min(values) * (1 + 1e-6)


@pytest.mark.parametrize("solver", ["dpm_2m", "dpm_single_2", "dpmpp_2m"])
def test_with_other_solvers_a_descent_from_the_start_finds_no_less(solver: str):
    start = np.geomspace(14, 0.1, 9)
    lower, upper = trust_bounds(start, trust=0.4, lowest=0.0, sigma_end=0.0)

    def loss(logs) -> float:
        sigmas = np.append(start[:1], np.exp(logs))
        return float(SOLVERS[solver].respond(sigmas, 0.0) ** 2 @ BUMPY.value(sigmas))

    bounds = np.log(np.stack([lower, upper], axis=1)[1:])
    descent = minimize(loss, np.log(start[1:]), bounds=bounds, method="L-BFGS-B", options={"maxfun": 20000})
    found = optimize(start, BUMPY, trust=0.4, solver=solver)
    # It is not what the first-order search alone finds.
    assert loss(np.log(optimize(start, BUMPY, trust=0.4).sigmas[1:])) > 1.001 * found.j1
    assert found.j1 <= descent.fun * (1 + 1e-6)


@pytest.mark.parametrize("solver", ["first_order", "dpm_2m", "dpmpp_3m"])
def test_no_descent_on_the_papers_loss_finds_less_in_its_box(solver: str):
    start, lp, reg_lambda = np.geomspace(14, 0.1, 8), 0.1, 3000.0
    levels = 1 / (1 + start**2)
    given = levels / np.append(levels[1:], 1)
    width = 0.999 * np.minimum(lp, np.minimum(given, 1 - given))
    table = BUMPY.with_interpolation("linear_alpha_bar")

    def loss(alphas) -> float:
        moved = np.cumprod(alphas[::-1])[::-1]
        sigmas = np.sqrt(1 / moved - 1)
        weights = SOLVERS[solver].respond(sigmas, 0.0)
        return float(weights**2 @ table.value(sigmas)) + reg_lambda * (moved[0] - levels[0]) ** 2

    bounds = np.stack([given - width, given + width], axis=1)
    descent = minimize(loss, given, bounds=bounds, method="L-BFGS-B", options={"maxfun": 20000})
    found = optimize(start, BUMPY, mode="paper_box", lp=lp, reg_lambda=reg_lambda, solver=solver)
    # The penalty matters: it is a visible part of the loss of a trajectory found without it.
    free = optimize(start, BUMPY, mode="paper_box", lp=lp, reg_lambda=0.0, solver=solver)
    assert reg_lambda * (free.alpha_bars[0] - levels[0]) ** 2 > 0.01 * found.j1
    assert found.j1 + reg_lambda * (found.alpha_bars[0] - levels[0]) ** 2 <= descent.fun * (1 + 1e-4)


@pytest.mark.parametrize("num_steps", [2, 5, 20])
def test_a_constant_error_is_met_best_by_equal_steps_in_sigma(num_steps: int):
    flat = ErrorTable(sigmas=NODES, v=np.full(24, 0.3))
    even = np.arange(num_steps, 0, -1) * 10.0 / num_steps
    bent = even * (1 + 0.2 / num_steps * np.sin(3 * even))
    bent[0] = 10.0
    found = optimize(bent, flat, trust=0.49)
    # Closed form: J = v s_N^2 / N.
    assert found.j1 == pytest.approx(0.3 * 10**2 / num_steps, rel=1e-7)
    # J is flat at its minimum: nodes are known to the root of the tolerance on J.
    np.testing.assert_allclose(found.sigmas, even, rtol=1e-3)
    assert found.j0 > found.j1 * (1 + 1e-5)


@pytest.mark.parametrize("num_steps", [20, 40])
def test_an_error_that_falls_with_the_square_of_sigma_is_met_best_by_equal_ratios(num_steps: int):
    falling = ErrorTable(sigmas=NODES, v=2.0 / NODES**2)
    even = 10 * (0.1 / 10) ** (np.arange(num_steps) / num_steps)
    bent = even * np.exp(0.2 * np.sin(np.arange(num_steps)) * np.log(100) / num_steps)
    bent[0] = 10.0
    found = optimize(bent, falling, trust=0.49, sigma_end=0.1)
    # Closed form: J = c sum (1 - s_(i-1) / s_i)^2, least for equal ratios (all above 1/2 here: convex).
    assert found.j1 == pytest.approx(2.0 * num_steps * (1 - 0.01 ** (1 / num_steps)) ** 2, rel=1e-7)
    np.testing.assert_allclose(found.sigmas, even, rtol=1e-3)


def test_with_many_steps_the_minimum_nears_the_square_of_the_arc_length():
    smooth = ErrorTable(sigmas=np.geomspace(1e-3, 20, 60), v=1 / (1 + np.geomspace(1e-3, 20, 60) ** 2))
    # Closed form: the integral of sqrt(v) ds from 0 to 10 is asinh(10).
    bound = math.asinh(10) ** 2
    excess = []
    for num_steps in (20, 40, 80):
        nodes = np.sinh(np.arange(num_steps, 0, -1) / num_steps * math.asinh(10))
        excess.append(abs(num_steps * optimize(nodes, smooth).j1 / bound - 1))
    # First order in 1 / N.
    assert excess[0] < 0.3 and excess[2] < 0.6 * excess[1] < 0.4 * excess[0]
