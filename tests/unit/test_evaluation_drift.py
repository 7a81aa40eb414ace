"""Drift, denoising error and path KL against closed forms and torch.distributions."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from acpo_dist.diffusion.prediction import signal_and_noise
from acpo_dist.evaluation.metrics.distances import SampleError
from acpo_dist.evaluation.metrics.drift import kl_weights, output_errors, path_kl
from acpo_dist.models.family import Condition

ALPHA_BARS = torch.linspace(0.999, 0.05, 50, dtype=torch.float64)


class KnownFamily:
    """Predicts a single known image; the policy's output is off by `offset` times (1 + the prompt's length)."""

    conditional = True
    sample_shape = (2, 4, 4)

    def __init__(self, prediction_type: str = "epsilon", offset: float = 0.0) -> None:
        self.alpha_bars, self.prediction_type, self.offset = ALPHA_BARS, prediction_type, offset
        self.network = nn.Linear(1, 1)
        self.image = torch.linspace(-1, 1, 32).reshape(2, 4, 4)

    def encode(self, prompts):
        return Condition({"length": torch.tensor([float(len(prompt)) for prompt in prompts])})

    def predict(self, noisy, timesteps_B, condition):
        signal, spread = signal_and_noise(self.alpha_bars[timesteps_B.long()], noisy)
        noise = (noisy - signal * self.image) / spread
        exact = noise if self.prediction_type == "epsilon" else signal * noise - spread * self.image
        return exact + self.offset * (1 + condition.tensors["length"])[:, None, None, None]

    @contextmanager
    def anchored(self):
        offset, self.offset = self.offset, 0.0
        yield
        self.offset = offset

    def clean(self, count: int) -> torch.Tensor:
        return self.image.expand(count, -1, -1, -1)


def test_a_perfect_base_has_no_denoising_error_and_the_offset_is_the_drift():
    family = KnownFamily(offset=0.1)
    errors = output_errors(family, family.clean(5), ["x"] * 5, [3, 20, 40])
    for timestep in (3, 20, 40):
        assert errors.anchor[timestep] == pytest.approx(0.04, rel=1e-4)
        assert errors.denoising[timestep] == pytest.approx(0.04, rel=1e-3)
        # float32 noise recovered from x_t by a division by s.
        assert errors.base_denoising[timestep] == pytest.approx(0, abs=1e-8)
    assert errors.num_samples == 5


def test_drift_of_a_velocity_model_is_given_in_noise_units():
    family = KnownFamily("v_prediction", offset=0.1)
    errors = output_errors(family, family.clean(3), [""] * 3, [10, 30])
    for timestep in (10, 30):
        # eps = a v in differences.
        assert errors.anchor[timestep] == pytest.approx(0.01 * float(ALPHA_BARS[timestep]), rel=1e-4)


def test_every_sample_has_its_own_prompt_in_any_batch():
    family = KnownFamily(offset=0.1)
    prompts = ["", "a", "abc", "", "ab"]
    wanted = sum((0.1 * (1 + len(prompt))) ** 2 for prompt in prompts) / 5
    for batch_size in (1, 2, 16):
        errors = output_errors(family, family.clean(5), prompts, [25], batch_size=batch_size)
        assert errors.anchor[25] == pytest.approx(wanted, rel=1e-4)


def test_noise_follows_from_the_seed_and_not_from_the_batch():
    class Silent(KnownFamily):
        """Its denoising error is the mean square of the noise drawn."""

        def predict(self, noisy, timesteps_B, condition):
            return torch.zeros_like(noisy)

    family = Silent()
    clean = family.clean(4)

    def error(**options: int) -> float:
        return output_errors(family, clean, [""] * 4, [25], **options).denoising[25]

    assert error(batch_size=1) == pytest.approx(error(batch_size=3), rel=1e-6)
    assert error(seed=1) != pytest.approx(error(seed=0), rel=1e-6)


def test_drift_without_samples_is_refused():
    family = KnownFamily()
    with pytest.raises(SampleError, match="found 0 and 0"):
        output_errors(family, family.clean(0), [], [3])


@pytest.mark.parametrize("timestep", [0, 1, 25, 49])
def test_the_kl_weight_is_that_of_two_gaussian_reverse_steps(timestep: int):
    before = 1.0 if timestep == 0 else float(ALPHA_BARS[timestep - 1])
    level = float(ALPHA_BARS[timestep])
    alpha = level / before
    beta = 1 - alpha
    state, first, second = (
        torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(3)
    )

    def step(noise: torch.Tensor) -> Normal:
        """DDPM's reverse step, eq. 11 of Ho et al., with variance beta."""
        return Normal((state - beta / (1 - level) ** 0.5 * noise) / alpha**0.5, beta**0.5)

    wanted = float(kl_divergence(step(first), step(second)).sum())
    weight = float(kl_weights(ALPHA_BARS)[timestep])
    assert weight * float((first - second).square().sum()) == pytest.approx(wanted, rel=1e-9)


def test_the_path_kl_is_the_weighted_sum_when_every_timestep_was_measured():
    drift = {timestep: 0.01 * (1 + timestep % 3) for timestep in range(50)}
    wanted = sum(float(kl_weights(ALPHA_BARS)[timestep]) * value * 32 for timestep, value in drift.items())
    assert path_kl(drift, ALPHA_BARS, 32) == pytest.approx(wanted, rel=1e-12)


def test_the_path_kl_interpolates_between_measured_timesteps_and_holds_beyond():
    measured = {10.0: 0.01, 30.0: 0.03}
    full = {timestep: min(0.03, max(0.01, 0.001 * timestep)) for timestep in range(50)}
    assert path_kl(measured, ALPHA_BARS, 8) == pytest.approx(path_kl(full, ALPHA_BARS, 8), rel=1e-12)


@pytest.mark.parametrize("drift", [{}, {50: 0.1}, {-1: 0.1}], ids=["none", "too late", "too early"])
def test_a_path_kl_from_no_or_impossible_timesteps_is_refused(drift: dict[int, float]):
    with pytest.raises(SampleError, match=r"0\.\.49"):
        path_kl(drift, ALPHA_BARS, 8)
