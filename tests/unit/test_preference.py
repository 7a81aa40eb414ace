"""The two statistics give every noise-space term, and the preference losses are the published ones."""

import math

import pytest
import torch
from torch import Tensor

from acpo_dist.diffusion.prediction import add_noise
from acpo_dist.objective.noise_space import ErrorStatistics, error_statistics, noise_statistics, target_output
from acpo_dist.objective.preference import KINDS, preference_logit, preference_term, split_pairs
from tests.helpers.predictions import PREDICTION_TYPES

LEVELS = torch.tensor([0.05, 0.3, 0.62, 0.9, 0.97, 0.999], dtype=torch.float64)
BETA = 5000.0


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mean_square(values: Tensor) -> Tensor:
    return (values**2).mean((1, 2, 3))


def at(level: Tensor) -> Tensor:
    return level.reshape(-1, 1, 1, 1)


class Batch:
    """Three winners and three losers that share noise and level; policy near the reference, float64."""

    def __init__(self, drift: float = 0.02) -> None:
        self.levels = LEVELS[[1, 3, 4]].repeat(2)
        self.noise = noise(3, 2, 5, 5, seed=0).repeat(2, 1, 1, 1)
        self.reference = self.noise + 0.3 * noise(6, 2, 5, 5, seed=1)
        self.policy = (self.reference + drift * noise(6, 2, 5, 5, seed=2)).requires_grad_(True)

    def statistics(self) -> ErrorStatistics:
        return noise_statistics(self.policy, self.reference, self.noise, self.levels, "epsilon")

    def logit(self) -> Tensor:
        """Diffusion-DPO's bracket, term by term from its definition."""
        policy, base = mean_square(self.policy - self.noise), mean_square(self.reference - self.noise)
        return -0.5 * BETA * ((policy[:3] - policy[3:]) - (base[:3] - base[3:]))


# The statistics


def test_the_policys_error_is_the_references_plus_twice_c_plus_a():
    batch = Batch(drift=0.5)
    found = batch.statistics()
    torch.testing.assert_close(found.policy_error, mean_square(batch.policy - batch.noise), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.reference_error_B, mean_square(batch.reference - batch.noise), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.drift_B, mean_square(batch.policy - batch.reference), rtol=1e-12, atol=0)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_statistics_are_in_noise_units_for_every_prediction_type(prediction_type: str):
    clean, eps = noise(6, 2, 4, 4, seed=0), noise(6, 2, 4, 4, seed=1)
    noisy, signal, spread = add_noise(clean, eps, LEVELS), at(LEVELS.sqrt()), at((1 - LEVELS).sqrt())
    model_outputs = []
    for seed in (2, 3):
        estimate = eps + 0.3 * noise(6, 2, 4, 4, seed=seed)
        x0 = (noisy - spread * estimate) / signal
        model_outputs.append({"epsilon": estimate, "sample": x0, "v_prediction": signal * estimate - spread * x0})
    policy, reference = model_outputs
    target = target_output(clean, eps, LEVELS, prediction_type)
    found = noise_statistics(policy[prediction_type], reference[prediction_type], target, LEVELS, prediction_type)
    wanted = error_statistics(policy["epsilon"], reference["epsilon"], eps)
    for name in ("cross_B", "drift_B", "reference_error_B"):
        # float64; the x0 head goes through a / s = 32 and back.
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=1e-9, atol=1e-12)


def test_a_velocity_error_counts_as_its_noise_error_so_beta_keeps_its_meaning():
    policy, reference, target = (noise(6, 2, 4, 4, seed=seed) for seed in range(3))
    found = noise_statistics(policy, reference, target, LEVELS, "v_prediction")
    torch.testing.assert_close(found.policy_error, LEVELS * mean_square(policy - target), rtol=1e-12, atol=0)


