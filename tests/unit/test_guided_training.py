"""Training through guidance: the reward scores what the rollouts drew, and each branch has its own anchor."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg

from acpo_dist.algorithms.acpo import Acpo
from acpo_dist.algorithms.base import LateStates, MicroBatch, RewardSignal
from acpo_dist.config.load import load_config
from acpo_dist.data.toy.world import captions
from acpo_dist.diffusion.prediction import to_clean
from acpo_dist.models.architectures import architecture_of
from acpo_dist.models.config import TuningConfig
from acpo_dist.models.family import trainable_tensors
from acpo_dist.models.sd3 import Sd3Family
from acpo_dist.models.sdxl import SdxlFamily
from acpo_dist.preflight.plan import phases
from acpo_dist.preflight.plan.plan import setting_of

SCALE = 4.0
PROMPTS = captions()[:2]


def family(kind: Any = SdxlFamily, path: str = "toy-sdxl") -> Any:
    """A toy with non-zero adapters."""
    loaded = kind.load(kind.Config(tuning=TuningConfig(rank=4), path=path), device="cpu", trainable=True)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainable_tensors(loaded.network).values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return loaded


def batch_of(model: SdxlFamily, scale: float = SCALE) -> MicroBatch:
    generator = torch.Generator().manual_seed(0)
    timesteps = torch.tensor([120, 260])
    states = LateStates(
        latents=torch.randn(2, *model.sample_shape, generator=generator), timesteps_B=timesteps,
        alpha_bars_B=model.alpha_bars[timesteps],
    )  # fmt: skip
    return MicroBatch(
        sample_ids=("a", "b"), prompts=PROMPTS, noise_keys=(1, 2), states=states, weights_B=torch.ones(2),
        clean=torch.randn(2, *model.sample_shape, generator=generator), clean_is_real=False, guidance_scale=scale,
    )  # fmt: skip


def brightness(clean: torch.Tensor, prompts) -> Callable[[], RewardSignal]:
    """q = mean of x0-hat's square, with its own gradient."""
    size = clean[0].numel()
    quality = clean.detach().square().flatten(1).mean(1)
    signal = RewardSignal(quality_B=quality, gradient=2 * clean.detach() / size, target=0.0, per_metric={})
    return lambda: signal


def gradients(model: SdxlFamily, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.network.zero_grad(set_to_none=True)
    loss.backward()
    return {name: value.grad.clone() for name, value in trainable_tensors(model.network).items()}


@pytest.mark.parametrize("kind", [(SdxlFamily, "toy-sdxl"), (Sd3Family, "toy-flow")], ids=["sdxl", "flow"])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_the_gradient_through_guidance_is_that_of_the_guided_estimate_written_out(rescale: float, kind):
    model = family(*kind)
    batch = replace(batch_of(model), guidance_rescale=rescale)
    recipe = Acpo(Acpo.Config(guidance="full"))
    found = gradients(model, recipe.loss(batch, model, brightness, 0.0).per_sample.mean())

    late = batch.late
    model_outputs = [model.predict(late.latents, late.timesteps_B, model.encode(text)) for text in (["", ""], PROMPTS)]
    guided = model_outputs[0] + SCALE * (model_outputs[1] - model_outputs[0])
    guided = rescale_noise_cfg(guided, model_outputs[1], rescale)
    clean = to_clean(guided, late.latents, late.alpha_bars_B, model.prediction_type)
    wanted = gradients(model, -clean.square().flatten(1).mean(1).mean())
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()))
    # The conditional branch alone is another gradient.
    alone = gradients(model, Acpo(Acpo.Config()).loss(batch, model, brightness, 0.0).per_sample.mean())
    assert any(not torch.allclose(alone[name], value, rtol=1e-2) for name, value in wanted.items() if value.any())


def test_each_branch_is_anchored_by_itself():
    model = family()
    batch = batch_of(model)
    recipe = Acpo(Acpo.Config.model_validate({"guidance": "full", "reward_weight": 0, "anchor": {"uniform": False}}))
    with torch.no_grad():
        loss = recipe.loss(batch, model, brightness, 2.0)
        drifts = []
        for text in (list(PROMPTS), ["", ""]):
            arguments = batch.late.latents, batch.late.timesteps_B, model.encode(text)
            model_output = model.predict(*arguments)
            with model.anchored():
                drifts.append((model_output - model.predict(*arguments)).square().flatten(1).mean(1))
    torch.testing.assert_close(loss.metrics["anchor/late_null"], drifts[1], rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(loss.metrics["anchor/late"], (drifts[0] + drifts[1]) / 2, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(loss.per_sample, drifts[0] + drifts[1], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("guidance", ["conditional", "full"])
def test_without_guidance_in_the_rollouts_there_is_one_branch(guidance):
    model = family()
    with torch.no_grad():
        loss = Acpo(Acpo.Config(guidance=guidance)).loss(batch_of(model, 1.0), model, brightness, 0.0)
    assert "anchor/late_null" not in loss.metrics


def test_the_plan_counts_the_second_branch():
    configs = [load_config("toy_sdxl", ["model.image_size=64", *more]) for more in ((), ("algorithm.guidance=full",))]
    traced = [phases.learner(setting_of(config, architecture_of(config.model)), 4) for config in configs]
    # Late states twice, uniform ones as before: two batches become three.
    assert traced[1].flops / traced[0].flops == pytest.approx(1.5, rel=0.02)
    assert traced[1].peak_bytes > 1.3 * traced[0].peak_bytes
