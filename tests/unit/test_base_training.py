"""Settings of the base model that a run trains for itself: timesteps and size."""

from statistics import NormalDist

import torch
from diffusers import DDPMPipeline, DDPMScheduler

from acpo_dist.models.training.denoiser import log_normal_timesteps
from acpo_dist.models.training.toy_models import new_ddpm, save_ddpm


def test_log_normal_timesteps_follow_the_documented_mixture():
    alpha_bars = DDPMScheduler(num_train_timesteps=1000).alphas_cumprod
    drawn = log_normal_timesteps(40_000, alpha_bars, torch.Generator().manual_seed(0))
    log_sigmas = 0.5 * ((1 - alpha_bars) / alpha_bars).log()
    for timestep in (50, 200, 400, 600, 900):
        normal = NormalDist(-1.0, 1.2).cdf(log_sigmas[timestep].item())
        wanted = 0.8 * normal + 0.2 * (timestep + 1) / 1000
        assert abs((drawn <= timestep).double().mean().item() - wanted) < 0.02
    assert drawn.min() >= 0 and drawn.max() <= 999


def test_a_base_model_of_any_size_is_written_as_a_pipeline_that_draws_at_that_size(tmp_path):
    save_ddpm(tmp_path, new_ddpm(64, (16, 16, 32, 32)), half=False, prediction_type="v_prediction")
    pipeline = DDPMPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=1, num_inference_steps=1, output_type="np").images
    assert images.shape == (1, 64, 64, 3)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
