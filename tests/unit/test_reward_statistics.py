"""Image statistics equal their closed forms, and have a gradient exactly if they declare one."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from acpo_dist.core.errors import RewardError
from acpo_dist.core.registry import REWARDS, resolve
from acpo_dist.rewards import statistics
from acpo_dist.workers.reward.worker import RewardWorker

NAMES = [
    "sharpness", "colourfulness", "saturation", "edge_density", "soft_edge_density", "colour_entropy",
    "soft_colour_entropy",
]  # fmt: skip
SMOOTH = [name for name in NAMES if name not in ("edge_density", "colour_entropy")]


def metric(name: str, **keys: Any) -> Any:
    kind = resolve("reward", REWARDS, name)
    return kind(kind.Config(**keys))


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(count: int = 4, size: int = 16, dtype: torch.dtype = torch.float64) -> Tensor:
    """Images away from the borders of [0, 1]."""
    return 0.05 + 0.9 * torch.rand(count, 3, size, size, generator=rng(0), dtype=dtype)


def flat(red: float, green: float, blue: float, size: int = 8) -> Tensor:
    return torch.tensor([red, green, blue], dtype=torch.float64)[None, :, None, None].expand(1, 3, size, size)


def halves(left: Tensor, right: Tensor) -> Tensor:
    return torch.cat([left, right], -1)


def test_the_laplacian_of_a_checkerboard_is_plus_and_minus_four():
    board = ((torch.arange(10)[:, None] + torch.arange(10)) % 2).double().expand(1, 3, 10, 10)
    # The inner 8 x 8 pixels hold as many +4 as -4: variance 16, which is also the largest there is.
    assert metric("sharpness")(board, [""]).item() == pytest.approx(16, abs=1e-9)


def test_a_ramp_has_no_sharpness():
    ramp = torch.linspace(0, 1, 12, dtype=torch.float64).expand(1, 3, 12, 12)
    assert metric("sharpness")(ramp, [""]).item() == pytest.approx(0, abs=1e-20)


def test_colourfulness_of_one_colour_is_its_mean_term_and_of_two_also_their_spread():
    red_yellow = halves(flat(1, 0, 0), flat(1, 1, 0))
    # R-G: 255 and 0; (R+G)/2-B: 127.5 and 255. Standard deviations 127.5 and 63.75, means 127.5 and 191.25.
    wanted = math.hypot(127.5, 63.75) + 0.3 * math.hypot(127.5, 191.25)
    assert metric("colourfulness")(red_yellow, [""]).item() == pytest.approx(wanted, abs=1e-3)
    assert metric("colourfulness")(flat(1, 0, 0), [""]).item() == pytest.approx(0.3 * math.hypot(255, 127.5), abs=1e-3)
    assert metric("colourfulness")(flat(0.4, 0.4, 0.4), [""]).item() == pytest.approx(0, abs=1e-3)


def test_saturation_is_that_of_hsv_and_zero_for_black():
    image = torch.cat([flat(0.5, 0.25, 0.25), flat(0, 0, 0), flat(0.3, 0.3, 0.3), flat(0, 0.2, 0)], -1)
    assert metric("saturation")(image, [""]).item() == pytest.approx((0.5 + 0 + 0 + 1) / 4, abs=1e-12)


def test_saturation_of_the_darkest_eight_bit_colour_is_exact():
    assert metric("saturation")(flat(1 / 255, 0, 0).float(), [""]).item() == pytest.approx(1, abs=1e-6)


def test_edges_lie_on_both_sides_of_a_step_and_nowhere_else():
    step = halves(flat(0, 0, 0), flat(1, 1, 1))
    assert metric("edge_density")(step, [""]).item() == 2 / 16
    assert metric("edge_density")(halves(flat(0, 0, 0), flat(0.19, 0.19, 0.19)), [""]).item() == 0


def test_the_soft_edge_density_follows_the_hard_one():
    step = halves(flat(0, 0, 0), flat(1, 1, 1))
    # Far from the threshold the logistic step is 1 (0.5 against 0.1) or exp(-5) (0.001 against 0.1).
    assert metric("soft_edge_density")(step, [""]).item() == pytest.approx(2 / 16 + 14 / 16 * math.exp(-5), abs=1e-3)


@pytest.mark.parametrize("name", ["colour_entropy", "soft_colour_entropy"])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_equally_many_pixels_of_n_corner_colours_have_log_n_bits(name: str, count: int):
    corners = [flat(*(float(index >> channel & 1) for channel in range(3))) for index in range(count)]
    assert metric(name)(torch.cat(corners, -1), [""]).item() == pytest.approx(math.log2(count), abs=1e-6)


def test_a_colour_half_way_between_two_centres_counts_as_half_of_each():
    middle = 0.5 / (statistics.BINS - 1)
    assert metric("soft_colour_entropy")(flat(middle, 0, 0), [""]).item() == pytest.approx(1, abs=1e-6)
    assert metric("soft_colour_entropy")(flat(middle, middle, middle), [""]).item() == pytest.approx(3, abs=1e-6)


def test_all_colours_reach_nine_bits():
    levels = (torch.arange(8, dtype=torch.float64) + 0.5) / 8
    image = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 16, 32)
    assert metric("colour_entropy")(image, [""]).item() == pytest.approx(9, abs=1e-5)


@pytest.mark.parametrize("name", SMOOTH)
def test_the_gradient_is_that_of_finite_differences(name: str):
    images = noise(2, 6).requires_grad_(True)
    found = metric(name)
    assert torch.autograd.gradcheck(lambda values: found(values, [""] * 2), (images,), eps=1e-7, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_statistics_have_a_gradient_exactly_if_they_declare_one(name: str):
    kind = resolve("reward", REWARDS, name)
    images = noise().float().requires_grad_(True)
    score = kind(kind.Config())(images, [""] * 4)
    assert kind.Config().differentiable == score.requires_grad == (name in SMOOTH)


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_gradients_of_flat_grey_images_are_finite(name: str, value: float):
    images = torch.full((1, 3, 8, 8), value, requires_grad=True)
    metric(name)(images, [""]).sum().backward()
    assert images.grad is not None and bool(torch.isfinite(images.grad).all())


@pytest.mark.parametrize("name", NAMES)
def test_a_score_does_not_depend_on_the_batch(name: str):
    images = noise(16, dtype=torch.float32)
    found = metric(name)
    together = found(images, [""] * 16)
    for size in (1, 4):
        parts = torch.cat([found(part, [""] * size) for part in images.split(size)])
        torch.testing.assert_close(parts, together, rtol=1e-5, atol=1e-4)


def test_a_statistic_may_be_wanted_higher_or_lower():
    kind = resolve("reward", REWARDS, "saturation")
    assert kind.Config().direction == 1
    assert kind.Config(prefer="less").direction == -1


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.rand(3, 8, 8), r"shape \(B, 3, H, W\), found shape \(3, 8, 8\)"),
        (torch.rand(1, 4, 8, 8), r"found shape \(1, 4, 8, 8\)"),
        (torch.rand(0, 3, 8, 8), "no images"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"floating-point images in \[0, 1\], found torch.uint8"),
        (torch.rand(1, 3, 2, 8), "at least 3 x 3, found 2 x 8"),
        (torch.full((2, 3, 8, 8), 200.0), "found values from 200 to 200"),
        (torch.full((2, 3, 8, 8), -0.5), "found values from -0.5 to -0.5"),
        (torch.stack([torch.rand(3, 8, 8), torch.full((3, 8, 8), math.nan)]), "1 of 2 images .* not finite"),
        (torch.full((1, 3, 8, 8), math.inf), "1 of 1 images .* not finite"),
    ],
    ids=["rank", "channels", "empty", "uint8", "small", "bright", "dark", "nan", "infinite"],
)
def test_what_is_no_image_is_refused_by_name(images: Tensor, words: str):
    with pytest.raises(RewardError, match=f"`sharpness`.*{words}"):
        metric("sharpness")(images, [""] * len(images))


def test_the_worker_gives_the_gradient_of_a_statistic_at_latents():
    from acpo_dist.models.sdxl import SdxlFamily
    from acpo_dist.workers.reward.wire import pack, unpack

    model = SdxlFamily.Config(path="toy-sdxl")
    served = RewardWorker(statistics.Sharpness.Config(), model=model, cut="latent", wire_dtype="float32")
    latents = torch.randn(3, 4, 8, 8, generator=rng(0))
    answer = served.value_and_grad(pack(latents, "float32"), [""] * 3)
    assert bool(unpack(answer.gradient).flatten(1).any(1).all())
