"""Rollouts equal diffusers' own runs, and workers hold the weights that they were sent."""

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from acpo_dist.config.schema import SamplerConfig
from acpo_dist.core.errors import WeightSyncError
from acpo_dist.core.types import RolloutBatch, SamplePlan, WeightBundle
from acpo_dist.core.weights import make_bundle
from acpo_dist.models.family import trainable_tensors
from acpo_dist.workers.rollout.worker import RolloutWorker
from tests.helpers.models import (
    ASSETS,
    PROMPTS,
    SAMPLER,
    change_json,
    ddim,
    load,
    on_latents,
    open_base,
    plans,
    rollout_worker,
    start_noise,
    toy_copy,
    tune,
)

# Rollouts


@pytest.fixture(scope="module")
def shared() -> RolloutWorker:
    """A worker whose weights no test changes."""
    return rollout_worker()


GUIDANCE = {"guided": (5.0, 0.0), "rescaled": (5.0, 0.7), "conditional": (1.0, 0.0)}
# Guidance and conversion are the same code for every family: sd15 meets each setting once.
DDIM_RUNS = [
    *(("sdxl", prediction_type, how) for prediction_type in ("epsilon", "v_prediction") for how in GUIDANCE),
    ("sd15", "epsilon", "guided"),
    ("sd15", "v_prediction", "rescaled"),
    ("sd15", "epsilon", "conditional"),
]


@pytest.mark.parametrize(("kind", "prediction_type", "guidance"), DDIM_RUNS)
def test_a_rollout_is_the_pipelines_ddim_run(kind: str, prediction_type: str, guidance: str, tmp_path: Path):
    scale, rescale = GUIDANCE[guidance]
    sampler = SAMPLER.model_copy(update={"num_steps": 10, "guidance_scale": scale, "guidance_rescale": rescale})
    folder = toy_copy(kind, tmp_path)
    change_json(folder / "scheduler" / "scheduler_config.json", prediction_type=prediction_type)
    theirs = open_base(folder)
    theirs.scheduler = ddim(theirs, "trailing")
    entries, seen = plans(0, 1, 2), {}

    def keep(_, step: int, timestep: Tensor, state: dict) -> dict:
        seen[step] = state["latents"].clone()
        return state

    run = theirs(
        [entry.prompt for entry in entries],
        latents=start_noise(entries, (4, 8, 8)),
        num_inference_steps=sampler.num_steps,
        guidance_scale=scale,
        guidance_rescale=rescale,
        output_type="pt",
        callback_on_step_end=keep,
    )
    worker = rollout_worker(kind, sampler, path=folder)
    batch = worker.generate(entries)

    # float32 on both sides, coefficients rounded from float64 here and worked out in float32 there; latents reach 5.
    # Rescaling divides by a standard deviation in float32 at every step.
    limit = 1e-5 if rescale == 0 else 1e-4
    torch.testing.assert_close(batch.latents_BCHW, seen[sampler.num_steps - 1], rtol=0, atol=limit)
    with torch.no_grad():
        pixels = worker.family.decode(batch.latents_BCHW).clamp(0, 1)
    torch.testing.assert_close(pixels, run.images, rtol=0, atol=limit)
    # Rounding to whole grey levels on top.
    assert batch.images_BCHW.dtype == torch.uint8
    assert float((batch.images_BCHW.float() - 255 * run.images).abs().max()) <= 0.5 + 255 * limit
    assert len(batch.late) == 3
    for late in batch.late:
        torch.testing.assert_close(late.latents_BCHW, seen[late.denoise_step - 1], rtol=0, atol=limit)


@on_latents
def test_a_rollout_with_leading_timesteps_is_the_pipelines(kind: str):
    theirs = open_base(ASSETS / f"toy-{kind}")
    theirs.scheduler = ddim(theirs, "leading", steps_offset=1)
    sampler = SamplerConfig(num_steps=10, spacing="leading", guidance_scale=1.0)
    entries = plans(4, 5)
    run = theirs(
        [entry.prompt for entry in entries],
        latents=start_noise(entries, (4, 8, 8)),
        num_inference_steps=10,
        guidance_scale=1.0,
        output_type="latent",
    )
    batch = rollout_worker(kind, sampler).generate(entries)
    torch.testing.assert_close(batch.latents_BCHW, run.images, rtol=0, atol=1e-5)


