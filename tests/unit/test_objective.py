"""The surrogate has the exact gradient; the anchor, its controller and the normaliser follow their definitions."""

import itertools
import math
import random
import statistics

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from acpo_dist.core.errors import RewardError
from acpo_dist.diffusion.prediction import to_clean
from acpo_dist.objective.anchor import SPACES, anchor_error, output_drift
from acpo_dist.objective.controller import DriftController, initial_anchor_weight
from acpo_dist.objective.normalise import fit_normaliser
from acpo_dist.objective.perceptual import SHAPES, clip_pixels, shape_reward, surrogate

TARGET = 0.6
LEVELS = torch.tensor([0.62, 0.9, 0.97, 0.75, 0.8, 0.7], dtype=torch.float64)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=rng(seed), dtype=torch.float64)


def convolutions(seed: int, *channels: int) -> nn.Sequential:
    """3 x 3 convolutions in float64 with tanh between them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(channels):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.Tanh()]
        return nn.Sequential(*layers[:-1]).double()


class Chain:
    """Network -> x0-hat -> decoder -> clip -> quality, small enough for float64."""

    def __init__(self) -> None:
        self.network = convolutions(0, 4, 6, 4)
        self.decoder = nn.Sequential(nn.Upsample(scale_factor=2), convolutions(1, 4, 8, 3)).requires_grad_(False)
        self.judge = convolutions(2, 3, 5, 1).requires_grad_(False)
        self.noisy = noise(len(LEVELS), 4, 6, 6, seed=3)

    def clean(self) -> Tensor:
        return to_clean(self.network(self.noisy), self.noisy, LEVELS, "epsilon")

    def decode(self, clean: Tensor) -> Tensor:
        # Widened so that a good share of the pixels lies outside [0, 1] on either side.
        return 4 * self.decoder(clean) + 0.5

    def quality(self, pixels: Tensor) -> Tensor:
        """Smooth, different for every image, on both sides of the target."""
        return 1.6 + 8 * torch.tanh(self.judge(pixels)).mean((1, 2, 3))

    def gradient(self) -> Tensor:
        return torch.cat([parameter.grad.flatten() for parameter in self.network.parameters()])


def clip_by_definition(pixels: Tensor) -> Tensor:
    """MATH's clamp, written as a hook: a loss's gradient passes unless the descent step would leave [0, 1] further."""
    clipped = pixels + (pixels.clamp(0, 1) - pixels).detach()

    def project(gradient: Tensor) -> Tensor:
        further_up, further_down = (pixels > 1) & (gradient < 0), (pixels < 0) & (gradient > 0)
        return torch.where(further_up | further_down, torch.zeros_like(gradient), gradient)

    clipped.register_hook(project)
    return clipped


def loss_by_definition(quality: Tensor, shape: str) -> Tensor:
    gap = TARGET - quality
    return {"identity": -quality, "hinge": gap.clamp(min=0), "softplus": torch.log1p(torch.exp(gap))}[shape]


# The surrogate


@pytest.mark.parametrize("cut", ["image", "latent"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_surrogate_has_the_gradient_of_the_whole_graph(shape: str, cut: str):
    whole = Chain()
    quality = whole.quality(clip_by_definition(whole.decode(whole.clean())))
    # Without both sides of the target the hinge would be tested on one branch only.
    assert 0 < int((quality > TARGET).sum()) < len(LEVELS)
    loss_by_definition(quality, shape).sum().backward()

    parted = Chain()
    ours = parted.clean() if cut == "latent" else parted.decode(parted.clean())
    sent = ours.detach().clone().requires_grad_(True)
    pixels = parted.decode(sent) if cut == "latent" else sent
    remote = parted.quality(clip_pixels(pixels, ascend=True))
    (gradient,) = torch.autograd.grad(remote.sum(), sent)
    _, slope = shape_reward(remote.detach(), shape, TARGET)
    surrogate(ours, gradient, slope).sum().backward()

    # float64 of the same products in another order.
    difference = (parted.gradient() - whole.gradient()).norm() / whole.gradient().norm()
    assert float(difference) < 1e-10


def test_the_surrogate_sees_gradients_at_pixels_on_either_side_of_the_gamut():
    # Guards the test above: its images must make the clamp both stop and pass gradients outside [0, 1].
    chain = Chain()
    pixels = chain.decode(chain.clean()).detach().requires_grad_(True)
    (plain,) = torch.autograd.grad(chain.quality(pixels + (pixels.clamp(0, 1) - pixels).detach()).sum(), pixels)
    for outside in (pixels > 1, pixels < 0):
        assert (plain[outside] > 0).any() and (plain[outside] < 0).any()


def test_the_surrogate_treats_what_came_from_the_pool_as_constant():
    tensor, gradient = noise(2, 3, 4, seed=0).requires_grad_(True), noise(2, 3, 4, seed=1).requires_grad_(True)
    slope = noise(2, seed=2).requires_grad_(True)
    surrogate(tensor, gradient, slope).sum().backward()
    assert gradient.grad is None and slope.grad is None
    assert torch.equal(tensor.grad, slope.detach()[:, None, None] * gradient.detach())


def test_the_surrogate_pairs_each_sample_with_its_own_gradient():
    tensor, gradient, slope = noise(3, 2, 2, seed=0), noise(3, 2, 2, seed=1), noise(3, seed=2)
    wanted = [float(slope[i] * torch.dot(gradient[i].flatten(), tensor[i].flatten())) for i in range(3)]
    assert surrogate(tensor, gradient, slope).tolist() == pytest.approx(wanted, rel=1e-12)


# Shapes


@pytest.mark.parametrize("shape", SHAPES)
def test_the_slope_of_a_shape_is_its_derivative(shape: str):
    quality = torch.linspace(-8, 8, 101, dtype=torch.float64).requires_grad_(True)
    value, slope = shape_reward(quality, shape, TARGET)
    torch.testing.assert_close(value, loss_by_definition(quality, shape), rtol=0, atol=1e-12)
    (wanted,) = torch.autograd.grad(loss_by_definition(quality, shape).sum(), quality)
    # float64; no point of the grid lies on the hinge's kink.
    torch.testing.assert_close(slope, wanted, rtol=0, atol=1e-12)


def test_the_hinge_switches_itself_off_at_the_target():
    value, slope = shape_reward(torch.tensor([TARGET - 1, TARGET, TARGET + 1]), "hinge", TARGET)
    assert value.tolist() == [1.0, 0.0, 0.0]
    assert slope.tolist() == [-1.0, 0.0, 0.0]


def test_an_unknown_shape_is_refused():
    with pytest.raises(ValueError, match=r"'quadratic'.*identity, hinge, softplus"):
        shape_reward(torch.zeros(1), "quadratic", 0.0)


# The clamp


@pytest.mark.parametrize(
    ("pixel", "gradient", "descended", "ascended"),
    [
        # inside: always passes
        (0.5, 1.0, 1.0, 1.0),
        (0.5, -1.0, -1.0, -1.0),
        # too bright: a step that darkens passes, one that brightens does not
        (1.2, 1.0, 1.0, 0.0),
        (1.2, -1.0, 0.0, -1.0),
        # too dark: the other way round
        (-0.2, 1.0, 0.0, 1.0),
        (-0.2, -1.0, -1.0, 0.0),
        # on the border nothing is outside yet
        (1.0, -1.0, -1.0, -1.0),
        (0.0, 1.0, 1.0, 1.0),
    ],
)
def test_the_clamp_stops_only_steps_that_leave_the_gamut_further(pixel, gradient, descended, ascended):
    for ascend, wanted in ((False, descended), (True, ascended)):
        value = torch.tensor([pixel]).requires_grad_(True)
        clip_pixels(value, ascend=ascend).backward(torch.tensor([gradient]))
        assert value.grad.item() == wanted


def test_the_clamp_forwards_clipped_values():
    assert clip_pixels(torch.tensor([-0.3, 0.0, 0.4, 1.0, 7.0])).tolist() == pytest.approx([0.0, 0.0, 0.4, 1.0, 1.0])


# The anchor


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("space", SPACES)
def test_the_anchor_is_exactly_zero_when_both_heads_are_equal(prediction_type: str, space: str):
    model_output = torch.randn(2, 4, 8, 8, generator=rng(0)).half()
    drift = output_drift(model_output, model_output.clone(), torch.tensor([0.004, 0.999]), prediction_type, space)
    assert anchor_error(drift).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_anchor_measures_the_same_drift_for_every_prediction_type(prediction_type: str, space: str):
    # Two answers to the same x_t, written as all three heads by the conversion table.
    noisy, shape = noise(6, 3, 5, 5, seed=0), (-1, 1, 1, 1)
    signal, spread = LEVELS.sqrt().reshape(shape), (1 - LEVELS).sqrt().reshape(shape)
    answers = []
    for seed in (1, 2):
        eps = noise(6, 3, 5, 5, seed=seed)
        clean = (noisy - spread * eps) / signal
        answers.append({"epsilon": eps, "sample": clean, "v_prediction": signal * eps - spread * clean})
    policy, base = answers
    own_unit = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}[space]
    drift = output_drift(policy[prediction_type], base[prediction_type], LEVELS, prediction_type, space)
    # float64, factors a, 1 / a, s / a and a / s below 6 here.
    torch.testing.assert_close(drift, policy[own_unit] - base[own_unit], rtol=1e-12, atol=1e-12)


def test_a_tiny_drift_survives_half_precision_heads():
    # Subtracted first, in float32: one float16 step of 2**-10 at 1 is seen whole, at any level.
    base = torch.ones(1, 1, 2, 2, dtype=torch.float16)
    policy = base + 2**-10
    drift = output_drift(policy, base, torch.tensor([0.25]), "v_prediction", "eps")
    # a = 0.5 exactly.
    assert drift.dtype == torch.float32 and drift.unique().tolist() == [2**-11]


def test_the_anchor_passes_gradient_to_the_policy_alone():
    policy, base = torch.randn(2, 1, 3, 4, 4, generator=rng(0)).unbind()
    policy.requires_grad_(True), base.requires_grad_(True)
    anchor_error(output_drift(policy, base, torch.tensor([0.8]), "epsilon")).sum().backward()
    assert base.grad is None
    # d/dp mean (p - b)^2 = 2 (p - b) / D, in float32.
    torch.testing.assert_close(policy.grad, 2 * (policy - base).detach() / 48, rtol=1e-5, atol=1e-8)


def test_the_anchor_error_is_a_mean_over_each_samples_own_elements():
    drift = torch.stack([torch.full((2, 3), 2.0), torch.full((2, 3), 3.0)])
    assert anchor_error(drift).tolist() == [4.0, 9.0]


@pytest.mark.parametrize(("prediction_type", "space"), [("flow", "eps"), ("epsilon", "pixels")])
def test_the_anchor_refuses_unknown_units(prediction_type: str, space: str):
    with pytest.raises(ValueError, match="unknown"):
        output_drift(torch.zeros(1, 1), torch.zeros(1, 1), torch.tensor([0.5]), prediction_type, space)


# The anchor weight and its controller


@pytest.mark.parametrize(("reward_weight", "budget"), [(1.0, 0.15), (0.3, 0.02)])
def test_the_first_anchor_weight_makes_the_local_optimum_drift_by_the_budget(reward_weight: float, budget: float):
    gradient = noise(1, 3, 4, 4, seed=0) * 0.05
    weight = initial_anchor_weight(
        reward_weight=reward_weight, num_elements=48, gradient_norm=float(gradient.norm()), budget=budget
    )

    def local_problem(flat: np.ndarray) -> tuple[float, np.ndarray]:
        drift = torch.from_numpy(flat).reshape(gradient.shape).requires_grad_(True)
        value = -reward_weight * (gradient * drift).sum() + weight * anchor_error(drift).sum()
        value.backward()
        return float(value.detach()), drift.grad.flatten().numpy()

    found = minimize(local_problem, np.zeros(48), jac=True, method="BFGS", options={"gtol": 1e-10})
    # A quadratic in float64: BFGS lands within about 1e-8 of its minimum.
    assert math.sqrt(np.mean(found.x**2)) == pytest.approx(budget, rel=1e-6)


@pytest.mark.parametrize(
    ("norm", "budget"), [(0.0, 0.1), (math.nan, 0.1), (math.inf, 0.1), (1.0, 0.0), (1.0, -1.0), (1.0, math.nan)]
)
def test_no_anchor_weight_is_made_up_from_a_useless_gradient_or_budget(norm: float, budget: float):
    with pytest.raises(ValueError, match="must be"):
        initial_anchor_weight(reward_weight=1.0, num_elements=48, gradient_norm=norm, budget=budget)


def test_the_anchor_weight_rises_over_budget_and_falls_under_it():
    controller = DriftController(weight=10.0, budget=0.1, rate=0.1, headroom=1.0)
    assert controller.update(0.12**2).weight > 10 > controller.update(0.08**2).weight
    assert controller.update(0.1**2).weight == pytest.approx(10.0, rel=1e-12)


def test_the_controller_answers_the_log_excess_and_its_change_and_brakes_harder_over_the_set_point():
    controller = DriftController(weight=10.0, budget=0.1, rate=0.1, brake=4.0, damping=3.0, headroom=1.0)
    below, above = 0.9, 1.2
    first = controller.update((0.1 * below) ** 2)
    assert first.weight == pytest.approx(10 * below**0.1, rel=1e-12)
    second = first.update((0.1 * above) ** 2)
    assert second.weight == pytest.approx(first.weight * above**0.4 * (above / below) ** 0.3, rel=1e-12)


def test_damping_settles_a_policy_that_answers_late_where_the_integral_alone_keeps_swinging():
    def swing(**options: float) -> float:
        controller, noise = DriftController(weight=30.0, budget=0.3, **options), random.Random(0)
        towards = drift = 0.0
        drifts = []
        for _ in range(400):
            # The wanted drift is approached in two stages of eight iterations each, and measured with an error of 10 %.
            towards += (0.8 / controller.weight - towards) / 8
            drift += (towards - drift) / 8
            drifts.append(drift)
            controller = controller.update((drift * math.exp(noise.gauss(0, 0.1))) ** 2)
        return max(drifts[-100:]) / min(drifts[-100:])

    assert swing(rate=0.1, brake=20.0, damping=0.0) > 1.5
    assert swing(rate=0.15) < 1.2


def test_one_step_of_the_controller_never_exceeds_a_factor_e():
    assert DriftController(weight=2.0, budget=0.1, rate=0.1).update(1e6).weight == pytest.approx(2 * math.e, rel=1e-12)


@pytest.mark.parametrize("options", [{"rate": 0.0, "budget": 0.1}, {"rate": 0.1, "budget": None}])
def test_the_anchor_weight_stays_fixed_without_rate_or_budget(options: dict):
    controller = DriftController(weight=3.0, **options)
    assert controller.update(100.0) == controller == controller.update(0.0)


def test_the_anchor_weight_stays_within_its_limits():
    controller = DriftController(weight=1.0, budget=0.1, rate=0.5, min_weight=0.5, max_weight=2.0)
    high = low = controller
    for _ in range(20):
        high, low = high.update(1.0), low.update(0.0)
    assert (low.weight, high.weight) == (0.5, 2.0)


@pytest.mark.parametrize("start", [0.5, 400.0])
def test_the_controller_brings_a_sluggish_model_to_its_set_point_below_the_budget(start: float):
    # The local optimum drifts by c / weight (rms); the model goes a third of the way in each iteration.
    controller, drift = DriftController(weight=start, budget=0.15, rate=0.1), 0.0
    for _ in range(400):
        drift += (3.0 / controller.weight - drift) / 3
        controller = controller.update(drift**2)
    set_point = controller.headroom * 0.15
    assert set_point < 0.15
    assert drift == pytest.approx(set_point, rel=0.01)
    assert controller.weight == pytest.approx(3.0 / set_point, rel=0.01)


# Normalisation


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_base_samples_have_mean_zero_and_standard_deviation_one(higher_is_better: bool):
    scores = (40 + 7 * noise(64, seed=0)).tolist()
    normaliser = fit_normaliser("niqe", scores, higher_is_better=higher_is_better, target_quantile=None)
    normal = [normaliser.normalise(score) for score in scores]
    # float64 sums of 64 numbers near 40.
    assert statistics.fmean(normal) == pytest.approx(0, abs=1e-12)
    assert statistics.pstdev(normal) == pytest.approx(1, abs=1e-12)
    assert normaliser.target is None


def test_the_sign_turns_where_lower_is_better():
    scores = [1.0, 2.0, 4.0]
    up = fit_normaliser("musiq", scores, higher_is_better=True, target_quantile=None)
    down = fit_normaliser("niqe", scores, higher_is_better=False, target_quantile=None)
    assert up.normalise(4.0) > 0 > up.normalise(1.0)
    assert [down.normalise(score) for score in scores] == [-up.normalise(score) for score in scores]


@pytest.mark.parametrize("higher_is_better", [True, False])
@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.9])
def test_the_target_has_the_configured_share_of_base_samples_below_it(higher_is_better: bool, quantile: float):
    scores = noise(200, seed=1).tolist()
    normaliser = fit_normaliser("m", scores, higher_is_better=higher_is_better, target_quantile=quantile)
    below = statistics.fmean(normaliser.normalise(score) < normaliser.target for score in scores)
    # A sample quantile is exact to one sample.
    assert below == pytest.approx(quantile, abs=1.01 / 200)


@pytest.mark.parametrize("value", [0.0, 3.7, 1e9])
def test_a_metric_that_cannot_tell_samples_apart_is_refused(value: float):
    with pytest.raises(RewardError, match=r"`flat`.*all 50 base samples"):
        fit_normaliser("flat", [value] * 50, higher_is_better=True, target_quantile=0.9)


def test_scores_that_differ_by_rounding_alone_are_refused_and_small_ones_that_differ_are_not():
    one_ulp = torch.nextafter(torch.tensor(0.98), torch.tensor(1.0)).item()
    with pytest.raises(RewardError, match="base samples"):
        fit_normaliser("flat", [torch.tensor(0.98).item(), one_ulp] * 8, higher_is_better=True, target_quantile=None)
    assert fit_normaliser("m", [1e-9, 2e-9], higher_is_better=True, target_quantile=None).std == pytest.approx(5e-10)


@pytest.mark.parametrize("scores", [[], [1.0], [1.0, math.nan], [1.0, 2.0, math.inf]])
def test_calibration_refuses_too_few_scores_and_scores_that_are_not_finite(scores: list[float]):
    with pytest.raises(RewardError, match=r"`broken`.*two finite scores"):
        fit_normaliser("broken", scores, higher_is_better=True, target_quantile=None)
