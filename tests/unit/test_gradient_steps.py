"""The reward's gradient through the last sampler steps, against torch.autograd on explicit steps."""

import pytest
import torch

from acpo_dist.algorithms.acpo import Acpo, Draft, Refl
from acpo_dist.algorithms.base import MicroBatch, TailStates
from acpo_dist.algorithms.config import AcpoConfig, DraftConfig, ReflConfig
from acpo_dist.config.relations import check_relations
from acpo_dist.core.errors import ConfigError
from acpo_dist.core.seeding import derive_seed
from acpo_dist.diffusion.prediction import to_clean
from acpo_dist.diffusion.trajectory import explicit_trajectory
from acpo_dist.models.sdxl import SdxlFamily
from acpo_dist.tracking.console import Console
from acpo_dist.tracking.jsonl import read_metrics
from acpo_dist.training.local import LocalRollouts, open_ports
from acpo_dist.training.loop import fixed_groups
from acpo_dist.training.run import drive
from acpo_dist.workers.learner.samples import SampleStore, last_steps
from tests.helpers.runs import require_drift
from tests.unit.test_guided_training import PROMPTS, SCALE, batch_of, brightness, family, gradients

TIMESTEPS = (500, 320, 150, 40)


@pytest.fixture(scope="module")
def model() -> SdxlFamily:
    return family()


def with_tail(model: SdxlFamily, steps: int, scale: float = SCALE) -> MicroBatch:
    batch = batch_of(model, scale)
    tail = TailStates(
        latents=torch.randn(2, *model.sample_shape, generator=torch.Generator().manual_seed(5)),
        trajectory=explicit_trajectory(model.alpha_bars, TIMESTEPS[-steps:]),
    )
    return MicroBatch(**{**vars(batch), "tail": tail})


def guided(model: SdxlFamily, state: torch.Tensor, timestep: int) -> torch.Tensor:
    at = torch.full((2,), timestep)
    null, conditional = (model.predict(state, at, model.encode(text)) for text in (["", ""], PROMPTS))
    return null + SCALE * (conditional - null)


def written_out(model: SdxlFamily, state: torch.Tensor, timesteps: tuple[int, ...]) -> torch.Tensor:
    """DDIM in its textbook form (eq. 12 with sigma 0), in one graph."""
    for timestep, following in zip(timesteps, (*timesteps[1:], None), strict=True):
        noise = guided(model, state, timestep)
        level = model.alpha_bars[timestep]
        clean = (state - (1 - level).sqrt().float() * noise) / level.sqrt().float()
        level = torch.tensor(1.0) if following is None else model.alpha_bars[following]
        state = level.sqrt().float() * clean + (1 - level).sqrt().float() * noise
    return state


def same(found, wanted) -> None:
    assert any(bool(value.any()) for value in wanted.values())
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4 * float(value.abs().max()))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_gradient_passes_through_the_last_steps_to_the_final_sample(model, steps):
    batch = with_tail(model, steps)
    recipe = Acpo(AcpoConfig(gradient_steps=steps))
    found = gradients(model, recipe.loss(batch, model, brightness, 0.0).per_sample.mean())
    assert model.prediction_type == "epsilon" and batch.tail is not None
    clean = written_out(model, batch.tail.latents, TIMESTEPS[-steps:])
    wanted = gradients(model, -clean.square().flatten(1).mean(1).mean())
    same(found, wanted)
    if steps > 1:
        # One step alone is another gradient.
        with torch.no_grad():
            state = batch.tail.latents
            for index in range(steps - 1):
                pair = TIMESTEPS[-steps:][index : index + 2]
                noise = guided(model, state, pair[0])
                before, after = (model.alpha_bars[timestep] for timestep in pair)
                clean = (state - (1 - before).sqrt().float() * noise) / before.sqrt().float()
                state = after.sqrt().float() * clean + (1 - after).sqrt().float() * noise
        clean = written_out(model, state, TIMESTEPS[-1:])
        alone = gradients(model, -clean.square().flatten(1).mean(1).mean())
        assert any(not torch.allclose(alone[name], value, rtol=1e-2) for name, value in wanted.items() if value.any())


def test_the_anchor_holds_one_passed_state_of_each_sample_and_no_gradient_reaches_it_through_the_states(model):
    batch = with_tail(model, 2)
    # These keys choose the second state for the first sample, and the first for the second.
    batch = MicroBatch(**{**vars(batch), "noise_keys": (1 << 32, 0)})
    recipe = Acpo(AcpoConfig.model_validate({"gradient_steps": 2, "reward_weight": 0, "anchor": {"uniform": False}}))
    loss = recipe.loss(batch, model, brightness, 1.0)
    found = gradients(model, loss.per_sample.mean())
    assert batch.tail is not None
    with torch.no_grad():
        states = [batch.tail.latents]
        noise = guided(model, states[0], TIMESTEPS[-2])
        before, after = (model.alpha_bars[timestep] for timestep in TIMESTEPS[-2:])
        clean = (states[0] - (1 - before).sqrt().float() * noise) / before.sqrt().float()
        states.append(after.sqrt().float() * clean + (1 - after).sqrt().float() * noise)
    noisy = torch.stack([states[1][0], states[0][1]])
    at = torch.tensor([TIMESTEPS[-1], TIMESTEPS[-2]])
    drifts = []
    for text in (["", ""], PROMPTS):
        policy = model.predict(noisy, at, model.encode(text))
        with torch.no_grad(), model.anchored():
            base = model.predict(noisy, at, model.encode(text))
        drifts.append((policy - base).square().flatten(1).mean(1))
    wanted = (drifts[0] + drifts[1]) / 2
    torch.testing.assert_close(loss.metrics["anchor/late"], wanted.detach(), rtol=1e-4, atol=1e-9)
    same(found, gradients(model, wanted.mean()))