def test_the_excess_of_a_barely_moved_policy_survives_float32():
    reference, target = noise(1, 4, 16, 16, seed=0), noise(1, 4, 16, 16, seed=1)
    policy = reference + 1e-6 * noise(1, 4, 16, 16, seed=2)
    # Exactly representable inputs, so that only the arithmetic is judged.
    policy, reference, target = policy.float(), reference.float(), target.float()
    wanted = error_statistics(policy.double(), reference.double(), target.double()).excess
    ours = error_statistics(policy, reference, target).excess
    naive = mean_square(policy - target) - mean_square(reference - target)
    assert abs(float(ours / wanted) - 1) < 1e-4
    assert abs(float(naive / wanted) - 1) > 0.02


def test_the_statistics_pass_gradient_to_the_policy_alone():
    tensors = [noise(2, 1, 3, 3, seed=seed).requires_grad_(True) for seed in range(3)]
    policy, reference, target = tensors
    for found in (
        error_statistics(policy, reference, target),
        noise_statistics(policy, reference, target, LEVELS[:2], "v_prediction"),
    ):
        gradients = torch.autograd.grad(found.policy_error.sum(), tensors, allow_unused=True)
        assert gradients[0] is not None and gradients[1:] == (None, None)


def test_a_target_of_an_unknown_head_is_refused():
    with pytest.raises(ValueError, match=r"'flow'.*epsilon, v_prediction, sample"):
        target_output(torch.zeros(1, 1), torch.zeros(1, 1), LEVELS[:1], "flow")


# Pairs and logits


def test_pairs_are_first_the_winners_then_their_losers():
    batch = Batch()
    winner, loser = split_pairs(batch.statistics())
    error = mean_square(batch.reference - batch.noise)
    torch.testing.assert_close(winner.reference_error_B, error[:3], rtol=1e-12, atol=0)
    torch.testing.assert_close(loser.reference_error_B, error[3:], rtol=1e-12, atol=0)


def test_an_odd_batch_holds_no_pairs():
    with pytest.raises(ValueError, match="even number of samples, found 3"):
        split_pairs(Batch().statistics().rows([0, 1, 2]))


def test_the_logit_is_diffusion_dpos_bracket_over_means_with_its_half():
    batch = Batch()
    winner, loser = split_pairs(batch.statistics())
    term = preference_term("dpo", winner, loser, beta=BETA)
    torch.testing.assert_close(term.logit_P, batch.logit().detach(), rtol=1e-9, atol=1e-9)
    assert float(term.logit_P.abs().min()) > 0.1  # or the comparison would be one of zeros
    c_w, a_w, c_l, a_l = winner.cross_B, winner.drift_B, loser.cross_B, loser.drift_B
    wanted = -torch.log(torch.sigmoid(-BETA / 2 * ((2 * c_w + a_w) - (2 * c_l + a_l))))
    torch.testing.assert_close(term.loss_P, wanted, rtol=1e-9, atol=1e-9)


# Each loss


def test_dpo_starts_at_log_2_with_the_closed_forms_gradient():
    batch = Batch(drift=0.0)
    batch.policy = batch.policy.detach().float().requires_grad_(True)
    batch.reference = batch.policy.detach().clone()
    batch.noise = batch.noise.float()
    loss = preference_term("dpo", *split_pairs(batch.statistics()), beta=BETA).loss_P
    assert loss.tolist() == pytest.approx([math.log(2)] * 3, abs=1e-6)
    (gradient,) = torch.autograd.grad(loss.sum(), batch.policy)
    # beta / 2 times sigmoid(0), times d mean((p - n)^2) / dp = 2 (p - n) / D; down for winners, up for losers.
    sign = torch.tensor([1.0] * 3 + [-1.0] * 3).reshape(-1, 1, 1, 1)
    wanted = sign * BETA / 2 * 0.5 * 2 * (batch.policy.detach() - batch.noise) / 50
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-6)


def test_dpos_gradient_away_from_the_start_is_the_sigmoid_of_minus_the_logit():
    batch = Batch()
    loss = preference_term("dpo", *split_pairs(batch.statistics()), beta=BETA).loss_P
    (gradient,) = torch.autograd.grad(loss.sum(), batch.policy)
    (wanted,) = torch.autograd.grad((-torch.sigmoid(-batch.logit().detach()) * batch.logit()).sum(), batch.policy)
    torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-12)


