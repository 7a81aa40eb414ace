"""`acpo plan` counts what torch allocates: parameters to the unit, memory against the allocator's own records."""

import json
from functools import cache

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from acpo_dist.algorithms.acpo import Acpo
from acpo_dist.algorithms.ddpo import Ddpo
from acpo_dist.config.load import load_config
from acpo_dist.core.errors import ModelError
from acpo_dist.core.registry import MODELS, resolve
from acpo_dist.models.architectures import PUBLISHED, architecture_of
from acpo_dist.models.config import TuningConfig
from acpo_dist.models.family import trainable_tensors
from acpo_dist.models.sdxl import SdxlFamily
from acpo_dist.preflight.plan import phases
from acpo_dist.preflight.plan.kernels import Kernels
from acpo_dist.preflight.plan.memory import LearnerState, learner_state
from acpo_dist.preflight.plan.networks import new_text_encoders, new_unet, new_vae
from acpo_dist.preflight.plan.plan import count_parameters, make_plan, setting_of
from acpo_dist.preflight.plan.rates import DEVICES, Device
from acpo_dist.preflight.plan.tracer import trace
from tests.helpers.plans import planned

GIB = 2**30
SMALL = ["model.image_size=64", "rollout.batch_size=4", "learner.micro_batch=4", "learner.global_batch=4"]


def allocated_peak(run) -> int:
    """Peak of the bytes allocated by torch's CPU allocator above the start, from its own records."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    live = peak = 0
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def family_of(config, **changes):
    section = config.model.model_copy(update=changes)
    return SdxlFamily.load(section, device="cpu", trainable=True)


@pytest.mark.parametrize(
    ("kind", "unet", "vae", "encoders"),
    [
        ("sdxl", 2_567_463_684, 83_653_863, [123_060_480, 694_659_840]),
        ("sd15", 859_520_964, 83_653_863, [123_060_480]),
    ],
)
def test_published_architectures_have_the_published_number_of_parameters(kind, unet, vae, encoders):
    def count(module):
        return sum(value.numel() for value in module.parameters())

    architecture = PUBLISHED[kind]
    assert count(new_unet(architecture, torch.float32)) == unet
    assert count(new_vae(architecture, torch.float32)) == vae
    assert [count(encoder) for encoder in new_text_encoders(architecture)] == encoders


@pytest.mark.parametrize(("source", "tuning"), [("toy_sdxl", "lora"), ("toy_sdxl", "full"), ("toy_flow", "lora")])
def test_parameters_and_conditions_are_those_of_the_loaded_model(source, tuning):
    config = load_config(source, [f"model.tuning.method={tuning}"])
    family = resolve("model", MODELS, config.model.type).load(config.model, device="cpu", trainable=True)
    setting = setting_of(config, architecture_of(config.model))
    wanted, found = (each.encode(["a"]).tensors for each in (family, setting.sampler_family))
    # The loaded SDXL adds its time ids at the call.
    assert {name: found[name].shape for name in wanted} == {name: value.shape for name, value in wanted.items()}
    planned = count_parameters(setting)
    whole = sum(value.numel() for value in family.network.parameters())
    trainable = sum(value.numel() for value in trainable_tensors(family.network).values())
    assert planned["trainable"] == trainable
    assert planned["network"] == (whole if tuning == "full" else whole - trainable)
    assert planned["vae"] == sum(value.numel() for value in family.decoder.vae.parameters())


def learner_step(family, config):
    """A micro-batch's forward and backward pass as in the algorithm, on real tensors."""
    count = config.learner.micro_batch
    noisy = torch.randn(count, *family.sample_shape)
    timesteps = torch.full((count,), 300)
    condition = family.encode(["a red circle on a white background"] * count)

    def anchored():
        with torch.no_grad(), family.anchored():
            return family.predict(noisy, timesteps, condition)

    def run():
        loss = (noisy - family.predict(noisy, timesteps, condition)).square().mean()
        anchored()
        loss = loss + (family.predict(noisy, timesteps, condition) - anchored()).square().mean()
        loss.backward()
        family.network.zero_grad(set_to_none=True)

    return run


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_a_learner_step_allocates_the_planned_memory_within_15_percent(tuning, checkpointing):
    memory = f"model.memory.gradient_checkpointing={checkpointing}".lower()
    config = load_config("toy_sdxl", [*SMALL, f"model.tuning.method={tuning}", memory])
    plan = planned("toy_sdxl", *SMALL, f"model.tuning.method={tuning}", memory).roles["learner"]
    measured = allocated_peak(learner_step(family_of(config), config)) / GIB
    assert plan.activations + plan.gradients == pytest.approx(measured, rel=0.15)


