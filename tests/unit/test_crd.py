"""Centered reward distillation: its loss written out sample by sample, what minimises it, and its old policy."""

import pytest
import torch
from safetensors.torch import load_file

from acpo_dist.algorithms.base import MicroBatch
from acpo_dist.algorithms.centered import Crd
from acpo_dist.algorithms.config import CrdConfig
from acpo_dist.algorithms.noising import NoisedStates
from acpo_dist.config.load import load_config
from acpo_dist.core.errors import ConfigError
from acpo_dist.objective.centered import centered, implicit_reward, kl_weights
from acpo_dist.tracking.console import Console
from acpo_dist.tracking.jsonl import read_metrics
from acpo_dist.training.local import open_ports
from acpo_dist.training.run import drive
from tests.conftest import TINY
from tests.helpers.runs import require_drift

PROMPTS = ("a", "a", "a", "b", "b", "b")
SHARES = torch.tensor([0.9, 0.5, 0.1, 0.6, 0.6, 0.2], dtype=torch.float64)
SHAPE = (6, 2, 3, 3)
CRD = [
    "rollout.prompts_per_iteration=2", "rollout.samples_per_prompt=4", "algorithm.type=crd",
    "algorithm.kl_guidance=1.5",
]  # fmt: skip


def normal(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Outputs:
    """A network whose outputs are given for each of its three sets of weights, and for the null prompt."""

    prediction_type = "epsilon"

    def __init__(self, old: torch.Tensor, null: torch.Tensor) -> None:
        self._now, self._old, self._null = old, old, null

    def encode(self, prompts, conditioning=None):
        return None

    def predict(self, noisy, timesteps_B, condition):
        return self._now

    def old(self):
        return self._use(self._old)

    def anchored(self):
        return self._use(self._null)

    def _use(self, outputs):
        from contextlib import contextmanager

        @contextmanager
        def chosen():
            before, self._now = self._now, outputs
            yield
            self._now = before

        return chosen()


def loss_of(policy, old, base, null, noise, config: CrdConfig, is_null) -> torch.Tensor:
    states = NoisedStates(
        latents=normal(9), noise=noise, timesteps_B=torch.full((6,), 500), is_null_B=torch.tensor(is_null),
        alpha_bars_B=torch.full((6,), 0.5, dtype=torch.float64), condition=None,
    )  # fmt: skip
    batch = MicroBatch(
        sample_ids=tuple("012345"), prompts=PROMPTS, noise_keys=(), states=None, clean=normal(8), clean_is_real=False,
        weights_B=2 * SHARES - 1,
    )  # fmt: skip
    loss, _ = Crd(config).objective(batch, Outputs(old, null), states, policy, base)
    return loss


@pytest.mark.parametrize("is_null", [[False] * 6, [False, True, False, False, False, True]])
def test_the_loss_is_the_published_one_written_out_for_each_sample(is_null):
    policy, old, base, null, noise = (normal(seed) for seed in range(5))
    beta, limit, kl, guidance = 0.7, 5.0, 0.3, 2.5

    def reward(index: int) -> torch.Tensor:
        mine, theirs = policy[index] - noise[index], old[index] - noise[index]
        return -((mine**2 / mine.abs().mean()).mean() - (theirs**2 / theirs.abs().mean()).mean())

    wanted = []
    for index, prompt in enumerate(PROMPTS):
        group = [place for place, name in enumerate(PROMPTS) if name == prompt and not is_null[place]]
        implicit = reward(index) - sum(reward(place) for place in group) / len(group)
        external = SHARES[index] - SHARES[group].mean()
        guided = null[index] + guidance * (base[index] - null[index])
        weight = kl * (1e-4 / kl + SHARES[index] * (1 - 1e-4 / kl))
        distance = ((policy[index] - guided) ** 2).mean()
        wanted.append(limit / beta * (beta * implicit - external) ** 2 + weight * distance)
    config = CrdConfig(beta=beta, kl_weight=kl, kl_guidance=guidance)
    assert torch.allclose(loss_of(policy, old, base, null, noise, config, is_null), torch.stack(wanted), rtol=1e-12)


def test_the_loss_vanishes_where_implicit_rewards_equal_advantages_up_to_one_number_per_prompt():
    old, noise = normal(0), normal(1)
    policy = old.clone().requires_grad_()
    optimiser = torch.optim.Adam([policy], lr=0.02)
    config = CrdConfig(kl_weight=0)
    first = None
    for _ in range(400):
        loss = loss_of(policy, old, old, old, noise, config, [False] * 6).mean()
        first = loss.item() if first is None else first
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert first is not None and loss.item() < 1e-4 * first
    found = implicit_reward(policy.detach(), old, noise) - SHARES
    for rows in (found[:3], found[3:]):
        assert torch.allclose(rows, rows.mean().expand(3), atol=0.02)


def test_means_are_constant_and_the_kl_weight_grows_with_the_advantage():
    values = torch.tensor([1.0, 3.0, 5.0], requires_grad=True)
    centered(values, ("a", "a", "b"), torch.ones(3, dtype=torch.bool)).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [1.0, 1.0, 1.0]
    assert kl_weights(torch.tensor([0.0, 1.0]), 0.1, adaptive=True).tolist() == pytest.approx([1e-4, 0.1])
    assert kl_weights(torch.tensor([0.0, 1.0]), 0.1, adaptive=False).tolist() == pytest.approx([0.1, 0.1])


def test_the_policy_draws_and_the_old_policy_is_the_published_average(tmp_path):
    root = tmp_path / "run"
    config = load_config(
        "toy_sdxl", [*TINY, *CRD, "run.iterations=3", "checkpoint.every=1", "checkpoint.keep=4", f"run.dir={root}"]
    )
    drawn = {}

    def published(_config, ports, _prompts) -> None:
        drawn.update(ports.learner.export(3).tensors)

    drive(config, open_ports, Console(quiet=True), at_end=published)
    require_drift(read_metrics(root / "metrics.jsonl"))
    saved = sorted((root / "checkpoints").glob("[0-9]*"))
    policies, olds = (
        [load_file(path / "learner" / f"{name}.safetensors") for path in saved] for name in ("policy", "old")
    )
    assert drawn.keys() == policies[-1].keys() and all(torch.equal(drawn[name], policies[-1][name]) for name in drawn)
    for index in (1, 2):
        decay = 0.25 + 0.005 * index
        for name, value in olds[index].items():
            wanted = decay * olds[index - 1][name] + (1 - decay) * policies[index][name]
            assert torch.allclose(value, wanted, rtol=1e-5, atol=1e-7)
            assert not torch.equal(olds[index][name], policies[index][name]) or not policies[index][name].any()


def test_a_micro_batch_that_cuts_groups_is_refused():
    with pytest.raises(ConfigError, match=r"learner\.micro_batch is 2"):
        load_config("toy_sdxl", [*TINY, *CRD, "learner.micro_batch=2"])
