"""Flow families draw the images of their diffusers pipelines, and train as other families do."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor

import acpo_dist.data.toy
from acpo_dist.config.load import load_config
from acpo_dist.config.schema import SamplerConfig
from acpo_dist.core.errors import ConfigError
from acpo_dist.core.types import SamplePlan, TrainTask
from acpo_dist.data.prompts import sample_prompts
from acpo_dist.data.toy.world import captions
from acpo_dist.models.config import SdxlConfig, TuningConfig
from acpo_dist.tracking.console import Console
from acpo_dist.tracking.jsonl import read_metrics
from acpo_dist.training.local import LocalLearner, LocalRewards, LocalRollouts, learner_spec, open_ports
from acpo_dist.training.run import drive
from acpo_dist.workers.rollout.worker import RolloutWorker
from tests.conftest import TINY
from tests.helpers.runs import require_drift

ASSETS = Path(acpo_dist.data.toy.__file__).parent / "assets"
PROMPTS = (captions()[3], captions()[40])
STEPS = 6


class PipelineScheduler(FlowMatchEulerDiscreteScheduler):
    """The flow scheduler with the two attributes that SDXL's pipeline reads of a scheduler."""

    init_noise_sigma = 1.0

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return sample


def start(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def flow_sdxl(folder: Path, **config) -> Path:
    """toy-sdxl with the scheduler of a flow model: a rectified-flow SDXL, whose weights are not trained as one."""
    target = Path(shutil.copytree(ASSETS / "toy-sdxl", folder / "flow-sdxl"))
    content = {"_class_name": "FlowMatchEulerDiscreteScheduler"} | config
    (target / "scheduler" / "scheduler_config.json").write_text(json.dumps(content))
    return target


@torch.no_grad()
def drawn(config, sampler: SamplerConfig) -> Tensor:
    worker = RolloutWorker(config, sampler)
    plans = [SamplePlan(sample_id=f"s{i}", prompt_id=i, prompt=prompt, seed=i) for i, prompt in enumerate(PROMPTS)]
    return worker.family.decode(worker.final_latents(plans, worker.trajectory)).clamp(0, 1)


@torch.no_grad()
@pytest.mark.parametrize(("guidance", "rescale"), [(1.0, 0.0), (4.0, 0.0), (4.0, 0.7)])
def test_a_rectified_flow_sdxl_draws_the_images_of_its_pipeline(
    guidance: float, rescale: float, tmp_path: Path
) -> None:
    folder = flow_sdxl(tmp_path, shift=2.5)
    pipeline = DiffusionPipeline.from_pretrained(ASSETS / "toy-sdxl", dtype=torch.float32)
    pipeline.scheduler = PipelineScheduler(shift=2.5)
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.stack([start((4, 8, 8), seed) for seed in range(2)])
    theirs = pipeline(
        list(PROMPTS), latents=latents, num_inference_steps=STEPS, guidance_scale=guidance, guidance_rescale=rescale,
        output_type="pt",
    ).images  # fmt: skip
    sampler = SamplerConfig(
        num_steps=STEPS, spacing="scheduler", guidance_scale=guidance, guidance_rescale=rescale
    )  # fmt: skip
    config = SdxlConfig(path=str(folder), tuning=TuningConfig(method="lora", rank=4))
    torch.testing.assert_close(drawn(config, sampler), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_acpo_trains_a_rectified_flow_sdxl_and_its_drift_is_measured_to_the_first_level(
    method: str, tmp_path: Path
) -> None:
    options = [f"model.path={flow_sdxl(tmp_path)}", f"run.dir={tmp_path / 'run'}", f"model.tuning.method={method}"]
    drive(load_config("toy_sdxl", [*TINY, "run.iterations=2", *options]), open_ports, Console(quiet=True))
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    require_drift(rows)
    assert any(key.startswith("drift/at/") for key in rows[1])


@pytest.mark.parametrize("step", ["ddim", "flow_grpo"])
def test_a_policy_gradient_on_a_flow_model_starts_with_an_importance_ratio_of_exactly_one(
    step: str, tmp_path: Path
) -> None:
    options = [
        *TINY, f"model.path={flow_sdxl(tmp_path)}", "learner.inner_epochs=1", f"sampler.stochastic_step={step}",
    ]  # fmt: skip
    config = load_config("toy_ddpo", options)
    groups = sample_prompts(PROMPTS, iteration=0, run_seed=0, num_prompts=2, samples_per_prompt=4)
    handles = LocalRollouts(config, device="cpu").generate(groups)
    learner = LocalLearner(learner_spec(config), LocalRewards(config, device="cpu"), device="cpu")
    learner.start(None)
    ids = [name for handle in handles for name in handle.sample_ids]
    task = TrainTask(
        iteration=0, policy_version=0, sample_ids=tuple(ids), weights=dict(zip(ids, (1.0, -1.0) * 4, strict=True)),
        anchor_weight=1.0, learning_rate=1e-3, rewards=(),
    )  # fmt: skip
    report = learner.train(handles, task)
    assert report.optim_steps == 1 and report.metrics["learner/grad_norm"] > 0
    assert all(math.isfinite(value) for value in report.metrics.values())
    # One optimiser step: every ratio belongs to the weights that drew the transition.
    assert report.metrics["ddpo/ratio"] == 1.0


def test_splitting_and_ncp_are_refused_by_name_for_flow_models(tmp_path: Path) -> None:
    folder = flow_sdxl(tmp_path)
    with pytest.raises(ConfigError, match=r"sampler\.solver.*stsp"):
        RolloutWorker(SdxlConfig(path=str(folder)), SamplerConfig(num_steps=4, solver="stsp"))


def test_flow_grpos_step_is_refused_by_name_for_other_models_and_without_noise() -> None:
    with pytest.raises(ConfigError, match=r"sampler\.stochastic_step.*epsilon"):
        RolloutWorker(SdxlConfig(path="toy-sdxl"), SamplerConfig(num_steps=4, eta=0.7, stochastic_step="flow_grpo"))
    with pytest.raises(ConfigError, match=r"sampler\.stochastic_step.*sampler\.eta"):
        load_config("toy_ddpo", ["sampler.stochastic_step=flow_grpo", "sampler.eta=0", "algorithm.type=acpo"])