def test_recomputation_saves_the_planned_memory():
    plans = [
        planned(
            "toy_sdxl", *SMALL, "model.tuning.method=lora", f"model.memory.gradient_checkpointing={value}"
        ).roles["learner"]
        for value in ("false", "true")
    ]  # fmt: skip
    assert plans[1].activations < 0.7 * plans[0].activations
    assert plans[1].weights == plans[0].weights and plans[1].optimizer == plans[0].optimizer


def test_decoding_and_its_backward_pass_allocate_the_planned_memory_within_15_percent():
    config = load_config("toy_sdxl", SMALL)
    plan, family = planned("toy_sdxl", *SMALL), family_of(config)
    clean = torch.randn(4, *family.sample_shape)

    def sample():
        with torch.no_grad():
            (family.decode(clean).clamp(0, 1) * 255).round()

    def back():
        wanted = clean.clone().requires_grad_(True)
        torch.autograd.grad(family.decode(wanted).sum(), wanted)

    assert plan.roles["rollout"].activations == pytest.approx(allocated_peak(sample) / GIB, rel=0.15)
    assert plan.roles["reward"].activations == pytest.approx(allocated_peak(back) / GIB, rel=0.15)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_optimiser_and_gradients_are_those_of_the_engine(tuning):
    from acpo_dist.workers.learner.engine import TorchEngine

    config = load_config("toy_sdxl", [f"model.tuning.method={tuning}"])
    family = family_of(config)
    engine = TorchEngine(family.network, config.learner, accumulation=1)
    for parameter in trainable_tensors(family.network).values():
        parameter.grad = torch.ones_like(parameter)
    held = sum(value.grad.nbytes for value in trainable_tensors(family.network).values())
    engine.step()
    moments = sum(value.nbytes for name, value in engine.optimiser_state().items() if name != "step")
    plan = planned("toy_sdxl", f"model.tuning.method={tuning}").roles["learner"]
    assert plan.gradients * GIB == held
    assert plan.optimizer * GIB == pytest.approx(moments, rel=0.01)


def test_sharding_divides_what_each_stage_shards():
    def state(stage, ranks, narrow=True):
        return learner_state(
            LearnerState(
                frozen=0, trainable=10**9, frozen_bytes=4, trainable_bytes=4, zero_stage=stage, ranks=ranks,
                narrow=narrow,
            )
        )  # fmt: skip

    # Rajbhandari et al. 2020: 2 + 2 + 12 bytes per parameter, sharded over the ranks stage by stage.
    assert state(1, 4)[2] == 12e9 / 4
    assert state(2, 4)[1] < state(1, 4)[1] and state(2, 4)[2] == state(1, 4)[2]
    assert state(3, 4)[0] == 2e9 / 4
    assert state(None, 1)[:1] == (4e9,) and state(None, 1)[2] == 8e9


@pytest.mark.slow
def test_sdxl_needs_the_known_number_of_operations():
    found = planned("sdxl_lora", device="a100-40").teraflops
    # Two branches of 6.76 T each at 128 x 128 latents, and 10.47 T for the decoder; adapters add a little.
    assert found["rollout_step"] == pytest.approx(2 * 6.76, rel=0.03)
    assert found["decode"] == pytest.approx(10.47, rel=0.03)


@cache
def phase_flops(phase, *overrides: str) -> float:
    config = load_config("toy_sdxl", [*SMALL, "model.tuning.targets=[to_q, to_v]", *overrides])
    traced = phase(setting_of(config, architecture_of(config.model)), 4)
    return (traced[0] if isinstance(traced, tuple) else traced).flops


def learner_flops(*overrides: str) -> float:
    return phase_flops(phases.learner, *overrides)


