"""Contradictory sections are rejected before anything starts, with both keys."""

import pytest

from acpo_dist.config.load import load_config
from acpo_dist.core.errors import RewardConfigError, UsageError
from acpo_dist.training.calibration import start_factor
from tests.helpers.config import PLUGINS, refusal


def test_a_chunk_that_cuts_a_prompt_group_is_refused_with_a_size_that_fits(smallest):
    said = refusal(smallest, "rollout.batch_size=10", "rollout.samples_per_prompt=4")
    assert "rollout.batch_size (10)" in said and "rollout.samples_per_prompt (4)" in said
    assert "Set rollout.batch_size=8." in said
    load_config(smallest, ["rollout.batch_size=8", "rollout.samples_per_prompt=4"])


def test_a_chunk_smaller_than_a_group_is_advised_upwards(smallest):
    assert "Set rollout.batch_size=4." in refusal(smallest, "rollout.batch_size=3", "rollout.samples_per_prompt=4")


def test_optimiser_steps_must_divide_the_samples_of_an_iteration(smallest):
    said = refusal(smallest, "rollout.prompts_per_iteration=20", "learner.global_batch=16")
    assert "= 20 samples" in said and "learner.global_batch (16)" in said
    load_config(smallest, ["rollout.prompts_per_iteration=48", "learner.global_batch=16"])


def test_accumulation_must_come_out_whole_with_advice_that_does(smallest):
    numbers = ["learner.micro_batch=6", "learner.num_ranks=2", "learner.zero_stage=2"]
    said = refusal(smallest, "learner.global_batch=32", *numbers)
    assert "learner.global_batch (32)" in said and "(6 x 2 = 12)" in said
    assert "Set learner.global_batch=24" in said
    load_config(smallest, ["learner.global_batch=24", "rollout.prompts_per_iteration=48", *numbers])


def test_several_ranks_need_a_zero_stage(smallest):
    said = refusal(smallest, "learner.num_ranks=2", "learner.micro_batch=8")
    assert "learner.num_ranks is 2 but learner.zero_stage is unset" in said
    load_config(smallest, ["learner.num_ranks=2", "learner.micro_batch=8", "learner.zero_stage=0"])
    said = refusal(smallest, "learner.zero_stage=0", "learner.precision=bfloat16")
    assert "learner.precision is bfloat16" in said and "learner.zero_stage=1" in said


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_zero_stage_needs_ray(smallest, stage):
    said = refusal(smallest, "cluster.backend=local", f"learner.zero_stage={stage}")
    assert f"cluster.backend is `local` but learner.zero_stage is {stage}" in said
    for backend in ("auto", "ray"):
        load_config(smallest, [f"cluster.backend={backend}", f"learner.zero_stage={stage}"])
    load_config(smallest, ["cluster.backend=local"])


def test_prompts_must_fit_the_model(smallest):
    assert "the model takes prompts" in refusal(smallest, "data.prompts=none")
    assert "the model is unconditional" in refusal(smallest, f"model.type={PLUGINS}:Unprompted")
    load_config(smallest, [f"model.type={PLUGINS}:Unprompted", "data.prompts=none"])


def test_two_metrics_of_one_name_are_refused(smallest):
    judge = f"rewards.judges=[{{type: '{PLUGINS}:Smooth', name: NAME}}]"
    said = refusal(smallest, judge.replace("NAME", "smooth"), kind=RewardConfigError)
    assert "`smooth`" in said
    load_config(smallest, [judge.replace("NAME", "other")])


def test_a_reward_without_gradient_is_accepted_only_by_algorithms_that_need_none(smallest):
    scores_only = f"rewards.train.0.type={PLUGINS}:ScoresOnly"
    said = refusal(smallest, scores_only, kind=RewardConfigError)
    assert "rewards.train.0 (`smooth`): has no usable gradient" in said
    assert "Move it to rewards.judges" in said
    load_config(smallest, [scores_only, f"algorithm={{type: '{PLUGINS}:NeedsScores'}}"])
    load_config(smallest, [f"rewards.judges=[{{type: '{PLUGINS}:ScoresOnly', name: judge}}]"])


@pytest.mark.parametrize("role", ["train", "judges"])
def test_a_metric_that_cannot_work_here_is_refused_with_its_own_reason(smallest, role):
    override = f"rewards.{role}=[{{type: '{PLUGINS}:Broken', name: odd}}]"
    said = refusal(smallest, override, kind=RewardConfigError)
    assert f"rewards.{role}.0 (`odd`): needs the package `absent` for `odd`" in said


# The anchor


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm.anchor.weight=-1"], "greater than or equal to 0"),
        (["algorithm.anchor.budget=null"], "algorithm.anchor.weight is `auto`"),
        (["algorithm.data_weight=1"], "algorithm.anchor.source=data"),
    ],
)
def test_an_anchor_without_effect_is_refused(overrides, message):
    assert message in refusal("toy_sdxl", *overrides, kind=UsageError)


