"""The families equal diffusers' pipelines step by step, their anchor is constant, and saved models open anywhere."""

import itertools
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from huggingface_hub import constants as hub_constants
from torch import Tensor

import acpo_dist.data.toy
from acpo_dist.config.schema import SamplerConfig
from acpo_dist.core.errors import ModelError, WeightSyncError
from acpo_dist.core.types import RolloutBatch, SamplePlan, WeightBundle
from acpo_dist.core.weights import make_bundle
from acpo_dist.data.toy.world import captions
from acpo_dist.models.config import TuningConfig
from acpo_dist.models.ddpm import DdpmFamily
from acpo_dist.models.family import Condition, copy_weights, trainable_tensors
from acpo_dist.models.lora_files import adapter_layers, kohya_layers, write_lora
from acpo_dist.models.sd15 import Sd15Family
from acpo_dist.models.sdxl import SdxlFamily
from acpo_dist.workers.rollout.worker import RolloutWorker

ASSETS = Path(acpo_dist.data.toy.__file__).parent / "assets"
PROMPTS = (captions()[3], captions()[40], captions()[17])
LORA, FULL = TuningConfig(method="lora", rank=4), TuningConfig(method="full")
FAMILIES = {"sdxl": SdxlFamily, "sd15": Sd15Family, "ddpm": DdpmFamily}
PIPELINES = {"sdxl": "StableDiffusionXLPipeline", "sd15": "StableDiffusionPipeline", "ddpm": "DDPMPipeline"}
every_tuning = pytest.mark.parametrize("tuning", [LORA, FULL], ids=["lora", "full"])
every_family = pytest.mark.parametrize("kind", list(FAMILIES))
on_latents = pytest.mark.parametrize("kind", ["sdxl", "sd15"])


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def load(kind: str, tuning: TuningConfig = LORA, **options):
    family = FAMILIES[kind]
    config = family.Config(**{"path": f"toy-{kind}", "tuning": tuning, **options})
    return family.load(config, device="cpu", trainable=True)


def tune(family) -> None:
    """Move every trainable weight, as training would."""
    generator = rng(5)
    with torch.no_grad():
        for parameter in trainable_tensors(family.network).values():
            spread = 0.1 if parameter.numel() < 2 else 0.1 * float(parameter.std().clamp(min=0.3))
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def answer(family) -> Tensor:
    """The family's prediction for three prompts at three timesteps."""
    noisy = torch.randn(3, *family.sample_shape, generator=rng(1))
    return family.predict(noisy, torch.tensor([20, 300, 900]), family.encode(PROMPTS))


@torch.no_grad()
def answer_of(pipeline, family) -> Tensor:
    """The same prediction by a pipeline's U-Net."""
    noisy, timesteps = torch.randn(3, *family.sample_shape, generator=rng(1)), torch.tensor([20, 300, 900])
    if isinstance(pipeline, DDPMPipeline):
        return pipeline.unet(noisy, timesteps).sample
    if isinstance(pipeline, StableDiffusionPipeline):
        states, _ = pipeline.encode_prompt(list(PROMPTS), "cpu", 1, False)
        return pipeline.unet(noisy, timesteps, encoder_hidden_states=states).sample
    states, _, pooled, _ = pipeline.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False)
    size = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[size, size, 0, 0, size, size]] * 3)}
    return pipeline.unet(noisy, timesteps, encoder_hidden_states=states, added_cond_kwargs=added).sample


