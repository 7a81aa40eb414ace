"""DiffusionNFT on a 1-D Gaussian with exact minimisers, and its sampling policy in a run."""

import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from acpo_dist.algorithms.base import MicroBatch
from acpo_dist.algorithms.config import NftConfig
from acpo_dist.algorithms.denoising import Nft
from acpo_dist.algorithms.noising import NoisedStates
from acpo_dist.config.load import load_config
from acpo_dist.diffusion.prediction import add_noise, to_clean
from acpo_dist.diffusion.sampling import sample
from acpo_dist.diffusion.trajectory import explicit_trajectory
from acpo_dist.models.family import trainable_tensors
from acpo_dist.objective.advantage import group_advantages
from acpo_dist.objective.policy_gradient import nft_clean_loss
from acpo_dist.tracking.console import Console
from acpo_dist.tracking.jsonl import read_metrics
from acpo_dist.training.local import open_ports
from acpo_dist.training.run import drive
from tests.conftest import TINY
from tests.helpers.runs import copy_run, require_drift

STEPS, SAMPLES = 40, 20_000
# Equal angles: DDIM's steps shrink a Gaussian by the cosine of each.
LEVELS = torch.linspace(0.02, math.pi / 2 - 0.02, STEPS, dtype=torch.float64).cos().square()


class Gaussian:
    """Noise prediction s x + b of Gaussian data; b by timestep is the policy, the sampling policy or the base (0)."""

    prediction_type = "epsilon"
    alpha_bars = LEVELS

    def __init__(self) -> None:
        self.base = torch.zeros_like(LEVELS)
        self.policy, self.sampling = self.base.clone().requires_grad_(True), self.base.clone()
        self._active: Tensor | None = None

    def encode(self, prompts: Sequence[str]) -> Any:
        return None

    def predict(self, noisy: Tensor, timesteps_B: Tensor, condition: Any) -> Tensor:
        at = timesteps_B.long()
        shift = (self.policy if self._active is None else self._active)[at]
        return (1 - LEVELS[at]).sqrt().reshape(-1, 1, 1, 1) * noisy + shift.reshape(-1, 1, 1, 1)

    @contextmanager
    def use(self, table: Tensor) -> Iterator[None]:
        self._active = table
        yield
        self._active = None

    def anchored(self):
        return self.use(self.base)

    def old(self):
        return self.use(self.sampling)

    def features(self, latents: Tensor, timesteps_B: Tensor, condition: Any) -> Sequence[Tensor]:
        raise NotImplementedError


def rollout(network: Gaussian, table: Tensor, seed: int) -> Tensor:
    start = torch.randn(SAMPLES, 1, 1, 1, generator=torch.Generator().manual_seed(seed))
    trajectory = explicit_trajectory(LEVELS, list(reversed(range(STEPS))))
    with network.use(table), torch.no_grad():
        return sample(lambda state, t: network.predict(state, t, None), start, trajectory, "epsilon").double()


