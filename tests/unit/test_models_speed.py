"""Speed options do not change a model's output; the sampling loop never waits for the device."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from acpo_dist.config.schema import SamplerConfig
from acpo_dist.core.types import SamplePlan
from acpo_dist.core.weights import make_bundle
from acpo_dist.data.toy.world import captions
from acpo_dist.models.config import SpeedConfig, TuningConfig
from acpo_dist.models.family import trainable_tensors
from acpo_dist.models.sd15 import Sd15Family
from acpo_dist.models.sdxl import SdxlFamily
from acpo_dist.tracking.console import Console
from acpo_dist.tracking.jsonl import read_metrics
from acpo_dist.training.local import open_ports
from acpo_dist.training.run import drive
from acpo_dist.workers.rollout.worker import RolloutWorker

PROMPTS = captions()[:2]
FAMILIES = {"sdxl": SdxlFamily, "sd15": Sd15Family}


def load(kind: str = "sdxl", speed: SpeedConfig | None = None, **options):
    config = FAMILIES[kind].Config(
        path=f"toy-{kind}", speed=speed or SpeedConfig(), **{"tuning": TuningConfig(rank=4), **options}
    )
    return FAMILIES[kind].load(config, device="cpu", trainable=True)


def answers(family) -> list[torch.Tensor]:
    """Policy, anchor, image, and the gradients of a loss on all three."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable_tensors(family.network).values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    noisy, at = torch.randn(2, *family.sample_shape, generator=generator), torch.tensor([100, 700])
    model_output = family.predict(noisy, at, family.encode(PROMPTS))
    with torch.no_grad(), family.anchored():
        anchor = family.predict(noisy, at, family.encode(PROMPTS))
    pixels = family.decode(0.1 * model_output)
    (pixels.square().mean() + (model_output - anchor).square().mean()).backward()
    return [
        model_output.detach(),
        anchor,
        pixels.detach(),
        *(v.grad for v in trainable_tensors(family.network).values()),
    ]


def assert_same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for left, right in zip(found, wanted, strict=True):
        # float32 sums in another order.
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5 * float(right.abs().max().clamp(min=1e-3)))


@pytest.mark.parametrize("kind", list(FAMILIES))
@pytest.mark.parametrize("method", ["lora", "full"])
def test_channels_last_changes_nothing_but_the_layout(kind: str, method: str):
    tuning = TuningConfig(method=method, rank=4)
    family = load(kind, SpeedConfig(channels_last=True), tuning=tuning)
    convolution = family.network.get_submodule("conv_in").weight
    assert convolution.is_contiguous(memory_format=torch.channels_last) and not convolution.is_contiguous()
    assert_same(answers(family), answers(load(kind, tuning=tuning)))


def test_a_run_with_channels_last_trains_saves_resumes_and_exports_every_weight(tiny, tmp_path):
    options = ("model.tuning.method=full", "model.speed.channels_last=true", f"run.dir={tmp_path / 'run'}")
    drive(tiny("run.iterations=1", "checkpoint.every=1", *options), open_ports, Console(quiet=True))
    result = drive(
        tiny("run.iterations=2", "checkpoint.every=1", *options), open_ports, Console(quiet=True), resume="auto"
    )
    assert result.iterations == 2 and (tmp_path / "run" / "export" / "unet").is_dir()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_compiled_blocks_answer_as_plain_ones_for_policy_and_anchor(method: str):
    tuning = TuningConfig(method=method, rank=4)
    family = load("sdxl", SpeedConfig(compile="aot_eager"), tuning=tuning)
    compiled = [module for module in family.network.modules() if module._compiled_call_impl is not None]
    assert {type(module).__name__ for module in compiled} == {"BasicTransformerBlock"}
    torch._dynamo.utils.counters.clear()
    assert_same(answers(family), answers(load(tuning=tuning)))
    # Traced, and not fallen back.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["unimplemented"]


def test_a_run_with_compiled_blocks_and_recomputation_learns_what_a_plain_one_does(tiny, tmp_path):
    rows = []
    for name in ("null", "aot_eager"):
        # Two optimiser steps, so that the second one is taken with adapters that do something.
        options = (f"model.speed.compile={name}", "model.memory.gradient_checkpointing=true", "learner.global_batch=4")
        drive(tiny("run.iterations=1", *options, f"run.dir={tmp_path / name}"), open_ports, Console(quiet=True))
        rows.append(read_metrics(tmp_path / name / "metrics.jsonl")[0])
    plain, compiled = rows
    for figure in ("reward/two_stream/mean", "anchor/uniform", "learner/grad_norm"):
        assert compiled[figure] == pytest.approx(plain[figure], rel=1e-3), figure


class NoWaiting(TorchDispatchMode):
    """Rejects reading a tensor's value, which on a GPU waits for all earlier kernels."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("a value was read from the device within the sampling loop")
        return func(*args, **(kwargs or {}))


# diffusers' schedulers read their own levels, which lie on the processor whatever the device.
@pytest.mark.parametrize("solver", ["ddim", "plms", "ltsp"])
def test_the_sampling_loop_reads_no_value_of_a_tensor(solver: str):
    sampler = SamplerConfig(num_steps=4, solver=solver, guidance_scale=3.0, t_max=0.5)
    worker = RolloutWorker(SdxlFamily.Config(path="toy-sdxl"), sampler)
    plans = [SamplePlan(sample_id=f"s{seed}", prompt_id=0, prompt=PROMPTS[0], seed=seed) for seed in (0, 1)]
    steps = []
    predict = worker.family.predict

    def watched(noisy, timesteps, condition):
        # From the first call on, so that what is worked out once per walk is left out.
        if not steps:
            mode.__enter__()
        steps.append(None)
        return predict(noisy, timesteps, condition)

    mode = NoWaiting()
    worker.family.predict = watched
    try:
        end = worker._sample(plans, worker.trajectory, None)
    finally:
        mode.__exit__(None, None, None)
    assert len(steps) >= 4 and end.shape == (2, *worker.family.sample_shape)


@pytest.mark.parametrize("tuning", [TuningConfig(rank=4), TuningConfig(rank=4, use_dora=True)])
def test_merged_adapters_draw_the_same_samples_for_every_version(tuning: TuningConfig):
    config = Sd15Family.Config(path="toy-sd15", tuning=tuning)
    workers = [
        RolloutWorker(config, SamplerConfig(num_steps=2, t_max=1.0, guidance_scale=1.5, merge_adapters=merge))
        for merge in (False, True)
    ]
    plans = [SamplePlan(sample_id="a", prompt_id=0, prompt=PROMPTS[0], seed=1)]
    drawn: list[torch.Tensor] = []
    for version in (0, 1, 2):
        generator = torch.Generator().manual_seed(version)
        weights = {
            name: value.detach() + 0.05 * version * torch.rand(value.shape, generator=generator)
            for name, value in trainable_tensors(workers[0].family.network).items()
        }
        answers = [worker.load(make_bundle(version, weights)) for worker in workers]
        assert answers[0].checksum == answers[1].checksum
        plain, merged = (worker.generate(plans).latents_BCHW for worker in workers)
        torch.testing.assert_close(merged, plain, rtol=1e-3, atol=1e-3)
        drawn.append(merged)
    assert not torch.allclose(drawn[1], drawn[0], atol=0.01) and not torch.allclose(drawn[2], drawn[1], atol=0.01)