def toy_copy(kind: str, folder: Path) -> Path:
    return Path(shutil.copytree(ASSETS / f"toy-{kind}", folder / f"{kind}-copy"))


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def open_base(path: Path):
    """A base model in float32, as used by the families, for any dtype of its files."""
    pipeline = DiffusionPipeline.from_pretrained(path, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionXLPipeline:
    """toy-sdxl as opened by diffusers."""
    return open_base(ASSETS / "toy-sdxl")


@pytest.fixture(scope="module")
def sdxl() -> SdxlFamily:
    """toy-sdxl, unchanged."""
    return load("sdxl")


# Conditioning and prediction


@pytest.mark.parametrize("zeros", [True, False])
def test_prompts_and_the_empty_prompt_are_encoded_as_the_pipeline_does(zeros: bool, tmp_path: Path):
    folder = toy_copy("sdxl", tmp_path)
    change_json(folder / "model_index.json", force_zeros_for_empty_prompt=zeros)
    ours, theirs = load("sdxl", path=str(folder)), open_base(folder)
    with torch.no_grad():
        states, null_states, pooled, null_pooled = theirs.encode_prompt(list(PROMPTS), do_classifier_free_guidance=True)
    assert bool(null_states.any()) is not zeros
    for prompts, wanted in ((PROMPTS, (states, pooled)), ([""] * 3, (null_states, null_pooled))):
        condition = ours.encode(prompts).tensors
        # The same float32 modules, for one prompt instead of three.
        torch.testing.assert_close(condition["prompt_embeds"], wanted[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(condition["pooled_prompt_embeds"], wanted[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("negative", [None, PROMPTS[2]])
def test_sd15_encodes_prompts_and_what_guidance_leads_away_from_as_the_pipeline_does(negative: str | None):
    ours, theirs = load("sd15", negative_prompt=negative), open_base(ASSETS / "toy-sd15")
    with torch.no_grad():
        asked = [negative] * 3 if negative else None
        states, null_states = theirs.encode_prompt(list(PROMPTS), "cpu", 1, True, negative_prompt=asked)
    for prompts, wanted in ((PROMPTS, states), ([""] * 3, null_states)):
        condition = ours.encode(prompts).tensors
        assert set(condition) == {"prompt_embeds"}
        torch.testing.assert_close(condition["prompt_embeds"], wanted, rtol=0, atol=1e-6)


def test_a_negative_prompt_replaces_sdxls_zeros_as_in_the_pipeline():
    ours, theirs = load("sdxl", negative_prompt=PROMPTS[2]), open_base(ASSETS / "toy-sdxl")
    with torch.no_grad():
        _, states, _, pooled = theirs.encode_prompt(PROMPTS[0], negative_prompt=PROMPTS[2])
    condition = ours.encode([""]).tensors
    torch.testing.assert_close(condition["prompt_embeds"], states, rtol=0, atol=1e-6)
    torch.testing.assert_close(condition["pooled_prompt_embeds"], pooled, rtol=0, atol=1e-6)


def test_a_prompt_longer_than_the_encoder_reads_is_cut_as_the_pipeline_does(sdxl: SdxlFamily, pipeline):
    long = " ".join(PROMPTS * 20)
    with torch.no_grad():
        states, _, pooled, _ = pipeline.encode_prompt(long, do_classifier_free_guidance=False)
    cut = sdxl.config.model_copy(update={"long_prompts": "cut"})
    condition = SdxlFamily.load(cut, device="cpu", trainable=False).encode([long]).tensors
    torch.testing.assert_close(condition["prompt_embeds"], states, rtol=0, atol=1e-6)
    torch.testing.assert_close(condition["pooled_prompt_embeds"], pooled, rtol=0, atol=1e-6)


@every_family
def test_prediction_is_the_pipelines_own_unet_call(kind: str):
    family, theirs = load(kind), open_base(ASSETS / f"toy-{kind}")
    # The same float32 weights; adapters that are still zero add nothing.
    torch.testing.assert_close(answer(family), answer_of(theirs, family), rtol=0, atol=1e-6)


def test_prediction_reads_the_prompt(sdxl: SdxlFamily):
    noisy, timesteps = torch.randn(1, 4, 8, 8, generator=rng(0)), torch.tensor([500])
    with torch.no_grad():
        first, second = (sdxl.predict(noisy, timesteps, sdxl.encode([prompt])) for prompt in PROMPTS[:2])
    assert not torch.equal(first, second)


@every_family
def test_bfloat16_weights_answer_in_float32_near_the_float32_answer(kind: str):
    half = load(kind, dtype="bfloat16")
    found, wanted = answer(half), answer(load(kind))
    assert found.dtype == torch.float32
    # 8 significant bits per layer over some 30 layers.
    assert 0 < float((found - wanted).norm() / wanted.norm()) < 0.05
    assert {parameter.dtype for parameter in trainable_tensors(half.network).values()} == {torch.float32}


def test_the_decoder_is_the_pipelines_vae(sdxl: SdxlFamily, pipeline):
    latents = torch.randn(2, 4, 8, 8, generator=rng(0))
    with torch.no_grad():
        wanted = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample / 2 + 0.5
        torch.testing.assert_close(sdxl.decode(latents), wanted, rtol=0, atol=1e-6)


def test_marked_samples_get_the_null_condition_and_others_keep_theirs():
    condition = Condition({"states": torch.arange(12.0).reshape(3, 2, 2), "pooled": torch.arange(3.0).reshape(3, 1)})
    null = Condition({"states": torch.full((3, 2, 2), -1.0), "pooled": torch.full((3, 1), -1.0)})
    mixed = condition.where_null(torch.tensor([False, True, False]), null).tensors
    assert mixed["pooled"].flatten().tolist() == [0.0, -1.0, 2.0]
    assert mixed["states"].flatten(1).tolist() == [[0.0, 1.0, 2.0, 3.0], [-1.0] * 4, [8.0, 9.0, 10.0, 11.0]]


# The anchor


@every_family
@every_tuning
def test_at_the_start_the_policy_is_the_anchor_to_the_bit(kind: str, tuning: TuningConfig):
    family = load(kind, tuning)
    policy = answer(family)
    with family.anchored():
        assert torch.equal(answer(family), policy)


@every_family
@every_tuning
def test_tuning_moves_the_policy_and_not_the_anchor(kind: str, tuning: TuningConfig):
    family = load(kind, tuning)
    before = answer(family)
    tune(family)
    assert float((answer(family) - before).abs().max()) > 1e-3
    with family.anchored():
        assert torch.equal(answer(family), before)


@every_tuning
def test_the_policy_answers_again_after_the_anchor_even_when_it_was_left_by_an_error(tuning: TuningConfig):
    family = load("sdxl", tuning)
    tune(family)
    policy, trainable = answer(family), list(trainable_tensors(family.network))
    with pytest.raises(ZeroDivisionError), family.anchored():
        raise ZeroDivisionError
    assert torch.equal(answer(family), policy)
    assert list(trainable_tensors(family.network)) == trainable


@every_tuning
def test_gradients_reach_every_trainable_weight_and_nothing_else(tuning: TuningConfig):
    family = load("sdxl", tuning)
    # Before the first step LoRA's down-projections have no gradient, since the up-projections are zero.
    tune(family)
    noisy = torch.randn(3, 4, 8, 8, generator=rng(0))
    family.predict(noisy, torch.tensor([20, 300, 900]), family.encode(PROMPTS)).square().sum().backward()
    touched = {name for name, value in family.network.named_parameters() if value.grad is not None and value.grad.any()}
    assert touched == set(trainable_tensors(family.network))


def test_adapters_start_the_same_for_the_same_seed_for_any_global_generator_does():
    torch.manual_seed(1)
    first = trainable_tensors(load("sdxl").network)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = trainable_tensors(load("sdxl").network)
    other = trainable_tensors(load("sdxl", seed=1).network)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), state)


# Rollouts


SAMPLER = SamplerConfig(num_steps=20, spacing="trailing", guidance_scale=5.0, t_max=0.3, late_per_sample=3)


def rollout_worker(kind: str = "sdxl", sampler: SamplerConfig = SAMPLER, path: Path | None = None, **options):
    config = FAMILIES[kind].Config(path=str(path or f"toy-{kind}"), tuning=LORA, **options)
    return RolloutWorker(config, sampler, name="rollout/7")


@pytest.fixture(scope="module")
def shared() -> RolloutWorker:
    """A worker whose weights no test changes."""
    return rollout_worker()


def plans(*seeds: int) -> list[SamplePlan]:
    return [SamplePlan(sample_id=f"s{seed}", prompt_id=seed % 3, prompt=PROMPTS[seed % 3], seed=seed) for seed in seeds]


def start_noise(entries: Sequence[SamplePlan], shape: tuple[int, ...]) -> Tensor:
    return torch.stack([torch.randn(shape, generator=rng(entry.seed)) for entry in entries])


def ddim(pipeline, spacing: str, **options) -> DDIMScheduler:
    """diffusers' deterministic sampler on the pipeline's own levels, with a clean end."""
    return DDIMScheduler.from_config(
        pipeline.scheduler.config, clip_sample=False, set_alpha_to_one=True, timestep_spacing=spacing, **options
    )


@on_latents
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("guidance", [5.0, 1.0], ids=["guided", "conditional"])
def test_a_rollout_is_the_pipelines_ddim_run(kind: str, prediction_type: str, guidance: float, tmp_path: Path):
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
        num_inference_steps=SAMPLER.num_steps,
        guidance_scale=guidance,
        output_type="pt",
        callback_on_step_end=keep,
    )
    sampler = SAMPLER.model_copy(update={"guidance_scale": guidance})
    batch = rollout_worker(kind, sampler, path=folder).generate(entries)

    # float32 on both sides, coefficients rounded from float64 here and worked out in float32 there; latents reach 5.
    torch.testing.assert_close(batch.latents_BCHW, seen[SAMPLER.num_steps - 1], rtol=0, atol=1e-5)
    with torch.no_grad():
        pixels = load(kind, path=str(folder)).decode(batch.latents_BCHW).clamp(0, 1)
    torch.testing.assert_close(pixels, run.images, rtol=0, atol=1e-5)
    # Rounding to whole grey levels on top.
    assert batch.images_BCHW.dtype == torch.uint8
    assert float((batch.images_BCHW.float() - 255 * run.images).abs().max()) <= 0.5 + 255e-5
    for late in batch.late:
        torch.testing.assert_close(late.latents_BCHW, seen[late.denoise_step - 1], rtol=0, atol=1e-5)


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


@pytest.mark.parametrize("damage", ["missing", "extra", "renamed", "one number", "transposed"])
def test_weights_that_do_not_fit_are_refused_and_leave_the_worker_as_it_was(damage: str):
    worker = rollout_worker()
    before = worker.generate(plans(0))
    tensors = dict(tuned_bundle(3).tensors)
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


# Saved pipelines


def save_lora(family, file: Path) -> None:
    """Write the adapters of a family as a LoRA file."""
    weights = {name: value.detach() for name, value in trainable_tensors(family.network).items()}
    layers = adapter_layers(weights, family.config.tuning)
    named = kohya_layers(layers, family=family.config.type, unet=family.network.config)
    write_lora(file, named, {}, torch.float32)


@every_family
@pytest.mark.parametrize("tuning", [LORA, TuningConfig(rank=4, alpha=10), FULL], ids=["lora", "lora scaled", "full"])
def test_a_saved_pipeline_opens_anywhere_and_holds_the_tuned_unet(kind: str, tuning: TuningConfig, tmp_path: Path):
    family = load(kind, tuning)
    base = answer(family)
    tune(family)
    tuned = answer(family)
    family.save_pipeline(tmp_path / "out")
    opened = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(opened).__name__ == PIPELINES[kind]
    assert float((tuned - base).abs().max()) > 1e-3
    # Merged weights are rounded once more in float32.
    torch.testing.assert_close(answer_of(opened, family), tuned, rtol=0, atol=1e-5)
    # Saving is no step of training.
    assert torch.equal(answer(family), tuned)


def test_a_base_in_half_precision_is_saved_as_a_pipeline_that_runs_as_it_opens(tmp_path: Path):
    half = DiffusionPipeline.from_pretrained(ASSETS / "toy-sdxl", dtype=torch.float16)
    half.save_pretrained(tmp_path / "half")
    family = load("sdxl", path=str(tmp_path / "half"))
    tune(family)
    family.save_pipeline(tmp_path / "out")
    # Mixed types, half precision text encoders before a float32 U-Net, would not run at all.
    opened = DiffusionPipeline.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(answer_of(opened, family), answer(family), rtol=0, atol=1e-5)


def test_an_update_too_small_for_bfloat16_is_still_in_the_saved_weights(tmp_path: Path):
    family = load("sdxl", dtype="bfloat16")
    base = load("sdxl").network.state_dict()
    with torch.no_grad():
        for name, parameter in trainable_tensors(family.network).items():
            if ".lora_B." in name:
                parameter.copy_(1e-4 * torch.randn(parameter.shape, generator=rng(0)))
    adapters = trainable_tensors(family.network)
    family.save_pipeline(tmp_path / "out")
    saved = DiffusionPipeline.from_pretrained(tmp_path / "out").unet.state_dict()
    for name in [name for name in adapters if ".lora_B." in name]:
        module = name.partition(".lora_B.")[0]
        up, down = adapters[name].detach(), adapters[f"{module}.lora_A.default.weight"].detach()
        update = saved[f"{module}.weight"] - base[f"{module}.base_layer.weight"]
        # float32 at weights below 1: 6e-8; bfloat16 would lose all of it.
        torch.testing.assert_close(update, up @ down, rtol=0, atol=2e-7)


def test_a_saved_pipeline_is_a_base_model_again(tmp_path: Path):
    family = load("sdxl")
    tune(family)
    family.save_pipeline(tmp_path / "out")
    again = load("sdxl", FULL, path=str(tmp_path / "out"))
    torch.testing.assert_close(answer(again), answer(family), rtol=0, atol=1e-5)


@on_latents
@pytest.mark.parametrize("alpha", [None, 10.0])
def test_the_exported_adapter_gives_the_tuned_answer_on_the_plain_base(kind: str, alpha: float | None, tmp_path: Path):
    family = load(kind, TuningConfig(rank=4, alpha=alpha))
    tune(family)
    save_lora(family, tmp_path / "lora.safetensors")
    plain = open_base(ASSETS / f"toy-{kind}")
    plain.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    torch.testing.assert_close(answer_of(plain, family), answer(family), rtol=0, atol=1e-5)


@on_latents
@pytest.mark.parametrize("guidance", [5.0, 1.0], ids=["guided", "conditional"])
def test_plain_diffusers_draws_the_tuned_rollouts_image_from_the_exported_adapter(
    kind: str, guidance: float, tmp_path: Path
):
    sampler = SAMPLER.model_copy(update={"guidance_scale": guidance})
    worker, entries = rollout_worker(kind, sampler), plans(0, 1)
    family = load(kind)
    tune(family)
    worker.load(make_bundle(1, trainable_tensors(family.network)))
    save_lora(family, tmp_path / "lora.safetensors")
    plain = open_base(ASSETS / f"toy-{kind}")
    plain.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    plain.scheduler = ddim(plain, "trailing")
    wanted = plain(
        [entry.prompt for entry in entries], latents=start_noise(entries, (4, 8, 8)), guidance_scale=guidance,
        num_inference_steps=SAMPLER.num_steps, output_type="pt",
    ).images  # fmt: skip
    drawn = worker.generate(entries)
    with torch.no_grad():
        pixels = family.decode(drawn.latents_BCHW).clamp(0, 1)
    torch.testing.assert_close(pixels, wanted, rtol=0, atol=1e-5)


# Models that cannot be loaded


def test_a_folder_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(ModelError, match=r"absent`, found nothing"):
        load("sdxl", path=str(tmp_path / "absent"))


@every_family
def test_a_folder_without_a_pipeline_is_named(kind: str, tmp_path: Path):
    with pytest.raises(ModelError, match=rf"{tmp_path.name}`, found a folder without model_index\.json"):
        load(kind, path=str(tmp_path))


def test_an_unknown_toy_is_refused_with_those_there_are():
    with pytest.raises(ModelError, match="`toy-flux`; embedded: toy-ddpm, toy-sd15, toy-sdxl"):
        load("sdxl", path="toy-flux")


@pytest.mark.parametrize(
    ("kind", "part", "file"),
    [
        ("sdxl", "unet", "diffusion_pytorch_model.safetensors"),
        ("sdxl", "vae", "diffusion_pytorch_model.safetensors"),
        ("sdxl", "text_encoder", "model.safetensors"),
        ("sdxl", "text_encoder_2", "model.safetensors"),
        ("sdxl", "unet", "config.json"),
        ("sd15", "unet", "diffusion_pytorch_model.safetensors"),
        ("sd15", "text_encoder", "model.safetensors"),
        ("ddpm", "unet", "diffusion_pytorch_model.safetensors"),
    ],
)
@pytest.mark.parametrize("kept", [0.0, 0.5], ids=["emptied", "halved"])
def test_a_truncated_file_is_an_error_that_names_part_and_folder(
    kind: str, part: str, file: str, kept: float, tmp_path: Path
):
    folder = toy_copy(kind, tmp_path)
    whole = (folder / part / file).read_bytes()
    (folder / part / file).write_bytes(whole[: math.floor(kept * len(whole))])
    with pytest.raises(ModelError, match=rf"`{part}` of `{folder}` cannot be loaded"):
        load(kind, path=str(folder))


@pytest.mark.parametrize(("kind", "other"), [*itertools.permutations(FAMILIES, 2)])
def test_one_familys_pipeline_is_not_anothers(kind: str, other: str):
    with pytest.raises(ModelError, match=f"toy-{other}"):
        load(kind, path=f"toy-{other}")


@every_family
def test_tuning_targets_that_fit_no_module_are_refused(kind: str):
    with pytest.raises(ModelError, match=r"model\.tuning\.targets \['to_nowhere'\]"):
        load(kind, TuningConfig(targets=("to_nowhere",)))


# Where models come from


def flat_ddpm(folder: Path) -> Path:
    """toy-ddpm in the layout of the first DDPM repositories: all files at the top level."""
    folder.mkdir(parents=True)
    for file in (ASSETS / "toy-ddpm").rglob("*.*"):
        shutil.copy(file, folder)
    return folder


def test_an_old_ddpm_folder_with_its_files_at_the_top_loads_and_saves(tmp_path: Path):
    family = load("ddpm", path=str(flat_ddpm(tmp_path / "flat")))
    assert torch.equal(answer(family), answer(load("ddpm")))
    family.save_pipeline(tmp_path / "out")
    opened = DiffusionPipeline.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(answer_of(opened, family), answer(family), rtol=0, atol=1e-5)


@pytest.mark.parametrize("flat", [False, True], ids=["folders", "files at the top"])
def test_a_ddpm_that_was_downloaded_by_its_hub_id_loads_in_either_layout(flat: bool, tmp_path: Path, monkeypatch):
    repository, commit = tmp_path / "models--someone--a-ddpm", "a" * 40
    snapshot = repository / "snapshots" / commit
    if flat:
        flat_ddpm(snapshot)
    else:
        shutil.copytree(ASSETS / "toy-ddpm", snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(answer(load("ddpm", path="someone/a-ddpm")), answer(load("ddpm")))


@every_family
def test_a_hub_id_that_cannot_be_had_is_an_error_that_says_what_to_do(kind: str, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"`someone/absent` cannot be loaded.*download it first"):
        load(kind, path="someone/absent")


def test_weights_of_another_network_are_not_copied():
    network = torch.nn.Linear(2, 2)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    copy_weights(network, {name: value + 1 for name, value in before.items()})
    assert all(torch.equal(network.state_dict()[name], value + 1) for name, value in before.items())
    for weights in ({"weight": torch.zeros(2, 2)}, before | {"bias": torch.zeros(3)}):
        with pytest.raises(ValueError, match="bias"):
            copy_weights(network, weights)
    assert all(torch.equal(network.state_dict()[name], value + 1) for name, value in before.items())
