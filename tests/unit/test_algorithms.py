"""Every registered algorithm on every model family, and properties of its first step."""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline
from safetensors.torch import load_file
from torch import Tensor

from acpo_dist.algorithms.ddpo import branches, taken
from acpo_dist.algorithms.denoising import both_outputs, statistics_of
from acpo_dist.algorithms.noising import noise_forward
from acpo_dist.algorithms.preference import BETA
from acpo_dist.core.registry import ALGORITHMS
from acpo_dist.core.seeding import generator
from acpo_dist.core.types import TrainTask
from acpo_dist.data.prompts import sample_prompts
from acpo_dist.diffusion.prediction import to_noise
from acpo_dist.diffusion.sampling import ddim_step, guide
from acpo_dist.tracking.console import Console
from acpo_dist.tracking.jsonl import read_metrics
from acpo_dist.training.local import LocalLearner, LocalRewards, LocalRollouts, learner_spec, open_ports
from acpo_dist.training.run import drive
from acpo_dist.workers.learner.samples import SampleStore
from acpo_dist.workers.learner.worker import LearnerWorker
from tests.helpers.runs import copy_run, require_drift

FAMILIES = {
    "sdxl": (),
    "sd15": ("model={type: sd15, path: toy-sd15}",),
    "flow": ("model={type: sd3, path: toy-flow}",),
    "ddpm": ("model={type: ddpm, path: toy-ddpm}", "data.prompts=none", "rewards.cut=image"),
}  # fmt: skip
NEEDS = {"ddpo": ("sampler.eta=1",)}
GROUPS = ("rollout.prompts_per_iteration=2", "rollout.samples_per_prompt=4")


def settings(algorithm: str, family: str = "sdxl", *more: str) -> tuple[str, ...]:
    return (*FAMILIES[family], f"algorithm={{type: {algorithm}}}", *GROUPS, *NEEDS.get(algorithm, ()), *more)


class Parts:
    """Scored rollouts of one iteration, with a learner at the weights that drew them."""

    def __init__(self, config, prompts: Sequence[str]) -> None:
        self.config = config
        self.rollouts = LocalRollouts(config, device="cpu")
        self.rewards = LocalRewards(config, device="cpu")
        self.learner = self.learner_of(config)
        self.groups = sample_prompts(prompts, iteration=0, run_seed=0, num_prompts=2, samples_per_prompt=4)
        self.handles = self.rollouts.generate(self.groups)
        self.batches = [handle.payload for handle in self.handles]
        self.ids = tuple(plan.sample_id for group in self.groups for plan in group.samples)

    def learner_of(self, config) -> LearnerWorker:
        """A learner at the weights that drew the rollouts; the configuration may differ in what only learners read."""
        learner = LocalLearner(learner_spec(config), self.rewards, device="cpu").worker
        learner.start(None)
        return learner

    def task(self, weights: dict[str, float] | None = None, **more) -> TrainTask:
        return TrainTask(
            iteration=0,
            policy_version=0,
            sample_ids=self.ids,
            weights=weights or dict.fromkeys(self.ids, 1.0),
            anchor_weight=0.0,
            learning_rate=4e-3,
            rewards=(),
            **more,
        )

    def moments(self) -> dict[str, Tensor]:
        """First moments after one step: a tenth of the gradient."""
        with tempfile.TemporaryDirectory() as folder:
            self.learner.save(Path(folder))
            state = load_file(f"{folder}/optimizer.safetensors")
        return {name: value for name, value in state.items() if name.startswith("exp_avg.")}


# Families differ in conditioning and space, algorithms in their loss; the two meet in `MicroBatch` and `Network` alone.
# For the algorithms of ELSEWHERE, other runs on sdxl require the same: `plain_run` (acpo), test_gradient_steps (draft),
# test_crd, test_nft, and the runs with an anchor below.
ELSEWHERE = {"acpo", "draft", "crd", "nft", "dpo", "cpo"}
PAIRINGS = [
    *((algorithm, "sdxl") for algorithm in ALGORITHMS if algorithm not in ELSEWHERE),
    *((algorithm, family) for family in ("sd15", "ddpm", "flow") for algorithm in ("acpo", "nft", "dpo")),
]


@pytest.mark.parametrize(("algorithm", "family"), PAIRINGS)
def test_every_algorithm_trains_every_family_and_reports_its_drift(tiny, tmp_path, algorithm, family):
    root = tmp_path / "run"
    drive(tiny(*settings(algorithm, family), "run.iterations=2", f"run.dir={root}"), open_ports, Console(quiet=True))
    require_drift(read_metrics(root / "metrics.jsonl"))
    if (algorithm, family) == ("acpo", "ddpm"):
        assert DDPMPipeline.from_pretrained(root / "export").unet.config["in_channels"] == 3


