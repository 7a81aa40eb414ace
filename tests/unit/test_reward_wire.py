"""Tensors between learner and pool: half precision with a scale per sample."""

import pytest
import torch

from acpo_dist.workers.reward.wire import pack, unpack
from tests.unit.test_rewards import relative_error, rng


@pytest.mark.parametrize("magnitude", [1e-12, 3e-9, 1e-7, 1e-3, 1.0, 7e4, 1e6])
def test_half_precision_with_a_scale_is_good_to_half_a_per_mille_at_any_magnitude(magnitude: float):
    values = magnitude * torch.randn(8, 4, 8, 8, generator=rng(0))
    values[3] = 0
    found = unpack(pack(values, "float16"))
    assert found.dtype == torch.float32 and torch.equal(found[3], values[3])
    peak = values.flatten(1).abs().amax(1).reshape(-1, 1, 1, 1)
    # 11 significant bits round by at most 2**-11 = 4.9e-4; far below an image's own peak by 2**-25 of the peak.
    assert bool(((found - values).abs() <= 5e-4 * values.abs() + 2**-25 * peak).all())


def test_samples_of_very_different_magnitude_do_not_cost_each_other_precision():
    values = torch.randn(2, 3, 4, 4, generator=rng(0)) * torch.tensor([1e-12, 1e6]).reshape(-1, 1, 1, 1)
    assert relative_error(unpack(pack(values, "float16")), values) <= 5e-4


@pytest.mark.parametrize("value", [1.0, 65504.0, 1e-38, 1e-40, 3e38, -0.75, 2.0**-126, 2.0**-149])
def test_single_numbers_survive_at_the_ends_of_float32(value: float):
    found = unpack(pack(torch.tensor([[value]]), "float16"))
    # Below 2**-126 float32 itself has steps of 1.4e-45.
    assert found.item() == pytest.approx(value, rel=5e-4, abs=1.4e-45)


def test_full_precision_is_exact():
    values = torch.cat([10.0**power * torch.randn(1, 3, 5, generator=rng(power + 12)) for power in range(-12, 7)])
    assert torch.equal(unpack(pack(values, "float32")), values)


def test_half_precision_halves_what_travels():
    values = torch.zeros(4, 3, 8, 8)
    per_sample = 2
    assert pack(values, "float32").nbytes == 4 * values.numel() + per_sample * 4
    assert pack(values, "float16").nbytes == 2 * values.numel() + per_sample * 4