@pytest.mark.parametrize("override", ["algorithm.anchor.uniform=false", "algorithm.anchor.weight=0"])
def test_a_denoising_loss_needs_real_images_and_no_anchor(override):
    load_config("cifar10_ddpm", ["algorithm.data_weight=1", override])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["vrg.reference_steps=30", "sampler.num_steps=12"], "Set vrg.reference_steps=48"),
        (["rewards.spread_weight=2"], "rewards.spread_weight is 2, which only rewards.combine=pessimistic"),
        (["data.absolute_pairs=true"], "data.pairs is unset"),
        (["algorithm.reward_weight=0", "algorithm.anchor.weight=0"], "nothing would be trained"),
        (["algorithm={type: draft, reward_weight: 0}"], "nothing would be trained"),
        (["learner.betas=[1.5, 2]"], "learner.betas"),
        (["learner.betas=[true, 0.9]"], "learner.betas"),
    ],
)
def test_what_would_be_ignored_or_cannot_work_is_refused(overrides, message):
    assert message in refusal("toy_sdxl", *overrides, kind=UsageError)


def test_a_search_that_needs_a_finite_first_sigma_is_refused_for_flow_models():
    search = ["vrg.enabled=true", "vrg.search=hso_grid"]
    assert "starts at pure noise" in refusal("toy_flow", *search, kind=UsageError)
    load_config("toy_sdxl", search)


def test_adapters_are_merged_into_float32_weights_only(smallest):
    said = refusal(smallest, "model={type: sd15, path: toy-sd15, dtype: bfloat16}", "sampler.merge_adapters=true")
    assert "model.dtype is bfloat16" in said
    load_config(smallest, ["model={type: sd15, path: toy-sd15}", "sampler.merge_adapters=true"])


def test_guidance_rescale_is_refused_where_the_pipeline_or_the_solver_cannot_follow():
    rescale = "sampler.guidance_rescale=0.7"
    assert "sampler.solver=stsp" in refusal("toy_sdxl", rescale, "sampler.solver=stsp")
    assert "model.type is sd3" in refusal("sd35_lora", rescale)
    load_config("toy_sdxl", [rescale])
    assert "sampler.guidance_scale above 1" in refusal("toy_sdxl", rescale, "sampler.guidance_scale=1")


@pytest.mark.parametrize(
    ("key", "overrides"),
    [
        ("sampler.k_max", ["sampler.k_max=1", "sampler.t_max=0.3"]),
        ("sampler.merge_adapters", ["sampler.merge_adapters=true", "model.tuning.method=full"]),
        ("algorithm.anchor.start", ["algorithm.anchor.start=0.1", "algorithm.anchor.weight=2"]),
        ("algorithm.anchor.rate", ["algorithm={type: draft, anchor: {rate: 0.3}}", "sampler.late_per_sample=12"]),
        (
            "algorithm.anchor.headroom",
            ["algorithm={type: draft, anchor: {headroom: 0.5}}", "sampler.late_per_sample=12"],
        ),
        ("algorithm.max_gradient_steps", ["algorithm.max_gradient_steps=3", "algorithm.gradient_steps=2"]),
        ("algorithm.guidance", ["algorithm.guidance=full", "sampler.guidance_scale=1"]),
        ("algorithm.guidance", ["algorithm.guidance=full", "algorithm.gradient_steps=1"]),
        ("algorithm.target_quantile", ["algorithm.target_quantile=0.5"]),
        (
            "algorithm.min_snr_gamma",
            ["algorithm={type: sft, space: ncp, min_snr_gamma: 5}", "rollout.samples_per_prompt=2"],
        ),
        ("model.prediction_type", ["model.prediction_type=v_prediction"]),
        ("model.config", ["model.config=toy-sdxl"]),
        ("model.tuning.anchor", ["model.tuning.anchor=base"]),
        ("data.flip", ["data.flip=true"]),
        ("data.held_out", ["data.held_out=0.1"]),
        ("learner.lr_decay_type", ["learner.lr_decay_type=cosine", "learner.lr_decay_ratio=0"]),
        ("vrg.trust", ["vrg.trust=0.1", "vrg.search=hso_grid"]),
    ],
)
def test_a_key_that_another_one_leaves_without_effect_is_refused(key, overrides):
    said = refusal("toy_sdxl", *overrides)
    assert f"{key} is " in said and "which has an effect only with" in said


@pytest.mark.parametrize(
    "overrides",
    [
        ["sampler.k_max=1", "sampler.t_max=null"],
        ["algorithm.anchor.start=0.1", "algorithm.anchor.weight=0"],
        # null switches the budget off, also in a configuration that sets keys of its controller.
        ["algorithm.anchor={rate: 0.3, headroom: 0.5, weight: 0, budget: null}"],
        ["algorithm.max_gradient_steps=3", "algorithm.gradient_steps=random"],
        ["algorithm.guidance=full", "sampler.guidance_scale=2"],
        ["algorithm.target_quantile=0.5", "algorithm.shape=hinge"],
        ["model={type: sdxl, path: a.safetensors, prediction_type: v_prediction, config: toy-sdxl}"],
        ["learner.lr_decay_type=cosine", "learner.lr_decay_ratio=0.5"],
    ],
)
def test_the_same_key_is_accepted_where_it_has_an_effect(overrides):
    load_config("toy_sdxl", overrides)


@pytest.mark.parametrize(
    ("source", "overrides", "factor"),
    [
        ("toy_sdxl", [], 1.0),
        ("toy_sdxl_random", [], 0.02),
        ("toy_draft", ["algorithm.anchor.budget=0.2"], 0.02),
        ("toy_sdxl_random", ["algorithm.anchor.start=0.5"], 0.5),
        ("toy_nft", [], 1.0),
    ],
)
def test_the_anchor_starts_lower_where_the_gradient_passes_through_sampler_steps(source, overrides, factor):
    assert start_factor(load_config(source, overrides)) == factor