@pytest.mark.parametrize("algorithm", ["nft", "dpo", "cpo"])
def test_the_anchor_and_its_budget_can_be_switched_on_under_any_algorithm(tiny, tmp_path, algorithm):
    root = tmp_path / "run"
    config = tiny(
        *settings(algorithm),
        "algorithm.anchor.budget=0.001",
        "algorithm.anchor.headroom=0.5",
        "algorithm.anchor.start=0.5",
        "run.iterations=3",
        f"run.dir={root}",
    )
    drive(config, open_ports, Console(quiet=True))
    rows = read_metrics(root / "metrics.jsonl")
    require_drift(rows)
    weights = [row["anchor/weight"] for row in rows[:-1]]
    assert weights[0] == pytest.approx(config.algorithm.anchor_unit / 2)
    # Nothing drifts in the first iteration, so the weight falls; then the tiny budget is overspent and it rises.
    assert weights[1] < weights[0] and weights[2] > weights[1]


def test_a_preference_starts_at_log_two_in_either_space(tiny):
    parts = Parts(tiny(*settings("dpo")), ["a", "b"])
    for space in ("eps", "ncp"):
        learner = parts.learner_of(tiny(*settings("dpo"), f"algorithm.space={space}"))
        found = learner.train(parts.batches, parts.task(constants={BETA: 2000.0}))[0].means()
        assert found["preference/loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert found["preference/logit"] == pytest.approx(0, abs=1e-6)


def test_a_pair_shares_noise_and_timestep_and_other_pairs_do_not(tiny):
    parts = Parts(tiny(*settings("dpo")), ["a", "b"])
    batch = parts.learner.batches.make(SampleStore(parts.batches, policy_version=0), parts.ids, parts.task(), 0)
    states = noise_forward(batch, parts.learner.network, lowest=1)
    assert torch.equal(states.noise[::2], states.noise[1::2])
    assert torch.equal(states.timesteps_B[::2], states.timesteps_B[1::2])
    assert not torch.equal(states.noise[0], states.noise[2])


def test_the_gradient_of_nft_is_that_of_its_two_branches_written_out(tiny):
    config = tiny(
        *settings("nft"),
        "algorithm.weighting=noise",
        "learner.global_batch=8",
        "learner.micro_batch=8",
        "learner.max_grad_norm=1e9",
    )
    parts = Parts(config, ["a", "b"])
    advantages = dict(zip(parts.ids, torch.linspace(-1, 1, len(parts.ids)).tolist(), strict=True))
    task = parts.task(advantages)
    network, beta = parts.learner.network, parts.config.algorithm.beta
    batch = parts.learner.batches.make(SampleStore(parts.batches, policy_version=0), parts.ids, task, 0)
    states = noise_forward(batch, network, lowest=1)
    with torch.enable_grad():
        model_output, base = both_outputs(network, states)
        policy_noise, base_noise = (
            to_noise(each, states.latents, states.alpha_bars_B, network.prediction_type)
            for each in (model_output, base)
        )
        share = (1 + batch.weights_B) / 2
        plus = base_noise + beta * (policy_noise - base_noise) - states.noise
        minus = base_noise - beta * (policy_noise - base_noise) - states.noise
        branches = share * plus.square().mean((1, 2, 3)) + (1 - share) * minus.square().mean((1, 2, 3))
        wanted = torch.autograd.grad(
            branches.mean() / beta,
            [p for p in parts.learner.family.network.parameters() if p.requires_grad],
            allow_unused=True,
        )
    names = [n for n, p in parts.learner.family.network.named_parameters() if p.requires_grad]
    parts.learner.train(parts.batches, task)
    moments = parts.moments()
    largest = max(float(g.abs().max()) for g in wanted if g is not None)
    assert largest > 0
    for name, gradient in zip(names, wanted, strict=True):
        if gradient is not None:
            found = moments[f"exp_avg.{name}"] * 10
            assert (found - gradient).abs().max() <= 2e-4 * largest


def test_ddpo_starts_at_ratio_one_for_any_batch_size(tiny):
    options = (*settings("ddpo"), "learner.global_batch=8", "sampler.guidance_scale=2")
    parts = Parts(tiny(*options), ["a", "b"])
    for micro_batch in (1, 2, 8):
        learner = parts.learner_of(tiny(*options, f"learner.micro_batch={micro_batch}"))
        found = learner.train(parts.batches, parts.task())[0].means()
        assert found["ddpo/ratio"] == 1.0 and found["ddpo/clipped"] == 0.0


def test_a_second_pass_of_ddpo_is_held_against_the_weights_that_made_the_rollouts(tiny):
    options = ("learner.global_batch=8", "learner.inner_epochs=3", "algorithm.clip_range=1e-9")
    parts = Parts(tiny(*settings("ddpo"), *options), ["a", "b"])
    advantages = dict(zip(parts.ids, torch.linspace(-1, 1, len(parts.ids)).tolist(), strict=True))
    found, steps, _ = parts.learner.train(parts.batches, replace(parts.task(advantages), learning_rate=0.01))
    row = found.means()
    # The first of three passes is at ratio 1; in the others most samples have left so narrow a range.
    assert steps == 3 and 0 < row["ddpo/clipped"] < 2 / 3 + 1e-9
    assert row["ddpo/log_ratio_abs"] > 1e-6


def test_a_rollout_keeps_the_state_that_its_own_stochastic_step_led_to(tiny):
    parts = Parts(tiny(*settings("ddpo"), "sampler.guidance_scale=2", "sampler.late_per_sample=8"), ["a", "b"])
    store = SampleStore(parts.batches, policy_version=0)
    batch = parts.learner.batches.make(store, parts.ids, parts.task(), 0)
    late, network = batch.late, parts.learner.network
    assert late.following is not None and late.following_alpha_bars_B is not None
    joined = network.encode([""] * len(batch.prompts)).join(network.encode(batch.prompts))
    with torch.no_grad():
        both = network.predict(torch.cat([late.latents] * 2), torch.cat([late.timesteps_B] * 2), joined)
    unconditional, conditional = both.chunk(2)
    model_output = guide(conditional, unconditional, 2.0)
    for row in range(len(parts.ids)):
        level, following = float(late.alpha_bars_B[row]), float(late.following_alpha_bars_B[row])
        assert following < 1
        variance = (1 - following) / (1 - level) * (1 - level / following)
        mean = ddim_step(
            model_output[[row]],
            late.latents[[row]],
            level,
            following,
            network.prediction_type,
            eta=1.0,
            noise=torch.zeros_like(late.latents[[row]]),
        )
        standard = ((late.following[[row]] - mean) / variance**0.5).flatten()
        # What is left of the step is unit noise: 64 or more numbers, five standard errors.
        assert abs(float(standard.mean())) < 5 / len(standard) ** 0.5
        assert abs(float(standard.square().mean()) - 1) < 5 * (2 / len(standard)) ** 0.5


@pytest.mark.parametrize("eta", [0.3, 0.7])
@pytest.mark.parametrize("kind", ["ddim", "flow_grpo"])
def test_the_learner_finds_the_noise_that_a_flow_rollout_drew(tiny, kind, eta):
    options = (
        "sampler.num_steps=6",
        "sampler.late_per_sample=8",
        f"sampler.eta={eta}",
        f"sampler.stochastic_step={kind}",
    )
    parts = Parts(tiny(*settings("ddpo", "flow"), *options), ["a", "b"])
    batch = parts.learner.batches.make(SampleStore(parts.batches, policy_version=0), parts.ids, parts.task(), 0)
    plans = {plan.sample_id: plan for group in parts.groups for plan in group.samples}
    trajectory, late = parts.rollouts.worker.trajectory, batch.late
    with torch.no_grad():
        step, log_prob_B = taken(batch, parts.learner.network, *branches(batch, parts.learner.network))
    for row, name in enumerate(parts.ids):
        at = trajectory.alpha_bars.index(float(late.alpha_bars_B[row]))
        drawn = torch.randn(late.latents[row].shape, generator=generator("eta", plans[name].seed, at))
        found = (late.following[row] - step.mean[row]) / step.std_B[row]
        # One network call of a batch of another size, divided by standard deviations of 0.05 and more.
        torch.testing.assert_close(found, drawn, rtol=0, atol=1e-3)
        wanted = -drawn.square().mean() / 2 - step.std_B[row].log() - 0.5 * math.log(2 * math.pi)
        assert float(log_prob_B[row]) == pytest.approx(float(wanted), abs=1e-3)


def test_a_sample_of_weight_zero_pulls_at_nothing(tiny):
    parts = Parts(tiny(*settings("rwr"), "learner.global_batch=8", "learner.micro_batch=4"), ["a", "b"])
    kept = []
    for weight in (0.0, 1.0):
        parts.learner.train(parts.batches, parts.task(dict.fromkeys(parts.ids, weight)))
        kept.append(max(float(value.abs().max()) for value in parts.moments().values()))
    assert kept[0] == 0.0 < kept[1]


def test_ncp_calibrates_beta_on_the_base_and_a_resumed_run_keeps_it(tiny, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    common = (*settings("cpo"), "algorithm.space=ncp", "checkpoint.every=1", "run.iterations=2")
    drive(tiny(*common, f"run.dir={whole}"), open_ports, Console(quiet=True))
    require_drift(read_metrics(whole / "metrics.jsonl"))
    copy_run(whole, halves, newest=1)
    drive(tiny(*common, f"run.dir={halves}"), open_ports, Console(quiet=True), resume="auto")
    one, other = (load_file(root / "checkpoints/000002/learner/policy.safetensors") for root in (whole, halves))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_noise_statistics_of_the_learner_are_the_plain_errors(tiny):
    parts = Parts(tiny(*settings("sft")), ["a", "b"])
    network = parts.learner.network
    batch = parts.learner.batches.make(SampleStore(parts.batches, policy_version=0), parts.ids, parts.task(), 0)
    states = noise_forward(batch, network, lowest=1)
    with torch.no_grad():
        model_output, base = both_outputs(network, states)
        errors = statistics_of(batch, network, states, model_output, base)
        predicted = to_noise(model_output, states.latents, states.alpha_bars_B, network.prediction_type)
        plain = (predicted - states.noise).square().mean((1, 2, 3))
    assert torch.allclose(errors.policy_error, plain, rtol=1e-4)
