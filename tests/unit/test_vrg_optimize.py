"""What holds for every optimised trajectory: order, bounds, the held end, never worse, invariances, and speed."""

from itertools import pairwise

import numpy as np
import pytest

from acpo_dist.core.errors import VrgError
from acpo_dist.vrg.levels import to_alpha_bars, to_sigmas
from acpo_dist.vrg.objective import to_alphas
from acpo_dist.vrg.optimize import optimize
from acpo_dist.vrg.responses import SOLVERS
from acpo_dist.vrg.table import ErrorTable
from tests.helpers.vrg import alpha_form

SDXL_LEVELS = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
SDXL_SIGMAS = to_sigmas(SDXL_LEVELS)
NODES = np.geomspace(SDXL_SIGMAS[0], SDXL_SIGMAS[-1], 16)
TABLE = ErrorTable(sigmas=NODES, v=0.2 / (0.2 + NODES**2) + 0.003)


def trailing(num_steps: int) -> np.ndarray:
    return SDXL_SIGMAS[[round(1000 - index * 1000 / num_steps) - 1 for index in range(num_steps)]]


def uneven(seed: int, num_steps: int = 12) -> np.ndarray:
    picks = np.random.default_rng(seed).choice(1000, num_steps, replace=False)
    return SDXL_SIGMAS[np.sort(picks)[::-1]]


CASES = {
    **{f"trailing {num_steps}": trailing(num_steps) for num_steps in (1, 2, 3, 10, 30, 50)},
    **{f"uneven {seed}": uneven(seed) for seed in range(4)},
}


@pytest.mark.parametrize("name", CASES)
def test_log_trust_keeps_the_noisy_end_the_order_the_bounds_and_never_gets_worse(name: str):
    start = CASES[name]
    found = optimize(start, TABLE, trust=0.25, sigma_min=SDXL_SIGMAS[0])
    sigmas = np.array(found.sigmas)
    assert sigmas[0] == start[0]  # the very bits
    assert (np.diff(sigmas) < 0).all() and sigmas[-1] >= SDXL_SIGMAS[0]
    assert found.j1 <= found.j0
    moves = np.log(sigmas / start)
    gaps = -np.diff(np.log(start))
    for step in range(1, len(start)):
        cleaner = gaps[min(step, len(gaps) - 1)]
        assert -0.25 * cleaner - 1e-12 <= moves[step] <= 0.25 * gaps[step - 1] + 1e-12
    assert found.saturation <= 0.25 + 1e-12
    assert found.alpha_bars == tuple(to_alpha_bars(sigmas).tolist())


@pytest.mark.parametrize("name", [name for name in CASES if name != "trailing 1"])
def test_more_trust_never_costs_and_no_trust_changes_nothing(name: str):
    start = CASES[name]
    values = [optimize(start, TABLE, trust=trust).j1 for trust in (0.0, 0.05, 0.1, 0.2, 0.3, 0.45)]
    assert optimize(start, TABLE, trust=0.0).sigmas == tuple(start.tolist())
    assert values[0] == optimize(start, TABLE, trust=0.25).j0
    # Each is a global minimum up to the tolerance of the descent.
    assert all(wider <= narrower * (1 + 1e-8) for narrower, wider in pairwise(values))
    assert values[-1] < 0.999 * values[0]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("mode", ["log_trust", "paper_box"])
def test_every_solver_gains_by_its_own_objective(solver: str, mode):
    found = optimize(uneven(7), TABLE, mode=mode, solver=solver, sigma_min=SDXL_SIGMAS[0])
    assert found.j1 < found.j0
    assert (np.diff(found.sigmas) < 0).all()
    assert found.settings["solver"] == solver


@pytest.mark.parametrize("factor", [2.0**-20, 1e-3, 777.0])
def test_the_scale_of_the_error_does_not_matter(factor: float):
    scaled = ErrorTable(sigmas=NODES, v=TABLE.v * factor)
    plain, other = optimize(trailing(12), TABLE), optimize(trailing(12), scaled)
    assert other.j1 == pytest.approx(plain.j1 * factor, rel=1e-9)
    # J is flat at its minimum: 1e-10 in J is 1e-5 in the nodes.
    np.testing.assert_allclose(other.sigmas, plain.sigmas, rtol=1e-4)


def test_the_direction_and_the_type_of_the_input_do_not_matter():
    falling = trailing(9)
    assert optimize(falling[::-1], TABLE).sigmas == optimize(falling, TABLE).sigmas
    assert optimize(falling.tolist(), TABLE).sigmas == optimize(falling, TABLE).sigmas
    coarse = falling.astype(np.float32)
    assert optimize(coarse, TABLE).sigmas[0] == float(coarse[0])


