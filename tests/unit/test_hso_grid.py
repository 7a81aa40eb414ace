"""HSO on a grid: its levels minimise the midpoint error, come from the schedule alone, and are validated like VRG's."""

import numpy as np
import pytest

from acpo_dist.core.errors import VrgError
from acpo_dist.data.prompts import load_prompts
from acpo_dist.diffusion.trajectory import spaced_trajectory
from acpo_dist.training.local import LocalRollouts
from acpo_dist.training.trajectory.measure import measure
from acpo_dist.training.trajectory.validate import consider, describe, searches_of, set_trajectory
from acpo_dist.vrg.hso_grid import LAST_TIMES, search_hso_grid
from acpo_dist.vrg.levels import to_sigmas
from acpo_dist.vrg.optimize import optimize
from acpo_dist.vrg.table import ErrorTable
from acpo_dist.vrg.timesteps import to_timesteps

LEVELS = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
SIGMAS = to_sigmas(LEVELS)
FIRST = float(SIGMAS[-1])
PROMPTS = load_prompts("toy", "prompt")


def midpoint_error(sigmas: np.ndarray) -> float:
    """The publication's estimate written in alpha, sigma and log-SNR: sum of sigma_m^2 / alpha_m times the step."""
    lambdas = -2 * np.log(sigmas)
    middle = (lambdas[:-1] + lambdas[1:]) / 2
    alpha, sigma = (1 / (1 + np.exp(-middle))) ** 0.5, (1 / (1 + np.exp(middle))) ** 0.5
    return float((sigma**2 / alpha * np.diff(np.exp(lambdas / 2))).sum())


def test_no_other_inner_level_has_a_smaller_midpoint_error():
    found = search_hso_grid(FIRST, 3, LEVELS)
    between = np.geomspace(found[0], found[-1], 20_001)[1:-1]
    errors = [midpoint_error(np.array([found[0], level, found[-1]])) for level in between]
    assert midpoint_error(found) <= min(errors) * (1 + 1e-6)
    assert found[1] == pytest.approx(between[int(np.argmin(errors))], rel=0.01)


@pytest.mark.parametrize("num_steps", [1, 2, 5, 10, 20, 50])
def test_levels_fall_from_the_first_one_bit_for_bit_to_a_time_of_the_grid(num_steps: int):
    found = search_hso_grid(FIRST, num_steps, LEVELS)
    assert len(found) == num_steps and found[0] == FIRST and (np.diff(found) < 0).all()
    if num_steps > 1:
        last = (float(to_timesteps(found[-1], LEVELS)) + 1) / 1000
        assert min(abs(last - time) for time in LAST_TIMES) < 1e-9


def test_the_search_refuses_pure_noise_and_a_missing_schedule():
    table = ErrorTable(sigmas=np.geomspace(0.03, 15, 8), v=np.full(8, 0.1))
    for first, schedule in ((np.inf, LEVELS), (10.0, None)):
        with pytest.raises(VrgError, match="finite first sigma"):
            optimize([first, 1.0, 0.1], table, mode="hso_grid", schedule=schedule)


@pytest.fixture(scope="module")
def measured():
    """A toy pool of 6 steps, its configuration and its error sums."""
    from acpo_dist.config.load import load_config
    from tests.conftest import TINY

    small = [
        "sampler.num_steps=6",
        "vrg.search=hso_grid",
        "vrg.images=16",
        "vrg.batch=16",
        "vrg.gate_samples=8",
        "vrg.nodes=8",
    ]
    config = load_config("toy_sdxl", [*TINY, *small])
    pool = LocalRollouts(config, device="cpu")
    return config, pool, measure(pool, config, PROMPTS, pool.alpha_bars().numpy(), images=16, label="test")


def test_its_one_candidate_is_adopted_only_if_the_validation_passes(measured):
    config, pool, sums = measured
    base, levels = pool.trajectory(), pool.alpha_bars().numpy()
    update = consider(pool, config, PROMPTS, sums, base, levels, provenance={})
    (gate,) = update.gates
    assert update.adopted == gate.passed and gate.trust is None
    assert (update.trajectory != base) == gate.passed and "trust" not in describe(update)
    assert "vrg/gate_ratio" in update.metrics() and "vrg/trust" not in update.metrics()
    free = consider(pool, config, PROMPTS, sums, base, levels, provenance={}, prove=False).trajectory
    wanted = search_hso_grid(float(to_sigmas(base.alpha_bars[0])), base.num_steps, levels)
    assert to_sigmas(free.alpha_bars[:-1]) == pytest.approx(wanted, rel=1e-6)
    assert free.alpha_bars[0] == base.alpha_bars[0]


def test_best_adopts_the_candidate_with_the_lowest_ratio_of_both_searches(measured):
    config, pool, sums = measured
    levels, before = pool.alpha_bars().numpy(), pool.trajectory()
    # Both searches improve the few late steps of this spacing.
    base = spaced_trajectory(pool.alpha_bars(), 6, "karras")
    set_trajectory(pool, base)
    outcomes = {}
    for search in ("vrg", "hso_grid", "best"):
        vrg = config.vrg.model_copy(update={"search": search})
        chosen = config.model_copy(update={"vrg": vrg})
        outcomes[search] = consider(pool, chosen, PROMPTS, sums, base, levels, provenance={})
        set_trajectory(pool, base)
    set_trajectory(pool, before)
    best = outcomes.pop("best")
    adopted = [update for update in outcomes.values() if update.adopted]
    assert len(adopted) == 2 and best.adopted
    winner = min(adopted, key=lambda update: update.gate.ratio)
    assert best.trajectory == winner.trajectory and best.gate == winner.gate
    assert best.metrics()["vrg/gate_ratio"] == winner.gate.ratio
    assert {gate.search for gate in best.gates} == {"vrg", "hso_grid"}
    assert "by hso_grid" in describe(best) and "at trust" in describe(best)


def test_a_flow_model_has_no_candidate_of_hso_grid(measured):
    config, _, _ = measured
    best = config.model_copy(update={"vrg": config.vrg.model_copy(update={"search": "best"})})
    assert searches_of(best, LEVELS) == ("vrg", "hso_grid")
    assert searches_of(best, np.append(LEVELS, 0.0)) == ("vrg",)