def test_each_algorithm_is_counted_by_the_forwards_it_makes():
    whole = learner_flops()
    # Policy and anchor once: no second batch is anchored.
    once = learner_flops("algorithm.anchor.uniform=false")
    groups = ("rollout.samples_per_prompt=4", "rollout.prompts_per_iteration=8", "sampler.guidance_scale=3")
    assert whole == pytest.approx(2 * once, rel=0.01)
    # The last sampler step is guided: both branches.
    assert learner_flops("algorithm={type: draft}") == pytest.approx(2 * once, rel=0.01)
    # Both branches, and a forward over them before the first step.
    ddpo = learner_flops("algorithm={type: ddpo}", "sampler.eta=1", *groups)
    step = phase_flops(phases.rollout, *groups)
    # One forward of the policy that drew the samples, on the conditional branch.
    assert learner_flops("algorithm={type: nft}", *groups) == pytest.approx(once + step / 2, rel=0.01)
    assert ddpo == pytest.approx(2 * once + step, rel=0.01)
    # NCP runs the frozen down blocks on policy, reference and target.
    assert learner_flops("algorithm={type: dpo, space: ncp}", *groups) > 1.1 * once


def test_each_sampler_step_with_a_gradient_is_counted_with_its_recomputation():
    tail = ("sampler.late_per_sample=4", "sampler.num_steps=4", "algorithm.anchor.uniform=false")
    two, three, most = (
        learner_flops(*tail, f"algorithm.gradient_steps={steps}", *more)
        for steps, more in ((2, ()), (3, ()), ("random", ("algorithm.max_gradient_steps=3",)))
    )
    # A policy forward with its backward pass and a second forward, for both branches of the guidance; `once` has a
    # forward of the base model in place of the second one, and no gradient with respect to the state.
    once = learner_flops("algorithm.anchor.uniform=false")
    assert 2 * once < three - two < 2.3 * once
    assert most == three


def test_a_plugged_in_algorithm_is_counted_by_its_own_forwards(monkeypatch):
    class Twice(Acpo):
        def loss(self, batch, network, reward, anchor_weight, prepared_B=None):
            network.predict(batch.late.latents, batch.late.timesteps_B, network.encode(batch.prompts)).sum().backward()
            return super().loss(batch, network, reward, anchor_weight, prepared_B)

    config = load_config("toy_sdxl", SMALL)
    setting = setting_of(config, architecture_of(config.model))
    plain = phases.learner(setting, 4).flops
    monkeypatch.setattr("acpo_dist.preflight.plan.phases.resolve", lambda *_: Twice)
    # ACPO makes two policy forwards with their backward passes and two anchor forwards: one policy pass more.
    assert 1.2 * plain < phases.learner(setting, 4).flops < 1.5 * plain


def test_a_plan_traces_the_rollouts_own_sampler(monkeypatch):
    class Seen(Ddpo):
        def loss(self, batch, *rest):
            seen.append((batch.guidance_scale, batch.guidance_rescale, batch.eta, batch.stochastic_step))
            return super().loss(batch, *rest)

    seen = []
    sampler = "sampler={guidance_scale: 3, guidance_rescale: 0.7, eta: 0.4, stochastic_step: flow_grpo}"
    config = load_config("toy_sdxl", [*SMALL, sampler, "algorithm={type: ddpo}", "rollout.samples_per_prompt=2"])
    monkeypatch.setattr("acpo_dist.preflight.plan.phases.resolve", lambda *_: Seen)
    phases.learner(setting_of(config, architecture_of(config.model)), 4)
    assert seen == [(3, 0.7, 0.4, "flow_grpo")]


def test_autocast_is_counted_as_torch_runs_it():
    """The replacement of autocast has the result types of the real one, on real tensors."""
    weight, image = torch.randn(6, 4, 3, 3, requires_grad=True), torch.randn(2, 4, 8, 8)
    kernels = Kernels(autocast=True)
    with kernels.active(), kernels.region():
        found = torch.nn.functional.conv2d(image, weight)
        wide = torch.nn.functional.group_norm(found, 2)
        attention = torch.nn.functional.scaled_dot_product_attention(*[image] * 3)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = torch.nn.functional.conv2d(image, weight)
        attended = torch.nn.functional.scaled_dot_product_attention(*[image] * 3)
    assert found.dtype == wanted.dtype == torch.bfloat16 and torch.equal(found, wanted)
    assert attention.dtype == attended.dtype and torch.equal(attention, attended)
    # As on CUDA; autocast of the CPU would leave it narrow.
    assert wide.dtype == torch.float32
    with kernels.active():
        # The decoder and the NCP encoder run outside of the region.
        assert torch.nn.functional.conv2d(image, weight).dtype == torch.float32
    # The functions are restored.
    assert torch.nn.functional.conv2d(image, weight).dtype == torch.float32