def test_a_pixel_rollout_is_diffusers_ddim_run():
    theirs = open_base(ASSETS / "toy-ddpm")
    scheduler = DDIMScheduler.from_config(theirs.scheduler.config, set_alpha_to_one=True, timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    entries = plans(0, 1)
    state = start_noise(entries, (3, 32, 32))
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            state = scheduler.step(
                theirs.unet(state, timestep).sample, timestep, state, use_clipped_model_output=True
            ).prev_sample
    batch = rollout_worker("ddpm", SamplerConfig(num_steps=10)).generate(entries)
    # The first step divides by a = 0.006: 1e-7 becomes 2e-5 of a state that is itself large.
    assert float((batch.latents_BCHW - state).abs().max()) < 1e-4 * float(state.abs().max().clamp(min=1))
    wanted = 255 * (batch.latents_BCHW / 2 + 0.5).clamp(0, 1)
    assert float((batch.images_BCHW.float() - wanted).abs().max()) <= 0.5


def test_samples_do_not_depend_on_the_chunk_they_are_drawn_in(shared: RolloutWorker):
    whole = shared.generate(plans(0, 1, 2, 3))
    halves = [shared.generate(plans(*part)) for part in ((0, 1), (2, 3))]
    # float32 in another batch size, through the whole walk.
    torch.testing.assert_close(whole.latents_BCHW, torch.cat([half.latents_BCHW for half in halves]), rtol=0, atol=1e-5)


def test_the_same_chunk_gives_the_same_bits(shared: RolloutWorker):
    first, second = shared.generate(plans(0, 1)), rollout_worker().generate(plans(0, 1))
    assert torch.equal(first.latents_BCHW, second.latents_BCHW)
    assert torch.equal(first.images_BCHW, second.images_BCHW)
    assert all(torch.equal(a.latents_BCHW, b.latents_BCHW) for a, b in zip(first.late, second.late, strict=True))


def test_other_seeds_and_other_prompts_give_other_images(shared: RolloutWorker):
    base, other_seed = shared.generate(plans(0, 3)).latents_BCHW
    other_prompt = shared.generate([SamplePlan(sample_id="p", prompt_id=1, prompt=PROMPTS[1], seed=0)]).latents_BCHW[0]
    assert float((base - other_seed).abs().max()) > 1e-2
    assert float((base - other_prompt).abs().max()) > 1e-4


def ids_and_versions(batch: RolloutBatch) -> tuple:
    return batch.sample_ids, batch.prompts, batch.policy_version, batch.schedule_id


def test_samples_carry_their_ids_prompts_policy_version_and_schedule(shared: RolloutWorker):
    batch = shared.generate(plans(5, 1))
    assert ids_and_versions(batch) == (("s5", "s1"), (PROMPTS[2], PROMPTS[1]), 0, shared.trajectory.schedule_id)
    other = rollout_worker(sampler=SamplerConfig(num_steps=12))
    assert other.generate(plans(5)).schedule_id == other.trajectory.schedule_id != shared.trajectory.schedule_id


def test_late_states_name_the_level_they_were_kept_at(shared: RolloutWorker):
    batch = shared.generate(plans(0))
    levels = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square(), 0)
    # Trailing steps of 50 from 999: those at or below 300 are 299, 249, ..., 49; three of them, spread evenly.
    assert [late.timestep for late in batch.late] == [299, 199, 49]
    assert [late.denoise_step for late in batch.late] == [14, 16, 19]
    for late in batch.late:
        # diffusers keeps the schedule in float32.
        assert late.alpha_bar == pytest.approx(float(levels[int(late.timestep)]), rel=1e-5)


# Weights on their way to the rollouts


def tuned_bundle(version: int) -> WeightBundle:
    learner = load("sdxl")
    tune(learner)
    return make_bundle(version, trainable_tensors(learner.network))


def test_loading_weights_echoes_the_checksum_of_what_is_held_and_changes_the_images():
    worker = rollout_worker()
    before = worker.generate(plans(0))
    bundle = tuned_bundle(3)
    ack = worker.load(bundle)
    assert (ack.worker, ack.version, ack.checksum) == ("rollout/7", 3, bundle.checksum)
    after = worker.generate(plans(0))
    assert after.policy_version == 3
    assert float((after.latents_BCHW - before.latents_BCHW).abs().max()) > 1e-3


@pytest.fixture(scope="module")
def sent() -> tuple[RolloutWorker, RolloutBatch, WeightBundle]:
    """A worker that refuses every bundle of these tests, what it draws, and a bundle that fits."""
    worker = rollout_worker(sampler=SAMPLER.model_copy(update={"num_steps": 4}))
    return worker, worker.generate(plans(0)), tuned_bundle(3)


@pytest.mark.parametrize("damage", ["missing", "extra", "renamed", "one number", "transposed"])
def test_weights_that_do_not_fit_are_refused_and_leave_the_worker_as_it_was(damage: str, sent):
    worker, before, fitting = sent
    tensors = dict(fitting.tensors)
    # The last name, so that a worker that copies before it checks is caught.
    name = list(tensors)[-1]
    value = tensors.pop(name)
    tensors |= {
        "missing": {},
        "extra": {name: value, "stranger": value},
        "renamed": {f"module.{name}": value},
        "one number": {name: torch.zeros(1)},
        "transposed": {name: value.T},
    }[damage]
    with pytest.raises(WeightSyncError, match=r"rollout/7.*differ"):
        worker.load(make_bundle(3, tensors))
    after = worker.generate(plans(0))
    assert after.policy_version == 0 and torch.equal(after.latents_BCHW, before.latents_BCHW)
