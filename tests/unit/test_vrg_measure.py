"""Measuring the prediction error: against an analytic denoiser, whatever the sharding and the prediction type."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from acpo_dist.core.errors import VrgError
from acpo_dist.diffusion.clean_rule import NO_RULE, CleanRule
from acpo_dist.models.family import Condition
from acpo_dist.vrg.sums import sums_of
from acpo_dist.workers.rollout.errors import measure_errors

ALPHA_BARS = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
SIGMAS = np.exp(np.linspace(np.log(0.02), np.log(50), 12))
VARIANCE = 0.6


class GaussianDenoiser:
    """The exact posterior mean for data N(0, VARIANCE), in any prediction type; the null branch answers nothing."""

    conditional = True
    device = "cpu"
    alpha_bars = ALPHA_BARS

    def __init__(self, prediction_type: str = "epsilon", rule: CleanRule = NO_RULE) -> None:
        self.prediction_type = prediction_type
        self.clean_rule = rule

    def encode(self, prompts):
        return Condition({"known": torch.tensor([1.0 if prompt else 0.0 for prompt in prompts])})

    def predict(self, noisy, timesteps_B, condition):
        log_sigma = np.log(((1 - ALPHA_BARS) / ALPHA_BARS).sqrt().numpy())
        at = np.exp(np.interp(timesteps_B.double(), np.arange(1000), log_sigma))
        sigma = torch.from_numpy(at)[:, None, None, None]
        signal, spread = 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()
        eps = sigma * (noisy.double() / signal) / (sigma**2 + VARIANCE)
        clean = (noisy.double() - spread * eps) / signal
        model_output = {"epsilon": eps, "sample": clean, "v_prediction": signal * eps - spread * clean}[
            self.prediction_type
        ]
        return (model_output * condition.tensors["known"][:, None, None, None]).float()


def data(count: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    clean = VARIANCE**0.5 * torch.randn(count, 3, 4, 4, generator=generator)
    return clean, ["x"] * count, [f"s{index}" for index in range(count)]


def test_the_error_of_an_exact_denoiser_is_the_posterior_variance_within_four_standard_errors():
    sums = measure_errors(GaussianDenoiser(), *data(400), SIGMAS.tolist())
    exact = VARIANCE / (VARIANCE + SIGMAS**2)
    assert np.all(np.abs(sums.v - exact) < 4 * sums.standard_errors)
    # The test could not fail if the standard errors were huge.
    assert np.all(sums.standard_errors < 0.05 * exact)
    # Three channels at twelve nodes that share their noise: a z-score of 4 has a chance of a few in a thousand.
    assert max(sums.diagnostics()["bias_z"]) < 4


def test_the_error_is_measured_after_the_schedulers_clip_and_its_share_is_recorded():
    class Two(GaussianDenoiser):
        def predict(self, noisy, timesteps_B, condition):
            return torch.full_like(noisy, 2.0)

    clean, prompts, ids = data(8)
    family = Two("sample", CleanRule(limit=0.5))
    sums = measure_errors(family, clean, prompts, ids, SIGMAS.tolist())
    # x0-hat is 0.5 after the clip, so eps-hat - eps = (x_0 - 0.5) / sigma.
    exact = float((clean - 0.5).square().mean()) / SIGMAS**2
    np.testing.assert_allclose(sums.v, exact, rtol=1e-4)
    assert sums.clipped.tolist() == [1.0] * len(SIGMAS)
    inside = measure_errors(Two("sample", CleanRule(limit=2.0)), clean, prompts, ids, SIGMAS.tolist())
    assert inside.clipped.tolist() == [0.0] * len(SIGMAS) and inside.diagnostics()["clipped"] == [0.0] * len(SIGMAS)


def test_neighbouring_nodes_correlate_as_shared_noise_makes_them():
    sums = measure_errors(GaussianDenoiser(), *data(400), SIGMAS.tolist())
    s, t = SIGMAS[:-1], SIGMAS[1:]
    exact = (s * t + VARIANCE) / np.sqrt((s**2 + VARIANCE) * (t**2 + VARIANCE))
    assert np.allclose(sums.diagnostics()["lag1_correlation"][:-1], exact, atol=0.02)


def test_the_table_does_not_depend_on_the_sharding():
    clean, prompts, ids = data(24)
    whole = measure_errors(GaussianDenoiser(), clean, prompts, ids, SIGMAS.tolist())
    parts = [
        measure_errors(GaussianDenoiser(), clean[rows], prompts[rows], ids[rows], SIGMAS.tolist())
        for rows in (slice(0, 5), slice(5, 6), slice(6, 17), slice(17, 24))
    ]
    merged = parts[2] + parts[0] + parts[3] + parts[1]
    assert merged.count == 24
    for name in ("v", "standard_errors", "gram_KK", "channel_KC", "fourth_K", "clipped_K"):
        assert np.allclose(getattr(merged, name), getattr(whole, name), rtol=1e-12, atol=0), name


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_all_prediction_types_of_one_network_have_one_error_table(prediction_type):
    expected = measure_errors(GaussianDenoiser(), *data(16), SIGMAS.tolist())
    found = measure_errors(GaussianDenoiser(prediction_type), *data(16), SIGMAS.tolist())
    assert np.allclose(found.v, expected.v, rtol=2e-3)


def test_streaming_sums_equal_the_two_pass_formulas():
    e = np.random.default_rng(1).normal(size=(9, 20, 2, 7)) ** 3 + 0.1
    sums = sums_of(np.arange(1, 10) / 10, e)
    m = (e**2).mean((2, 3))
    assert np.allclose(sums.v, m.mean(1), rtol=1e-12)
    assert np.allclose(sums.standard_errors, m.std(1, ddof=1) / 20**0.5, rtol=1e-9)
    assert np.allclose(sums.diagnostics()["excess_kurtosis"], (e**4).mean((1, 2, 3)) / m.mean(1) ** 2 - 3, rtol=1e-12)


def test_a_biased_prediction_is_seen():
    e = np.random.default_rng(2).normal(size=(9, 64, 3, 16))
    centred, shifted = sums_of(np.arange(1, 10) / 10, e), sums_of(np.arange(1, 10) / 10, e + 0.3)
    assert max(centred.diagnostics()["bias_z"]) < 4.5 < min(shifted.diagnostics()["bias_z"])
    assert np.mean(shifted.diagnostics()["bias_ratio"]) == pytest.approx(0.09 / 1.09, rel=0.1)


def test_sums_of_different_nodes_are_not_merged():
    e = np.ones((8, 2, 1, 4))
    one = sums_of(np.arange(1, 9) / 10, e)
    with pytest.raises(VrgError, match="different nodes"):
        one + replace(one, sigmas=one.sigmas * 2)


def test_a_network_that_answers_nan_gives_no_table():
    class Broken(GaussianDenoiser):
        def predict(self, noisy, timesteps_B, condition):
            return torch.full_like(noisy, float("nan"))

    with pytest.raises(VrgError, match="not finite"):
        measure_errors(Broken(), *data(2), SIGMAS.tolist())
