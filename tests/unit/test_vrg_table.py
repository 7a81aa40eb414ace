"""The error table: the curve through its nodes, its continuation outside them, and what is refused."""

import numpy as np
import pytest

from acpo_dist.core.errors import VrgError
from acpo_dist.vrg.levels import to_alpha_bars, to_sigmas
from acpo_dist.vrg.objective import cumulative_error
from acpo_dist.vrg.table import MIN_NODES, ErrorTable

VARIANCE = 0.25
NODES = np.geomspace(0.0292, 14.61, 16)


def gaussian_error(sigmas):
    """Closed form: the error that a perfect network leaves on Gaussian data of this variance."""
    return VARIANCE / (VARIANCE + sigmas**2)


def table(**changes) -> ErrorTable:
    return ErrorTable(**{"sigmas": NODES, "v": gaussian_error(NODES)} | changes)


def test_sixteen_nodes_follow_the_error_of_a_perfect_network_on_gaussian_data():
    between = np.geomspace(0.03, 14.5, 1000)
    # Cubic between nodes a factor 1.5 apart: the fourth derivative of log v in log sigma is below 1.
    np.testing.assert_allclose(table().value(between), gaussian_error(between), rtol=3e-3)


@pytest.mark.parametrize("exponent", [0.0, -0.5, -1.7])
def test_a_power_law_is_exact_between_the_nodes_and_beyond_both_ends(exponent: float):
    anywhere = np.geomspace(1e-3, 1e3, 301)
    value, slope = table(v=3 * NODES**exponent).value_and_slope(anywhere)
    np.testing.assert_allclose(value, 3 * anywhere**exponent, rtol=1e-12)
    np.testing.assert_allclose(slope, 3 * exponent * anywhere ** (exponent - 1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("exponent", "limited"), [(1.0, 0.0), (-3.0, -2.0)])
def test_beyond_the_ends_the_slope_is_kept_to_what_irreducible_error_can_have(exponent: float, limited: float):
    values = table(v=NODES**exponent).value(np.array([NODES[-1], 2 * NODES[-1], NODES[0], NODES[0] / 2]))
    np.testing.assert_allclose(values[1] / values[0], 2.0**limited, rtol=1e-12)
    np.testing.assert_allclose(values[3] / values[2], 0.5**limited, rtol=1e-12)


@pytest.mark.parametrize("interpolation", ["log_cubic", "linear_alpha_bar"])
def test_the_slope_is_the_derivative_of_the_value(interpolation):
    curve = table(interpolation=interpolation)
    where = np.geomspace(0.02, 20, 97)  # none of them on a node, where the linear curve has a kink
    step = 1e-6 * where
    differences = (curve.value(where + step) - curve.value(where - step)) / (2 * step)
    # Rounding of v (1e-16) over the step (2e-8 at least), relative to slopes of 1e-4 and more.
    np.testing.assert_allclose(curve.value_and_slope(where)[1], differences, rtol=1e-6, atol=1e-8)


def test_linear_interpolation_is_that_of_the_publication():
    curve = table(interpolation="linear_alpha_bar")
    levels, values = to_alpha_bars(NODES), gaussian_error(NODES)
    inside = np.linspace(levels[-1], levels[0], 501)
    np.testing.assert_allclose(
        curve.value(to_sigmas(inside)), np.interp(inside, levels[::-1], values[::-1]), rtol=1e-10
    )
    # Noisier than the last node: towards the safeguard row, v = 0 at alpha_bar = 0.
    np.testing.assert_allclose(curve.value(to_sigmas(levels[-1] / 3)), values[-1] / 3, rtol=1e-12)
    # Cleaner than the first: on along the first segment.
    beyond = levels[0] + (1 - levels[0]) / 2
    rise = (values[0] - values[1]) / (levels[0] - levels[1]) * (beyond - levels[0])
    np.testing.assert_allclose(curve.value(to_sigmas(beyond)), values[0] + rise, rtol=1e-10)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_the_order_and_the_type_of_the_nodes_do_not_matter(dtype):
    sigmas, v = NODES.astype(dtype), gaussian_error(NODES).astype(dtype)
    shuffle = np.random.default_rng(0).permutation(len(NODES))
    plain = ErrorTable(sigmas=sigmas, v=v, standard_errors=v / 100, timesteps=np.arange(16))
    mixed = ErrorTable(
        sigmas=sigmas[shuffle].tolist(),  # type: ignore[arg-type]
        v=v[shuffle],
        standard_errors=(v / 100)[shuffle],
        timesteps=np.arange(16)[shuffle],
    )
    assert plain.hash == mixed.hash
    for name in ("sigmas", "v", "standard_errors", "timesteps"):
        assert getattr(plain, name).dtype == np.float64
        assert np.array_equal(getattr(plain, name), getattr(mixed, name))


def test_a_change_of_any_node_changes_the_hash_and_the_curve_through_them_does_not():
    other_v, other_sigma = gaussian_error(NODES), NODES.copy()
    other_v[7] *= 1 + 1e-12
    other_sigma[7] *= 1 + 1e-12
    changed = (table(), table(v=other_v), table(sigmas=other_sigma))
    assert len({entry.hash for entry in changed}) == 3
    assert table().with_interpolation("linear_alpha_bar").hash == table().hash


def test_nodes_cannot_be_changed_afterwards():
    with pytest.raises(ValueError, match="read-only"):
        table().v[0] = 1.0


def test_interpolated_nodes_leave_the_objective_as_it_was():
    trajectory = np.geomspace(14.61, 0.0292, 20)
    for interpolation, tolerance in (("linear_alpha_bar", 1e-12), ("log_cubic", 1e-3)):
        # A line through more of its points is the same line; a cubic estimates its slopes anew from nearer neighbours.
        coarse = table(interpolation=interpolation)
        nodes = np.sort(np.concatenate([NODES, np.sqrt(NODES[1:] * NODES[:-1])]))
        fine = ErrorTable(sigmas=nodes, v=coarse.value(nodes), interpolation=interpolation)
        wanted = cumulative_error(trajectory, coarse)
        assert cumulative_error(trajectory, fine) == pytest.approx(wanted, rel=tolerance)


BAD = {
    "too few": ({"sigmas": NODES[:7], "v": NODES[:7]}, f"at least {MIN_NODES} nodes"),
    "two lengths": ({"v": NODES[:-1]}, "one length"),
    "matrix": ({"sigmas": NODES.reshape(4, 4), "v": NODES.reshape(4, 4)}, "vectors of one length"),
    "equal sigmas": ({"sigmas": np.where(np.arange(16) == 3, NODES[2], NODES)}, "share sigma"),
    "sigma 0": ({"sigmas": np.append(NODES[1:], 0.0)}, "sigma must be finite and positive"),
    "infinite sigma": ({"sigmas": np.append(NODES[:-1], np.inf)}, "sigma must be finite and positive"),
    "v 0": ({"v": np.append(NODES[1:], 0.0)}, "v must be finite and positive, found 0 at node 16"),
    "v nan": ({"v": np.append(NODES[1:], np.nan)}, "v must be finite and positive"),
    "negative standard error": ({"standard_errors": -NODES}, "standard errors"),
    "unknown curve": ({"interpolation": "quadratic"}, "'quadratic'; known: log_cubic, linear_alpha_bar"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_table_that_is_none_is_refused(name: str):
    changes, words = BAD[name]
    with pytest.raises(VrgError, match=words):
        table(**changes)
    assert VrgError.exit_code == 2