def test_8_bit_moments_are_planned_as_the_optimiser_holds_them():
    from acpo_dist.workers.learner.engine import TorchEngine

    config = load_config("toy_sdxl", ["model.tuning.method=full", "learner.optimizer=adamw_8bit"])
    family = family_of(config)
    state = TorchEngine(family.network, config.learner, accumulation=1).optimiser_state()
    # Small tensors keep float32, and a scale covers 256 elements or the rest of them.
    narrow = {name for name, value in state.items() if value.dtype == torch.uint8}
    count = sum(state[name].numel() for name in narrow)
    held = sum(v.nbytes for name, v in state.items() if v.dtype == torch.uint8 or name.startswith("absmax"))
    plan = make_plan(config)
    whole = held * 2 * plan.parameters["trainable"] / count
    assert plan.roles["learner"].optimizer * GIB == pytest.approx(whole, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("sdxl_lora", "a100-40"), ("sdxl_full_1xh200", "h200"), ("sdxl_full_zero2", "a100-80"),
        ("sdxl_2node", "a100-80"), ("sd15_lora", "16-gb"), ("sdxl_lora_24gb", "rtx4090"),
    ],
)  # fmt: skip
def test_shipped_configurations_fit_the_gpu_that_their_first_line_names(name, device, monkeypatch):
    monkeypatch.setitem(DEVICES, "16-gb", Device(name="16-gb", memory_gib=15.6, peak_tflops={"float32": 30}))
    plan = planned(name, device=device)
    assert not any("out of memory" in text for text in plan.warnings), plan.warnings
    # The metrics' own networks are not in it.
    assert max(plan.needed_gib.values()) < 0.85 * (plan.device.memory_gib or 0)


def test_a_run_that_does_not_fit_gets_a_warning_with_remedies(monkeypatch):
    small = Device(name="small", memory_gib=1.02, peak_tflops={"float32": 1.0})
    monkeypatch.setitem(DEVICES, "h100", small)
    plan = make_plan(load_config("toy_sdxl", ["model.image_size=128"]), device="h100")
    assert plan.warnings[0].startswith("out of memory") and "Try " in plan.warnings[0]
    fits = planned("toy_sdxl", device="h200")
    assert not any("out of memory" in text for text in fits.warnings)


def test_a_hub_model_that_is_not_on_disk_is_planned_on_its_published_architecture(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config = load_config("sdxl_lora")
    assert architecture_of(config.model).published
    with pytest.raises(ModelError, match="its size is unknown"):
        architecture_of(load_config("cifar10_ddpm", ["model.path=someone/a-ddpm"]).model)


def test_the_trace_counts_a_matrix_product_and_its_memory():
    left, right = torch.ones(64, 32), torch.ones(32, 16)
    found = trace(lambda: left @ right, [left, right])
    assert (found.flops, found.peak_bytes) == (2 * 64 * 32 * 16, 64 * 16 * 4)


def test_the_command_prints_the_documented_keys(monkeypatch, capsys):
    import sys

    from acpo_dist.cli import main

    monkeypatch.setattr(sys, "argv", ["acpo", "plan", "toy_sdxl", "--price", "2.5", "--json"])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"parameters", "roles", "batch", "seconds_per_iteration", "warnings", "cost"} <= set(found)
    assert set(found["roles"]) == {"rollout", "learner", "reward"}
    total = found["roles"]["learner"]["memory_gib"]
    assert set(total) == {"weights", "gradients", "optimizer", "anchor", "activations", "total"}
    assert total["total"] == pytest.approx(sum(value for name, value in total.items() if name != "total"), abs=1e-3)
    assert found["batch"]["accumulation"] * found["batch"]["micro_batch"] == found["batch"]["global_batch"]


def test_trainable_parameters_are_proportional_to_the_rank():
    configs = [load_config("toy_sdxl", [f"model.tuning.rank={rank}"]) for rank in (4, 8)]
    counts = [count_parameters(setting_of(config, architecture_of(config.model)))["trainable"] for config in configs]
    assert counts[1] == 2 * counts[0]
    assert TuningConfig().rank == 16
