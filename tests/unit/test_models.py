"""The families equal diffusers' pipelines call by call, and their anchor is constant."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from acpo_dist.models.config import TuningConfig
from acpo_dist.models.family import Condition, trainable_tensors
from acpo_dist.models.sdxl import SdxlFamily
from tests.helpers.models import (
    ASSETS,
    PROMPTS,
    answer,
    answer_of,
    change_json,
    every_family,
    every_tuning,
    load,
    open_base,
    rng,
    toy_copy,
    tune,
)


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
    found, expected = answer(family), answer_of(theirs, family)
    # By norm: where a file's weights lie in memory decides how a processor orders the sums of single elements.
    assert float((found - expected).norm()) <= 1e-6 * float(expected.norm())


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
