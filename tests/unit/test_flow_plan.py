"""`acpo plan` counts the flow families at their published sizes, on the meta device."""

from pathlib import Path

import pytest

import acpo_dist
from acpo_dist.config.load import load_config
from acpo_dist.models.architectures import architecture_of
from acpo_dist.preflight.plan import phases
from acpo_dist.preflight.plan.plan import count_parameters, make_plan, setting_of

ONE = ["rollout.batch_size=1", "sampler.guidance_scale=1", "learner.micro_batch=1", "learner.global_batch=1"]


@pytest.mark.parametrize(
    ("name", "billions", "teraflops"),
    [("sd35_lora", 2.24, 11.3), ("zimage_lora", 6.15, 62.6), ("flux2_klein_lora", 3.88, 34.9)],
)
def test_a_shipped_configuration_has_the_published_size_and_the_cost_of_one_call(
    name: str, billions: float, teraflops: float
) -> None:
    config = load_config(name, ONE)
    setting = setting_of(config, architecture_of(config.model))
    counts = count_parameters(setting)
    assert counts["network"] / 1e9 == pytest.approx(billions, rel=0.01)
    assert counts["trainable"] > 0
    step, decode = phases.rollout(setting, 1)
    # The adapters add less than 2 %.
    assert step.flops / 1e12 == pytest.approx(teraflops, rel=0.02)
    assert decode.flops > 0


@pytest.mark.parametrize("name", ["sd35_lora", "zimage_lora", "flux2_klein_lora"])
def test_a_shipped_configuration_trains_in_bfloat16_and_fits_the_gpu_that_it_names(name: str) -> None:
    config = load_config(name, [])
    memory = config.model.memory
    assert config.model.dtype == config.model.vae_dtype == "bfloat16"
    assert memory.gradient_checkpointing and memory.vae_checkpointing and memory.free_text_encoders
    comment = (Path(acpo_dist.__file__).parents[1] / "configs" / f"{name}.yaml").read_text().splitlines()[0]
    plan = make_plan(config, device="h200")
    # Gigabytes are fewer than GiB, and 8 % are left for fragments, as in the plan's own warning.
    assert max(plan.needed_gib.values()) < 0.92 * float(comment.split("one GPU of ")[1].split(" GB")[0]) * 1e9 / 2**30
    # While a prompt is encoded, the text encoders are beside the weights.
    encoders = 2 * plan.parameters["text_encoders"] / 2**30
    assert plan.roles["rollout"].weights + encoders < max(plan.needed_gib.values())


@pytest.mark.slow
def test_a_whole_plan_of_a_flow_model_covers_every_role_and_t5_can_be_left_out() -> None:
    plan = make_plan(load_config("sd35_lora", ONE))
    assert plan.parameters["text_encoders"] / 1e9 == pytest.approx(5.6, rel=0.02)
    assert all(value > 0 for value in plan.teraflops.values())
    config = load_config("sd35_lora", [*ONE, "model.t5=false"])
    counts = count_parameters(setting_of(config, architecture_of(config.model)))
    assert counts["text_encoders"] / 1e9 == pytest.approx(0.82, rel=0.02)
