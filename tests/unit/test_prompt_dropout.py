"""Prompt dropout and offset noise of the denoising losses."""

from dataclasses import replace

import torch

from acpo_dist.algorithms.noising import noise_forward
from acpo_dist.algorithms.preference import Sft
from tests.unit.test_guided_training import batch_of, brightness, family


def test_a_dropped_prompt_is_trained_as_the_empty_prompt():
    model = family()
    batch = batch_of(model, 1.0)
    batch = replace(batch, noise_keys=(7, 7) * (len(batch.noise_keys) // 2))
    empty = replace(batch, prompts=("",) * len(batch.prompts))
    dropped, without = (
        Sft(Sft.Config(prompt_dropout=share)).loss(one, model, brightness, 0.0).per_sample
        for share, one in ((1 - 1e-9, batch), (0.0, empty))
    )
    torch.testing.assert_close(dropped, without)
    kept = Sft(Sft.Config()).loss(batch, model, brightness, 0.0).per_sample
    assert not torch.allclose(kept, without)


def test_offset_noise_adds_one_constant_per_sample_and_channel():
    model = family()
    batch = batch_of(model, 1.0)
    plain, shifted = (noise_forward(batch, model, offset=offset) for offset in (0.0, 0.1))
    difference = shifted.noise - plain.noise
    assert torch.equal(shifted.timesteps_B, plain.timesteps_B)
    torch.testing.assert_close(difference, difference.mean((2, 3), keepdim=True).expand_as(difference))
    assert len(difference[:, :, 0, 0].unique()) == difference[:, :, 0, 0].numel()