def test_the_cleanest_node_stops_at_sigma_min():
    # With a constant error two equal steps would be best: from 1 and 0.9 both modes push the last node down.
    flat = ErrorTable(sigmas=NODES, v=np.ones(16))
    for mode, free in (("log_trust", 0.9 * 0.9**0.4), ("paper_box", (1 / (1 / 1.81 + 0.01) - 1) ** 0.5)):
        found = [optimize([1.0, 0.9], flat, mode=mode, trust=0.4, sigma_min=limit) for limit in (None, 0.89)]
        assert [entry.sigmas[-1] for entry in found] == pytest.approx([free, 0.89], rel=1e-6)
        assert found[1].sigmas[-1] >= 0.89 * (1 - 1e-12)


def test_a_last_step_that_does_not_reach_the_clean_end_counts_as_it_is():
    start = np.geomspace(10, 0.2, 6)
    found = optimize(start, TABLE, sigma_end=0.1)
    assert found.sigmas[0] == 10 and found.sigmas[-1] > 0.1
    assert found.j1 < found.j0 < optimize(start, TABLE).j0


@pytest.mark.parametrize("lp", [0.001, 0.01, 0.1])
@pytest.mark.parametrize("name", ["trailing 10", "trailing 50", "uneven 1"])
def test_paper_box_stays_in_its_box_and_lowers_its_loss(name: str, lp: float):
    start = CASES[name]
    found = optimize(start, TABLE, mode="paper_box", lp=lp)
    alphas, given = to_alphas(np.array(found.alpha_bars)), to_alphas(to_alpha_bars(start))
    width = np.minimum(lp, np.minimum(1 - given, given))
    assert (np.abs(alphas - given) <= width * (1 + 1e-9)).all()
    assert (np.diff(found.sigmas) < 0).all()
    linear = TABLE.with_interpolation("linear_alpha_bar")
    assert found.j0 == pytest.approx(alpha_form(to_alpha_bars(start), linear), rel=1e-9)
    penalty = 100 * (found.alpha_bars[0] - to_alpha_bars(start[0])) ** 2
    assert found.j1 + penalty < found.j0
    assert found.settings["interpolation"] == "linear_alpha_bar"


def test_a_heavy_penalty_holds_the_noisy_end_of_the_paper_box():
    light = optimize(trailing(10), TABLE, mode="paper_box", lp=0.1, reg_lambda=0.0)
    heavy = optimize(trailing(10), TABLE, mode="paper_box", lp=0.1, reg_lambda=1e9)
    assert light.alpha_bars[0] > 1.1 * SDXL_LEVELS[-1]
    assert heavy.alpha_bars[0] == pytest.approx(SDXL_LEVELS[-1], rel=1e-3)
    assert heavy.j1 >= light.j1


BAD = {
    "unknown mode": ({"mode": "free"}, "'free'; known: log_trust, paper_box"),
    "trust of a half": ({"trust": 0.5}, "trust must be in"),
    "negative trust": ({"trust": -0.1}, "trust must be in"),
    "lp 0": ({"mode": "paper_box", "lp": 0.0}, "found lp 0.0"),
    "a box with an end": ({"mode": "paper_box", "sigma_end": 0.01}, "sigma_end 0.01"),
    "below sigma_min": ({"sigma_min": 0.5}, "at least sigma_min > 0, found 0.1"),
    "sigma_min 0": ({"sigma_min": 0.0}, "sigma_min > 0"),
    "end above the nodes": ({"sigma_end": 3.0}, "exceed sigma_end"),
    "unknown solver": ({"solver": "heun"}, "unknown solver"),
}


@pytest.mark.parametrize("name", BAD)
def test_arguments_that_cannot_be_are_refused(name: str):
    changes, words = BAD[name]
    with pytest.raises(VrgError, match=words):
        optimize([10.0, 1.0, 0.1], TABLE, **changes)


@pytest.mark.parametrize("sigmas", [[], [1.0, 1.0], [3.0, 1.0, 2.0], [1.0, np.nan], [1.0, -1.0], [[1.0, 2.0]], [0.0]])
def test_sigmas_that_are_no_trajectory_are_refused(sigmas):
    with pytest.raises(VrgError, match=r"trajectory|sigma_end"):
        optimize(sigmas, TABLE)
