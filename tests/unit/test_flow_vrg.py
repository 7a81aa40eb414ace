"""Variance-Reduction Guidance on flow models: J in velocity, timesteps, and trajectories that start at pure noise."""

import numpy as np
import pytest
import torch
from torch import Tensor

from acpo_dist.config.load import load_config
from acpo_dist.core.errors import VrgError
from acpo_dist.diffusion.flow import flow_alpha_bar, flow_alpha_bars, flow_inputs, flow_sigma, flow_trajectory
from acpo_dist.diffusion.prediction import flow_scale
from acpo_dist.diffusion.sampling import sample
from acpo_dist.training.open_model import open_rollouts
from acpo_dist.training.trajectory.artefact import trajectory_from_mapping, trajectory_to_mapping
from acpo_dist.training.trajectory.measure import measure
from acpo_dist.training.trajectory.validate import consider
from acpo_dist.vrg.levels import to_sigmas
from acpo_dist.vrg.objective import cumulative_error
from acpo_dist.vrg.optimize import optimize
from acpo_dist.vrg.table import ErrorTable
from acpo_dist.vrg.timesteps import to_timesteps
from tests.conftest import TINY
from tests.unit.test_flow import KIND, gaussian_velocity
from tests.unit.test_flow_families import flow_sdxl

TABLE_T = flow_alpha_bars(1000).numpy()
STEPS = (1.0, 0.9, 0.7, 0.4, 0.15)


def velocity_error(sigma: float) -> float:
    """An error of the velocity that falls towards both ends, as trained flow models have it."""
    return 0.05 + 0.2 * sigma * (1 - sigma)


def table() -> ErrorTable:
    flow = np.linspace(0.001, 0.999, 60)
    noise_units = [(1 - sigma) ** 2 * velocity_error(sigma) for sigma in flow]
    return ErrorTable(sigmas=flow / (1 - flow), v=np.array(noise_units))


def velocity_j(sigmas: tuple[float, ...]) -> float:
    ends = (*sigmas[1:], 0.0)
    terms = [((a - b) / (1 - b)) ** 2 * velocity_error(a) for a, b in zip(sigmas, ends, strict=True)]
    return sum(terms)


def test_j_in_velocity_is_j_in_noise_units_and_the_first_step_weighs_one() -> None:
    finite = np.array(STEPS[1:])
    rest = cumulative_error(finite / (1 - finite), table())
    assert velocity_j(STEPS) == pytest.approx(velocity_error(1.0) + rest, rel=1e-3)


def test_j_in_velocity_is_the_variance_that_independent_velocity_errors_add_to_the_end() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4000, 4, generator=generator, dtype=torch.float64)
    trajectory = flow_trajectory([*STEPS, 0.0], 1000)
    frozen: list[Tensor] = []

    def exact(noisy: Tensor, at: Tensor) -> Tensor:
        state, times = flow_inputs(noisy, at, 1000)
        sigma = float(times[0]) / 1000
        velocity = gaussian_velocity(state, sigma)
        frozen.append(state + (1 - sigma) * velocity)
        return velocity

    clean = sample(exact, start, trajectory, KIND)
    step = iter(range(len(STEPS)))

    def disturbed(noisy: Tensor, at: Tensor) -> Tensor:
        """The noise prediction of the undisturbed run, with an independent error of the velocity."""
        index = next(step)
        sigma = STEPS[index]
        level = torch.full((len(noisy),), flow_alpha_bar(sigma), dtype=torch.float64)
        state = flow_scale(level, noisy) * noisy
        velocity = gaussian_velocity(state, sigma) if sigma == 1 else (frozen[index] - state) / (1 - sigma)
        return velocity + velocity_error(sigma) ** 0.5 * torch.randn(noisy.shape, generator=generator).double()

    moved = sample(disturbed, start, trajectory, KIND)
    # 16,000 elements: the variance has a standard error of 1.1 %.
    assert float((moved - clean).var()) == pytest.approx(velocity_j(STEPS), rel=0.06)


def test_timesteps_of_a_flow_model_are_exact_between_the_levels_of_the_table() -> None:
    flow = np.array([1.0, 0.87654, 0.5, 0.0333])
    with np.errstate(divide="ignore"):
        found = to_timesteps(flow / (1 - flow), TABLE_T)
    assert found == pytest.approx(1000 * flow - 1, abs=1e-9)
    with pytest.raises(VrgError, match="range"):
        to_timesteps([0.0005], TABLE_T)


def test_a_trajectory_from_pure_noise_keeps_its_first_two_levels_and_lowers_j() -> None:
    base = flow_trajectory([*STEPS, 0.0], 1000)
    found = optimize(to_sigmas(base.alpha_bars[:-1]), table(), sigma_min=float(to_sigmas(TABLE_T)[0]))
    assert found.alpha_bars[0] == 0
    assert found.sigmas[1] == pytest.approx(to_sigmas(base.alpha_bars[1]))
    assert found.j1 < found.j0
    flow = tuple(flow_sigma(level) for level in found.alpha_bars)
    assert velocity_j(flow) < velocity_j(STEPS)


def test_an_artefact_keeps_a_trajectory_from_pure_noise_bit_for_bit() -> None:
    base = flow_trajectory([*STEPS, 0.0], 1000)
    mapping = trajectory_to_mapping(base, TABLE_T)
    assert trajectory_from_mapping(mapping) == base
    assert mapping["integer_timesteps"][0] == 999


def test_a_flow_model_is_measured_optimised_and_validated(tmp_path) -> None:
    overrides = [
        f"model.path={flow_sdxl(tmp_path)}", "vrg.enabled=true", "vrg.batch=4", "vrg.nodes=8", "vrg.gate_samples=4",
        "vrg.reference_steps=24", "vrg.min_gain=0", f"run.dir={tmp_path / 'run'}",
    ]  # fmt: skip
    config = load_config("toy_sdxl", [*TINY, *overrides])
    pool = open_rollouts(config, None)
    try:
        sums = measure(pool, config, ["a"], pool.alpha_bars().numpy(), images=4, label="test")
        before = pool.trajectory()
        update = consider(pool, config, ["a"], sums, before, pool.alpha_bars().numpy(), provenance={})
    finally:
        pool.close()
    assert np.isfinite(sums.v).all()
    assert update.gates
    assert update.trajectory.alpha_bars[0] == 0