def test_low_variance_samples_average_the_last_step_over_fresh_noise(model):
    batch = with_tail(model, 1)
    recipe = Draft(DraftConfig(low_variance_samples=3))
    found = gradients(model, recipe.loss(batch, model, brightness, 0.0).per_sample.mean())
    total, level = torch.zeros(()), model.alpha_bars[TIMESTEPS[-1]]
    for index in range(3):
        seeds = [derive_seed("low variance", key, index) for key in batch.noise_keys]
        noise = torch.stack(
            [torch.randn(batch.clean.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        )
        noisy = level.sqrt().float() * batch.clean + (1 - level).sqrt().float() * noise
        clean = written_out(model, noisy, TIMESTEPS[-1:])
        total = total - clean.square().flatten(1).mean(1).mean() / 3
    same(found, gradients(model, total))


def test_refl_scores_the_estimate_at_the_rollouts_own_state_and_stops_at_the_target(model):
    batch = batch_of(model)
    recipe = Refl(ReflConfig())
    found = gradients(model, recipe.loss(batch, model, brightness, 0.0).per_sample.mean())
    # The target is 0 and every quality is above it.
    assert not any(bool(value.any()) for value in found.values())
    late = batch.late
    output = model.predict(late.latents, late.timesteps_B, model.encode(PROMPTS))
    clean = to_clean(output, late.latents, late.alpha_bars_B, model.prediction_type)
    loss = Refl(ReflConfig(shape="identity")).loss(batch, model, brightness, 0.0)
    same(gradients(model, loss.per_sample.mean()), gradients(model, -clean.square().flatten(1).mean(1).mean()))


STEPS = ("sampler.num_steps=4", "sampler.late_per_sample=4", "sampler.t_max=1.0")


def test_the_last_steps_of_a_rollout_lead_to_its_own_clean_sample(tiny):
    config = tiny(*STEPS, "sampler.guidance_scale=1")
    rollouts = LocalRollouts(config, device="cpu")
    (handle,) = rollouts.generate(fixed_groups(config, list(PROMPTS), 2, stream="test"))
    store = SampleStore([handle.payload], policy_version=None)
    tail = store.tail(handle.sample_ids, 3)
    with open_ports(config, None) as ports, torch.no_grad():  # type: ignore[arg-type]
        network = ports.learner.worker.family
        state = tail.latents
        for step, timestep in enumerate(tail.trajectory.timesteps):
            at = torch.full((2,), timestep)
            noise = network.predict(state, at, network.encode(handle.prompts))
            before, after = (torch.tensor(level) for level in tail.trajectory.alpha_bars[step : step + 2])
            clean = (state - (1 - before).sqrt() * noise) / before.sqrt()
            state = after.sqrt() * clean + (1 - after).sqrt() * noise
    torch.testing.assert_close(state, handle.payload.latents_BCHW, rtol=1e-3, atol=1e-3)
    assert store.longest_tail(handle.sample_ids) == 4
    with pytest.raises(ConfigError, match="late_per_sample"):
        store.tail(handle.sample_ids, 5)


def test_a_gap_in_the_kept_states_ends_the_tail(tiny):
    config = tiny("sampler.num_steps=6", "sampler.late_per_sample=3", "sampler.t_max=1.0")
    (handle,) = LocalRollouts(config, device="cpu").generate(fixed_groups(config, list(PROMPTS), 2, stream="test"))
    assert [late.denoise_step for late in last_steps(handle.payload)] == [5]


@pytest.mark.parametrize(
    "how",
    [
        "algorithm={type: acpo, gradient_steps: random, max_gradient_steps: 3}",
        "algorithm={type: draft, low_variance_samples: 2}",
    ],
)
def test_a_run_through_sampler_steps_trains_and_reports_its_drift(tiny, tmp_path, how):
    config = tiny(*STEPS, how, "run.iterations=2", f"run.dir={tmp_path / 'run'}")
    drive(config, open_ports, Console(quiet=True))
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    # Batches of other sizes are rounded differently.
    require_drift(rows, rounding=1e-5)
    assert rows[1]["drift/rms"] > 1e-4


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (("algorithm.gradient_steps=2", "sampler.solver=dpmpp_2m"), "sampler.solver"),
        (("algorithm.gradient_steps=9", "sampler.late_per_sample=8"), "sampler.late_per_sample"),
        (("algorithm={type: draft, gradient_steps: 2, low_variance_samples: 2}",), "algorithm.low_variance_samples"),
    ],
)
def test_steps_that_cannot_be_repeated_are_rejected(tiny, overrides, key):
    with pytest.raises(ConfigError, match=key):
        check_relations(tiny(*overrides))