def test_a_hopeless_logit_gives_a_finite_loss():
    statistics = ErrorStatistics(
        cross_B=torch.tensor([1e3, -1e3]), drift_B=torch.zeros(2), reference_error_B=torch.zeros(2)
    )
    term = preference_term("dpo", *split_pairs(statistics), beta=BETA)
    assert term.loss_P.item() == pytest.approx(1e7) and term.logit_P.item() == pytest.approx(-1e7)


def test_ipo_is_beta_squared_times_the_published_form():
    batch = Batch()
    term = preference_term("ipo", *split_pairs(batch.statistics()), beta=BETA)
    ratio = batch.logit() / BETA
    torch.testing.assert_close(term.loss_P, BETA**2 * (ratio - 1 / (2 * BETA)) ** 2, rtol=1e-9, atol=1e-9)


def test_the_hinge_stops_pulling_once_the_margin_is_reached():
    winner = ErrorStatistics(
        cross_B=torch.tensor([0.0, -0.3, -2.0], requires_grad=True),
        drift_B=torch.zeros(3), reference_error_B=torch.zeros(3),
    )  # fmt: skip
    loser = ErrorStatistics(cross_B=torch.zeros(3), drift_B=torch.zeros(3), reference_error_B=torch.zeros(3))
    term = preference_term("hinge", winner, loser, beta=1.0)
    assert term.loss_P.tolist() == pytest.approx([1.0, 0.7, 0.0])
    (gradient,) = torch.autograd.grad(term.loss_P.sum(), winner.cross_B)
    assert gradient.tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("sft_weight", [0.0, 3.0])
def test_cpo_compares_the_policys_own_errors_and_adds_the_winners(sft_weight: float):
    batch = Batch(drift=0.4)
    term = preference_term("cpo", *split_pairs(batch.statistics()), beta=10.0, sft_weight=sft_weight)
    error = mean_square(batch.policy - batch.noise)
    wanted = -torch.log(torch.sigmoid(-5.0 * (error[:3] - error[3:]))) + sft_weight * error[:3]
    torch.testing.assert_close(term.loss_P, wanted, rtol=1e-10, atol=0)


def test_cpo_does_not_look_at_the_reference():
    batch = Batch(drift=0.4)
    moved = noise_statistics(batch.policy, batch.reference + 1, batch.noise, batch.levels, "epsilon")
    terms = [
        preference_term("cpo", *split_pairs(statistics), beta=10.0, sft_weight=1.0)
        for statistics in (batch.statistics(), moved)
    ]
    torch.testing.assert_close(terms[0].loss_P, terms[1].loss_P, rtol=1e-10, atol=0)


def test_sft_is_the_winners_error_and_leaves_the_loser_alone():
    batch = Batch()
    term = preference_term("sft", *split_pairs(batch.statistics()), beta=BETA)
    torch.testing.assert_close(term.loss_P, mean_square(batch.policy - batch.noise)[:3], rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(term.loss_P.sum(), batch.policy)
    assert gradient[3:].abs().max() == 0 < gradient[:3].abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_down_any_loss_makes_the_winner_likelier(kind: str):
    batch = Batch()
    loss = preference_term(kind, *split_pairs(batch.statistics()), beta=20.0, sft_weight=1.0).loss_P
    (gradient,) = torch.autograd.grad(loss.sum(), batch.policy)
    after = mean_square(batch.policy - 1e-3 * gradient - batch.noise)[:3]
    assert bool((after < mean_square(batch.policy - batch.noise)[:3]).all())


def test_beta_of_the_code_without_the_half_is_half_as_large():
    winner, loser = torch.tensor([0.1]), torch.tensor([0.4])
    assert preference_logit(winner, loser, 5000.0).item() == pytest.approx(2500 * 0.3, rel=1e-6)


def test_an_unknown_preference_loss_is_refused():
    halves = split_pairs(Batch().statistics())
    with pytest.raises(ValueError, match=r"'orpo'.*dpo, ipo, hinge, cpo, sft"):
        preference_term("orpo", *halves, beta=1.0)
