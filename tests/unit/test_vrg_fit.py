"""A table is accepted by the scheduler it was measured with and refused, with a way out, by others."""

import numpy as np
import pytest

from acpo_dist.core.errors import VrgError
from acpo_dist.vrg.formats import read_error_table
from acpo_dist.vrg.levels import to_sigmas
from acpo_dist.vrg.table import ErrorTable

BETAS = np.linspace(1e-4, 0.02, 1000)
DDPM_LEVELS = np.cumprod(1 - BETAS)
SDXL_LEVELS = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
BEDROOM_TIMESTEPS = [*range(51), *range(60, 1000, 10)]


def error_at(level: float) -> float:
    return 0.5 * level**0.9 + 1e-5


def published(path, levels, timesteps, first_timestep: int):
    """A file in the published format, written from the description of the format alone."""
    places = [timestep - first_timestep for timestep in timesteps]
    rows = [f"{place + first_timestep:4d}\t{levels[place]:.6f}\t{error_at(DDPM_LEVELS[place]):.8f}" for place in places]
    path.write_text("\n".join(["# dataset: x", "# ts\talpha_bar\tMSE", *rows, "1001\t0.000000\t0.00000000", "# end"]))
    return path


@pytest.mark.parametrize("first_timestep", [0, 1])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_file_of_six_decimals_fits_its_scheduler_however_it_counts_timesteps(tmp_path, first_timestep, dtype):
    timesteps = range(first_timestep, 1000 + first_timestep)
    table = read_error_table(published(tmp_path / "table.txt", DDPM_LEVELS, timesteps, first_timestep))
    table.check_against(DDPM_LEVELS.astype(dtype))


def test_a_column_of_alpha_is_refused_by_its_name_and_the_rebuilt_table_accepted(tmp_path):
    table = read_error_table(published(tmp_path / "bedroom.txt", 1 - BETAS, BEDROOM_TIMESTEPS, 0))
    with pytest.raises(VrgError, match="does not fit") as refusal:
        table.check_against(DDPM_LEVELS)
    text = str(refusal.value)
    assert "bedroom.txt" in text and "alpha_t = 1 - beta_t" in text
    assert "on_schedule(alpha_bars_T, first_timestep=0)" in text
    rebuilt = table.on_schedule(DDPM_LEVELS, first_timestep=0)
    rebuilt.check_against(DDPM_LEVELS)
    np.testing.assert_allclose(rebuilt.alpha_bars, DDPM_LEVELS[BEDROOM_TIMESTEPS], rtol=1e-12)


def test_a_column_of_alpha_is_recognised_without_timesteps():
    levels = 1 - BETAS[::50]
    table = ErrorTable(sigmas=to_sigmas(levels), v=np.linspace(0.1, 0.2, 20))
    with pytest.raises(VrgError, match=r"found 0\.01 to 0\.1393.*\n.*the column probably holds alpha_t"):
        table.check_against(DDPM_LEVELS)


def test_one_wrong_level_is_found_and_named(tmp_path):
    levels = DDPM_LEVELS.copy()
    levels[400] *= 1.1
    table = read_error_table(published(tmp_path / "table.txt", levels, range(1000), 0))
    with pytest.raises(VrgError, match=rf"at timestep 400 .* {DDPM_LEVELS[400]:.6f}, found {levels[400]:.6f}"):
        table.check_against(DDPM_LEVELS)


def test_the_table_of_another_schedule_is_refused_with_and_without_timesteps(tmp_path):
    table = read_error_table(published(tmp_path / "table.txt", DDPM_LEVELS, range(1000), 0))
    with pytest.raises(VrgError, match=r"at timestep .* alpha_bar should be"):
        table.check_against(SDXL_LEVELS)
    with pytest.raises(VrgError, match=r"sigmas should span 0\.02917 to 14\.61, found 0\.01 to 15"):
        ErrorTable(sigmas=table.sigmas, v=table.v).check_against(SDXL_LEVELS)


def test_more_timesteps_than_the_scheduler_has_are_refused():
    table = ErrorTable(sigmas=to_sigmas(DDPM_LEVELS[:20]), v=np.ones(20), timesteps=np.arange(985, 1005))
    with pytest.raises(VrgError, match="985 to 1004, but the scheduler has 1000"):
        table.check_against(DDPM_LEVELS)
    with pytest.raises(VrgError, match="leave the schedule of 1000"):
        table.on_schedule(DDPM_LEVELS, first_timestep=0)


def test_a_table_without_timesteps_cannot_be_put_on_a_schedule():
    table = ErrorTable(sigmas=to_sigmas(DDPM_LEVELS[::50]), v=np.ones(20))
    with pytest.raises(VrgError, match="names no timesteps"):
        table.on_schedule(DDPM_LEVELS, first_timestep=0)


def test_sixteen_log_spaced_nodes_with_fractional_timesteps_fit():
    # A table as we measure it: nodes between the scheduler's levels.
    sigmas = np.geomspace(*to_sigmas(SDXL_LEVELS[[0, -1]]), 16)
    timesteps = np.interp(np.log(sigmas), np.log(to_sigmas(SDXL_LEVELS)), np.arange(1000))
    for known in (timesteps, None):
        ErrorTable(sigmas=sigmas, v=1 / (1 + sigmas), timesteps=known).check_against(SDXL_LEVELS)


@pytest.mark.parametrize(
    ("levels", "words"),
    [
        (SDXL_LEVELS[::-1], "fall strictly"),
        (np.append(SDXL_LEVELS, -1e-3), r"in \(0, 1\)"),
        (SDXL_LEVELS[:1], "at least 2"),
        (np.append(1.5, SDXL_LEVELS), r"in \(0, 1\)"),
    ],
)
def test_levels_that_are_no_schedule_are_refused(levels, words: str):
    sigmas = np.geomspace(0.03, 14, 16)
    with pytest.raises(VrgError, match=words):
        ErrorTable(sigmas=sigmas, v=1 / (1 + sigmas)).check_against(levels)
