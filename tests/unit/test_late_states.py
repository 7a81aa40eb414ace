"""Selection of the state of a sample that the learner trains on."""

import pytest
import torch

from acpo_dist.config.schema import SamplerConfig
from acpo_dist.core.errors import ConfigError
from acpo_dist.core.seeding import derive_seed
from acpo_dist.core.types import LateLatents, RolloutBatch
from acpo_dist.diffusion.trajectory import explicit_trajectory, spaced_trajectory
from acpo_dist.tracking.console import Console
from acpo_dist.training.local import open_ports
from acpo_dist.training.run import drive
from acpo_dist.workers.learner.samples import SampleStore

ALPHA_BARS = torch.linspace(0.999, 0.001, 1000, dtype=torch.float64)


def make_store(trajectory, *, stochastic: bool = False) -> SampleStore:
    late = tuple(
        LateLatents(
            denoise_step=step, timestep=trajectory.timesteps[step], alpha_bar=trajectory.alpha_bars[step],
            width=trajectory.width(step), latents_BCHW=torch.zeros(1, 1, 1, 1),
            following_BCHW=torch.zeros(1, 1, 1, 1) if stochastic else None,
            following_alpha_bar=trajectory.alpha_bars[step + 1],
        )
        for step in range(trajectory.num_steps)
    )  # fmt: skip
    batch = RolloutBatch(
        sample_ids=("a",), prompts=("",), policy_version=0, schedule_id="", latents_BCHW=torch.zeros(1, 1, 1, 1),
        late=late, images_BCHW=torch.zeros(1, 3, 1, 1, dtype=torch.uint8),
    )  # fmt: skip
    return SampleStore([batch], policy_version=0)


@pytest.mark.parametrize("timesteps", [[999, 949, 899, 500, 100, 20], [999, 300, 299, 4]])
def test_a_state_is_taken_as_often_as_its_step_covers_timesteps(timesteps):
    keys = [derive_seed("test", index) for index in range(20_000)]
    taken = make_store(explicit_trajectory(ALPHA_BARS, timesteps)).late(["a"] * len(keys), keys).timesteps_B
    for timestep, after in zip(timesteps, [*timesteps[1:], -1], strict=True):
        expected = (timestep - after) / 1000
        error = (expected * (1 - expected) / len(keys)) ** 0.5
        assert abs(float((taken == timestep).double().mean()) - expected) < 4 * error


@pytest.mark.parametrize("timesteps", [[999, 949, 899, 500, 100, 20], [999, 300, 299, 4]])
def test_every_transition_that_has_a_density_is_taken_equally_often(timesteps):
    keys = [derive_seed("test", index) for index in range(20_000)]
    store = make_store(explicit_trajectory(ALPHA_BARS, timesteps), stochastic=True)
    taken = store.late(["a"] * len(keys), keys, stochastic=True).timesteps_B
    # The last step ends clean and has none.
    expected = 1 / (len(timesteps) - 1)
    error = (expected * (1 - expected) / len(keys)) ** 0.5
    for timestep in timesteps[:-1]:
        assert abs(float((taken == timestep).double().mean()) - expected) < 4 * error


def test_a_policy_gradient_trains_on_all_transitions_by_default():
    levels = [0.9, 0.5, 0.1]
    assert SamplerConfig(eta=1.0).latest_share(levels) == 1.0 and SamplerConfig().latest_share(levels) == 0.3
    assert SamplerConfig(eta=1.0, t_max=0.4).latest_share(levels) == 0.4


def test_late_steps_are_bounded_by_the_noise_to_signal_ratio_for_every_model():
    sigmas = [(index + 1) / 1000 for index in range(1000)]
    flow = [(1 - sigma) ** 2 / ((1 - sigma) ** 2 + sigma**2) for sigma in sigmas]
    # sigma = k / (1 + k), and a timestep is 1000 sigma - 1.
    assert SamplerConfig(k_max=1.0).latest_share(flow) == pytest.approx(0.499)
    assert SamplerConfig().latest_share(flow) == pytest.approx(0.8328 / 1.8328, abs=2e-3)
    assert SamplerConfig(k_max=1.0).latest_share([0.9, 0.6, 0.5, 0.4]) == 2 / 4


def test_the_mean_timestep_of_training_does_not_depend_on_the_spacing():
    keys = [derive_seed("test", index) for index in range(20_000)]
    even = spaced_trajectory(ALPHA_BARS, 100, "trailing")
    dense_at_the_noisy_end = explicit_trajectory(ALPHA_BARS, [*range(999, 500, -10), *range(499, 0, -50)])
    means = [
        float(make_store(trajectory).late(["a"] * len(keys), keys).timesteps_B.double().mean())
        for trajectory in (even, dense_at_the_noisy_end)
    ]
    # Up to half a step's width.
    assert means[0] == pytest.approx(means[1], abs=20)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sampler.num_steps=2", "sampler.t_max=0.3"], "no denoise step lies at or below t_max"),
        (
            ["sampler.num_steps=2", "sampler.t_max=null", "sampler.k_max=0.01"],
            r"sampler\.k_max: no denoise step.*Raise sampler\.k_max",
        ),
        (
            ["algorithm={type: ddpo}", "sampler.num_steps=6", "sampler.eta=1", "sampler.t_max=0.17"],
            "does not end at the clean sample",
        ),
    ],
)
def test_a_trajectory_that_leaves_the_learner_no_state_is_refused_in_words(tiny, tmp_path, overrides, message):
    groups = ["rollout.prompts_per_iteration=2", "rollout.samples_per_prompt=4"]
    with pytest.raises(ConfigError, match=message):
        drive(tiny(*groups, *overrides, f"run.dir={tmp_path / 'run'}"), open_ports, Console(quiet=True))