def minimise(network: Gaussian, algorithm: Nft, clean: Tensor, seed: int) -> None:
    """Set the policy to the exact minimiser: the loss is quadratic in the one number of each timestep."""
    names = [str(index) for index in range(SAMPLES)]
    rewards = {"x": dict(zip(names, clean.flatten().tolist(), strict=True))}
    advantages = group_advantages([names], rewards, {"x": 1.0})
    units = torch.tensor([advantages.unit(name) for name in names], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    timesteps = torch.randint(STEPS, (SAMPLES,), generator=generator)
    noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    states = NoisedStates(
        latents=add_noise(clean, noise, LEVELS[timesteps]), noise=noise, timesteps_B=timesteps,
        alpha_bars_B=LEVELS[timesteps], is_null_B=torch.zeros(SAMPLES, dtype=torch.bool), condition=None,
    )  # fmt: skip
    batch = MicroBatch(
        sample_ids=tuple(names), prompts=("",) * SAMPLES, noise_keys=(), states=None, clean=clean,
        clean_is_real=False, weights_B=units,
    )  # fmt: skip
    with torch.no_grad():
        network.policy.copy_(network.sampling)
    output = network.predict(states.latents, timesteps, None)
    loss, _ = algorithm.objective(batch, network, states, output, output.detach())
    (gradient,) = torch.autograd.grad(loss.mean(), network.policy, create_graph=True)
    # Timesteps do not mix: the Hessian is diagonal.
    (curvature,) = torch.autograd.grad(gradient.sum(), network.policy)
    with torch.no_grad():
        network.policy -= gradient / curvature


@pytest.mark.parametrize(("reference", "moves"), [("old", (1, 2, 3)), ("base", (1, 1, 1))])
def test_the_mean_of_a_gaussian_moves_on_with_the_sampling_policy_and_stops_with_the_base(reference, moves):
    network, algorithm = Gaussian(), Nft(NftConfig(beta=0.1, weighting="noise"))
    # -E[A e | x_t] / beta = -2 a s in closed form: A is x_0 less its mean in units of the limit 5, e of the old policy.
    exact = float(rollout(network, -2 * (LEVELS * (1 - LEVELS)).sqrt(), seed=9).mean())
    assert 1.7 < exact < 2.1
    clean = rollout(network, network.base, seed=0)
    for iteration, count in enumerate(moves):
        minimise(network, algorithm, clean, seed=iteration)
        policy = network.policy.detach().clone()
        clean = rollout(network, policy, seed=iteration + 1)
        # Five standard errors of the mean of 20 000 samples, and of the regression's as many.
        assert float(clean.mean()) == pytest.approx(count * exact, abs=0.15)
        if reference == "old":
            network.sampling = policy


def test_the_clean_loss_is_the_published_one_written_out_in_velocities():
    generator = torch.Generator().manual_seed(0)
    policy, old, noisy, clean = (torch.randn(3, 4, 2, 2, generator=generator, dtype=torch.float64) for _ in range(4))
    units, beta, levels = torch.tensor([-1.0, 0.2, 0.9], dtype=torch.float64), 0.1, torch.tensor([0.9, 0.5, 0.1])
    wanted = []
    for row, unit in enumerate(units.tolist()):
        level = levels[[row]]
        total = 0.0
        for share, mixed in (
            ((1 + unit) / 2, beta * policy + (1 - beta) * old),
            ((1 - unit) / 2, (1 + beta) * old - beta * policy),
        ):
            error = to_clean(mixed[[row]], noisy[[row]], level, "v_prediction") - clean[[row]]
            total += share * float((error**2).mean() / error.abs().mean()) / beta
        wanted.append(total)
    found = nft_clean_loss(
        *(to_clean(each, noisy, levels, "v_prediction") for each in (policy, old)), clean, units, beta
    )
    assert found.tolist() == pytest.approx(wanted, rel=1e-6)


def test_an_estimate_without_error_gives_a_finite_loss_and_gradient():
    clean = torch.zeros(1, 1, 2, 2)
    policy = clean.clone().requires_grad_(True)
    nft_clean_loss(policy, clean, clean, torch.tensor([1.0]), 0.1).sum().backward()
    assert bool(torch.isfinite(policy.grad).all())


COMMON = (
    "algorithm={type: nft, old_decay_rate: 0.4}", "rollout.prompts_per_iteration=2", "rollout.samples_per_prompt=4",
    "run.iterations=3", "checkpoint.every=1", "checkpoint.keep=9", "learner.lr_decay_ratio=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """A run of three iterations, and by version whether the workers hold the exported weights at its end."""
    root, held = tmp_path_factory.mktemp("averaged") / "run", []

    def at_end(config, ports, prompts, tracker=None):
        (ack,) = ports.rollout.load(ports.learner.export(7))
        held.append((ack.version, ack.checksum == ports.learner.export(7).checksum))

    config = load_config("toy_sdxl", [*TINY, *COMMON, f"run.dir={root}"])
    drive(config, open_ports, Console(quiet=True), at_end=at_end)
    return root, held


def test_rollouts_use_the_average_of_the_policy_also_in_a_resumed_run(averaged, tiny, tmp_path):
    whole, _ = averaged
    halves = copy_run(whole, tmp_path / "halves", newest=2)
    drive(tiny(*COMMON, f"run.dir={halves}"), open_ports, Console(quiet=True), resume="auto")

    def weights(root, iteration: int, name: str) -> dict[str, Tensor]:
        return load_file(root / f"checkpoints/{iteration:06d}/learner/{name}.safetensors")

    for name in ("policy", "old"):
        one, other = (weights(root, 3, name) for root in (whole, halves))
        assert all(torch.equal(one[key], other[key]) for key in one)
    # Decays 0, 0.4, 0.5 (the largest): after the first iteration both are the same.
    old = {1: weights(whole, 1, "policy")}
    assert all(torch.equal(value, weights(whole, 1, "old")[key]) for key, value in old[1].items())
    for iteration, decay in ((2, 0.4), (3, 0.5)):
        policy = weights(whole, iteration, "policy")
        old[iteration] = {key: decay * old[iteration - 1][key] + (1 - decay) * value for key, value in policy.items()}
        found = weights(whole, iteration, "old")
        for key, value in found.items():
            torch.testing.assert_close(value, old[iteration][key], rtol=1e-5, atol=1e-8)
        assert any(not torch.equal(value, policy[key]) for key, value in found.items())
    require_drift(read_metrics(whole / "metrics.jsonl"))


def test_the_weights_that_workers_draw_with_are_the_old_ones(averaged):
    root, held = averaged
    assert held == [(7, True)]
    policy, old = (load_file(root / f"checkpoints/000003/learner/{name}.safetensors") for name in ("policy", "old"))
    assert any(not torch.equal(value, policy[key]) for key, value in old.items())


@pytest.mark.parametrize("how", [["model.tuning.method=full"], []])
def test_the_old_policy_answers_with_its_weights_and_leaves_the_policys_alone(tiny, how):
    with open_ports(tiny(*COMMON, *how), None) as ports:  # type: ignore[arg-type]
        family = ports.learner.worker.family
        own = trainable_tensors(family.network)
        other = {
            name: torch.randn(value.shape, generator=torch.Generator().manual_seed(3)) / 20
            for name, value in own.items()
        }
        noisy = torch.randn(1, *family.sample_shape, generator=torch.Generator().manual_seed(1))
        arguments = (noisy, torch.tensor([500]), family.encode(["a"]))
        with torch.no_grad():
            policy = family.predict(*arguments)
            with family.substituted(other):
                found = family.predict(*arguments)
            assert torch.equal(family.predict(*arguments), policy)
            for name, value in own.items():
                value.copy_(other[name])
            assert torch.equal(family.predict(*arguments), found) and not torch.equal(found, policy)


def test_global_deviations_divide_every_group_by_that_of_all_samples():
    qualities = {"iqa": dict(a=0.0, b=2.0, c=10.0, d=20.0)}
    found = group_advantages([("a", "b"), ("c", "d")], qualities, {"iqa": 1.0}, across_groups=True)
    std = statistics.pstdev([0.0, 2.0, 10.0, 20.0])
    assert [found.values[name] for name in "abcd"] == pytest.approx([-1 / std, 1 / std, -5 / std, 5 / std], rel=1e-6)
